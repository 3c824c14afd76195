"""States below the lowest adapted layer: the same to the last bit from a cache, and found again by the next process."""

import os

import pytest
import torch

from adapted_models import adapt, make_examples
from trimtab.engine.batches import Collator
from trimtab.engine.forward import choose_forward
from trimtab.engine.frozen import trainable_parameters
from trimtab.engine.fused import native
from trimtab.engine.fused.precision import quantise_stack
from trimtab.engine.fused.prefix_cache import CacheInUseError, PrefixCache, make_room
from trimtab.tasks.classification import classification_loss

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: models keep their own forward")
LAYER = 2


class Case:
    """A tiny model of four layers, of which the upper two are adapted."""

    def __init__(self, model, layers="upper-half"):
        self.choice = choose_forward(model, 0, 64, False)
        self.stack = self.choice.forward.stack
        self.model = adapt(model, self.choice, layers_to_transform=layers)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():
            for parameter in trainable_parameters(self.model).values():
                parameter.normal_(0, 0.1, generator=generator)
        self.examples = make_examples(model, (5, 9, 9, 23), seed=1)

    def step(self, rows=(0, 1, 2, 3)):
        """Logits and gradients of a pack of these rows."""
        batch = Collator(self.examples, True, self.choice.position_offset, 0).collate(rows)
        parameters = list(trainable_parameters(self.model).values())
        logits = self.choice.forward.logits(batch)
        return [logits, *torch.autograd.grad(classification_loss(logits, batch.labels), parameters)]


def same(first, second):
    return all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@pytest.fixture(params=["llama", "bert"])
def case(request, tiny_model):
    return Case(tiny_model(request.param, num_hidden_layers=4))


def open_cache(tmp_path, budget=1 << 20):
    return PrefixCache(tmp_path / "cache", LAYER, 32, budget)


def test_from_the_cache_all_is_the_same_to_the_last_bit(case, tmp_path):
    plain = case.step()
    case.stack.cache = cache = open_cache(tmp_path)
    assert same(case.step(), plain)
    assert (cache.hits, cache.misses) == (0, 4)
    assert same(case.step(), plain)
    assert cache.hits == 4
    case.stack.cache = None
    part = case.step((1, 3))
    case.stack.cache = cache
    assert same(case.step((1, 3)), part)  # in another pack than the one it was computed in


def test_layers_below_are_not_run_again(case, tmp_path, monkeypatch):
    case.stack.cache = open_cache(tmp_path)
    case.step()
    for layer in case.stack.layers[:LAYER]:
        monkeypatch.setattr(layer, "forward", None)
    assert case.step()[0].isfinite().all()
    case.stack.cache = None
    with pytest.raises(TypeError, match="not callable"):
        case.step()


def test_the_next_process_finds_what_was_kept(case, tmp_path):
    case.stack.cache = open_cache(tmp_path)
    first = case.step()
    case.stack.cache.close()
    with (tmp_path / "cache" / "states.bin").open("ab") as file:
        file.write(b"torn off in the middle of a text")
    case.stack.cache = again = open_cache(tmp_path)
    assert same(case.step(), first)
    assert (again.hits, again.misses) == (4, 0)
    assert os.path.getsize(tmp_path / "cache" / "states.bin") == again.bytes_used == (5 + 9 + 9 + 23) * 32 * 4


@pytest.mark.parametrize("left", [0, 100])
def test_a_file_that_was_cut_is_started_anew(case, tmp_path, left):
    case.stack.cache = open_cache(tmp_path)
    first = case.step()
    case.stack.cache.close()
    os.truncate(tmp_path / "cache" / "states.bin", left)
    case.stack.cache = again = open_cache(tmp_path)
    assert same(case.step(), first)
    assert (again.hits, again.misses) == (0, 4)


def test_a_file_that_is_cut_meanwhile_is_noticed(case, tmp_path):
    case.stack.cache = open_cache(tmp_path)
    first = case.step()
    others = case.step((0, 3))
    os.truncate(tmp_path / "cache" / "states.bin", 100)
    for _ in range(3):
        assert same(case.step((0, 3)), others)
        assert same(case.step(), first)


@pytest.mark.parametrize("damage", [b"", b"PK\x03\x04 not an archive"])
def test_a_damaged_index_is_started_anew(case, tmp_path, damage):
    case.stack.cache = open_cache(tmp_path)
    first = case.step()
    case.stack.cache.close()
    (tmp_path / "cache" / "index.npz").write_bytes(damage)
    case.stack.cache = again = open_cache(tmp_path)
    assert not (tmp_path / "cache" / "index.npz").exists()
    assert same(case.step(), first)
    assert again.hits == 0


def test_the_budget_holds(case, tmp_path):
    case.stack.cache = cache = open_cache(tmp_path, 15 * 32 * 4)
    plain = case.step()
    assert cache.bytes_used == (5 + 9) * 32 * 4
    assert same(case.step(), plain)
    assert cache.hits == 0
    case.step((0, 1))
    assert cache.hits == 2


def test_one_process_at_a_time(tmp_path):
    cache = open_cache(tmp_path)
    with pytest.raises(CacheInUseError):
        open_cache(tmp_path)
    cache.close()
    open_cache(tmp_path)


def test_adapters_below_the_layer_do_without(tiny_model, tmp_path):
    case = Case(tiny_model("llama", num_hidden_layers=4), "1-3")
    plain = case.step()
    case.stack.cache = cache = open_cache(tmp_path)
    assert same(case.step(), plain)
    assert same(case.step(), plain)
    assert cache.hits == cache.misses == 0


@pytest.mark.parametrize("cached", [True, False])
def test_int8_starts_at_the_lowest_adapted_layer(case, tmp_path, cached):
    case.stack.cache = open_cache(tmp_path) if cached else None
    errors = quantise_stack(case.stack, lambda: case.step()[0], has_backward=True)
    assert {error.layer for error in errors} == {2, 3}
    assert len({(error.layer, error.group) for error in errors}) == len(errors) == 8 + 2 * native.has_bfloat16()


def test_room_is_made_of_what_was_used_longest_ago(tmp_path):
    for age, name in enumerate(["new", "old", "mine"]):
        (tmp_path / name).mkdir()
        (tmp_path / name / "states.bin").write_bytes(bytes(100))
        os.utime(tmp_path / name, (1000 - age, 1000 - age))
    assert make_room(tmp_path, tmp_path / "mine", 1000) == 800
    assert make_room(tmp_path, tmp_path / "mine", 300) == 200
    assert not (tmp_path / "old" / "states.bin").exists()
    assert (tmp_path / "new" / "states.bin").exists()
    assert (tmp_path / "mine" / "states.bin").exists()
