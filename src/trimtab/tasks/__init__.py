"""What is learnt: how rows become tokens, where the head sits, what the loss is."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol

from torch import Tensor

from trimtab.data import Row
from trimtab.tasks.causal_lm import CausalLM
from trimtab.tasks.classification import Classification
from trimtab.tasks.examples import Batch, EncodedRows, Forward
from trimtab.tasks.multilabel import Multilabel
from trimtab.tasks.preference import Preference
from trimtab.tasks.regression import Regression
from trimtab.tasks.seq2seq import Seq2Seq
from trimtab.tasks.token_classification import TokenClassification

__all__ = ["TASKS", "Task", "get_task", "smooth_outputs"]


class Task(Protocol):
    """A task's rows, loss and outputs; all else is the same for every task.

    `peft_type` and `auto_class` are peft's and transformers' names for it; `has_probe` says whether
    its head is new, and starts at a linear probe; `softens_head` whether that head is made less sure before the first
    step, which outputs that are values cannot be; `writes_answers` whether its systems are judged by texts.
    """

    @property
    def name(self) -> str: ...

    @property
    def peft_type(self) -> str: ...

    @property
    def auto_class(self) -> str: ...

    @property
    def has_probe(self) -> bool: ...

    @property
    def softens_head(self) -> bool: ...

    @property
    def writes_answers(self) -> bool: ...

    def head_settings(self, label_names: Sequence[str]) -> dict[str, Any]:
        """What the config of a model with a new head has to say; empty where the model's own head stays."""
        ...

    def encode(self, rows: Sequence[Row], tokenizer: Any, model: Any, max_length_tokens: int) -> EncodedRows: ...

    def loss(self, forward: Forward, batch: Batch) -> Tensor:
        """Mean over the batch's positions, with a graph to the parameters."""
        ...

    def outputs(self, forward: Forward, batch: Batch) -> Tensor:
        """[positions, columns], float32: what scores are made from, and what a reload is held against."""
        ...

    def summarise(self, outputs: Tensor, encoded: EncodedRows) -> dict[str, float]:
        """Figures of the validation rows that gave `outputs`; the highest `score` is best."""
        ...


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Classification(),
        Multilabel(),
        Regression(),
        TokenClassification(),
        CausalLM(),
        Seq2Seq(),
        Preference(),
    )
}


def get_task(name: str, beta: float | None = None) -> Task:
    """The task called `name`, one of the study's choices; `beta` is DPO's."""
    return Preference(beta) if name == "preference" and beta is not None else TASKS[name]


def smooth_outputs(task: Task, outputs: Tensor) -> Tensor:
    """The outputs that small differences of a model change by little, by which two models are compared.

    Language models' other column says whether the likeliest token is right, which a tie turns over.
    """
    return outputs if task.has_probe else outputs[:, :1]
