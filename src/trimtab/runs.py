"""The run folder: every name in it, and writes that are whole or not there.

Other modules ask this one where a thing lies; nobody else spells these names.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import yaml

from trimtab.errors import DataError, RunFolderError, StorageError

# A run writes reports, predictions and an adapter; below this it would stop half-way.
MINIMUM_FREE_BYTES = 64 << 20


class RunFolder:
    """The files of one run."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.study = path / "study.yaml"
        self.manifest = path / "manifest.json"
        self.estimate = path / "estimate.json"
        self.data_summary = path / "data.json"
        self.test_rows = path / "test.jsonl"
        self.comparison = path / "comparison.json"
        self.report_html = path / "report.html"
        self.report_markdown = path / "report.md"
        self.baselines, self.all_trials = path / "baselines", path / "trials"

    @classmethod
    def around(cls, adapter: Path) -> RunFolder | None:
        """The run that an adapter folder is a trial of; None where it lies in none."""
        place = adapter.absolute()
        run = cls(place.parent.parent.parent)
        is_trial = run.study.is_file() and TrialFolder(run.all_trials / place.parent.name).adapter == place
        return run if is_trial else None

    def baseline(self, system: str) -> SystemFolder:
        return SystemFolder(self.baselines / system)

    def trial(self, method: str, seed: int) -> TrialFolder:
        return TrialFolder(self.all_trials / f"{method}-s{seed}")

    def trials(self) -> list[TrialFolder]:
        """Trials that hold a finished adapter."""
        folders = sorted(self.all_trials.glob("*"))
        return [TrialFolder(folder) for folder in folders if (folder / "adapter").is_dir()]

    def systems(self) -> list[SystemFolder]:
        """Every scored system, baselines first."""
        folders = sorted(self.baselines.glob("*")) + sorted(self.all_trials.glob("*"))
        return [system for system in map(SystemFolder, folders) if system.is_scored]

    def check_free(self, study_yaml: str, overwrite: bool = False) -> None:
        """Refuse a folder that cannot become this study's; changes nothing.

        Raises:
            RunFolderError: it holds another study, or something that is no run, or the disk is full.
        """
        if self.path.exists() and not self.path.is_dir():
            raise RunFolderError(f"{self.path} is a file; give another --out")
        if self.study.is_file():
            difference = _first_difference(self.study.read_text(encoding="utf-8"), study_yaml)
            if difference and not overwrite:
                raise RunFolderError(
                    f"{self.path} already holds another study ({difference}); "
                    "give another --out, or --overwrite to start it anew"
                )
        elif self.path.is_dir() and any(self.path.iterdir()):
            raise RunFolderError(f"{self.path} is not empty and holds no study.yaml; give another --out")
        existing = next(folder for folder in (self.path, *self.path.absolute().parents) if folder.is_dir())
        free = shutil.disk_usage(existing).free
        if free < MINIMUM_FREE_BYTES:
            raise RunFolderError(
                f"no space left for {self.path}: {free >> 20} MiB free, {MINIMUM_FREE_BYTES >> 20} MiB needed; "
                "free some, or give an --out on another disk"
            )

    def claim(self, study_yaml: str, overwrite: bool = False) -> None:
        """Make the folder this study's, or go on in it where the same study began.

        Args:
            overwrite: begin anew: what a run writes is removed, other files stay.

        Raises:
            RunFolderError: as `check_free`.
            StorageError: it cannot be written.
        """
        self.check_free(study_yaml, overwrite)
        if overwrite and self.study.is_file():
            with _storage_errors(self.path):
                self._remove_run()
        if not self.study.is_file():
            with _storage_errors(self.path):
                self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.study, study_yaml)

    def _remove_run(self) -> None:
        for name in reversed(vars(self).values()):  # the study last: with it the folder is known as a run
            if name == self.path:
                continue
            if name.is_dir():
                shutil.rmtree(name)
            else:
                name.unlink(missing_ok=True)


class SystemFolder:
    """Predictions and metrics of one system."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.name = path.name
        self.predictions = path / "predictions.jsonl"
        self.metrics = path / "metrics.json"
        self.logits = path / "logits.safetensors"
        self.probe = path / "probe.safetensors"

    @property
    def is_scored(self) -> bool:
        return self.predictions.is_file() and self.metrics.is_file()


class TrialFolder(SystemFolder):
    """What tuning leaves behind."""

    def __init__(self, path: Path) -> None:
        super().__init__(path)
        self.adapter = path / "adapter"
        self.model_card = path / "adapter" / "README.md"
        self.start = path / "start"  # the adapter as it started, where its start changed the base
        self.history = path / "history.jsonl"
        self.training = path / "training.json"
        self.trained_logits = path / "trained_logits.safetensors"
        self.reload = path / "reload.json"
        self.samples = path / "samples.jsonl"

    @property
    def is_proved(self) -> bool:
        return self.is_scored and self.reload.is_file() and bool(read_json(self.reload)["passed"])

    @staticmethod
    def facts_in(adapter: Path) -> Path:
        """What an adapter folder says of its base, task and labels, beside peft's own files."""
        return adapter / "trimtab.json"


class _storage_errors:  # noqa: N801  (reads as a statement: `with _storage_errors(path):`)
    """Turn a full or read-only disk into a StorageError that names the path."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        if isinstance(error, OSError):
            full = error.errno in (errno.ENOSPC, errno.EDQUOT)
            reason = "no space left on the disk" if full else (error.strerror or str(error))
            raise StorageError(
                f"cannot write {self.path}: {reason}; what was finished before is kept: "
                "make room and run the same command again"
            ) from error


def _first_difference(old_yaml: str, new_yaml: str) -> str:
    """`setting: was OLD, now NEW` for the first setting that differs; those that change no result do not count."""
    old, new = yaml.safe_load(old_yaml) or {}, yaml.safe_load(new_yaml)
    for name in new:
        if name not in ("out", "cache_budget_gib") and old.get(name) != new[name]:
            return f"{name}: was {old.get(name)!r}, now {new[name]!r}"
    return ""


def write_file(path: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary file beside `path`; fsync it and rename it into place."""
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
        os.close(handle)
        temporary = Path(name)
        try:
            write(temporary)
            with temporary.open("rb+") as file:
                os.fsync(file.fileno())
            temporary.chmod(0o644)
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise


def write_folder(path: Path, write: Callable[[Path], None], *, replace: bool = True) -> None:
    """Let `write` fill a temporary folder beside `path`, and rename it into place.

    Args:
        replace: take the place of a folder that is there; else only that of an empty one.
    """
    with _storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
        try:
            write(temporary)
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb+") as opened:
                        os.fsync(opened.fileno())
            temporary.chmod(0o755)
            _put_in_place(temporary, path, replace)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise


def _put_in_place(folder: Path, path: Path, replace: bool) -> None:
    if not (replace and path.exists()):
        folder.replace(path)  # the system refuses where something is in there
        return
    aside = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}.old."))
    path.replace(aside)
    try:
        folder.replace(path)
    except OSError:
        aside.replace(path)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    def write(temporary: Path) -> None:
        temporary.write_text(text, encoding="utf-8")

    write_file(path, write)


def write_json(path: Path, value: Any) -> None:
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    def write(temporary: Path) -> None:
        with temporary.open("w", encoding="utf-8") as file:
            for row in rows:
                file.write(json.dumps(row, ensure_ascii=False) + "\n")

    write_file(path, write)


def read_json(path: Path) -> Any:
    """The JSON value in `path`.

    Raises:
        DataError: no such file, or not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DataError(f"no file {path}") from None
    except ValueError as error:
        raise DataError(f"{path}: not valid JSON ({error})") from None


def parse_jsonl(lines: Iterable[str], source: Path) -> Iterator[tuple[dict[str, Any], int]]:
    """The object on each line of `source`, and the line's number; blank lines are passed over.

    Raises:
        DataError: a line that is no JSON object, with file and number.
    """
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise DataError(f"{source}:{number}: not valid JSON ({error}); fix or remove the line") from None
        if not isinstance(row, dict):
            raise DataError(f"{source}:{number}: expected a JSON object on each line, found {type(row).__name__}")
        yield row, number


def read_jsonl(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in `path`, a line each.

    Raises:
        DataError: no such file, not UTF-8, or as `parse_jsonl`.
    """
    try:
        with path.open(encoding="utf-8") as file:
            for row, _ in parse_jsonl(file, path):
                yield row
    except FileNotFoundError:
        raise DataError(f"no file {path}") from None
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}); save it as UTF-8") from None
