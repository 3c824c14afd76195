"""An adapter and its base as one plain transformers model, written only once it has proved equal."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from peft import PeftModel

from trimtab.adapters.files import check_folder, is_whole_model
from trimtab.adapters.merged import check_mergeable, is_narrow, widen_weights, write_merged
from trimtab.adapters.origin import locate_base
from trimtab.data import Row, read_rows
from trimtab.engine.forward import stock_forward
from trimtab.errors import InputError, MergeError
from trimtab.evaluation.evaluate import Scorer, predict_outputs
from trimtab.evaluation.predictions import compute_metrics
from trimtab.exporting import (
    COMPARED_TEXTS,
    GGUF_BOUNDS,
    GGUF_FILE,
    check_gguf,
    convert_to_gguf,
    difference_from_llama_cpp,
)
from trimtab.generation import Sampling, write_answers
from trimtab.models import BaseModel, load_base
from trimtab.progress import Progress, Silent
from trimtab.runs import RunFolder, TrialFolder, read_json, write_folder, write_json
from trimtab.sources import ModelSource, weight_files
from trimtab.study_config import StudyConfig, build_study, read_study_file
from trimtab.tasks import Task, get_task
from trimtab.tasks.preference import Preference

MergeDtype = Literal["float32", "bfloat16", "float16"]
MergeFormat = Literal["transformers", "gguf"]
# Largest difference of an output (a logit, or a token's loss) between adapter and merged model that counts as equal.
BOUNDS: dict[str, float] = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-1}
# Test rows on which both are held against each other.
_COMPARED_ROWS = 256


@dataclass(frozen=True)
class Merge:
    """What a merge was found to change, on `rows` test rows; `metric` is the task's own.

    `trained` is the metric of the system that was tuned, on all of its test rows: where its base was quantised, the
    merged model stands on the weights in full precision. `llama_cpp_difference` is that of log-probabilities, where the
    model was written as GGUF.
    """

    dtype: str
    max_abs_difference: float
    bound: float
    rows: int
    metric: str
    before: float
    after: float
    trained: float | None
    quantize: str
    llama_cpp_difference: float | None = None

    @property
    def is_equal(self) -> bool:
        return self.max_abs_difference <= self.bound


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    dtype: MergeDtype = "float32",
    *,
    output_format: MergeFormat = "transformers",
    force: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Write base and adapter as one model to `out`, with tokenizer and label names; plain transformers reads it.

    Args:
        adapter: the adapter folder of a trial in a run folder, whose test rows the models are compared on.
        output_format: a folder of transformers, or one with a GGUF file for llama.cpp.
        force: write it even where outputs differ by more than the dtype's bound.

    Raises:
        InputError: no adapter of a run, another base, a method that cannot be merged, or `out` is taken.
        MergeError: the merged model differs by more than the bound; nothing was written.
    """
    listener = progress or Silent()
    adapter, out = Path(adapter).expanduser(), Path(out).expanduser()
    trial, run = _find_trial(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give another --out")
    study = build_study(read_study_file(run.study))
    facts = check_folder(trial.adapter)
    if is_whole_model(trial.adapter):
        raise InputError(f"{trial.adapter} holds a whole model, which needs no merge: transformers loads it as it is")
    if output_format == "gguf":
        check_gguf(study.task)
    work = _Work(trial, study, facts, read_rows(run.test_rows)[:_COMPARED_ROWS], dtype, force, listener)
    source = locate_base(trial.adapter, facts, None, listener)
    found: Merge | None = None

    def write(folder: Path) -> None:
        nonlocal found
        base, outputs, before = work.write(source, folder)
        found = work.compare(folder, base, outputs, before)
        if output_format == "gguf":
            found = replace(found, llama_cpp_difference=work.export_gguf(folder, base))
        write_json(folder / "merge.json", {"base": facts["base"], "base_sha256": facts["base_sha256"]} | asdict(found))

    write_folder(out, write)
    assert found is not None
    return found


@dataclass(frozen=True)
class _Work:
    """One merge: what it is of, and how it is judged."""

    trial: TrialFolder
    study: StudyConfig
    facts: dict[str, Any]
    rows: list[Row]
    dtype: MergeDtype
    force: bool
    progress: Progress

    @property
    def task(self) -> Task:
        return get_task(self.study.task)

    def write(self, source: ModelSource, folder: Path) -> tuple[BaseModel, torch.Tensor, dict[str, float]]:
        """Fill `folder` with the merged model; returns the base, and outputs and metric of base and adapter."""
        path = self.trial.adapter
        self.progress.stage(f"Loading {source.name} and {self.trial.name}")
        with _mapped(source, folder.parent) as mapped:
            head = self.task.head_settings(self.facts["label_names"])
            base = load_base(mapped, self.task.auto_class, head, self.study.seed)
            peft_model = PeftModel.from_pretrained(base.model, str(path)).eval()
            check_mergeable(peft_model, path)
            self.progress.stage("Scoring test rows with the adapter")
            outputs, before = self._score(base)
            self.progress.stage(f"Merging, and writing {self.dtype}")
            write_merged(peft_model, folder, getattr(torch, self.dtype), self.progress)
            base.tokenizer.save_pretrained(folder)
        return base, outputs, before

    def compare(self, folder: Path, base: BaseModel, outputs: torch.Tensor, before: dict[str, float]) -> Merge:
        """Read what was written into `base`, as plain transformers does, and hold it against base and adapter.

        Raises:
            MergeError: it is another model, by more than the bound, and that is not forced.
        """
        self.progress.stage("Scoring test rows with what was written")
        base.model = load_merged(folder, self.task, self.dtype)
        merged_outputs, after = self._score(base)
        # A preference is told by rewards where the base stands beside it, and by log-probabilities here.
        scored = {} if isinstance(self.task, Preference) else read_json(self.trial.metrics)["metrics"]
        metric, value = next(iter(before.items()))
        difference, bound = float((merged_outputs - outputs).abs().max()), BOUNDS[self.dtype]
        found = Merge(self.dtype, difference, bound, len(self.rows), metric, value, after[metric], scored.get(metric),
                      self.study.quantize)  # fmt: skip
        if not (found.is_equal or self.force):
            raise MergeError(
                f"{self.trial.adapter} merged in {self.dtype} is another model: outputs differ by up to "
                f"{difference:.2e} (at most {bound:g}), {metric} {value:.4f} before and {after[metric]:.4f} after, on "
                f"{len(self.rows)} test rows; nothing was kept: try --dtype float32, or --force"
            )
        return found

    def export_gguf(self, folder: Path, base: BaseModel) -> float:
        """Leave a GGUF file in `folder` in place of the merged model; returns how far llama.cpp is from transformers.

        Raises:
            MergeError: further than the bound, and that is not forced.
        """
        self.progress.stage("Converting to GGUF, and asking llama.cpp")
        file, length, bound = folder / GGUF_FILE, self.facts["max_length_tokens"], GGUF_BOUNDS[self.dtype]
        convert_to_gguf(folder, file, self.dtype)
        examples = self.task.encode(self.rows[:COMPARED_TEXTS], base.tokenizer, base.model, length).examples
        texts = [base.tokenizer.decode(example.input_ids, skip_special_tokens=True) for example in examples]
        texts = texts[:COMPARED_TEXTS]
        difference = difference_from_llama_cpp(file, base.model, base.tokenizer, texts, length, self.progress)
        if difference > bound and not self.force:
            raise MergeError(
                f"llama.cpp gives other log-probabilities than transformers, by up to {difference:.2e} (at most "
                f"{bound:g}); nothing was kept: try --dtype float32, or --force"
            )
        for path in folder.iterdir():
            if path != file:
                path.unlink()
        return difference

    def _score(self, base: BaseModel) -> tuple[torch.Tensor, dict[str, float]]:
        """Outputs of the rows through the forward of transformers and peft, and the task's own metric."""
        task, facts = self.task, self.facts
        scorer = Scorer(task, base, stock_forward(base.model), facts["max_length_tokens"])
        encoded = scorer.encode(self.rows)
        outputs, written = scorer.score(encoded, self.progress).outputs, None
        if task.writes_answers:
            sampling = Sampling(facts["max_new_tokens"])
            written = write_answers(base.model, base.tokenizer, encoded.examples, sampling, self.progress)
        predictions = predict_outputs(task, self.rows, encoded, facts["label_names"], outputs, written)
        return outputs, {predictions.primary_metric: compute_metrics(predictions)[predictions.primary_metric]}


def _find_trial(adapter: Path) -> tuple[TrialFolder, RunFolder]:
    """The trial of an adapter folder; a run folder with one trial names it as well."""
    run = RunFolder(adapter)
    if run.study.is_file():
        trials = run.trials()
        if len(trials) != 1:
            named = ", ".join(str(trial.adapter) for trial in trials) or "none"
            raise InputError(f"{adapter} holds {len(trials)} adapters ({named}); name the one to merge")
        return trials[0], run
    trial, run = TrialFolder(adapter.absolute().parent), RunFolder(adapter.absolute().parent.parent.parent)
    if trial.adapter != adapter.absolute() or not trial.facts_in(adapter).is_file() or not run.test_rows.is_file():
        raise InputError(f"{adapter} is no adapter in a run folder; give RUN/trials/METHOD-sSEED/adapter, or RUN")
    return trial, run


@contextmanager
def _mapped(source: ModelSource, beside: Path) -> Iterator[ModelSource]:
    """The base in files that are mapped into memory, not read into it: in float32, where they are not already."""
    files = weight_files(source)
    if not all(file.suffix == ".safetensors" for file in files) or not is_narrow(files):
        yield source
        return
    with tempfile.TemporaryDirectory(dir=beside, prefix=".wide-") as work:
        for path in files[0].parent.iterdir():
            if path.is_file() and path not in files:
                shutil.copy(path, work)
        widen_weights(files, Path(work))
        yield ModelSource(source.name, work, True)


def load_merged(folder: Path, task: Task, dtype: str) -> Any:
    """What was written, as plain transformers reads it.

    Raises:
        MergeError: weights are missing or left over.
    """
    auto = getattr(transformers, task.auto_class)
    model, info = auto.from_pretrained(folder, dtype=getattr(torch, dtype), output_loading_info=True)
    strange = sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"])))
    if strange:
        raise MergeError(f"what was merged is no whole model: {len(strange)} weights do not fit ({strange[0]}, …)")
    return model.eval().requires_grad_(False)
