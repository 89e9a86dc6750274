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

from lm_ortho.errors import UserError
from lm_ortho.layer.alpha import Dial, running


class Guard:
    """Replaces one method of ``model``; survives deepcopy and pickle together with the model.

    From the first call on the model is held weakly: a strong reference makes a cycle, and a dropped model would
    keep its memory until the next full garbage collection. Before that it is held strongly, for a model that nothing
    else holds: ``AutoModelForCausalLM.from_pretrained(a).save_pretrained(b)``.
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
            raise ReferenceError(f"the model behind this {self.method} is gone")
        return model

    def inner(self) -> Any:
        """The method as it was before."""
        return getattr(type(self.model), self.method).__get__(self.model) if self._inner is None else self._inner

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        model = self.model  # held by this frame from here on
        if self._held is not None:
            _let_go(model)
        return self.call(*args, **kwargs)

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """What takes the place of the method."""
        return self.inner()(*args, **kwargs)

    @property
    def __signature__(self) -> inspect.Signature:
        # transformers reads the signature of forward to decide which arguments generate may pass on.
        return inspect.signature(self.inner())

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_ref": self.model, "_held": None}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state, _ref=weakref.ref(state["_ref"]), _held=state["_ref"])

    @classmethod
    def install(cls, model: nn.Module, *args: Any) -> None:
        """Puts a guard in front of the method, once; nothing for a model without such a method."""
        if callable(getattr(model, cls.method, None)) and not isinstance(model.__dict__.get(cls.method), cls):
            setattr(model, cls.method, cls(model, *args))


def _let_go(model: nn.Module) -> None:
    """From now on all guards of the model hold it weakly."""
    for value in vars(model).values():
        while isinstance(value, Guard):
            value._held, value = None, value._inner


class CallGuard(Guard):
    """A guard that keeps the alpha of ``dial`` while the method runs."""

    def __init__(self, model: nn.Module, dial: Dial) -> None:
        super().__init__(model)
        self.dial = dial

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """The method at one alpha."""
        with running(self.dial, input_shape(args, kwargs)):
            return self.inner()(*args, **kwargs)


class ForwardGuard(CallGuard):
    """One alpha for a whole forward."""

    method = "forward"


class GenerateGuard(CallGuard):
    """One alpha for a whole generation."""

    method = "generate"


class UnattachedGuard(Guard):
    """``save_pretrained`` of a model patched by hand, which would write one file that nothing can load."""

    method = "save_pretrained"

    def call(self, *args: Any, **kwargs: Any) -> Any:
        """Refuses."""
        raise UserError(
            "save_pretrained: this model was patched by hand; call lm_ortho.checkpoint.attach(model) first, or write "
            "it with lm_ortho.checkpoint.save"
        )


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
