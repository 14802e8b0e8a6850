"""Reversible blocks: the gradients of storing everything, whatever autograd's users do, in memory free of depth."""

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.autograd.graph import save_on_cpu, saved_tensors_hooks
from torch.utils.checkpoint import checkpoint

from memory_efficient_attention_pytorch import (
    Attention,
    Chunked,
    FeedForward,
    PreNorm,
    RelativePositionBias,
    ReversibleSequence,
)
from tests.agreement import assert_same, difference, gradients, one_thread, products, with_seed
from tests.memory.live_bytes import LiveBytes, saved_bytes

pytestmark = pytest.mark.usefixtures(one_thread.__name__)

DIM = 8


class Plain(nn.Module):
    """A branch from outside of the library, with dropout and an optional context."""

    def __init__(self, dim=DIM, dropout=0.0):
        super().__init__()
        self.net = nn.Sequential(
            nn.LayerNorm(dim), nn.Linear(dim, dim), nn.Tanh(), nn.Dropout(dropout), nn.Linear(dim, dim)
        )

    def forward(self, x, context=None):
        return self.net(x if context is None else x * torch.sigmoid(context))


def plain(depth=3, **kwargs):
    return nn.ModuleList([nn.ModuleList([Plain(**kwargs), Plain(**kwargs)]) for _ in range(depth)])


def layers(depth=3, dim=DIM, heads=4, head_chunks=1, ff_chunks=1, **kwargs):
    """The library's own branches, in pieces where asked."""
    attention = {"dim": dim, "heads": heads, "dim_head": dim // heads, "causal": True, "head_chunks": head_chunks}
    return nn.ModuleList(
        nn.ModuleList(
            [PreNorm(dim, Attention(**attention, **kwargs)), PreNorm(dim, FeedForward(dim, 2, chunks=ff_chunks))]
        )
        for _ in range(depth)
    )


def stored(blocks, x, routes=None, **kwargs):
    """The definition, with everything stored."""
    x1 = x2 = x
    for i, (f, g) in enumerate(blocks):
        to_f, to_g = ({k: kwargs[k] for k in kwargs if routes[k][i][side]} for side in (0, 1))
        x1 = x1 + f(x2, **to_f)
        x2 = x2 + g(x1, **to_g)
    return x1 + x2


def tokens(*shape, dtype=torch.float32, requires_grad=True):
    return torch.randn(*(shape or (2, 7, DIM)), dtype=dtype, requires_grad=requires_grad)


def trainable(*sources):
    """Tensors and the parameters of modules, those that want a gradient."""
    parameters = (p for s in sources for p in ((s,) if isinstance(s, torch.Tensor) else s.parameters()))
    return tuple(p for p in parameters if p.requires_grad)


def check(blocks, x, tolerance, extra=(), routes=None, **kwargs):
    wanted = trainable(x, *extra, blocks)
    ours, truth = ReversibleSequence(blocks, routes or {})(x, **kwargs), stored(blocks, x, routes, **kwargs)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), tolerance)


IN_PIECES = {"head_chunks": 2, "ff_chunks": 3}
KINDS = {"plain": plain, "layers": layers, "pieces": lambda **kwargs: layers(**IN_PIECES, **kwargs)}


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


# Exact mode


class Watched(nn.Module):
    """Keeps a copy of each input that it sees."""

    def __init__(self, module, seen):
        super().__init__()
        self.module, self.seen = module, seen

    def forward(self, x):
        self.seen.append(x.detach().clone())
        return self.module(x)


def deep_step(exact, depth=96):
    """One bf16 step of a deep network whose branches are strong: its streams' history, its gradients, and the truth's.

    Per step of the network the second stream, seen first in the forward pass and then as it was rebuilt.
    """
    torch.manual_seed(0)
    blocks, x, seen = layers(depth, dim=32, heads=2), tokens(2, 16, 32), []
    with torch.no_grad():
        for f, g in blocks:
            f.fn.to_out.weight.mul_(3), g.fn.net[2].weight.mul_(3)
    watched = [[Watched(f, seen), Watched(g, seen)] for f, g in blocks]

    def run(net):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        return out, *gradients(out, (x, *blocks.parameters()))

    ours = run(ReversibleSequence(watched, exact=exact))
    assert len(seen) == 2 * 2 * depth, "each branch once forward and once in backward"
    history = [*zip(seen[: 2 * depth], reversed(seen[2 * depth :]), strict=True)]
    truth = run(ReversibleSequence(blocks, exact=exact, reversible=False))
    return history, ours, truth


def test_exact_mode_at_depth_96_under_bfloat16_autocast():
    """Every stream element is rebuilt bit for bit and the gradients are those of storing everything: 0.0 apart."""
    history, ours, truth = deep_step(exact=True)
    assert all(stream.equal(rebuilt) for stream, rebuilt in history)
    assert max(difference(mine, true) for mine, true in zip(ours, truth, strict=True)) == 0.0
    assert all(stream.dtype == torch.float32 for stream, _ in history)
    assert 16 < max(stream.abs().max() for stream, _ in history) < 256, "the streams grow, and stay in the exact range"


def test_without_exact_mode_streams_are_rebuilt_to_rounding_only():
    """What exact mode is for: of the same network's first stream few elements come back, and the gradient suffers."""
    history, ours, truth = deep_step(exact=False)
    first, rebuilt = history[0]
    assert (first == rebuilt).double().mean() < 0.2
    assert max(difference(mine, true) for mine, true in zip(ours, truth, strict=True)) > 1e-3


@pytest.mark.parametrize("kind", ["plain", "layers"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_exact_mode_in_any_dtype(dtype, kind):
    """The modules' dtype is theirs; streams are fp32 at least. Dropout draws the same both times."""
    blocks = (plain(dropout=0.3) if kind == "plain" else layers()).to(dtype)
    x = tokens(dtype=dtype)

    def run(**kwargs):
        out = with_seed(lambda: ReversibleSequence(blocks, exact=True, **kwargs)(x))
        assert out.dtype == dtype
        return out, *gradients(out, trainable(x, blocks))

    assert_same(run(), run(reversible=False), 0.0)


@pytest.mark.parametrize("autocast", [False, True])
def test_exact_mode_in_pieces(autocast):
    """Also branches that are added piece by piece: stored or rebuilt, not a bit apart."""
    blocks, x = layers(**IN_PIECES), tokens(2, 12, DIM)

    def run(**kwargs):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = ReversibleSequence(blocks, exact=True, **kwargs)(x)
        return out, *gradients(out, trainable(x, blocks))

    assert_same(run(), run(reversible=False), 0.0)


def test_exact_mode_differs_from_storing_plainly_by_its_grid_only():
    blocks, x = plain(), tokens(requires_grad=False)
    out = ReversibleSequence(blocks, exact=True, grid=2**-10)(x)
    assert (out / 2**-10).frac().eq(0).all(), "sums of multiples of the grid are multiples of it"
    # The input and six branches are each rounded by half a step at most, and branches stretch earlier errors.
    assert 0 < (out - stored(blocks, x)).abs().max() < 20 * 2**-10


def test_leaving_the_exact_range_is_reported_once_and_survived():
    blocks, x = plain(), tokens()
    net, large = ReversibleSequence(blocks, exact=True), 300 * x
    with pytest.warns(UserWarning, match=r"outside the exact range of 256 \(grid 1\.53e-05\)") as caught:
        out = net(large)
    assert len(caught) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = gradients(out, trainable(blocks))
        truth = gradients(stored(blocks, large), trainable(blocks))
        net(x)
        ReversibleSequence(blocks, exact=True, grid=2**-12)(large)
    assert_same(ours, truth, 1e-2)


@pytest.mark.parametrize("grid", [0.0, -1.0, 0.1, 3 * 2**-16, float("inf"), float("nan")])
def test_a_grid_that_is_no_power_of_two_is_refused(grid):
    with pytest.raises(ValueError, match="grid: expected a power of two"):
        ReversibleSequence(plain(), exact=True, grid=grid)


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


# Keywords


def test_a_shared_context_gets_its_gradient():
    routes = {"context": [(True, False), (True, True), (False, True)]}
    context = tokens(dtype=torch.float64)
    check(plain().double(), tokens(dtype=torch.float64), 1e-12, [context], routes, context=context)
    check(plain().double(), tokens(dtype=torch.float64, requires_grad=False), 1e-12, [context], routes, context=context)
    context = context.sin()
    blocks, x = plain().double(), tokens(dtype=torch.float64)
    ours, truth = ReversibleSequence(blocks, routes)(x, context=context), stored(blocks, x, routes, context=context)
    assert_same(gradients(ours, [context]), gradients(truth, [context]), 1e-12)


class Modulated(nn.Module):
    """Takes tensors nested in containers, and modules, as keywords."""

    def forward(self, x, films=None, options=None, gate=None):
        for scale, shift in films or ():
            x = x * scale + shift
        if options is not None:
            x = x * options["factor"] + options["nested"][0]
        return torch.tanh(x if gate is None else gate(x))


def test_tensors_nested_in_keywords_get_their_gradients():
    leaves = [tokens(DIM, dtype=torch.float64) for _ in range(4)]
    factor, inner = tokens(1, dtype=torch.float64), tokens(7, 1, dtype=torch.float64)
    blocks = nn.ModuleList([nn.ModuleList([Modulated(), Modulated()]) for _ in range(3)])
    routes = {"films": [(True, True)] * 3, "options": [(False, True)] * 3}
    films = [(leaves[0], leaves[1]), (-leaves[2], leaves[3])]
    options = {"factor": factor, "nested": (inner, "a string", 3)}
    x = tokens(dtype=torch.float64)
    check(blocks, x, 1e-12, [*leaves, factor, inner], routes, films=films, options=options)


def test_modules_passed_as_keywords_get_their_gradients():
    gate = nn.Linear(DIM, DIM).double()
    blocks = nn.ModuleList([nn.ModuleList([Modulated(), Modulated()]) for _ in range(2)])
    check(blocks, tokens(dtype=torch.float64), 1e-12, [gate], {"gate": [(True, False)] * 2}, gate=gate)


@pytest.mark.parametrize("head_chunks", [1, 2])
def test_a_bias_module_shared_by_all_attention_layers(head_chunks):
    bias = RelativePositionBias(4).double()
    blocks = layers(head_chunks=head_chunks).double()
    routes = {"attn_bias": [(True, False)] * 3, "mask": [(True, False)] * 3}
    mask = torch.rand(2, 7) > 0.2
    check(blocks, tokens(dtype=torch.float64), 1e-12, [bias], routes, attn_bias=bias, mask=mask)


def test_keywords_without_a_route_are_refused():
    net = ReversibleSequence(plain(), {"context": [(True, False)] * 3})
    with pytest.raises(ValueError, match=r"mask: expected a keyword of args_route \(context\), got no route"):
        net(tokens(), mask=tokens())


@pytest.mark.parametrize("routes", [[(True, False)] * 2, [(True, False)] * 4, []])
def test_routes_that_do_not_name_every_block_are_refused(routes):
    with pytest.raises(ValueError, match=r"args_route\['context'\]: expected a pair for each of 3 blocks"):
        ReversibleSequence(plain(), {"context": routes})


def test_a_keyword_that_goes_nowhere_or_is_left_out():
    routes = {"context": [(False, False)] * 3}
    x, blocks = tokens(), plain()
    net = ReversibleSequence(blocks, routes)
    assert net(x, context=tokens()).equal(net(x))


# Memory and work


def unlike(depth, **kwargs):
    """A network, one step behind it so that parameter gradients exist, and an input."""
    net = ReversibleSequence(layers(depth, dim=32, heads=2), **kwargs)
    x = tokens(1, 256, 32)
    net(x).sum().backward()
    return net, x


@pytest.mark.parametrize("kwargs", [{}, {"exact": True}], ids=str)
def test_memory_is_the_same_at_any_depth(kwargs):
    def measure(depth):
        net, x = unlike(depth, **kwargs)
        with LiveBytes() as forward:
            out = net(x)
            kept = forward.live
        with LiveBytes() as backward:
            out.backward(torch.ones(()).expand(x.shape))
        parameters = sum(p.nbytes for p in net.parameters())
        return kept - out.nbytes, saved_bytes(net, x) - parameters, forward.peak, backward.peak

    (kept, saved, forward, backward), deeper = measure(2), measure(32)
    unit = 256 * 32 * 4
    assert saved == deeper[1] == 2 * unit, "the two streams"
    # The first parts of an exact network's report are one number per step.
    slack = 0 if not kwargs else 4 * 2 * 32
    assert deeper[0] <= kept + slack
    assert deeper[2] <= forward + slack
    assert deeper[3] <= backward
    stored_net, x = unlike(32, reversible=False)
    assert saved_bytes(stored_net, x) > 32 * 4 * unit


def test_every_branch_is_recomputed_once():
    """Two layers a branch: a product each forward, each again, and two gradients each."""
    blocks, x = plain(depth=3), tokens()
    with LiveBytes() as forward:
        out = ReversibleSequence(blocks)(x)
    with LiveBytes() as backward:
        out.sum().backward()
    branches = 2 * 3
    assert products(forward) == 2 * branches
    assert products(backward) == (2 + 4) * branches


def test_nothing_is_computed_for_an_input_that_needs_no_gradient():
    """The first branch's own input ends the chain: its weight's gradient is all that is wanted of it."""
    net = ReversibleSequence([(nn.Linear(DIM, DIM), nn.Linear(DIM, DIM))])
    for requires_grad, of_first in ((True, 3), (False, 2)):
        out = net(tokens(requires_grad=requires_grad))
        with LiveBytes() as count:
            out.sum().backward()
        assert products(count) == 3 + of_first
