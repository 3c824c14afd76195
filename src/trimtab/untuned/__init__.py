"""Systems that need no tuning, by task: what tuning has to beat."""

from __future__ import annotations

from trimtab.engine.frozen import NumberFormat
from trimtab.evaluation.baselines import LinearProbe
from trimtab.evaluation.evaluate import Scorer
from trimtab.job import EncodedSplits, Job
from trimtab.runs import RunFolder
from trimtab.tasks import Task
from trimtab.untuned import answers, base_model, causal_lm, labelled, preference

__all__ = ["score_untuned", "untuned_are_scored"]


_SYSTEMS_BY_WORDS = {
    "causal_lm": (causal_lm.NAME,),
    "seq2seq": answers.SYSTEMS,
    "preference": preference.SYSTEMS,
}


def untuned_are_scored(run: RunFolder, task: Task) -> bool:
    names = labelled.systems_of(task.name) if task.has_probe else [*_SYSTEMS_BY_WORDS[task.name], base_model.NAME]
    return all(run.baseline(name).is_scored for name in names)


def score_untuned(job: Job, scorer: Scorer, encoded: EncodedSplits, precision: NumberFormat) -> LinearProbe | None:
    """Score every untuned system that is not scored yet; returns the linear probe where the task has one."""
    if job.task.has_probe:
        with job.timed("text baselines"):
            labelled.score_text_systems(job, encoded)
        return labelled.score_base(job, scorer, encoded, precision)
    if job.task.name == "seq2seq":
        answers.score_text_systems(job, encoded)
    elif job.task.name == "preference":
        preference.score_text_systems(job)
    else:
        causal_lm.score_token_frequencies(job, encoded, scorer.base.model.get_input_embeddings().num_embeddings)
    base_model.score_base(job, scorer, encoded)
    return None
