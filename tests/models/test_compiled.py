"""torch.compile of a Transformer: the same step, and no graphs for each length."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

from memory_efficient_attention_pytorch import Transformer

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler, about what it does not follow

CONFIG = {"num_tokens": 64, "max_seq_len": 64, "dim": 32, "depth": 2, "heads": 2, "dim_head": 16, "causal": True}


@pytest.mark.parametrize(
    "changes",
    [{}, *(pytest.param(each, marks=pytest.mark.slow) for each in ({"reversible": False}, {"keep_attention": True}))],
    ids=str,
)
def test_a_compiled_step_is_the_same_and_compiled_for_two_lengths_of_any(changes):
    torch._dynamo.reset()
    model, graphs = Transformer(**CONFIG, **changes), []

    def step(called, length):
        model.zero_grad()
        tokens = torch.arange(2 * length).view(2, length) % 61
        loss = called(tokens, labels=tokens)
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    def counted(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    lengths, made = (23, 31, 17, 40), []
    expected = [step(model, length) for length in lengths]
    compiled = torch.compile(model, backend=counted)
    for length, truth in zip(lengths, expected, strict=True):
        torch.testing.assert_close(step(compiled, length), truth, rtol=2e-5, atol=2e-5)
        made.append(len(graphs))
    torch._dynamo.reset()
    assert 0 < made[0] < 20
    assert made[1] == made[2] == made[3] < 40
