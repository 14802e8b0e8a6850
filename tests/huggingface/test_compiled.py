"""torch.compile after the call is no worse than before it: the same step, and no graphs for each length."""

import pytest
import torch
from torch._dynamo.utils import counters

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient
from tests.compiled import Counted

from .models import SMALL, small_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore")  # of the compiler, about what it does not follow


@pytest.mark.parametrize("kind", ["Llama", pytest.param("Mistral", marks=pytest.mark.slow), "Gemma2"])
def test_a_compiled_step_is_the_same_and_compiled_once_for_all_lengths(kind):
    torch._dynamo.reset()
    model, backend = small_model(kind, torch.float32), Counted()

    def step(called, length):
        model.zero_grad()
        ids = tokens(length=length)
        loss = called(input_ids=ids, labels=ids).loss
        loss.backward()
        return [loss.detach(), *(p.grad.clone() for p in model.parameters())]

    lengths = (23, 31, 17, 40)
    expected = [step(model, length) for length in lengths]
    make_memory_efficient(model)
    compiled, made = torch.compile(model, backend=backend), []
    for length, truth in zip(lengths, expected, strict=True):
        torch.testing.assert_close(step(compiled, length), truth, rtol=2e-5, atol=2e-5)
        made.append(backend.graphs)
    torch._dynamo.reset()
    assert made[0] > 0
    assert made[1] == made[2] == made[3]  # for the first length, and once more for all others


def test_the_base_model_compiled_by_itself_leaves_the_loss_without_logits():
    torch._dynamo.reset()
    model, backend, ids = small_model("Llama", torch.float32), Counted(), tokens()

    def step():
        model.zero_grad()
        output = model(input_ids=ids, labels=ids)
        output.loss.backward()
        return output.logits, [output.loss.detach(), *(p.grad.clone() for p in model.parameters())]

    _, expected = step()
    make_memory_efficient(model)
    model.model.compile(backend=backend)
    logits, found = step()
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert backend.graphs > 0
    assert logits._made is None


def test_attention_that_looks_at_values_breaks_a_graph_once():
    """Chunks, of which tiles are told apart by what tensors hold: attention runs eagerly, as a whole."""
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    torch._dynamo.reset()
    counters.clear()
    own = {"num_hidden_layers": 1, "attention_chunk_size": 8, "layer_types": ["chunked_attention"], "moe_layers": []}
    model = Llama4ForCausalLM(Llama4TextConfig(**{**SMALL, **own}, intermediate_size_mlp=48, num_local_experts=1))
    ids = tokens()
    expected = model(input_ids=ids, labels=ids).loss
    make_memory_efficient(model, checkpoint=False)
    found = torch.compile(model, backend="eager")(input_ids=ids, labels=ids).loss
    breaks = list(counters["graph_break"])
    torch._dynamo.reset()
    torch.testing.assert_close(found, expected, rtol=2e-5, atol=2e-5)
    assert breaks
    assert all("disable" in reason for reason in breaks), breaks
