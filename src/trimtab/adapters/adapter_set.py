"""A base with one adapter around it, or several of which one is active: load, switch, combine, merge, save."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor

from trimtab.adapters.files import check_folder, is_whole_model, write_facts
from trimtab.adapters.merged import check_mergeable, merge_layer
from trimtab.adapters.origin import guess_facts
from trimtab.adapters.saving import name_base, write_weights
from trimtab.adapters.switching import (
    attach,
    base_alone,
    check_name,
    combine,
    set_active,
)
from trimtab.engine.forward import usable_length
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import AdapterError, suggest
from trimtab.evaluation.evaluate import Scorer
from trimtab.methods import WholeModel
from trimtab.precision import use_float32
from trimtab.progress import Silent
from trimtab.runs import write_folder
from trimtab.sources import locate_adapter
from trimtab.tasks import Task, get_task


@dataclass(frozen=True)
class KnownAdapter:
    """A loaded adapter: where it came from, and what was written down when it was saved."""

    path: Path
    facts: Mapping[str, Any]
    task: Task
    max_length_tokens: int

    @property
    def classes(self) -> int:
        """Columns of its head; 0 where the base brings its own."""
        return int(self.task.head_settings(self.facts["label_names"]).get("num_labels", 0))


class AdapterSet:
    """A base with one adapter around it, or several of which one is active, in eval mode."""

    def __init__(
        self, name: str, known: KnownAdapter, scorer: Scorer, peft_model: Any,
        heads: Mapping[str, Mapping[str, Tensor]] | None = None,
    ) -> None:  # fmt: skip
        self.known = {name: known}
        self.heads = heads or {}  # the base's own, by module
        self.active = name
        self.scorer = scorer
        self.peft_model = peft_model
        self._is_disabled = False
        self._undo: list[Callable[[], None]] = []  # gives each merged layer its weights back

    @property
    def names(self) -> list[str]:
        """The adapters that are loaded."""
        return list(self.known)

    @property
    def path(self) -> Path:
        return self.known[self.active].path

    @property
    def facts(self) -> Mapping[str, Any]:
        """What was written down when the active adapter was saved."""
        return self.known[self.active].facts

    @property
    def label_names(self) -> list[str]:
        names: list[str] = self.facts["label_names"]
        return names

    @property
    def is_whole_model(self) -> bool:
        return isinstance(self.peft_model, WholeModel)

    def load(self, path: str | Path, name: str) -> None:
        """Load one more adapter of the same base, under a name of its own; the active one stays active.

        Raises:
            AdapterError: damaged files, another base, another method, or a name that is taken.
        """
        folder = locate_adapter(path)
        self._check_unmerged()
        check_name(name, self.names)
        if self.is_whole_model or is_whole_model(folder):
            raise AdapterError(f"{folder}: whole models stand alone, each with weights of its own; load it by itself")
        known = self._know(folder)
        try:
            attach(self.peft_model, folder, name, known.classes, self.scorer.base.has_more_tokens)
            self.known[name] = known
        finally:
            self._settle()

    def _know(self, folder: Path) -> KnownAdapter:
        facts, mine = check_folder(folder), self.known[self.active]
        if not facts:
            _, facts = guess_facts(folder, self.scorer.base.source.name, Silent())
        task = get_task(facts["task"], facts.get("beta", 0.1))
        if task.auto_class != mine.task.auto_class:
            raise AdapterError(
                f"{folder} is a {task.name} adapter, which needs another kind of head than {mine.task.name}; "
                "load it by itself"
            )
        if facts.get("base_sha256", self._base_sha256) != self._base_sha256:
            raise AdapterError(
                f"{folder} was trained on {facts['base']} with SHA-256 {facts['base_sha256'][:12]}…, and the base "
                f"that is loaded has {(self._base_sha256 or 'none known')[:12]}…; load it by itself"
            )
        if list(facts.get("new_tokens", [])) != list(mine.facts.get("new_tokens", [])):
            raise AdapterError(f"{folder} has other tokens than {mine.path} in its vocabulary; load it by itself")
        reserved = facts.get("virtual_tokens", 0)
        length = usable_length(self.scorer.base.model, facts["max_length_tokens"], reserved)
        return KnownAdapter(folder, facts, task, length)

    @property
    def _base_sha256(self) -> str | None:
        return next((known.facts["base_sha256"] for known in self.known.values() if "base_sha256" in known.facts), None)

    def _settle(self) -> None:
        """Fast layers for what is new, and the active adapter for all."""
        self.scorer.choice = prepare_adapted(self.peft_model, self.scorer.choice)
        self.peft_model.eval()
        self.switch(self.active)

    def switch(self, name: str) -> None:
        """Make another of the loaded adapters the active one.

        Raises:
            AdapterError: none is loaded under that name.
        """
        self._check_unmerged()
        self._check_loaded([name])
        if not self.is_whole_model:
            set_active(self.peft_model, name)
        self.scorer, self.active = self._scorer_of(name), name

    def unload(self, name: str) -> None:
        """Forget an adapter; where it was active, the first of the others is from now on.

        Raises:
            AdapterError: none is loaded under that name, or no other.
        """
        self._check_loaded([name])
        others = [other for other in self.names if other != name]
        if not others:
            raise AdapterError(f"{name!r} is the only adapter here; drop the whole object, or load another first")
        self._check_unmerged()
        if name == self.active:
            self.switch(others[0])
        self.peft_model.delete_adapter(name)
        del self.known[name]

    def save(self, folder: Path, **more: Any) -> None:
        """Write the active adapter as a folder of its own, in peft's format, with what is known of it and `more`.

        Raises:
            AdapterError: a folder that holds something else than an adapter.
        """
        base, held = self.scorer.base, list(folder.iterdir()) if folder.is_dir() else []
        if held and not any(path.suffix == ".safetensors" for path in held):
            raise AdapterError(f"{folder} holds something else ({held[0].name}); give a folder of its own")

        def write(target: Path) -> None:
            name_base(self.peft_model, base, self.active, self.facts.get("base_commit"))
            write_weights(
                self.peft_model, base.new_modules, target, name=self.active, has_more_tokens=base.has_more_tokens
            )
            (target / "README.md").unlink(missing_ok=True)  # peft's: a form to fill in, with a path of this machine
            base.tokenizer.save_pretrained(target)
            write_facts(target, {**self.facts, **more})

        write_folder(folder, write, replace=bool(held))

    def merge(self) -> None:
        """Take the active adapter into copies of the base's weights: one product a layer, until `unmerge`.

        Raises:
            AdapterError: a method that cannot be merged, or a quantised base.
        """
        self._check_unmerged()
        check_mergeable(self.peft_model, self.path)
        use_float32(self.scorer.choice.forward)  # copies of the weights in other formats do not follow
        if getattr(self.scorer.base.model, "is_quantized", False):
            raise AdapterError(f"{self.path}: its base is held in fewer bits; trimtab merge takes it in full precision")
        try:
            for layer in self.peft_model.modules():
                if isinstance(layer, BaseTunerLayer):
                    self._undo.append(merge_layer(layer))
        except AdapterError:
            self.unmerge()
            raise

    def unmerge(self) -> None:
        """Give the base its very weights back, to the bit."""
        while self._undo:
            self._undo.pop()()

    def _check_unmerged(self) -> None:
        if self._undo:
            raise AdapterError(f"{self.active!r} is merged into the base; unmerge it first")

    def _check_enabled(self) -> None:
        if self._is_disabled:
            raise AdapterError("the adapters are switched off here, so none can be asked by name")

    def _check_loaded(self, names: Sequence[str]) -> None:
        for name in names:
            if name not in self.known:
                raise AdapterError(f"no adapter {name!r} is loaded{suggest(name, self.names)}; {', '.join(self.names)}")

    def combine(
        self,
        weights: Mapping[str, float],
        name: str,
        combination_type: str = "linear",
        density: float | None = None,
    ) -> None:
        """Add an adapter that is a weighted combination of loaded ones, which say the same labels.

        Args:
            weights: of each adapter, by name.
            combination_type: by peft's names; its heads become the weighted mean of theirs.
            density: the share of each that is kept, for ties, dare and magnitude pruning (Yadav et al. 2023; Yu et
                al. 2024).

        Raises:
            AdapterError: other labels, a method without combinations, or settings that do not fit.
        """
        self._check_unmerged()
        check_name(name, self.names)
        self._check_loaded(list(weights))
        parts = [self.known[part] for part in weights]
        if not parts:
            raise AdapterError("no adapters to combine; give a weight to each of at least one")
        if len({(part.task.name, tuple(part.facts["label_names"])) for part in parts}) > 1:
            raise AdapterError(f"{', '.join(weights)} say other labels or do other tasks, so they cannot be combined")
        if not hasattr(self.peft_model.base_model, "add_weighted_adapter"):
            raise AdapterError(f"{self.path}: peft combines LoRA adapters; this one is {self.peft_model.peft_type}")
        facts = {key: value for key, value in parts[0].facts.items() if key not in ("files", "seed", "score")}
        facts["combined"] = {"weights": dict(weights), "combination_type": combination_type, "density": density}
        try:
            combine(self.peft_model, weights, name, combination_type, density, parts[0].classes)
            self.known[name] = replace(parts[0], facts=facts)
        finally:
            self._settle()

    def _scorer_of(self, name: str) -> Scorer:
        known = self.known[name]
        return replace(self.scorer, task=known.task, max_length_tokens=known.max_length_tokens)

    @contextmanager
    def disable(self) -> Iterator[None]:
        """The base alone, for as long as this lasts; its head is the one that it came with.

        Raises:
            AdapterError: a fully tuned model, whose base is gone; or an adapter that says other labels than that head.
        """
        if self.is_whole_model:
            raise AdapterError(f"{self.path} is a whole model, without a base to go back to")
        self._check_unmerged()
        classes = self.known[self.active].classes
        if classes and classes != self.scorer.base.model.config.num_labels:
            raise AdapterError(
                f"the base's head was made for {self.scorer.base.model.config.num_labels} labels, and {self.active!r} "
                f"says {classes}; switch to an adapter of as many"
            )
        self._is_disabled = True
        try:
            with base_alone(self.peft_model, self.heads):
                yield
        finally:
            self._is_disabled = False
