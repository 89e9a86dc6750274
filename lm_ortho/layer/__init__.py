"""Linear layers on two streams, and alpha: the weight of the ortho stream in a request."""

from lm_ortho.layer.alpha import alpha_scope
from lm_ortho.layer.linear_form import linear_form, restore_form, to_linear_form
from lm_ortho.layer.ortho_linear import OrthoLinear
from lm_ortho.layer.patch import (
    choose_kernels,
    connect,
    get_alpha,
    get_dense_weights,
    get_streams,
    ortho_layers,
    patch,
    replace_modules,
    set_alpha,
    set_kernel,
    unpatch,
)
from lm_ortho.layer.targets import find_linear, survey

__all__ = [
    "OrthoLinear",
    "alpha_scope",
    "choose_kernels",
    "connect",
    "find_linear",
    "get_alpha",
    "get_dense_weights",
    "get_streams",
    "linear_form",
    "ortho_layers",
    "patch",
    "replace_modules",
    "restore_form",
    "set_alpha",
    "set_kernel",
    "survey",
    "to_linear_form",
    "unpatch",
]
