"""The contenders, each a process of its own: Trimtab's engine, and `Trainer` + `peft`.

`training.py` starts them and gives them turns through their standard input, so that all meet the
same noise of the machine. What they print is JSON, a line for each turn.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import sys
import time
import uuid
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from trimtab.data import PreparedData, prepare_data
from trimtab.engine.batches import TrainingPlan
from trimtab.engine.frozen import NumberFormat, set_adapter_training, trainable_parameters
from trimtab.engine.loop import make_state
from trimtab.engine.prepare import prepare_adapted
from trimtab.evaluation.evaluate import fit_probe, make_scorer
from trimtab.methods import attach_adapter, find_layers, learning_rate_of
from trimtab.models import load_base, quiet_libraries
from trimtab.precision import use_float32, use_precision
from trimtab.progress import Silent
from trimtab.sources import locate_model
from trimtab.study_config import StudyConfig, build_study
from trimtab.tasks import get_task
from trimtab.tasks.examples import EncodedRows
from trimtab.tuning import cached_prefix, choose_checkpointing, free_memory, run_loop, start_head_at_probe

WARM_UP_STEPS = 3
CONTENDERS = ("trimtab", "trimtab-int8", "trimtab-int8-checkpointed", "dynamic", "grouped")


def say(**figures: Any) -> None:
    print(json.dumps(figures), flush=True)


class Turns:
    """Times steps: after the warm-up, each says what it took and waits for its next turn."""

    def __init__(self) -> None:
        self.warm_up = WARM_UP_STEPS

    def start_step(self) -> None:
        self.started = time.perf_counter()

    def end_step(self, tokens: int) -> None:
        seconds = time.perf_counter() - self.started
        self.warm_up -= 1
        if self.warm_up <= 0:
            say(tokens=tokens, seconds=seconds, peak_bytes=peak_bytes())
            if sys.stdin.readline().strip() != "go":
                sys.stdout.flush()
                os._exit(0)


def make_study(arguments: argparse.Namespace) -> StudyConfig:
    """LoRA r 8 on query and value, alpha 16, dropout 0.05, for both contenders."""
    return build_study(
        {
            "model": arguments.model,
            "task": arguments.task,
            "train_data": arguments.train_data,
            "max_length_tokens": arguments.max_length_tokens,
            "layers_to_transform": arguments.layers_to_transform,
            "max_train_rows": arguments.train_rows,
            "max_validation_rows": arguments.validation_rows,
            "max_test_rows": 1000,
            "max_probe_positions": arguments.max_probe_positions,
            "num_train_epochs": arguments.epochs,
            "evaluations_per_epoch": 4,
            "early_stopping_patience": 100,
            "seed": arguments.seed,
            "precision": "int8" if "int8" in arguments.contender else "float32",
            "gradient_checkpointing": "on" if arguments.contender.endswith("checkpointed") else "off",
        }
    )


def mean_length(encoded: EncodedRows) -> float:
    return encoded.tokens / len(encoded.examples)


def peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


class TrimtabContender:
    def __init__(self, study: StudyConfig, data: PreparedData, batch_rows: int) -> None:
        self.study, self.data, self.batch_rows = study, data, batch_rows
        task = get_task(study.task)
        self.precision: NumberFormat = "int8" if study.precision == "int8" else "float32"
        base = load_base(
            locate_model(study.model, Silent()), task.auto_class, task.head_settings(data.label_names), study.seed
        )
        self.scorer = make_scorer(task, base, study.max_length_tokens, Silent())
        self.train, self.validation, self.test = map(self.scorer.encode, (data.train, data.validation, data.test))
        self.is_ready = False  # to score in its precision

    def attach(self) -> None:
        torch.manual_seed(self.study.seed)
        base = self.scorer.base
        self.peft_model = attach_adapter(base.model, self.study, base.new_modules)
        self.scorer.choice = prepare_adapted(self.peft_model, self.scorer.choice)
        self.state = make_state(trainable_parameters(self.peft_model), self.study.weight_decay)
        # Half a text over the mean fills the batches to the peer's tokens on average.
        budget = round((self.batch_rows + 0.5) * mean_length(self.train))
        self.plan = TrainingPlan(self.scorer.collator(self.train), budget, self.study.seed, self.study.num_train_epochs)
        set_adapter_training(self.peft_model, True)
        choose_checkpointing(self.study, self.scorer, self.train, self.plan, Silent())
        batch = self.scorer.first_batch(self.train)
        use_precision(self.precision, self.scorer.task, self.scorer.choice.forward, batch, Silent(), training=True)
        free_memory(self.peft_model)

    def use_precision_for_scoring(self) -> None:
        batch = self.scorer.first_batch(self.train)
        use_precision(self.precision, self.scorer.task, self.scorer.choice.forward, batch, Silent(), training=False)

    def training_turns(self, turns: Turns) -> None:
        self.attach()
        collate = self.plan.__class__.__getitem__

        class TurnPlan(TrainingPlan):
            """The same batches; asking for one starts the clock of its step."""

            def __getitem__(self, step: int) -> Any:
                turns.start_step()
                return collate(self, step)

        self.plan.__class__ = TurnPlan
        tokens = [sum(len(self.train.examples[row]) for row in rows) for rows in self.plan.steps]

        def on_step(state: Any, figures: dict[str, float]) -> None:
            turns.end_step(tokens[state.step - 1])

        from trimtab.engine.loop import LoopSettings, train

        forward = self.scorer.choice.forward
        settings = LoopSettings(learning_rate_of(self.study, self.peft_model), 0.06, 1.0, 10**9, 10**9)
        train(
            self.state,
            self.plan,
            lambda batch: self.scorer.task.loss(forward, batch),
            lambda: {"loss": 0.0, "score": 0.0},
            settings,
            on_step,
        )

    def evaluation_turn(self, rows: int) -> tuple[int, float]:
        if not self.is_ready:
            self.use_precision_for_scoring()
            self.is_ready = True
        scores = self.scorer.score(self.test.first(rows))
        return scores.tokens, scores.seconds

    def learn(self) -> dict[str, Any]:
        """Everything from the loaded base on counts: features, probe, validation, steps."""
        with cached_prefix(self.study, self.scorer, uuid.uuid4().hex, Silent()):  # of this process alone
            return self._learn()

    def _learn(self) -> dict[str, Any]:
        started = time.perf_counter()
        self.use_precision_for_scoring()
        train, validation = (rows.sample(self.study.max_probe_positions) for rows in (self.train, self.validation))
        probe = fit_probe(self.scorer, train, validation)
        self.attach()
        start_head_at_probe(self.scorer.base.model, probe)
        before_steps = time.perf_counter() - started
        reached: list[dict[str, float]] = []
        state = self.state

        class Listener(Silent):
            def note(self, text: str) -> None:
                reached.append(
                    {
                        "seconds": time.perf_counter() - started,
                        "seconds_but_validations": before_steps + state.seconds,
                        "accuracy": float(text.rpartition("accuracy ")[2]),
                    }
                )

        run_loop(self.study, self.scorer, self.peft_model, self.state, self.plan, self.validation, Listener())
        set_adapter_training(self.peft_model, False)
        use_float32(self.scorer.choice.forward)
        seconds = time.perf_counter() - started
        logits = self.scorer.score(self.test).outputs
        return {
            "seconds": seconds,
            "seconds_but_validations": before_steps + self.state.seconds,
            "seconds_of_steps": self.state.seconds,
            "validation": reached,
            "predicted": logits.argmax(-1).tolist(),
        }


class TrainerContender:
    """What people run: `transformers.Trainer` on a `peft` model, float32, padded to each batch's longest."""

    def __init__(self, study: StudyConfig, data: PreparedData, batch_rows: int, grouped: bool) -> None:
        import transformers
        from peft import LoraConfig, get_peft_model
        from transformers import AutoTokenizer, DataCollatorForSeq2Seq, DataCollatorWithPadding

        self.study, self.batch_rows, self.grouped = study, batch_rows, grouped
        task = get_task(study.task)
        location = locate_model(study.model, Silent()).location
        torch.manual_seed(study.seed)
        self.tokenizer = AutoTokenizer.from_pretrained(location)
        labels = {"num_labels": len(data.label_names)} if data.label_names else {}
        model = getattr(transformers, task.auto_class).from_pretrained(location, dtype=torch.float32, **labels)
        layers = find_layers(model, study.layers_to_transform)
        config = LoraConfig(task_type=task.peft_type, r=8, lora_alpha=16, lora_dropout=0.05, layers_to_transform=layers)
        self.model = get_peft_model(model, config)
        self.splits = {name: self.encode(getattr(data, name)) for name in ("train", "validation", "test")}
        self.labels = {name: [row.label for row in getattr(data, name)] for name in self.splits}
        collator = DataCollatorWithPadding if data.label_names else DataCollatorForSeq2Seq  # the latter pads labels
        self.collator = collator(self.tokenizer)

    def encode(self, rows: Any) -> Any:
        import datasets

        length = self.study.max_length_tokens
        if self.study.task == "causal_lm":  # the same blocks as Trimtab's; transformers shifts the labels itself
            blocks = get_task("causal_lm").encode(rows, self.tokenizer, None, length).examples
            ids = [block.input_ids for block in blocks]
            masks = [[1] * len(block) for block in ids]
            lengths = list(map(len, ids))
            return datasets.Dataset.from_dict(
                {"input_ids": ids, "attention_mask": masks, "labels": ids, "length": lengths}
            )
        encoded = self.tokenizer([row.text for row in rows], truncation=True, max_length=length)
        lengths = [len(ids) for ids in encoded["input_ids"]]
        return datasets.Dataset.from_dict({**encoded, "labels": [row.label for row in rows], "length": lengths})

    def trainer(self, callbacks: list[Any], collator: Any) -> Any:
        from transformers import Trainer, TrainingArguments

        arguments = TrainingArguments(
            output_dir=os.path.join(os.environ.get("TMPDIR", "/tmp"), "trimtab-benchmark"),
            per_device_train_batch_size=self.batch_rows,
            per_device_eval_batch_size=self.batch_rows,
            num_train_epochs=self.study.num_train_epochs,
            learning_rate=learning_rate_of(self.study, self.model),
            lr_scheduler_type="cosine",
            warmup_steps=0.06,
            seed=self.study.seed,
            train_sampling_strategy="group_by_length" if self.grouped else "random",
            length_column_name="length",
            report_to=[],
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        return Trainer(
            self.model, arguments, train_dataset=self.splits["train"], data_collator=collator, callbacks=callbacks
        )

    def training_turns(self, turns: Turns) -> None:
        from transformers import TrainerCallback

        tokens: list[int] = []

        class Callback(TrainerCallback):  # type: ignore[misc]
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                turns.start_step()

            def on_step_end(self, args: Any, state: Any, *_: Any, **__: Any) -> None:
                turns.end_step(tokens[state.global_step - 1])

        def collate(rows: list[dict[str, Any]]) -> Any:
            tokens.append(sum(len(row["input_ids"]) for row in rows))
            return self.collator(rows)

        self.trainer([Callback()], collate).train()

    def evaluation_turn(self, rows: int) -> tuple[int, float]:
        if not hasattr(self, "predictor"):
            self.predictor = self.trainer([], self.collator)
        part = self.splits["test"].select(range(rows))
        started = time.perf_counter()
        self.predictor.predict(part)
        return sum(part["length"]), time.perf_counter() - started

    def learn(self) -> dict[str, Any]:
        """Only its training counts; scoring happens outside of the clock."""
        trainer = self.trainer([], self.collator)
        started = time.perf_counter()
        trainer.train()
        seconds = time.perf_counter() - started
        trainer.args.train_sampling_strategy = "random"  # grouping by length would order what is predicted, too
        predicted = {name: self.predict(trainer, name) for name in ("validation", "test")}
        right = sum(
            int(p == label) for p, label in zip(predicted["validation"], self.labels["validation"], strict=True)
        )
        accuracy = right / len(self.labels["validation"])
        last = {"seconds": seconds, "accuracy": accuracy}
        return {"seconds": seconds, "validation": [last], "predicted": predicted["test"].tolist()}

    def predict(self, trainer: Any, split: str) -> Any:
        found = trainer.predict(self.splits[split])
        if found.label_ids.tolist() != self.labels[split]:
            raise SystemExit("the Trainer's predictions do not stand in the order of the rows")
        return found.predictions.argmax(-1)


def make_parser() -> argparse.ArgumentParser:
    """What a contender is told; `make_study` reads it."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("contender", choices=CONTENDERS)
    parser.add_argument("work", choices=["train", "evaluate", "learn"])
    parser.add_argument("--model", default="starter:minilm-l6")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rows", type=int, default=160, help="rows scored in a turn")
    parser.add_argument("--task", default="classification")
    parser.add_argument("--train-data", default="starter:rotten-tomatoes")
    parser.add_argument("--max-length-tokens", type=int, default=128)
    parser.add_argument("--batch-rows", type=int, default=16, help="texts in a batch, on average")
    parser.add_argument("--layers-to-transform", default="all")
    parser.add_argument("--train-rows", type=int, default=2000)
    parser.add_argument("--validation-rows", type=int, default=400)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument(
        "--max-probe-positions", type=int, default=StudyConfig.model_fields["max_probe_positions"].default
    )
    return parser


def main() -> None:
    arguments = make_parser().parse_args()
    quiet_libraries()
    study = make_study(arguments)
    data = prepare_data(study, Silent())
    contender: Any
    if arguments.contender.startswith("trimtab"):
        contender = TrimtabContender(study, data, arguments.batch_rows)
    else:
        contender = TrainerContender(study, data, arguments.batch_rows, arguments.contender == "grouped")
    if arguments.work == "learn":
        say(**contender.learn(), labels=[row.label for row in data.test])
    elif arguments.work == "train":
        contender.training_turns(Turns())
    else:
        while True:
            tokens, seconds = contender.evaluation_turn(arguments.rows)
            say(tokens=tokens, seconds=seconds, peak_bytes=peak_bytes())
            if sys.stdin.readline().strip() != "go":
                break


if __name__ == "__main__":
    main()
