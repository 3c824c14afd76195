"""Tiny models that the engine's own loop tuned, and what holds of them once saved and read back."""

from copy import deepcopy

import pytest
import torch
from peft import PeftModel

from trimtab.adapters import save_start, write_weights
from trimtab.adapters.merged import check_mergeable, check_written, merged_while_computing, write_merged
from trimtab.engine.batches import Collator, TrainingPlan
from trimtab.engine.forward import PaddedForward, PromptForward, choose_forward
from trimtab.engine.frozen import set_adapter_training, trainable_parameters
from trimtab.engine.loop import LoopSettings, make_state, train
from trimtab.engine.prepare import prepare_adapted
from trimtab.errors import AdapterError
from trimtab.methods import attach_adapter, get_method, make_schedule
from trimtab.progress import Silent
from trimtab.support import build_tiny_model, head_names, make_rows, small_study
from trimtab.tasks import get_task


class Trained:
    """A tiny model that was tuned by the engine's own loop on four texts."""

    def __init__(self, method, task, family, folder, **changes):
        self.task, self.family = get_task(task), family
        self.base = build_tiny_model(self.task, family)
        enlarge_head(self.base)
        self.rows = make_rows(self.task, self.base)
        self.examples = self.rows.examples
        self.start = self.alone(self.base)
        torch.manual_seed(1)
        study = small_study(method, task).model_copy(update={"lora_dropout": 0.0} | changes)
        choice = choose_forward(self.base, 0, 16, False)
        heads = head_names(self.base) if self.task.has_probe else []
        self.untrained_heads = {name: deepcopy(self.base.get_submodule(name).state_dict()) for name in heads}
        self.peft_model = attach_adapter(self.base, study, heads)
        save_start(self.peft_model, folder / "start")
        self.choice = prepare_adapted(self.peft_model, choice)
        set_adapter_training(self.peft_model, False)
        self.untrained = self.outputs()
        self.losses = [self.loss()]
        self.train(get_method(method))
        self.losses.append(self.loss())
        self.trained = self.outputs()
        write_weights(
            self.peft_model, heads, folder / "adapter", folder / "start" if (folder / "start").is_dir() else None
        )

    def collator(self, together=1):
        return Collator(self.examples, self.choice.forward.packed, self.choice.position_offset, 0, together)

    def batch(self):
        collator = self.collator(self.rows.together)
        return collator.collate(range(len(collator.lengths)))

    def loss(self):
        with torch.no_grad():
            return float(self.task.loss(self.choice.forward, self.batch()))

    def outputs(self):
        """Logits at the read positions, text by text in the examples' order."""
        with torch.no_grad():
            found = [self.choice.forward.logits(self.collator().collate([i])) for i in range(len(self.examples))]
        return torch.cat(found)

    def alone(self, model, peft_model=None):
        """Each text by itself through the stock forward of transformers and peft."""
        model.set_attn_implementation("eager")
        is_prompt = peft_model is not None and peft_model.active_peft_config.is_prompt_learning
        if is_prompt and self.family != "T5":
            forward = PromptForward(peft_model)
            forward.model = model
        else:
            forward = PaddedForward(peft_model if is_prompt else model)
        collator = Collator(self.examples, False, 0, 0)
        with torch.no_grad():
            return torch.cat([forward.logits(collator.collate([i])) for i in range(len(self.examples))])

    def train(self, method):
        plan = TrainingPlan(self.collator(self.rows.together), 64, 0, 8)
        schedule = make_schedule(method, self.peft_model, len(plan))
        parameters = trainable_parameters(self.peft_model)
        state = make_state(parameters, 0.0, method.rates or (lambda name: 1.0), schedule)
        settings = LoopSettings(min(method.learning_rate, 5e-3), 0.0, 1.0, 100, 100)
        set_adapter_training(self.peft_model, True)
        compute = lambda batch: self.task.loss(self.choice.forward, batch)  # noqa: E731
        train(state, plan, compute, lambda: {"score": float(state.step), "loss": 0.0}, settings)
        set_adapter_training(self.peft_model, False)
        if schedule is not None:
            schedule.finish()

    def reload(self, folder):
        """The base anew, and the folder as stock peft reads it."""
        base = self.fresh_base()
        if (folder / "model.safetensors").is_file():
            return type(base).from_pretrained(folder).eval(), None
        return base, PeftModel.from_pretrained(base, folder).eval()

    def fresh_base(self):
        base = build_tiny_model(self.task, self.family)
        enlarge_head(base)
        return base

    def holds_merged(self, peft_model, folder):
        """What is merged, and read by plain transformers, gives what was trained; or the method says that it cannot."""
        if not hasattr(peft_model.base_model, "merge_and_unload"):
            with pytest.raises(AdapterError, match="changes none, so it cannot be merged"):
                check_mergeable(peft_model, folder)
            return
        folder.mkdir()
        before = {name: value.clone() for name, value in peft_model.state_dict().items()}
        with merged_while_computing(peft_model):
            assert close(self.alone(peft_model.get_base_model()), self.trained, 1e-4)
        write_merged(peft_model, folder, torch.float32, Silent())
        after = peft_model.state_dict()  # each layer was merged, and unmerged again
        assert before.keys() == after.keys()
        assert all(torch.equal(after[name], value) for name, value in before.items())
        plain, info = type(peft_model.get_base_model()).from_pretrained(folder, output_loading_info=True)
        assert not info["missing_keys"]
        assert not info["unexpected_keys"]
        check_written(peft_model, plain, torch.float32)
        assert close(self.alone(plain.eval()), self.trained, 1e-4)


def enlarge_head(model):
    """Stock weights start so small that a difference would hide."""
    with torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        for name, parameter in model.named_parameters():
            if parameter.ndim > 1:
                parameter.normal_(0, 0.2 if "embed" in name else 0.15, generator=generator)


def close(ours, theirs, bound=1e-5):
    return float((ours - theirs).abs().max()) <= bound * max(1.0, float(theirs.abs().max()))
