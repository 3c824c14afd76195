"""What this machine has, measured: cores, memory, versions and matrix-multiplication rates."""

from __future__ import annotations

import math
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

_PACKAGES = ("trimtab", "torch", "transformers", "peft", "datasets", "accelerate", "tokenizers", "safetensors",
             "scikit-learn", "scipy", "statsmodels", "numpy")  # fmt: skip
# How many times as fast as float32 int8 has to multiply for the rest of its work to be repaid.
INT8_PAYS = 2.0
# Rows and sides of a middle-sized layer on a typical batch.
_ROWS, _INNER, _OUTER = 512, 576, 1536


def package_versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for name in _PACKAGES:
        try:
            versions[name] = version(name)
        except PackageNotFoundError:
            continue
    return versions


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and accelerator, as the manifest keeps them."""
    import psutil
    import torch

    return {
        "processor": _processor_name(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": psutil.cpu_count(logical=False) or os.cpu_count(),
        "threads": torch.get_num_threads(),
        "memory_bytes": psutil.virtual_memory().total,
        "platform": platform.platform(),
        "accelerator": torch.cuda.get_device_name(0) if torch.cuda.is_available() else None,
    }


def _processor_name() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass  # not Linux: platform knows
    return platform.processor() or platform.machine()


def set_threads() -> int:
    """Let torch and the kernels use as many threads as there are physical cores for this process; returns how many.

    OMP_NUM_THREADS, where it is set, is left alone.
    """
    import psutil
    import torch

    if not os.environ.get("OMP_NUM_THREADS"):
        physical = psutil.cpu_count(logical=False) or os.cpu_count() or 1
        usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else physical
        torch.set_num_threads(max(1, min(physical, usable, _cores_by_quota())))
    return torch.get_num_threads()


def _cores_by_quota() -> int:
    """What a container's share of the processor comes to, rounded up; large where there is none."""
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no Linux container, or no limit ("max")
        return 1 << 20


def git_state() -> str | None:
    """Commit of the working folder, with `-dirty` where it has changes; None outside a repository."""
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty", "--abbrev=12"],
            capture_output=True,
            text=True,
            check=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def measure_gemm_rates() -> dict[str, float | None]:
    """Multiply-adds counted as two, in GFLOP/s (GOP/s for int8), median; None where refused."""
    import torch

    left, right = torch.randn(_ROWS, _INNER), torch.randn(_OUTER, _INNER)
    narrow, narrow_right = left.bfloat16(), right.bfloat16()
    whole = torch.randint(-127, 128, left.shape, dtype=torch.int8)
    whole_right = torch.randint(-127, 128, right.shape, dtype=torch.int8)
    work: dict[str, Callable[[], Any]] = {
        "float32": lambda: left @ right.t(),
        "bfloat16": lambda: narrow @ narrow_right.t(),
        "int8": lambda: torch._int_mm(whole, whole_right.t()),
    }
    return {name: _rate(work[name]) for name in work}


def _rate(run: Callable[[], Any]) -> float | None:
    try:
        run()
    except RuntimeError:  # this build or processor has no such kernel
        return None
    return 2 * _ROWS * _INNER * _OUTER / median_seconds(run) / 1e9


def median_seconds(run: Callable[[], Any]) -> float:
    """Of one call."""
    run()
    seconds: list[float] = []
    # Half a second is long enough to wake a processor up; slow kernels get three runs.
    while len(seconds) < 3 or sum(seconds) < 0.5:
        started = time.perf_counter()
        run()
        seconds.append(time.perf_counter() - started)
    return statistics.median(seconds)
