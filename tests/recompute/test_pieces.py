"""Chunked and its pieces: the module's own outputs and gradients, whatever autograd's users do with them."""

import copy

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import Chunked, ReversibleSequence
from memory_efficient_attention_pytorch.recompute.pieces import Branch, ChunkBranch, apply_piecewise
from tests import reference
from tests.agreement import assert_same, difference, gradients, products, with_seed
from tests.branches import TokenMLP
from tests.memory.live_bytes import LiveBytes


class OverChannels(nn.Module):
    """Mixes dimension 1, so that it treats positions of the last dimension each on its own."""

    def __init__(self, channels=6):
        super().__init__()
        self.mix = nn.Linear(channels, channels)

    def forward(self, x):
        return x + torch.tanh(self.mix(x.transpose(1, 2))).transpose(1, 2)


class Shift(nn.Module):
    """Adds a parameter as large as its input: the parameter's gradient is the cotangent itself."""

    def __init__(self, *shape):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(shape))

    def forward(self, x):
        return x + self.shift


def wider(dim=8):
    return nn.Sequential(nn.Linear(dim, 3 * dim), nn.Tanh(), nn.Linear(3 * dim, 2 * dim, bias=False))


MODULES = {"mlp": TokenMLP, "wider": wider, "linear": lambda: nn.Linear(8, 8), "norm": lambda: nn.LayerNorm(8)}


# The same numbers


@pytest.mark.parametrize(
    "cut", [{"chunks": k} for k in (1, 2, 5, 13, 50)] + [{"chunk_size": s} for s in (1, 4, 13, 99)]
)
@pytest.mark.parametrize("name", MODULES)
def test_outputs_and_gradients_are_the_modules(name, cut):
    module = MODULES[name]().double()
    x = torch.randn(2, 13, 8, dtype=torch.float64, requires_grad=True)
    ours, truth = Chunked(module, **cut)(x), module(x)
    wanted = (x, *module.parameters())
    assert_same((ours,), (truth,), 1e-13)
    assert_same(gradients(ours, wanted), gradients(truth, wanted), 1e-12)


@pytest.mark.parametrize(
    ("dim", "module"),
    [(0, TokenMLP()), (1, TokenMLP()), (-2, TokenMLP()), (-3, TokenMLP()), (2, OverChannels()), (-1, OverChannels())],
    ids=lambda value: value if isinstance(value, int) else type(value).__name__,
)
def test_any_dimension(dim, module):
    module, x = copy.deepcopy(module).double(), torch.randn(5, 6, 8, dtype=torch.float64, requires_grad=True)
    wanted = (x, *module.parameters())
    ours, truth = Chunked(module, chunk_size=2, dim=dim)(x), module(x)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), 1e-12)


@pytest.mark.parametrize("shape", [(13, 8), (2, 13, 3, 8), (2, 0, 8), (0, 13, 8), (1, 1, 8)], ids=str)
def test_any_rank_and_empty_ones(shape):
    module, x = TokenMLP().double(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    wanted = (x, *module.parameters())
    ours, truth = Chunked(module, chunks=3, dim=0 if len(shape) == 2 else 1)(x), module(x)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), 1e-12)


def test_non_contiguous_input_and_cotangent():
    module = TokenMLP()
    x = torch.randn(8, 13, 2, requires_grad=True)
    ours, truth = (net(x.permute(2, 1, 0)) for net in (Chunked(module, chunks=4), module))
    cotangent = torch.randn(8, 13, 2).permute(2, 1, 0)
    wanted = (x, *module.parameters())
    assert_same(*(torch.autograd.grad(out, wanted, cotangent) for out in (ours, truth)), 1e-5)
    expanded = torch.ones(()).expand(2, 13, 8)
    assert_same(
        *(torch.autograd.grad(net(x.permute(2, 1, 0)), wanted, expanded) for net in (Chunked(module, 4), module)), 1e-5
    )


def test_a_parameters_gradient_never_shares_memory_with_the_cotangent():
    module, x = Shift(1, 6, 4), torch.randn(1, 6, 4, requires_grad=True)
    cotangent = torch.randn(1, 6, 4)
    of_x, of_shift = torch.autograd.grad(Chunked(module, chunks=1)(x), (x, module.shift), cotangent)
    before = cotangent.clone()
    of_x.zero_(), of_shift.zero_()
    assert cotangent.equal(before)


# Precision


@pytest.mark.parametrize("where", ["outside", "inside"])
def test_autocast_is_the_forwards(where):
    """Gradients like the module's own under autocast, wherever backward runs; error against fp64 no larger."""
    module, x = TokenMLP(dim=16, hidden=64), torch.randn(2, 32, 16, requires_grad=True)
    wanted = (x, *module.parameters())

    def run(net):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out = net(x)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=where == "inside"):
            return out, *gradients(out, wanted)

    exact = copy.deepcopy(module).double()
    x64 = x.detach().double().requires_grad_()
    out = exact(x64)
    truth = (out, *gradients(out, (x64, *exact.parameters())))
    for ours, naive, true in zip(run(Chunked(module, chunks=5)), run(module), truth, strict=True):
        assert ours.dtype == naive.dtype
        reference.assert_as_accurate("chunked", ours.bfloat16(), naive.bfloat16(), true)


def test_what_a_module_keeps_out_of_autocast_is_differentiated_out_of_it():
    class Careful(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(32, 32)

        def forward(self, x):
            with torch.autocast("cpu", enabled=False):
                return self.linear(x.float())

    module, x = Careful(), torch.randn(2, 8, 32, requires_grad=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, truth = Chunked(module, chunks=2)(x), module(x)
    wanted = (x, *module.parameters())
    assert_same(gradients(ours, wanted), gradients(truth, wanted), 1e-6)


def test_bfloat16_gradients_of_many_chunks_are_summed_in_fp32():
    """64 partial sums in bf16 would lose most of their bits; the naive path sums inside one product."""
    module, x = TokenMLP(dim=16, hidden=32), torch.randn(4, 256, 16)
    low = copy.deepcopy(module).bfloat16()
    truth = gradients(module.double()(x.bfloat16().double()), module.parameters())
    naive = gradients(low(x.bfloat16()), low.parameters())
    ours = gradients(Chunked(low, chunks=64)(x.bfloat16()), low.parameters())
    for mine, plain, true in zip(ours, naive, truth, strict=True):
        assert mine.dtype == torch.bfloat16
        reference.assert_as_accurate("parameter", mine, plain, true)


# Randomness


def test_dropout_is_the_same_in_both_passes():
    x = torch.randn(2, 13, 8, requires_grad=True)
    out = Chunked(nn.Dropout(0.5), chunks=4)(x)
    (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.unique().tolist() == [0.0, 2.0]
    assert out.equal(gradient * x)


def test_dropout_follows_the_seed_and_the_mode():
    net, x = Chunked(TokenMLP(dropout=0.5), chunks=4), torch.randn(2, 13, 8)
    assert with_seed(lambda: net(x)).equal(with_seed(lambda: net(x)))
    assert net.eval()(x).equal(net(x))
    assert difference(net(x), net.module(x)) < 1e-6


# What autograd and its users may do with it


def test_a_parameter_without_use_has_no_gradient():
    module, x = TokenMLP(), torch.randn(2, 13, 8)
    module.spare = nn.Parameter(torch.ones(3))
    Chunked(module, chunks=3)(x).sum().backward()
    assert module.spare.grad is None
    assert module.up.weight.grad is not None


def test_hooks_on_inner_modules_run_for_every_chunk():
    module, x = TokenMLP(), torch.randn(2, 13, 8, requires_grad=True)
    forward, backward = [], []
    module.up.register_forward_hook(lambda inner, args, out: forward.append(out.shape[1]))
    module.up.register_full_backward_hook(lambda inner, of_in, of_out: backward.append(of_out[0].shape[1]))
    out = Chunked(module, chunk_size=4)(x)
    assert forward == [4, 4, 4, 1]
    out.sum().backward()
    assert forward == 2 * [4, 4, 4, 1]
    assert backward == [4, 4, 4, 1]


def test_a_forward_hook_may_change_the_output():
    module, x = TokenMLP(), torch.randn(2, 13, 8, requires_grad=True)
    module.up.register_forward_hook(lambda inner, args, out: 2 * out)
    wanted = (x, *module.parameters())
    ours, truth = Chunked(module, chunks=3)(x), module(x)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), 1e-5)


def test_state_dictionary_and_copy():
    net = Chunked(TokenMLP(), chunks=3)
    assert list(net.state_dict()) == [f"module.{name}" for name in net.module.state_dict()]
    other, x = copy.deepcopy(net), torch.randn(2, 13, 8)
    assert other(x).equal(net(x))
    assert other.module.up.weight is not net.module.up.weight


# Refusals


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({}, "exactly one"),
        ({"chunks": 2, "chunk_size": 3}, "exactly one"),
        ({"chunks": 0}, "chunks: expected a positive integer, got 0"),
        ({"chunk_size": -1}, "chunk_size: expected a positive integer, got -1"),
        ({"chunks": True}, "chunks: expected a positive integer, got True"),
        ({"chunks": 2.0}, r"chunks: expected a positive integer, got 2\.0"),
    ],
    ids=str,
)
def test_refused_when_built(kwargs, message):
    with pytest.raises(ValueError, match=message):
        Chunked(nn.Identity(), **kwargs)


@pytest.mark.parametrize("dim", [3, -4])
def test_a_dimension_that_x_has_not_is_refused(dim):
    with pytest.raises(ValueError, match=r"dim: expected a dimension of x, \(2, 13, 8\)"):
        Chunked(TokenMLP(), chunks=2, dim=dim)(torch.randn(2, 13, 8))


def test_a_module_that_mixes_or_drops_tokens_is_refused():
    for module in (nn.AdaptiveAvgPool1d(4), nn.Flatten()):
        with pytest.raises(ValueError, match=r"module: expected a token-wise module"):
            Chunked(module, chunks=2, dim=2)(torch.randn(2, 13, 16))


def test_keyword_arguments_are_refused():
    net = Chunked(TokenMLP(), chunks=2)
    with pytest.raises(TypeError, match="mask"):
        net(torch.randn(2, 13, 8), mask=torch.ones(2, 13))
    sequence = ReversibleSequence([(TokenMLP(), net)], {"mask": [(False, True)]})
    x = torch.randn(2, 13, 8, requires_grad=True)
    with pytest.raises(ValueError, match="no keyword arguments, got mask"):
        sequence(x, mask=torch.ones(2, 13))


# The piece itself, as the reversible blocks use it


def test_a_branch_is_added_and_taken_off_again_while_it_is_differentiated():
    """One pass recomputes, subtracts and differentiates; what it subtracts is what was added, bit for bit."""
    module, x, stream = TokenMLP(dropout=0.5), torch.randn(2, 13, 8), torch.zeros(2, 13, 8)
    branch, cotangent = ChunkBranch(module, chunk_size=4), torch.randn(2, 13, 8)
    inputs = branch.bound()
    torch.manual_seed(3)
    branch.run(x, inputs, lambda index, value: stream[index].add_(value))
    truth_x = x.clone().requires_grad_()
    gradient = torch.zeros_like(x)
    torch.manual_seed(3)
    with LiveBytes() as count:
        found = branch.differentiate(
            x,
            inputs,
            [True] * len(inputs),
            cotangent,
            lambda index, value: stream[index].sub_(value),
            lambda index, value: gradient[index].add_(value),
        )
    assert not stream.any()
    assert products(count) == (2 + 4) * 4

    def chunk_by_chunk(tokens):
        return torch.cat([module(tokens[:, start : start + 4]) for start in range(0, 13, 4)], dim=1)

    out = with_seed(lambda: chunk_by_chunk(truth_x), 3)
    truth = torch.autograd.grad(out, (truth_x, *module.parameters()), cotangent)
    assert_same((gradient, *found), truth, 1e-5)


class Rows(Branch):
    """One piece for each row of the batch."""

    single_piece = False

    def slices(self, x):
        return [(slice(i, i + 1),) for i in range(len(x))]


class Halves(Branch):
    """Two pieces that read all of x and add to all of the output."""

    single_piece, overlapping = False, True

    def slices(self, x):
        return [(...,), (...,)]


@pytest.mark.parametrize(("kind", "times"), [(Branch, 1), (Rows, 1), (Halves, 2)])
def test_a_branch_from_outside_of_the_library_has_the_output_and_gradients_of_its_module(kind, times):
    module, x = TokenMLP(), torch.randn(3, 13, 8, requires_grad=True)
    wanted = (x, *module.parameters())
    ours, truth = apply_piecewise(kind(module, {}), x), times * module(x)
    assert_same((ours, *gradients(ours, wanted)), (truth, *gradients(truth, wanted)), 1e-5)


class InRows(nn.Module):
    """A module that offers its pieces, one for each sequence."""

    def __init__(self, width):
        super().__init__()
        self.net = nn.Linear(8, width)

    def forward(self, x):
        return self.net(x)

    def as_branch(self, x, kwargs, norm=None):
        return Rows(self, kwargs, norm)


WAYS = {
    "pieces": lambda module, x: apply_piecewise(Rows(module, {}), x),
    "reversal": lambda module, x: ReversibleSequence(nn.ModuleList([nn.ModuleList([module, module])]))(x),
}


@pytest.mark.parametrize("way", WAYS)
def test_a_piece_of_another_shape_than_its_slice_is_refused(way):
    """It would be broadcast, and a width of one become that of the input."""
    x = torch.randn(3, 8, requires_grad=True)
    with pytest.raises(ValueError, match=r"piece: expected a value of the output's slice, \(1, 8\), got \(1, 1\)"):
        WAYS[way](InRows(1), x)
    WAYS[way](InRows(8), x).sum().backward()
    assert x.grad.shape == x.shape


def test_a_reversible_branch_of_another_shape_than_its_stream_is_refused():
    """All of it at once, too."""
    with pytest.raises(ValueError, match=r"piece: expected a value of the output's slice, \(3, 8\), got \(3, 1\)"):
        WAYS["reversal"](nn.Linear(8, 1), torch.randn(3, 8, requires_grad=True))
