"""Writing as one watches: after prompts, typed lines, or in a chat that goes on."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING

from trimtab.errors import RowError

if TYPE_CHECKING:
    from trimtab.adapters import LoadedAdapter
    from trimtab.generation import Prompt
    from trimtab.sampling import Sampling


def write_interactively(
    adapter: LoadedAdapter, prompts: Sequence[str] | None, sampling: Sampling, is_chat: bool | None, compare: bool
) -> None:
    """Show what is written while it is written: after each of `prompts`, or after each line of standard input.

    A chat that is typed on a terminal goes on from what was said before, as far back as the model has room for.
    """

    def tell(text: str) -> None:
        sys.stdout.write(text)
        sys.stdout.flush()

    def write(asked: Prompt) -> str:
        if compare:
            tell("base:  ")
            with adapter.disable():
                adapter.generate([asked], sampling, is_chat=is_chat, on_text=tell)
            tell("\ntuned: ")
        (answer,) = adapter.generate([asked], sampling, is_chat=is_chat, on_text=tell)
        tell("\n")
        return answer

    in_chat = adapter.facts.get("is_chat") if is_chat is None else is_chat
    if prompts is None and in_chat and sys.stdin.isatty() and not adapter.scorer.task.writes_answers:
        _chat(write)
        return
    for prompt in prompts if prompts is not None else _typed_lines():
        write(prompt)


def _chat(write: Callable[[Prompt], str]) -> None:
    """Answer what is typed, each after all that was said; what was said first is forgotten where there is no room."""
    turns: list[dict[str, str]] = []
    for line in _typed_lines():
        turns.append({"role": "user", "content": line})
        while True:
            try:
                answer = write(turns)
                break
            except RowError:  # too long for the model's positions
                if len(turns) == 1:
                    raise
                del turns[:2]
        turns.append({"role": "assistant", "content": answer})


def _typed_lines() -> Iterator[str]:
    is_typed = sys.stdin.isatty()
    while True:
        if is_typed:
            sys.stdout.write("> ")
            sys.stdout.flush()
        line = sys.stdin.readline()
        if not line:
            return
        if line.strip():
            yield line.rstrip("\n")
