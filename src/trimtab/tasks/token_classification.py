"""Token classification: a tag a word, read at the word's first token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from trimtab.data import Row
from trimtab.errors import RowError
from trimtab.tasks.classification import classification_loss, name_labels
from trimtab.tasks.examples import Batch, EncodedRows, Example, Forward


class TokenClassification:
    """Words are joined by blanks and tokenised as the text that they are; cross-entropy over words."""

    name = "token_classification"
    peft_type = "TOKEN_CLS"
    auto_class = "AutoModelForTokenClassification"
    has_probe = True
    softens_head = True
    writes_answers = False

    def head_settings(self, label_names: Sequence[str]) -> dict[str, Any]:
        return name_labels(label_names)

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows:
        """Words past `max_length_tokens` are left out, for every system alike."""
        encoded = tokenizer([row.text for row in rows], truncation=True, max_length=max_length_tokens, verbose=False)
        types = encoded.get("token_type_ids")
        examples, truncated = [], 0
        for number, row in enumerate(rows):
            words, labels = row.words or [], row.labels or []
            places = _first_tokens(encoded[number], words, row.id)
            if not places:
                raise RowError(row.id, f"the tokenizer gives no token for {row.text[:40]!r}; remove the row")
            truncated += len(places) < len(words)
            examples.append(
                Example(encoded["input_ids"][number], types[number] if types else None, places, labels[: len(places)])
            )
        return EncodedRows(examples, list(range(len(rows))), truncated)

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        return classification_loss(forward.logits(batch), batch.labels)

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """Logits [words, tags]."""
        return forward.logits(batch)

    def summarise(self, outputs: Tensor, encoded: EncodedRows) -> dict[str, float]:
        """Figures to validate by; the highest `score` is best: the loss, since most words bear no tag."""
        labels = encoded.label_tensor
        loss = float(classification_loss(outputs, labels))
        return {"loss": loss, "accuracy": float((outputs.argmax(-1) == labels).double().mean()), "score": -loss}


def _first_tokens(encoding: Any, words: Sequence[str], row_id: str) -> list[int]:
    """The token in which each word begins, up to the first word that was cut off.

    Raises:
        RowError: a word has no token, though a later one has.
    """
    places: list[int] = []
    start = 0
    for number, word in enumerate(words):
        tokens = (encoding.char_to_token(place) for place in range(start, start + len(word)))
        first = next((token for token in tokens if token is not None), None)
        if first is not None and number > len(places):
            missing = words[len(places)]
            raise RowError(row_id, f"the tokenizer gives no token for word {len(places) + 1}, {missing!r}; remove it")
        if first is not None:
            places.append(first)
        start += len(word) + 1
    return places
