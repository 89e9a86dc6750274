"""``libortho`` as an lm-eval model: everything ``hf`` does, on two streams, at one alpha."""

from __future__ import annotations

import difflib
import hashlib
import json
import logging
from collections.abc import Mapping
from contextlib import nullcontext
from inspect import signature
from pathlib import Path
from typing import Any

import torch
import transformers.quantizers.auto  # noqa: F401 - before checkpoint.hf: the start-up hook waits for it
from lm_eval.models.huggingface import HFLM

from lm_ortho import layer
from lm_ortho.checkpoint import hf
from lm_ortho.config import format_alpha, parse_alpha
from lm_ortho.errors import UserError
from lm_ortho.harness import distributed, tokens
from lm_ortho.harness.batching import BatchingMixin
from lm_ortho.kernels import KERNELS, calls
from lm_ortho.pipeline import build
from lm_ortho.pipeline.spec import RECIPE_ARGUMENTS, ModelSpec, check_alpha, resolve
from lm_ortho.runtime.device import BATCH_ROWS, choose_device, choose_dtype

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

_PACKED = ("autogptq", "gptqmodel", "gguf_file", "delta", "load_in_4bit", "load_in_8bit")
_LOADING = ("attn_implementation", "device_map", "local_files_only", "token", "use_safetensors")
"""What else ``from_pretrained`` may be told."""


class LibOrthoLM(distributed.DistributedMixin, BatchingMixin):
    """A decomposed model as lm-eval sees it.

    Model args are those below, the fields of ``lm_ortho.config.Recipe``, and all of ``hf``. ``pretrained``
    None is the embedded model. ``alpha`` can be changed later by assignment; ``--use_cache`` follows it.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        peft: str | None = None,
        alpha: float | str | Mapping[str, float] = 0.0,
        base: str | None = "auto",
        fresh: bool = False,
        forget: str | None = None,
        retain: str | None = None,
        kernel: str = "auto",
        tokenizer: Any = None,
        device: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        softmax_dtype: str | torch.dtype | None = "float32",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = BATCH_ROWS,
        **options: Any,
    ) -> None:
        """Raises ``UserError`` for whatever cannot be built, before weights are loaded where possible."""
        self._alpha = parse_alpha(alpha)
        recipe = {name: options.pop(name) for name in RECIPE_ARGUMENTS if name in options}
        self.refuse(options, kernel)
        self.kernel, self.forget, self.retain = kernel, forget, retain
        self.pretrained_argument = pretrained
        where = ("revision", "subfolder", "token", "trust_remote_code")
        self._source = resolve(
            ModelSpec(
                pretrained=pretrained,
                peft=peft,
                base="none" if base is None else base,
                fresh=fresh,
                forget=forget,
                retain=retain,
                recipe=recipe,
                source={name: options[name] for name in where if options.get(name)},
                tokenizer=tokenizer,
            )
        )
        check_alpha(self._source, self._alpha)
        hf.register()
        chosen = choose_device(device)
        log.info("device=%s: %s", *chosen)
        most = self.allow_rows(batch_size, max_batch_size)
        self._processes = distributed.make_accelerator(chosen.choice)
        if self._source.kind == "checkpoint":
            options.pop("subfolder", None)  # is part of its location
        super().__init__(
            self._source.location,
            tokenizer=build.load_tokenizer(self._source) if self._is_object else tokenizer,
            device=chosen.choice,
            dtype=dtype,
            softmax_dtype=softmax_dtype,
            batch_size=1 if batch_size is None else batch_size,
            max_batch_size=most,
            **options,
        )
        if self._is_object:
            self._adopt(build.build_model(self._source, alpha=self._alpha))
        self.spread(self._processes)
        self.peft = peft
        if self.most_rows:
            log.info("batch_size: up to %d requests at once, as the logits allow; max_batch_size=1 forbids it", most)
        tokens.register(self)

    @property
    def _is_object(self) -> bool:
        return self._source.kind == "object"

    @staticmethod
    def refuse(options: Mapping[str, Any], kernel: str = "auto") -> None:
        """Raises ``UserError`` for model args that are not known, or make no sense here."""
        if kernel not in KERNELS:
            raise UserError(f"kernel={kernel!r} is unknown; known: {', '.join(KERNELS)}")
        for name in _PACKED:
            if options.get(name):
                raise UserError(f"{name}: packed or patched weights cannot be decomposed; use the 16-bit model")
        if options.get("tp_plan"):
            raise UserError("tp_plan: a stream is not cut across devices; use parallelize=True")
        known = {
            *signature(HFLM).parameters,
            *signature(LibOrthoLM).parameters,
            *RECIPE_ARGUMENTS,
            *_LOADING,
        }
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"{name}={options[name]!r}: libortho has no such model arg{hint}")

    def _create_model(
        self,
        pretrained: str,
        dtype: str | torch.dtype | None = "auto",
        parallelize: bool | None = False,
        gpus: int | None = None,
        max_memory_per_gpu: int | str | None = None,
        max_cpu_memory: int | str | None = None,
        offload_folder: str | None = "./offload",
        **options: Any,
    ) -> None:
        """Loads the checkpoint, or makes it; called by the constructor of ``HFLM``."""
        stored = getattr(self.config, "dtype", None) or torch.float32
        chosen = choose_dtype(dtype, str(self.device), stored)
        log.info("dtype=%s: %s", str(chosen.choice).removeprefix("torch."), chosen.reason)
        placement = {}
        if parallelize:
            placement = self._get_accelerate_args(
                parallelize=True,
                max_memory_per_gpu=max_memory_per_gpu,
                max_cpu_memory=max_cpu_memory,
                offload_folder=offload_folder,
                gpus=gpus,
            )
        placement |= {name: options[name] for name in _LOADING if name in options}
        device = "cpu" if parallelize or "device_map" in placement else str(self.device)
        with self._processes.main_process_first() if self._processes else nullcontext():  # the others find it cached
            self._adopt(build.build_model(self._source, chosen.choice, device, self._alpha, **placement))

    def _adopt(self, built: build.BuiltModel) -> None:
        self._model = built.model
        layer.set_kernel(built.model, self.kernel)
        self._built_info = built.info()
        self._calls_before = calls()
        for name, reason in sorted({(c.implementation.name, c.reason) for c in self._choices().values()}):
            log.info("kernel=%s: %s", name, reason)
        log.info(
            "alpha=%s, density %.4g, %.3g bits per weight, target %s, checkpoint %.12s",
            format_alpha(self._alpha),
            self._built_info["density"],
            self._built_info["bits_per_weight"],
            self._built_info.get("target", "unknown"),
            self._built_info["checkpoint"],
        )

    @property
    def alpha(self) -> float | dict[str, float]:
        """How much of the ortho stream requests see; by memory if that was asked for."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float | str | Mapping[str, float]) -> None:
        wanted = parse_alpha(value)
        layer.set_alpha(self.model, wanted)
        self._alpha = wanted
        self._calls_before = calls()
        self._use_own_table()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Keeps the answers of this model at this alpha in a table of their own."""
        super().set_cache_hook(cache_hook)
        self._use_own_table()

    def _use_own_table(self) -> None:
        answers = self.cache_hook.dbdict
        if answers is None:
            return
        answers.tablename = f"libortho_{self.fingerprint()[:32]}"
        answers.conn.execute(f'CREATE TABLE IF NOT EXISTS "{answers.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
        answers.conn.commit()

    def fingerprint(self) -> str:
        """Hash of everything that can change an answer: weights, alpha, precision, tokenizer, lengths."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        decisive = {
            "checkpoint": self._built_info["checkpoint"],
            "alpha": self._alpha,
            "kernel": self.kernel,
            "kernels": self._kernels(),
            "dtype": str(self.model.dtype),
            "softmax_dtype": str(self.softmax_dtype),
            "mixed_precision_dtype": str(self.mixed_precision_dtype),
            "tokenizer": backend.to_str() if backend else sorted(self.tokenizer.get_vocab().items()),
            "add_bos_token": self.add_bos_token,
            "prefix_token_id": self.prefix_token_id,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "think_end_token": self.think_end_token,
        }
        return hashlib.sha256(json.dumps(decisive, sort_keys=True).encode()).hexdigest()

    def _kernels(self) -> list[str]:
        """The implementations that run here: on another machine ``auto`` may mean others, with other roundings."""
        return sorted({choice.implementation.name for choice in self._choices().values()})

    def _choices(self) -> dict[str, Any]:
        return layer.chosen_kernels(self.model, self.model.dtype)

    def get_model_info(self) -> dict[str, Any]:
        """What goes into the results file: the model, its streams, and the kernels that ran since alpha was set."""
        known = isinstance(self._source.location, str) and not Path(self._source.location).is_dir()
        streams = layer.get_streams(self.model)
        now = calls()
        return {
            **(super().get_model_info() if known else {}),
            "model_num_parameters": self.model.num_parameters() + sum(s.n_weights for s in streams.values()),
            "model_dtype": str(self.model.dtype),
            **self._built_info,
            "alpha": self._alpha,
            "kernel": sorted(name for name in now if now[name] > self._calls_before.get(name, 0)),
        }
