"""What the loss refuses, by the argument's name."""

import math

import pytest
import torch

from memory_efficient_attention_pytorch.loss.linear_cross_entropy import linear_cross_entropy
from tests.loss.problems import problem


@pytest.mark.parametrize("label", [29, -1, 10**9])
def test_a_label_out_of_range(label):
    hidden, weight, bias, labels = problem()
    labels[2, 5] = label
    with pytest.raises(ValueError, match=rf"labels: expected each in \[0, 29\) or ignore_index, -100, got {label}"):
        linear_cross_entropy(hidden, weight, labels, bias=bias)


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("hidden", {"hidden": torch.zeros(3, 17, 12, dtype=torch.int64)}),
        ("weight", {"weight": torch.zeros(29, 13)}),
        ("weight", {"weight": torch.zeros(29)}),
        ("weight", {"weight": torch.zeros(0, 12), "bias": None}),
        ("weight", {"weight": torch.zeros(29, 12, dtype=torch.float64)}),
        ("weight", {"weight": torch.zeros(29, 12, device="meta")}),
        ("labels", {"labels": torch.zeros(3, 16, dtype=torch.int64)}),
        ("labels", {"labels": torch.zeros(3, 17)}),
        ("labels", {"labels": torch.zeros(3, 17, dtype=torch.int32)}),
        ("bias", {"bias": torch.zeros(28)}),
        ("bias", {"bias": torch.zeros(29, dtype=torch.bfloat16)}),
        ("reduction", {"reduction": "batchmean"}),
        ("label_smoothing", {"label_smoothing": 1.5}),
        ("label_smoothing", {"label_smoothing": -0.1}),
        ("chunk_size", {"chunk_size": 0}),
        ("class_weights", {"class_weights": torch.ones(28)}),
        ("class_weights", {"class_weights": torch.ones(29, dtype=torch.int64)}),
        ("class_weights", {"class_weights": torch.ones(29, requires_grad=True)}),
        ("class_weights", {"class_weights": [1.0] * 29}),
        ("scale", {"scale": math.inf}),
        ("softcap", {"softcap": 0.0}),
        ("softcap", {"softcap": -30.0}),
        ("z_loss", {"z_loss": -1e-4}),
        ("chunk_size", {"chunk_size": 2.0}),
    ],
    ids=str,
)
def test_mistakes_are_named(name, change):
    right = dict(zip(("hidden", "weight", "bias", "labels"), problem(), strict=True))
    with pytest.raises(ValueError, match=f"^{name}: expected "):
        linear_cross_entropy(**{**right, **change})


def test_autocast_refuses_what_it_would_not_convert():
    hidden, weight, _, labels = problem(bias=False)
    with torch.autocast("cpu", dtype=torch.bfloat16), pytest.raises(ValueError, match=r"^weight: expected a dtype"):
        linear_cross_entropy(hidden, weight.double(), labels)
