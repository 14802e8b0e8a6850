"""A step of a model of transformers, on inputs as people have them, and a comparison of two."""

import torch


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


def step(model, ids=None, **given):
    model.zero_grad(set_to_none=True)
    loss = model(**given if ids is None else {"input_ids": ids, **given}).loss
    loss.backward()
    return loss.detach(), {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


def assert_same_step(found, expected, tolerance):
    torch.testing.assert_close(found[0], expected[0], rtol=tolerance, atol=tolerance, check_dtype=False)
    assert found[1].keys() == expected[1].keys()
    for name in expected[1]:
        scale = max(1.0, expected[1][name].abs().max().item())
        error = (found[1][name] - expected[1][name]).abs().max().item()
        assert error <= tolerance * scale, (name, error)
