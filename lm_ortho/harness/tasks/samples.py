"""Reading the samples that another run of lm-eval logged (``--log_samples``)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lm_ortho.errors import UserError


def read_samples(path: str | Path, task: str, argument: str) -> list[dict[str, Any]]:
    """Returns the logged samples of ``task``, from a samples file, or from the newest one of the task below a folder.

    Raises:
        UserError: names the argument if the file is missing, or contains no samples.
    """
    file = Path(path).expanduser()
    if file.is_dir():
        files = sorted(file.rglob(f"samples_{task}_*.jsonl"), key=lambda candidate: candidate.name)
        if not files:
            raise UserError(
                f"{argument}={str(path)!r}: no samples_{task}_*.jsonl in this folder; log them with "
                f"lm_eval --tasks {task} --log_samples --output_path {path}"
            )
        file = files[-1]
    if not file.is_file():
        raise UserError(f"{argument}={str(path)!r}: no such file or folder")
    records = []
    for number, line in enumerate(file.read_text(encoding="utf-8").split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{argument}={file}, line {number}: not valid JSON ({error.msg})") from None
        if not isinstance(record, dict) or not isinstance(record.get("doc"), dict):
            raise UserError(f"{argument}={file}, line {number}: not a sample of lm-eval, it has no doc")
        records.append(record)
    if not records:
        raise UserError(f"{argument}={file}: the file holds no samples")
    return records


def values_by_question(records: list[dict[str, Any]], metric: str, *, task: str, argument: str) -> dict[str, Any]:
    """Returns the logged values of ``metric`` by question; documents without a value are left out.

    Raises:
        UserError: when no document has a value.
    """
    values = {record["doc"].get("question", ""): record[metric] for record in records if metric in record}
    if not values:
        raise UserError(f"{argument}: the samples have no {metric}; they must be of the task {task}")
    return values
