"""What ours is compared with computes what it should: else a comparison says nothing."""

import pytest
import torch
from torch.nn import functional as F

from memory_efficient_attention_pytorch.benchmarking.baselines import SdpaTransformer
from memory_efficient_attention_pytorch.benchmarking.shape import Shape
from memory_efficient_attention_pytorch.benchmarking.systems import find_systems

SHAPE = Shape(seq_len=37, batch_size=2, dim=32, depth=3, heads=4, num_tokens=19)


def loss_and_gradients(**settings):
    torch.manual_seed(0)
    model = SdpaTransformer(SHAPE, **settings).double()
    tokens = torch.randint(SHAPE.num_tokens, (SHAPE.batch_size, SHAPE.seq_len))
    loss = model(tokens, tokens.roll(-1, 1))
    loss.backward()
    return loss.detach(), [parameter.grad for parameter in model.parameters()]


@pytest.mark.parametrize(
    "settings",
    [{"checkpoint_layers": True}, {"loss_chunk_size": 10}, {"checkpoint_layers": True, "loss_chunk_size": 1000}],
    ids=str,
)
def test_saving_memory_changes_no_gradient(settings):
    loss, gradients = loss_and_gradients()
    saving_loss, saving_gradients = loss_and_gradients(**settings)
    torch.testing.assert_close(saving_loss, loss, rtol=1e-12, atol=0)
    for saving, stored in zip(saving_gradients, gradients, strict=True):
        torch.testing.assert_close(saving, stored, rtol=1e-9, atol=1e-12)


def test_no_token_sees_a_later_one():
    model = SdpaTransformer(SHAPE).double()
    tokens = torch.randint(SHAPE.num_tokens, (1, SHAPE.seq_len))
    changed = tokens.clone()
    changed[0, 20] = (changed[0, 20] + 1) % SHAPE.num_tokens
    labels = tokens.roll(-1, 1)

    def token_losses(x):
        hidden = model.token_emb(x) + model.pos_emb(torch.arange(SHAPE.seq_len))
        for layer in model.layers:
            hidden = layer(hidden)
        return F.cross_entropy(model.to_logits(hidden)[0], labels[0], reduction="none")

    difference = (token_losses(tokens) - token_losses(changed)).abs()
    assert difference[:20].max() == 0
    assert difference[20:].max() > 0


def test_shape_refuses_what_cannot_be_built():
    with pytest.raises(ValueError, match="heads: expected a divisor of dim"):
        Shape(dim=100, heads=8)
    with pytest.raises(ValueError, match="depth"):
        Shape(depth=0)


@pytest.mark.parametrize("heads", [1, 3, 5, 8])
def test_lean_systems_of_any_number_of_heads(heads):
    shape = Shape(seq_len=16, dim=8 * heads, depth=1, heads=heads)
    for name in ("ours-lean", "ours-window", "ours-bf16", "ours-kept"):
        model, _ = find_systems([name])[0].build(shape)
        assert sum(p.numel() for p in model.parameters()) > 0
