"""Plans of modules that are no Transformer of ours."""

import numpy as np
import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch.planner import plan


def test_any_module_with_example_inputs():
    model = nn.Sequential(nn.Embedding(100, 16), nn.Linear(16, 100))

    def loss(logits):
        return nn.functional.cross_entropy(logits.flatten(0, 1), torch.zeros(logits.shape[:2].numel()).long())

    fixed = plan(model, example_inputs=torch.zeros(2, 50, dtype=torch.long), loss_fn=loss)
    assert fixed.batch_size is None
    made_up = plan(
        model,
        batch_size=2,
        seq_len=50,
        example_inputs=lambda batch, length: (torch.zeros(batch, length, dtype=torch.long, device="meta"),),
        loss_fn=loss,
    )
    np.testing.assert_array_equal(fixed.timeline.live, made_up.timeline.live)


def test_inference_of_any_module():
    made = plan(nn.Linear(8, 8), example_inputs=torch.zeros(100, 8), training=False, device="cpu")
    assert made.breakdown["parameters"] == (64 + 8) * 4
    assert made.breakdown["streams"] == 2 * 100 * 8 * 4


@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_a_module_that_holds_what_it_computed():
    class Held(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(8, 8)

        def forward(self, x):
            out = self.layer(x)
            self.mean, self.seen = out.mean(), [out]
            return self.mean

    held = Held()
    before = plan(held, example_inputs=torch.zeros(2, 8), device="cpu")
    held(torch.zeros(2, 8))
    after = plan(held, example_inputs=torch.zeros(2, 8), device="cpu")
    assert before.peak_bytes == after.peak_bytes
    normed = nn.utils.weight_norm(nn.Conv1d(4, 4, 3))
    plan(normed, example_inputs=torch.zeros(2, 4, 9), loss_fn=torch.sum, device="cpu")
