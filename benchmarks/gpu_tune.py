"""The search behind ``benchmarks/gpu.py --tune``: settings per shape, written as a tuning file of this device.

The order of sums (slices, split, slots) is one for all batches of a shape, so it is picked by the sum, over one and
sixteen rows, of the time relative to the best seen there; the launch is picked for each width by itself.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch
from gpu_device import Device, capture, interleaved, rotated
from torch import Tensor

from kernels.cuda import Prepared, ops, tuning

ORDERS = [(4, 1), (8, 1), (8, 2), (16, 1)]
LAUNCHES = {
    1: [(16, 4), (16, 3), (32, 3), (32, 4)],
    16: [(32, 2), (64, 2), (16, 3), (32, 3)],
    32: [(32, 2), (16, 2)],
}
"""Output rows per program and stages, by rows of x."""
SLOTS = (32, 16, 64)
_ROUNDS = 7


def tune(
    device: Device, shapes: list[tuple[int, int]], seed: int, left: Callable[[], float], log: Callable[[str], None]
) -> dict[str, Any]:
    """The content of a tuning file: the default with an entry for each shape that there was time for."""
    settings = dict(tuning.settings("default"))
    settings |= {"device": "dry run" if device.kind == "cpu" else torch.cuda.get_device_name(), "shapes": []}
    settings["origin"] = f"benchmarks/gpu.py --tune, torch {torch.__version__}"
    for index, shape in enumerate(shapes):
        # The first shape compiles what the others then find compiled.
        share = left() * max(0.5 if index == 0 else 0.0, 1 / (len(shapes) - index))
        until = left() - share
        entry = _tune_shape(device, shape, seed, _deadline(left, until), log)
        if entry:
            settings["shapes"].append(entry)
    return settings


def _tune_shape(
    device: Device, shape: tuple[int, int], seed: int, time_left: Callable[[], bool], log: Callable[[str], None]
) -> dict[str, Any] | None:
    layers = rotated(device, shape, 0.01, seed)
    best: dict[tuple[int, int], dict[int, tuple[float, tuple[int, int]]]] = {}
    for order, width, launch in _candidates(device):
        if not time_left():
            break
        seconds = _measure_seconds(device, layers, (*order, SLOTS[0]), width=width, launch=launch, alpha=0.0, seed=seed)
        log(f"{shape} order {order} width {width} launch {launch}: {seconds * 1e6:.1f} us")
        results = best.setdefault(order, {})
        if seconds < results.get(width, (float("inf"), launch))[0]:
            results[width] = (seconds, launch)
    complete_orders = [order for order, results in best.items() if set(results) >= {1, 16}]
    if not complete_orders:
        return None
    fastest = {width: min(best[order][width][0] for order in complete_orders) for width in (1, 16)}
    best_order = min(
        complete_orders, key=lambda order: sum(best[order][width][0] / fastest[width] for width in (1, 16))
    )
    launches = {width: launch for width, (_, launch) in best[best_order].items()}
    seconds_by_slots = dict[int, float]()
    for slots in SLOTS:
        if not seconds_by_slots or time_left():
            seconds_by_slots[slots] = _measure_slots(
                device, layers, best_order, slots=slots, launches=launches, seed=seed
            )
    out_features, spans = layers[0].out_features, layers[0].scales.shape[0]
    return {
        "out_features": out_features,
        "spans": spans,
        "order": {
            "slices": best_order[0],
            "split": best_order[1],
            "slots": min(seconds_by_slots, key=lambda slots: seconds_by_slots[slots]),
        },
        "launch": {str(w): {"block_out": n, "stages": stages} for w, (n, stages) in _spread(launches).items()},
    }


def _deadline(left: Callable[[], float], until: float) -> Callable[[], bool]:
    """Whether more than ``until`` seconds are left."""
    return lambda: left() > until


def _candidates(device: Device) -> Iterator[tuple[tuple[int, int], int, tuple[int, int]]]:
    orders = ORDERS[:2] if device.kind == "cpu" else ORDERS
    for order in orders:
        for width, launches in LAUNCHES.items():
            for launch in launches[:1] if device.kind == "cpu" else launches:
                yield order, width, launch


def _spread(launches: dict[int, tuple[int, int]]) -> dict[int, tuple[int, int]]:
    """The settings found at 1 and 16 rows serve the widths near them as well."""
    near = {1: 1, 2: 1, 4: 1, 8: 16, 16: 16, 32: 32}
    return {width: launches[near[width]] for width in tuning.WIDTHS if near[width] in launches}


def _measure_slots(
    device: Device,
    layers: list[Prepared],
    order: tuple[int, int],
    *,
    slots: int,
    launches: dict[int, tuple[int, int]],
    seed: int,
) -> float:
    return sum(
        _measure_seconds(device, layers, (*order, slots), width=width, launch=launches[width], alpha=1.0, seed=seed)
        for width in (1, 16)
    )


def _measure_seconds(
    device: Device,
    layers: list[Prepared],
    order: tuple[int, int, int],
    *,
    width: int,
    launch: tuple[int, int],
    alpha: float,
    seed: int,
) -> float:
    """Measures the seconds of a product of ``width`` rows; infinity if the settings do not work here."""
    draw = torch.Generator(device=device.kind).manual_seed(seed)
    x = torch.randn(width, layers[0].in_features, generator=draw, device=device.kind).bfloat16()
    alphas = torch.full((1,), alpha, device=device.kind)
    cut, start = tuning.Order(*order), tuning.Launch(width, *launch)

    def call(p: Prepared) -> Tensor:
        return ops.run_fused(
            x,
            p.codes,
            p.scales,
            ortho=p.ortho,
            rowptr=p.rowptr,
            alphas=alphas,
            bias=None,
            out_dtype=x.dtype,
            order=cut,
            launch=start,
        )

    try:
        timed = capture(device, [partial(call, p) for p in layers], 1)
        interleaved(device, [timed], 1 if device.kind == "cpu" else _ROUNDS)
    except Exception:
        # Too much shared memory or too many registers: a candidate less.
        return float("inf")
    return timed.median


def write(settings: dict[str, Any], folder: Path) -> Path:
    """Writes the tuning file of this device to ``folder`` and returns its path."""
    path = folder / tuning.file_name(settings["device"])
    path.write_text(json.dumps(settings, indent=1) + "\n", "utf-8")
    return path
