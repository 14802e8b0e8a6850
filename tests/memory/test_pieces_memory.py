"""Chunked and FeedForward: one chunk in memory, forward and backward, and nothing computed twice."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Chunked, FeedForward, PreNorm, ReversibleSequence
from tests.agreement import products
from tests.branches import TokenMLP
from tests.memory.live_bytes import LiveBytes, saved_bytes

# n tokens, d wide, a hidden layer of c·d: what a chunk holds is what falls with the number of chunks.

N, D, C = 1024, 16, 16
TOKENS = N * D * 4  # bytes of one (1, n, d) tensor


def step(net, x):
    with LiveBytes() as count:
        count.ignore(net.parameters())
        net(x).backward(torch.ones(1, 1, 1).expand(1, N, D))
    return count


@pytest.mark.parametrize("chunks", [2, 8, 64])
def test_forward_keeps_the_input_and_nothing_else(chunks):
    net, x = Chunked(TokenMLP(D, C * D), chunks=chunks), torch.randn(1, N, D, requires_grad=True)
    parameters = sum(p.nbytes for p in net.parameters())
    assert saved_bytes(net, x) == x.nbytes + parameters
    with LiveBytes() as count:
        out = net(x)
    # Beside the output: the hidden values of one chunk before and after the activation.
    assert count.peak <= out.nbytes + 2 * C * TOKENS / chunks
    assert count.live == out.nbytes


@pytest.mark.parametrize("make", [lambda k: Chunked(TokenMLP(D, C * D), chunks=k), lambda k: FeedForward(D, C, k)])
def test_backward_holds_one_chunk(make):
    """Hidden values before and after the activation and one gradient of these: 3 c n d over the number of chunks."""
    x = torch.randn(1, N, D, requires_grad=True)
    peaks = {chunks: step(make(chunks), x).peak for chunks in (1, 8, 64)}
    gradients_of_parameters = sum(p.nbytes for p in make(1).parameters())
    # Beside the chunk: output, gradient of x; the parameters' gradients, those of a chunk, one more as they add up.
    for chunks, peak in peaks.items():
        chunk = (3 * C + 6) * TOKENS / chunks
        assert peak <= chunk + 2 * TOKENS + 2.6 * gradients_of_parameters, f"{chunks} chunks: {peak / TOKENS:.2f}"
    assert peaks[8] < peaks[1] / 5
    assert peaks[64] < peaks[8] / 2


@pytest.mark.parametrize("chunks", [2, 8])
def test_every_chunk_is_recomputed_once(chunks):
    """Two layers: a product each forward, one each again in backward, and two gradients each."""
    x = torch.randn(1, N, D, requires_grad=True)
    net = Chunked(TokenMLP(D, C * D), chunks=chunks)
    with LiveBytes() as forward:
        net(x)
    assert products(forward) == 2 * chunks
    assert products(step(net, x)) == (2 + 2 + 4) * chunks
    assert products(step(net.module, x)) == 2 + 4


def test_no_product_for_gradients_that_nobody_wants():
    x = torch.randn(1, N, D, requires_grad=True)
    net = Chunked(TokenMLP(D, C * D), chunks=4)
    net.module.requires_grad_(False)
    assert products(step(net, x)) == (2 + 2 + 2) * 4
    net.module.down.requires_grad_(True)
    assert products(step(net, x.detach())) == (2 + 2 + 1) * 4


@pytest.mark.parametrize("chunks", [1, 4])
@pytest.mark.parametrize("last", [False, True])
def test_a_feed_forward_in_a_reversible_block_is_recomputed_once(chunks, last):
    """Norm and feed-forward chunk by chunk: 2 products forward, 2 again and 4 for gradients, per chunk.

    The last step of a chain keeps its input, so that its output is not computed again to be subtracted.
    """
    feed = PreNorm(D, FeedForward(D, C, chunks))
    others = [(nn.Identity(), nn.Identity())]
    net = ReversibleSequence([*others, (nn.Identity(), feed), *([] if last else others)])
    x = torch.randn(1, N, D, requires_grad=True)
    count = step(net, x)
    assert products(count) == (2 + (1 if last else 2) + 4) * chunks
    # A norm forward and one again per chunk: it belongs to the piece.
    assert count.calls["native_layer_norm"] == 2 * chunks
    assert count.calls["native_layer_norm_backward"] == chunks
