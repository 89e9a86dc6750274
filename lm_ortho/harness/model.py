"""The lm-eval model ``libortho``: all features of ``hf``, on a model of two streams at a given alpha."""

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
from lm_ortho.config import MODEL_ARGS, split_model_args
from lm_ortho.data.tokenizer import describe_vocabulary
from lm_ortho.dial import format_alpha, parse_alpha
from lm_ortho.errors import UserError
from lm_ortho.finetune import load_config
from lm_ortho.harness import distributed, tokens
from lm_ortho.harness.batching import BatchingMixin
from lm_ortho.harness.text_encoding import TextEncodingMixin
from lm_ortho.kernels import KERNELS, calls
from lm_ortho.pipeline.build import BuiltModel, build_model
from lm_ortho.pipeline.loading import load_tokenizer
from lm_ortho.pipeline.spec import check_alpha, resolve
from lm_ortho.runtime.device import MAX_BATCH_ROWS, check_batch_size, choose_device, choose_dtype

log = logging.getLogger(f"lm_eval.{__name__}")  # lm-eval shows its own loggers only

_PACKED = ("autogptq", "gptqmodel", "delta", "load_in_4bit", "load_in_8bit")
_LOADING = ("attn_implementation", "device_map", "local_files_only", "token", "use_safetensors")
"""Further arguments that are passed on to ``from_pretrained``."""


def check_model_args(model_args: Mapping[str, Any] | None) -> None:
    """Raises ``UserError`` for model args that are not known or impossible, without reading or loading anything."""
    spec, options = split_model_args(dict(model_args or {}))
    _check_evaluation_args(options)
    LibOrthoLM.refuse(options, spec.kernel)


def _check_evaluation_args(options: Mapping[str, Any]) -> None:
    """Raises ``UserError`` for sizes and dtypes of the evaluation that are none; lm-eval would fail after loading."""
    check_batch_size(options.get("batch_size"))
    for name in ("max_batch_size", "max_length"):
        value = options.get(name)
        if value is not None and not (type(value) is int and 0 < value < 2**31):
            raise UserError(f"{name}={value!r:.80} must be a whole number above 0")
    softmax = options.get("softmax_dtype")
    if isinstance(softmax, str) and not isinstance(getattr(torch, softmax, None), torch.dtype):
        raise UserError(f"softmax_dtype={softmax!r:.80} is unknown; use float32, float64, bfloat16 or float16")
    if options.get("enable_thinking") and options.get("think_end_token") is None:
        raise UserError("enable_thinking needs think_end_token, the token that ends the thinking of the model")


class LibOrthoLM(distributed.DistributedMixin, TextEncodingMixin, BatchingMixin):
    """The lm-eval model class of a decomposed model.

    Model args are the fields of ``lm_ortho.config.ModelSpec`` and ``Recipe``, and all model args of ``hf``. With
    ``pretrained=None`` it is the embedded model. ``alpha`` can be changed later by assignment; every alpha has its own
    answers under ``--use_cache``.
    """

    def __init__(
        self,
        pretrained: Any = None,
        *,
        device: str | None = None,
        dtype: str | torch.dtype | None = "auto",
        softmax_dtype: str | torch.dtype | None = "float32",
        batch_size: int | str | None = 1,
        max_batch_size: int | None = MAX_BATCH_ROWS,
        **model_args: Any,
    ) -> None:
        """Raises ``UserError`` for whatever cannot be built, before weights are loaded where possible."""
        # 1. Check the model args and resolve the model, before any weights are loaded.
        self.spec, options = split_model_args({"pretrained": pretrained, **model_args})
        self._alpha = self.spec.alpha
        sizes = {"batch_size": batch_size, "max_batch_size": max_batch_size, "softmax_dtype": softmax_dtype}
        _check_evaluation_args({**options, **sizes})
        self.refuse(options, self.spec.kernel)
        self.kernel, self.forget, self.retain = self.spec.kernel, self.spec.forget, self.spec.retain
        self.pretrained_argument, self.tokenizer_argument = pretrained, self.spec.tokenizer
        self._resolved = resolve(self.spec)
        self.spec = self._resolved.spec
        check_alpha(self._resolved)
        # The calibration of a finished checkpoint is not known; ``held_out`` says what it did not read.
        is_known = self._resolved.kind != "checkpoint" or "held_out" in self.spec.model_fields_set
        self.held_out = self.spec.held_out if is_known else "none"
        # 2. Choose device and batch size, and connect the processes of torchrun.
        hf.register()
        decision = choose_device(device)
        log.info("device=%s: %s", *decision)
        max_rows = self.allow_rows(batch_size, max_batch_size)
        self._processes = distributed.make_accelerator(decision.choice)
        options |= self.spec.loading_options
        if self._resolved.kind == "checkpoint":
            options.pop("subfolder", None)  # is part of its location
        loads_tokenizer = self._is_object or self._resolved.tokenizer is not self.spec.tokenizer  # that of the adapter
        self.access_token = self.spec.token
        # 3. Let ``hf`` load the tokenizer and call ``_create_model``; a model object is decomposed here instead.
        super().__init__(
            self._resolved.location,
            tokenizer=load_tokenizer(self._resolved) if loads_tokenizer else self.spec.tokenizer,
            device=decision.choice,
            dtype=dtype,
            softmax_dtype=softmax_dtype,
            batch_size=1 if batch_size is None else batch_size,
            max_batch_size=max_rows,
            chat_template_args=dict(self.spec.recipe.chat_template_args),
            **options,
        )
        if self._is_object:
            self._adopt(build_model(self._resolved))
        self.spread(self._processes)
        self.peft = self.spec.peft
        if self.most_rows:
            log.info(
                "batch_size: up to %d requests at once, as the logits allow; max_batch_size=1 forbids it", max_rows
            )
        tokens.register(self)

    @property
    def _is_object(self) -> bool:
        return self._resolved.kind == "object"

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
            *MODEL_ARGS,
            *_LOADING,
        }
        for name in options:
            if name not in known:
                close = difflib.get_close_matches(name, known, n=1)
                hint = f"; did you mean {close[0]}?" if close else ""
                raise UserError(f"{name}: libortho has no such model arg{hint}")

    def _get_config(
        self,
        pretrained: str,
        *,
        revision: str = "main",
        trust_remote_code: bool = False,
        gguf_file: str | None = None,
        subfolder: str = "",
    ) -> None:
        """Loads the configuration with the access token, which ``HFLM`` does not pass on."""
        options = {"revision": revision, "subfolder": subfolder, "token": self.access_token, "gguf_file": gguf_file}
        hub_options = {name: value for name, value in options.items() if value}
        self._config = load_config(pretrained, trust_remote_code=bool(trust_remote_code), **hub_options)

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
        """Loads or creates the checkpoint; called by the constructor of ``HFLM``."""
        config_dtype = getattr(self.config, "dtype", None) or torch.float32
        dtype_choice = choose_dtype(dtype, str(self.device), config_dtype)
        log.info("dtype=%s: %s", str(dtype_choice.choice).removeprefix("torch."), dtype_choice.reason)
        placement = {}
        if parallelize:
            placement = self._get_accelerate_args(
                parallelize=True,
                max_memory_per_gpu=max_memory_per_gpu,
                max_cpu_memory=max_cpu_memory,
                offload_folder=offload_folder,
                gpus=gpus,
            )
        access = self.spec.access_options  # ``build_model`` passes these on itself
        placement |= {name: options[name] for name in _LOADING if name in options and name not in access}
        device = "cpu" if parallelize or "device_map" in placement else str(self.device)
        # The first process decomposes the model; the other ones find the result in the cache.
        with self._processes.main_process_first() if self._processes else nullcontext():
            self._adopt(build_model(self._resolved, dtype_choice.choice, device, **placement))

    def _adopt(self, built: BuiltModel) -> None:
        """Takes over a built model, and logs its kernels and its streams."""
        self._model = built.model
        layer.set_kernel(built.model, self.kernel)
        self._info = built.info()
        self._previous_calls = calls()
        for name, reason in sorted({(c.implementation.name, c.reason) for c in self._kernel_choices().values()}):
            log.info("kernel=%s: %s", name, reason)
        info = {"target": "unknown"} | self._info
        log.info(
            "alpha=%(alpha)s, density %(density).4g, %(bits_per_weight).3g bits per weight, target %(target)s, "
            "checkpoint %(checkpoint).12s",
            info | {"alpha": format_alpha(self._alpha)},
        )

    @property
    def alpha(self) -> float | dict[str, float]:
        """The weight of the ortho stream, or one weight per memory."""
        return self._alpha

    @alpha.setter
    def alpha(self, value: float | str | Mapping[str, float]) -> None:
        alpha = parse_alpha(value)
        layer.set_alpha(self.model, alpha)
        self._alpha = alpha
        self._previous_calls = calls()
        self._select_cache_table()

    def set_cache_hook(self, cache_hook: Any) -> None:
        """Stores the answers of this model at this alpha in a separate table of the cache."""
        super().set_cache_hook(cache_hook)
        self._select_cache_table()

    def _select_cache_table(self) -> None:
        cache = self.cache_hook.dbdict
        if cache is None:
            return
        cache.tablename = f"libortho_{self.fingerprint()[:32]}"
        cache.conn.execute(f'CREATE TABLE IF NOT EXISTS "{cache.tablename}" (key TEXT PRIMARY KEY, value BLOB)')
        cache.conn.commit()

    def fingerprint(self) -> str:
        """Returns a hash of everything that can change an answer: weights, alpha, precision, tokenizer, lengths."""
        settings = {
            "checkpoint": self._info["checkpoint"],
            "alpha": self._alpha,
            "kernel": self.kernel,
            "kernels": self._kernel_names(),
            "dtype": str(self.model.dtype),
            "softmax_dtype": str(self.softmax_dtype),
            "mixed_precision_dtype": str(self.mixed_precision_dtype),
            "tokenizer": describe_vocabulary(self.tokenizer),
            "add_bos_token": self.add_bos_token,
            "added_tokens": [self.added_tokens.prefix, self.added_tokens.suffix],
            "prefix_token_id": self.prefix_token_id,
            "max_length": self.max_length,
            "truncation": self.truncation,
            "think_end_token": self.think_end_token,
        }
        return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()

    def _kernel_names(self) -> list[str]:
        """Returns the kernels in use; on another machine ``auto`` may select kernels that round differently."""
        return sorted({choice.implementation.name for choice in self._kernel_choices().values()})

    def _kernel_choices(self) -> dict[str, Any]:
        return layer.choose_kernels(self.model, self.model.dtype)

    def get_model_info(self) -> dict[str, Any]:
        """Returns the entries of the results file: the model, its streams, and the kernels used since alpha was set."""
        is_hub_model = isinstance(self._resolved.location, str) and not Path(self._resolved.location).is_dir()
        streams = layer.get_streams(self.model)
        current_calls = calls()
        return {
            **(super().get_model_info() if is_hub_model else {}),
            "model_num_parameters": self.model.num_parameters() + sum(s.n_weights for s in streams.values()),
            "model_dtype": str(self.model.dtype),
            **self._info,
            "alpha": self._alpha,
            "kernel": sorted(
                name for name, count in current_calls.items() if count > self._previous_calls.get(name, 0)
            ),
        }
