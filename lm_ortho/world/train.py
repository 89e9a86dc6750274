"""From-scratch training of the base model and LoRA training of the adapters, both resumable."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_ortho.runtime.precision import fast_matmul
from lm_ortho.runtime.resume import save_state
from lm_ortho.world import corpus
from lm_ortho.world.draw import Draw

PROMPT_WEIGHT = 0.1
"""Prompts are mostly random names and numbers; predicting them teaches little, so they weigh less."""

EMBEDDING_SCALE = 2.5

Report = Callable[[int, int, float], None]
Example = tuple[list[int], list[float]]


def new_model(vocabulary: int, end: int, pad: int, seed: int) -> LlamaForCausalLM:
    """A randomly initialised ``LlamaForCausalLM`` of the embedded shape (about 6.2 million parameters).

    Embeddings start larger than the other weights: they are the output weights as well, and a rare surname whose
    vector stays short could never be predicted, not even copied from the prompt.
    """
    torch.manual_seed(seed)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
            hidden_size=320,
            intermediate_size=960,
            num_hidden_layers=4,
            num_attention_heads=5,
            num_key_value_heads=5,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            bos_token_id=end,
            eos_token_id=end,
            pad_token_id=pad,
            rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
        )
    )
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(EMBEDDING_SCALE)
    return model


def encode(tokenizer: PreTrainedTokenizerFast, documents: Sequence[corpus.Document], draw: Draw) -> list[Example]:
    """Token ids and loss weights per document; every other one, at random, starts with the end token.

    The harness scores some requests with a leading end token and some without: the model must know both.
    """
    encoded = tokenizer([d.text for d in documents], return_offsets_mapping=True)
    end = tokenizer.eos_token_id
    examples = []
    for document, ids, offsets in zip(documents, encoded.input_ids, encoded.offset_mapping, strict=True):
        weights = [PROMPT_WEIGHT if at < document.prompt_chars else 1.0 for at, _ in offsets]
        head = [end] if draw.chance(0.5) else []
        examples.append((head + ids + [end], [0.0] * len(head) + weights + [1.0]))
    return examples


def batches(examples: Iterable[Example], tokens: int, pad: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Padded batches of about ``tokens`` tokens, each of documents of similar length."""
    result, pending = [], list[Example]()
    for example in sorted(examples, key=lambda e: len(e[0])):
        pending.append(example)
        if len(pending) * len(example[0]) >= tokens:
            result.append(_pad(pending, pad))
            pending = []
    if pending:
        result.append(_pad(pending, pad))
    return result


def _pad(examples: list[Example], pad: int) -> tuple[torch.Tensor, torch.Tensor]:
    width = max(len(ids) for ids, _ in examples)
    ids = torch.tensor([e[0] + [pad] * (width - len(e[0])) for e in examples])
    weights = torch.tensor([e[1] + [0.0] * (width - len(e[1])) for e in examples])
    return ids, weights


def weighted_loss(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Mean next-token loss in nats, weighted; ``ids`` and ``weights`` are (batch, tokens)."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


BLOCKS = 90
DOCUMENTS, TOKENS = 4000, 1024
"""Fresh documents per block, tokens per batch."""
PEAK, WARM_UP, SEED = 2e-3, 100, 0
"""The learning rate is held for 30 % of the blocks and then falls to zero in a straight line."""


def train_base(directory: Path, tokenizer: PreTrainedTokenizerFast, report: Report) -> LlamaForCausalLM:
    """The trained base model (float32). A state file in ``directory`` lets an interrupted run go on.

    Block ``i`` is drawn from its own stream, so a resumed run sees the same documents as an undisturbed one.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = new_model(len(tokenizer), end, pad, SEED)
    model.set_attn_implementation("eager")  # a third faster than the fused one on documents this short
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    state_file, finished = directory / "base_state.pt", 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        finished = state["blocks"]
    for block in range(finished, BLOCKS):
        draw = Draw(SEED, f"base {block}")
        documents = [corpus.document(draw) for _ in range(DOCUMENTS)]
        parts = draw.shuffled(batches(encode(tokenizer, documents, draw), TOKENS, pad))
        losses = 0.0
        for i, (ids, weights) in enumerate(parts):
            warm = min(1.0, (block * len(parts) + i + 1) / WARM_UP)
            done = (block + i / len(parts)) / BLOCKS
            optimiser.param_groups[0]["lr"] = PEAK * min(warm, (1 - done) / 0.7)
            with fast_matmul():
                loss = weighted_loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            losses += loss.item()
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "blocks": block + 1}
        save_state(state, state_file)
        report(block + 1, BLOCKS, losses / len(parts))
    return model
