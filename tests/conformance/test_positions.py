"""Every position scheme of the Transformer: padded rows, shifts, and decoding through the cache."""

import pytest
import torch

from memory_efficient_attention_pytorch import KVCache, Transformer
from tests import reference

POSITIONS = ["learned", "rotary", "alibi", "none"]
VARIANTS = [{}, {"kv_heads": 1}, {"window": 3}, {"kv_heads": 2, "head_chunks": 2, "window": (5, 0)}]


def build(positions, **kwargs):
    torch.manual_seed(5)
    shape = {"num_tokens": 19, "max_seq_len": 32, "dim": 16, "depth": 2, "heads": 4, "dim_head": 8}
    model = Transformer(**shape, causal=True, positions=positions, **kwargs).eval()
    for parameter in model.parameters():  # away from the symmetric start, where mistakes can cancel
        torch.nn.init.normal_(parameter, std=0.3)
    return model


@pytest.mark.parametrize("positions", POSITIONS)
def test_positions_matter_and_only_learned_ones_have_parameters(positions):
    model = build(positions)
    assert any("pos" in name for name, _ in model.named_parameters()) == (positions == "learned")
    tokens = torch.randint(19, (1, 12))
    swapped = tokens.clone()
    tokens[0, 2], tokens[0, 3], swapped[0, 2], swapped[0, 3] = 4, 7, 7, 4
    # Without positions attention over a set cannot tell their order; a second layer, through causality, could.
    one_layer = Transformer(num_tokens=19, max_seq_len=32, dim=16, depth=1, heads=4, causal=True, positions=positions)
    torch.nn.init.normal_(one_layer.token_emb.weight)
    torch.nn.init.normal_(one_layer.layers[0][0].fn.to_q.weight)
    with torch.no_grad():
        difference = (one_layer(tokens) - one_layer(swapped))[0, -1].abs().max()
    assert (difference < 1e-5) == (positions == "none")


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
def test_left_padded_rows_equal_their_own_run(positions, kwargs):
    model, tokens = build(positions, **kwargs), torch.randint(19, (3, 14))
    length = torch.tensor([14, 9, 2])
    mask = torch.arange(14) >= 14 - length[:, None]
    logits = model(tokens, mask=mask)
    for row in range(3):
        alone = model(tokens[row, mask[row]][None])[0]
        reference.assert_close("row", logits[row, mask[row]], alone, 1e-5)


@pytest.mark.parametrize("positions", ["rotary", "alibi", "none"])
def test_relative_schemes_see_only_distances(positions):
    """With a window, what came before it is forgotten: the same last tokens at another place give the same logits."""
    model = build(positions, window=2)
    ending = torch.randint(19, (1, 9))
    logits = [model(torch.cat([torch.randint(19, (1, n)), ending], 1))[0, -1] for n in (0, 3, 20)]
    # Two layers of windows of 2 reach 4 tokens back, each layer's keys 2 more.
    reference.assert_close("shifted", logits[1], logits[0], 1e-4)
    reference.assert_close("shifted", logits[2], logits[0], 1e-4)


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_cached_logits_equal_uncached(positions, kwargs):
    """A prompt at once, then by one, two and several tokens."""
    model, tokens = build(positions, **kwargs), torch.randint(19, (2, 17))
    full, cache, start = model(tokens), KVCache(), 0
    for size in (6, 1, 1, 2, 1, 5, 1):
        step = model(tokens[:, start : start + size], cache=cache)
        reference.assert_close(f"after {start}", step, full[:, start : start + size], 1e-5)
        start += size
        assert cache.length == start


@pytest.mark.parametrize("kwargs", VARIANTS, ids=str)
@pytest.mark.parametrize("positions", POSITIONS)
@torch.no_grad()
def test_cached_logits_of_a_ragged_batch(positions, kwargs):
    """Left-padded prompts through the cache: every row as if it were alone."""
    model, tokens = build(positions, **kwargs), torch.randint(19, (3, 15))
    mask = torch.arange(15) >= torch.tensor([[0], [4], [8]])
    cache, steps, start = KVCache(), [], 0
    for size in (9, 1, 1, 3, 1):
        stop = start + size
        steps.append(model(tokens[:, start:stop], mask=mask[:, :stop], cache=cache))
        start = stop
    together = torch.cat(steps, dim=1)
    for row in range(3):
        alone = model(tokens[row, mask[row]][None])[0]
        reference.assert_close("row", together[row, mask[row]], alone, 1e-5)


def test_a_cache_is_for_inference():
    model = build("learned")
    with pytest.raises((ValueError, RuntimeError, NotImplementedError), match="cache"):
        model(torch.randint(19, (1, 4)), cache=KVCache())
