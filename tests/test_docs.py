"""The pages of docs that hold code run as they stand."""

import re
import shutil
from pathlib import Path

from samples import write_tales

DOCS = Path(__file__).parent.parent / "docs"


def test_the_adapters_page_runs_from_top_to_bottom(tmp_path, model_folder, monkeypatch):
    shutil.copytree(model_folder("gpt2", "AutoModelForCausalLM"), tmp_path / "gpt2")
    write_tales(tmp_path / "tales.jsonl", 40)
    write_tales(tmp_path / "reviews.jsonl", 40, seed=1)
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", (DOCS / "adapters.md").read_text(), re.DOTALL)
    assert len(blocks) >= 8
    names = {}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/adapters.md, block {number}", "exec"), names)
    assert (tmp_path / "merged" / "model.safetensors").is_file()
    assert names["found"].max_abs_difference <= 1e-4
