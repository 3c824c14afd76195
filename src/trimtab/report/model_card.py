"""The model card of an adapter, in the Hub's format: scores with intervals, what it was held against, how to use it."""

from __future__ import annotations

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from trimtab.methods.table import METHODS
from trimtab.report import tables, wording
from trimtab.report.content import Content, System, Trial
from trimtab.report.markdown import facts_list, plain, table_grid
from trimtab.report.number_format import format_count, format_score, format_score_interval
from trimtab.sources import hub_id_of
from trimtab.starters import SMOLLM2

# The Hub's names of the tasks, and the class with which stock peft reads an adapter of each.
_HUB_TASKS = {
    "classification": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "multilabel": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "regression": ("text-classification", "AutoPeftModelForSequenceClassification"),
    "token_classification": ("token-classification", "AutoPeftModelForTokenClassification"),
    "causal_lm": ("text-generation", "AutoPeftModelForCausalLM"),
    "preference": ("text-generation", "AutoPeftModelForCausalLM"),
    "seq2seq": ("text2text-generation", "AutoPeftModelForSeq2SeqLM"),
}

_FILES = (".csv", ".tsv", ".json", ".jsonl", ".parquet", ".conll", ".txt", ".gz", ".bz2", ".xz", ".zip", ".zst")


def render_model_card(content: Content, trial: Trial) -> str | None:
    """The whole README.md of a trial's adapter; None where it was not scored."""
    system = content.system(trial.name)
    if system is None:
        return None
    base, data = _name_of(_base_of(content, trial)), _name_of(content.study.get("train_data"))
    method = wording.method_title(system.method)
    contrasts = [content.contrast(system, other) for other in content.untuned]
    verdicts = [(other.title, f"{wording.contrast_words(found)}") for other, found in
                zip(content.untuned, contrasts, strict=True) if found]  # fmt: skip
    parts = [
        f"---\n{_metadata(content, trial, system).to_yaml().strip()}\n---",
        f"# {plain(base)}, tuned with {plain(method)} on {plain(data)}",
        plain(wording.headline(content)) if system is content.tuned else "",
        "## Scores",
        f"On {format_count(len(content.rows))} test rows that it was not trained on, with 95 % intervals.",
        table_grid(tables.score_table(content)),
        *(["Differences on the same rows, after correction for the number of them:", facts_list(verdicts)]
          if verdicts else []),
        "## How to use it", _usage(content),
        "## Training", facts_list(tables.training_facts(trial)),
        "## Limits", _limits(content, trial, system),
    ]  # fmt: skip
    return "\n\n".join(part for part in parts if part) + "\n"


def _base_of(content: Content, trial: Trial) -> str:
    return str(trial.base or content.study.get("model"))


def _name_of(source: object) -> str:
    """A source without the folders of the machine that it lay on; Hub ids and starters as they are."""
    text = str(source)
    is_path = text.startswith(("/", ".", "~")) or text.count("/") > 1 or Path(text).suffix in _FILES
    return Path(text).name if is_path else text


def _metadata(content: Content, trial: Trial, system: System) -> ModelCardData:
    data = _name_of(content.study.get("train_data"))
    task, _ = _HUB_TASKS.get(content.task, ("text-classification", ""))
    results = [
        EvalResult(
            task_type=task,
            dataset_type=data,
            dataset_name=data,
            dataset_split="test",
            metric_type=name,
            metric_value=score.value,
            metric_args={"confidence": 0.95, "low": score.low, "high": score.high},
        )
        for name, score in system.scores.items()
        if score.value is not None
    ]
    return ModelCardData(
        model_name=f"{content.name}-{system.name}",
        base_model=hub_id_of(_base_of(content, trial)),
        library_name="peft",
        pipeline_tag=task,
        tags=["trimtab", str(system.method)],
        metrics=[name for name, score in system.scores.items() if score.value is not None],
        eval_results=results or None,
    )


def _usage(content: Content) -> str:
    _, auto_class = _HUB_TASKS.get(content.task, ("", "AutoPeftModel"))
    names = content.data.get("label_names") or []
    labels = f", num_labels={len(names)}" if names else ", num_labels=1" if content.task == "regression" else ""
    if not _is_adapter(content):
        return "It holds every weight of the model: `from_pretrained` of plain transformers reads this folder."
    lines = [
        "In stock peft, with FOLDER for where this file lies:", "",
        "```python", f"from peft import {auto_class}", "from transformers import AutoTokenizer", "",
        f'model = {auto_class}.from_pretrained("FOLDER"{labels})',
        'tokenizer = AutoTokenizer.from_pretrained("FOLDER")',
        *_pair_lines(content), "```",
    ]  # fmt: skip
    writes = content.task in ("causal_lm", "preference")
    command = 'generate FOLDER --prompt "…" --compare' if writes else "predict FOLDER --input rows.csv --out found.csv"
    tokens = plain(content.study.get("new_tokens") or "")
    told = [
        f"Its tokenizer has tokens that its base does not know: {tokens}. {auto_class} makes room for them; a base",
        "that you load yourself needs `resize_token_embeddings(len(tokenizer))` first.", "",
    ] if tokens else []  # fmt: skip
    return "\n".join([*lines, "", *told, f"Or with Trimtab: `trimtab {command}`."])


def _is_adapter(content: Content) -> bool:
    row = METHODS.get(str(content.study.get("method")))
    return row is None or row.is_adapter


def _pair_lines(content: Content) -> list[str]:
    """How two texts are put to the tokenizer, where the adapter reads pairs."""
    if not (content.data.get("columns") or {}).get("text_pair"):
        return []
    separator = content.data.get("pair_separator")
    together = "first, second" if separator is None else f"first + {json.dumps(separator)} + second"
    return [f'inputs = tokenizer({together}, return_tensors="pt")']


def _limits(content: Content, trial: Trial, system: System) -> str:
    rows = format_count(content.data.get("train_rows"))
    told = [
        f"It learnt from {rows} rows, and its scores hold for texts that are drawn as the test rows were; on "
        "others they were not measured.",
        "Its faults are those of its base and of its training rows; the run's report.html shows the rows that it gets "
        "wrong.",
    ]
    base = _base_of(content, trial)
    stands_on_base = _is_adapter(content)
    if stands_on_base and base == SMOLLM2:
        told.append(
            f"Its base, {base}, is {hub_id_of(base)} as a 4-bit file holds it: around the weights on the Hub it "
            "answers nearly, not exactly, as scored here. Trimtab finds the base that it was trained on."
        )
    elif stands_on_base and hub_id_of(base) is None:
        told.append(
            f"Its base is a folder, {_name_of(base)}: elsewhere, stock peft reads it by "
            "PeftModel.from_pretrained(base, FOLDER), with the base loaded before."
        )
    reference, metric = content.reference, content.primary_metric
    if reference is not None:
        score = reference.scores.get(metric)
        told.append(
            f"The best system that needs no tuning, {reference.short_title}, reaches "
            f"{format_score(metric, content.primary(reference))} {format_score_interval(metric, score)}."
        )
    leaked = content.data.get("leaked_test_rows")
    if leaked:
        told.append(f"{format_count(leaked)} test rows stand in its training rows too, equal or nearly.")
    return "\n".join(f"- {plain(line)}" for line in told)
