"""The leaderboard as one HTML file that works offline: plots, a sortable table, and the origin of each row."""

from __future__ import annotations

import datetime
import json
import math
from importlib.resources import files
from typing import Any

from lm_ortho.errors import printable
from lm_ortho.leaderboard.bootstrap import Number
from lm_ortho.leaderboard.report.text import EXPLANATION, READS, format_number
from lm_ortho.leaderboard.results import TARGET, UNEDITED, Results, Row
from lm_ortho.markup import TEXT_LIMIT, xml_text

_SYMBOLS = {"auto": "circle", "none": "diamond", "end": "x"}
_COLOURS = (
    "#3b6fd4",
    "#d1495b",
    "#2a9d64",
    "#b07d12",
    "#8a4fbf",
    "#1795a5",
    "#c2571a",
    "#6b7a1f",
    "#c03a8f",
    "#5a6c80",
    "#7a4a2b",
    "#14806b",
    "#a33b3b",
    "#4856b8",
    "#8c8000",
    "#6a3d6a",
)


def render_html(results: Results) -> str:
    """The whole page as one string, with plotly's code in it."""
    from jinja2 import Environment, StrictUndefined
    from plotly.offline import get_plotlyjs

    template = files("lm_ortho.leaderboard.report").joinpath("leaderboard.html.j2").read_text(encoding="utf-8")
    environment = Environment(
        autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True, finalize=_make_printable
    )
    return environment.from_string(template).render(
        results=results,
        plotly=get_plotlyjs(),
        figures={"frontier": make_frontier_figure(results), "layers": make_layer_figure(results)},
        curves=make_alpha_curves(results),
        rows=[_make_table_row(row, results) for row in results.rows],
        titles=["forget", "retain", *(" ".join(column) for column in results.columns)],
        explanation=EXPLANATION.replace("*", ""),
        date=datetime.date.today().isoformat(),
    )


def _make_printable(value: Any) -> Any:
    """Text without control characters; autoescape makes it HTML afterwards. What is HTML already stays as it is."""
    return printable(value, TEXT_LIMIT) if type(value) is str else value


def make_frontier_figure(results: Results) -> dict[str, Any]:
    """Plot of retain over forget distance: a trace per method, a line through its alphas, a star for the target."""
    from plotly import graph_objects

    figure = graph_objects.Figure()
    colours = _assign_colours(results)
    for (name, model), rows in _group_by_label(results).items():
        points = [row for row in rows if row.forget and row.retain]
        if points:
            figure.add_trace(_make_trace(name, model, points, colours[rows[0].method]))
    axes = results.frontier
    forget, retain = (
        xml_text(", ".join(f"{axis.task} {axis.metric}" for axis in part)) for part in (axes.forget, axes.retain)
    )
    figure.update_xaxes(title=f"forget: distance from the model that never saw the forget set<br><sub>{forget}</sub>")
    figure.update_yaxes(title=f"retain: loss against the un-edited model<br><sub>{retain}</sub>")
    return _figure_to_dict(figure, 560)


def _make_trace(name: str, model: str, points: list[Row], colour: str) -> Any:
    from plotly import graph_objects

    is_target = points[0].method == TARGET
    has_alphas = len(points) > 1 and points[0].alpha is not None
    symbol = "star" if is_target else _SYMBOLS.get(points[0].mode, "circle")
    return graph_objects.Scatter(
        x=[row.forget.value for row in points if row.forget],
        y=[row.retain.value for row in points if row.retain],
        error_x=_make_error_bars([row.forget for row in points], colour),
        error_y=_make_error_bars([row.retain for row in points], colour),
        mode="lines+markers+text" if has_alphas else "markers",
        text=[xml_text(row.alpha) for row in points] if has_alphas else None,
        textposition="top right",
        name=xml_text(name),
        hovertext=[
            xml_text(row.name) + (f"<br>beaten by {xml_text(row.dominated_by[0])}" if row.dominated_by else "")
            for row in points
        ],
        hovertemplate="%{hovertext}<br>forget %{x:.4g}, retain %{y:.4g}<extra></extra>",
        marker={"symbol": symbol, "size": 18 if is_target else 11, "color": colour},
        line={"color": colour, "dash": "dot"},
        legendgroup=xml_text(model),
    )


def _make_error_bars(numbers: list[Number | None], colour: str) -> dict[str, Any]:
    """Asymmetric error bars; of length 0 where a value has no interval."""
    points = [number for number in numbers if number is not None]
    return {
        "type": "data",
        "symmetric": False,
        "color": colour,
        "thickness": 1,
        "width": 2,
        "array": [0.0 if point.high is None else point.high - point.value for point in points],
        "arrayminus": [0.0 if point.low is None else point.value - point.low for point in points],
    }


def make_layer_figure(results: Results) -> dict[str, Any] | None:
    """Heat map of the share of every layer's weights in the ortho stream, a column per model; None without models."""
    from plotly import graph_objects

    if not results.layers:
        return None
    names = list(dict.fromkeys(name for shares in results.layers.values() for name in shares))
    values = [[shares.get(name) for shares in results.layers.values()] for name in names]
    heat_map = graph_objects.Heatmap(
        z=values,
        x=list(map(xml_text, results.layers)),
        y=list(map(xml_text, names)),
        colorscale="Blues",
        zmin=0,
        hovertemplate="%{y}<br>%{x}<br>%{z:.2%}<extra></extra>",
        colorbar={"tickformat": ".1%"},
    )
    figure = graph_objects.Figure(heat_map)
    figure.update_yaxes(autorange="reversed", automargin=True)
    return _figure_to_dict(figure, 160 + 16 * len(names))


def make_alpha_curves(results: Results) -> dict[str, list[dict[str, Any]]]:
    """By column the curves over alpha with their confidence bounds, and level lines of the two ends."""
    colours, curves = _assign_colours(results), dict[str, list[dict[str, Any]]]()
    for column in results.columns:
        lines = []
        for (name, _), rows in _group_by_label(results).items():
            numbers = [(row.alpha, row.numbers[column]) for row in rows if column in row.numbers]
            points = sorted((alpha, number) for alpha, number in numbers if isinstance(alpha, int | float))
            if len(points) > 1:
                line: dict[str, Any] = {
                    "name": xml_text(name),
                    "alpha": [alpha for alpha, _ in points],
                    "value": [number.value for _, number in points],
                    "low": [number.low for _, number in points],
                    "high": [number.high for _, number in points],
                    "colour": colours[rows[0].method],
                }
                lines.append(line)
            elif rows[0].method in (TARGET, UNEDITED) and numbers:
                lines.append({"name": xml_text(name), "level": numbers[0][1].value, "colour": colours[rows[0].method]})
        if any("alpha" in line for line in lines):
            curves[printable(" ".join(column), TEXT_LIMIT)] = lines
    return curves


def _group_by_label(results: Results) -> dict[tuple[str, str], list[Row]]:
    """Rows that differ in alpha only, by label and model."""
    groups: dict[tuple[str, str], list[Row]] = {}
    for row in results.rows:
        groups.setdefault((row.label, row.model), []).append(row)
    return groups


def _assign_colours(results: Results) -> dict[str, str]:
    methods = dict.fromkeys(row.method for row in results.rows)
    return {method: _COLOURS[number % len(_COLOURS)] for number, method in enumerate(methods)}


def _figure_to_dict(figure: Any, height: int) -> dict[str, Any]:
    """A figure as plain data, without a theme: the page switches between two."""
    figure.update_layout(height=height, margin={"t": 20, "r": 20}, template="none", legend={"groupclick": "toggleitem"})
    content: dict[str, Any] = json.loads(figure.to_json())
    layout = {name: value for name, value in content["layout"].items() if name != "template"}
    return {"data": content["data"], "layout": layout}


def _make_table_row(row: Row, results: Results) -> dict[str, Any]:
    """The cells of a row of the table."""
    sides = {"forget": row.forget, "retain": row.retain}
    numbers = {**sides, **{" ".join(column): row.numbers.get(column) for column in results.columns}}
    if row.is_end or row.forget is None:
        frontier = ""
    else:
        frontier = f"no: {', '.join(row.dominated_by)}" if row.dominated_by else "yes"
    return {
        "row": row,
        "reads": READS.get(row.mode, row.mode),
        "frontier": frontier,
        "settings": ", ".join(f"{name}={value}" for name, value in row.settings.items()) or "defaults",
        "numbers": [
            {
                "name": name,
                "text": format_number(number),
                "sort": "" if number is None or math.isnan(number.value) else repr(number.value),
                "seeds": "" if number is None else ", ".join(f"{value:.4g}" for value in number.seeds),
                "mark": "best" if name in row.best_in else "worse" if row.worse_in.get(name) else "",
            }
            for name, number in numbers.items()
        ],
    }
