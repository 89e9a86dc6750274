"""A heat map of the ortho density of all layers, as SVG text."""

from __future__ import annotations

import math

from lm_ortho.checkpoint.contents import Grid
from lm_ortho.markup import xml_text

LIGHT, DARK = (247, 251, 255), (8, 48, 107)
_WIDTH, _HEIGHT, _LEFT, _TOP = 64, 20, 64, 150


def shade(density: float | None, highest: float) -> tuple[tuple[int, int, int], str]:
    """Red, green and blue of a cell, and the colour of the number on it.

    The scale is the square root of the density, because a few layers often hold most of the memory.
    """
    share = math.sqrt((density or 0.0) / highest) if highest else 0.0
    red, green, blue = (round(light + (dark - light) * share) for light, dark in zip(LIGHT, DARK, strict=True))
    return (red, green, blue), "white" if share > 0.5 else "black"


def format_percent(density: float | None) -> str:
    """A density as text; a dot for a cell without a layer."""
    if not density:
        return "·" if density is None else "0"
    return f"{100 * density:.2f} %" if density >= 1e-4 else "< 0.01 %"


def heat_map(grid: Grid, title: str) -> str:
    """The SVG page: a row per block, a column per projection, in each cell the share of weights in the ortho stream."""
    width = _LEFT + _WIDTH * len(grid.columns) + 140
    height = _TOP + _HEIGHT * len(grid.rows) + 16
    head = f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"'
    parts = [
        f'{head} font-family="sans-serif" font-size="11">',
        f'<rect width="{width}" height="{height}" fill="white"/>',
        _text(8, 18, title, size=14),
        _text(8, 36, f"share of weights in the ortho stream; darkest: {format_percent(grid.highest)}"),
    ]
    for i, column in enumerate(grid.columns):
        x, y = _LEFT + _WIDTH * i + _WIDTH // 2, _TOP - 6
        parts.append(_text(x, y, column, transform=f"rotate(-35 {x} {y})"))
    for j, row in enumerate(grid.rows):
        parts.append(_text(_LEFT - 8, _TOP + _HEIGHT * j + 14, row, anchor="end"))
        parts += [_cell(i, j, density, grid.highest) for i, density in enumerate(grid.cells[j])]
    return "\n".join([*parts, "</svg>"]) + "\n"


def _cell(column: int, row: int, density: float | None, highest: float) -> str:
    x, y = _LEFT + _WIDTH * column, _TOP + _HEIGHT * row
    colour, ink = shade(density, highest)
    box = f'<rect x="{x}" y="{y}" width="{_WIDTH - 1}" height="{_HEIGHT - 1}" fill="rgb{colour}"/>'
    return box + _text(x + _WIDTH // 2, y + 14, format_percent(density), anchor="middle", fill=ink)


def _text(
    x: int, y: int, text: str, *, anchor: str = "start", fill: str = "black", size: int = 11, transform: str = ""
) -> str:
    attribute = f' transform="{transform}"' if transform else ""
    head = f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="{fill}"{attribute}>'
    return f"{head}{xml_text(text)}</text>"
