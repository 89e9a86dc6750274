"""A task whose rows stand in its own YAML file, so that it is one file which works wherever it is put."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_ortho.data.rows import parse_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.tasks import datasets
from lm_ortho.harness.tasks.secret import SecretTask


class RowsTask(SecretTask):
    """A ``SecretTask`` that reads JSON lines from the key ``rows`` of its YAML file (a block, ``rows: |``).

    lm-eval writes the configuration of a task into its results; the rows are taken out of it, because a result
    must not hold the forget set in clear.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        download_mode: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        given = dict(config or {})
        self._rows = given.pop("rows", None)
        super().__init__(data_dir, cache_dir, download_mode, given)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Reads the rows. Raises ``UserError`` with the line (of the block) for broken ones, and for none."""
        source = f"{self.config.task}: rows of its YAML file"
        rows = parse_rows(self._rows, source) if isinstance(self._rows, str) else []
        if not rows:
            raise UserError(f"{source}: expected one JSON object per line under `rows: |`, found none")
        self.dataset = {"test": datasets.documents(rows)}
