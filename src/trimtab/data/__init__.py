"""Rows in, checked and fingerprinted splits out."""

from trimtab.data.prepare import PreparedData, prepare_data, read_labelled
from trimtab.data.rows import Row, groups_of, read_rows, write_rows

__all__ = ["PreparedData", "Row", "groups_of", "prepare_data", "read_labelled", "read_rows", "write_rows"]
