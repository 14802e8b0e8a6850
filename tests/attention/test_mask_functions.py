"""A mask as a function of indices: FlexAttention's meaning, tile by tile, each tile classified once."""

import pytest
import torch
from torch import Tensor
from torch.nn.attention.flex_attention import and_masks, create_block_mask, flex_attention, noop_mask, or_masks

from memory_efficient_attention_pytorch import (
    Attention,
    MaskFunction,
    Transformer,
    dot_product_attention,
    select_backend,
)
from tests import reference
from tests.agreement import skip_unless_usable
from tests.reference import assert_as_accurate

B, H, KV, N, D = 2, 4, 2, 96, 16
WAYS = ("naive", "products", "cpu_kernel", "onednn", "auto")
DOCUMENTS = torch.tensor([[0] * 30 + [1] * 50 + [2] * 16, [0] * 64 + [1] * 32])
PREFIXES = torch.tensor([17, 40])
SLOTS = torch.tensor([3, 90, 0, 11])


def causal(b, h, q, k):
    return q >= k


def natten(side, kernel):
    """Neighbourhoods of kernel × kernel in an image of rows of ``side``, as PyTorch's attention-gym draws them."""

    def mask(b, h, q, k):
        qx, qy, kx, ky = q // side, q % side, k // side, k % side
        centre_x = qx.clamp(kernel // 2, (side - 1) - kernel // 2)
        centre_y = qy.clamp(kernel // 2, (side - 1) - kernel // 2)
        return ((centre_x - kx).abs() <= kernel // 2) & ((centre_y - ky).abs() <= kernel // 2)

    return mask


# PyTorch's published examples: the FlexAttention post and attention-gym.
EXAMPLES = {
    "noop": noop_mask,
    "causal": causal,
    "sliding window": and_masks(causal, lambda b, h, q, k: q - k <= 20),
    "prefix": or_masks(causal, lambda b, h, q, k: k < PREFIXES[b]),
    "documents": and_masks(causal, lambda b, h, q, k: DOCUMENTS[b, q] == DOCUMENTS[b, k]),
    "natten": natten(10, 5),
    "dilated": lambda b, h, q, k: ((q - k).abs() <= 24) & ((q - k) % 3 == 0),
    "stacked diagonals": lambda b, h, q, k: (q % 32 >= k % 32) & (q // 32 >= k // 32),
    "per head": lambda b, h, q, k: q - k <= SLOTS[h],
    "nothing for some": lambda b, h, q, k: (q % 7 != 0) & (k < 50),
}


def heads(dtype=torch.float32, m=N):
    torch.manual_seed(0)
    shapes = ((B, H, N, D), (B, KV, m, D), (B, KV, m, D))
    return [torch.randn(shape, dtype=dtype, requires_grad=True) for shape in shapes]


def whole(mask, m: int = N) -> Tensor:
    """All answers of the function, called with scalars as FlexAttention calls it."""
    for axis in range(4)[::-1]:
        mask = torch.vmap(mask, in_dims=tuple(0 if axis == other else None for other in range(4)))
    return mask(*(torch.arange(size) for size in (B, H, N, m))).expand(B, H, N, m)


def differentiated(out: Tensor, leaves: list[Tensor]) -> list[Tensor]:
    torch.manual_seed(1)
    return [out.detach(), *torch.autograd.grad(out, leaves, torch.randn(out.shape).to(out.dtype))]


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_agree_with_the_definition(name, way):
    mask, leaves = EXAMPLES[name], heads()
    ours = differentiated(dot_product_attention(*leaves, mask=mask, backend=way, **tiles(20, 24)), leaves)
    naive = differentiated(reference.attention(*leaves, mask=whole(mask)), leaves)
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    truth = differentiated(reference.attention(*exact, mask=whole(mask)), exact)
    for what, found, plain, true in zip(("out", "dq", "dk", "dv"), ours, naive, truth, strict=True):
        assert_as_accurate(what, found, plain, true, slack=4.0)


@pytest.mark.parametrize("name", EXAMPLES)
@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
def test_examples_agree_with_flex_attention(name):
    mask, (q, k, v) = EXAMPLES[name], (t.detach() for t in heads(torch.float64))
    block_mask = create_block_mask(mask, B, H, N, N, device="cpu", BLOCK_SIZE=16)
    theirs = flex_attention(q, k, v, block_mask=block_mask, enable_gqa=True)
    torch.testing.assert_close(dot_product_attention(q, k, v, mask=mask, **tiles(20, 24)), theirs)


@pytest.mark.parametrize("way", ["naive", "products", "onednn"])
def test_what_else_hides_is_joined_by_and(way):
    m = N + 30
    q, k, v = heads(m=m)
    ids = (torch.arange(m) // 40).expand(B, m)
    others = {"causal": True, "window": (50, None), "document_ids": ids, "attn_bias": torch.randn(1, H, N, m)}
    function = EXAMPLES["per head"]
    for dropout in (0.0, 0.3):
        given = {**others, "dropout": dropout, "backend": way, **tiles(16, 32)}
        torch.manual_seed(2)
        out = dot_product_attention(q, k, v, mask=function, **given)
        torch.manual_seed(2)
        assert torch.equal(out, dot_product_attention(q, k, v, mask=whole(function, m), **given))


class Counted:
    """A mask function that notes the places that it is asked about."""

    def __init__(self, function):
        self.function, self.calls = function, []

    def __call__(self, b, h, q, k):
        self.calls.append((len(b), h.shape[1], q.shape[2], k.shape[3]))
        return self.function(b, h, q, k)


@pytest.mark.parametrize("way", ["products", "cpu_kernel", "onednn"])
def test_each_tile_is_classified_once_by_all_calls_that_share_it(way):
    leaves, counted = heads(), Counted(lambda b, h, q, k: q // 32 >= k // 32)
    mask = MaskFunction(counted)
    for _ in range(3):
        counted.calls.clear()
        dot_product_attention(*leaves, mask=mask, backend=way, **tiles(32, 32)).sum().backward()
        tiles_asked = [call for call in counted.calls if call[2:] == (32, 32)]
        # Every tile is empty or full: after the first call nothing is asked but whether heads and sequences differ.
        assert tiles_asked == ([(1, 1, 32, 32)] * 9 if _ == 0 else [])
    (kinds,) = mask.kept.values()
    assert list(kinds) == [2, 0, 0, 2, 2, 0, 2, 2, 2]


def test_no_tile_of_scores_or_mask_is_larger_than_a_tile():
    counted = Counted(EXAMPLES["natten"])
    dot_product_attention(*heads(), mask=counted, backend="tiled", **tiles(16, 16)).sum().backward()
    assert max(q * k for *_, q, k in counted.calls) == 16 * 16


def test_fully_hidden_tiles_are_not_computed(monkeypatch):
    from memory_efficient_attention_pytorch.attention.products import Products

    computed, attend = [], Products.attend
    monkeypatch.setattr(
        Products, "attend", lambda self, scores, *rest: (computed.append(scores.tile), attend(self, scores, *rest))[1]
    )
    mask = EXAMPLES["documents"]
    dot_product_attention(*heads(), mask=mask, backend="products", **tiles(8, 8))
    visible = whole(mask).any(0).any(0).unflatten(0, (-1, 8)).unflatten(2, (-1, 8)).any(3).any(1)
    assert sorted({(t.i0 // 8, t.j0 // 8) for t in computed}) == [tuple(place) for place in visible.nonzero().tolist()]


def test_a_mask_of_changed_tensors_is_seen_where_nothing_is_kept():
    q, k, v = heads()
    ids = DOCUMENTS.clone()
    mask = lambda b, h, q, k: ids[b, q] == ids[b, k]  # noqa: E731
    before = dot_product_attention(q, k, v, mask=mask, backend="tiled", **tiles(16, 16))
    ids.copy_(ids.flip(1))
    after = dot_product_attention(q, k, v, mask=mask, backend="tiled", **tiles(16, 16))
    truth = reference.attention(q, k, v, mask=whole(mask))
    torch.testing.assert_close(after, truth)
    assert not torch.allclose(before, truth)


def test_hidden_keys_change_nothing_by_one_bit():
    q, k, v = (t.detach() for t in heads())
    first = dot_product_attention(q, k, v, mask=causal, backend="tiled", **tiles(16, 24))
    k[:, :, 50:], v[:, :, 50:] = 1e4, float("inf")
    again = dot_product_attention(q, k, v, mask=causal, backend="tiled", **tiles(16, 24))
    assert torch.equal(first[:, :, :48], again[:, :, :48])


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_an_attention_module_asks_about_its_own_heads(groups):
    torch.manual_seed(3)
    layer = Attention(dim=32, heads=H, dim_head=8, head_chunks=groups, q_bucket_size=16, k_bucket_size=32)
    x = torch.randn(B, N, 32)
    function = EXAMPLES["per head"]
    torch.testing.assert_close(layer(x, mask=function), layer(x, mask=whole(function)))


def test_layers_of_a_transformer_share_what_is_found_out():
    torch.manual_seed(4)
    sizes = {
        "num_tokens": 11,
        "max_seq_len": N,
        "dim": 16,
        "dim_head": 8,
        "heads": 2,
        "q_bucket_size": 32,
        "k_bucket_size": 32,
    }
    counted = Counted(lambda b, h, q, k: q // 32 >= k // 32)
    tokens = torch.randint(0, 11, (B, N))
    asked, losses = [], []
    for depth in (1, 3):
        counted.calls.clear()
        loss = Transformer(depth=depth, head_chunks=2, **sizes)(tokens, labels=tokens, mask=counted)
        loss.backward()
        asked.append([call for call in counted.calls if call[2] > 1])
        losses.append(loss)
    assert len(asked[0]) == len(asked[1]) == 9
    model = Transformer(depth=2, reversible=False, **sizes)
    causal_model = Transformer(depth=2, reversible=False, causal=True, **sizes)
    causal_model.load_state_dict(model.state_dict())
    torch.testing.assert_close(model(tokens, mask=causal), causal_model(tokens))


def test_wrong_functions_are_refused_in_words():
    q, k, v = heads()
    with pytest.raises(
        ValueError, match=r"mask function's output: expected a tensor of dtype torch.bool .* torch.int64"
    ):
        dot_product_attention(q, k, v, mask=lambda b, h, q, k: q - k)
    with pytest.raises(ValueError, match="mask function's output: expected a shape broadcastable"):
        dot_product_attention(q, k, v, mask=lambda b, h, q, k: torch.ones(3, 1, 1, 1, dtype=torch.bool))
    with pytest.raises(NotImplementedError, match="a mask function would have to be evaluated for all"):
        dot_product_attention(q, k, v, mask=causal, backend="fused")
    with pytest.raises(ValueError, match=r"mask: expected a tensor or a function \(batch, head, query, key\)"):
        dot_product_attention(q, k, v, mask=[True])
    assert "mask function" in select_backend(q, k, v, mask=causal).ruled_out["fused"]


def test_nothing_to_attend_asks_nothing():
    empty = torch.zeros(0, dtype=torch.bool)
    q, k, v = torch.randn(1, 2, 3, 8), torch.randn(1, 2, 0, 8), torch.randn(1, 2, 0, 8)
    out = dot_product_attention(q, k, v, mask=lambda b, h, q, k: empty[k])
    assert torch.equal(out, torch.zeros_like(q))


def test_without_contents_every_tile_may_be_partial():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode(allow_non_fake_inputs=True):
        q, k, v = (torch.empty(B, H, N, D, requires_grad=True) for _ in range(3))
        mask = MaskFunction(EXAMPLES["documents"])
        dot_product_attention(q, k, v, mask=mask, backend="tiled", **tiles(32, 32)).sum().backward()
        assert q.grad.shape == q.shape
        assert not mask.kept


def tiles(q: int, k: int) -> dict[str, int]:
    return {"q_bucket_size": q, "k_bucket_size": k}


@pytest.mark.parametrize(
    "others", [({}, {"causal": True}), ({"causal": True}, {"causal": True, "window": (20, 0)})], ids=str
)
@pytest.mark.parametrize("backend", ["products", "cpu_kernel", "onednn"])
def test_a_mask_function_is_shared_by_calls_with_other_windows(backend, others):
    skip_unless_usable(backend)
    q, k, v = (torch.randn(1, 2, 96, 32) for _ in range(3))

    def function(b, h, i, j):
        return (i // 16 - j // 16) % 2 == 0

    shared = MaskFunction(function)
    for options in (*others, *others):
        ours = dot_product_attention(
            q, k, v, mask=shared, backend=backend, q_bucket_size=16, k_bucket_size=16, **options
        )
        truth = dot_product_attention(q, k, v, mask=function, backend="naive", **options)
        torch.testing.assert_close(ours, truth)


@pytest.mark.parametrize("backend", ["products", "cpu_kernel", "onednn"])
def test_a_mask_function_is_shared_by_calls_of_other_lengths(backend):
    skip_unless_usable(backend)

    def function(b, h, i, j):
        return (i // 16 - j // 16) % 2 == 0

    shared = MaskFunction(function)
    for n, m in ((48, 96), (96, 96), (96, 48), (48, 96)):
        q, k, v = torch.randn(1, 2, n, 32), torch.randn(1, 2, m, 32), torch.randn(1, 2, m, 32)
        ours = dot_product_attention(q, k, v, mask=shared, backend=backend, q_bucket_size=16, k_bucket_size=16)
        truth = dot_product_attention(q, k, v, mask=function, backend="naive")
        torch.testing.assert_close(ours, truth)
