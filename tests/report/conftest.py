"""Run folders for the report's tests."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from run_writer import RunWriter


@pytest.fixture
def new_run(tmp_path: Path) -> Callable[..., RunWriter]:
    """A writer of a run folder with the baselines in it."""

    def build(labels: list[str] | None = None, rows: int = 200) -> RunWriter:
        writer = RunWriter(tmp_path / "run", labels or ["negative", "positive"], rows)
        writer.add_baselines()
        return writer

    return build
