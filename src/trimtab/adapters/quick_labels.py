"""Labels from int8 where they are sure, and from float32 where rounding could have changed them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from torch import Tensor

from trimtab.data import Row
from trimtab.engine.forward import PackedForward
from trimtab.engine.fused import native
from trimtab.engine.fused.stack import LayerStack
from trimtab.evaluation.unlabelled import SAY, Record
from trimtab.precision import use_float32
from trimtab.progress import Progress
from trimtab.tasks.examples import EncodedRows

# Rows that are computed in both formats to begin with.
_MEASURED_ROWS = 256

if TYPE_CHECKING:
    from trimtab.adapters.loaded import LoadedAdapter


class QuickLabels:
    """Predicts in int8, and anew in float32 where a row's two likeliest labels lie so close that int8 may be wrong.

    How close that is was seen on the first rows, computed in both: the largest error of any two labels' distance.
    The frozen layers' weights stay in memory in both formats.
    """

    def __init__(self, adapter: LoadedAdapter, first_rows: Sequence[Row], progress: Progress) -> None:
        stack = _stack_of(adapter)
        assert stack is not None
        self.adapter, self.stack = adapter, stack
        self.rows = self.again = 0
        measured = first_rows[:_MEASURED_ROWS]
        use_float32(adapter.scorer.choice.forward)
        encoded = adapter.scorer.encode(measured)
        exact = self._score(encoded)
        self._exact = stack.formats()
        adapter.compute_in("int8", measured, progress)
        self._rounded = stack.formats()
        errors = self._score(encoded) - exact
        self.bound = float((errors.amax(1) - errors.amin(1)).max())
        progress.note(f"logits apart by {self.bound:.3f} or less in int8 are computed anew in float32")

    @staticmethod
    def serves(adapter: LoadedAdapter) -> bool:
        """Whether there is something to gain: one label a row, layers in one function, and fast int8 products."""
        stack = _stack_of(adapter)
        is_one_label = adapter.scorer.task.name == "classification"
        return is_one_label and stack is not None and stack.fits() and native.has_int8()

    def predict_rows(self, rows: Sequence[Row]) -> list[Record]:
        """As `LoadedAdapter.predict_rows`."""
        task, encoded = self.adapter.scorer.task, self.adapter.scorer.encode(rows)
        self.stack.use(self._rounded)
        outputs = self._score(encoded)
        likeliest = outputs.topk(2, dim=1).values
        unsure = (likeliest[:, 0] - likeliest[:, 1] <= self.bound).nonzero().squeeze(1)
        self.rows += len(rows)
        self.again += len(unsure)
        self.stack.use(self._exact)  # and so they stay for whoever comes next
        if len(unsure):
            outputs[unsure] = self._score(encoded.take(unsure.tolist()))
            self._exact = self.stack.formats()  # what a layer's first product in float32 laid out
        return SAY[task.name](outputs, encoded, rows, self.adapter.label_names)

    def _score(self, encoded: EncodedRows) -> Tensor:
        return self.adapter.scorer.score(encoded).outputs


def _stack_of(adapter: LoadedAdapter) -> LayerStack | None:
    forward = adapter.scorer.choice.forward
    return forward.stack if isinstance(forward, PackedForward) else None
