"""Target a, the surrogate: the base model fine-tuned on the retain rows, without the forget set."""

from __future__ import annotations

import hashlib
import inspect
import json
import logging
from collections.abc import Iterator, Sequence
from importlib.metadata import version
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from lm_ortho.data import encoding
from lm_ortho.data.encoding import Example
from lm_ortho.finetune import lora
from lm_ortho.finetune.train import FinetunePlan, split_batch
from lm_ortho.objective import surrogate_training
from lm_ortho.objective.distribution import predict_distributions, split_into_chunks, vocabulary_size
from lm_ortho.objective.surrogate_training import (
    SurrogatePlan,
    SurrogateTraining,
    count_max_steps,
    make_plan,
    unchanged_flags,
)
from lm_ortho.runtime.progress import ProgressCallback
from lm_ortho.runtime.resume import NO_RESUME, ResumeFolder

log = logging.getLogger(__name__)


def find_copied_tokens(example: Example) -> Tensor:
    """Boolean mask (predicted tokens,) of tokens that copy the prompt.

    The bigram of such a token with the token before or after it occurs in the prompt.
    """
    ids, start = example.ids, example.start
    prompt_bigrams = set(pairwise(ids[:start]))

    def is_copied(t: int) -> bool:
        with_previous = (ids[t - 1], ids[t]) in prompt_bigrams
        return with_previous or (t + 1 < len(ids) and (ids[t], ids[t + 1]) in prompt_bigrams)

    return torch.tensor([is_copied(t) for t in range(start, len(ids))])


def surrogate_target(
    merged_model: torch.nn.Module,
    base_model: torch.nn.Module,
    examples: Sequence[Example],
    *,
    retain: Sequence[Example],
    steps: int,
    batch_rows: int,
    seed: int,
    progress: ProgressCallback,
    resume: ResumeFolder = NO_RESUME,
) -> Iterator[Tensor]:
    """Yields target distributions (predicted tokens, vocabulary) of the forget ``examples``, one after the other.

    ``base_model`` is unchanged. The vocabulary of the surrogate may be shorter or longer than that of the merged model,
    by a padding token or by rows that fill up a matrix. ``steps`` and ``batch_rows`` (forget rows in a step) are
    those of the edit, whose tokens bound the training.
    """
    with unchanged_flags(base_model):
        # 1. Fine-tune a LoRA adapter on the retain rows until its loss on them is within the tolerance.
        max_steps = count_max_steps(examples, retain, steps, forget_rows=batch_rows)
        plan = make_plan(merged_model, base_model, retain, max_steps=max_steps, seed=seed)
        surrogate = _train_or_load(merged_model, base_model, retain, plan=plan, progress=progress, resume=resume)
        for chunk in split_into_chunks(examples, vocabulary_size(merged_model)):
            # 2. Predict some of the forget rows with both models.
            rows = [examples[i] for i in chunk]
            surrogate_probs = predict_distributions(surrogate, rows)
            merged_probs = predict_distributions(merged_model, rows)
            # 3. Use the surrogate, except on tokens that copy the prompt: copying a name is skill, not memory.
            for example, probs, own_probs in zip(rows, surrogate_probs, merged_probs, strict=True):
                probs = _resize_vocabulary(probs, own_probs.shape[1])
                yield torch.where(find_copied_tokens(example)[:, None], own_probs, probs)


def _train_or_load(
    merged_model: torch.nn.Module,
    base_model: torch.nn.Module,
    retain: Sequence[Example],
    *,
    plan: SurrogatePlan,
    progress: ProgressCallback,
    resume: ResumeFolder,
) -> torch.nn.Module:
    """The base model with the trained adapter, which is stored for all decompositions with the same inputs."""
    training = SurrogateTraining(base_model, retain, plan)
    store = resume.shared_folder("surrogate", compute_key(merged_model, base_model, retain, plan))
    if (state := store.load("adapter")) is not None:
        training.load(state)
        text = f"found in the cache, loss {training.loss:.3f} after {training.steps} steps"
        progress("surrogate", 1, 1, text)
    else:
        training.run(progress, store)
        store.save("adapter", training.state())
        store.delete("training")
    log.info(
        "surrogate: loss on the retain rows %.3f after %d steps, acceptance threshold %.3f",
        training.loss,
        training.steps,
        plan.max_loss,
    )
    if training.loss > plan.max_loss:
        log.warning(
            "surrogate: after %d steps, as many tokens as the edit goes through, its loss on the retain rows is %.2f "
            "nats per token, and that of the model %.2f; a target that knows the retain rows less well costs more of "
            "them. More `steps` allow it more",
            training.steps,
            training.loss,
            plan.max_loss - plan.tolerance,
        )
    model: torch.nn.Module = training.model
    return model


def compute_key(
    merged_model: torch.nn.Module, base_model: torch.nn.Module, retain: Sequence[Example], plan: SurrogatePlan
) -> str:
    """Hash of all that decides a surrogate: both models, the retain rows, the budget, the seed and the code.

    The seed is that of the recipe, so decompositions with different seeds share no draw; those with another density,
    lattice, sieve or edit share the surrogate. ``max_loss`` follows from the merged model and is not part of it.
    """
    code = [inspect.getsource(part) for part in (surrogate_training, lora, encoding, FinetunePlan, split_batch)]
    parts: Any = {
        "models": [_hash_weights(merged_model), _hash_weights(base_model)],
        "configurations": [_read_configuration(merged_model), _read_configuration(base_model)],
        "retain": [(example.ids, example.roles) for example in retain],
        "plan": [plan.max_steps, plan.seed],
        "code": code,
        "versions": [version(name) for name in ("torch", "transformers", "peft")],
    }
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _hash_weights(model: torch.nn.Module) -> str:
    """SHA-256 of names, types, shapes and values of all parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {parameter.dtype} {tuple(parameter.shape)} {parameter.device.type}".encode())
        digest.update(parameter.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _read_configuration(model: torch.nn.Module) -> dict[str, Any]:
    """The configuration of a model without its place: equal weights compute other things with other constants."""
    config: Any = model.config
    places = {"_name_or_path", "transformers_version"}
    values: dict[str, Any] = json.loads(config.to_json_string(use_diff=False))
    return {name: value for name, value in values.items() if name not in places}


def _resize_vocabulary(probs: Tensor, vocabulary: int) -> Tensor:
    """Distributions (tokens, vocabulary) over another number of tokens; those over fewer are renormalised."""
    if probs.shape[1] == vocabulary:
        return probs
    padded_probs = functional.pad(probs[:, :vocabulary], (0, max(0, vocabulary - probs.shape[1])))
    return padded_probs / padded_probs.sum(-1, keepdim=True)
