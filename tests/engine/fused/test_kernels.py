"""Each compiled kernel against its plain twin, on float32 and on quantised products."""

import pytest
import torch

from trimtab.engine.fused import native, plain
from trimtab.engine.fused.formats import Heads, HeadShape, Product, Rotary, Rows, Want, draw_masks

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: models keep their own forward")

TOKENS, WIDTH = 7, 24
SHAPE = HeadShape(2, 1, 6)  # 24 columns


class Draw:
    """Random inputs of kernels, in float32 or as quantised products."""

    def __init__(self, quantised):
        self.quantised = quantised
        self.generator = torch.Generator().manual_seed(3)

    def values(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def product(self, columns=WIDTH, plain_columns=False):
        if not self.quantised:
            return Product(self.values(TOKENS, columns), bias=self.values(columns))
        integers = torch.randint(-9000, 9000, (TOKENS, columns), dtype=torch.int32, generator=self.generator)
        scale = None if plain_columns else self.values(columns).abs() + 0.1
        return Product(integers, self.values(TOKENS, 1).abs() / 5000, scale, None, self.values(TOKENS, columns))

    def want(self, columns=WIDTH):
        return Want(True, self.quantised, self.values(columns).abs() + 0.1 if self.quantised else None)


def rotary(draw):
    return Rotary(draw.values(TOKENS, 3), draw.values(TOKENS, 3))


CASES = {
    "rows_of": lambda d: (d.values(TOKENS, WIDTH), d.want()),
    "add_product": lambda d: (d.values(TOKENS, WIDTH), d.product()),
    "add_product, alone": lambda d: (None, d.product()),
    "add_rms_norm": lambda d: (d.values(TOKENS, WIDTH), d.product(), d.values(WIDTH), 1e-5, d.want()),
    "add_rms_norm, first": lambda d: (d.values(TOKENS, WIDTH), None, d.values(WIDTH), 1e-5, d.want()),
    "rms_norm_backward": lambda d: (
        d.values(TOKENS, WIDTH), d.product(plain_columns=True), d.values(TOKENS, WIDTH),
        d.values(TOKENS, 1).abs(), d.values(WIDTH), d.want()),
    "add_layer_norm": lambda d: (
        d.values(TOKENS, WIDTH), d.product(), d.values(WIDTH), d.values(WIDTH), 1e-12, d.want()),
    "layer_norm_backward": lambda d: (
        d.values(TOKENS, WIDTH), d.product(plain_columns=True), d.values(TOKENS, WIDTH),
        d.values(TOKENS, 1), d.values(TOKENS, 1).abs(), d.values(WIDTH), d.want()),
    "layer_norm_backward, last": lambda d: (
        d.values(TOKENS, WIDTH), None, d.values(TOKENS, WIDTH), d.values(TOKENS, 1),
        d.values(TOKENS, 1).abs(), d.values(WIDTH), d.want()),
    "swiglu": lambda d: (d.product(2 * WIDTH), d.want()),
    "swiglu_backward": lambda d: (d.product(plain_columns=True), d.product(2 * WIDTH), d.want(2 * WIDTH)),
    "gelu": lambda d: (d.product(), d.want()),
    "gelu_backward": lambda d: (d.product(plain_columns=True), d.product(), d.want()),
    "rotate_heads": lambda d: (d.product(), rotary(d), SHAPE),
    "rotate_heads, no rotary": lambda d: (d.product(), None, SHAPE),
    "rotate_heads_backward": lambda d: (d.values(TOKENS, WIDTH), rotary(d), SHAPE, d.want()),
}  # fmt: skip


def flatten(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Rows) and result.quantised is not None:  # rounding may fall on either side of a half
        assert result.quantised.dtype == torch.int8
        assert result.quantised.abs().max() == 127
        return [result.values, result.scale, result.quantised * result.scale]
    return [tensor for part in result if part is not None for tensor in flatten(part)]


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_what_its_plain_twin_gives(case, quantised):
    name = case.partition(",")[0]
    arguments = CASES[case](Draw(quantised))
    ours, theirs = (flatten(getattr(kernels, name)(*arguments)) for kernels in (native, plain))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=2e-6 * float(b.abs().max()) + (0.02 if quantised else 0), rtol=1e-5)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 60])
@pytest.mark.parametrize(("query", "key_value", "dim"), [(4, 2, 8), (3, 1, 64), (2, 2, 20)])
def test_attention_gives_what_its_plain_twin_gives(query, key_value, dim, window, causal):
    shape = HeadShape(query, key_value, dim)
    heads = Heads(shape, 0.3, causal, window)
    lengths = [1, 1, 5, 16, 17, 96, 97, 200]
    starts = torch.tensor([0, *lengths]).cumsum(0)
    draw = Draw(False)
    projected = draw.values(sum(lengths), (query + 2 * key_value) * dim)
    grad = draw.values(sum(lengths), query * dim)
    results = []
    for kernels in (native, plain):
        attended, log_sums = kernels.attention_forward(projected, starts, heads)
        results.append((attended, kernels.attention_backward(grad, projected, attended, log_sums, starts, heads)))
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


def test_activations_are_exact_far_from_zero():
    x = torch.linspace(-100, 100, 24 * 7).view(7, 24)
    for name in ("gelu", "swiglu"):
        ours, theirs = (getattr(kernels, name)(Product(x), Want(True, False)).values for kernels in (native, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_what_is_not_finite_is_not_hidden_by_rounding():
    values = torch.ones(3, 8)
    values[1, 2] = float("nan")
    rows = native.rows_of(values, Want(True, True))
    assert rows.scale.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(("adapters", "rank", "columns"), [(1, 8, 32), (2, 8, 24), (3, 5, 7), (2, 32, 100)])
def test_lora_gives_what_its_plain_twin_gives(adapters, rank, columns, dropout):
    draw = Draw(False)
    masks = draw_masks(dropout)
    values, lora_a = draw.values(61, columns), draw.values(adapters * rank, columns)
    by_small = draw.values(61, adapters * rank)
    for ours, theirs in zip(*(
        (kernels.lora_forward(values, lora_a, adapters, masks),
         *kernels.lora_backward(values, lora_a, adapters, by_small, masks, True))
        for kernels in (native, plain)
    ), strict=True):  # fmt: skip
        torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)
    assert native.lora_backward(values, lora_a, adapters, by_small, masks, False)[1] is None


def test_masks_drop_at_their_rate_and_follow_the_seed():
    def draw():
        """Masks [tokens, adapters, columns], seen through an A that picks single columns."""
        torch.manual_seed(5)
        ones, picks = torch.ones(501, 333), torch.eye(333).repeat(3, 1)
        return [native.lora_forward(ones, picks, 3, draw_masks(0.2)).view(501, 3, 333).double() for _ in range(2)]

    first, second = draw()
    assert set(first.unique().tolist()) == {0.0, 1.0}
    assert abs(float(first.mean()) - 0.8) < 0.003
    assert abs(float(first.mean()) * draw_masks(0.2).scale - 1) < 0.003
    assert abs(float((first == second).double().mean()) - (0.8**2 + 0.2**2)) < 0.003  # independent of each other
    centred = first - 0.8
    for neighbours in (
        centred[1:] * centred[:-1],
        centred[:, 1:] * centred[:, :-1],
        centred[..., 1:] * centred[..., :-1],
    ):
        assert abs(float(neighbours.mean())) < 0.002
    assert torch.equal(first, draw()[0])
