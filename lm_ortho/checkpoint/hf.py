"""The quantiser and config that make ``from_pretrained`` and ``save_pretrained`` of transformers handle checkpoints.

The start-up hook imports this file while transformers is being imported, so it imports from submodules only.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from lm_ortho.checkpoint.manifest import (
    CONFIG_FILE,
    GENERATION_FILE,
    INDEX_FILE,
    MANIFEST_FILE,
    ortho_file,
    read_manifest,
)
from lm_ortho.checkpoint.settings import check_settings, check_sizes, check_version
from lm_ortho.checkpoint.tensor_files import TensorFiles, check_base, read_memories
from lm_ortho.checkpoint.verification import (
    check_base_file,
    check_regular_files,
    check_unlisted_files,
    find_directory,
    verify_files,
)
from lm_ortho.checkpoint.write import SavePretrainedGuard
from lm_ortho.errors import UserError, printable
from lm_ortho.hub import describe_hub_error
from lm_ortho.layer import OrthoLinear, connect, ortho_layers, replace_modules, to_linear_form, unpatch
from lm_ortho.streams import DEFAULT_MEMORY

METHOD = "libortho"
_FIELDS = ("bits", "group_size", "density", "bits_per_weight", "modules", "memories", "format_version", "recipe")
_verified: ContextVar[Path | None] = ContextVar("lm_ortho_verified_directory", default=None)


def register() -> None:
    """Registers quantiser and config with transformers, unless that was done before."""
    auto = import_module("transformers.quantizers.auto")
    if METHOD not in auto.AUTO_QUANTIZATION_CONFIG_MAPPING:
        auto.register_quantization_config(METHOD)(LibOrthoConfig)
    if METHOD not in auto.AUTO_QUANTIZER_MAPPING:
        auto.register_quantizer(METHOD)(LibOrthoHfQuantizer)


@contextmanager
def skip_verification(directory: Path) -> Iterator[None]:
    """Inside the ``with`` block the quantiser does not hash the files of ``directory``, as the caller has done so."""
    token = _verified.set(directory.resolve())
    try:
        yield
    finally:
        _verified.reset(token)


class LibOrthoConfig(QuantizationConfigMixin):
    """``quantization_config`` of a decomposed model: lattice, density, decomposed modules, recipe.

    Raises:
        UserError: for values that no checkpoint has. Unknown fields are dropped: they could shadow a method.
    """

    def __init__(
        self,
        /,
        bits: int = 4,
        group_size: int = 64,
        density: float = 0.0,
        modules: list[str] | None = None,
        memories: list[str] | None = None,
        format_version: int = 1,
        **extra: Any,
    ) -> None:
        check_version(format_version, "quantization_config")
        settings = {
            "bits": bits,
            "group_size": group_size,
            "density": density,
            "modules": modules,
            "memories": memories,
        }
        if modules:  # an empty configuration is made by transformers, to compare with
            check_settings(settings, CONFIG_FILE)
        self.quant_method = METHOD
        self.format_version = format_version
        self.bits = bits
        self.group_size = group_size
        self.density = density
        self.modules = list(modules or [])
        if memories:
            self.memories = list(memories)
        for name, value in extra.items():
            if name in _FIELDS:
                setattr(self, name, value)


class LibOrthoHfQuantizer(HfQuantizer):
    """Builds the skeleton, lets transformers load the base stream, and loads the ortho stream itself.

    transformers finds the base stream through the index, which lists no ortho tensor; the ortho file is in the same
    directory or is fetched from the hub by name.
    """

    requires_calibration = True

    def __init__(self, quantization_config: LibOrthoConfig, **kwargs: Any) -> None:
        self.meta: dict[str, Any] = kwargs.pop("meta", {})
        self._ortho_files: dict[str, Path | None] = {}
        super().__init__(quantization_config, **kwargs)

    @property
    def is_trainable(self) -> bool:
        return True  # by an adapter beside the streams; the Trainer of transformers refuses a model without one

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        return True

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[None, dict[str, Any]]:
        if getattr(model, "_hf_peft_config_loaded", False):  # transformers writes the adapter only
            return None, {}
        # Reached only without the guard on the instance, as by PreTrainedModel.save_pretrained(model, ...).
        raise UserError("save a decomposed model by model.save_pretrained(...) or lm_ortho.checkpoint.save(...)")

    def update_attn_implementation(self, config: Any) -> Any:
        # Called before the model is built, which may take hours if the configuration says so.
        check_sizes(config.to_dict(), CONFIG_FILE)
        directory = Path(str(getattr(config, "name_or_path", "")))
        if str(directory) != "." and directory.is_dir():
            check_regular_files(directory)
        return config

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: list[str] | None = None, **kwargs: Any
    ) -> None:
        files = [Path(name) for name in checkpoint_files or []]
        if not files:
            raise UserError("a decomposed model can only be loaded from its files")
        directory = find_directory(files, str(getattr(model.config, "name_or_path", "")))
        memories = getattr(self.quantization_config, "memories", [DEFAULT_MEMORY])
        self._ortho_files = {name: _find_ortho(ortho_file(name), files[0], model) for name in memories}
        self._verify(directory, files, model)
        try:
            self.replace_layers(model)
        except UserError:
            raise
        except (AttributeError, KeyError, RuntimeError, TypeError, ValueError) as error:
            raise UserError(f"{directory}: {CONFIG_FILE} does not fit the model ({printable(error)})") from error
        with TensorFiles(directory, [path.name for path in files]) as tensors:
            check_base(model, tensors)

    def _verify(self, directory: Path, files: list[Path], model: nn.Module) -> None:
        """Raises ``UserError`` unless all that transformers reads is in the manifest, and as it was written."""
        manifest_file = directory / MANIFEST_FILE
        if not os.path.lexists(manifest_file):
            manifest_file = _fetch_from_hub(MANIFEST_FILE, files[0], model) or manifest_file
        manifest = read_manifest(manifest_file.parent)
        self.meta = manifest.meta
        for path in files:
            check_base_file(directory, manifest, path.name)
        if _verified.get() == directory.resolve():
            return
        check_unlisted_files(directory, manifest, with_code=type(model).__module__.startswith("transformers_modules"))
        read_names = [name for name in (CONFIG_FILE, GENERATION_FILE, INDEX_FILE) if os.path.lexists(directory / name)]
        verify_files(directory, manifest, [*read_names, *(path.name for path in files)])
        for path in filter(None, self._ortho_files.values()):
            verify_files(path.parent, manifest, [path.name])

    def replace_layers(self, model: nn.Module) -> None:
        """Replaces the layers that the config names by empty two-stream layers."""
        config = self.quantization_config
        check_settings(vars(config), "config.json")
        to_linear_form(model, config.modules)
        replacements: dict[nn.Module, nn.Module] = {}
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
                vars(layer)["weight"] = _make_empty_weight(linear.weight)
            replacements[linear] = layer
        replace_modules(model, replacements)

    def update_weight_conversions(self, weight_conversions: list[Any], model: nn.Module) -> list[Any]:
        # Checkpoints hold the names of the model in memory; conversions for names of the hub might match them.
        return []

    def _process_model_after_weight_loading(self, model: nn.Module, **kwargs: Any) -> nn.Module:
        from lm_ortho.adapter import register as register_adapters  # imports peft

        for layer in ortho_layers(model).values():
            vars(layer).pop("weight", None)
        _load_memories(model, self._ortho_files)
        connect(model)
        SavePretrainedGuard.install(model)
        register_adapters()
        # Removes the record that no conversion was used: unpatched, the model is to be saved with the names of the hub.
        vars(model).pop("_weight_conversions", None)
        return model

    def _dequantize(self, model: nn.Module, dtype: torch.dtype | None = None) -> nn.Module:
        layers = ortho_layers(model).values()
        is_complete = all(layer.has_ortho and not layer.absent for layer in layers)
        unpatch(model, 1.0 if is_complete else 0.0)
        return model if dtype is None else model.to(dtype)


def _make_empty_weight(weight: torch.Tensor) -> torch.Tensor:
    """An empty tensor marked as loaded, because some models otherwise initialise the weights of a child again."""
    empty_weight: Any = torch.empty_like(weight, device="meta")
    empty_weight._is_hf_initialized = True
    return empty_weight


def build_skeleton(directory: Path, *, decomposed: bool = True, trust_remote_code: bool = False) -> nn.Module:
    """Builds the model of a checkpoint on the meta device; with plain layers if not ``decomposed``.

    Raises:
        UserError: where transformers does not know the model, or it lacks a layer that the checkpoint names.
    """
    transformers = import_module("transformers")
    options = {"trust_remote_code": trust_remote_code}
    try:
        config = transformers.AutoConfig.from_pretrained(directory, local_files_only=True, **options)
        settings = dict(config.quantization_config)
        del config.quantization_config
        with torch.device("meta"):
            model: nn.Module = transformers.AutoModelForCausalLM.from_config(config, **options)
        if decomposed:
            LibOrthoHfQuantizer(LibOrthoConfig(**settings)).replace_layers(model)
    except UserError:
        raise
    except Exception as error:  # the configuration may hold anything, and so its errors are of any class
        raise UserError(f"{directory}: transformers cannot build it ({describe_hub_error(error)})") from error
    return model


def _find_ortho(name: str, base_file: Path, model: nn.Module) -> Path | None:
    path = base_file.parent / name
    return path if os.path.lexists(path) else _fetch_from_hub(name, base_file, model)


def _fetch_from_hub(name: str, base_file: Path, model: nn.Module) -> Path | None:
    """A file of the repository of the base stream; None for a local directory or a file that does not exist."""
    config: Any = model.config
    source = str(getattr(config, "name_or_path", ""))
    if not source or Path(source).exists() or Path(source).resolve() == base_file.parent.resolve():
        return None
    cached_file = import_module("transformers.utils").cached_file
    location = {}
    if "snapshots" in (parts := base_file.parts):  # <cache>/models--owner--name/snapshots/<commit>/<subfolder>/<file>
        index = len(parts) - 1 - parts[::-1].index("snapshots")
        subfolder = "/".join(parts[index + 2 : -1])
        location = {"cache_dir": Path(*parts[: index - 1]), "revision": parts[index + 1], "subfolder": subfolder}
    try:
        path = cached_file(
            source,
            name,
            **location,
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )
    except OSError as error:
        raise UserError(
            f"{source}: {name} could not be fetched ({describe_hub_error(error, source)}); a token passed to "
            "from_pretrained is not used for this file, so log in with `hf auth login` or set HF_TOKEN"
        ) from None
    return None if path is None else Path(path)


def _load_memories(model: nn.Module, ortho_files: dict[str, Path | None]) -> None:
    """Loads the ortho streams of all memories; without its file, the layers record a name if there are several."""
    missing = [name for name, path in ortho_files.items() if path is None]
    recorded = tuple(name for name in missing if len(ortho_files) > 1 or name != DEFAULT_MEMORY)
    with ExitStack() as stack:
        tensors = {
            memory: stack.enter_context(TensorFiles(path.parent, [path.name]))
            for memory, path in ortho_files.items()
            if path is not None
        }
        for name, layer in ortho_layers(model).items():
            layer.absent = (*layer.absent, *recorded)
            streams = read_memories(tensors, name, layer)
            for memory, ortho in streams.items():
                layer.set_ortho(ortho, memory)


register()  # also here: the start-up hook cannot call it while this module is being imported
