"""What the stages of one run share."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from trimtab.data import PreparedData
from trimtab.errors import DataError
from trimtab.progress import Progress
from trimtab.runs import RunFolder
from trimtab.sources import ModelSource
from trimtab.study_config import StudyConfig
from trimtab.tasks import Task
from trimtab.tasks.examples import EncodedRows

# How tasks name a row: by its split, and its number in the source.
_ROW = re.compile(r"^row (train|validation|test):(\d+): ")


@dataclass
class Job:
    """One study in its run folder, its data read and its model found."""

    study: StudyConfig
    task: Task
    run: RunFolder
    data: PreparedData
    source: ModelSource
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def naming_files(self) -> Iterator[None]:
        """What is wrong with a row, told with the file and line that it came from."""
        try:
            yield
        except DataError as error:
            raise DataError(_ROW.sub(self._place_of, str(error), count=1)) from error

    def _place_of(self, row: re.Match[str]) -> str:
        split, line = row.groups()
        source = getattr(self.study, f"{split}_data") or self.study.train_data
        return f"{source}:{line}: " if Path(source).is_file() else f"{source}[{split}]:{line}: "

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)


@dataclass(frozen=True)
class EncodedSplits:
    """Every split as the model will read it."""

    train: EncodedRows
    validation: EncodedRows
    test: EncodedRows
