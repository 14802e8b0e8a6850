"""Train and generate with a network that predicts the next token."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..attention.visibility import window_sides
from ..common.errors import require, require_positive_int
from ..common.precision import is_integer
from ..layers.attention import Attention
from ..layers.cache import KVCache


class AutoregressiveWrapper(nn.Module):
    """Trains a network to predict the next token, and generates with it.

    Args:
        net: a module with an attribute ``max_seq_len`` that maps tokens ``(b, n)`` to logits ``(b, n, num_tokens)`` and
            takes ``labels`` (for training only). If its ``forward`` also has a parameter ``cache``, as the
            Transformer's has, it gets a :class:`KVCache` and each token once; otherwise the whole sequence again for
            every token. With a parameter ``mask`` it can generate from prompts of unequal lengths together.
        pad_value: the token that follows the end of a row that ended before the others.

    Examples:
        >>> import torch
        >>> from memory_efficient_attention_pytorch import AutoregressiveWrapper, Transformer
        >>> net = Transformer(num_tokens=256, max_seq_len=512, dim=64, depth=2, heads=4, dim_head=16, causal=True)
        >>> model = AutoregressiveWrapper(net)
        >>> tokens = torch.randint(0, 256, (2, 100))
        >>> model(tokens).backward()
        >>> model.generate(tokens[:, :10], 20, temperature=0.8).shape
        torch.Size([2, 20])
    """

    def __init__(self, net: nn.Module, pad_value: int = 0) -> None:
        super().__init__()
        self.net, self.pad_value = net, pad_value
        self.max_seq_len: int = net.max_seq_len  # type: ignore[assignment]

    @property
    def beyond_max_seq_len(self) -> str:
        """How generation goes on once prompt and new tokens exceed ``max_seq_len``.

        ``"window"``: every layer has a window and positions are relative (rotary, ALiBi, none), so nothing changes.
        ``"slide"``: positions are relative; a token sees the last ``max_seq_len`` tokens, earlier ones leave the cache.
        Seeing more than in training would make rotary models worse, and take ever more memory.
        ``"recompute"``: positions are learned up to ``max_seq_len``, or unknown (another kind of net); for every token
        the net reads the last ``max_seq_len`` again, numbered from 0, since each token's position changes and cached
        keys become wrong.
        """
        if getattr(self.net, "pos_emb", self.net) is not None:
            return "recompute"
        reaches = [window_sides(m.window)[0] for m in self.net.modules() if isinstance(m, Attention)]
        return "window" if reaches and None not in reaches else "slide"

    def forward(self, x: Tensor, mask: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return the net's loss when it predicts ``x[:, 1:]`` from ``x[:, :-1]``.

        x: tokens ``(b, n)``. mask: bool ``(b, n)``, True = a token; padding is neither attended to nor predicted.
        Further keywords go to the net.

        Raises:
            ValueError: fewer than two tokens, or a mask of another shape or dtype.
        """
        require(x.dim() == 2 and x.shape[1] > 1, "x", "shape (batch, tokens) with two tokens or more", tuple(x.shape))
        labels = x[:, 1:] if x.is_floating_point() else x[:, 1:].long()  # the mask below writes a negative number
        if mask is not None:
            _check_mask(mask, x.shape, "x")
            labels = labels.masked_fill(~(mask[:, 1:] & mask[:, :-1]), kwargs.get("ignore_index", -100))
            kwargs["mask"] = mask[:, :-1]
        loss: Tensor = self.net(x[:, :-1], labels=labels, **kwargs)
        return loss

    def generate(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        **options: Any,
    ) -> Tensor:
        """Return the new tokens alone, int64 ``(b, seq_len)``, with fewer columns if every row ends earlier.

        All arguments are those of :meth:`stream`: ``top_k``, ``top_p``, ``mask``, ``generator``, ``use_cache`` too.
        """
        steps = list(self.stream(start_tokens, seq_len, eos_token, temperature, filter_thres, **options))
        return torch.stack(steps, dim=1) if steps else start_tokens.new_empty(len(start_tokens), 0, dtype=torch.long)

    def stream(
        self,
        start_tokens: Tensor,
        seq_len: int,
        eos_token: int | None = None,
        temperature: float = 1.0,
        filter_thres: float = 0.9,
        *,
        top_k: int | None = None,
        top_p: float | None = None,
        mask: Tensor | None = None,
        generator: torch.Generator | Sequence[torch.Generator] | None = None,
        use_cache: bool = True,
        **kwargs: Any,
    ) -> Iterator[Tensor]:
        """Yield generated tokens: one int64 tensor ``(b,)`` a step, up to ``seq_len`` or the end of every row.

        Args:
            start_tokens: prompts, integers ``(b, n)`` with n of at least 1.
            seq_len: how many tokens to generate at most.
            eos_token: a row ends when this token is generated (in the prompt it does not count); ``pad_value`` follows.
            temperature: the logits are divided by it; 0 takes the likeliest token.
            filter_thres: sample among the ``ceil((1 − filter_thres) · num_tokens)`` likeliest tokens, at least one.
            top_k: sample among this many of the likeliest instead.
            top_p: of those, sample only among the likeliest whose probabilities add up to this (Holtzman et al., "The
                curious case of neural text degeneration", 2019, arXiv:1904.09751).
            mask: bool ``(b, n)``, False = padding on the left of a shorter prompt (see :func:`pad_left`). Padding
                changes nothing: each row gets the same tokens as alone.
            generator: random generator (None: the device's default); or one per row, so that a row's tokens do not
                depend on the other rows.
            use_cache: False makes the net read the whole sequence again for each token, with the same result up to
                ``max_seq_len`` tokens.
            kwargs: passed to the net at every call.

        Beyond ``max_seq_len`` see :attr:`beyond_max_seq_len`.

        During each step the net is in eval mode and without gradients; its mode is restored between steps.

        Raises:
            ValueError: immediately for an argument out of range; during generation for logits that are not finite.
        """
        require(isinstance(seq_len, int) and seq_len >= 0, "seq_len", "an integer of at least 0", repr(seq_len))
        tokens, mask = _check_prompts(start_tokens, mask)
        sample = _Sampler(temperature, filter_thres, top_k, top_p, generator)
        sample.check(len(tokens))
        reader = _Reader(self, tokens, mask, use_cache, kwargs)
        return self._steps(reader, sample, seq_len, eos_token)

    def _steps(self, reader: _Reader, sample: _Sampler, seq_len: int, eos_token: int | None) -> Iterator[Tensor]:
        ended = torch.zeros(len(reader.tokens), dtype=torch.bool, device=reader.tokens.device)
        for _ in range(seq_len):
            token = sample(reader.predict())
            reader.append(token)
            yield token.masked_fill(ended, self.pad_value)
            if eos_token is not None:
                ended |= token == eos_token
                if ended.all():
                    return


def pad_left(prompts: Sequence[Sequence[int]], pad_value: int = 0) -> tuple[Tensor, Tensor]:
    """Pad prompts of unequal lengths to ``start_tokens`` and ``mask`` of :meth:`AutoregressiveWrapper.generate`.

    Returns int64 ``(b, longest)`` and bool ``(b, longest)``, which is False on the padding. Raises ValueError without
    a prompt.
    """
    require(len(prompts) > 0, "prompts", "at least one", "none")
    longest = max(map(len, prompts))
    tokens = torch.tensor([[pad_value] * (longest - len(prompt)) + [*prompt] for prompt in prompts], dtype=torch.long)
    starts = torch.tensor([[longest - len(prompt)] for prompt in prompts])
    return tokens, torch.arange(longest) >= starts


class _Reader:
    """Feeds a growing sequence to a network and returns its next-token logits."""

    def __init__(
        self,
        wrapper: AutoregressiveWrapper,
        tokens: Tensor,
        mask: Tensor | None,
        use_cache: bool,
        kwargs: dict[str, Any],
    ) -> None:
        self.net, self.max_seq_len, self.beyond = wrapper.net, wrapper.max_seq_len, wrapper.beyond_max_seq_len
        self.tokens, self.mask, self.kwargs = tokens, mask, kwargs
        self.modules = list(self.net.modules())
        parameters = inspect.signature(self.net.forward).parameters
        require(mask is None or "mask" in parameters, "mask", "none, since the net's forward takes no mask", "padding")
        cached = use_cache and "cache" in parameters and all(m.causal for m in self.modules if isinstance(m, Attention))
        self.cache = KVCache(self.max_seq_len if self.beyond == "slide" else None) if cached else None

    @torch.no_grad()
    def predict(self) -> Tensor:
        """Return the logits of the next token, ``(b, num_tokens)``."""
        if self.beyond == "recompute" and self.tokens.shape[1] > self.max_seq_len:
            self.cache = None
        if self.beyond != "window" and (self.cache is None or not self.cache.length):
            self.tokens = self.tokens[:, -self.max_seq_len :]
            self.mask = None if self.mask is None else self.mask[:, -self.max_seq_len :]
        tokens, given = self.tokens, dict(self.kwargs)
        if self.mask is not None:
            given["mask"] = self.mask
        if self.cache is not None:
            given["cache"], tokens = self.cache, tokens[:, self.cache.length :]
        with _evaluating(self.net, self.modules):
            logits: Tensor = self.net(tokens, **given)[:, -1]
        return logits

    def append(self, token: Tensor) -> None:
        self.tokens = torch.cat((self.tokens, token[:, None]), dim=1)
        if self.mask is not None:
            self.mask = nn.functional.pad(self.mask, (0, 1), value=True)


@dataclass
class _Sampler:
    """Samples the next token from logits."""

    temperature: float
    filter_thres: float
    top_k: int | None
    top_p: float | None
    generator: torch.Generator | Sequence[torch.Generator] | None

    def check(self, rows: int) -> None:
        finite = self.temperature >= 0 and math.isfinite(self.temperature)
        require(finite, "temperature", "a finite number of at least 0", self.temperature)
        require(0 <= self.filter_thres <= 1, "filter_thres", "a number from 0 to 1", self.filter_thres)
        if self.top_k is not None:
            require_positive_int("top_k", self.top_k)
        require(self.top_p is None or 0 < self.top_p <= 1, "top_p", "a number above 0 and at most 1", self.top_p)
        if isinstance(self.generator, Sequence):
            require(len(self.generator) == rows, "generator", f"one for each of {rows} rows", len(self.generator))

    def __call__(self, logits: Tensor) -> Tensor:
        """Draw tokens, int64 ``(b,)``, from logits ``(b, num_tokens)``.

        With e_i exponentially distributed, ``p_i / e_i`` is largest for token i with probability p_i. Every token has
        its own e_i, drawn before any filter, so two nearly equal logits that swap ranks do not change the draw.
        """
        logits = logits.float()
        best = logits.amax(dim=-1, keepdim=True)
        highest = best.flatten().tolist()
        require(all(map(math.isfinite, highest)), "net", "finite logits", f"{highest} as the largest of each row")
        if self.temperature == 0:
            return logits.argmax(dim=-1)
        noise = self._noise(logits)
        keep, candidates = self._keep(logits.shape[-1]), None
        if keep < logits.shape[-1] or self.top_p is not None:
            logits, candidates = logits.topk(keep)
            noise = noise.gather(-1, candidates)
        # A temperature too small for fp32 would divide 0 by 0.
        probabilities = ((logits - best) / max(self.temperature, torch.finfo(torch.float32).tiny)).softmax(dim=-1)
        if self.top_p is not None:
            likelier = probabilities.cumsum(dim=-1) - probabilities
            probabilities = probabilities.masked_fill(likelier >= self.top_p, 0.0)
        drawn = (probabilities / noise).argmax(dim=-1, keepdim=True)
        return (drawn if candidates is None else candidates.gather(-1, drawn)).squeeze(-1)

    def _keep(self, num_tokens: int) -> int:
        # (1 − 0.7) · 10 is a little more than 3 in floating point, but means 3.
        share = math.ceil((1 - self.filter_thres) * num_tokens - 1e-6)
        return min(num_tokens, max(1, share) if self.top_k is None else self.top_k)

    def _noise(self, logits: Tensor) -> Tensor:
        noise = torch.empty_like(logits)
        if not isinstance(self.generator, Sequence):
            return noise.exponential_(generator=self.generator)
        for row, generator in zip(noise, self.generator, strict=True):
            row.exponential_(generator=generator)
        return noise


@contextmanager
def _evaluating(net: nn.Module, modules: Sequence[nn.Module]) -> Iterator[None]:
    """Put every module of the net in eval mode inside the context, and restore each one's mode afterwards."""
    modes = [module.training for module in modules]
    if not any(modes):
        yield
        return
    net.eval()
    try:
        yield
    finally:
        net.train(modes[0])
        for module, mode in zip(modules, modes, strict=True):
            module.training = mode


def _check_prompts(tokens: Tensor, mask: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Validate prompts; return them as int64 with the mask, None if it hides nothing."""
    fits = tokens.dim() == 2 and tokens.shape[1] > 0 and is_integer(tokens)
    expected = "integers of shape (batch, tokens) with at least one token"
    require(fits, "start_tokens", expected, f"{tokens.dtype} {tuple(tokens.shape)}")
    if mask is None:
        return tokens.long(), None
    _check_mask(mask, tokens.shape, "start_tokens")
    left = bool(mask[:, -1].all() and (mask[:, 1:] >= mask[:, :-1]).all())
    require(left, "mask", "padding (False) only on the left of a row, before at least one token", "other padding")
    # Padding may hold anything, so replace it by a valid token.
    return tokens.long().masked_fill(~mask, 0), None if mask.all() else mask


def _check_mask(mask: Tensor, shape: torch.Size, argument: str) -> None:
    fits = mask.dtype == torch.bool and mask.shape == shape
    require(fits, "mask", f"bool of {argument}'s shape {tuple(shape)}", f"{mask.dtype} {tuple(mask.shape)}")
