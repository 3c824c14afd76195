"""Adapter folders and their bases, loaded as a stranger would: checked before anything is read into memory."""

from __future__ import annotations

from pathlib import Path

from peft import PeftModel

from trimtab.adapters.adapter_set import KnownAdapter
from trimtab.adapters.files import check_folder, is_whole_model
from trimtab.adapters.loaded import LoadedAdapter
from trimtab.adapters.origin import find_base, load_tokenizer_of
from trimtab.adapters.switching import check_name, check_weights, copy_heads, weights_that_fit
from trimtab.engine.prepare import prepare_adapted
from trimtab.evaluation.evaluate import make_scorer
from trimtab.methods import WholeModel
from trimtab.models import BaseModel, load_base
from trimtab.progress import Progress, Silent
from trimtab.sources import locate_adapter
from trimtab.study_config import Quantize
from trimtab.tasks import get_task


def load_adapter(
    path: str | Path,
    base: str | None = None,
    *,
    name: str = "default",
    quantize: Quantize | None = None,
    progress: Progress | None = None,
) -> LoadedAdapter:
    """Load an adapter folder and the base that it was trained on, as a stranger would.

    Args:
        path: a folder that Trimtab saved, or any of peft's; or a Hub id, owner/name or owner/name@revision.
        base: where the base is, if not where it was: a folder, a Hub id, or starter:NAME.
        name: what the adapter is called, where others join it.
        quantize: hold the base in 8 or 4 bits; as it was trained, if missing.

    Raises:
        AdapterError: damaged or strange files; nothing was loaded.
        SourceError: the base cannot be had, or is another one.
    """
    folder, listener = locate_adapter(path), progress or Silent()
    check_name(name, ())
    source, facts = find_base(folder, check_folder(folder), base, listener)
    task = get_task(facts["task"], facts.get("beta", 0.1))
    head = task.head_settings(facts["label_names"])
    bits = "none" if is_whole_model(folder) else quantize or facts.get("quantize", "none")
    tokenizer = load_tokenizer_of(folder, facts)
    model = load_base(source, task.auto_class, head, facts.get("seed", 0), bits, tokenizer)
    scorer = make_scorer(task, model, facts["max_length_tokens"], listener, facts.get("virtual_tokens", 0))
    known = KnownAdapter(folder, facts, task, scorer.max_length_tokens)
    if is_whole_model(folder):
        return LoadedAdapter(name, known, scorer, WholeModel(model.model).eval())
    heads = copy_heads(model.model, model.new_modules)
    peft_model = read_adapter(model, folder, name)
    scorer.choice = prepare_adapted(peft_model, scorer.choice)
    return LoadedAdapter(name, known, scorer, peft_model, heads)


def read_adapter(base: BaseModel, folder: Path, name: str = "default") -> PeftModel:
    """The base's model with the adapter of a folder around it, ready to score.

    Raises:
        AdapterError: weights are missing, left over, or of another shape.
    """
    with weights_that_fit(folder):
        peft_model: PeftModel = PeftModel.from_pretrained(base.model, str(folder), adapter_name=name)
    check_weights(peft_model, folder, name, base.has_more_tokens)
    return peft_model.eval()
