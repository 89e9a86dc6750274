"""Wrappers around methods of one model object, which fix alpha while the method runs.

A wrapper is an attribute of the instance rather than a forward hook, because hooks are not undone on Ctrl-C, and rather
than a subclass, because class names are written into checkpoints.
"""

from __future__ import annotations

import functools
import inspect
import math
import weakref
from collections.abc import Callable
from typing import Any, ClassVar

from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.layer.alpha import Dial, bind_call, hold_alpha


class Guard:
    """A wrapper around one method of ``model``; it is copied and pickled together with the model.

    From the first call on it references the model weakly: a strong reference would be a cycle, and a dropped model
    would keep its memory until the next full garbage collection. Before the first call the reference is strong, for
    a model that nothing else references: ``AutoModelForCausalLM.from_pretrained(a).save_pretrained(b)``.
    """

    method: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self._ref = weakref.ref(model)
        self._held: nn.Module | None = model
        # Something else (accelerate, say) may have replaced the method of this instance before us.
        self._inner = model.__dict__.get(self.method)

    @property
    def model(self) -> nn.Module:
        model = self._ref()
        if model is None:
            raise ReferenceError(f"the model of this {self.method} was deleted")
        return model

    def get_wrapped_method(self) -> Any:
        """The method without this wrapper."""
        return getattr(type(self.model), self.method).__get__(self.model) if self._inner is None else self._inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model  # this frame keeps it alive from here on
        if self._held is not None:
            _drop_strong_references(model)
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Runs in place of the method."""
        return self.get_wrapped_method()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers reads the signature of forward to decide which arguments generate may pass on.
        return inspect.signature(self.get_wrapped_method())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ref": self.model, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _ref=weakref.ref(state["_ref"]), _held=state["_ref"])

    @classmethod
    def install(cls, model: nn.Module, *args: Any) -> None:
        """Wraps the method of ``model``, once; does nothing for a model without such a method."""
        if callable(getattr(model, cls.method, None)) and not isinstance(model.__dict__.get(cls.method), cls):
            setattr(model, cls.method, cls(model, *args))


def _drop_strong_references(model: nn.Module) -> None:
    """Makes the references of all guards of ``model`` to it weak."""
    for method in vars(model).values():
        while isinstance(method, Guard):
            method._held, method = None, method._inner


class CallGuard(Guard):
    """A guard that fixes the alpha of ``dial`` while the method runs."""

    def __init__(self, model: nn.Module, dial: Dial) -> None:
        super().__init__(model)
        self.dial = dial

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the method at one alpha."""
        with hold_alpha(self.dial, input_shape(args, kwargs)):
            return self.get_wrapped_method()(*args, **kwargs)


class ForwardGuard(CallGuard):
    """Fixes alpha for a whole forward pass, and for what gradient checkpointing computes again in its backward pass."""

    method = "forward"

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Runs the method at one alpha."""
        if self.model.training:
            _bind_checkpointing(self.model)
        return super().call(*args, **kwargs)


class GenerateGuard(CallGuard):
    """Fixes alpha for a whole generation."""

    method = "generate"


class CastGuard(Guard):
    """Casts what is outside the streams, as for any model; transformers refuses a quantised one.

    The streams keep their dtypes, and products are computed in the dtype of the activations.
    """

    def call(self) -> nn.Module:
        """Casts the model in place and returns it."""
        cast: Callable[[nn.Module], nn.Module] = getattr(nn.Module, self.method)
        return cast(self.model)


class FloatGuard(CastGuard):
    """Casts to float32."""

    method = "float"


class HalfGuard(CastGuard):
    """Casts to float16."""

    method = "half"


class UnattachedGuard(Guard):
    """Refuses ``save_pretrained`` of a model patched by hand: it would write one file that nothing can load."""

    method = "save_pretrained"

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Raises ``UserError``."""
        raise UserError(
            "save_pretrained: this model was patched by hand; call lm_ortho.checkpoint.attach(model) first, or write "
            "it with lm_ortho.checkpoint.save"
        )


def input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(batch, positions in the batch) of the first argument or of the usual keyword; None without either."""
    candidates = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0], math.prod(value.shape[:2])
    return None


_CHECKPOINTING = "_gradient_checkpointing_func"
"""The attribute in which transformers keeps ``torch.utils.checkpoint.checkpoint`` with its options."""


def _bind_checkpointing(model: nn.Module) -> None:
    """Makes gradient checkpointing compute again at the alpha of the forward pass."""
    for module in model.modules():
        checkpoint = vars(module).get(_CHECKPOINTING)
        if checkpoint is not None and getattr(checkpoint, "func", None) is not _checkpoint_call:
            setattr(module, _CHECKPOINTING, functools.partial(_checkpoint_call, checkpoint))


def _checkpoint_call(checkpoint: Callable[..., Any], function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(bind_call(function), *args, **kwargs)


def remove_guards(model: nn.Module) -> None:
    """Removes the guards of every kind from ``model``, so that it has its own methods again."""
    for name, method in list(model.__dict__.items()):
        while isinstance(method, Guard):
            delattr(model, name)
            method = method._inner
            if method is not None:
                setattr(model, name, method)
