"""Each compiled kernel against its plain twin, in float32 and int8."""

import pytest
import torch

from trimtab.engine.fused import native, plain
from trimtab.engine.fused.formats import (
    INT8_OFFSET,
    Adapter,
    Heads,
    HeadShape,
    LowRank,
    Rotary,
    Rows,
    Want,
    Weight,
    draw_masks,
    quantise_weight,
)

pytestmark = pytest.mark.skipif(not native.is_available(), reason="no C++ compiler here: models keep their own forward")

TOKENS, WIDTH = 7, 24
SHAPE = HeadShape(2, 1, 6)  # 24 columns


class Draw:
    """Random inputs of kernels."""

    def __init__(self, quantised=False):
        self.quantised = quantised
        self.generator = torch.Generator().manual_seed(3)

    def values(self, *shape):
        return torch.randn(*shape, generator=self.generator)

    def rows(self, columns=WIDTH):
        return self.values(TOKENS, columns)

    def want(self, columns=WIDTH):
        return Want(True, self.quantised, self.values(columns).abs() + 0.1 if self.quantised else None)


def rotary(draw):
    return Rotary(draw.values(TOKENS, 3), draw.values(TOKENS, 3))


CASES = {
    "rows_of": lambda d: (d.rows(), d.want()),
    "rms_norm": lambda d: (d.rows(), d.values(WIDTH), 1e-5, d.want()),
    "rms_norm_backward": lambda d: (
        d.rows(), d.rows(), d.rows(), d.values(TOKENS, 1).abs(), d.values(WIDTH), d.want()),
    "layer_norm": lambda d: (d.rows(), d.values(WIDTH), d.values(WIDTH), 1e-12, d.want()),
    "layer_norm_backward": lambda d: (
        d.rows(), d.rows(), d.values(TOKENS, 1), d.values(TOKENS, 1).abs(), d.values(WIDTH), d.want()),
    "swiglu": lambda d: (d.rows(2 * WIDTH), d.want()),
    "swiglu_backward": lambda d: (d.rows(), d.rows(2 * WIDTH), d.want(2 * WIDTH)),
    "gelu": lambda d: (d.rows(), d.want()),
    "gelu_backward": lambda d: (d.rows(), d.rows(), d.want()),
    "rotate_heads": lambda d: (d.rows(), rotary(d), SHAPE),
    "rotate_heads, no rotary": lambda d: (d.rows(), None, SHAPE),
    "rotate_heads_backward": lambda d: (d.rows(), rotary(d), SHAPE, d.want()),
}  # fmt: skip


def flatten(result):
    if isinstance(result, torch.Tensor):
        return [result]
    if isinstance(result, Rows) and result.quantised is not None:  # rounding may fall on either side of a half
        assert result.quantised.dtype == torch.uint8
        integers = result.quantised.float() - INT8_OFFSET
        assert integers.abs().max() == 127
        return [result.values, result.scale, integers * result.scale]
    return [tensor for part in result if part is not None for tensor in flatten(part)]


@pytest.mark.parametrize("quantised", [False, True], ids=["float32", "int8"])
@pytest.mark.parametrize("case", CASES)
def test_a_kernel_gives_what_its_plain_twin_gives(case, quantised):
    name = case.partition(",")[0]
    ours, theirs = (flatten(getattr(kernels, name)(*CASES[case](Draw(quantised)))) for kernels in (native, plain))
    assert len(ours) == len(theirs) > 0
    for a, b in zip(ours, theirs, strict=True):
        assert b.abs().max() > 0
        torch.testing.assert_close(a, b, atol=2e-6 * float(b.abs().max()) + (0.02 if quantised else 0), rtol=1e-5)


@pytest.fixture
def matrix_unit(request):
    """Products by the matrix unit where there is one, or by vectors."""
    if request.param and not native.has_amx():
        pytest.skip("no matrix unit here")
    native.use_amx(request.param)
    yield request.param
    native.use_amx(True)


@pytest.mark.parametrize("matrix_unit", [False, True], ids=["vectors", "matrix unit"], indirect=True)
@pytest.mark.parametrize("precision", ["float32", "int8"])
@pytest.mark.parametrize(
    ("tokens", "columns", "inputs"),
    [
        (1, 4, 4),
        (5, 64, 64),
        (7, 40, 132),
        (23, 200, 100),
        (32, 128, 64),
        (61, 128, 1600),
        (50, 300, 704),
        (397, 960, 576),
    ],
)
def test_a_product_gives_what_its_plain_twin_gives(tokens, columns, inputs, precision, matrix_unit):
    draw = Draw()
    values = draw.values(columns, inputs)
    int8 = quantise_weight(values) if precision == "int8" else None
    bias, low_rank = draw.values(columns), LowRank(draw.values(tokens, 11), draw.values(11, columns))
    forward = plain.rows_of(draw.values(tokens, inputs), Want(True, True))
    backward = plain.rows_of(draw.values(tokens, columns), Want(True, True, int8 and int8.column_scale))
    results = []
    for kernels in (native, plain):
        weight = Weight(values.split((columns + 1) // 2), kernels.lay_out(values), int8)
        results.append([
            kernels.linear(forward, weight),
            kernels.linear(forward, weight, bias, low_rank, forward.values @ values.t()),
            kernels.linear_backward(backward, weight),
            kernels.linear_backward(backward, weight, backward.values @ values),
        ])  # fmt: skip
    for ours, theirs in zip(*results, strict=True):
        assert theirs.abs().max() > 0
        torch.testing.assert_close(ours, theirs, atol=3e-6 * float(theirs.abs().max()), rtol=1e-5)


@pytest.mark.parametrize("matrix_unit", [True], ids=["matrix unit"], indirect=True)
@pytest.mark.parametrize("backward", [False, True], ids=["forward", "backward"])
def test_the_matrix_unit_is_as_exact_in_float32_as_torch(matrix_unit, backward):
    draw = Draw()
    values, rows = draw.values(320, 1536), draw.values(200, 320 if backward else 1536)
    # Rows of very different sizes, and columns that nearly cancel.
    rows = rows * torch.logspace(-12, 12, len(rows)).unsqueeze(1)
    values[:, 1::2] = -values[:, ::2] * (1 + 1e-3 * draw.values(320, 768))
    weight = Weight((values,), native.lay_out(values))
    ours = (native.linear_backward if backward else native.linear)(Rows(rows), weight)
    matrix = values if backward else values.t()
    exact = rows.double() @ matrix.double()

    def error(found):
        return ((found - exact).norm(dim=1) / exact.norm(dim=1)).max()

    native.use_amx(False)
    by_vectors = (native.linear_backward if backward else native.linear)(Rows(rows), weight)
    assert not torch.equal(ours, by_vectors)  # it was the unit
    assert error(ours) < 1.5 * error(rows @ matrix)


def test_int8_takes_multiples_of_four():
    with pytest.raises(ValueError, match=r"multiples of 4, not a weight of \(6, 8\)"):
        quantise_weight(torch.ones(6, 8))


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("window", [None, 3, 60])
@pytest.mark.parametrize(("query", "key_value", "dim"), [(4, 2, 8), (3, 1, 64), (2, 2, 20), (1, 1, 5)])
def test_attention_gives_what_its_plain_twin_gives(query, key_value, dim, window, causal, bfloat16):
    heads = Heads(HeadShape(query, key_value, dim), 0.3, causal, window)
    results = [attention_of(kernels, heads, bfloat16) for kernels in (native, plain)]
    for ours, theirs in zip(*results, strict=True):
        if bfloat16:  # sums in another order fall on another side of a half
            assert error_of(ours, theirs) < 1e-3
        else:
            torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("kernels", [native, plain], ids=["native", "plain"])
def test_attention_in_bfloat16_is_off_by_its_rounding(kernels):
    heads = Heads(HeadShape(3, 1, 64), 64**-0.5, True)
    for ours, exact in zip(*(attention_of(kernels, heads, bfloat16) for bfloat16 in (True, False)), strict=True):
        assert 1e-4 < error_of(ours, exact) < 1e-2


@pytest.mark.parametrize("bfloat16", [False, True], ids=["float32", "bfloat16"])
def test_attention_does_not_depend_on_threads(bfloat16):
    heads = Heads(HeadShape(3, 1, 64), 64**-0.5, True)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(1)
        one = attention_of(native, heads, bfloat16)
        torch.set_num_threads(3)
        three = attention_of(native, heads, bfloat16)
    finally:
        torch.set_num_threads(before)
    assert all(map(torch.equal, one, three))


def attention_of(kernels, heads, bfloat16):
    """What texts attend to, and the gradient."""
    lengths = [1, 1, 5, 16, 17, 96, 97, 530]  # the last in two to four parts
    starts = torch.tensor([0, *lengths]).cumsum(0)
    draw = Draw()
    query, key_value, dim = heads.shape
    projected = draw.values(sum(lengths), (query + 2 * key_value) * dim)
    grad = draw.values(sum(lengths), query * dim)
    attended, sums = kernels.attention_forward(projected, starts, heads, bfloat16)
    return attended, kernels.attention_backward(grad, projected, sums, starts, heads, bfloat16)


def error_of(ours, theirs):
    return float((ours - theirs).norm() / theirs.norm())


def test_activations_are_exact_far_from_zero():
    x = torch.linspace(-100, 100, 24 * 7).view(7, 24)
    for name in ("gelu", "swiglu"):
        ours, theirs = (getattr(kernels, name)(x, Want(True, False)).values for kernels in (native, plain))
        torch.testing.assert_close(ours, theirs, atol=1e-6, rtol=1e-5)


def test_what_is_not_finite_is_not_hidden_by_rounding():
    values = torch.ones(3, 8)
    values[1, 2] = float("nan")
    rows = native.rows_of(values, Want(True, True))
    assert rows.scale.isfinite().flatten().tolist() == [True, False, True]


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize(
    ("spans", "rank", "columns"),
    [
        ([(0, 32)], 8, 32),
        ([(0, 16), (24, 40)], 8, 24),
        ([(0, 4), (5, 9), (9, 20)], 5, 7),
        ([(0, 64), (64, 100)], 32, 100),
    ],
)
def test_lora_gives_what_its_plain_twin_gives(spans, rank, columns, dropout):
    draw = Draw()
    masks = draw_masks(dropout)
    values, addend, grad = draw.values(61, columns), draw.values(61, columns), draw.values(61, spans[-1][1] + 3)
    adapters = [
        Adapter(start, stop, draw.values(rank, columns), draw.values(stop - start, rank), 0.5 + start, dropout)
        for start, stop in spans
    ]
    results = []
    for kernels in (native, plain):
        low_rank = kernels.lora_forward(values, adapters, grad.shape[1], masks)
        given = (values, adapters, low_rank, masks, grad)
        found, delta = kernels.lora_backward(*given, True)
        results.append([*low_rank, *found, delta, kernels.lora_backward(*given, True, addend)[1]])
        assert kernels.lora_backward(*given, False)[1] is None
    for ours, theirs in zip(*results, strict=True):
        torch.testing.assert_close(ours, theirs, atol=3e-6 * float(theirs.abs().max()), rtol=1e-5)


def test_masks_drop_at_their_rate_and_follow_the_seed():
    def draw():
        """Masks [tokens, adapters, columns], seen through an A that picks single columns."""
        torch.manual_seed(5)
        ones, adapter = torch.ones(501, 333), Adapter(0, 4, torch.eye(333), torch.ones(4, 333), 1.0, 0.2)
        return [
            native.lora_forward(ones, [adapter] * 3, 4, draw_masks(0.2)).small.view(501, 3, 333).double()
            for _ in range(2)
        ]

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
