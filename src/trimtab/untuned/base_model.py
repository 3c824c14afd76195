"""The base as it is, where its own head does the task."""

from __future__ import annotations

from trimtab.evaluation.evaluate import Scorer, peak_memory_bytes, predict_outputs, record_system, scoring_cost
from trimtab.generation import write_answers
from trimtab.job import EncodedSplits, Job
from trimtab.models import count_parameters
from trimtab.sampling import Sampling
from trimtab.tasks.seq2seq import longest_target

NAME = "base-model"


def score_base(job: Job, scorer: Scorer, encoded: EncodedSplits) -> None:
    """How likely the base holds what the test rows ask for, and what it writes itself where the task asks for that."""
    folder = job.run.baseline(NAME)
    if folder.is_scored:
        return
    job.progress.stage("Scoring the base: test")
    scores, written = scorer.score(encoded.test, job.progress), None
    if job.task.writes_answers:
        most = longest_target(encoded.train + encoded.validation)
        job.progress.stage(f"Letting the base answer, in at most {most} tokens")
        written = write_answers(
            scorer.base.model, scorer.base.tokenizer, encoded.test.examples, Sampling(most), job.progress
        )
    parameters = count_parameters(scorer.base.model)
    cost = scoring_cost(scores, len(job.data.test)) | {
        "total_parameters": parameters,
        "trainable_parameters": 0,
        "trainable_percent": 0.0,
        "peak_memory_bytes": peak_memory_bytes(),
    }
    predictions = predict_outputs(job.task, job.data.test, encoded.test, [], scores.outputs, written)
    record_system(folder, predictions, title="base model", kind="base", cost=cost)
