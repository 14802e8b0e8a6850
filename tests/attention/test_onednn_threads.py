"""Heads in oneDNN's tiles, each computed by one thread: what may run there, and what it holds."""

from threading import get_ident
from time import sleep

import pytest
import torch

from memory_efficient_attention_pytorch import AlibiBias, dot_product_attention
from memory_efficient_attention_pytorch.attention import onednn
from memory_efficient_attention_pytorch.attention.bias import BiasGradient
from memory_efficient_attention_pytorch.planner.accounting import Accounting
from memory_efficient_attention_pytorch.planner.step import Step, dry_run

pytestmark = [
    pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="PyTorch without oneDNN"),
    pytest.mark.usefixtures("onednn_is_faster"),
]
MIB = 2**20


def qkv(n, *, h, kv=None):
    return tuple(torch.randn(1, heads, n, 32, requires_grad=True) for heads in (h, kv or h, kv or h))


@pytest.fixture
def restored_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize(
    "kwargs",
    [
        {},
        {"kv": 2, "causal": True},
        {"dropout": 0.3, "causal": True},
        {"documents": True},
        {"alibi": True},
        {"bias": True},
    ],
    ids=str,
)
def test_a_head_in_a_thread_is_the_same_bit_for_bit(kwargs, restored_threads):
    kwargs = dict(kwargs)
    wanted = list(qkv(256, h=4, kv=kwargs.pop("kv", None)))
    if kwargs.pop("documents", False):
        kwargs["document_ids"] = (torch.arange(256) // 50)[None]
    if kwargs.pop("alibi", False):
        kwargs["attn_bias"] = AlibiBias(4)
    if kwargs.pop("bias", False):
        kwargs["attn_bias"] = torch.randn(1, 4, 1, 256, requires_grad=True)
        wanted.append(kwargs["attn_bias"])

    def found(threads):
        torch.set_num_threads(threads)
        torch.manual_seed(3)
        buckets = {"q_bucket_size": 128, "k_bucket_size": 64}
        out = dot_product_attention(*wanted[:3], backend="onednn", **buckets, **kwargs)
        return out, *torch.autograd.grad(out.sum(), wanted)

    for one, two in zip(found(1), found(2), strict=True):
        assert one.equal(two)


@pytest.mark.parametrize("by", ["mask", "bias", "score"])
def test_functions_of_the_callers_are_called_in_his_thread(by, restored_threads):
    threads = set()

    class Bias(torch.nn.Module):
        def forward(self, queries, keys):
            threads.add(get_ident())
            return torch.zeros(len(queries), len(keys))

    def mask(b, h, i, j):
        threads.add(get_ident())
        return i >= j

    def score(score, b, h, i, j):
        threads.add(get_ident())
        return score * 1

    torch.set_num_threads(2)
    q, k, v = qkv(256, h=4)
    kwargs = {"mask": {"mask": mask}, "bias": {"attn_bias": Bias()}, "score": {"attn_bias": score}}[by]
    backend = "tiled" if by == "score" else "onednn"
    dot_product_attention(q, k, v, backend=backend, **kwargs).sum().backward()
    assert threads == {get_ident()}


class _Attention(torch.nn.Module):
    def forward(self, x):
        return dot_product_attention(x, x, x, causal=True, backend="onednn")


def test_a_dry_run_counts_what_each_thread_holds():
    def peak(threads, heads):
        step = Step(_Attention(), torch.sum, (torch.zeros(1, heads, 2048, 32, requires_grad=True),), optimizer=None)
        return int(dry_run(step, Accounting(torch.device("cpu"), threads)).live.sum(1).max())

    one, two, four = (peak(threads, 4) for threads in (1, 2, 4))
    # In backward two tiles of scores of 1 MiB, masks of half that, and what is packed.
    assert 2.5 * MIB <= two - one <= 5 * MIB
    # Each thread as much; with more of them another operation may have the peak.
    assert 2 * (two - one) <= four - two <= 2.05 * (two - one)
    assert peak(2, 1) == peak(1, 1), "one head, which the threads share"


def test_query_heads_that_add_to_the_same_gradient_are_differentiated_in_one_thread(two_threads, monkeypatch):
    threads, differentiate = {}, onednn._differentiate

    def noted(shared, part, *rest):
        threads.setdefault((part.batch.start, part.kv_heads.start), set()).add(get_ident())
        sleep(0.05)  # else one thread might have done it all
        differentiate(shared, part, *rest)

    monkeypatch.setattr(onednn, "_differentiate", noted)
    q, k, v = (torch.randn(1, h, 128, 32, requires_grad=True) for h in (4, 2, 2))
    dot_product_attention(q, k, v, backend="onednn").sum().backward()
    assert [len(of_head) for of_head in threads.values()] == [1, 1]
    assert len(set().union(*threads.values())) == 2


def test_a_biass_gradient_is_summed_in_the_callers_thread(two_threads, monkeypatch):
    threads, add = set(), BiasGradient.add
    monkeypatch.setattr(BiasGradient, "add", lambda self, *rest: (threads.add(get_ident()), add(self, *rest))[1])
    q, k, v = (torch.randn(1, 4, 128, 32, requires_grad=True) for _ in range(3))
    bias = torch.randn(1, 1, 128, 128, requires_grad=True)  # of all heads
    dot_product_attention(q, k, v, attn_bias=bias, backend="onednn").sum().backward()
    assert threads == {get_ident()}
