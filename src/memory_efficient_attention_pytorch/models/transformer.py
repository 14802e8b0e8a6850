"""A Transformer language model that stores neither scores, hidden values, activations nor logits."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.mask_function import mask_function
from ..attention.visibility import Mask
from ..common.compiled import eagerly
from ..common.divided import active
from ..common.errors import require
from ..common.precision import autocast_dtype, is_integer
from ..layers.attention import Attention, FlashAttention
from ..layers.cache import KVCache
from ..layers.feedforward import FeedForward, PreNorm
from ..layers.positions import AlibiBias, RotaryEmbedding
from ..layers.reversible import ReversibleSequence, take_over_keys
from ..layers.working_set import feed_forward_chunks, head_chunks
from ..loss.linear_cross_entropy import linear_cross_entropy
from ..loss.reversible import normed_sum
from ..loss.rows import RowSource
from ..recompute.by_hand import reason_against
from ..recompute.normed import is_norm_of_tokens
from .config import KNOBS, TransformerConfig, built_from

_OF_ATTENTION = tuple(inspect.signature(Attention).parameters)


class Transformer(nn.Module):
    """Embeddings, ``depth`` reversible blocks of attention and feed-forward, a norm, and a linear layer to the logits.

    The sum of token and position embeddings enters both streams of :class:`ReversibleSequence`; f is the pre-normed
    attention, g the pre-normed feed-forward; the two streams are summed at the end.

    Its keywords are the fields of :class:`TransformerConfig`, which explains them.

    Raises:
        ValueError: an argument outside its range.

    Loads state dictionaries of memory_efficient_attention_pytorch 0.1, which name every layer twice.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import Transformer
        >>> model = Transformer(num_tokens=256, max_seq_len=512, dim=64, depth=2, heads=4, dim_head=16, causal=True)
        >>> tokens = torch.randint(0, 256, (2, 513))
        >>> model(tokens[:, :-1], labels=tokens[:, 1:]).backward()
        >>> model(tokens[:, :-1]).shape
        torch.Size([2, 512, 256])
    """

    @built_from(TransformerConfig)
    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        dim, depth, num_tokens = config.dim, config.depth, config.num_tokens
        self.causal, self.loss_chunk_size = config.causal, config.loss_chunk_size
        self.num_tokens, self.max_seq_len, self.dim = num_tokens, config.max_seq_len, dim
        self.token_emb = nn.Embedding(num_tokens, dim)
        self.pos_emb = nn.Embedding(config.max_seq_len, dim) if config.positions == "learned" else None
        self.rotary = RotaryEmbedding(config.dim_head, config.rotary_base) if config.positions == "rotary" else None
        self.alibi = AlibiBias(config.heads) if config.positions == "alibi" else None
        attention = FlashAttention if config.use_flash_attn else Attention
        # Where activations are stored, pieces would only cost a recomputation, so they are used only on request.
        unset = None if config.reversible else 1
        chosen = {name: getattr(config, name) for name in _OF_ATTENTION}
        chosen["head_chunks"] = config.head_chunks or unset
        feed = (dim, config.ff_mult, config.ff_chunks or unset)
        pairs = ((PreNorm(dim, attention(**chosen)), PreNorm(dim, FeedForward(*feed))) for _ in range(depth))
        route = {name: [(True, False)] * depth for name in ("mask", "attn_bias", "rotary", "cache")}
        self.layers = ReversibleSequence(pairs, route, exact=config.exact, reversible=config.reversible)
        norm, tied = nn.LayerNorm(dim), config.tie_embeddings
        self.to_logits = nn.Sequential(norm) if tied else nn.Sequential(norm, nn.Linear(dim, num_tokens))
        if tied:
            self.initialise_embedding()
        self.register_load_state_dict_pre_hook(_drop_upstream_duplicates)

    def forward(
        self,
        x: Tensor,
        labels: Tensor | None = None,
        mask: Mask | None = None,
        cache: KVCache | None = None,
        ignore_index: int = -100,
    ) -> Tensor:
        """Return logits, or the mean cross-entropy in nats if ``labels`` are given.

        Args:
            x: token numbers ``(b, n)`` of any integer dtype, or what stands in their embeddings' place ``(b, n, dim)``.
            labels: integers ``(b, n)``, what each position shall predict; ``ignore_index`` counts for nothing.
            mask: bool ``(b, n)``, True = a token, False = padding, which is not attended to; with a cache ``(b, tokens
                in the cache + n)``. A row's positions start at its first token, so padding on the left changes nothing.
                Or, without a cache, a function of indices as for :func:`dot_product_attention`, which all layers share.
            cache: keys and values of the tokens before x (causal models, without gradients); x is added to it.

        Returns:
            ``(b, n, num_tokens)``, or a scalar.

        Raises:
            ValueError: a wrong shape or dtype, a token outside the vocabulary, too many tokens for learned positions.
        """
        given = (x, labels, mask, cache, ignore_index)
        # A compiler cannot follow reversible blocks and their loss, and would compile anew as a cache gets longer.
        eager = cache is not None or (labels is not None and self.layers.reverses)
        return eagerly(self._forward, *given) if eager else self._forward(*given)

    def initialise_embedding(self) -> None:
        """Draw the token embeddings anew: N(0, 1), or where they are tied what gives logits of unit variance."""
        std = self.dim**-0.5 if len(self.to_logits) == 1 else 1.0
        nn.init.normal_(self.token_emb.weight, std=std)

    def check_dtype(self, argument: str, embedded: Tensor) -> None:
        """Raise ValueError unless the layers can compute with embeddings of this dtype, under autocast if it is on."""
        weight = self.token_emb.weight
        dtypes = {embedded.dtype, weight.dtype}
        cast = autocast_dtype(embedded.device) is not None and torch.float64 not in dtypes
        # Learned positions are added first. A weight that is sharded by itself does not show the dtype it computes in.
        promoted = self.pos_emb is not None and torch.promote_types(embedded.dtype, weight.dtype) == weight.dtype
        fits = len(dtypes) == 1 or cast or promoted or type(weight) is not nn.Parameter
        require(fits, argument, f"embeddings of the model's dtype, {weight.dtype}, or autocast", embedded.dtype)

    def _forward(
        self, x: Tensor, labels: Tensor | None, mask: Mask | None, cache: KVCache | None, ignore_index: int
    ) -> Tensor:
        self._check(x, labels, mask, cache)
        x, labels = x if x.is_floating_point() else x.long(), None if labels is None else labels.long()
        if callable(mask):
            mask = mask_function(mask)  # so that all layers share what one finds out about its tiles
        head: Any = self.to_logits[1] if len(self.to_logits) > 1 else None
        if labels is not None and self._plain_head:
            # The first block's input is held only inside _rows: during the loss it would take n · dim elements more.
            rows = self._rows(*self._embed(x, mask, cache))
            options: dict[str, Any] = {"bias": getattr(head, "bias", None), "chunk_size": self.loss_chunk_size}
            weight = self._tied_weight(x) if head is None else head.weight
            return eagerly(linear_cross_entropy, rows, weight, labels, ignore_index=ignore_index, **options)
        hidden = self.to_logits(self._through(self.layers, *self._embed(x, mask, cache)))
        logits = nn.functional.linear(hidden, self._tied_weight(x)) if head is None else hidden
        return logits if labels is None else _mean_cross_entropy(logits, labels, ignore_index)

    def _tied_weight(self, x: Tensor) -> Tensor:
        weight = self.token_emb.weight
        if weight.device == x.device:
            return weight
        # With accelerate's offloading the weight is on this device only while the embedding runs.
        every_row: Tensor = self.token_emb(torch.arange(self.num_tokens, device=x.device))
        return every_row

    @property
    def _plain_head(self) -> bool:
        """Whether the last layer is as built, without hooks, so that its weights determine what it computes."""
        _, *head = self.to_logits
        known = ((self.to_logits, nn.Sequential), *((layer, nn.Linear) for layer in head))
        return all(reason_against(module, kind) is None for module, kind in known)

    def _rows(self, tokens: Tensor, given: dict[str, Any]) -> Tensor | RowSource:
        """Return the last layer's input, in chunks if the blocks and the norm are as built and have no hooks."""
        norm = self.to_logits[0]
        compiled = torch.compiler.is_compiling()  # which computes the norm of all tokens, as part of a graph
        if compiled or not is_norm_of_tokens(norm) or reason_against(self.layers) is not None:
            hidden: Tensor = norm(self._through(self.layers, tokens, given))
            return hidden
        return normed_sum(norm, *self._through(self.layers.streams, tokens, given))

    def _through(self, layers: Callable[..., Any], tokens: Tensor, given: dict[str, Any]) -> Any:
        out = layers(tokens, **given)
        if "cache" in given:
            given["cache"].advance(tokens.shape[1])
        return out

    def _embed(self, x: Tensor, mask: Mask | None, cache: KVCache | None) -> tuple[Tensor, dict[str, Any]]:
        """Return the input of the first block ``(b, n, dim)``, and the blocks' keywords."""
        try:
            tokens = x if x.is_floating_point() else self.token_emb(x)
        except IndexError:
            came = f"{int(x.min())} to {int(x.max())}"
            raise ValueError(f"x: expected tokens from 0 to {self.num_tokens - 1}, got {came}") from None
        given: dict[str, Any] = {"mask": mask, "cache": cache, "attn_bias": self.alibi}
        positions = self._positions(x, mask, cache)
        if self.pos_emb is not None:
            tokens = tokens + self.pos_emb(positions)
        if self.rotary is not None:
            given["rotary"] = self.rotary(positions)
        return tokens, {name: value for name, value in given.items() if value is not None}

    def _positions(self, x: Tensor, mask: Mask | None, cache: KVCache | None) -> Tensor:
        """Return positions in the whole sequence, ``(n,)``, or ``(b, n)`` where rows may start late."""
        divided = active()
        if divided is None:
            before = 0 if cache is None else cache.length
            total = before + x.shape[1]
            positions = torch.arange(before, total, device=x.device)
        else:
            expected = f"{divided.local_tokens} tokens, each process's part of the sequence"
            require(x.shape[1] == divided.local_tokens, "x", expected, x.shape[1])
            total, positions = divided.num_tokens, divided.positions(x.device)
            mask = divided.gather(mask) if isinstance(mask, Tensor) else mask
        fits = self.pos_emb is None or total <= self.max_seq_len
        require(fits, "x", f"at most max_seq_len = {self.max_seq_len} tokens for learned positions", total)
        if not isinstance(mask, Tensor):
            return positions
        padding = mask.int().argmax(dim=1, keepdim=True) if total else positions.new_zeros(len(mask), 1)
        return (positions - padding).clamp(min=0)

    def _check(self, x: Tensor, labels: Tensor | None, mask: Mask | None, cache: KVCache | None) -> None:
        embedded = x.is_floating_point() and x.dim() == 3 and x.shape[2] == self.dim
        fits = embedded or (x.dim() == 2 and is_integer(x))
        expected = f"integers of shape (batch, tokens), or embeddings (batch, tokens, {self.dim})"
        require(fits, "x", expected, f"{x.dtype} {tuple(x.shape)}")
        if embedded:
            self.check_dtype("x", x)
        if labels is not None:
            expected = f"a number for each token of x, {tuple(x.shape[:2])}"
            require(labels.shape == x.shape[:2], "labels", expected, tuple(labels.shape))
            require(is_integer(labels), "labels", "an integer dtype", labels.dtype)
        if callable(mask):
            require(cache is None, "mask", "a tensor together with a cache, which may drop keys", "a function")
        elif mask is not None:
            shape = (x.shape[0], x.shape[1] + (0 if cache is None else cache.length))
            fits = mask.dtype == torch.bool and mask.shape == shape
            expected = f"bool of shape (batch, tokens with those of the cache) = {shape}"
            require(fits, "mask", expected, f"{mask.dtype} {tuple(mask.shape)}")
        if cache is not None:
            require(self.causal, "cache", "none with a model that is not causal", "one")
            # Other libraries' caches do not ask.
            require(not torch.is_grad_enabled(), "cache", "torch.no_grad() or inference_mode()", "gradients enabled")


def pieces_chosen(
    config: Mapping[str, Any],
    batch: int,
    tokens: int,
    itemsize: int,
    device_type: str,
    threads: int,
    divided: bool = False,
) -> dict[str, int]:
    """The ``head_chunks`` and ``ff_chunks`` that a Transformer with these keywords chooses for such an input.

    divided: its tokens are, over processes.
    """
    of: Any = SimpleNamespace(**{name: config.get(name, getattr(TransformerConfig, name, None)) for name in KNOBS})
    if not of.reversible:
        return {"head_chunks": 1, "ff_chunks": 1}
    counts = ((tokens, tokens), (of.heads, of.kv_heads or of.heads))
    return {
        "head_chunks": head_chunks(batch, *counts, of.dim_head, itemsize, device_type, threads, divided),
        "ff_chunks": feed_forward_chunks(batch, tokens, of.ff_mult * of.dim, itemsize, device_type),
    }


def _mean_cross_entropy(logits: Tensor, labels: Tensor, ignore_index: int) -> Tensor:
    """Return the mean of :func:`linear_cross_entropy` from logits ``(b, n, V)``: 0 without a valid label."""
    logits, targets = logits.flatten(0, 1), labels.flatten()
    total = nn.functional.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="sum")
    count, divided = (labels != ignore_index).sum(), active()
    if divided is None:
        return total / count.clamp(min=1)
    return divided.loss(total / divided.sum(count).clamp(min=1))


def _drop_upstream_duplicates(module: nn.Module, state_dict: dict[str, Any], prefix: str, *_: Any) -> None:
    """Drop the second copy of the layers that version 0.1's Transformer saves, under ``net.*``."""
    take_over_keys(module.layers, state_dict, f"{prefix}net.", f"{prefix}layers.")  # type: ignore[arg-type]
