"""A task whose rows are part of its own YAML file, so that it is a single file that works in any place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lm_ortho.data.rows import parse_rows
from lm_ortho.errors import UserError
from lm_ortho.harness.tasks import datasets
from lm_ortho.harness.tasks.secret import SecretTask


class RowsTask(SecretTask):
    """A ``SecretTask`` that reads JSON lines from the key ``rows`` of its YAML file (a block, ``rows: |``).

    lm-eval writes the configuration of a task into its results. The rows are removed from it, because a result must
    not contain the forget set in plain text.
    """

    def __init__(
        self,
        data_dir: str | None = None,
        cache_dir: str | None = None,
        download_mode: Any = None,
        config: Mapping[str, Any] | None = None,
    ) -> None:
        settings = dict(config or {})
        self._rows = settings.pop("rows", None)
        super().__init__(data_dir=data_dir, cache_dir=cache_dir, download_mode=download_mode, config=settings)

    def download(self, dataset_kwargs: dict[str, Any] | None = None, **_: Any) -> None:
        """Reads the rows.

        Raises:
            UserError: for an invalid row, with its line in the block, and for a block without rows.
        """
        source = f"{self.config.task}: rows of its YAML file"
        rows = parse_rows(self._rows, source) if isinstance(self._rows, str) else []
        if not rows:
            raise UserError(f"{source}: expected one JSON object per line under `rows: |`, found none")
        self.dataset = {"test": datasets.documents(rows)}
