"""What the stages of one run share."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field

from trimtab.data import PreparedData
from trimtab.progress import Progress
from trimtab.runs import RunFolder
from trimtab.sources import ModelSource
from trimtab.study_config import StudyConfig
from trimtab.tasks import Task
from trimtab.tasks.examples import EncodedRows


@dataclass(frozen=True)
class EncodedSplits:
    """Every split as the model will read it, cut to `max_length_tokens`; pairs have `pair_separator` between them."""

    train: EncodedRows
    validation: EncodedRows
    test: EncodedRows
    max_length_tokens: int
    pair_separator: str | None = None

    def probed(self, positions: int) -> tuple[EncodedRows, EncodedRows]:
        """Of train and validation, what the linear probe sees: so many labelled positions each."""
        return self.train.sample(positions), self.validation.sample(positions)


@dataclass
class Job:
    """One study in its run folder, its data read and turned into tokens, and its model found."""

    study: StudyConfig
    task: Task
    run: RunFolder
    data: PreparedData
    source: ModelSource
    encoded: EncodedSplits
    progress: Progress
    seconds: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def timed(self, stage: str) -> Iterator[None]:
        started = time.perf_counter()
        yield
        self.seconds[stage] = round(time.perf_counter() - started, 2)
