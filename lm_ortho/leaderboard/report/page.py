"""The leaderboard as one HTML file that works offline: plots, a sortable table, and what is behind each row."""

from __future__ import annotations

import datetime
import json
import math
from importlib.resources import files
from typing import Any

from lm_ortho.leaderboard.bootstrap import Number
from lm_ortho.leaderboard.report.formats import EXPLAINED, READS, shown
from lm_ortho.leaderboard.results import TARGET, UNEDITED, Results, Row

_SYMBOLS = {"auto": "circle", "none": "diamond", "end": "x"}
_COLOURS = (
    "#3b6fd4", "#d1495b", "#2a9d64", "#b07d12", "#8a4fbf", "#1795a5", "#c2571a", "#6b7a1f",
    "#c03a8f", "#5a6c80", "#7a4a2b", "#14806b", "#a33b3b", "#4856b8", "#8c8000", "#6a3d6a",
)  # fmt: skip


def html(results: Results) -> str:
    """The whole page; plotly's code is inside."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    template = files("lm_ortho.leaderboard.report").joinpath("leaderboard.html.j2").read_text(encoding="utf-8")
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    return environment.from_string(template).render(
        results=results,
        plotly=get_plotlyjs(),
        figures={"frontier": frontier(results), "layers": layers(results)},
        curves=curves(results),
        rows=[_cells(row, results) for row in results.rows],
        titles=["forget", "retain", *(" ".join(column) for column in results.columns)],
        explained=EXPLAINED.replace("*", ""),
        date=datetime.date.today().isoformat(),
    )


def frontier(results: Results) -> dict[str, Any]:
    """Forget against retain: a trace per method, alphas joined by a line, the target as a star."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    colours = _colours(results)
    for (name, model), rows in _families(results).items():
        points = [row for row in rows if row.forget and row.retain]
        if points:
            figure.add_trace(_trace(name, model, points, colours[rows[0].method]))
    axes = results.frontier
    told = [", ".join(f"{axis.task} {axis.metric}" for axis in part) for part in (axes.forget, axes.retain)]
    figure.update_xaxes(title=f"forget: distance from the model that never saw it<br><sub>{told[0]}</sub>")
    figure.update_yaxes(title=f"retain: lost beside the un-edited model<br><sub>{told[1]}</sub>")
    return _plain(figure, 560)


def _trace(name: str, model: str, points: list[Row], colour: str) -> Any:
    from plotly import graph_objects

    target = points[0].method == TARGET
    dial = len(points) > 1 and points[0].alpha is not None
    symbol = "star" if target else _SYMBOLS[points[0].mode]
    return graph_objects.Scatter(
        x=[row.forget.value for row in points if row.forget],
        y=[row.retain.value for row in points if row.retain],
        error_x=_errors([row.forget for row in points], colour),
        error_y=_errors([row.retain for row in points], colour),
        mode="lines+markers+text" if dial else "markers",
        text=[f"{row.alpha}" for row in points] if dial else None,
        textposition="top right",
        name=name,
        hovertext=[row.name + ("" if not row.better else f"<br>beaten by {row.better[0]}") for row in points],
        hovertemplate="%{hovertext}<br>forget %{x:.4g}, retain %{y:.4g}<extra></extra>",
        marker={"symbol": symbol, "size": 18 if target else 11, "color": colour},
        line={"color": colour, "dash": "dot"},
        legendgroup=model,
    )


def _errors(numbers: list[Number | None], colour: str) -> dict[str, Any]:
    """Error bars, not symmetric; none where a value has no interval."""
    known = [n for n in numbers if n is not None]
    return {
        "type": "data", "symmetric": False, "color": colour, "thickness": 1, "width": 2,
        "array": [0.0 if n.high is None else n.high - n.value for n in known],
        "arrayminus": [0.0 if n.low is None else n.value - n.low for n in known],
    }  # fmt: skip


def layers(results: Results) -> dict[str, Any] | None:
    """Share of every layer's weights that is in the ortho stream, a column per model; None without a dial."""
    from plotly import graph_objects

    if not results.layers:
        return None
    names = list(dict.fromkeys(name for shares in results.layers.values() for name in shares))
    values = [[shares.get(name) for shares in results.layers.values()] for name in names]
    heat = graph_objects.Heatmap(
        z=values, x=list(results.layers), y=names, colorscale="Blues", zmin=0,
        hovertemplate="%{y}<br>%{x}<br>%{z:.2%}<extra></extra>", colorbar={"tickformat": ".1%"},
    )  # fmt: skip
    figure = graph_objects.Figure(heat)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _plain(figure, 160 + 16 * len(names))


def curves(results: Results) -> dict[str, list[dict[str, Any]]]:
    """By column the curves over alpha with their bounds, and level lines of the two ends."""
    colours, found = _colours(results), dict[str, list[dict[str, Any]]]()
    for column in results.columns:
        lines = []
        for (name, _), rows in _families(results).items():
            numbers = [(row.alpha, row.numbers[column]) for row in rows if column in row.numbers]
            dialled = sorted((a, n) for a, n in numbers if isinstance(a, int | float))
            if len(dialled) > 1:
                bounds: dict[str, list[Any]] = {
                    end: [getattr(n, end) for _, n in dialled] for end in ("value", "low", "high")
                }
                line: dict[str, Any] = {
                    "name": name,
                    "alpha": [a for a, _ in dialled],
                    **bounds,
                    "colour": colours[rows[0].method],
                }
                lines.append(line)
            elif rows[0].method in (TARGET, UNEDITED) and numbers:
                lines.append({"name": name, "level": numbers[0][1].value, "colour": colours[rows[0].method]})
        if any("alpha" in line for line in lines):
            found[" ".join(column)] = lines
    return found


def _families(results: Results) -> dict[tuple[str, str], list[Row]]:
    """Rows that differ in alpha only, by name and model."""
    found: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        found.setdefault((row.label, row.model), []).append(row)
    return found


def _colours(results: Results) -> dict[str, str]:
    methods = dict.fromkeys(row.method for row in results.rows)
    return {method: _COLOURS[number % len(_COLOURS)] for number, method in enumerate(methods)}


def _plain(figure: Any, height: int) -> dict[str, Any]:
    """A figure as data, without a theme: the page has two."""
    figure.update_layout(height=height, margin={"t": 20, "r": 20}, template="none", legend={"groupclick": "toggleitem"})
    made: dict[str, Any] = json.loads(figure.to_json())
    return {"data": made["data"], "layout": {k: v for k, v in made["layout"].items() if k != "template"}}


def _cells(row: Row, results: Results) -> dict[str, Any]:
    """What the table shows of a row."""
    sides = {"forget": row.forget, "retain": row.retain}
    numbers = {**sides, **{" ".join(column): row.numbers.get(column) for column in results.columns}}
    place = "" if row.is_end or row.forget is None else "yes" if not row.better else f"no: {', '.join(row.better)}"
    return {
        "row": row,
        "reads": READS[row.mode],
        "place": place,
        "settings": ", ".join(f"{name}={value}" for name, value in row.settings.items()) or "defaults",
        "numbers": [
            {
                "name": name,
                "shown": shown(number),
                "sort": "" if number is None or math.isnan(number.value) else repr(number.value),
                "seeds": "" if number is None else ", ".join(f"{value:.4g}" for value in number.seeds),
                "mark": "best" if name in row.best else "worse" if row.worse.get(name) else "",
            }
            for name, number in numbers.items()
        ],
    }
