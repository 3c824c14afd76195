"""An adapter and its base as one plain transformers model, written only once it has proved equal."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME

from trimtab.adapters.files import check_folder, is_whole_model
from trimtab.adapters.judging import find_test_rows
from trimtab.adapters.loading import read_adapter
from trimtab.adapters.merged import (
    check_mergeable,
    check_written,
    is_narrow,
    merged_while_computing,
    widen_weights,
    write_merged,
)
from trimtab.adapters.origin import find_base, load_tokenizer_of
from trimtab.data import Row
from trimtab.engine.forward import stock_forward
from trimtab.errors import InputError, MergeError
from trimtab.evaluation.evaluate import Scorer, predict_outputs
from trimtab.evaluation.predictions import compute_metrics
from trimtab.exporting import (
    COMPARED_TEXTS,
    GGUF_BOUNDS,
    GGUF_FILE,
    check_gguf,
    check_onnx,
    convert_to_gguf,
    difference_from_llama_cpp,
)
from trimtab.fingerprints import fingerprint_model
from trimtab.generation import write_answers
from trimtab.models import BaseModel, load_base
from trimtab.progress import Progress, Silent
from trimtab.runs import RunFolder, write_folder, write_json
from trimtab.sampling import Sampling
from trimtab.sources import ModelSource, locate_adapter, weight_files
from trimtab.tasks import Task, get_task, smooth_outputs
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.preference import Preference

MergeDtype = Literal["float32", "bfloat16", "float16"]
MergeFormat = Literal["transformers", "gguf", "onnx"]
# Largest difference of an output between adapter and merged model that counts as equal: see `find_difference`. In fewer
# bits it is what rounding may do to outputs: the merge itself is held to float32's bound, and its rounding to the bit.
BOUNDS: dict[str, float] = {"float32": 1e-4, "float16": 5e-2, "bfloat16": 5e-1}
# Weights in other formats than those that are read: they may lie beside them.
_OTHER_WEIGHTS = (".bin", ".pt", ".pth", ".ckpt", ".h5", ".msgpack", ".gguf", ".onnx", ".safetensors")
# Test rows on which both are held against each other.
_COMPARED_ROWS = 256


@dataclass(frozen=True)
class Merge:
    """What a merge was found to change, on `rows` test rows; `metric` is the task's own.

    `max_abs_difference` is the largest of any output, and `bound` what that output may differ by; `largest_share` is
    that of its own bound which any output takes, and more than 1 is another model.
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
    largest_share: float
    llama_cpp_difference: float | None = None

    @property
    def is_equal(self) -> bool:
        return self.largest_share <= 1


def merge_adapter(
    adapter: str | Path,
    out: str | Path,
    dtype: MergeDtype = "float32",
    *,
    base: str | None = None,
    data: str | None = None,
    columns: Mapping[str, str | None] | None = None,
    output_format: MergeFormat = "transformers",
    force: bool = False,
    progress: Progress | None = None,
) -> Merge:
    """Write base and adapter as one model to `out`, with tokenizer and label names; plain transformers reads it.

    Args:
        adapter: an adapter folder, a Hub id, or a run folder with one trial.
        base: where the base is, if not where it was.
        data: rows with labels that the models are compared on; if missing, the test rows of the adapter's run.
        columns: of `data`, by what they are for (text, label, …), where their names do not tell.
        output_format: a folder of transformers, or one with a GGUF file for llama.cpp.
        force: write it even where outputs differ by more than the dtype's bound.

    Raises:
        InputError: no adapter, no rows, another base, a method that cannot be merged, or `out` is taken.
        MergeError: the merged model differs by more than the bound, or is not what was merged; nothing was written.
    """
    if output_format == "onnx":
        check_onnx()
    listener = progress or Silent()
    out, folder = Path(out).expanduser(), _find_adapter(adapter)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise InputError(f"{out} is there already; give another --out")
    facts = check_folder(folder)
    if is_whole_model(folder):
        raise InputError(f"{folder} holds a whole model, which needs no merge: transformers loads it as it is")
    source, facts = find_base(folder, facts, base, listener)
    if output_format == "gguf":
        check_gguf(facts["task"])
    rows = find_test_rows(folder, facts, data, columns, listener)[:_COMPARED_ROWS]
    work = _Work(folder, facts, rows, dtype, force, listener)
    found: Merge | None = None

    def write(folder: Path) -> None:
        nonlocal found
        model, outputs, before = work.write(source, folder)
        found = work.compare(model, outputs, before)
        if output_format == "gguf":
            found = replace(found, llama_cpp_difference=work.export_gguf(folder, model))
        known = {"base": facts["base"], "base_sha256": fingerprint_model(source)}
        write_json(folder / "merge.json", known | asdict(found))

    write_folder(out, write, replace=False)
    assert found is not None
    return found


@dataclass(frozen=True)
class _Work:
    """One merge: what it is of, and how it is judged."""

    adapter: Path
    facts: dict[str, Any]
    rows: list[Row]
    dtype: MergeDtype
    force: bool
    progress: Progress

    @property
    def task(self) -> Task:
        return get_task(self.facts["task"], self.facts.get("beta", 0.1))

    def write(self, source: ModelSource, folder: Path) -> tuple[BaseModel, torch.Tensor, dict[str, float]]:
        """Fill `folder` with the merged model, and read it back; returns it, and outputs and metric of the adapter.

        Raises:
            MergeError: the layers give something else once merged, or what was written is not what they are then.
        """
        path = self.adapter
        self.progress.stage(f"Loading {source.name} and {path}")
        with _mapped(source, folder.parent, self.progress) as mapped:
            head = self.task.head_settings(self.facts["label_names"])
            tokenizer = load_tokenizer_of(path, self.facts)
            base = load_base(mapped, self.task.auto_class, head, self.facts.get("seed", 0), tokenizer=tokenizer)
            peft_model = read_adapter(base, path)
            check_mergeable(peft_model, path)
            self.progress.stage("Scoring test rows with the adapter")
            outputs, before = self._score(base)
            if self.dtype != "float32":
                self.progress.stage("Scoring test rows with each layer merged in float32")
                with merged_while_computing(peft_model):
                    self._check(outputs, self._outputs(base)[2], "float32")
            self.progress.stage(f"Merging, and writing {self.dtype}")
            write_merged(peft_model, folder, getattr(torch, self.dtype), self.progress)
            base.tokenizer.save_pretrained(folder)
            base.model = load_merged(folder, self.task, self.dtype)
            check_written(peft_model, base.model, getattr(torch, self.dtype))
        return base, outputs, before

    def compare(self, base: BaseModel, outputs: torch.Tensor, before: dict[str, float]) -> Merge:
        """Hold what was read back from `folder` against base and adapter, whose outputs are given.

        Raises:
            MergeError: it is another model, by more than the bound, and that is not forced.
        """
        self.progress.stage("Scoring test rows with what was written")
        merged_outputs, after = self._score(base)
        # A preference is told by rewards where the base stands beside it, and by log-probabilities here.
        score = {} if isinstance(self.task, Preference) else self.facts.get("score", {})
        metric, value = next(iter(before.items()))
        trained = score["value"] if score.get("metric") == metric else None
        changed = f", {metric} {value:.4f} before and {after[metric]:.4f} after"
        difference, bound, share = self._check(outputs, merged_outputs, self.dtype, changed)
        return Merge(self.dtype, difference, bound, len(self.rows), metric, value, after[metric], trained,
                     self.facts.get("quantize", "none"), share)  # fmt: skip

    def _check(
        self, outputs: torch.Tensor, merged: torch.Tensor, dtype: str, changed: str = ""
    ) -> tuple[float, float, float]:
        """What `find_difference` gives.

        Raises:
            MergeError: it is beyond that, and that is not forced.
        """
        difference, bound, share = find_difference(self.task, outputs, merged, BOUNDS[dtype])
        if not (share <= 1 or self.force):
            raise MergeError(
                f"{self.adapter} merged in {dtype} is another model: outputs differ by up to {difference:.2e} (at most "
                f"{bound:.2g}; one by {share:.2g} times its bound){changed}, on {len(self.rows)} test rows; nothing "
                "was kept: "
                + ("please report it, or --force" if dtype == "float32" else "try --dtype float32, or --force")
            )
        return difference, bound, share

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
        if not (difference <= bound or self.force):
            raise MergeError(
                f"llama.cpp gives other log-probabilities than transformers, by up to {difference:.2e} (at most "
                f"{bound:g}); nothing was kept: try --dtype float32, or --force"
            )
        for path in folder.iterdir():
            if path != file:
                path.unlink()
        return difference

    def _score(self, base: BaseModel) -> tuple[torch.Tensor, dict[str, float]]:
        """Outputs of the rows, and the task's own metric."""
        task, facts = self.task, self.facts
        scorer, encoded, outputs = self._outputs(base)
        written = None
        if task.writes_answers:
            sampling = Sampling(facts.get("max_new_tokens", scorer.max_length_tokens))
            written = write_answers(base.model, base.tokenizer, encoded.examples, sampling, self.progress)
        predictions = predict_outputs(task, self.rows, encoded, facts["label_names"], outputs, written)
        return outputs, {predictions.primary_metric: compute_metrics(predictions)[predictions.primary_metric]}

    def _outputs(self, base: BaseModel) -> tuple[Scorer, EncodedRows, torch.Tensor]:
        """Of the rows, through the forward of transformers and peft."""
        scorer = Scorer(self.task, base, stock_forward(base.model), self.facts["max_length_tokens"])
        encoded = scorer.encode(self.rows)
        return scorer, encoded, scorer.score(encoded, self.progress).outputs


def find_difference(
    task: Task, outputs: torch.Tensor, merged: torch.Tensor, bound: float
) -> tuple[float, float, float]:
    """The largest difference, the bound of that output, and the largest share of its bound that any output takes.

    It holds for a logit as it is; for a token's loss, which is a sum over a vocabulary, times the loss where that is
    above 1; for a value, whose unit is the user's, times the values' root mean square where that is.
    """
    outputs, merged = smooth_outputs(task, outputs), smooth_outputs(task, merged)
    scales = torch.ones_like(outputs)
    if not task.has_probe:
        scales = outputs.abs().clamp(min=1.0)
    elif task.name == "regression":
        scales *= max(1.0, float(outputs.square().mean().sqrt()))
    differences = (merged - outputs).abs()
    largest = differences.argmax()  # one that is no number comes first, here and below
    share = float((differences / scales).max()) / bound
    return float(differences.flatten()[largest]), bound * float(scales.flatten()[largest]), share


def _find_adapter(given: str | Path) -> Path:
    """An adapter folder, here or on the Hub; a run folder with one trial names it as well."""
    run = RunFolder(Path(given).expanduser())
    if not run.study.is_file():
        return locate_adapter(given)
    trials = run.trials()
    if len(trials) != 1:
        named = ", ".join(str(trial.adapter) for trial in trials) or "none"
        raise InputError(f"{given} holds {len(trials)} adapters ({named}); name the one to merge")
    return trials[0].adapter


@contextmanager
def _mapped(source: ModelSource, beside: Path, progress: Progress) -> Iterator[ModelSource]:
    """The base in files that are mapped into memory, not read into it: in float32, where they are not already.

    Other files than safetensors cannot be mapped; that is said.
    """
    files = weight_files(source)
    others = [file for file in files if file.suffix != ".safetensors"]
    if others:
        size = sum(file.stat().st_size for file in files) / 1e9
        progress.note(
            f"{source.name} has its weights in {others[0].name}, and only safetensors are mapped into memory: all of "
            f"it is read ({size:.2g} GB in the file, more where that is narrower than float32)"
        )
    if others or not is_narrow(files):
        yield source
        return
    with tempfile.TemporaryDirectory(dir=beside, prefix=".wide-") as work:
        for path in files[0].parent.iterdir():
            if path.is_file() and path.suffix not in _OTHER_WEIGHTS and path.name != SAFE_WEIGHTS_INDEX_NAME:
                shutil.copy(path, work)
        widen_weights(files, Path(work))
        yield ModelSource(source.name, work, True)


def load_merged(folder: Path, task: Task, dtype: str) -> Any:
    """What was written, as plain transformers reads it.

    Raises:
        MergeError: weights are missing or left over.
    """
    auto = getattr(transformers, task.auto_class)
    model, info = auto.from_pretrained(
        folder, dtype=getattr(torch, dtype), output_loading_info=True, trust_remote_code=False
    )
    strange = sorted(map(str, (*info["missing_keys"], *info["unexpected_keys"], *info["mismatched_keys"])))
    if strange:
        raise MergeError(f"what was merged is no whole model: {len(strange)} weights do not fit ({strange[0]}, …)")
    return model.eval().requires_grad_(False)
