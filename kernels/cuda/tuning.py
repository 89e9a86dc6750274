"""Launch settings from data files, one per device: ``tuning/<device>.json``, and ``default.json`` for all others.

The files are written by ``benchmarks/gpu.py --tune``. Triton's own tuner is not used: it does not run in Triton's
interpreter, and what it picks may differ from one run to the next.
"""

from __future__ import annotations

import json
import re
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

FOLDER = Path(__file__).parent / "tuning"
WIDTHS = (1, 2, 4, 8, 16, 32)
"""Rows of x that a program can own."""


class Order(NamedTuple):
    """What decides the order of sums, and so the bits: the same for every batch of a layer."""

    slices: int
    """Parts of in_features that the warps of a program share; one warp for each."""
    split: int
    """Programs that share an output tile."""
    slots: int
    """Sparse words of a row that are multiplied at a time."""


class Launch(NamedTuple):
    """What changes speed only."""

    block_rows: int
    """Rows of x per program, one of WIDTHS."""
    block_out: int
    """Output rows per program, a power of two from 16."""
    stages: int
    """Spans of the base that are on their way or being worked on."""


def file_name(device: str) -> str:
    """The name of a device's tuning file: ``NVIDIA H200`` is ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@lru_cache
def device_name(device: torch.device) -> str:
    """What a tuning file is found by; the interpreter has the default one."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@lru_cache
def settings(device: str) -> dict[str, Any]:
    """The tuning file of a device, or the default."""
    path = FOLDER / file_name(device)
    found: dict[str, Any] = json.loads((path if path.is_file() else FOLDER / "default.json").read_text("utf-8"))
    return found


def fused_rows(device: str) -> int:
    """The most rows of x for which the fused kernel is used; beyond, the dequantise pass and a dense product."""
    return int(settings(device)["fused_rows"])


def block_rows(rows: int) -> int:
    """The smallest of WIDTHS that holds ``rows``, or the largest."""
    return next((width for width in WIDTHS if rows <= width), WIDTHS[-1])


@lru_cache
def order(device: str, out_features: int, spans: int) -> Order:
    """How the sums of a layer are cut: the entry of its shape, or a rule.

    The rule gives every program four warps, eight where the layer is too narrow to fill the device with four, and
    lets several programs share a tile only where that still leaves each slice two spans.
    """
    found = settings(device)
    for entry in found["shapes"]:
        if (entry["out_features"], entry["spans"]) == (out_features, spans):
            return Order(**entry["order"])
    tiles = -(-out_features // 16)
    slices = 4 if tiles > found["wide_tiles"] or spans < 8 else 8
    split = 1
    while tiles * split * 2 <= found["fill_tiles"] and spans >= slices * split * 4:
        split *= 2
    return Order(slices, split, found["slots"])


@lru_cache
def launch(device: str, out_features: int, spans: int, rows: int) -> Launch:
    """How a product of ``rows`` rows is launched."""
    found = settings(device)
    wanted = block_rows(rows)
    for entry in found["shapes"]:
        if (entry["out_features"], entry["spans"]) == (out_features, spans):
            held = entry["launch"].get(str(wanted))
            if held:
                return Launch(wanted, **held)
    wide = "wide" if -(-out_features // 16) > found["wide_tiles"] else "narrow"
    return Launch(wanted, **found["launch"][wide][str(wanted)])


def shared_bytes(order: Order, launch: Launch, plane: int) -> int:
    """Shared memory of a program, roughly: codes, scales and x of the spans on their way."""
    span = launch.block_out * (plane * 2 + 8) + launch.block_rows * plane * 8
    return order.slices * span * max(1, launch.stages - 1)


def fitted(order: Order, launch: Launch, plane: int, limit: int) -> Launch:
    """``launch`` with fewer stages, output rows or rows of x, until it fits into ``limit`` bytes of shared memory."""
    while shared_bytes(order, launch, plane) > limit:
        if launch.stages > 2:
            launch = launch._replace(stages=launch.stages - 1)
        elif launch.block_out > 16:
            launch = launch._replace(block_out=launch.block_out // 2)
        elif launch.block_rows > 1:
            launch = launch._replace(block_rows=launch.block_rows // 2)
        else:
            break
    return launch
