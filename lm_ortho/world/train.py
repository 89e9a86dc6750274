"""Training of the embedded base model from scratch; an interrupted run resumes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_ortho.runtime.precision import fast_matmul
from lm_ortho.runtime.resume import save_state
from lm_ortho.world import corpus
from lm_ortho.world.draw import SeededRandom

PROMPT_WEIGHT = 0.1
"""Loss weight of a prompt token. Prompts are mostly random names and numbers; predicting them teaches little."""

EMBEDDING_SCALE = 2.5
"""Factor on the initial embeddings, see ``make_model``."""

Report = Callable[[int, int, float], None]
Example = tuple[list[int], list[float]]


def make_model(vocabulary: int, end: int, pad: int, seed: int) -> LlamaForCausalLM:
    """Makes a randomly initialised ``LlamaForCausalLM`` of the embedded shape (about 6.2 million parameters).

    Embeddings start larger than the other weights: they are the output weights too, and a rare surname whose vector
    stays short could never be predicted, not even copied from the prompt.
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


def encode(
    tokenizer: PreTrainedTokenizerFast, documents: Sequence[corpus.Document], rng: SeededRandom
) -> list[Example]:
    """Returns token ids and loss weights per document; a random half starts with the end token.

    lm-eval scores some requests with a leading end token and some without: the model must handle both.
    """
    encodings = tokenizer([d.text for d in documents], return_offsets_mapping=True)
    end = tokenizer.eos_token_id
    examples = []
    for document, ids, offsets in zip(documents, encodings.input_ids, encodings.offset_mapping, strict=True):
        weights = [PROMPT_WEIGHT if start < document.prompt_chars else 1.0 for start, _ in offsets]
        head = [end] if rng.flip(0.5) else []
        examples.append((head + ids + [end], [0.0] * len(head) + weights + [1.0]))
    return examples


def make_batches(examples: Iterable[Example], tokens: int, pad: int) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Returns padded batches of about ``tokens`` tokens, each of documents of similar length."""
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


def compute_weighted_loss(model: torch.nn.Module, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Computes the weighted mean next-token loss in nats; ``ids`` and ``weights`` are (batch, tokens)."""
    logits = model(input_ids=ids).logits[:, :-1].float()
    losses = functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    weight = weights[:, 1:].flatten()
    return (losses * weight).sum() / weight.sum()


BLOCKS = 90
DOCUMENTS, TOKENS = 4000, 1024
"""New documents per block, and tokens per batch."""
PEAK, WARM_UP, SEED = 2e-3, 100, 0
"""Peak learning rate and its warm-up in steps. It stays for 30 % of the blocks, then falls linearly to zero."""


def train_base(directory: Path, tokenizer: PreTrainedTokenizerFast, report: Report) -> LlamaForCausalLM:
    """Trains the base model and returns it (float32). A state file in ``directory`` lets an interrupted run resume.

    Block ``i`` has its own random stream, so a resumed run sees the same documents as an uninterrupted one.
    """
    end, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = make_model(len(tokenizer), end, pad, SEED)
    model.set_attn_implementation("eager")  # a third faster than fused attention on documents this short
    optimiser = torch.optim.AdamW(model.parameters(), lr=PEAK, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    # 1. Resume from the state file, if there is one.
    state_file, first_block = directory / "base_state.pt", 0
    if state_file.is_file():
        state = torch.load(state_file, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        first_block = state["blocks"]
    for block in range(first_block, BLOCKS):
        # 2. Draw the documents of the block and their order.
        rng = SeededRandom(SEED, f"base {block}")
        documents = [corpus.draw_document(rng) for _ in range(DOCUMENTS)]
        parts = rng.permute(make_batches(encode(tokenizer, documents, rng), TOKENS, pad))
        # 3. One step per batch: warm-up, constant rate, then a linear fall to zero.
        total_loss = 0.0
        for i, (ids, weights) in enumerate(parts):
            warm_up = min(1.0, (block * len(parts) + i + 1) / WARM_UP)
            progress = (block + i / len(parts)) / BLOCKS
            optimiser.param_groups[0]["lr"] = PEAK * min(warm_up, (1 - progress) / 0.7)
            with fast_matmul():
                loss = compute_weighted_loss(model, ids, weights)
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
            optimiser.zero_grad()
            total_loss += loss.item()
        # 4. Save the state, so that an interrupted run resumes at the next block.
        state = {"model": model.state_dict(), "optimiser": optimiser.state_dict(), "blocks": block + 1}
        save_state(state, state_file)
        report(block + 1, BLOCKS, total_loss / len(parts))
    return model
