"""`kernels.cpp`, built once for this processor and called on tensors; `plain` has the same functions.

The library lies in Trimtab's cache folder, named by a hash of source, flags and processor.
"""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import platform
import shlex
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from trimtab.cache import cache_folder
from trimtab.engine.fused.formats import Heads, HeadShape, Masks, Product, Rotary, Rows, Want

_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno",
          "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]  # fmt: skip
if platform.machine() == "x86_64":
    _FLAGS.append("-mprefer-vector-width=512")


class _Product(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in Product._fields]


class _Want(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "quantised", "scale", "column_scale")]


def is_available() -> bool:
    """Whether the kernels can run here: Linux on a CPU, with a C++ compiler or a library built before."""
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, built where it is not there yet; None where that cannot be done."""
    if platform.system() != "Linux":
        return None
    source = resources.files("trimtab.engine.fused").joinpath("kernels.cpp").read_bytes()
    key = hashlib.sha256(b"\0".join([source, *map(str.encode, (*_FLAGS, _processor()))])).hexdigest()[:16]
    path = cache_folder() / "kernels" / f"{key}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        pass  # not there yet, or no longer fit for this system
    try:
        _build(source, path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(source: bytes, path: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        code, built = Path(folder) / "kernels.cpp", Path(folder) / "kernels.so"
        code.write_bytes(source)
        subprocess.run([*compiler, *_FLAGS, str(code), "-o", str(built)], check=True, capture_output=True, timeout=120)
        built.replace(path)


def _call(name: str, *arguments: Any) -> None:
    found = library()
    assert found is not None
    getattr(found, name)(*map(_as_c, arguments))


def _as_c(argument: Any) -> Any:
    if argument is None:
        return None
    if isinstance(argument, Tensor):
        return ctypes.c_void_p(argument.data_ptr())
    if isinstance(argument, Product):
        return _Product(*(None if part is None else part.data_ptr() for part in argument))
    if isinstance(argument, int):
        return ctypes.c_int64(argument)
    return ctypes.c_float(argument) if isinstance(argument, float) else argument


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _output(shape: Sequence[int], want: Want) -> tuple[Rows, _Want]:
    tokens, columns = shape
    values = _empty(tokens, columns) if want.values else None
    quantised = scale = None
    if want.quantised:
        quantised, scale = torch.empty(tokens, columns, dtype=torch.int8), _empty(tokens, 1)
    pointers = (None if part is None else part.data_ptr() for part in (values, quantised, scale, want.column_scale))
    return Rows(values, quantised, scale), _Want(*pointers)


def rows_of(values: Tensor, want: Want) -> Rows:
    if not want.quantised:
        return Rows(values)
    rows, pointers = _output(values.shape, want)
    _call("rows_of", values, *values.shape, pointers)
    return rows


def lora_forward(values: Tensor, lora_a: Tensor, adapters: int, masks: Masks) -> Tensor:
    small = _empty(len(values), len(lora_a))
    _call(
        "lora_forward", values, lora_a, *masks, len(values), adapters, len(lora_a) // adapters, values.shape[1], small
    )
    return small


def lora_backward(
    values: Tensor, lora_a: Tensor, adapters: int, by_small: Tensor, masks: Masks, needs_input: bool
) -> tuple[Tensor, Tensor | None]:
    by_a, delta = torch.empty_like(lora_a), torch.empty_like(values) if needs_input else None
    _call("lora_backward", values, lora_a, by_small, *masks, len(values), adapters, len(lora_a) // adapters,
          values.shape[1], by_a, delta)  # fmt: skip
    return by_a, delta


def add_product(residual: Tensor | None, product: Product) -> Tensor:
    if residual is None and product.is_plain:
        return product.values
    out = _empty(*product.values.shape)
    _call("add_product", residual, product, *out.shape, out)
    return out


def add_rms_norm(
    residual: Tensor, product: Product | None, weight: Tensor, eps: float, want: Want
) -> tuple[Tensor, Tensor, Rows]:
    tokens, columns = residual.shape
    total = residual if product is None else torch.empty_like(residual)
    inverse = _empty(tokens, 1)
    rows, pointers = _output((tokens, columns), want)
    given = _Product() if product is None else product
    _call("add_rms_norm", residual, given, weight, eps, tokens, columns, total, inverse, pointers)
    return total, inverse, rows


def rms_norm_backward(
    grad_residual: Tensor,
    grad: Product,
    total: Tensor,
    inverse: Tensor,
    weight: Tensor,
    want: Want,
) -> Rows:
    rows, pointers = _output(total.shape, want)
    _call("rms_norm_backward", grad_residual, grad, total, inverse, weight,
          *total.shape, pointers)  # fmt: skip
    return rows


def add_layer_norm(
    residual: Tensor, product: Product, weight: Tensor, bias: Tensor, eps: float, want: Want
) -> tuple[Tensor, Tensor, Tensor, Rows]:
    total, mean, inverse = torch.empty_like(residual), _empty(len(residual), 1), _empty(len(residual), 1)
    rows, pointers = _output(residual.shape, want)
    _call("add_layer_norm", residual, product, weight, bias, eps, *residual.shape, total, mean, inverse, pointers)
    return total, mean, inverse, rows


def layer_norm_backward(
    grad_residual: Tensor,
    grad: Product | None,
    total: Tensor,
    mean: Tensor,
    inverse: Tensor,
    weight: Tensor,
    want: Want,
) -> Rows:
    rows, pointers = _output(total.shape, want)
    given = _Product() if grad is None else grad
    _call("layer_norm_backward", grad_residual, given, total, mean, inverse, weight,
          *total.shape, pointers)  # fmt: skip
    return rows


def swiglu(gate_up: Product, want: Want) -> Rows:
    tokens, columns = gate_up.values.shape
    rows, pointers = _output((tokens, columns // 2), want)
    _call("swiglu", gate_up, tokens, columns // 2, pointers)
    return rows


def swiglu_backward(grad: Product, gate_up: Product, want: Want) -> Rows:
    tokens, columns = gate_up.values.shape
    rows, pointers = _output((tokens, columns), want)
    _call("swiglu_backward", grad, gate_up, tokens, columns // 2, pointers)
    return rows


def gelu(inner: Product, want: Want) -> Rows:
    rows, pointers = _output(inner.values.shape, want)
    _call("gelu", inner, *inner.values.shape, pointers)
    return rows


def gelu_backward(grad: Product, inner: Product, want: Want) -> Rows:
    rows, pointers = _output(inner.values.shape, want)
    _call("gelu_backward", grad, inner, *inner.values.shape, pointers)
    return rows


def rotate_heads(projected: Product, rotary: Rotary | None, shape: HeadShape) -> Tensor:
    out = _empty(*projected.values.shape)
    _call("rotate_heads", projected, *(rotary or (None, None)), len(out), *shape, out)
    return out


def rotate_heads_backward(grad: Tensor, rotary: Rotary | None, shape: HeadShape, want: Want) -> Rows:
    rows, pointers = _output(grad.shape, want)
    _call("rotate_heads_backward", grad, *(rotary or (None, None)), len(grad), *shape, pointers)
    return rows


def attention_forward(projected: Tensor, starts: Tensor, heads: Heads) -> tuple[Tensor, Tensor]:
    shape = heads.shape
    out, log_sums = _empty(len(projected), shape.query * shape.dim), _empty(len(projected), shape.query)
    _call("attention_forward", projected, starts, len(starts) - 1, *shape, float(heads.scaling), int(heads.causal),
          heads.window or 0, out, log_sums)  # fmt: skip
    return out, log_sums


def attention_backward(
    grad: Tensor, projected: Tensor, attended: Tensor, log_sums: Tensor, starts: Tensor, heads: Heads
) -> Tensor:
    out = torch.empty_like(projected)
    _call("attention_backward", grad, projected, attended, log_sums, starts, len(starts) - 1, *heads.shape,
          float(heads.scaling), int(heads.causal), heads.window or 0, out)  # fmt: skip
    return out
