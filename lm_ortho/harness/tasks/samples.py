"""Reading the samples that another run of lm-eval logged (``--log_samples``)."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

from lm_ortho.errors import UserError
from lm_ortho.finetune.loading import find_place


def read_samples(path: str | Path, task: str, argument: str) -> list[dict[str, Any]]:
    """Returns the logged samples of ``task``, from a samples file, or from the newest one of the task below a folder.

    Raises:
        UserError: names the argument if the file is missing, cannot be read, or contains no samples, and if the folder
            holds samples of several models.
    """
    file = _find_file(path, task, argument)
    try:
        text = file.read_text(encoding="utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise UserError(f"{argument}={str(file)!r} cannot be read: {reason}") from None
    records = []
    for number, line in enumerate(text.split("\n"), 1):
        if not line.strip():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            reason = error.msg if isinstance(error, json.JSONDecodeError) else "too many levels or digits"
            hint = "; give the samples_*.jsonl beside it" if file.name.startswith("results_") else ""
            raise UserError(f"{argument}={file}, line {number}: not valid JSON ({reason}){hint}") from None
        if not isinstance(record, dict) or not isinstance(record.get("doc"), dict):
            raise UserError(f"{argument}={file}, line {number}: not a sample of lm-eval, it has no doc")
        records.append(record)
    if not records:
        raise UserError(f"{argument}={file}: the file holds no samples")
    return records


def _find_file(path: str | Path, task: str, argument: str) -> Path:
    """Returns the file itself, or the newest samples file of the task below a folder."""
    file = find_place(path, argument)
    if file.is_dir():
        files = sorted(file.rglob(f"samples_{task}_*.jsonl"), key=lambda candidate: candidate.name)
        if not files:
            raise UserError(
                f"{argument}={str(path)!r}: no samples_{task}_*.jsonl in this folder; log them with "
                f"lm_eval --tasks {task} --log_samples --output_path {path}"
            )
        # lm-eval writes a folder for each model; the newest file may be of the model that is to be judged.
        folders = sorted({str(candidate.parent.relative_to(file)) for candidate in files})
        if len(folders) > 1:
            raise UserError(
                f"{argument}={str(path)!r}: samples of {task} lie in several folders, of several models: "
                f"{', '.join(folders[:3])}{', ...' if len(folders) > 3 else ''}; give one of them"
            )
        file = files[-1]
    if not file.is_file():
        raise UserError(f"{argument}={str(path)!r}: no such file or folder")
    return file


def values_by_question(
    records: list[dict[str, Any]], metric: str, *, task: str, argument: str
) -> dict[str, float | None]:
    """Returns the logged number of ``metric`` by question; None where the log has a reason in its place.

    Documents without the metric are left out. A value is logged as a list that begins with the number.

    Raises:
        UserError: when no document has a value, and for a value of another form.
    """
    values = {}
    for record in records:
        if metric not in record:
            continue
        question, logged = record["doc"].get("question", ""), record[metric]
        number = logged[0] if isinstance(logged, list) and logged else logged
        is_number = isinstance(number, float) or (type(number) is int and abs(number) < 2**53)
        is_number = is_number and not math.isnan(number)
        has_reason = number is None or isinstance(number, str)
        if not isinstance(question, str) or not (is_number or has_reason):
            raise UserError(
                f"{argument}: a sample has no number as {metric}; the samples must be those that lm_eval logged for "
                f"the task {task}"
            )
        values[question] = float(number) if is_number else None
    if not values:
        raise UserError(f"{argument}: the samples have no {metric}; they must be of the task {task}")
    return values
