"""The sentences of the report: the headline, the notes under it, and what each metric means."""

from __future__ import annotations

from trimtab.methods.table import METHODS
from trimtab.report.content import Content, Contrast, System
from trimtab.report.number_format import (
    format_contrast,
    format_count,
    format_difference,
    format_p_value,
    format_score,
)

METRIC_TITLES = {
    "perplexity": "Perplexity",
    "rmse": "RMSE",
    "mae": "MAE",
    "r2": "R²",
    "pearson": "Pearson",
    "accuracy": "Accuracy",
    "f1": "F1",
    "f1_macro": "Macro F1",
    "exact_match": "Exact match",
    "precision": "Precision",
    "recall": "Recall",
    "loss": "Loss",
    "brier": "Brier",
    "token_accuracy": "Token accuracy",
    "rouge1": "ROUGE-1",
    "rouge2": "ROUGE-2",
    "rougeL": "ROUGE-L",
    "bleu": "BLEU",
    "margin": "Margin",
}
METRIC_WORDS = {"accuracy": "accuracy", "f1": "macro F1", "loss": "loss", "brier": "the Brier score",
                "perplexity": "perplexity", "token_accuracy": "token accuracy", "rmse": "the root mean squared error",
                "exact_match": "exact match", "rougeL": "ROUGE-L", "bleu": "BLEU"}  # fmt: skip
_TASK_WORDS = {"multilabel": {"f1": "micro F1"}, "token_classification": {"f1": "entity F1"}}
METRIC_MEANINGS = {
    "perplexity": "e to the mean loss of a token: among how many equally likely tokens the model is left to choose; "
    "lower is better.",
    "token_accuracy": "Share of the tokens to be learnt that the model holds for the likeliest.",
    "accuracy": "Share of test rows whose predicted label is the true one.",
    "f1": "Harmonic mean of precision and recall, averaged over the classes with equal weight (macro).",
    "precision": "Of the rows given a label, the share that truly has it; averaged over the classes.",
    "recall": "Of the rows that truly have a label, the share that was given it; averaged over the classes.",
    "loss": "Mean negative log-likelihood of the truth (a label, or a token), in nats; lower is better. "
    "It punishes being sure and wrong.",
    "f1_macro": "F1 of each label, averaged with equal weight over the labels that occur.",
    "exact_match": "Share of test rows with all labels right, and none too many.",
    "rouge1": "Words that the answer and the reference share, as an F-measure, averaged over rows.",
    "rouge2": "Pairs of neighbouring words that both share, as an F-measure, averaged over rows.",
    "rougeL": "The longest sequence of words that stands in both answer and reference, in order, as an F-measure, "
    "averaged over rows.",
    "bleu": "Runs of one to four words that are right, over all rows together, 0 to 100 (sacrebleu).",
    "rmse": "Root of the mean squared difference from the true value, in the data's own units; lower is better.",
    "mae": "Mean absolute difference from the true value, in the data's own units; lower is better.",
    "r2": "Share of the true values' variance that is explained; 0 is what their mean does.",
    "pearson": "Correlation of the given with the true values, -1 to 1.",
    "margin": "How much more the chosen answer is given than the rejected one, in the system's own units (nats for "
    "models).",
    "brier": "Mean squared distance of the probabilities from the truth, 0 to 2; lower is better.",
}
# What differs from the above where the rows bear something else than one label each.
TASK_MEANINGS = {
    "multilabel": {
        "f1": "Harmonic mean of precision and recall over all labels together (micro).",
        "precision": "Of the labels given, the share that is true; over all labels together.",
        "recall": "Of the true labels, the share that was given; over all labels together.",
        "loss": "Mean binary cross-entropy of a label, in nats; lower is better.",
    },
    "regression": {"loss": "Mean squared error; lower is better."},
    "preference": {
        "accuracy": "Share of test rows in which the system prefers the chosen answer: a tuned model by its rewards "
        "(log-probability over the base's), the base by its log-probability.",
        "loss": "DPO's loss; a model that has not moved from the base has 0.693. Lower is better.",
    },
    "seq2seq": {
        "exact_match": "Share of test rows whose answer is the reference, character by character.",
        "loss": "Mean negative log-likelihood of a token of the reference, in nats; lower is better.",
    },
    "token_classification": {
        "f1": "Harmonic mean of precision and recall over whole entities, as seqeval counts them.",
        "precision": "Of the entities given, the share that is true in extent and kind.",
        "recall": "Of the true entities, the share that was found in extent and kind.",
        "accuracy": "Share of words with the right tag.",
        "loss": "Mean negative log-likelihood of a word's tag, in nats; lower is better.",
    },
}
SYSTEM_MEANINGS = {
    "majority-class": "Always gives the most frequent label of the training rows; the least that counts.",
    "label-shares": "Gives each label its share in the training rows, whatever the text.",
    "mean-value": "Always gives the mean of the training rows; the least that counts.",
    "majority-tag": "Always gives the most frequent tag of the training words.",
    "word-tags": "Gives each word the tag that it has most often in the training rows.",
    "tfidf-ridge-regression": "A linear model on word frequencies: no neural network, fitted in seconds.",
    "tfidf-logistic-regression": "A linear classifier on word frequencies: no neural network, fitted in seconds.",
    "linear-probe": "A linear classifier on what the frozen base model makes of each text: what the base "
    "already knows, without tuning it.",
    "token-frequencies": "Gives each token its share among the training tokens, whatever stands before it.",
    "answer-length": "Prefers the longer answer, or the shorter where that is chosen more often in the training rows.",
    "tfidf-preference": "A linear model on the words of both answers, whatever the prompt: no neural network.",
    "copied-source": "Gives the source back as it is.",
    "nearest-row": "Gives the target of that training row whose source has the most alike words.",
    "base-model": "The base model as it is, before any tuning.",
    "untrained-head": "The base model with a random classification head: what tutorials call “before”.",
}
TUNED_MEANING = "The base model with the trained adapter, and head where that is new, loaded again from the files."
# A headline names the reason; the training section has it whole.
_REASON_CHARACTERS = 160


def metric_word(metric: str, task: object = None) -> str:
    """A metric's name in a sentence; F1 is another average in each task."""
    return _TASK_WORDS.get(str(task), METRIC_WORDS).get(metric) or METRIC_WORDS.get(metric, metric)


def method_title(method: object) -> str:
    """A method's name in a sentence."""
    if not method:
        return "the adapter"
    row = METHODS.get(str(method))
    return row.short_title.split(", ")[0] if row else str(method)


def metric_meaning(task: object, metric: str) -> str:
    return TASK_MEANINGS.get(str(task), {}).get(metric) or METRIC_MEANINGS[metric]


def headline(content: Content) -> str:
    """What tuning bought against the best system that needs none, in one sentence."""
    tuned, reference = content.tuned, content.reference
    if tuned is None:
        return _headline_without_tuning(content)
    metric, word = content.primary_metric, metric_word(content.primary_metric, content.task)
    subject = f"Tuning with {method_title(tuned.method)}"
    after = format_score(metric, content.primary(tuned))
    if reference is None:
        return f"{subject} reached {word} {after}; no baseline was scored, so what tuning bought is unknown."
    before = f"{format_score(metric, content.primary(reference))} ({reference.short_title}, {_without(reference)})"
    contrast = content.contrast(tuned, reference)
    if contrast is None:
        return f"{subject} took {word} from {before} to {after}; the difference was not tested."
    verb = _verb(contrast)
    change = f"{subject} {verb} {word} from {before} to {after}"
    return f"{change}: {format_contrast(contrast)}, {_verdict(content, contrast)}"


def truth_title(content: Content) -> str:
    """What stands beside that which base and tuned model write."""
    return "Reference" if content.task == "seq2seq" else "The row goes on"


def contrast_words(contrast: Contrast) -> str:
    """A difference with its verdict."""
    return f"{format_contrast(contrast)}, {contrast.verdict}"


def _without(reference: System) -> str:
    return "no tuning" if reference.kind == "baseline" else "before tuning"


def _verb(contrast: Contrast) -> str:
    """`took` claims nothing: an inconclusive difference was neither raised nor lowered."""
    if contrast.verdict == "inconclusive" or not contrast.difference:
        return "took"
    return "raised" if contrast.difference > 0 else "lowered"


def _verdict(content: Content, contrast: Contrast) -> str:
    rows = f"{format_count(len(content.rows))} rows"
    if contrast.verdict == "inconclusive":
        shown = format_difference(contrast.metric, contrast.minimum_detectable_difference, signed=False)
        return f"inconclusive: this test set of {rows} could have shown a difference of {shown}."
    p_value = format_p_value(contrast.p_adjusted)
    p_value = f"p {p_value}" if p_value.startswith("<") else f"p = {p_value}"
    if contrast.verdict == "better":
        return f"better ({p_value} after correction, {rows})."
    if contrast.verdict == "worse":
        return f"worse ({p_value} after correction, {rows}): this tuning did harm; use the simpler system."
    return f"{contrast.verdict}."


def _headline_without_tuning(content: Content) -> str:
    reasons = [str(failure.get("reason")) for failure in content.failures]
    method = method_title(content.study.get("method")) if content.study.get("method") else "the adapter"
    if reasons:
        first = " ".join(reasons[0].split()).rstrip(".")
        first = first if len(first) <= _REASON_CHARACTERS else first[:_REASON_CHARACTERS] + "…"
        more = f" (and {len(reasons) - 1} more)" if len(reasons) > 1 else ""
        start = f"Tuning with {method} failed, so there is no tuned system: {first}{more}."
    else:
        start = "No tuned system was scored, so there is nothing to say about tuning."
    if content.reference is None:
        return start
    value = format_score(content.primary_metric, content.primary(content.reference))
    word = metric_word(content.primary_metric, content.task)
    return f"{start} Best without tuning: {content.reference.short_title}, {word} {value}."


def notes(content: Content) -> list[str]:
    """What a reader must know to read the headline rightly."""
    found = []
    base, tuned = content.base, content.tuned
    contrast = content.contrast(tuned, base)
    if base and contrast and base is not content.reference:
        found.append(
            f"Against the {base.title} the difference is {format_contrast(contrast)}. Most tutorials report this one; "
            + (
                "a random head has learnt nothing, so it says little about what tuning bought."
                if base.name == "untrained-head"
                else "a system that needs no tuning does better than the base."
            )
        )
    others = sum(system.kind == "tuned" for system in content.systems) - 1
    if tuned and others > 0:
        found.append(f"{tuned.title} was chosen among {others + 1} tuned systems by its validation rows.")
    leaked = content.data.get("leaked_test_rows")
    if leaked:
        found.append(
            f"{format_count(leaked)} of {format_count(len(content.rows))} test rows stand in the training "
            "data too (equal or nearly); the data section has the scores without them."
        )
    if reload_was_measured(content) and not content.reload.get("passed"):
        found.append("The saved adapter did not give the same outputs after reloading: do not use it.")
    if content.failures and tuned:
        found.append(f"{len(content.failures)} trial(s) failed; they are listed under training.")
    return found


def reload_was_measured(content: Content) -> bool:
    return content.reload.get("max_abs_logit_difference") is not None


def reload_sentence(content: Content) -> str:
    """Whether the adapter on disk is the adapter that was scored."""
    if not reload_was_measured(content):
        return "No adapter was saved, reloaded and compared in this run."
    largest = content.reload["max_abs_logit_difference"]
    shown = f"{largest:.1e}" if largest else "0"
    if content.reload.get("passed"):
        return (
            "The saved adapter was loaded in a fresh process and gave the same outputs: "
            f"the largest difference of any logit is {shown}."
        )
    return (
        "The saved adapter, loaded in a fresh process, did not give the same outputs: "
        f"the largest difference of any logit is {shown}."
    )
