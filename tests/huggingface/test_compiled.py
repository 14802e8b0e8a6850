"""torch.compile after the call is no worse than before it: the same step, and no graphs for each length."""

import pytest
import torch
from torch._dynamo.backends.debugging import aot_eager

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient

from .models import small_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler, about what it does not follow


@pytest.mark.parametrize("kind", ["Llama", "Gemma2"])
def test_a_compiled_step_is_the_same_and_compiled_once_for_all_lengths(kind):
    torch._dynamo.reset()
    model, graphs = small_model(kind, torch.float32), []

    def step(called, length):
        model.zero_grad()
        ids = tokens(length=length)
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    def counted(graph, example_inputs):
        graphs.append(graph)
        return aot_eager(graph, example_inputs)

    lengths = (23, 31, 17, 40)
    expected = [step(model, length) for length in lengths]
    make_memory_efficient(model)
    compiled, made = torch.compile(model, backend=counted), []
    for length, truth in zip(lengths, expected, strict=True):
        torch.testing.assert_close(step(compiled, length), truth, rtol=2e-5, atol=2e-5)
        made.append(len(graphs))
    torch._dynamo.reset()
    assert made[0] > 0
    assert made[1] == made[2] == made[3]  # for the first length, and once more for all others
