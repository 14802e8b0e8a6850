"""A model of transformers gives the same loss and gradients in less memory, and is what it was after restore."""

import copy

import pytest
import torch

pytest.importorskip("transformers")

from memory_efficient_attention_pytorch.huggingface import make_memory_efficient, restore
from memory_efficient_attention_pytorch.huggingface import feed_forward
from memory_efficient_attention_pytorch.huggingface.logits import LazyLogits

from .models import KINDS, small_model, tokens

pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning", "ignore::DeprecationWarning")
CLOSE = {torch.float64: 1e-6, torch.float32: 2e-5}


@pytest.fixture(autouse=True)
def chunks_of_a_few_tokens(monkeypatch):
    monkeypatch.setattr(feed_forward, "feed_forward_chunks", lambda batch, tokens, *rest: min(3, tokens))


def padded(side, ids):
    mask = torch.ones_like(ids)
    mask[0, :5] = 0
    mask = mask if side == "left" else mask.flip(1)
    return {"attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packed(ids):
    lengths = (7, 1, ids.shape[1] - 8)
    positions = torch.cat([torch.arange(n) for n in lengths])
    return {"position_ids": positions.expand(len(ids), -1), "labels": ids, "use_cache": False}


def inputs(case, ids):
    if case in ("left", "right"):
        return padded(case, ids)
    return packed(ids) if case == "packed" else {"labels": ids}


def step(model, ids, **given):
    model.zero_grad(set_to_none=True)
    loss = model(input_ids=ids, **given).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance, check_dtype=False)
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        scale = max(1.0, expected[1][name].abs().max().item())
        error = (found[1][name] - expected[1][name]).abs().max().item()
        assert error <= tolerance * scale, (name, error)


@pytest.mark.parametrize("case", ["plain", "left", "right", "packed"])
@pytest.mark.parametrize("kind", KINDS)
def test_loss_and_gradients_are_those_of_its_own_attention(kind, case):
    model, ids = small_model(kind), tokens()
    given = inputs(case, ids)
    expected = step(model, ids, **given)
    report = make_memory_efficient(model)
    assert_same_step(step(model, ids, **given), expected, CLOSE[torch.float64])
    changed = {part for part, _ in report.changed}
    assert changed == {"attention", "loss", "layers", *([] if kind == "GptOss" else ["2 MLPs"])}
    restore(model)
    again = step(model, ids, **given)
    assert torch.equal(again[0], expected[0])
    assert all(torch.equal(again[1][n], g) for n, g in expected[1].items())
