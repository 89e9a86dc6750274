"""The validator of stored tensors: what a file may claim and what is refused, by comparison with a slow check."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lm_ortho.kernels import check_csr, pack_codes, packed_width
from lm_ortho.streams import MAX_GROUP_SIZE, BaseStream, LayerStreams, OrthoStream, validate_layer

INT64_MIN, INT64_MAX = -(2**63), 2**63 - 1
extreme = st.sampled_from([INT64_MIN, INT64_MIN + 1, -(2**62), -1, 0, 1, 2, 3, 2**31, 2**62, INT64_MAX])


def csr(rowptr, cols, vals=None):
    vals = [1.0] * len(cols) if vals is None else vals
    return (
        torch.tensor(rowptr, dtype=torch.int64),
        torch.tensor(cols, dtype=torch.int32),
        torch.tensor(vals, dtype=torch.bfloat16),
    )


def is_csr(rowptr, cols, in_features):
    """The definition, in unbounded integers."""
    if rowptr[0] != 0 or rowptr[-1] != len(cols) or any(a > b for a, b in itertools.pairwise(rowptr)):
        return False
    rows = [cols[a:b] for a, b in itertools.pairwise(rowptr)]
    return all(0 <= column < in_features for column in cols) and all(
        a < b for row in rows for a, b in itertools.pairwise(row)
    )


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.one_of(extreme, st.integers(0, 5)), min_size=2, max_size=6),
    st.lists(st.one_of(st.sampled_from([-(2**31), 2**31 - 1, -1]), st.integers(0, 6)), max_size=5),
    st.integers(1, 6),
)
def test_exactly_the_valid_matrices_pass(rowptr, cols, in_features):
    parts = csr(rowptr, cols)
    if is_csr(rowptr, cols, in_features):
        OrthoStream(*parts, shape=(len(rowptr) - 1, in_features))
        return
    with pytest.raises(ValueError, match=r"rowptr must rise|cols lie outside|strictly increasing"):
        OrthoStream(*parts, shape=(len(rowptr) - 1, in_features))


@pytest.mark.parametrize("nnz", [0, 2])
def test_row_pointers_whose_differences_wrap_around(nnz):
    """0 -> 2^63 - 1 -> -2 -> nnz: in int64 the differences are 2^63 - 1, 2^63 - 1 and nnz + 2."""
    rowptr, cols, vals = csr([0, INT64_MAX, -2, nnz], list(range(nnz)))
    assert bool((rowptr.diff() >= 0).all()), "what a check by differences sees"
    with pytest.raises(ValueError, match="rowptr must rise from 0"):
        OrthoStream(rowptr, cols, vals, (3, 5))
    with pytest.raises(ValueError, match="rowptr must rise from 0"):
        check_csr(rowptr, cols, vals, (3, 5))


def good_layer():
    base = {
        "qweight": pack_codes(torch.zeros(3, 16, dtype=torch.int8), 4),
        "scales": torch.ones(3, 2, dtype=torch.bfloat16),
    }
    rowptr, cols, vals = csr([0, 1, 1, 3], [4, 0, 15])
    memories = {"alice": {"rowptr": rowptr, "cols": cols, "vals": vals}}
    return {"base": base, "memories": memories, "bias": torch.zeros(3)}


DAMAGE = {
    "scales of one byte": (("base", "scales"), lambda t: t.to(torch.float8_e4m3fn), "scales must be bfloat16"),
    "scales as bytes": (("base", "scales"), lambda t: t.to(torch.uint8), "scales must be bfloat16"),
    "scales in float32": (("base", "scales"), lambda t: t.float(), "scales must be bfloat16"),
    "a NaN scale": (("base", "scales"), lambda t: t * float("nan"), "scales holds a value that is not finite"),
    "scales of another group": (("base", "scales"), lambda t: t[:, :1].contiguous(), "scales must be"),
    "codes as bool": (("base", "qweight"), lambda t: t.bool(), "qweight must be uint8"),
    "codes as int8": (("base", "qweight"), lambda t: t.view(torch.int8), "qweight must be uint8"),
    "narrow codes": (("base", "qweight"), lambda t: t[:, 1:].contiguous(), "qweight must be"),
    "transposed codes": (("base", "qweight"), lambda t: t.t().contiguous().t(), "contiguous"),
    "expanded codes": (("base", "qweight"), lambda t: t[:1].expand(3, -1), "contiguous"),
    "sparse scales": (("base", "scales"), lambda t: t.to_sparse(), "scales must be a dense"),
    "codes without data": (("base", "qweight"), lambda t: t.to("meta"), "meta device"),
    "codes beyond their memory": (("base", "qweight"), "shrink", "longer than its memory"),
    "no scales": (("base", "scales"), lambda t: None, "scales is missing"),
    "long columns": (("memories", "alice", "cols"), lambda t: t.long(), "cols must be int32"),
    "byte row pointers": (("memories", "alice", "rowptr"), lambda t: t.to(torch.int8), "rowptr must be int32 or int64"),
    "bool values": (("memories", "alice", "vals"), lambda t: t.bool(), "vals must be bfloat16"),
    "infinite values": (("memories", "alice", "vals"), lambda t: t * float("inf"), "vals holds a value"),
    "no columns": (("memories", "alice", "cols"), lambda t: None, "cols of alice is missing"),
    "integer bias": (("bias",), lambda t: t.int(), "bias of shape"),
    "a bias without data": (("bias",), lambda t: t.to("meta"), "meta device"),
    "a NaN bias": (("bias",), lambda t: t + float("nan"), "bias holds a value"),
    "a bias that BF16 cannot hold": (("bias",), lambda t: t + 3.4e38, "bias holds a value"),
}


def test_a_good_layer_passes():
    validate_layer((3, 16), 4, 8, **good_layer())


@pytest.mark.parametrize("kind", DAMAGE)
def test_damaged_layers_are_refused(kind):
    (*path, name), damage, message = DAMAGE[kind]
    layer = good_layer()
    place = layer
    for part in path:
        place = place[part]
    if damage == "shrink":
        place[name].untyped_storage().resize_(4)
    else:
        place[name] = damage(place[name])
    with pytest.raises(ValueError, match=message):
        validate_layer((3, 16), 4, 8, **layer)


def test_memories_that_share_a_weight_are_named():
    layer = good_layer()
    rowptr, cols, vals = csr([0, 0, 1, 2], [3, 15])
    layer["memories"] |= {"bob": {"rowptr": csr([0, 0, 0, 0], [])[0], "cols": cols[:0], "vals": vals[:0]}}
    validate_layer((3, 16), 4, 8, **layer)
    layer["memories"] |= {"carol": {"rowptr": rowptr, "cols": cols, "vals": vals}}
    with pytest.raises(ValueError, match="same position: alice and carol, row 2, column 15"):
        validate_layer((3, 16), 4, 8, **layer)


@pytest.mark.parametrize(
    ("shape", "bits", "group_size", "message"),
    [
        ((0, 16), 4, 8, "no weights"),
        ((3, -16), 4, 8, "no weights"),
        ((3, True), 4, 8, "no weights"),
        ((2**31, 2**62), 4, 8, "more rows or columns"),
        ((3, 16), 4.0, 8, "bits=4.0"),
        ((3, 16), True, 8, "bits=True"),
        ((3, 16), 16, 8, "weight"),
        ((3, 16), 4, 12, "multiple of 8"),
        ((3, 16), 4, -8, "multiple of 8"),
        ((3, 16), 4, 8.0, "multiple of 8"),
        ((3, 16), 4, MAX_GROUP_SIZE + 8, "multiple of 8 up to"),
        ((3, 16), 3, 8, "qweight must be"),
        ((3, 16), 4, 16, "scales must be"),
    ],
)
def test_lattices_and_shapes_that_do_not_fit(shape, bits, group_size, message):
    with pytest.raises(ValueError, match=message):
        validate_layer(shape, bits, group_size, **good_layer())


def test_a_stream_holds_only_its_own_tensors():
    base = good_layer()["base"]
    with pytest.raises(ValueError, match="4 bits has no weight"):
        BaseStream((3, 16), 4, 8, **base, weight=torch.zeros(3, 16, dtype=torch.bfloat16))


@settings(max_examples=30, deadline=None)
@given(st.integers(1, 40), st.integers(1, 40), st.sampled_from([3, 4, 8]), st.sampled_from([8, 16]), st.integers(0, 99))
def test_streams_made_from_a_model_pass(out_features, in_features, bits, group_size, seed):
    generator = torch.Generator().manual_seed(seed)
    groups = -(-in_features // group_size)
    codes = torch.zeros(out_features, in_features, dtype=torch.int8)
    base = BaseStream.from_codes(codes, torch.rand(out_features, groups), bits, group_size)
    assert base.tensors()["qweight"].shape[1] == packed_width(in_features, bits, group_size)
    support = torch.rand(out_features, in_features, generator=generator) < 0.3
    streams = LayerStreams(base, OrthoStream.from_dense(torch.randn(out_features, in_features), support))
    parts = {"rowptr": streams.ortho.rowptr, "cols": streams.ortho.cols, "vals": streams.ortho.vals}
    validate_layer(streams.shape, bits, group_size, base.tensors(), memories={"memory": parts})
