"""Every error that Trimtab raises on purpose.

TrimtabError
├── InputError            the input is wrong; nothing was started      exit 2
│   ├── StudyError        a setting of the study
│   │   └── MethodError   a method that cannot go into the model
│   ├── SourceError       a model or data source cannot be had
│   ├── AdapterError      an adapter folder that is damaged, strange or not to be trusted
│   ├── DataError         rows, columns, labels
│   │   └── RowError      a row that cannot be turned into tokens
│   └── RunFolderError    the run folder holds something else
└── RunError              the work began and failed; what is finished is kept      exit 1
    ├── TrainingError     the loss or the gradients are no longer finite
    ├── ReloadError       what was saved does not give what was trained
    ├── MergeError        a merged model does not give what its adapter gave
    └── StorageError      the disk is full or not writable
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TrimtabError(Exception):
    """What is wrong, the value received, and what to do next."""

    exit_code = 1


class InputError(TrimtabError):
    exit_code = 2


class StudyError(InputError):
    pass


class MethodError(StudyError):
    pass


class SourceError(InputError):
    pass


class AdapterError(InputError):
    pass


class DataError(InputError):
    pass


class RowError(DataError):
    """A row that cannot be used: `row_id` says which of its split (`train:12`), `problem` why and what to do."""

    def __init__(self, row_id: str, problem: str) -> None:
        super().__init__(f"row {row_id}: {problem}")
        self.row_id, self.problem = row_id, problem


class RunFolderError(InputError):
    pass


class RunError(TrimtabError):
    pass


class TrainingError(RunError):
    pass


class ReloadError(RunError):
    pass


class MergeError(RunError):
    pass


class StorageError(RunError):
    pass


def suggest(name: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the nearest of `known`, or the empty string."""
    nearest = difflib.get_close_matches(name, list(known), n=1, cutoff=0.6)
    return f"; did you mean {nearest[0]!r}?" if nearest else ""
