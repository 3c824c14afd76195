"""Which method cannot work on which task and family, with a word of the reason; all else has to."""

from __future__ import annotations

CONV1D = {"loha", "lokr", "oft", "boft", "hra", "miss", "c3a", "shira", "road"}
NO_LLAMA_ADAPTER = {"BERT", "RoBERTa", "DistilBERT", "Qwen2", "T5"}
ENCODERS = {"BERT", "RoBERTa", "DistilBERT"}


def expected_gap(method: str, task: str, family: str) -> str | None:
    """A word of the reason; None where it works."""
    if (task in ("causal_lm", "preference") and family in ENCODERS) or (task == "seq2seq") != (family == "T5"):
        return f"has no model for {task}"
    if method == "linear_probe" and task in ("causal_lm", "seq2seq", "preference"):
        return "this task keeps the model's own"
    if family == "GPT-2" and method in CONV1D:
        return "Conv1D"
    if method == "adaption_prompt" and family in NO_LLAMA_ADAPTER:
        return "Unsupported model type"
    if method == "prefix_tuning" and family == "DistilBERT":
        return "past key values"
    return None
