"""Documents and activation statistics that the other steps read."""

from lm_ortho.calibration.documents import Row, read_rows, write_rows

__all__ = ["Row", "read_rows", "write_rows"]
