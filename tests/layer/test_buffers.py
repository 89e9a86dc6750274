"""Loading a state dict into a two-stream layer: whatever is not sound is refused by name, before anything changes."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, nn

from lm_ortho.errors import UserError
from lm_ortho.layer import OrthoLinear, alpha_scope
from lm_ortho.streams import LayerStreams, OrthoStream
from tests.support.tiny import layer_streams, standalone_layer

OUT, IN = 6, 24


def make_layer(bits: int = 4, seed: int = 0) -> OrthoLinear:
    return standalone_layer(OUT, IN, bits, density=0.3, seed=seed)[0]


def make_two_memories() -> OrthoLinear:
    """A layer whose memories hold the first and the second half of the columns."""
    weight = torch.randn(OUT, IN, generator=torch.Generator().manual_seed(0))
    streams = layer_streams(weight, group_size=8, with_ortho=False)
    left = torch.zeros(OUT, IN, dtype=torch.bool)
    left[:, : IN // 2] = True
    memories = {name: OrthoStream.from_dense(weight, part) for name, part in (("alice", left), ("bob", ~left))}
    return OrthoLinear.from_streams(LayerStreams(streams.base, None, None, memories))


def snapshot(layer: nn.Module) -> dict[str, tuple[Any, bytes]]:
    return {
        name: (tensor.dtype, tensor.contiguous().view(torch.uint8).numpy().tobytes())
        for name, tensor in layer.state_dict().items()
    }


@pytest.mark.parametrize("assign", [False, True])
@pytest.mark.parametrize("bits", [4, 16])
def test_another_decomposition_of_the_same_shape_loads(bits: int, assign: bool) -> None:
    layer, other = make_layer(bits), make_layer(bits, seed=1)
    assert layer.ortho_vals.shape != other.ortho_vals.shape
    layer.load_state_dict(other.state_dict(), assign=assign)
    assert snapshot(layer) == snapshot(other)
    x = torch.randn(3, IN)
    with alpha_scope(1.0):
        assert torch.equal(layer(x), other(x))


def test_memories_of_another_decomposition_load() -> None:
    source = make_two_memories()
    layer = OrthoLinear(IN, OUT, 4, 8, bias=False)
    layer.load_state_dict(source.state_dict())
    assert layer.memories == ("alice", "bob")
    assert snapshot(layer) == snapshot(source)


def set_entry(name: str, value: Any, index: Any = 0) -> Any:
    """A change that sets one entry of a copy of the tensor."""

    def change(state: dict[str, Tensor]) -> None:
        state[name] = state[name].clone()
        state[name][index] = value

    return change


def replace(name: str, make: Any) -> Any:
    def change(state: dict[str, Tensor]) -> None:
        state[name] = make(state[name])

    return change


def wrap_around(rowptr: Tensor) -> Tensor:
    """Row pointers whose int64 differences overflow to positive numbers."""
    wide = rowptr.long().clone()
    wide[1], wide[2] = 2**62, -(2**62) - 2**62
    return wide


DAMAGE = {
    "a column beyond the row": set_entry("ortho_cols", IN),
    "a column far beyond the row": set_entry("ortho_cols", 2**31 - 1),
    "a negative column": set_entry("ortho_cols", -1),
    "row pointers that do not start at 0": set_entry("ortho_rowptr", 1),
    "row pointers that fall": set_entry("ortho_rowptr", 2**30, 1),
    "a negative row pointer": set_entry("ortho_rowptr", -5, 2),
    "row pointers that wrap around": replace("ortho_rowptr", wrap_around),
    "row pointers of another layer": replace("ortho_rowptr", lambda t: torch.cat([t, t[-1:]])),
    "float row pointers": replace("ortho_rowptr", lambda t: t.float()),
    "wide columns": replace("ortho_cols", lambda t: t.long()),
    "fewer columns than values": replace("ortho_cols", lambda t: t[:-1]),
    "float32 values": replace("ortho_vals", lambda t: t.float()),
    "a value that is NaN": set_entry("ortho_vals", float("nan")),
    "no columns": lambda state: state.pop("ortho_cols"),
    "one-byte scales": replace("scales", lambda t: torch.ones(t.shape, dtype=torch.uint8)),
    "a scale that is infinite": set_entry("scales", float("inf"), (0, 0)),
    "too few scales": replace("scales", lambda t: t[:, :-1]),
    "codes as int64": replace("qweight", lambda t: t.long()),
    "codes of another layer": replace("qweight", lambda t: t[:-1]),
    "a bias that is NaN": set_entry("bias", float("nan")),
}


@pytest.mark.parametrize("damage", DAMAGE.values(), ids=DAMAGE.keys())
@pytest.mark.parametrize("base_only", [False, True])
def test_what_is_not_sound_is_refused_and_nothing_changes(damage: Any, base_only: bool) -> None:
    state = make_layer(seed=1).state_dict()
    damage(state)
    layer = make_layer()
    if base_only:
        layer.set_ortho(None)
    model = nn.ModuleDict({"proj": layer})
    before = snapshot(model)
    with pytest.raises(UserError, match=r"^load_state_dict: layer 'proj': "):
        model.load_state_dict({f"proj.{name}": tensor for name, tensor in state.items()}, strict=False)
    assert snapshot(model) == before
    assert layer.has_ortho is not base_only


@given(st.lists(st.integers(-(2**63), 2**63 - 1), min_size=OUT + 1, max_size=OUT + 1))
def test_no_row_pointers_reach_a_product_unless_they_are_sound(rowptr: list[int]) -> None:
    layer = make_layer()
    state, n_values = layer.state_dict(), layer.ortho_vals.numel()
    state["ortho_rowptr"] = torch.tensor(rowptr)
    is_sound = rowptr[0] == 0 and rowptr[-1] == n_values and rowptr == sorted(rowptr)
    if not is_sound:
        with pytest.raises(UserError):
            layer.load_state_dict(state)
    with alpha_scope(1.0):
        assert layer(torch.randn(2, IN)).isfinite().all()


def test_memories_that_share_a_position_are_refused() -> None:
    layer = make_two_memories()
    state, before = layer.state_dict(), snapshot(layer)
    for part in ("rowptr", "cols", "vals"):
        state[f"ortho_bob_{part}"] = state[f"ortho_alice_{part}"].clone()
    with pytest.raises(UserError, match="two memories hold the same position"):
        layer.load_state_dict(state)
    # Also where the other memory is one that the layer holds already.
    for name in [name for name in state if "alice" in name]:
        del state[name]
    with pytest.raises(UserError, match="two memories hold the same position"):
        layer.load_state_dict(state, strict=False)
    assert snapshot(layer) == before


def test_a_memory_set_by_hand_may_not_share_a_position_either() -> None:
    layer = make_two_memories()
    before = snapshot(layer)
    shared = OrthoStream.from_dense(torch.ones(OUT, IN), torch.ones(OUT, IN, dtype=torch.bool))
    with pytest.raises(ValueError, match="two memories hold the same position"):
        layer.set_ortho(shared, "carol")
    assert snapshot(layer) == before
    layer.set_ortho(None, "bob")
    layer.set_ortho(None, "alice")
    layer.set_ortho(shared, "carol")
    assert layer.memories == ("carol",)


def test_names_that_are_no_buffers_stay_unexpected() -> None:
    layer = make_layer()
    state, names = layer.state_dict(), set(layer._buffers)
    state["ortho_other"] = torch.zeros(3)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*ortho_other"):
        layer.load_state_dict(state)
    assert set(layer._buffers) == names


def test_a_memory_of_a_bad_name_is_refused() -> None:
    layer = make_two_memories()
    state = layer.state_dict()
    for part in ("rowptr", "cols", "vals"):
        state[f"ortho_A!_{part}"] = OrthoStream.empty((OUT, IN)).tensors()[f"ortho_{part}"]
    with pytest.raises(UserError, match="memory name 'A!'"):
        layer.load_state_dict(state)
