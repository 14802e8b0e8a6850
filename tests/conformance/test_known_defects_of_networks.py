"""What the package that this one replaces got wrong in networks and generation, one test each: all fail there."""

import inspect
from functools import partial

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.distributed.fsdp import fully_shard
from torch.nn.parallel import DistributedDataParallel

from memory_efficient_attention_pytorch import (
    AutoregressiveWrapper,
    FeedForward,
    PreNorm,
    ReversibleSequence,
    Transformer,
)
from tests import reference
from tests.memory.live_bytes import LiveBytes, saved_bytes

# Reversible


class Branch(nn.Module):
    """A branch from outside the library, with dropout and an optional context."""

    def __init__(self, dim=8, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout), nn.Linear(dim, dim))

    def forward(self, x, context=None):
        return self.net(x if context is None else x * torch.sigmoid(context))


def branches(depth=3, **kwargs):
    return nn.ModuleList([nn.ModuleList([Branch(**kwargs), Branch(**kwargs)]) for _ in range(depth)])


def stored(blocks, x, routes=None, **kwargs):
    """The same network with everything stored."""
    x1 = x2 = x
    for i, (f, g) in enumerate(blocks):
        to_f, to_g = ({name: kwargs[name] for name in kwargs if routes[name][i][side]} for side in (0, 1))
        x1 = x1 + f(x2, **to_f)
        x2 = x2 + g(x1, **to_g)
    return x1 + x2


def gradients(out, *wanted):
    return torch.autograd.grad(out.square().sum(), wanted)


def assert_same_gradients(ours, truth, tolerance=1e-5):
    for mine, true in zip(ours, truth, strict=True):
        reference.assert_close("gradient", mine, true, tolerance)


def test_reversible_backward_in_eval():
    blocks, x = branches(dropout=0.5), torch.randn(2, 5, 8, requires_grad=True)
    net = ReversibleSequence(blocks).eval()
    wanted = (x, *blocks.parameters())
    assert_same_gradients(gradients(net(x), *wanted), gradients(stored(blocks, x), *wanted))


def test_reversible_two_forwards_before_a_backward_with_dropout():
    blocks = branches(dropout=0.5)
    net, x = ReversibleSequence(blocks), torch.randn(2, 5, 8, requires_grad=True)
    y = torch.randn(2, 5, 8)

    def both(network):
        torch.manual_seed(1)
        first = network(x)
        torch.manual_seed(2)
        return first, network(y)

    ours, truth = both(net), both(partial(stored, blocks))
    for mine, true in zip(ours, truth, strict=True):
        reference.assert_close("out", mine, true, 1e-5)
    wanted = (x, *blocks.parameters())
    assert_same_gradients(gradients(sum(ours), *wanted), gradients(sum(truth), *wanted))
    assert_same_gradients(*(gradients(both(network)[0], *wanted) for network in (net, partial(stored, blocks))))


def test_reversible_recomputes_under_the_forwards_autocast():
    """The recomputation sees the precision of the forward, though backward runs outside of autocast."""

    class Watch(Branch):
        seen: list

        def forward(self, x):
            self.seen.append(torch.is_autocast_enabled("cpu"))
            return super().forward(x).float()

    blocks = nn.ModuleList([nn.ModuleList([Watch(), Watch()]) for _ in range(2)])
    for branch in (b for block in blocks for b in block):
        branch.seen = []
    x = torch.randn(2, 5, 8, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = ReversibleSequence(blocks)(x)
    out.sum().backward()
    assert all(branch.seen == [True, True] for block in blocks for branch in block), "once forward, once recomputed"
    assert x.grad is not None


def test_reversible_parameters_are_visible_to_autograd():
    """With an input that needs no gradient the blocks' parameters get theirs all the same."""
    blocks, x = branches(), torch.randn(2, 5, 8)
    net, wanted = ReversibleSequence(blocks), tuple(blocks.parameters())
    assert net(x).requires_grad
    assert_same_gradients(gradients(net(x), *wanted), gradients(stored(blocks, x), *wanted))


def test_transformer_with_frozen_embeddings_trains_its_attention():
    model = Transformer(num_tokens=11, max_seq_len=8, dim=16, depth=2, heads=2, dim_head=8)
    model.token_emb.requires_grad_(False)
    model.pos_emb.requires_grad_(False)
    tokens = torch.randint(11, (2, 8))
    model(tokens, labels=tokens).backward()
    for name, parameter in model.named_parameters():
        assert (parameter.grad is not None and parameter.grad.any()) == parameter.requires_grad, name


def test_reversible_shares_a_context_that_needs_a_gradient():
    blocks, x = branches(), torch.randn(2, 5, 8, requires_grad=True)
    context = torch.randn(2, 5, 8, requires_grad=True)
    routes = {"context": [(True, False), (True, True), (False, True)]}
    ours = ReversibleSequence(blocks, args_route=routes)(x, context=context)
    truth = stored(blocks, x, routes, context=context)
    reference.assert_close("out", ours, truth, 1e-5)
    wanted = (x, context, *blocks.parameters())
    assert_same_gradients(gradients(ours, *wanted), gradients(truth, *wanted))


def test_reversible_retains_no_graph(monkeypatch):
    retained = []
    for name in ("backward", "grad"):
        original = getattr(torch.autograd, name)
        parameters = inspect.signature(original)

        def watching(*args, original=original, parameters=parameters, **kwargs):
            retained.append(bool(parameters.bind(*args, **kwargs).arguments.get("retain_graph")))
            return original(*args, **kwargs)

        monkeypatch.setattr(torch.autograd, name, watching)
    x = torch.randn(2, 5, 8, requires_grad=True)
    ReversibleSequence(branches())(x).sum().backward()
    assert retained
    assert not any(retained)


@pytest.fixture
def one_process_group():
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def small_transformer():
    return Transformer(num_tokens=11, max_seq_len=8, dim=16, depth=2, heads=2, dim_head=8, causal=True, q_bucket_size=4)


@pytest.mark.usefixtures("one_process_group")
def test_distributed_data_parallel_with_find_unused_parameters():
    model, tokens = small_transformer(), torch.randint(11, (2, 8))
    truth = torch.autograd.grad(model(tokens, labels=tokens), tuple(model.parameters()))
    parallel = DistributedDataParallel(model, find_unused_parameters=True)
    parallel(tokens, labels=tokens).backward()
    assert_same_gradients([p.grad for p in model.parameters()], truth)


@pytest.mark.usefixtures("one_process_group")
def test_fully_sharded_per_block():
    model, tokens = small_transformer(), torch.randint(11, (2, 8))
    truth = torch.autograd.grad(model(tokens, labels=tokens), tuple(model.parameters()))
    mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
    for block in model.layers:
        fully_shard(block, mesh=mesh)
    fully_shard(model, mesh=mesh)
    model(tokens, labels=tokens).backward()
    assert_same_gradients([p.grad.full_tensor() for p in model.parameters()], truth)


# Feed-forward


def test_feed_forward_chunks_save_memory_in_training():
    def measure(chunks):
        torch.manual_seed(0)
        net, x = FeedForward(16, 4, chunks), torch.randn(1, 512, 16, requires_grad=True)
        with LiveBytes() as count:
            out = net(x)
            out.sum().backward()
        return count.peak, saved_bytes(net, x), out.detach(), x.grad

    (peak, saved, out, grad), (chunked_peak, chunked_saved, chunked_out, chunked_grad) = measure(1), measure(8)
    hidden = 512 * 64 * 4
    assert chunked_saved <= saved - hidden
    assert chunked_peak <= peak - hidden
    torch.testing.assert_close(chunked_out, out)
    torch.testing.assert_close(chunked_grad, grad)


# Transformer


@pytest.mark.parametrize("use_flash_attn", [True, False])
def test_transformer_dropout(use_flash_attn):
    model = Transformer(
        num_tokens=11, max_seq_len=8, dim=16, depth=2, heads=2, dropout=0.5, use_flash_attn=use_flash_attn
    )
    tokens = torch.randint(11, (2, 8))
    assert not model(tokens).equal(model(tokens))
    model(tokens, labels=tokens).backward()
    model.eval()
    assert model(tokens).equal(model(tokens))


def test_transformer_takes_a_mask():
    tokens = torch.randint(11, (2, 8))
    mask = torch.tensor([[True] * 8, [True] * 5 + [False] * 3])
    other = tokens.clone()
    other[1, 5:] = (other[1, 5:] + 1) % 11
    for causal in (False, True):
        model = Transformer(num_tokens=11, max_seq_len=8, dim=16, depth=2, heads=2, causal=causal)
        assert model(tokens, mask=mask)[1, :5].equal(model(other, mask=mask)[1, :5])


def test_transformer_loss_never_holds_all_logits():
    model = Transformer(num_tokens=32768, max_seq_len=512, dim=8, depth=1, heads=2, dim_head=4, loss_chunk_size=64)
    tokens = torch.randint(32768, (1, 512))
    with LiveBytes() as count:
        model(tokens, labels=tokens).backward()
    assert count.largest < 512 * 32768 * 4 / 2


@pytest.mark.parametrize("n", [9, 100])
def test_too_long_an_input_is_a_clear_error(n):
    with pytest.raises(ValueError, match=rf"(?s)(max_seq_len.*8.*{n}|{n}.*max_seq_len.*8|8.*max_seq_len.*{n})"):
        small_transformer()(torch.zeros(1, n, dtype=torch.int64))


# Generation


class Scripted(nn.Module):
    """A network from outside the library: after token t it is sure of token (t + 1) mod num_tokens."""

    max_seq_len = 64

    def __init__(self, num_tokens=16):
        super().__init__()
        self.num_tokens = num_tokens

    def forward(self, x):
        return 50.0 * F.one_hot((x + 1) % self.num_tokens, self.num_tokens)


def test_generation_ends_when_every_row_has_ended():
    out = AutoregressiveWrapper(Scripted(), pad_value=15).generate(torch.tensor([[1], [3]]), 12, eos_token=5)
    assert out[:, :4].tolist() == [[2, 3, 4, 5], [4, 5, 15, 15]], "a row keeps its eos and is padded after it"
    assert (out[:, 4:] == 15).all()


def test_an_eos_in_the_prompt_does_not_count():
    out = AutoregressiveWrapper(Scripted()).generate(torch.tensor([[5, 5, 1], [5, 1, 2]]), 3, eos_token=5)
    assert out.tolist() == [[2, 3, 4], [3, 4, 5]]


@pytest.mark.parametrize("num_tokens", [2, 5, 9])
def test_generation_with_a_small_vocabulary(num_tokens):
    out = AutoregressiveWrapper(Scripted(num_tokens)).generate(torch.tensor([[0]]), 4)
    assert out.tolist() == [[(i + 1) % num_tokens for i in range(4)]]


def test_generation_at_temperature_zero_takes_the_likeliest():
    model = small_transformer()
    prompt = torch.randint(11, (3, 2))
    first, second = (AutoregressiveWrapper(model).generate(prompt, 5, temperature=0.0) for _ in range(2))
    assert first.equal(second)
    sequence = prompt
    for _ in range(5):
        sequence = torch.cat([sequence, model(sequence)[:, -1:].argmax(-1)], dim=1)
    assert first.equal(sequence[:, 2:])


class Failing(Scripted):
    def forward(self, x):
        raise KeyError("lost")


@pytest.mark.parametrize("training", [True, False])
def test_generation_restores_the_mode_after_an_exception(training):
    wrapper = AutoregressiveWrapper(Failing()).train(training)
    with pytest.raises(KeyError, match="lost"):
        wrapper.generate(torch.tensor([[1]]), 3)
    assert wrapper.training is wrapper.net.training is training


def test_generation_feeds_each_token_once():
    """With the cache, the network reads the prompt and then one token a step."""
    model = small_transformer()
    lengths = []
    model.token_emb.register_forward_hook(lambda module, args, out: lengths.append(out.shape[1]))
    AutoregressiveWrapper(model).generate(torch.randint(11, (2, 3)), 5)
    assert lengths[0] == 3
    assert set(lengths[1:]) == {1}
    assert len(lengths) in (5, 6)


def test_prenorm_is_what_the_network_is_made_of():
    """The names that the tests above take for granted."""
    f, g = small_transformer().layers[0]
    assert isinstance(f, PreNorm)
    assert isinstance(g, PreNorm)
    assert isinstance(g.fn, FeedForward)
