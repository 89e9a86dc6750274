"""What another run of lm-eval logged for each document (``--log_samples``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_ortho.errors import UserError


def read_samples(path: str | Path, task: str, argument: str) -> list[dict[str, Any]]:
    """The logged documents of ``task``: of a samples file, or of the newest one of this task below a folder.

    Raises:
        UserError: names the argument where nothing is there, or what is there are no samples.
    """
    found = Path(path).expanduser()
    if found.is_dir():
        files = sorted(found.rglob(f"samples_{task}_*.jsonl"), key=lambda file: file.name)
        if not files:
            raise UserError(
                f"{argument}={str(path)!r}: no samples_{task}_*.jsonl in this folder; log them with "
                f"lm_eval --tasks {task} --log_samples --output_path {path}"
            )
        found = files[-1]
    if not found.is_file():
        raise UserError(f"{argument}={str(path)!r}: no such file or folder")
    records = []
    for number, line in enumerate(found.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{argument}={found}, line {number}: not valid JSON ({error.msg})") from None
        if not isinstance(record, dict) or not isinstance(record.get("doc"), dict):
            raise UserError(f"{argument}={found}, line {number}: not a sample of lm-eval, it has no doc")
        records.append(record)
    if not records:
        raise UserError(f"{argument}={found}: the file holds no samples")
    return records


def by_question(records: list[dict[str, Any]], metric: str, task: str, argument: str) -> dict[str, Any]:
    """What was logged for ``metric``, by the question of the document; documents without it are left out.

    Raises:
        UserError: when no document has it.
    """
    values = {record["doc"].get("question", ""): record[metric] for record in records if metric in record}
    if not values:
        raise UserError(f"{argument}: the samples have no {metric}; they must be of the task {task}")
    return values
