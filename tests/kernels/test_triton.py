"""The GPU kernels without a GPU: numerics in Triton's interpreter, compilation for real devices, operands."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from lm_ortho.kernels.cuda import fuses, linear, plane_width, prepare, refuses, tuning
from tests.support.paths import REPOSITORY
from tests.support.triton_layers import random_layer

needs_triton = pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")


@needs_triton
def test_numerics_in_the_interpreter() -> None:
    """Runs all of interpreted_triton.py, with TRITON_INTERPRET set before Triton is imported."""
    process = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "--noconftest",
            "-q",
            "-p",
            "no:cacheprovider",
            "tests/support/interpreted_triton.py",
        ],
        cwd=REPOSITORY,
        env=os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(REPOSITORY)},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert process.returncode == 0, process.stdout[-4000:] + process.stderr[-2000:]


def compile_kernel(kernel: Any, constants: dict[str, Any], capability: int, warps: int, **pointers: str) -> Any:
    """Compiles ``kernel`` for a device that may be absent; ``pointers`` gives types, other arguments are int32."""
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    signature = {name: pointers.get(name, "i32") for name in kernel.arg_names}
    signature.update(dict.fromkeys(constants, "constexpr"))
    aligned_names = [name for name in kernel.arg_names if name in pointers or name in ("IN", "OUT")]
    attributes = {(kernel.arg_names.index(name),): [["tt.divisibility", 16]] for name in aligned_names}
    source = ASTSource(kernel, signature, constexprs=constants, attrs=attributes)
    options = {"num_warps": warps, "num_stages": 3, "enable_fp_fusion": False}
    return compile(source, target=GPUTarget("cuda", capability, 32), options=options)


@pytest.fixture
def empty_triton_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))


FUSED_CONSTANTS = {"MEMORIES": 1, "BLOCKS": 1, "SPLIT": 1, "SLICES": 4, "SLOTS": 32, "PLANE": 64, "BN": 16, "BM": 1}
FUSED_CONSTANTS |= {"HAS_BIAS": True, "HALF": False, "UPCAST": False}


@needs_triton
@pytest.mark.usefixtures("empty_triton_cache")
@pytest.mark.parametrize(
    ("capability", "changes"),
    [
        (80, {}),
        (90, {"MEMORIES": 0, "HAS_BIAS": False}),
        (90, {"MEMORIES": 2, "BLOCKS": 2, "SPLIT": 2, "BM": 16, "BN": 32, "PLANE": 16, "SLICES": 8}),
        (90, {"HALF": True, "BM": 8, "PLANE": 32}),
    ],
)
def test_the_fused_kernel_compiles_with_asynchronous_loads(capability: int, changes: dict[str, Any]) -> None:
    """Checks what the interpreter cannot: types, tensor cores fed from packed decoding, asynchronous copies."""
    from lm_ortho.kernels.cuda.fused import _fused

    constants = FUSED_CONSTANTS | changes
    x = "*fp16" if constants["HALF"] else "*bf16"
    pointers = {"codes": "*i32", "scales": "*i64", "ortho": "*i32", "rowptr": "*i32", "alphas": "*fp32"}
    out = "*fp32" if constants["SPLIT"] > 1 else x
    if not constants["MEMORIES"]:  # a launch without an ortho stream passes no pointers to one
        constants |= dict.fromkeys(["ortho", "rowptr", "alphas", "bias"])
        pointers = {name: kind for name, kind in pointers.items() if name not in constants}
    kernel = compile_kernel(
        _fused, constants, capability, constants["SLICES"], x=x, xt=x, out=out, **({"bias": x} | pointers)
    )
    ptx = kernel.asm["ptx"]
    assert "mma.sync.aligned.m16n8k16" in ptx
    assert "cp.async" in ptx
    assert "cvt.rn.f32.s" not in ptx, "codes are converted one by one"


@needs_triton
@pytest.mark.usefixtures("empty_triton_cache")
@pytest.mark.parametrize(("plane", "bits", "base"), [(64, 4, True), (0, 3, True), (0, 8, True), (0, 4, False)])
def test_the_merge_pass_compiles(plane: int, bits: int, base: bool) -> None:
    from lm_ortho.kernels.cuda.merge import _merge

    constants = {"MEMORIES": 1, "BLOCKS": 2, "SLOTS": 32, "BASE": base, "PLANE": plane, "BITS": bits, "GROUP": 64}
    codes, scales = ("*i32", "*i64") if plane else ("*u8", "*bf16")
    pointers = {"ortho": "*i32", "rowptr": "*i32", "alphas": "*fp32", "weight": "*bf16"}
    kernel = compile_kernel(
        _merge, constants | {"TILE": 256, "ROWS": 16}, 90, 4, codes=codes, scales=scales, **pointers
    )
    assert "bar.sync" in kernel.asm["ptx"], "the support must not be written before the tile under it"


@needs_triton
@pytest.mark.usefixtures("empty_triton_cache")
def test_the_small_kernels_compile() -> None:
    from lm_ortho.kernels.cuda.fused import _add_parts, _transpose

    compile_kernel(_transpose, {"BK": 64, "BM": 16}, 90, 4, x="*bf16", xt="*bf16")
    compile_kernel(
        _add_parts, {"SPLIT": 2, "HAS_BIAS": True, "BN": 256}, 90, 4, parts="*fp32", bias="*bf16", out="*bf16"
    )


def test_importing_the_package_imports_no_triton() -> None:
    code = "import sys, lm_ortho.kernels.cuda; assert 'lm_ortho.kernels.cuda.ops' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env=os.environ | {"PYTHONPATH": str(REPOSITORY)})


@pytest.mark.parametrize(
    ("bits", "group", "columns", "plane"),
    [
        (4, 64, 4096, 64),
        (4, 128, 14336, 64),
        (4, 192, 768, 64),
        (4, 32, 5632, 32),
        (4, 96, 768, 32),
        (4, 16, 2048, 16),
        (4, 64, 320, 16),
        (4, 64, 896, 32),
        (4, 24, 4096, 0),
        (3, 64, 4096, 0),
        (8, 64, 4096, 0),
    ],
)
def test_plane_widths(bits: int, group: int, columns: int, plane: int) -> None:
    assert plane_width(bits, group, columns) == plane
    assert (fuses(bits, group, columns) is None) == (plane > 0)


def test_an_operand_holds_the_stored_numbers_in_another_order() -> None:
    layer = random_layer(5, 300, group_size=32)
    operand = layer.prepare()
    spans, rows, half = operand.codes.shape
    scales = operand.scales.view(torch.bfloat16).view(spans, rows, 4).double()
    weight = torch.zeros(rows, spans * half * 8, dtype=torch.float64)
    for column in range(weight.shape[1]):
        span, plane, within = column // (8 * half), column % (8 * half) // (2 * half), column % (2 * half)
        word = operand.codes[span, :, within // 2].long()
        code = (word >> (4 * plane + 16 * (within % 2)) & 15) - 8
        weight[:, column] = code * scales[span, :, plane]
    assert torch.equal(weight[:, :300], layer.base)
    assert not weight[:, 300:].any()


def test_memory_is_that_of_the_checkpoint_and_sparse_words_cost_four_bytes() -> None:
    layer = random_layer(128, 1024, support=0.05, memories=2)
    operand, base_operand = layer.prepare(), layer.prepare(ortho=False)
    assert base_operand.nbytes == layer.qweight.nbytes + layer.scales.nbytes
    values = sum(vals.numel() for _, _, vals in layer.memories)
    assert operand.nbytes == base_operand.nbytes + 4 * values + 2 * 4 * (128 + 1)
    assert (operand.memories, base_operand.memories) == (2, 0)


def test_refusals_give_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_ortho.kernels.cuda import product

    assert "CUDA devices, not on cpu" in str(refuses("cpu", torch.bfloat16, (64, 64)))
    monkeypatch.setattr(product, "_is_triton_missing", lambda: True)
    assert refuses("cuda", torch.bfloat16, (64, 64)) == "triton is not installed"
    monkeypatch.setattr(product, "_is_triton_missing", lambda: False)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    assert "compute capability below 8.0" in str(refuses("cuda", torch.bfloat16, (64, 64)))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (9, 0))
    assert refuses("cuda", torch.bfloat16, (64, 64)) is None
    assert refuses("cuda", torch.float16, (64, 64), bits=3, group_size=8) is None
    assert "float32" in str(refuses("cuda", torch.float32, (64, 64)))
    assert "16 bits" in str(refuses("cuda", torch.bfloat16, (64, 64), bits=16))
    assert "group_size 12" in str(refuses("cuda", torch.bfloat16, (64, 64), group_size=12))
    assert "31 bits" in str(refuses("cuda", torch.bfloat16, (1 << 17, 1 << 16)))
    assert "31 bits" in str(refuses("cuda", torch.bfloat16, (64, 64), nnz=1 << 31))
    assert "backward" in str(refuses("cuda", torch.bfloat16, (64, 64), grad=True))


def test_operands_that_do_not_fit_are_an_error() -> None:
    layer = random_layer(8, 64)
    with pytest.raises(ValueError, match="16 bits has no codes"):
        prepare(layer.qweight, layer.scales, in_features=64, bits=16)
    if importlib.util.find_spec("triton"):
        with pytest.raises(ValueError, match="in_features"):
            linear(torch.zeros(1, 32, dtype=torch.bfloat16), layer.prepare())
        with pytest.raises(ValueError, match="2 memories"):
            linear(torch.zeros(1, 64, dtype=torch.bfloat16), random_layer(8, 64, memories=2).prepare(), torch.ones(1))


def test_tuning_files_are_complete() -> None:
    assert (tuning.FOLDER / "default.json").is_file()
    for path in tuning.FOLDER.glob("*.json"):
        content = tuning.settings(path.stem)
        for launch in [*content["launch"].values(), *(entry["launch"] for entry in content["shapes"])]:
            assert all(int(rows) in tuning.WIDTHS for rows in launch)
        for kind in ("wide", "narrow"):
            assert set(map(int, content["launch"][kind])) == set(tuning.WIDTHS)


@pytest.mark.parametrize("shape", [(14336, 16), (4096, 16), (4096, 56), (256, 8), (1024, 56), (1, 1)])
def test_the_order_of_sums_belongs_to_the_shape(shape: tuple[int, int]) -> None:
    order = tuning.order("an unknown device", *shape)
    assert order.slices in (4, 8)
    assert order.split >= 1
    for rows in (1, 2, 3, 7, 16, 17, 40, 64):
        launch = tuning.launch("an unknown device", *shape, rows)
        assert launch.block_rows == min(32, 1 << (rows - 1).bit_length())
        small = tuning.fit_shared_memory(order, launch, 64, 90_000)
        assert tuning.shared_bytes(order, small, 64) <= 90_000
        assert small.block_rows <= launch.block_rows


def test_tuning_files_are_looked_up_by_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert tuning.file_name("NVIDIA H100 80GB HBM3") == "nvidia-h100-80gb-hbm3.json"
    default = tuning.settings("default")
    entry = {"out_features": 64, "spans": 4, "order": {"slices": 2, "split": 3, "slots": 16}}
    entry["launch"] = {"1": {"block_out": 64, "stages": 5}}
    (tmp_path / "my-gpu.json").write_text(tuning.json.dumps(default | {"shapes": [entry]}), "utf-8")
    monkeypatch.setattr(tuning, "FOLDER", tmp_path)
    assert tuning.order("My GPU", 64, 4) == (2, 3, 16)
    assert tuning.launch("My GPU", 64, 4, 1) == (1, 64, 5)
    assert tuning.launch("My GPU", 64, 4, 2) == (2, 16, 4)
