"""Pages of mapped weights: given back where a file holds the same, kept where somebody wrote to them."""

import sys
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

from trimtab.engine.memory import give_back_mapped_pages

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
