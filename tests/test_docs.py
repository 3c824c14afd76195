"""The pages of docs that hold code run as they stand."""

import json
import random
import re
import shutil
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM

from samples import write_tales

DOCS = Path(__file__).parent.parent / "docs"


def _write_films(path, rows):
    """Texts that share no words with the tales."""
    generator = random.Random(1)
    kinds = (["the film is", "a film"], ["wonderful moving brilliant", "dull tired bad"])
    texts = [" ".join(generator.choice(kinds[place % 2]) for place in range(8)) for _ in range(rows)]
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def test_the_adapters_page_runs_from_top_to_bottom(tmp_path, model_folder, monkeypatch):
    model = AutoModelForCausalLM.from_pretrained(
        shutil.copytree(model_folder("gpt2", "AutoModelForCausalLM"), tmp_path / "gpt2")
    )
    with torch.no_grad():  # a base that is surer of something, or all that is learnt from it writes the same
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.mul_(1.5)
    model.save_pretrained(tmp_path / "gpt2")
    write_tales(tmp_path / "tales.jsonl", 300)
    _write_films(tmp_path / "reviews.jsonl", 300)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adapters.md").read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/adapters.md, block {number}", "exec"), names)
    ours, theirs = (AutoModelForCausalLM.from_pretrained(name).state_dict() for name in ("merged", "merged-by-peft"))
    assert ours.keys() == theirs.keys()
    for name, weight in ours.items():
        torch.testing.assert_close(weight, theirs[name])


def test_each_step_takes_fewer_lines_than_in_peft():
    page = (DOCS / "adapters.md").read_text()
    lines = []
    for section in page.split("\n## "):
        blocks = [[line for line in block.splitlines() if line.strip()] for block in
                  re.findall(r"```python\n(.*?)```", section, re.DOTALL)]  # fmt: skip
        if len(blocks) >= 2:
            lines.append((section.partition("\n")[0], len(blocks[0]), len(blocks[1])))
    assert [title for title, _, _ in lines] == [
        "Load, switch, generate", "Many adapters in one batch", "Merge, and back"
    ]  # fmt: skip
    for title, by_peft, by_trimtab in lines:
        assert by_trimtab < by_peft, title
