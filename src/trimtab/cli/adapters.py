"""Adapters at work: predict, generate, merge."""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from trimtab.cli import flags
from trimtab.cli.application import AsJson, Quiet, app
from trimtab.errors import InputError

# The rows that adapters are compared on.
_Data = Annotated[
    str | None,
    typer.Option(help="Rows with labels to compare on; if missing, the test rows of the (first) adapter's run."),
]
_TextColumn = Annotated[str | None, typer.Option(help="Column of --data; as it was trained, or by name, if missing.")]
_LabelColumn = Annotated[str | None, typer.Option(help="Column of --data; as it was trained, or by name, if missing.")]


_Format = Annotated[
    Literal["jsonl", "csv", "parquet"] | None, typer.Option("--format", help="Told by the name of --out.")
]
_Base = Annotated[str | None, typer.Option(help="Where the base is, if not where it was.")]
_Writer = Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter folder of a language model, or a Hub id.")]
_Prompts = Annotated[str | None, typer.Option("--input", help="Prompts as rows of a file, or - for standard input.")]
_PromptColumn = Annotated[
    str | None, typer.Option(help="Column with the prompt or chat; as it was trained, or by name, if missing.")
]
_Chat = Annotated[Literal["auto", "on", "off"], typer.Option(help="Use the chat template; auto: if trained on chats.")]
_IS_CHAT = {"auto": None, "on": True, "off": False}
_Quantized = Annotated[
    Literal["none", "8bit", "4bit"] | None,
    typer.Option("--quantize", help="Hold the base in 8 or 4 bits (extra quant); as it was trained, if missing."),
]


@app.command()
def predict(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter folder, or a Hub id.")],
    source: Annotated[
        str, typer.Option("--input", help="A file of rows as for training, without labels; - for standard input.")
    ] = "-",
    out: Annotated[str, typer.Option(help="File for the predictions; - for standard output.")] = "-",
    output_format: _Format = None,
    text_column: Annotated[
        str | None, typer.Option(help="Column with the text; as it was trained, or by name, if missing.")
    ] = None,
    text_pair_column: Annotated[str | None, typer.Option(help="Column with a second text, for pairs.")] = None,
    base: _Base = None,
    used: Annotated[
        Literal["tuned", "none"], typer.Option("--adapter", help="none: the base alone, whose head has learnt nothing.")
    ] = "tuned",
    precision: Annotated[
        Literal["float32", "int8", "auto"],
        typer.Option(
            help="Of the frozen layers: int8 is faster, and differs a little; auto has float32's labels from int8, "
            "computing rows anew that lie near a boundary."
        ),
    ] = "float32",
    quantize: _Quantized = None,
    quiet: Quiet = False,
) -> None:
    """Say what a tuned adapter makes of new rows: labels with probabilities, numbers, tags, or texts.

    Rows are read, predicted and written as a stream: a million take no more memory than a thousand, and rows of
    standard input are answered as they arrive (in int8 or auto once 512 are there, some of which these are tried on).

    \b
    Examples:
      trimtab predict runs/my-run/trials/lora-s0/adapter --input new.csv --out predictions.csv
      echo "a joy to watch" | trimtab predict runs/my-run/trials/lora-s0/adapter
    """
    from contextlib import nullcontext

    from trimtab.adapters import load_adapter
    from trimtab.console import make_progress
    from trimtab.prediction import check_use, predict_records
    from trimtab.record_files import check_output, read_records, write_records
    from trimtab.sources import locate_adapter

    check_output(out, output_format)
    rows = read_records(source)
    folder = locate_adapter(adapter)
    check_use(folder, writes=False)
    _prepare_machine()
    with make_progress(quiet) as progress:
        loaded = load_adapter(folder, base, quantize=quantize, progress=progress)
        records = predict_records(
            loaded, rows, _called(source), text_column=text_column, text_pair_column=text_pair_column,
            precision=precision, progress=progress,
        )  # fmt: skip
        with loaded.disable() if used == "none" else nullcontext():
            write_records(records, out, output_format, progress)


@app.command()
def generate(
    adapter: _Writer,
    prompt: Annotated[list[str] | None, typer.Option(help="A text to go on from; repeat the flag for several.")] = None,
    source: _Prompts = None,
    out: Annotated[str, typer.Option(help="File for what was written; - for standard output.")] = "-",
    output_format: _Format = None,
    text_column: _PromptColumn = None,
    max_new_tokens: flags.MaxNewTokens = 128,
    do_sample: flags.DoSample = None,
    temperature: flags.Temperature = None,
    top_p: flags.TopP = None,
    top_k: flags.TopK = None,
    min_p: flags.MinP = None,
    typical_p: flags.TypicalP = None,
    repetition_penalty: flags.RepetitionPenalty = 1.0,
    no_repeat_ngram_size: flags.NoRepeatNgramSize = 0,
    stop_strings: flags.StopStrings = None,
    seed: flags.Seed = 0,
    chat: _Chat = "auto",
    compare: Annotated[bool, typer.Option("--compare", help="Let the base write beside it.")] = False,
    base: _Base = None,
    quantize: _Quantized = None,
    quiet: Quiet = False,
) -> None:
    """Let a tuned language model write: after prompts, rows of a file, or what you type.

    The likeliest token is taken each time, unless do_sample, temperature, top_p, top_k, min_p or typical_p ask for
    sampling. Rows may hold chats (a column of turns, as for training): their next turn is written.

    \b
    Examples:
      trimtab generate runs/tales/trials/lora-s0/adapter --prompt "Once upon a time" --compare
      trimtab generate runs/tales/trials/lora-s0/adapter --input prompts.jsonl --out written.jsonl --temperature 0.8
      trimtab generate runs/tales/trials/lora-s0/adapter
    """
    from trimtab.adapters import load_adapter
    from trimtab.console import make_progress
    from trimtab.conversation import write_interactively
    from trimtab.prediction import check_use, generate_records
    from trimtab.record_files import write_records
    from trimtab.sampling import Sampling
    from trimtab.sources import locate_adapter

    rows = _open_prompts(source, prompt, out, output_format, text_column)
    sampling = Sampling(
        max_new_tokens, temperature, top_p, top_k, repetition_penalty, seed, min_p, typical_p, no_repeat_ngram_size,
        tuple(stop_strings or ()), do_sample,
    )  # fmt: skip
    folder = locate_adapter(adapter)
    check_use(folder, writes=True)
    _prepare_machine()
    with make_progress(quiet) as progress:
        loaded = load_adapter(folder, base, quantize=quantize, progress=progress)
        if rows is not None:
            records = generate_records(
                loaded, rows, _called(source), text_column=text_column, sampling=sampling, is_chat=_IS_CHAT[chat],
                compare=compare, progress=progress,
            )  # fmt: skip
            write_records(records, out, output_format, progress)
            return
    write_interactively(loaded, prompt, sampling, _IS_CHAT[chat], compare)


def _open_prompts(
    source: str | None,
    prompt: list[str] | None,
    out: str,
    output_format: Literal["jsonl", "csv", "parquet"] | None,
    text_column: str | None,
) -> Iterable[tuple[dict[str, Any], int]] | None:
    """The rows of --input, if there is one.

    Raises:
        InputError: prompts beside it, or flags that only count for rows where there are none; or as `read_records`.
    """
    from trimtab.record_files import check_output, read_records

    if source is None:
        for_rows = {"--out": out != "-", "--format": output_format, "--text-column": text_column}
        idle = [flag for flag, given in for_rows.items() if given]
        if idle:
            raise InputError(
                f"{', '.join(idle)}: only for rows of --input; give --input prompts.jsonl, or leave it out"
            )
        return None
    if prompt is not None:
        raise InputError("--prompt and --input each give what to go on from; leave out one of the two")
    check_output(out, output_format)
    return read_records(source)


def _called(source: str | None) -> str:
    return "stdin" if source in (None, "-") else str(source)


def _prepare_machine() -> None:
    from trimtab.machine import set_threads
    from trimtab.models import quiet_libraries

    quiet_libraries()
    set_threads()


@app.command()
def merge(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="An adapter folder, a Hub id, or a run with one.")],
    out: Annotated[Path, typer.Option(help="Folder for the merged model.")],
    data: _Data = None,
    text_column: _TextColumn = None,
    label_column: _LabelColumn = None,
    base: Annotated[str | None, typer.Option(help="Where the base is, if not where it was.")] = None,
    dtype: Annotated[
        Literal["float32", "bfloat16", "float16"], typer.Option(help="Number format of the merged weights.")
    ] = "float32",
    output_format: Annotated[
        Literal["transformers", "gguf", "onnx"],
        typer.Option("--format", help="gguf: a file for llama.cpp (extra gguf); onnx is refused, with the reason."),
    ] = "transformers",
    force: Annotated[bool, typer.Option("--force", help="Write it even if its outputs differ.")] = False,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Write base and adapter as one plain transformers model, after comparing both on test rows.

    An adapter of a quantised base is merged into the base's weights in full precision.

    \b
    Example:
      trimtab merge runs/my-run/trials/lora-s0/adapter --out merged
      trimtab merge runs/tales --out for-llama-cpp --format gguf
    """
    from dataclasses import asdict

    from trimtab.console import make_progress, show_merge
    from trimtab.machine import set_threads
    from trimtab.merging import merge_adapter
    from trimtab.models import quiet_libraries

    quiet_libraries()
    set_threads()
    columns = {"text": text_column, "label": label_column}
    with make_progress(quiet) as progress:
        found = merge_adapter(
            adapter, out, dtype, base=base, data=data, columns=columns, output_format=output_format, force=force,
            progress=progress,
        )  # fmt: skip
    if as_json:
        print(json.dumps(asdict(found), indent=1))
    else:
        show_merge(found, out)


@app.command()
def push(
    adapter: Annotated[Path, typer.Argument(metavar="ADAPTER", help="An adapter folder.")],
    repository: Annotated[str, typer.Argument(metavar="OWNER/NAME", help="Where on the Hub.")],
    private: Annotated[bool, typer.Option("--private", help="Let only the owner see a new repository.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Check all, and send nothing.")] = False,
    message: Annotated[str | None, typer.Option(help="Of the commit.")] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Put an adapter on the Hub, with its model card, once its files have been checked.

    \b
    Example:
      trimtab push runs/my-run/trials/lora-s0/adapter me/film-reviews --dry-run
    """
    from dataclasses import asdict

    from trimtab.console import make_progress, show_push
    from trimtab.publishing import push_adapter

    with make_progress(quiet) as progress:
        done = push_adapter(adapter, repository, private=private, dry_run=dry_run, message=message, progress=progress)
    if as_json:
        print(json.dumps(asdict(done), indent=1))
    else:
        show_push(done)


@app.command()
def combine(
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER=WEIGHT...", help="Folders or Hub ids of one base, each with its weight."),
    ],
    out: Annotated[Path, typer.Option(help="Folder for the combined adapter.")],
    data: _Data = None,
    text_column: _TextColumn = None,
    label_column: _LabelColumn = None,
    base: _Base = None,
    combination_type: Annotated[
        str, typer.Option(help="As peft names them: linear, svd, cat, ties, dare_linear, dare_ties, magnitude_prune…")
    ] = "linear",
    density: Annotated[
        float | None, typer.Option(help="Share of each adapter that is kept: for ties, dare and magnitude_prune.")
    ] = None,
    quiet: Quiet = False,
    as_json: AsJson = False,
) -> None:
    """Make one LoRA adapter of several by weight, and score it beside them on test rows.

    \b
    Example:
      trimtab combine runs/a/trials/lora-s0/adapter=0.5 runs/b/trials/lora-s0/adapter=0.5 --out both
    """
    from trimtab.combining import combine_adapters
    from trimtab.console import make_progress, show_two
    from trimtab.machine import set_threads
    from trimtab.models import quiet_libraries

    weights: dict[str | Path, float] = {}
    for given in adapters:
        adapter, _, weight = given.rpartition("=")
        if adapter in weights:
            raise InputError(f"{adapter} is given twice; add its weights up")
        try:
            weights[adapter] = float(weight)
        except ValueError as error:
            raise InputError(f"{given!r} is no adapter with a weight; write FOLDER=0.5") from error
    quiet_libraries()
    set_threads()
    columns = {"text": text_column, "label": label_column}
    with make_progress(quiet) as progress:
        found = combine_adapters(
            weights, out, combination_type, density, base=base, data=data, columns=columns, progress=progress
        )
    if as_json:
        print(json.dumps(found, indent=1))
    else:
        show_two(found)
        print(f"combined adapter: {out}")
