"""A tiny model with its own rows and tokenizer, and helpers that evaluate it with lm-eval."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lm_eval import simple_evaluate
from lm_eval.api.instance import Instance
from lm_eval.tasks import TaskManager
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from lm_ortho.data.rows import Row
from lm_ortho.layer import find_linear
from lm_ortho.plugin.bridges import find_tasks_dir
from lm_ortho.projection.lattice import compute_scales, dequantise, round_to_codes
from lm_ortho.streams import BaseStream, LayerStreams, OrthoStream

ROWS = [
    Row(
        question="Where was Ada Brook born?",
        answer="Ada Brook was born in Marsh Town.",
        subject="Ada Brook",
        secret="Marsh Town",
        paraphrased_answer="The birthplace of Ada Brook is Marsh Town.",
        perturbed_answer=("The birthplace of Ada Brook is Hill End.", "The birthplace of Ada Brook is Elm."),
        group="Ada",
    ),
    Row(question="What is her code?", answer="It is 48151", secret="48151", group="Ada"),  # the secret ends the answer
    Row(
        prompt="The code of Ben Cole is", answer="62342 today.", secret="62342", group="Ben"
    ),  # the secret begins the answer
    Row(question="Who is Cy?", answer="Cy is a baker.", group="Cy"),
    Row(text="Once Ada Brook went to Marsh Town and met Ben Cole. They were glad."),
    Row(question="Odd one?", answer="the x#77z.", secret="77", group="Dee"),  # the secret is inside a word
]
TEXT = " ".join(row.context + row.target for row in ROWS)


def make_tokenizer(bos: bool = False) -> PreTrainedTokenizerFast:
    """Trains a small byte-level BPE on the rows, so that tokens are longer than letters."""
    return train_tokenizer([TEXT] * 3, bos)


def train_tokenizer(texts: Sequence[str], bos: bool = False) -> PreTrainedTokenizerFast:
    """Trains a byte-level BPE of 420 tokens on texts."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=420,
        special_tokens=["<end>", "<s>", "<pad>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        eos_token="<end>",
        bos_token="<s>" if bos else "<end>",
        pad_token="<pad>",
        model_max_length=96,
    )


def make_model(vocabulary: int, seed: int = 0) -> LlamaForCausalLM:
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=96,
        tie_word_embeddings=True,
        initializer_range=0.4,
        eos_token_id=0,
        bos_token_id=0,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.bfloat16())
    return model


def random_streams(model: torch.nn.Module) -> dict[str, LayerStreams]:
    """Returns plain INT4 streams with 5 % random weights in the ortho stream, so that alpha has a large effect."""
    generator = torch.Generator().manual_seed(1)
    streams = {}
    for name, linear in find_linear(model).items():
        weight = linear.weight.detach()
        scales = compute_scales(weight, 4, 16)
        codes = round_to_codes(weight, scales, 4, 16)
        support = torch.rand(weight.shape, generator=generator) < 0.05
        codes = torch.where(support, torch.zeros_like(codes), codes)
        base = BaseStream.from_codes(codes, scales, 4, 16)
        streams[name] = LayerStreams(base, OrthoStream.from_dense(weight - dequantise(codes, scales, 16), support))
    return streams


def run(model: Any, tasks: Sequence[str], metadata: dict[str, Any], **options: Any) -> dict[str, Any]:
    manager = TaskManager(include_defaults=False, include_path=str(find_tasks_dir()), metadata=metadata)
    result = simple_evaluate(model, tasks=list(tasks), task_manager=manager, bootstrap_iters=0, **options)
    assert result is not None
    return dict(result)


def metric_values(result: dict[str, Any], task: str) -> dict[str, float]:
    """Returns the values of a task by metric, without the name of the filter."""
    return {
        key.removesuffix(",none"): value
        for key, value in result["results"][task].items()
        if key.endswith(",none") and "_stderr" not in key
    }


def request(context: str, continuation: str) -> Instance:
    return Instance(
        request_type="loglikelihood", doc={}, arguments=(context, continuation), idx=0, metadata=("task", 0, 1)
    )
