"""Every method of the table at its defaults: where it starts and where it ends on validation rows.

    python benchmarks/methods.py                       MiniLM on film reviews, about a quarter of an hour
    python benchmarks/methods.py --only lora ia3
    python benchmarks/methods.py --only adaption_prompt --model starter:smollm2-135m

A method that does not go into MiniLM is tuned on SmolLM2, some minutes more, and its row says so.

Writes benchmarks/results/methods.json and docs/methods.md.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import torch

from trimtab.data import PreparedData, prepare_data
from trimtab.engine.batches import TrainingPlan
from trimtab.engine.frozen import set_adapter_training, trainable_parameters
from trimtab.engine.loop import make_state
from trimtab.errors import MethodError
from trimtab.evaluation.evaluate import fit_probe, make_scorer
from trimtab.job import EncodedSplits
from trimtab.machine import describe_machine, package_versions, set_threads
from trimtab.methods import METHODS, get_method, learning_rate_of, make_schedule, virtual_tokens_of
from trimtab.models import load_base, quiet_libraries
from trimtab.progress import Silent
from trimtab.runs import TrialFolder
from trimtab.sources import locate_model
from trimtab.study_config import StudyConfig, build_study
from trimtab.tasks import get_task
from trimtab.tuning import run_loop, start_adapter

HERE = Path(__file__).parent
RESULTS, PAGE = HERE / "results" / "methods.json", HERE.parent / "docs" / "methods.md"
SETTINGS = {"max_train_rows": 1200, "max_validation_rows": 600, "num_train_epochs": 2}
MODEL = "starter:minilm-l6"
# For methods that do not go into MiniLM's build.
MODEL_OF = {"adaption_prompt": "starter:smollm2-135m"}
_MODEL_NAMES = {"starter:minilm-l6": "MiniLM-L6", "starter:smollm2-135m": "SmolLM2-135M"}


def tune_method(study: StudyConfig, data: PreparedData, work: Path) -> dict[str, Any]:
    """Start, best and speed of one method on validation rows; the base is loaded anew."""
    task, method = get_task(study.task), get_method(study.method)
    source = locate_model(study.model, Silent())
    base = load_base(source, task.auto_class, task.head_settings(data.label_names), study.seed)
    scorer = make_scorer(task, base, study.max_length_tokens, Silent(), virtual_tokens_of(study))
    encoded = EncodedSplits(
        train=scorer.encode(data.train),
        validation=scorer.encode(data.validation),
        test=scorer.encode(data.test[:1]),
        max_length_tokens=scorer.max_length_tokens,
    )
    probe = fit_probe(scorer, encoded.train, encoded.validation)
    torch.manual_seed(study.seed)
    peft_model = start_adapter(study, scorer, encoded, probe, TrialFolder(work / study.method), Silent())
    plan = TrainingPlan(scorer.collator(encoded.train), study.tokens_per_batch, study.seed, study.num_train_epochs)
    schedule = make_schedule(method, peft_model, len(plan))
    state = make_state(trainable_parameters(peft_model), 0.0, method.rates or (lambda name: 1.0), schedule)
    run_loop(study, scorer, peft_model, state, plan, encoded.validation, Silent())
    set_adapter_training(peft_model, False)
    points = [entry for entry in state.history if "validation_loss" in entry]
    return {
        "method": study.method,
        "model": study.model,
        "title": method.title,
        "learning_rate": learning_rate_of(study, peft_model),
        "trainable_parameters": peft_model.get_nb_trainable_parameters()[0],
        "start": points[0],
        "best": next(point for point in points if point["step"] == state.best_step),
        "last": points[-1],
        "least_loss": min(point["validation_loss"] for point in points[1:]),
        "tokens_per_second": state.tokens / state.seconds,
        "forward": scorer.choice.forward.name,
    }


_INTRODUCTION = """# Methods at their defaults

Where each method's training starts (the head at the linear probe) and where it ends, on 600 validation rows of
film reviews that also chose its best step; 1,200 training rows, 2 epochs, seed 0, float32, two cores.
It shows that the defaults learn, not which method is best: for that, compare test scores over several seeds.
LLaMA-Adapter does not go into MiniLM, so its row is SmolLM2's, and compares with no other.
`trimtab methods` shows what goes with which task and family.

```sh
python benchmarks/methods.py
```

| `--method` | what it is | on | trainable | rate | accuracy: start | best | loss: start | least | learnt | tokens/s |
| --- | --- | --- | --: | --: | --: | --: | --: | --: | --- | --: |"""


_LEGEND = """
Most go on from a fifth of the probe's logits (docs/decisions.md, 96); those that learnt less so keep all of it.

*Learnt*: some step after the start had the higher accuracy (or, of equals, the lesser loss). The linear probe's
start is the fitted probe itself; what is trained from there on is the head alone."""


def write_page(found: dict[str, Any]) -> None:
    lines = [_INTRODUCTION]
    for row in found["methods"]:
        start, best = row["start"], row["best"]
        learnt = "yes" if best["step"] else "loss only" if row["least_loss"] < start["validation_loss"] else "**no**"
        lines.append(
            f"| `{row['method']}` | {row['title']} | {_MODEL_NAMES.get(row['model'], row['model'])} "
            f"| {row['trainable_parameters']:,} | {row['learning_rate']:.3g} "
            f"| {start['validation_accuracy']:.1%} | {best['validation_accuracy']:.1%} "
            f"| {start['validation_loss']:.3f} "
            f"| {row['least_loss']:.3f} | {learnt} | {row['tokens_per_second']:,.0f} |"
        )
    lines.append(_LEGEND)
    PAGE.write_text("\n".join(lines) + "\n", encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--model", help=f"{MODEL}, or what the method asks for, if missing; another one writes nothing")
    parser.add_argument("--train-rows", type=int, help="fewer training rows, for a try; writes nothing")
    parser.add_argument("--learning-rate", type=float, help="try another rate; writes nothing")
    arguments = parser.parse_args()
    quiet_libraries()
    set_threads()
    warnings.simplefilter("ignore")
    kept = json.loads(RESULTS.read_text())["methods"] if RESULTS.is_file() else []
    rows = {row["method"]: {"model": MODEL} | row for row in kept}
    changes = {"learning_rate": arguments.learning_rate, "max_train_rows": arguments.train_rows}
    settings = SETTINGS | {name: value for name, value in changes.items() if value is not None}
    data = prepare_data(build_study(settings), Silent())
    with tempfile.TemporaryDirectory() as work:
        for name in arguments.only:
            own = MODEL_OF.get(name, MODEL)
            study = build_study(settings | {"method": name, "model": arguments.model or own})
            try:
                row = tune_method(study, data, Path(work))
            except MethodError as error:
                print(error)
                continue
            print(f"{name:17} start {row['start']['validation_accuracy']:.4f} {row['start']['validation_loss']:.4f}  "
                  f"best {row['best']['validation_accuracy']:.4f} at {row['best']['step']:.0f}  "
                  f"least loss {row['least_loss']:.4f}  last {row['last']['validation_loss']:.4f}  "
                  f"{row['tokens_per_second']:,.0f} tokens/s", flush=True)  # fmt: skip
            if settings == SETTINGS and study.model == own:  # after each: a run that breaks off loses nothing
                rows[name] = row
                found = {"machine": describe_machine(), "versions": package_versions(),
                         "methods": [rows[name] for name in METHODS if name in rows]}  # fmt: skip
                RESULTS.write_text(json.dumps(found, indent=1) + "\n")
                write_page(found)


if __name__ == "__main__":
    main()
