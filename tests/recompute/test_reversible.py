"""Reversible blocks: the gradients of storing everything, whatever autograd's users do with them."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import saved_tensors_hooks

from memory_efficient_attention_pytorch import Chunked, ReversibleSequence
from tests.agreement import assert_same, gradients, products, with_seed
from tests.branches import DIM, KINDS, Plain, check, layers, plain, stored, tokens, trainable
from tests.memory.live_bytes import LiveBytes, saved_bytes

# The gradients of storing everything


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_gradients_are_those_of_storing_everything(kind, dtype, tolerance):
    check(KINDS[kind]().to(dtype), tokens(dtype=dtype), tolerance)


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize(
    "net",
    [
        lambda: ReversibleSequence(plain(dropout=0.3)),
        lambda: ReversibleSequence(layers(dropout=0.3, head_chunks=2, ff_chunks=2)),
        lambda: Chunked(Plain(dropout=0.3), chunks=2),
    ],
    ids=["plain", "layers", "chunked"],
)
def test_the_mode_is_that_of_the_forward_pass(net, training):
    """As with stored activations: ``eval()`` between forward and backward, of a validation in between, say."""
    net, x = net().train(training), tokens()
    wanted = trainable(x, net)
    found = []
    for between in (training, not training):
        out = with_seed(lambda: net.train(training)(x))
        net.train(between)
        found.append(gradients(out, wanted))
        assert all(part.training is between for part in net.modules())
    assert_same(*found, 0.0)


def test_gradcheck_of_exact_mode():
    """With a grid too fine to be felt, in fp64, the rounding's gradient of 1 is the true one."""
    blocks, x = plain(depth=2).double(), tokens(1, 3, DIM, dtype=torch.float64)
    net = ReversibleSequence(blocks, exact=True, grid=2**-40)
    assert torch.autograd.gradcheck(lambda x, *_: net(x), (x, *net.parameters()), fast_mode=True, atol=1e-4)


@pytest.mark.parametrize("shape", [(5, DIM), (2, 3, 4, DIM), (1, DIM), (0, 7, DIM), (2, 0, DIM)], ids=str)
def test_streams_of_any_shape(shape):
    check(plain().double(), tokens(*shape, dtype=torch.float64), 1e-12)


def test_non_contiguous_input_and_cotangents_that_are_not_ours():
    blocks, base = plain().double(), tokens(DIM, 7, 2, dtype=torch.float64)
    x = base.permute(2, 1, 0)
    cotangent = torch.randn(DIM, 7, 2, dtype=torch.float64).permute(2, 1, 0)
    kept = cotangent.clone()
    for given in (cotangent, torch.ones((), dtype=torch.float64).expand(2, 7, DIM)):
        ours, truth = ReversibleSequence(blocks)(x), stored(blocks, x)
        wanted = trainable(base, blocks)
        assert_same(*(torch.autograd.grad(out, wanted, given) for out in (ours, truth)), 1e-12)
    assert cotangent.equal(kept)


def test_one_block_one_depth_shared_modules_and_nesting():
    """The same branch in several places, a reversible sequence inside another, a Chunked module: all are branches."""
    shared, x = Plain().double(), tokens(dtype=torch.float64)
    check(nn.ModuleList([nn.ModuleList([shared, shared]), nn.ModuleList([Plain().double(), shared])]), x, 1e-12)
    inner = ReversibleSequence(plain(depth=2))
    nested = nn.ModuleList([nn.ModuleList([inner, Chunked(Plain(), chunks=2)])]).double()
    check(nested, x, 1e-12)


def test_the_input_and_the_output_may_be_used_elsewhere():
    blocks, x = plain().double(), tokens(dtype=torch.float64)
    wanted = trainable(x, blocks)

    def run(net):
        y = x.sin()
        out = net(y)
        return gradients(out * out.exp() + net(out) * y, wanted)

    assert_same(run(ReversibleSequence(blocks)), run(lambda x: stored(blocks, x)), 1e-12)


# Modes and randomness


@pytest.mark.parametrize("kind", ["plain", "attention"])
def test_dropout_draws_the_same_both_times(kind):
    blocks = (plain(dropout=0.5) if kind == "plain" else layers(dropout=0.3)).double()
    x = tokens(dtype=torch.float64)
    net, wanted = ReversibleSequence(blocks), trainable(x, blocks)
    ours, truth = with_seed(lambda: net(x)), with_seed(lambda: stored(blocks, x))
    torch.manual_seed(11)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), 1e-12)
    assert not net(x).equal(net(x))


# What autograd and its users may do with it


@pytest.mark.parametrize(
    "frozen", ["input", "first blocks", "last blocks", "every f", "blocks", "input and first blocks"]
)
def test_frozen_parts(frozen):
    blocks = plain(depth=4).double()
    x = tokens(dtype=torch.float64, requires_grad="input" not in frozen)
    parts = {
        "first": [*blocks[:2]],
        "last": [*blocks[2:]],
        "every": [block[0] for block in blocks],
        "blocks": [*blocks],
        "input": [*blocks[:2]] if "first" in frozen else [],
    }[frozen.split()[0]]
    for part in parts:
        part.requires_grad_(False)
    check(blocks, x, 1e-12)
    ReversibleSequence(blocks)(x).sum().backward()
    for tensor in (x, *blocks.parameters()):
        assert (tensor.grad is not None) == tensor.requires_grad


def test_autograd_grad_of_some_parameters_rebuilds_no_more_than_it_needs():
    blocks, x = plain(depth=4).double(), tokens(dtype=torch.float64)
    net = ReversibleSequence(blocks)
    for wanted in (trainable(blocks[3][1]), trainable(blocks[0][0]), trainable(blocks[1][0], blocks[2][1])[1:4]):
        assert_same(gradients(net(x), wanted), gradients(stored(blocks, x), wanted), 1e-12)
    assert all(t.grad is None for t in trainable(x, blocks))
    out = net(x)
    with LiveBytes() as count:
        gradients(out, trainable(blocks[3][1]))
    assert products(count) == 2 + 4, "of eight branches the last one alone"


def test_a_parameter_without_use_has_no_gradient():
    blocks = plain()
    blocks[1][0].spare = nn.Parameter(torch.ones(3))
    ReversibleSequence(blocks)(tokens()).sum().backward()
    assert blocks[1][0].spare.grad is None
    assert blocks[0][0].net[1].weight.grad is not None


@pytest.mark.parametrize("kind", KINDS)
def test_the_streams_are_saved_once(kind):
    x, packed = tokens(), []
    with saved_tensors_hooks(lambda tensor: (packed.append(tensor.shape), tensor)[1], lambda tensor: tensor):
        ReversibleSequence(KINDS[kind]())(x)
    assert packed.count(x.shape) == 2


def test_state_dictionary_and_copy():
    blocks, x = plain(), tokens()
    net = ReversibleSequence(blocks)
    assert set(net.state_dict()) == set(blocks.state_dict())
    clone = copy.deepcopy(net)
    assert clone(x).equal(net(x))
    clone.load_state_dict({name: 0 * value for name, value in net.state_dict().items()})
    assert not clone(x).equal(net(x))


class InFp32(nn.Module):
    """Its value is wider than the streams."""

    def __init__(self):
        super().__init__()
        self.norm = nn.LayerNorm(DIM)

    def forward(self, x):
        return self.norm(x.float())


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_streams_keep_their_dtype_whether_stored_or_rebuilt(dtype, exact):
    blocks = [(InFp32(), InFp32()) for _ in range(3)]
    x = tokens(2, 5, DIM, dtype=dtype)
    rebuilt, kept = (ReversibleSequence(blocks, exact=exact, reversible=on)(x) for on in (True, False))
    with torch.no_grad():
        evaluated = ReversibleSequence(blocks, exact=exact)(x)
    assert rebuilt.equal(kept)
    assert rebuilt.equal(evaluated)


@pytest.mark.parametrize("reversible", [True, False])
def test_a_value_of_another_shape_is_refused_stored_or_rebuilt(reversible):
    class FirstToken(nn.Module):
        def forward(self, x):
            return x[:, :1]

    net = ReversibleSequence([(FirstToken(), nn.Identity())], reversible=reversible)
    with pytest.raises(ValueError, match="piece: expected a value of the output's slice"):
        net(tokens(2, 5, DIM))


def test_no_cache_is_no_reason_to_store_activations():
    net, x = ReversibleSequence(layers(), args_route={"cache": [(True, False)] * 3}), tokens(2, 5, DIM)
    assert saved_bytes(net, x, cache=None) == saved_bytes(net, x)


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_the_input_may_be_overwritten_before_backward(depth):
    net, x = ReversibleSequence(plain(depth=depth)), tokens()
    truth, given = gradients(net(x), net.parameters()), x.clone()
    out = net(given)
    with torch.no_grad():
        given.zero_()
    assert_same(gradients(out, net.parameters()), truth, 0.0)


def test_a_hook_that_changes_what_the_last_block_was_given_is_refused():
    net = ReversibleSequence(plain(depth=2))

    def zero(module, args, out):
        args[1].detach().zero_()

    net[-1].register_forward_hook(zero)
    with pytest.raises(ValueError, match="a reversible block's input: expected to be left unchanged"):
        net(tokens(requires_grad=True))


def test_a_hook_that_changes_what_the_last_block_returns_is_refused_too():
    for change in (lambda y1, y2: (2 * y1, y2), lambda y1, y2: (y1, y2.mul_(2))):
        net = ReversibleSequence(plain())
        net[-1].register_forward_hook(lambda module, args, out, change=change: change(*out))
        with torch.no_grad():
            net(tokens(requires_grad=False))
        with pytest.raises(ValueError, match="a reversible block's output: expected to reach the next block unchanged"):
            net(tokens())
