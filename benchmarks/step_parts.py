"""Where a training step of Trimtab goes: each kernel, the matrix products of frozen weights, and the rest.

python benchmarks/step_parts.py --precision int8
python benchmarks/step_parts.py --train-data starter:reuters-r8 --max-length-tokens 512 --batch-rows 2
python benchmarks/step_parts.py --layers-to-transform upper-half     with the states below computed before
"""

from __future__ import annotations

import argparse
import time
import uuid
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch

from contenders import TrimtabContender, make_parser, make_study
from trimtab.data import prepare_data
from trimtab.engine.fused import native
from trimtab.engine.fused.linears import LinearGroup
from trimtab.models import quiet_libraries
from trimtab.progress import Silent
from trimtab.tuning import cached_prefix

STEPS = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="starter:smollm2-135m")
    parser.add_argument("--precision", choices=["float32", "int8"], default="float32")
    arguments, of_contender = parser.parse_known_args()
    quiet_libraries()
    name = "trimtab-int8" if arguments.precision == "int8" else "trimtab"
    contended = make_parser().parse_args([name, "train", "--model", arguments.model, *of_contender])
    study = make_study(contended)
    contender = TrimtabContender(study, prepare_data(study, Silent()), contended.batch_rows)
    with cached_prefix(study, contender.scorer, uuid.uuid4().hex, Silent()):  # of this process alone
        contender.attach()
        measure(contender)


def measure(contender: TrimtabContender) -> None:
    """Time steps whose batches were met before, part by part."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(name: Callable[..., str], function: Callable[..., Any]) -> Callable[..., Any]:
        def run(*given: Any, **named: Any) -> Any:
            started = time.perf_counter()
            try:
                return function(*given, **named)
            finally:
                seconds[name(*given)] += time.perf_counter() - started

        return run

    native._call = timed(lambda name, *_: f"kernel {name}", native._call)
    for method in ("forward", "backward"):
        wrapped = timed(lambda *_, m=method: f"linears {m}, LoRA's kernels included", getattr(LinearGroup, method))
        setattr(LinearGroup, method, wrapped)

    def step(number: int) -> None:
        batch = contender.plan[number]
        contender.state.optimizer.zero_grad()
        contender.scorer.task.loss(contender.scorer.choice.forward, batch).backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(list(contender.state.parameters.values()), 1.0)
        contender.state.optimizer.step()

    for number in range(STEPS):
        step(number)
    seconds.clear()
    started = time.perf_counter()
    for number in range(STEPS):
        step(number)
    print(f"step: {(time.perf_counter() - started) / STEPS * 1e3:.0f} ms")
    for name, spent in sorted(seconds.items(), key=lambda item: -item[1]):
        print(f"{spent / STEPS * 1e3:8.1f} ms  {name}")


if __name__ == "__main__":
    main()
