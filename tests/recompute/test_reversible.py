"""Reversible blocks: the gradients of storing everything, whatever autograd's users do with them."""

import copy

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch import Chunked, ReversibleSequence
from tests.agreement import assert_same, difference, gradients, one_thread, products, with_seed
from tests.branches import DIM, IN_PIECES, KINDS, Plain, check, layers, plain, stored, tokens, trainable
from tests.memory.live_bytes import LiveBytes

pytestmark = pytest.mark.usefixtures(one_thread.__name__)


# The gradients of storing everything


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-13), (torch.float32, 1e-6)])
def test_gradients_are_those_of_storing_everything(kind, dtype, tolerance):
    check(KINDS[kind]().to(dtype), tokens(dtype=dtype), tolerance)


@pytest.mark.parametrize("exact", [False, True])
def test_gradcheck(exact):
    """With a grid too fine to be felt, in fp64, the rounding's gradient of 1 is the true one."""
    blocks, x = plain(depth=2).double(), tokens(1, 3, DIM, dtype=torch.float64)
    net = ReversibleSequence(blocks, exact=exact, grid=2**-40)
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


def test_eval_mode():
    blocks = plain(dropout=0.5).double().eval()
    check(blocks, tokens(dtype=torch.float64), 1e-12)


@pytest.mark.parametrize("kind", ["plain", "attention"])
def test_dropout_draws_the_same_both_times(kind):
    blocks = (plain(dropout=0.5) if kind == "plain" else layers(dropout=0.3)).double()
    x = tokens(dtype=torch.float64)
    net, wanted = ReversibleSequence(blocks), trainable(x, blocks)
    ours, truth = with_seed(lambda: net(x)), with_seed(lambda: stored(blocks, x))
    torch.manual_seed(11)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), 1e-12)
    assert not net(x).equal(net(x))


def test_dropout_in_pieces_draws_the_same_both_times():
    """Pieces draw in an order of their own; against finite differences of the seeded function."""
    blocks = layers(depth=2, dropout=0.3, **IN_PIECES).double()
    net, x = ReversibleSequence(blocks), tokens(1, 5, DIM, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x, *_: with_seed(lambda: net(x)), (x, *net.parameters()), fast_mode=True)


def test_backward_leaves_the_random_state_alone():
    net, x = ReversibleSequence(plain(dropout=0.5)), tokens()
    before = torch.get_rng_state()
    out = net(x)
    assert not torch.get_rng_state().equal(before)
    torch.manual_seed(5)
    before = torch.get_rng_state()
    out.sum().backward()
    assert torch.get_rng_state().equal(before)


def test_two_forwards_before_a_backward_with_dropout():
    blocks = plain(dropout=0.5).double()
    x, y = tokens(dtype=torch.float64), tokens(dtype=torch.float64)
    net, wanted = ReversibleSequence(blocks), trainable(x, y, blocks)

    def run(network):
        torch.manual_seed(3)
        return gradients(network(x) * network(y).sin(), wanted)

    assert_same(run(net), run(lambda x: stored(blocks, x)), 1e-12)
    torch.manual_seed(3)
    first, second = net(x), net(y)
    of_second, of_first = gradients(second, trainable(blocks)), gradients(first, trainable(blocks))
    torch.manual_seed(3)
    first, second = stored(blocks, x), stored(blocks, y)
    truth = gradients(second, trainable(blocks)), gradients(first, trainable(blocks))
    assert_same((*of_second, *of_first), (*truth[0], *truth[1]), 1e-12)


@pytest.mark.parametrize("exact", [False, True])
def test_backward_twice_with_retain_graph(exact):
    blocks, x = plain(dropout=0.5).double(), tokens(dtype=torch.float64)
    out = with_seed(lambda: ReversibleSequence(blocks, exact=exact, grid=2**-40)(x))
    truth = with_seed(lambda: stored(blocks, x))
    wanted = trainable(x, blocks)
    for seed in (1, 2, 3):
        again = {"seed": seed, "retain_graph": seed < 3}
        assert_same(gradients(out, wanted, **again), gradients(truth, wanted, **again), 1e-9)
    with pytest.raises(RuntimeError, match="second time"):
        gradients(out, wanted)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode])
def test_without_gradients(context):
    blocks, x = plain(), tokens()
    with context():
        out = ReversibleSequence(blocks)(x)
    assert not out.requires_grad
    assert difference(out, stored(blocks, x)) < 1e-6


@pytest.mark.parametrize("kind", KINDS)
def test_backward_inside_of_autocast_gives_the_same_gradients(kind):
    blocks, x = KINDS[kind](), tokens()
    net, wanted = ReversibleSequence(blocks), trainable(x, blocks)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = gradients(net(x), wanted)
        out = net(x)
    assert_same(inside, gradients(out, wanted), 0.0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        of_fp32 = gradients(with_autocast_off(net, x), wanted)
    assert_same(of_fp32, gradients(net(x), wanted), 0.0)


def with_autocast_off(net, x):
    with torch.autocast("cpu", enabled=False):
        return net(x)


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


def test_everything_frozen():
    blocks = plain().requires_grad_(False)
    out = ReversibleSequence(blocks)(tokens(requires_grad=False))
    assert not out.requires_grad


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


def test_double_backward_raises():
    x = tokens()
    (gradient,) = torch.autograd.grad(ReversibleSequence(plain())(x).square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiable once"):
        gradient.sum().backward()


def test_a_parameter_changed_in_place_before_backward_raises():
    blocks = plain()
    out = ReversibleSequence(blocks)(tokens())
    with torch.no_grad():
        blocks[0][1].net[1].weight.mul_(2)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@pytest.mark.parametrize("kind", KINDS)
def test_saved_tensor_hooks(kind):
    blocks, x = KINDS[kind]().double(), tokens(dtype=torch.float64)
    net, wanted, packed = ReversibleSequence(blocks), trainable(x, blocks), []
    truth = gradients(stored(blocks, x), wanted)

    def pack(tensor):
        packed.append(tensor.shape)
        return tensor.clone()

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        out = net(x)
    assert packed.count(x.shape) == 2, "the two streams, once"
    assert_same(gradients(out, wanted, retain_graph=True), truth, 1e-12)
    assert_same(gradients(out, wanted), truth, 1e-12)
    with save_on_cpu():
        out = net(x)
    assert_same(gradients(out, wanted), truth, 1e-12)


def test_inside_of_a_checkpoint():
    blocks, x = plain(dropout=0.3).double(), tokens(dtype=torch.float64)
    net, wanted = ReversibleSequence(blocks), trainable(x, blocks)
    ours = with_seed(lambda: checkpoint(net, x, use_reentrant=False))
    truth = with_seed(lambda: net(x))
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), 0.0)


@pytest.mark.parametrize("kind", KINDS)
def test_hooks_on_parameters_run_once_on_the_whole_gradient(kind):
    blocks, x = KINDS[kind]().double(), tokens(dtype=torch.float64, requires_grad=False)
    truth = gradients(stored(blocks, x), blocks.parameters())
    for parameter in blocks.parameters():
        parameter.register_hook(lambda gradient: 3 * gradient)
    ours = gradients(ReversibleSequence(blocks)(x), blocks.parameters())
    assert_same(ours, tuple(3 * gradient for gradient in truth), 1e-12)


@pytest.mark.parametrize("kind", KINDS)
def test_an_optimizer_stepping_in_hooks(kind):
    """Each parameter steps as soon as its gradient is there, while earlier blocks are still to be rebuilt."""
    blocks, x = KINDS[kind]().double(), tokens(dtype=torch.float64)
    other = copy.deepcopy(blocks)
    in_hooks = {}

    def step_now(parameter):
        in_hooks[parameter].step()
        in_hooks[parameter].zero_grad()

    for parameter in blocks.parameters():
        in_hooks[parameter] = torch.optim.Adam([parameter], lr=0.01)
        parameter.register_post_accumulate_grad_hook(step_now)
    plain_optimizer = torch.optim.Adam(other.parameters(), lr=0.01)
    for _ in range(3):
        ReversibleSequence(blocks)(x).square().mean().backward()
        assert all(p.grad is None for p in blocks.parameters())
        stored(other, x).square().mean().backward()
        plain_optimizer.step()
        plain_optimizer.zero_grad()
    assert_same([*blocks.parameters()], [*other.parameters()], 1e-10)


def test_state_dictionary_and_copy():
    blocks, x = plain(), tokens()
    net = ReversibleSequence(blocks)
    assert set(net.state_dict()) == set(blocks.state_dict())
    clone = copy.deepcopy(net)
    assert clone(x).equal(net(x))
    clone.load_state_dict({name: 0 * value for name, value in net.state_dict().items()})
    assert not clone(x).equal(net(x))
