"""Rows of a forget or retain set: reading them, rendering them as text, encoding them as token ids."""

from lm_ortho.data.rows import Row, read_rows, write_rows

__all__ = ["Row", "read_rows", "write_rows"]
