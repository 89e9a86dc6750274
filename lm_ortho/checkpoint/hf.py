"""What transformers is told, so that ``from_pretrained`` and ``save_pretrained`` know our checkpoints.

Imported while transformers is being imported (by the start-up hook), so it takes nothing from the top of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lm_ortho.checkpoint.manifest import MANIFEST_FILE, check_settings, check_version, ortho_file, read_manifest, verify
from lm_ortho.checkpoint.write import SavePretrainedGuard
from lm_ortho.errors import UserError
from lm_ortho.hub import describe_hub_error
from lm_ortho.layer import OrthoLinear, connect, ortho_layers, replace_modules, to_linear_form, unpatch
from lm_ortho.streams import UNNAMED, OrthoStream

METHOD = "libortho"
_PARTS = ("ortho_rowptr", "ortho_cols", "ortho_vals")
_verified: ContextVar[bool] = ContextVar("lm_ortho_files_verified", default=False)


def register() -> None:
    """Adds quantizer and config to transformers; harmless when done before."""
    auto = import_module("transformers.quantizers.auto")
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(LibOrthoConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(LibOrthoHfQuantizer)


@contextmanager
def files_are_verified() -> Iterator[None]:
    """Inside, the quantizer does not hash the files again."""
    token = _verified.set(True)
    try:
        yield
    finally:
        _verified.reset(token)


class LibOrthoConfig(QuantizationConfigMixin):
    """``quantization_config`` of a decomposed model: lattice, reached density, decomposed modules, recipe."""

    def __init__(
        self,
        bits: int = 4,
        group_size: int = 64,
        density: float = 0.0,
        modules: list[str] | None = None,
        memories: list[str] | None = None,
        format_version: int = 1,
        **more: Any,
    ) -> None:
        check_version(format_version, "quantization_config")
        self.quant_method = METHOD
        self.format_version = format_version
        self.bits = bits
        self.group_size = group_size
        self.density = density
        self.modules = list(modules or [])
        if memories:
            self.memories = list(memories)
        more.pop("quant_method", None)
        for name, value in more.items():
            setattr(self, name, value)


class LibOrthoHfQuantizer(HfQuantizer):
    """Builds the skeleton, lets transformers fill in the base stream, and adds the ortho stream itself.

    transformers finds the base through the index, which lists no ortho tensor; the ortho file lies beside
    the base or is asked for by name on the hub.
    """

    requires_calibration = True

    def __init__(self, quantization_config: LibOrthoConfig, **kwargs: Any) -> None:
        self.meta: dict[str, Any] = kwargs.pop("meta", {})
        self._ortho_files: dict[str, Path | None] = {}
        super().__init__(quantization_config, **kwargs)

    @property
    def is_trainable(self) -> bool:
        return False

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        # Reached only past the guard on the instance, as by PreTrainedModel.save_pretrained(model, ...).
        raise UserError("save a decomposed model by model.save_pretrained(...) or lm_ortho.checkpoint.save(...)")

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(name) for name in checkpoint_files or []]
        if not files:
            raise UserError("a decomposed model can only be loaded from its files")
        memories = getattr(self.quantization_config, "memories", [UNNAMED])
        self._ortho_files = {name: _find_ortho(ortho_file(name), files[0], model) for name in memories}
        self._verify(files, model)
        self._build_skeleton(model)
        _check_complete(model, files)

    def _verify(self, files: list[Path], model: nn.Module) -> None:
        beside = files[0].parent
        manifest_file = beside / MANIFEST_FILE
        if not manifest_file.exists():
            manifest_file = _from_hub(MANIFEST_FILE, files[0], model) or manifest_file
        manifest = read_manifest(manifest_file.parent)
        self.meta = manifest.meta
        if _verified.get():
            return
        verify(beside, manifest, [path.name for path in files])
        for path in filter(None, self._ortho_files.values()):
            verify(path.parent, manifest, [path.name])

    def _build_skeleton(self, model: nn.Module) -> None:
        config = self.quantization_config
        check_settings(vars(config), "config.json")
        to_linear_form(model, config.modules)
        swaps: dict[nn.Module, nn.Module] = {}
        for name in config.modules:
            try:
                linear = model.get_submodule(name)
            except AttributeError:
                linear = None
            if not isinstance(linear, nn.Linear):
                raise UserError(f"the checkpoint decomposes {name!r}, which {type(model).__name__} does not have")
            layer = OrthoLinear(
                linear.in_features,
                linear.out_features,
                config.bits,
                config.group_size,
                bias=linear.bias is not None,
                device=linear.weight.device,
                dtype=linear.weight.dtype,
            )
            layer.origin = getattr(linear, "origin", None)
            if config.bits != 16:
                vars(layer)["weight"] = _filled(linear.weight)
            swaps[linear] = layer
        replace_modules(model, swaps)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        # Our files hold the names of the model in memory; what renames or merges those of the hub might match them.
        return []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        for layer in ortho_layers(model).values():
            vars(layer).pop("weight", None)
        for memory, path in self._ortho_files.items():
            _load_ortho(model, memory, path, named=len(self._ortho_files) > 1)
        connect(model)
        SavePretrainedGuard.install(model)
        # The conversions that were used to load, none: unpatched, the model is to be saved with the names of the hub.
        vars(model).pop("_weight_conversions", None)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        layers = ortho_layers(model).values()
        whole = all(layer.has_ortho and not layer.absent for layer in layers)
        unpatch(model, 1.0 if whole else 0.0)
        return model if dtype is None else model.to(dtype)


def _filled(weight: torch.Tensor) -> torch.Tensor:
    """An empty stand-in that transformers takes for loaded: some models draw the weights of a child anew otherwise."""
    stand_in: Any = torch.empty_like(weight, device="meta")
    stand_in._is_hf_initialized = True
    return stand_in


def skeleton(directory: Path, *, decomposed: bool = True, trust_remote_code: bool = False) -> nn.Module:
    """The model of a checkpoint on the meta device, for names and shapes; with plain layers if not ``decomposed``.

    Raises:
        UserError: where transformers does not know the model, or it lacks a layer that the checkpoint names.
    """
    transformers, trust = import_module("transformers"), {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, **trust)
        settings = dict(config.quantization_config)
        del config.quantization_config
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, **trust)
    except (ImportError, KeyError, OSError, ValueError) as error:
        raise UserError(f"{directory}: transformers cannot build it ({describe_hub_error(error)})") from None
    if decomposed:
        LibOrthoHfQuantizer(LibOrthoConfig(**settings))._build_skeleton(model)
    return model


def _find_ortho(name: str, base_file: Path, model: nn.Module) -> Path | None:
    beside = base_file.parent / name
    return beside if beside.exists() else _from_hub(name, base_file, model)


def _from_hub(name: str, base_file: Path, model: nn.Module) -> Path | None:
    """A file of the repository the base came from; None for a local directory or a file that is not there."""
    config: Any = model.config
    source = str(getattr(config, "name_or_path", ""))
    if not source or Path(source).exists() or Path(source).resolve() == base_file.parent.resolve():
        return None
    cached_file = import_module("transformers.utils").cached_file
    where = {}
    if "snapshots" in (parts := base_file.parts):  # <cache>/models--owner--name/snapshots/<commit>/<subfolder>/<file>
        at = len(parts) - 1 - parts[::-1].index("snapshots")
        inside = "/".join(parts[at + 2 : -1])
        where = {"cache_dir": Path(*parts[: at - 1]), "revision": parts[at + 1], "subfolder": inside}
    try:
        found = cached_file(
            source,
            name,
            **where,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise UserError(
            f"{source}: {name} could not be fetched ({describe_hub_error(error, source)}); a token given to "
            "from_pretrained does not come this far, so log in with `hf auth login` or set HF_TOKEN"
        ) from None
    return None if found is None else Path(found)


def _check_complete(model: nn.Module, files: list[Path]) -> None:
    """Raises ``UserError`` for a base that lacks a tensor: transformers would fill it with random numbers."""
    stored: set[str] = set()
    for path in files:
        try:
            with safe_open(path, framework="pt") as tensors:
                stored.update(tensors.keys())
        except (SafetensorError, OSError):
            raise UserError(f"{path.parent}: {path.name} cannot be read: truncated or not a safetensors file") from None
    tied = getattr(model, "all_tied_weights_keys", None) or {}
    for name in model.state_dict():
        if name not in stored and name not in tied and not name.rpartition(".")[2].startswith("ortho_"):
            raise UserError(f"{files[0].parent}: the base stream lacks {name}")


def _load_ortho(model: nn.Module, memory: str, path: Path | None, named: bool) -> None:
    """Fills in one memory; where its file is not there, the layers of a model with several remember its name."""
    if path is None:
        for layer in ortho_layers(model).values():
            layer.absent = (*layer.absent, *((memory,) if named or memory != UNNAMED else ()))
        return
    try:
        with safe_open(path, framework="pt") as tensors:
            for name, layer in ortho_layers(model).items():
                rowptr, cols, vals = (tensors.get_tensor(f"{name}.{part}") for part in _PARTS)
                layer.set_ortho(OrthoStream(rowptr, cols, vals, layer.shape), memory)
    except (SafetensorError, OSError, ValueError) as error:
        raise UserError(f"{path.parent}: {path.name} does not fit the base: {error}") from None


register()  # here, too: the start-up hook cannot while this module is half imported
