"""Trimtab fits a lightweight adapter to a foundation model and tells honestly what it bought."""

__version__ = "0.1.0"
