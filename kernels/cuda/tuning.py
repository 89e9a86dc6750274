"""Launch settings from data files, one per device: ``tuning/<device>.json``, and ``default.json`` for all others.

The files are written by ``benchmarks/gpu.py --tune``. Triton's own tuner is not used: it does not run in Triton's
interpreter, and its selection may differ between runs.
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
    """The settings that determine the order of sums, and so the bits: the same for every batch of a layer."""

    slices: int
    """Parts of in_features that the warps of a program share; one warp for each."""
    split: int
    """Programs that share an output tile."""
    slots: int
    """Sparse words of a row that are multiplied at a time."""


class Launch(NamedTuple):
    """The settings that change the speed only."""

    block_rows: int
    """Rows of x per program, one of WIDTHS."""
    block_out: int
    """Output rows per program, a power of two from 16."""
    stages: int
    """Spans of the base that are being loaded or multiplied at the same time."""


def file_name(device: str) -> str:
    """The name of a device's tuning file: ``NVIDIA H200`` is ``nvidia-h200.json``."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-") + ".json"


@lru_cache
def device_name(device: torch.device) -> str:
    """The name by which a tuning file is found; the interpreter uses the default file."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "interpreter"


@lru_cache
def settings(device: str) -> dict[str, Any]:
    """The tuning file of a device, or the default."""
    path = FOLDER / file_name(device)
    content: dict[str, Any] = json.loads((path if path.is_file() else FOLDER / "default.json").read_text("utf-8"))
    return content


def fused_rows(device: str) -> int:
    """The most rows of x for which the fused kernel is used; beyond, the dequantise pass and a dense product."""
    return int(settings(device)["fused_rows"])


def block_rows(rows: int) -> int:
    """The smallest of WIDTHS that holds ``rows``, or the largest."""
    return next((width for width in WIDTHS if rows <= width), WIDTHS[-1])


@lru_cache
def order(device: str, out_features: int, spans: int) -> Order:
    """How the sums of a layer are divided: the entry of its shape, or a rule.

    The rule gives every program four warps, eight where the layer is too narrow to fill the device with four, and
    lets several programs share a tile only where that still leaves each slice two spans.
    """
    tuned = settings(device)
    for entry in tuned["shapes"]:
        if (entry["out_features"], entry["spans"]) == (out_features, spans):
            return Order(**entry["order"])
    tiles = -(-out_features // 16)
    slices = 4 if tiles > tuned["wide_tiles"] or spans < 8 else 8
    split = 1
    while tiles * split * 2 <= tuned["fill_tiles"] and spans >= slices * split * 4:
        split *= 2
    return Order(slices, split, tuned["slots"])


@lru_cache
def launch(device: str, out_features: int, spans: int, rows: int) -> Launch:
    """The launch settings of a product of ``rows`` rows."""
    tuned = settings(device)
    block = block_rows(rows)
    for entry in tuned["shapes"]:
        if (entry["out_features"], entry["spans"]) == (out_features, spans):
            values = entry["launch"].get(str(block))
            if values:
                return Launch(block, **values)
    wide = "wide" if -(-out_features // 16) > tuned["wide_tiles"] else "narrow"
    return Launch(block, **tuned["launch"][wide][str(block)])


def shared_bytes(order: Order, launch: Launch, plane: int) -> int:
    """Shared memory of a program, roughly: codes, scales and x of the spans that are being loaded."""
    span = launch.block_out * (plane * 2 + 8) + launch.block_rows * plane * 8
    return order.slices * span * max(1, launch.stages - 1)


def fit_shared_memory(order: Order, launch: Launch, plane: int, limit: int) -> Launch:
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
