"""Pages of mapped weights: given back where a file holds the same, kept where somebody wrote to them."""

import subprocess
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trimtab.engine.batches import Collator
from trimtab.engine.forward import choose_forward
from trimtab.engine.fused import native
from trimtab.engine.memory import give_back_mapped_pages, weights_read_in_passing
from trimtab.tasks.examples import Example

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="pages are given back on Linux")
SIDE = 1024  # 4 MiB


@pytest.fixture
def mapped(tmp_path):
    """A weight as transformers reads it: the file itself, mapped."""
    torch.manual_seed(0)
    save_file({"weight": torch.randn(SIDE, SIDE)}, tmp_path / "weights.safetensors")
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        yield file.get_tensor("weight")


def resident_kib(tensor):
    """Of the mapping that the tensor lies in."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        first = line.split()[0]
        if not first.endswith(":"):
            start, stop = (int(side, 16) for side in first.split("-"))
            inside = start <= tensor.data_ptr() < stop
        elif inside and first == "Rss:":
            return int(line.split()[1])
    raise AssertionError("the tensor lies in no mapping")


def test_pages_go_and_come_back_with_the_same_values(mapped):
    before = mapped.clone()
    full = resident_kib(mapped)
    assert full >= 4000
    give_back_mapped_pages(mapped)
    assert resident_kib(mapped) < full / 10
    assert torch.equal(mapped, before)
    assert resident_kib(mapped) >= 4000


def test_what_somebody_wrote_is_kept(mapped):
    mapped[500, 500] = 7.0
    mapped.sum()
    full = resident_kib(mapped)
    give_back_mapped_pages(mapped)
    assert resident_kib(mapped) == full
    assert mapped[500, 500] == 7.0


def test_memory_of_no_file_is_kept():
    fresh = torch.randn(SIDE, SIDE)
    before = fresh.clone()
    give_back_mapped_pages(fresh, fresh[:, :8])
    assert torch.equal(fresh, before)


def test_a_model_that_is_read_in_passing_holds_a_layer_at_a_time(tmp_path):
    torch.manual_seed(0)
    save_file({str(number): torch.randn(SIDE, SIDE) for number in range(4)}, tmp_path / "weights.safetensors")
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList(torch.nn.Linear(SIDE, SIDE, bias=False) for _ in range(4))
    with safe_open(tmp_path / "weights.safetensors", "pt") as file:
        for number, layer in enumerate(model.layers):
            layer.weight = torch.nn.Parameter(file.get_tensor(str(number)), requires_grad=False)
    seen = {}
    for way in (nullcontext, weights_read_in_passing):
        states, found = torch.ones(1, SIDE), []
        with way(model):
            for layer in model.layers:
                states = layer(states)
                found.append(resident_kib(model.layers[0].weight))  # all four weights lie in one mapping
        give_back_mapped_pages(*model.parameters())
        seen[way] = max(found)
    assert seen[nullcontext] >= 4 * 4000
    assert seen[weights_read_in_passing] < 2 * 4096
    assert not model.layers[0]._forward_hooks


FREED = """
import re, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from trimtab.engine.memory import keep_freed_memory, own_pages

def anonymous_mib():
    return int(re.search(r"RssAnon:\\s+(\\d+)", Path("/proc/self/status").read_text()).group(1)) >> 10

keep_freed_memory()  # as in training, when the heap gives nothing back
before = anonymous_mib()
with own_pages() if sys.argv[1] == "own" else nullcontext():
    weights = [torch.ones(512, 1024) for _ in range(128)]  # 2 MiB each
held = anonymous_mib()
del weights
print(held - before, anonymous_mib() - before)
"""


def test_what_has_pages_of_its_own_goes_back_when_it_is_freed():
    """In a process of its own, whose heap no other test has left room in."""
    kept = {}
    for way in ("own", "heap"):
        done = subprocess.run([sys.executable, "-c", FREED, way], capture_output=True, text=True, check=True)
        held, kept[way] = map(int, done.stdout.split())
        assert held > 240
    assert kept["own"] < 16
    assert kept["heap"] > 200


@pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here")
def test_a_pass_that_is_only_looked_at_leaves_no_weight_laid_out(tiny_model):
    model = tiny_model("llama")
    forward = choose_forward(model, 0, 32, False).forward
    stack = forward.stack
    assert all(group.weight.tiles is None for group in stack.groups)
    batch = Collator([Example([5, 6, 7], None, [2], [0])], True, 0, 0).collate([0])
    with torch.no_grad():
        with stack.in_passing():
            looked_at = forward.logits(batch)
        assert all(group.weight.tiles is None for group in stack.groups)
        kept = forward.logits(batch)
    assert any(group.weight.tiles is not None for group in stack.groups)
    assert torch.equal(looked_at, kept)
