"""The C++ of `kernels/`, built once for this processor and called on tensors; `plain` has the same functions.

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
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from trimtab.cache import cache_folder
from trimtab.engine.fused.formats import Adapter, Heads, HeadShape, LowRank, Masks, Rotary, Rows, Want, Weight, tile

_FLAGS = ["-std=c++17", "-O3", "-march=native", "-fopenmp", "-fPIC", "-shared", "-fno-math-errno",
          "-fno-trapping-math", "-fno-signed-zeros", "-fassociative-math", "-freciprocal-math"]  # fmt: skip
if platform.machine() == "x86_64":
    _FLAGS.append("-mprefer-vector-width=512")


class _Want(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("values", "quantised", "scale", "column_scale")]


class _Adapter(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("a", "b")),
        ("scaling", ctypes.c_float),
        *((name, ctypes.c_int64) for name in ("start", "stop")),
        *((name, ctypes.c_void_p) for name in ("by_a", "by_b")),
    ]


class _Extra(ctypes.Structure):
    _fields_ = [*((name, ctypes.c_void_p) for name in ("addend", "bias", "small", "lora_b")), ("rank", ctypes.c_int64)]

    @classmethod
    def of(cls, addend: Tensor | None, bias: Tensor | None = None, low_rank: LowRank | None = None) -> _Extra:
        small, b = low_rank or (None, None)
        pointers = (None if part is None else part.data_ptr() for part in (addend, bias, small, b))
        return cls(*pointers, 0 if b is None else len(b))


def is_available() -> bool:
    """Whether the kernels can run here: Linux on a CPU, with a C++ compiler or a library built before."""
    return library() is not None


@functools.cache
def library() -> ctypes.CDLL | None:
    """The loaded library, built where it is not there yet; None where that cannot be done."""
    if platform.system() != "Linux":
        return None
    path = cache_folder() / "kernels" / f"{build_key()}.so"
    try:
        return ctypes.CDLL(str(path))
    except OSError:
        pass  # not there yet, or no longer fit for this system
    try:
        _build(_sources(), path)
        return ctypes.CDLL(str(path))
    except (OSError, subprocess.SubprocessError):
        return None


def build_key() -> str:
    """Names the kernels as they are built here: their sources, flags and processor."""
    named = [part for name, code in _sources().items() for part in (name.encode(), code)]
    return hashlib.sha256(b"\0".join([*named, *map(str.encode, (*_FLAGS, _processor()))])).hexdigest()[:16]


def _sources() -> dict[str, bytes]:
    folder = resources.files("trimtab.engine.fused").joinpath("kernels")
    return {file.name: file.read_bytes() for file in sorted(folder.iterdir(), key=lambda file: file.name)}


def _processor() -> str:
    """What `-march=native` depends on."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return "".join(sorted({line for line in lines if line.startswith(("flags", "Features", "model name"))}))


def _build(sources: dict[str, bytes], path: Path) -> None:
    compiler = shlex.split(os.environ.get("CXX", "")) or [shutil.which("g++") or "c++"]
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=path.parent) as folder:
        for name, code in sources.items():
            (Path(folder) / name).write_bytes(code)
        built = Path(folder) / "kernels.so"
        parts = [str(Path(folder) / name) for name in sources if name.endswith(".cpp")]
        subprocess.run([*compiler, *_FLAGS, *parts, "-o", str(built)], check=True, capture_output=True, timeout=120)
        built.replace(path)


def _call(name: str, *arguments: Any) -> None:
    found = library()
    assert found is not None
    # By exact type: with a thousand calls a step, looking along base classes is felt.
    getattr(found, name)(*[_AS_C.get(type(argument), _as_it_is)(argument) for argument in arguments])


def _as_it_is(argument: Any) -> Any:
    return argument


def _pointer(tensor: Tensor) -> ctypes.c_void_p:
    return ctypes.c_void_p(tensor.data_ptr())


_AS_C: dict[type, Callable[[Any], Any]] = {
    Tensor: _pointer,
    nn.Parameter: _pointer,
    int: ctypes.c_int64,
    float: ctypes.c_float,
}


def _empty(*shape: int) -> Tensor:
    return torch.empty(shape, dtype=torch.float32)


def _output(shape: Sequence[int], want: Want) -> tuple[Rows, _Want]:
    tokens, columns = shape
    values = _empty(tokens, columns) if want.values else None
    quantised = scale = None
    if want.quantised:
        quantised, scale = torch.empty(tokens, columns, dtype=torch.uint8), _empty(tokens, 1)
    pointers = (None if part is None else part.data_ptr() for part in (values, quantised, scale, want.column_scale))
    return Rows(values, quantised, scale), _Want(*pointers)


def rows_of(values: Tensor, want: Want) -> Rows:
    if not want.quantised:
        return Rows(values)
    rows, pointers = _output(values.shape, want)
    _call("rows_of", values, *values.shape, pointers)
    return rows


def has_int8() -> bool:
    """Whether this processor multiplies int8 by instructions made for it."""
    found = library()
    return found is not None and bool(found.has_int8())


def has_amx() -> bool:
    """Whether products go to the matrix unit of newer Intel processors (AMX)."""
    found = library()
    return found is not None and bool(found.has_amx())


def use_amx(use: bool) -> None:
    """Send products there, or not, from now on; where there is none, nothing changes."""
    _call("use_amx", int(use))


def has_bfloat16() -> bool:
    """Whether attention is faster in bfloat16 here."""
    found = library()
    return found is not None and bool(found.has_bfloat16())


def lay_out(values: Tensor) -> Tensor:
    """A weight [columns, inputs] as `linear` reads it."""
    return tile(values)


def linear(
    rows: Rows,
    weight: Weight,
    bias: Tensor | None = None,
    low_rank: LowRank | None = None,
    addend: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    return _multiply(rows, weight, False, _Extra.of(addend, bias, low_rank), out)


def linear_backward(rows: Rows, weight: Weight, addend: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    return _multiply(rows, weight, True, _Extra.of(addend), out)


def _multiply(rows: Rows, weight: Weight, backward: bool, extra: _Extra, out: Tensor | None) -> Tensor:
    inner, columns = weight.shape if backward else weight.shape[::-1]
    if weight.int8 is None:
        assert rows.values is not None
        out = _empty(len(rows.values), columns) if out is None else out
        _call("product", rows.values, weight.tiles, int(backward), len(out), columns, inner, extra, out)
        return out
    assert rows.quantised is not None
    out = _empty(len(rows.quantised), columns) if out is None else out
    scale: Tensor | None = weight.int8.column_scale
    panels = weight.int8.forward
    if backward:  # the scales of the weight's columns were folded into the rows
        panels, scale = weight.int8.backward, None
    _call("product_int8", rows.quantised, rows.scale, *panels, scale, len(out), columns, inner, extra, out)
    return out


def lora_forward(values: Tensor, adapters: Sequence[Adapter], columns: int, masks: Masks) -> LowRank:
    rank, inputs = adapters[0].a.shape
    all_ranks = rank * len(adapters)
    small, b = _empty(len(values), all_ranks), _empty(all_ranks, columns)
    parts = _parts(adapters, masks)
    _call("lora_forward", values, parts, len(adapters), rank, inputs, columns, *masks, len(values), small, b)
    return LowRank(small, b)


def lora_backward(
    values: Tensor, adapters: Sequence[Adapter], low_rank: LowRank, masks: Masks, grad: Tensor, needs_input: bool,
    addend: Tensor | None = None,
) -> tuple[list[Tensor], Tensor | None]:  # fmt: skip
    rank, inputs = adapters[0].a.shape
    found = [torch.empty_like(part) for adapter in adapters for part in (adapter.a, adapter.b)]
    delta = torch.empty_like(values) if needs_input else None
    _call("lora_backward", values, _parts(adapters, masks, found), len(adapters), rank, inputs, grad.shape[1], *masks,
          len(values), grad, low_rank.small, addend, delta)  # fmt: skip
    return found, delta


def _parts(adapters: Sequence[Adapter], masks: Masks, gradients: Sequence[Tensor] = ()) -> ctypes.Array[_Adapter]:
    pointers: list[int | None] = [gradient.data_ptr() for gradient in gradients]
    pointers = pointers or [None] * (2 * len(adapters))
    parts = (
        _Adapter(part.a.data_ptr(), part.b.data_ptr(), part.scaling * masks.scale, part.start, part.stop, by_a, by_b)
        for part, by_a, by_b in zip(adapters, pointers[::2], pointers[1::2], strict=True)
    )
    return (_Adapter * len(adapters))(*parts)


def rms_norm(values: Tensor, weight: Tensor, eps: float, want: Want) -> tuple[Tensor, Rows]:
    inverse = _empty(len(values), 1)
    rows, pointers = _output(values.shape, want)
    _call("rms_norm", values, weight, eps, *values.shape, inverse, pointers)
    return inverse, rows


def rms_norm_backward(
    grad_residual: Tensor, grad: Tensor, values: Tensor, inverse: Tensor, weight: Tensor, want: Want
) -> Rows:
    rows, pointers = _output(values.shape, want)
    _call("rms_norm_backward", grad_residual, grad, values, inverse, weight, *values.shape, pointers)
    return rows


def layer_norm(values: Tensor, weight: Tensor, bias: Tensor, eps: float, want: Want) -> tuple[Tensor, Tensor, Rows]:
    mean, inverse = _empty(len(values), 1), _empty(len(values), 1)
    rows, pointers = _output(values.shape, want)
    _call("layer_norm", values, weight, bias, eps, *values.shape, mean, inverse, pointers)
    return mean, inverse, rows


def layer_norm_backward(
    grad: Tensor, values: Tensor, mean: Tensor, inverse: Tensor, weight: Tensor, want: Want
) -> Rows:
    rows, pointers = _output(values.shape, want)
    _call("layer_norm_backward", grad, values, mean, inverse, weight, *values.shape, pointers)
    return rows


def swiglu(gate_up: Tensor, want: Want) -> Rows:
    tokens, columns = gate_up.shape
    rows, pointers = _output((tokens, columns // 2), want)
    _call("swiglu", gate_up, tokens, columns // 2, pointers)
    return rows


def swiglu_backward(grad: Tensor, gate_up: Tensor, want: Want) -> Rows:
    tokens, columns = gate_up.shape
    rows, pointers = _output((tokens, columns), want)
    _call("swiglu_backward", grad, gate_up, tokens, columns // 2, pointers)
    return rows


def gelu(inner: Tensor, want: Want) -> Rows:
    rows, pointers = _output(inner.shape, want)
    _call("gelu", inner, *inner.shape, pointers)
    return rows


def gelu_backward(grad: Tensor, inner: Tensor, want: Want) -> Rows:
    rows, pointers = _output(inner.shape, want)
    _call("gelu_backward", grad, inner, *inner.shape, pointers)
    return rows


def rotate_heads(projected: Tensor, rotary: Rotary | None, shape: HeadShape) -> Tensor:
    """In place."""
    if rotary is not None:
        _call("rotate_heads", projected, *rotary, len(projected), *shape)
    return projected


def rotate_heads_backward(grad: Tensor, rotary: Rotary | None, shape: HeadShape, want: Want) -> Rows:
    rows, pointers = _output(grad.shape, want)
    _call("rotate_heads_backward", grad, *(rotary or (None, None)), len(grad), *shape, pointers)
    return rows


def attention_forward(projected: Tensor, starts: Tensor, heads: Heads, bfloat16: bool = False) -> tuple[Tensor, Tensor]:
    shape = heads.shape
    out, sums = _empty(len(projected), shape.query * shape.dim), _empty(len(projected), shape.query, 2)
    _call("attention_forward", projected, starts, len(starts) - 1, *_of_heads(heads), int(bfloat16), out, sums)
    return out, sums


def attention_backward(
    grad: Tensor, projected: Tensor, sums: Tensor, starts: Tensor, heads: Heads, bfloat16: bool = False
) -> Tensor:
    out = torch.empty_like(projected)
    _call("attention_backward", grad, projected, sums, starts, len(starts) - 1, *_of_heads(heads), int(bfloat16), out)
    return out


class _Shape(ctypes.Structure):
    _fields_ = [(name, ctypes.c_int64) for name in HeadShape._fields]


class _Mask(ctypes.Structure):
    _fields_ = [("causal", ctypes.c_int64), ("window", ctypes.c_int64)]


def _of_heads(heads: Heads) -> tuple[_Shape, float, _Mask]:
    return _Shape(*heads.shape), float(heads.scaling), _Mask(int(heads.causal), heads.window or 0)
