"""Systems that need no tuning, by task: what tuning has to beat."""

from __future__ import annotations

from trimtab.engine.frozen import NumberFormat
from trimtab.evaluation.baselines import LinearProbe
from trimtab.evaluation.evaluate import Scorer
from trimtab.job import EncodedSplits, Job
from trimtab.runs import RunFolder
from trimtab.tasks import Task
from trimtab.untuned import causal_lm, labelled

__all__ = ["score_untuned", "untuned_are_scored"]


def untuned_are_scored(run: RunFolder, task: Task) -> bool:
    names = labelled.systems_of(task.name) if task.has_probe else causal_lm.SYSTEMS
    return all(run.baseline(name).is_scored for name in names)


def score_untuned(job: Job, scorer: Scorer, encoded: EncodedSplits, precision: NumberFormat) -> LinearProbe | None:
    """Score every untuned system that is not scored yet; returns the linear probe where the task has one."""
    if not job.task.has_probe:
        causal_lm.score_token_frequencies(job, encoded, scorer.base.model.get_input_embeddings().num_embeddings)
        causal_lm.score_base(job, scorer, encoded)
        return None
    with job.timed("text baselines"):
        labelled.score_text_systems(job, encoded)
    return labelled.score_base(job, scorer, encoded, precision)
