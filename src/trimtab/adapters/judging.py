"""An adapter judged on labelled rows: which rows those are, and what it makes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from trimtab.adapters.loaded import LoadedAdapter
from trimtab.data import Row, read_labelled, read_rows
from trimtab.engine.scoring import Scores
from trimtab.errors import InputError
from trimtab.evaluation.evaluate import predict_outputs
from trimtab.evaluation.predictions import Predictions
from trimtab.evaluation.preference_predictions import PreferencePredictions
from trimtab.generation import write_answers
from trimtab.progress import Progress
from trimtab.runs import RunFolder
from trimtab.sampling import Sampling
from trimtab.tasks.examples import EncodedRows
from trimtab.tasks.preference import Preference, refer_to


def find_test_rows(
    folder: Path,
    facts: Mapping[str, Any],
    data: str | None,
    columns: Mapping[str, str | None] | None,
    progress: Progress,
) -> list[Row]:
    """The rows that an adapter is judged on: those of `data`, else the test rows of the run that it lies in.

    Args:
        columns: of `data`, by what they are for; others as the adapter was trained, or found by name.

    Raises:
        InputError: it lies in no run, and no data are given.
        SourceError, DataError: as for a study's own data.
    """
    if data is not None:
        names = facts["label_names"]
        if all(name == f"LABEL_{number}" for number, name in enumerate(names)):  # as transformers counts labels
            names = [str(number) for number in range(len(names))]
        return read_labelled(data, facts["task"], names, facts.get("columns", {}), columns or {}, progress)
    run = RunFolder.around(folder)
    if run is None or not run.test_rows.is_file():
        raise InputError(f"{folder} lies in no run folder, whose test rows are needed; give rows with labels: --data")
    return read_rows(run.test_rows)


def judge(
    adapter: LoadedAdapter, rows: Sequence[Row], encoded: EncodedRows, progress: Progress
) -> tuple[Scores, Predictions]:
    """Score `rows` with the active adapter; where its task asks for answers, let it write them."""
    scorer = adapter.scorer
    scores, written = scorer.score(encoded, progress), None
    if scorer.task.writes_answers:
        sampling = Sampling(adapter.facts.get("max_new_tokens", scorer.max_length_tokens))
        tokenizer = scorer.base.tokenizer
        written = write_answers(adapter.peft_model, tokenizer, encoded.examples, sampling, progress)
    return scores, predict_outputs(scorer.task, rows, encoded, adapter.label_names, scores.outputs, written)


def encode_beside_base(adapter: LoadedAdapter, rows: Sequence[Row], progress: Progress) -> EncodedRows:
    """Rows as the adapter's task reads them; preferences with what the base makes of them."""
    scorer = adapter.scorer
    encoded = scorer.encode(rows)
    if not isinstance(scorer.task, Preference):
        return encoded
    with adapter.disable():
        base = predict_outputs(scorer.task, rows, encoded, [], scorer.score(encoded, progress).outputs)
    assert isinstance(base, PreferencePredictions)
    return refer_to(encoded, torch.from_numpy(base.log_probabilities))
