"""What base and tuned model write, side by side, for the report."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import islice

from trimtab.adapters.loaded import LoadedAdapter
from trimtab.data import Row
from trimtab.evaluation.text_predictions import TextPredictions
from trimtab.generation import continue_prompts
from trimtab.models import load_base
from trimtab.progress import Progress
from trimtab.sampling import Sampling
from trimtab.sources import locate_model
from trimtab.tasks.causal_lm import prompt_of
from trimtab.tasks.examples import EncodedRows

# How many samples, tokens of a plain text's beginning, and tokens written.
_SAMPLES, _PROMPT_TOKENS, _SAMPLE_TOKENS = 4, 32, 48


def write_samples(
    adapter: LoadedAdapter, rows: Sequence[Row], encoded: EncodedRows, progress: Progress
) -> list[dict[str, str]]:
    """What the base and the tuned model write after the beginnings of some test rows."""
    progress.stage("Writing samples, base and tuned")
    tokenizer = adapter.scorer.base.tokenizer
    firsts = [encoded.rows.index(number) for number in range(min(_SAMPLES, len(rows)))]
    examples = [encoded.examples[place] for place in firsts]
    prompts = [prompt_of(example, _PROMPT_TOKENS) for example in examples]
    tuned = continue_prompts(adapter.peft_model, tokenizer, prompts, Sampling(_SAMPLE_TOKENS))
    base = _continue_with_base(adapter, prompts, progress)
    found = []
    for row, example, prompt, ours, theirs in zip(rows, examples, prompts, tuned, base, strict=False):
        truth = example.input_ids[len(prompt) :][:_SAMPLE_TOKENS]
        texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (prompt, truth))
        found.append(dict(zip(("id", "prompt", "truth", "base", "tuned"), (row.id, *texts, theirs, ours), strict=True)))
    return found


def sample_answers(rows: Sequence[Row], base: TextPredictions, tuned: TextPredictions) -> list[dict[str, str]]:
    """Sources and references of the first rows, and what the base and the tuned model answered."""
    pairs = zip(rows, base.written, tuned.written, strict=True)
    return [{"id": row.id, "prompt": row.text, "truth": row.completion or "", "base": theirs, "tuned": ours}
            for row, theirs, ours in islice(pairs, _SAMPLES)]  # fmt: skip


def _continue_with_base(adapter: LoadedAdapter, prompts: Sequence[Sequence[int]], progress: Progress) -> list[str]:
    tokenizer = adapter.scorer.base.tokenizer
    if adapter.is_whole_model:  # its base is gone
        longer = tokenizer if adapter.facts.get("new_tokens") else None
        source = locate_model(adapter.facts["base"], progress)
        base = load_base(source, adapter.scorer.task.auto_class, {}, 0, tokenizer=longer)
        return continue_prompts(base.model, tokenizer, prompts, Sampling(_SAMPLE_TOKENS))
    with adapter.disable():
        return continue_prompts(adapter.peft_model, tokenizer, prompts, Sampling(_SAMPLE_TOKENS))
