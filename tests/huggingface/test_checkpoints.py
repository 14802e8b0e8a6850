"""checkpoint="cpu": inputs of layers wait in host memory, and everything else is as it was."""

import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, restore
from memory_efficient_attention_pytorch.huggingface.planning import EFFICIENT, plan_step
from memory_efficient_attention_pytorch.recompute.host_inputs import Lane

from .models import small_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")


def step(model, ids):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, labels=ids).loss
    loss.backward()
    return [loss.detach(), *(p.grad for p in model.parameters() if p.grad is not None)]


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Gemma3", "GPTNeoX"])
def test_results_are_those_of_checkpoints_on_the_device(kind, monkeypatch):
    ids, copied = tokens(), []
    model = small_model(kind)
    own = step(model, ids)
    make_memory_efficient(model)
    expected = step(model, ids)
    restore(model)
    make_memory_efficient(model, checkpoint="cpu")
    assert all(torch.equal(a, b) for a, b in zip(step(model, ids), expected, strict=True))
    monkeypatch.setattr(Lane, "serves", staticmethod(lambda tensor: True))
    copy = Lane.copy
    monkeypatch.setattr(Lane, "copy", lambda *given: [copied.append(1), copy(*given)][1])
    assert all(torch.equal(a, b) for a, b in zip(step(model, ids), expected, strict=True))
    assert len(copied) == 3  # of two layers: both out, and the first one back
    restore(model)
    assert all(torch.equal(a, b) for a, b in zip(step(model, ids), own, strict=True))


def test_inputs_in_host_memory_are_not_planned_on_a_device():
    length, peaks = 1024, []
    for checkpoint in (True, "cpu"):
        model = small_model("Llama", torch.float32, max_position_embeddings=length, num_hidden_layers=6)
        make_memory_efficient(model, checkpoint=checkpoint)
        peaks.append(plan_step(model, seq_len=length, optimizer=None, device="cuda").plans[EFFICIENT].peak_bytes)
    layer = length * 32 * 4
    assert 3 * layer <= peaks[0] - peaks[1] <= 5 * layer
