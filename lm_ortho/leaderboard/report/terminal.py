"""Tables of single records on a terminal."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lm_ortho.leaderboard.progress import describe_piece
from lm_ortho.leaderboard.store import DONE, Record
from lm_ortho.markup import terminal_text


def print_records(records: Sequence[Record], console: Any) -> None:
    """Prints a row per finished (model, alpha, task) and metric with its interval, then the unfinished pieces."""
    from rich.table import Table

    titles = ("model", "alpha", "task", "metric", "value", "95 % interval", "s")
    table = Table(*titles)
    for record in records:
        if record.status != DONE or record.piece.kind != "evaluate":
            continue
        config = record.piece.config
        alpha = "" if config["alpha"] is None else str(config["alpha"])
        for task, metrics in record.result["values"].items():
            for metric, (value, low, high, _) in metrics.items():
                interval = "" if low is None else f"{low:.4g} to {high:.4g}"
                row = (config["label"], alpha, task, metric, f"{value:.4g}", interval, f"{record.seconds:.1f}")
                table.add_row(*map(terminal_text, row))
    console.print(table)
    for record in records:
        if record.status != DONE:
            reason = f": {record.error.splitlines()[0]}" if record.error else ""
            line = f"{record.piece.config['label']}, {describe_piece(record)}: {record.status}{reason}"
            console.print(terminal_text(line), highlight=False)
