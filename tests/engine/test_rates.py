"""What is timed as a layer's product is that product, forward and backward."""

import pytest
import torch
from torch.nn.functional import cosine_similarity

from trimtab.engine.rates import build_pass, measure_rate

# How near to torch's product: formats of 8 and 4 bits round weights, and int8 ones rows, too.
NEAR = {"stock": 1 - 1e-6, "float32": 1 - 1e-6, "int8": 0.999, "8bit": 0.999, "4bit": 0.99}


@pytest.mark.parametrize("product", NEAR)
def test_output_and_gradient_are_the_layers(product):
    if product in ("8bit", "4bit"):
        pytest.importorskip("bitsandbytes")
    weight, values, grad = torch.randn(192, 128), torch.randn(64, 128), torch.randn(64, 192)
    output, gradient = build_pass(product, weight.clone())(values, grad)
    assert cosine_similarity(output.flatten(), (values @ weight.t()).flatten(), 0) > NEAR[product]
    assert cosine_similarity(gradient.flatten(), (grad @ weight).flatten(), 0) > NEAR[product]


def test_rates_count_operations_a_second():
    assert 0.1 < measure_rate("stock") < 1e6
