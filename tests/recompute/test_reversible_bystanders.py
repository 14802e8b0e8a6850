"""What others keep of a reversible network's streams stays as it was, and costs its memory only then."""

import pytest
import torch
from torch import nn

from memory_efficient_attention_pytorch import ReversibleSequence, Transformer
from memory_efficient_attention_pytorch.torch_internals.capabilities import taken_away
from tests.agreement import assert_same, gradients
from tests.branches import KINDS, Plain, layers, tokens
from tests.memory.live_bytes import LiveBytes


def keep_outputs(module, kept):
    module.register_forward_hook(lambda module, args, out: kept.extend(out if isinstance(out, tuple) else [out]))


def keep_inputs(module, kept):
    module.register_forward_pre_hook(lambda module, args: kept.extend(t for t in args if isinstance(t, torch.Tensor)))


@pytest.mark.filterwarnings("ignore:head_chunks")
@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("keep", [keep_outputs, keep_inputs])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_anywhere_may_keep_what_they_see(kind, keep, exact):
    torch.manual_seed(0)
    net, x, kept = ReversibleSequence(KINDS[kind](), exact=exact), tokens(), []
    wanted = (x, *net.parameters())
    truth = gradients(net(x), wanted)
    for module in net.modules():
        if module is not net:
            keep(module, kept)
    out = net(x)
    seen, values = list(kept), [t.detach().clone() for t in kept]
    # With hooks attention is computed as a whole, and a sum that is rounded onto the grid may fall on its next point.
    assert_same(gradients(out, wanted), truth, 1e-4 if exact else 1e-5)
    assert len(seen) > 6
    for tensor, value in zip(seen, values, strict=True):
        assert torch.equal(tensor, value)


def keep_gradients_of_outputs(module, keep):
    def watch(module, args, out):
        for tensor in out if isinstance(out, tuple) else [out]:
            if tensor.requires_grad:
                tensor.register_hook(keep)

    module.register_forward_hook(watch)


def keep_gradients_by_module(module, keep):
    module.register_full_backward_hook(lambda module, of_in, of_out: [keep(g) for g in (*of_in, *of_out)] and None)


@pytest.mark.filterwarnings("ignore:head_chunks")
@pytest.mark.parametrize("watch", [keep_gradients_of_outputs, keep_gradients_by_module])
@pytest.mark.parametrize("of", ["blocks", "branches", "all within"])
@pytest.mark.parametrize("kind", KINDS)
def test_hooks_may_keep_the_gradients_that_they_see(kind, of, watch):
    torch.manual_seed(0)
    net, x, seen = ReversibleSequence(KINDS[kind]()), tokens(), []
    wanted = (x, *net.parameters())
    truth = gradients(net(x), wanted)
    branches = [branch for block in net for branch in block]
    watched = {"blocks": list(net), "branches": branches, "all within": [m for m in net.modules() if m is not net]}
    for module in watched[of]:
        watch(module, lambda g: seen.append((g, g.clone())) if g is not None else None)
    assert_same(gradients(net(x), wanted), truth, 1e-5)
    assert len(seen) >= len(watched[of])
    assert all(torch.equal(*pair) for pair in seen)


@pytest.mark.parametrize("where", ["block", "sequence"])
def test_the_last_blocks_output_in_a_language_model(where):
    model = Transformer(num_tokens=16, max_seq_len=8, dim=8, depth=2, heads=2, dim_head=4, causal=True)
    x, kept = torch.randint(16, (2, 8)), []
    keep_outputs(model.layers[-1] if where == "block" else model.layers, kept)
    loss = model(x, labels=x)
    values = [t.detach().clone() for t in kept]
    loss.backward()
    assert all(map(torch.equal, kept, values))


class Rememberer(Plain):
    """A branch that keeps its input, without any hook."""

    def forward(self, x):
        self.seen = x
        self.value = x.detach().clone()
        return super().forward(x)


def test_a_branch_may_keep_its_input():
    net, x = ReversibleSequence([(Plain(), Rememberer()), (Rememberer(), Rememberer())]), tokens()
    out, keepers = net(x), [module for module in net.modules() if isinstance(module, Rememberer)]
    seen = [(keeper.seen, keeper.value) for keeper in keepers]
    out.sum().backward()
    assert all(torch.equal(*pair) for pair in seen)


@pytest.mark.parametrize("lacking", [None, "storage_holders"])
def test_a_graph_that_is_kept_gives_the_same_again(lacking):
    net, x = ReversibleSequence(layers()), tokens()

    def run():
        out = net(x)
        first, second = (torch.autograd.grad(out.sum(), x, retain_graph=True)[0] for _ in range(2))
        assert torch.equal(first, second)
        return first

    truth = run()
    if lacking:
        with taken_away(lacking):
            assert torch.equal(run(), truth)


def peak(net, x):
    with LiveBytes() as count:
        count.ignore([*net.parameters(), x])
        net(x).sum().backward()
    return count.peak


def test_nothing_is_copied_where_nobody_looks():
    net, x = ReversibleSequence([(nn.Identity(), nn.Tanh()) for _ in range(3)]), tokens(2, 64, 64)
    alone, kept = peak(net, x), []
    keep_outputs(net[-1], kept)
    assert peak(net, x) >= alone + x.nbytes
    assert alone <= 7 * x.nbytes
