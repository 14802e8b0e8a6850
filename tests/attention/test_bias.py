"""Biases that no query sees, and modules that draw nothing."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import RelativePositionBias, dot_product_attention
from tests.agreement import skip_unless_usable


@pytest.mark.parametrize("kind", ["tensor", "module"])
@pytest.mark.parametrize("backend", ["products", "cpu_kernel", "onednn"])
def test_a_bias_that_no_query_sees_has_a_gradient_of_zeros(backend, kind):
    skip_unless_usable(backend)
    q, k, v = (torch.randn(1, 2, 20, 32) for _ in range(3))
    bias = RelativePositionBias(2) if kind == "module" else torch.randn(2, 20, 20, requires_grad=True)
    out = dot_product_attention(q, k, v, attn_bias=bias, mask=torch.zeros(1, 20, dtype=torch.bool), backend=backend)
    leaf = bias.weight if kind == "module" else bias
    assert torch.autograd.grad(out.sum(), leaf)[0].equal(torch.zeros_like(leaf))


def test_dropout_of_nothing_in_a_bias_module():
    class Bias(nn.Module):
        def __init__(self):
            super().__init__()
            self.drop = nn.Dropout(0.0)

        def forward(self, i, j):
            return self.drop((i[:, None] - j).float())

    q = torch.randn(1, 2, 6, 8)
    out = dot_product_attention(q, q, q, attn_bias=Bias().train())
    torch.testing.assert_close(out, dot_product_attention(q, q, q, attn_bias=Bias().eval(), backend="naive"))
