"""Rows in, checked and fingerprinted splits out."""

from trimtab.data.prepare import PreparedData, prepare_data
from trimtab.data.rows import Row, read_rows, write_rows

__all__ = ["PreparedData", "Row", "prepare_data", "read_rows", "write_rows"]
