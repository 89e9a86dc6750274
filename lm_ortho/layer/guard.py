"""Stand-ins for methods of one model object: they freeze alpha while the method runs.

An attribute of the instance rather than a forward hook, because hooks are not undone on Ctrl-C, and rather
than a subclass, because class names are written into checkpoints.
"""

from __future__ import annotations

import inspect
import math
import weakref
from typing import Any, ClassVar

from torch import Tensor, nn

from lm_ortho.layer.alpha import Dial, running


class Guard:
    """Replaces one method of ``model``; survives deepcopy and pickle together with the model.

    The model is held weakly: a strong reference would make a cycle, and a dropped model would keep its
    memory until the next full garbage collection.
    """

    method: ClassVar[str]

    def __init__(self, model: nn.Module) -> None:
        self._ref = weakref.ref(model)
        # Something else (accelerate, say) may have replaced the method of this instance before us.
        self._inner = model.__dict__.get(self.method)

    @property
    def model(self) -> nn.Module:
        model = self._ref()
        if model is None:
            raise ReferenceError(f"the model behind this {self.method} is gone")
        return model

    def inner(self) -> Any:
        """The method as it was before."""
        return getattr(type(self.model), self.method).__get__(self.model) if self._inner is None else self._inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.inner()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers reads the signature of forward to decide which arguments generate may pass on.
        return inspect.signature(self.inner())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ref": self.model}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _ref=weakref.ref(state["_ref"]))

    @classmethod
    def install(cls, model: nn.Module, *args: Any) -> None:
        """Puts a guard in front of the method, once; nothing for a model without such a method."""
        if callable(getattr(model, cls.method, None)) and not isinstance(model.__dict__.get(cls.method), cls):
            setattr(model, cls.method, cls(model, *args))


class CallGuard(Guard):
    """A guard that keeps the alpha of ``dial`` while the method runs."""

    def __init__(self, model: nn.Module, dial: Dial) -> None:
        super().__init__(model)
        self.dial = dial

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        with running(self.dial, input_shape(args, kwargs)):
            return self.inner()(*args, **kwargs)


class ForwardGuard(CallGuard):
    """One alpha for a whole forward."""

    method = "forward"


class GenerateGuard(CallGuard):
    """One alpha for a whole generation."""

    method = "generate"


def input_shape(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[int, int] | None:
    """(batch, positions in the batch) of the first argument or the usual keyword; None without either."""
    candidates = [*args[:1], *(kwargs.get(name) for name in ("input_ids", "inputs", "inputs_embeds"))]
    for value in candidates:
        if isinstance(value, Tensor) and value.dim() >= 2:
            return value.shape[0], math.prod(value.shape[:2])
    return None


def remove_guards(model: nn.Module) -> None:
    """Gives ``model`` its own methods back, under guards of every kind."""
    for name, value in list(model.__dict__.items()):
        while isinstance(value, Guard):
            delattr(model, name)
            value = value._inner
            if value is not None:
                setattr(model, name, value)
