"""The table from records, and its pages: numbers against direct computation, Markdown, CSV, HTML in a real browser."""

from __future__ import annotations

import csv
import io
import json
import math
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from markdown_it import MarkdownIt
from rich.console import Console

from lm_ortho.errors import UserError, printable
from lm_ortho.leaderboard import bootstrap
from lm_ortho.leaderboard.board import print_status, status
from lm_ortho.leaderboard.progress import ProgressScreen
from lm_ortho.leaderboard.report.formats import render_csv, render_markdown, write_pages
from lm_ortho.leaderboard.report.page import make_alpha_curves, make_frontier_figure, make_layer_figure, render_html
from lm_ortho.leaderboard.report.terminal import print_records
from lm_ortho.leaderboard.results import Results, collect
from lm_ortho.leaderboard.store import DONE, FAILED, Piece, Record, Store
from lm_ortho.leaderboard.worker import Job
from lm_ortho.markup import TEXT_LIMIT, xml_text
from tests.support.hostile import HOSTILE_NAMES, PageText

BOARD = {
    "name": "made_up",
    "title": "Made up & <b>escaped</b>",
    "methods": [{"method": "x"}],
    "tasks": ["f", "r"],
    "frontier": {"forget": [{"task": "f", "metric": "ppl"}], "retain": [{"task": "r", "metric": "ppl"}]},
}
MODELS: list[tuple[str, str, float | None, float, float]] = [
    # method, mode, alpha, log perplexity on the forget side, on the retain side
    ("never_saw", "end", None, 1.0, 0.10),
    ("unedited", "end", None, 0.0, 0.10),
    ("ours", "none", 0.0, 0.9, 0.12),
    ("ours", "none", 1.0, 0.1, 0.11),
    ("worse", "none", None, 0.5, 0.50),
    ("far", "none", None, 3.0, 0.05),
    ("other", "auto", None, 0.2, 0.90),
]
SEEDS = (0, 1, 2)


def _records() -> Iterator[Record]:
    noise = np.random.default_rng(0).normal(size=(len(SEEDS), 40)) * 0.01
    for method, mode, alpha, forget, retain in MODELS:
        for seed in SEEDS:
            cell = f"{method}{seed}" + "0" * 20
            common = {"label": method, "seed": seed, "method": method}
            shares = {"mlp": [2, 100], "attention": [1, 100]} if alpha is not None else 28  # as kfac says how many
            if alpha != 1.0:
                yield Record(Piece(cell, cell, "make", common), DONE, {"settings": {}, "layers": shares}, seconds=2.0)
            for task, level in (("f", forget), ("r", retain)):
                config = {
                    **common,
                    "mode": mode,
                    "model": "embedded",
                    "alpha": alpha,
                    "task": task,
                    "row": f"{method} {alpha}",
                    "command": f"lm_eval --tasks {task}",
                    "settings": {},
                    "versions": {"torch": "1"},
                }
                losses = level + noise[seed]
                value = math.exp(losses.mean())
                result = {
                    "values": {task: {"ppl": [value, value * 0.98, value * 1.02, False]}},
                    "samples": {task: {"ppl": losses.tolist()}},
                    "groups": {task: [f"author {number // 4}" for number in range(40)]},
                    "checkpoint": "",
                }
                yield Record(Piece(f"{cell}{alpha}{task}", cell, "evaluate", config), DONE, result, seconds=1.0)


@pytest.fixture(scope="module")
def results() -> Results:
    return collect(list(_records()), {"name": "made_up", "board": BOARD, "command": "lm-ortho board run x.yaml"})


def test_distances_are_those_of_the_definition(results: Results) -> None:
    rows = {row.name: row for row in results.rows}
    assert set(rows) == {"never_saw", "unedited", "ours alpha=0", "ours alpha=1", "worse", "far", "other"}
    for name, (_, _, _, forget, retain) in zip(rows, MODELS, strict=True):
        row = rows[name]
        assert row.forget is not None
        assert row.retain is not None
        assert row.forget.value == pytest.approx(abs(forget - 1.0), abs=0.01)
        assert row.retain.value == pytest.approx(retain - 0.1, abs=0.01)
        assert len(row.cells) == 3
        for side in (row.forget, row.retain):
            assert side.low is not None
            assert side.high is not None
            assert side.low <= side.value <= side.high


@pytest.mark.parametrize(
    ("metric", "scale", "report", "make_documents"),
    [
        ("prob", "log", lambda mean: mean, lambda noise: 0.5 + noise),
        ("prob", "linear", lambda mean: mean, lambda noise: 0.5 + noise),
        ("ppl", "linear", math.exp, lambda noise: 1.0 + noise),
        ("ppl", "log", math.exp, lambda noise: 1.0 + noise),
    ],
)
def test_intervals_are_on_the_scale_of_the_axis(metric: str, scale: str, report: Any, make_documents: Any) -> None:
    axis = {"task": "f", "metric": metric, "scale": scale}
    board = {**BOARD, "frontier": {"forget": [axis], "retain": [axis]}}
    records, levels = [], {"never_saw": 0.2, "ours": 0.0}
    noise = np.random.default_rng(0).normal(size=40) * 0.05
    for method, level in levels.items():
        documents = make_documents(noise * (method == "ours") + level)
        config = {
            "label": method,
            "seed": 0,
            "method": method,
            "mode": "none",
            "model": "embedded",
            "alpha": None,
            "row": method,
            "task": "f",
            "command": "",
            "settings": {},
            "versions": {},
        }
        result = {
            "values": {"f": {metric: [report(documents.mean()), None, None, False]}},
            "samples": {"f": {metric: documents.tolist()}},
            "groups": {"f": [str(number) for number in range(40)]},
            "checkpoint": "",
        }
        records.append(Record(Piece(method, method, "evaluate", config), DONE, result))
    row = collect(records, {"name": "made_up", "board": board}).rows[1]
    assert row.forget is not None

    def apply_scale(mean: float) -> float:
        return math.log(report(mean)) if scale == "log" else float(report(mean))

    documents, target = make_documents(noise), apply_scale(make_documents(0.2))
    resamples = np.random.default_rng(1).integers(0, 40, size=(2000, 40))
    means = documents[resamples].mean(1)
    direct = np.quantile([abs(apply_scale(mean) - target) for mean in means], [0.025, 0.975])
    assert row.forget.value == pytest.approx(abs(apply_scale(documents.mean()) - target))
    assert row.forget[1:3] == pytest.approx(tuple(direct), rel=0.1)


def test_rows_of_several_models_have_different_names() -> None:
    records = []
    for record in _records():
        for model in ("a", "b"):
            config = {**record.piece.config, "model": model}
            config |= {"row": f"{config['row']} {model}"} if "row" in config else {}
            piece = Piece(record.piece.key + model, record.piece.cell + model, record.piece.kind, config)
            records.append(Record(piece, record.status, record.result, seconds=record.seconds))
    results = collect(records, {"name": "made_up", "board": BOARD})
    assert len({row.name for row in results.rows}) == len(results.rows) == 2 * len({m[0::2] for m in MODELS})
    assert {name.rpartition(" of ")[2] for name in results.layers} == {"a", "b"}
    assert "| ours of b alpha=0 |" in render_markdown(results)


def test_the_frontier_is_among_those_that_read_the_same(results: Results) -> None:
    better = {row.name: row.dominated_by for row in results.rows}
    assert better == {
        "never_saw": [],
        "unedited": [],
        "ours alpha=0": [],
        "ours alpha=1": [],
        "far": [],
        "other": [],
        "worse": ["ours alpha=0"],
    }


def test_best_and_worse(results: Results) -> None:
    rows = {row.name: row for row in results.rows}
    assert {name for name, row in rows.items() if "forget" in row.best_in} == {"ours alpha=0", "other"}
    assert {name for name, row in rows.items() if "retain" in row.best_in} == {"far", "other"}
    assert rows["worse"].worse_in["forget"] is True
    assert rows["ours alpha=0"].worse_in["retain"] is True
    assert "f ppl" in rows["ours alpha=0"].best_in


def test_seeds_and_documents_are_two_sources_of_error() -> None:
    alone = bootstrap.average_seeds([(2.0, 1.0, 4.0)])
    assert alone == (2.0, 1.0, 4.0, (2.0,))
    three = bootstrap.average_seeds([(1.0, 0.5, 1.5), (2.0, 1.5, 2.5), (3.0, 2.5, 3.5)])
    scatter = 4.302652729911275 * 1.0 / math.sqrt(3)
    assert three.value == 2.0
    assert three.high == pytest.approx(2.0 + math.hypot(0.5, scatter))
    assert three.low == pytest.approx(2.0 - math.hypot(0.5, scatter))
    assert bootstrap.average_seeds([(1.0, None, None)])[:3] == (1.0, None, None)
    logs = bootstrap.average_seeds([(1.0, 0.5, 2.0), (4.0, 2.0, 8.0)], "secret_ppl")
    assert logs.value == pytest.approx(2.0)
    assert logs.low is not None
    assert 0 < logs.low < 1
    assert bootstrap.average_seeds([(0.9, 0.8, 1.0), (0.8, 0.7, 0.95)], "extraction").high == 1.0


def test_means_over_resamples_are_over_whole_groups() -> None:
    values = np.array([1.0, 1.0, 3.0, math.nan])
    means = bootstrap.Resampler(500).means(bootstrap.Samples(values, ("a", "a", "b", "b")))
    assert means[0] == pytest.approx(5 / 3)
    assert {round(mean, 6) for mean in means} == {1.0, round(5 / 3, 6), 3.0}


def test_worse_beyond_chance() -> None:
    draws = np.random.default_rng(0).normal(size=2001)
    assert bootstrap.is_significantly_worse(draws + 10, draws * 0, 5) is True
    assert bootstrap.is_significantly_worse(draws, draws * 0, 5) is False
    assert bootstrap.is_significantly_worse(draws * math.nan, draws, 5) is None
    assert bootstrap.is_significantly_worse(None, draws, 5) is None


def test_markdown_and_csv_have_every_row(results: Results) -> None:
    text = render_markdown(results)
    for row in results.rows:
        assert f"| {row.name} |" in text
    assert "no: ours alpha=0" in text
    rows = list(csv.DictReader(io.StringIO(render_csv(results))))
    assert len(rows) == 7 * 4
    (one,) = [r for r in rows if r["row"] == "ours alpha=0" and (r["task"], r["metric"]) == ("f", "ppl")]
    assert float(one["value"]) == pytest.approx(math.exp(0.9), rel=0.01)
    assert len(one["seeds"].split()) == 3
    assert one["cells"].split()[0] == "ours00000000"


def test_an_unfinished_row_is_marked() -> None:
    records = list(_records())
    last = records[-1]
    records[-1] = Record(last.piece, FAILED, error="out of luck\nmore")
    results = collect(records, {"name": "made_up", "board": BOARD})
    assert results.rows[-1].missing == 1
    assert results.rows[-1].failures == ["r: out of luck"]
    assert "other (unfinished)" in render_markdown(results)
    empty_results = collect([Record(record.piece) for record in records], {"name": "made_up", "board": BOARD})
    assert all(row.forget is None for row in empty_results.rows)
    assert "made_up" in render_html(empty_results) or "Made up" in render_html(empty_results)


def test_curves_are_those_of_rows_with_a_dial(results: Results) -> None:
    lines = {line["name"]: line for line in make_alpha_curves(results)["f ppl"]}
    assert set(lines) == {"ours", "never_saw", "unedited"}
    assert lines["ours"]["alpha"] == [0.0, 1.0]
    assert "level" in lines["never_saw"]


def test_the_page_is_one_file_without_a_network(results: Results) -> None:
    page = render_html(results)
    head = page.split("<script>")[0]
    assert "src=" not in head
    assert "<link" not in page.replace("<link>", "")
    assert "Made up &amp; &lt;b&gt;escaped&lt;/b&gt;" in head
    for row in results.rows:
        for key in row.cells.values():
            assert key in page
    assert "lm-ortho board run x.yaml --only never_saw0" in page


def test_pages_are_written_whole_or_not_at_all(tmp_path: Path) -> None:
    store = Store(tmp_path)
    records = list(_records())
    store.plan([record.piece for record in records], facts={"name": "made_up", "board": BOARD})
    for record in records:
        store.finish(record.piece.key, record.result, record.seconds)
    paths = write_pages(tmp_path, tmp_path / "page")
    assert [path.name for path in paths] == ["leaderboard.html", "leaderboard.md", "leaderboard.csv"]
    assert sorted(path.name for path in (tmp_path / "page").iterdir()) == sorted(path.name for path in paths)
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="to="):
        write_pages(tmp_path, tmp_path / "file")
    with pytest.raises(UserError, match="no sweep or board"):
        write_pages(tmp_path / "nothing", tmp_path / "page")


# ---------------------------------------------------------------- hostile names


def _hostile_records() -> Iterator[Record]:
    """Records of a board in which every name, setting, command, version and error is hostile, one row for each."""
    for number, name in enumerate(("never_saw", "unedited", *HOSTILE_NAMES)):
        method = name if number < 2 else f"{name}{number}"
        common = {"label": name, "seed": 0, "method": method, "model": "embedded", "settings": {name: name}}
        common |= {"alpha": None, "mode": "end" if number < 2 else name, "command": name, "versions": {name: name}}
        make = {"settings": {}, "layers": {name: [2, 100]}}
        yield Record(Piece(f"{number}make", str(number), "make", common), DONE, make)
        for task, metric in (("f", "ppl"), ("r", "ppl"), (name, name)):
            result = {
                "values": {task: {metric: [2.0 + number, -1.0, 3.0, False]}},
                "samples": {task: {metric: [0.1 * number] * 4}},
                "groups": {task: [name] * 4},
                "checkpoint": name,
            }
            config = {**common, "task": task, "row": str(number)}
            yield Record(Piece(f"{number}{task!a}", str(number), "evaluate", config), DONE, result)
        config = {**common, "task": name, "row": str(number)}
        yield Record(Piece(f"{number}failed", str(number), "evaluate", config), FAILED, error=name)


@pytest.fixture(scope="module")
def hostile_results() -> Results:
    board = {**BOARD, "title": "# <script>alert(1)</script> [x](javascript:alert(1))"}
    facts = {"name": "<script>", "board": board, "command": "`<script>alert(1)</script>` | \x1b[2J"}
    return collect(list(_hostile_records()), facts)


def _squeeze(text: str) -> str:
    return " ".join(text.split())


def test_hostile_names_are_text_in_html(results: Results, hostile_results: Results) -> None:
    text = render_html(hostile_results)
    page, plain_page = PageText(text), PageText(render_html(results))
    assert set(page.tags) <= set(plain_page.tags)
    assert page.tags.count("script") == plain_page.tags.count("script")
    shown = _squeeze(page.text)
    for name in HOSTILE_NAMES:
        assert _squeeze(printable(name, TEXT_LIMIT)) in shown
    assert all(character.isprintable() or character in "\n\t" for character in text.split("<script>")[0])
    labels = [trace["name"] for trace in make_frontier_figure(hostile_results)["data"]]
    assert labels == [xml_text(row.label) for row in hostile_results.rows]
    assert not any("<" in label for label in labels)
    layers = make_layer_figure(hostile_results)
    assert layers is not None
    assert layers["data"][0]["y"] == [xml_text(name) for name in ("never_saw", "unedited", *HOSTILE_NAMES)]


def test_hostile_names_are_text_in_markdown(hostile_results: Results) -> None:
    text = render_markdown(hostile_results)
    assert "<script" not in text
    assert "\x1b" not in text
    page = PageText(MarkdownIt("commonmark").enable("table").render(text))
    assert set(page.tags) <= set("h1 h2 p em table thead tbody tr th td code strong".split())
    assert page.tags.count("tr") == 2 + 2 * len(hostile_results.rows)
    shown = _squeeze(page.text)
    for name in HOSTILE_NAMES:
        assert _squeeze(printable(name, TEXT_LIMIT)) in shown


def test_hostile_names_are_no_formulas_in_csv(hostile_results: Results) -> None:
    rows = list(csv.DictReader(io.StringIO(render_csv(hostile_results))))
    assert len(rows) == len(hostile_results.rows) * 5
    for row in rows:
        for name, cell in row.items():
            assert cell.isprintable()
            if name in ("value", "low", "high"):
                assert cell == "" or float(cell) is not None
            elif name != "seeds":
                assert not cell.lstrip().startswith(("=", "+", "-", "@"))
    assert {row["low"] for row in rows if row["metric"] == "ppl"} == {"-1"}, "numbers stay numbers"


def test_hostile_names_are_text_on_the_terminal(tmp_path: Path) -> None:
    records = list(_hostile_records())
    store = Store(tmp_path)
    store.plan([record.piece for record in records], facts={"name": "[/x]\x1b[2J", "board": BOARD})
    for record in records:
        if record.status == FAILED:
            store.fail(record.piece.key, record.error)
    stream = io.StringIO()
    console = Console(file=stream, width=500)
    print_records(records, console)
    print_status(status(tmp_path), console)
    for name in HOSTILE_NAMES[:-1]:  # the long one is folded
        assert printable(name) in stream.getvalue()
    assert "\x1b" not in stream.getvalue()


@pytest.mark.parametrize("is_terminal", [False, True])
def test_hostile_names_are_text_in_progress_bars(is_terminal: bool) -> None:
    stream = io.StringIO()
    console = Console(file=stream, width=200, force_terminal=is_terminal)
    with ProgressScreen(list(_hostile_records()), console) as screen:
        for name in HOSTILE_NAMES:
            job = Job(name, Path("out"), ())
            screen.on_begin(job)
            screen.progress(name, 1, 2, name)
            screen.on_done(job, "0make", 1.0, [name])
            screen.on_failure(job, "1make", name)
    assert "]0;owned\x07" not in stream.getvalue()
    assert r"\x1b]0;owned\x07" in stream.getvalue()
    assert "[bold red]x[/]" in stream.getvalue()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    """Debian's chromium, driven by playwright."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if chromium is None:
        pytest.skip("there is no chromium on this machine")
    with playwright.sync_playwright() as driver:
        instance = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox", "--disable-gpu"])
        yield instance
        instance.close()


def test_the_page_in_a_browser(results: Results, browser: Any, tmp_path: Path) -> None:
    (tmp_path / "page.html").write_text(render_html(results), encoding="utf-8")
    context = browser.new_context(color_scheme="dark", offline=True)
    page = context.new_page()
    problems, requests = list[str](), list[str]()
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("console", lambda message: problems.append(message.text) if message.type == "error" else None)
    page.on("request", lambda request: requests.append(request.url))
    page.goto((tmp_path / "page.html").as_uri())
    page.wait_for_selector("#frontier .scatterlayer .point")
    assert page.locator("#frontier .scatterlayer .trace").count() == 6
    assert page.locator("#layers .heatmaplayer image").count() == 1
    assert page.locator("#curves .scatterlayer .trace").count() >= 3
    star = page.evaluate("figures.frontier.data.filter((t) => t.marker.symbol === 'star').map((t) => [t.name, t.x[0]])")
    assert star == [["never_saw", pytest.approx(0, abs=0.01)]]

    def first() -> str:
        return str(page.locator("#table tbody tr td").first.inner_text())

    forget = page.locator("#table th", has_text="forget").first
    forget.click()
    assert forget.get_attribute("aria-sort") == "ascending"
    assert first() == "never_saw"
    forget.click()
    assert first() == "far"
    dark = page.evaluate("getComputedStyle(document.body).backgroundColor")
    page.click("#theme")
    assert page.evaluate("document.documentElement.dataset.theme") == "light"
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") != dark
    page.select_option("#range", "near")
    page.select_option("#metric", "r ppl")
    page.locator("#table details summary").first.click()
    assert page.locator("#table details[open] code").first.is_visible()
    assert problems == []
    assert requests == [(tmp_path / "page.html").as_uri()]
    if picture := os.environ.get("BOARD_PICTURE"):
        page.screenshot(path=picture, full_page=True)
    context.close()


def test_records_survive_json(results: Results) -> None:
    for record in _records():
        json.dumps(record.as_json())
