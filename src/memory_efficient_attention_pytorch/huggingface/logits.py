"""The loss of a causal language model without its logits, which are computed only when used."""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextvars import ContextVar
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss

from ..common.divided import Divided, active, refuse_divided
from ..common.errors import require
from ..common.precision import compute_dtype, full_precision
from ..loss.linear_cross_entropy import linear_cross_entropy
from ..torch_internals.engine import version
from ..torch_internals.tensors import without_contents
from .deferred import Deferred, touched
from .model import input_of
from .undoing import RECORD
from .visibility import NAME, divided_tokens

_HEAD_OF_A_LOSS: ContextVar[nn.Module | None] = ContextVar("head_of_a_loss", default=None)
"""The head of the model that is computing a loss; None where logits are wanted."""


class LazyLogits(Deferred):
    """Logits of ``hidden (…, d)``, computed when first used: ``hidden @ weight.T + bias`` and then ``steps`` in order.

    A step is a multiplication or division by a number, one tanh, or a conversion to fp32, which the model or accelerate
    has asked for. Anything else asked of it computes the logits. shape, dtype and device are known without them.
    """

    _with_gradients = True  # in the model's forward, whatever the mode in which the logits are used

    def __init__(
        self,
        head: nn.Linear,
        hidden: Tensor,
        steps: tuple[tuple[str, float], ...] = (),
        computed_in: torch.dtype | None = None,
    ) -> None:
        self._head, self._hidden, self._steps = head, hidden, steps
        # Those of the model's forward: an optimizer may change them before the logits are used.
        self._weights = [(tensor, version(tensor)) for tensor in (head.weight, head.bias) if tensor is not None]
        # Autocast, too, is that of the model's forward.
        self._computed_in = computed_in or compute_dtype(hidden)
        self._made: Tensor | None = None

    @property
    def shape(self) -> torch.Size:
        return torch.Size((*self._hidden.shape[:-1], self._head.weight.shape[0]))

    @property
    def dtype(self) -> torch.dtype:
        return torch.float32 if any(name == "float" for name, _ in self._steps) else self._computed_in

    @property
    def device(self) -> torch.device:
        return self._hidden.device

    def materialize(self) -> Tensor:
        """Return the logits ``(…, V)``, differentiable if gradients were enabled in the model's forward.

        Raises RuntimeError if the head's weights have changed since.
        """
        if self._made is None:
            if any(version(tensor) != number for tensor, number in self._weights):
                raise RuntimeError(
                    "logits: expected to be used before the head's weight changes, as in optimizer.step(), since they "
                    "are computed when used; read them first, or call make_memory_efficient(model, loss=False)"
                )
            tensors = [tensor for tensor, _ in self._weights]
            with full_precision(self._hidden.device), torch.set_grad_enabled(self._with_gradients):
                logits = nn.functional.linear(*(t.to(self._computed_in) for t in (self._hidden, *tensors)))
                for name, number in self._steps:
                    logits = _STEPS[name](logits, number)
            self._made = logits
        return self._made

    def loss(self, labels: Tensor, ignore_index: int, reduction: str) -> Tensor:
        """Return the cross-entropy with labels ``(…)``, without logits."""
        options: dict[str, Any] = {"bias": self._head.bias, "ignore_index": ignore_index, "reduction": reduction}
        scales, capped = [1.0, 1.0], False  # before the tanh and after it
        for name, number in self._steps:
            capped = capped or name == "tanh"
            if name in ("mul", "div"):
                scales[capped] *= number if name == "mul" else 1 / number
        if capped:
            options |= {"softcap": scales[1], "scale": scales[0] * scales[1]}
        elif scales[0] != 1:
            options["scale"] = scales[0]
        return linear_cross_entropy(self._hidden, self._head.weight, labels, **options)

    def _then(self, name: str, number: float = 1.0) -> Any:
        if self._made is not None or (name == "tanh" and (name, number) in self._steps):
            return _STEPS[name](self.materialize(), number)
        made = type(self)(self._head, self._hidden, (*self._steps, (name, number)), self._computed_in)
        made._weights = self._weights
        return made

    @classmethod
    def __torch_function__(
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        first = args[0] if args else None
        if function is torch.tanh and isinstance(first, LazyLogits) and not kwargs:
            return first._then("tanh")
        return super().__torch_function__(function, types, args, kwargs)

    def __truediv__(self, other: Any) -> Any:
        return self._then("div", other) if isinstance(other, int | float) and other else self.materialize() / other

    def __mul__(self, other: Any) -> Any:
        return self._then("mul", other) if isinstance(other, int | float) else self.materialize() * other

    __rmul__ = __mul__

    def contiguous(self) -> Any:
        """Return itself inside the model's forward (OPT), where the layout does not show; afterwards a tensor."""
        return self if _HEAD_OF_A_LOSS.get() is self._head else self.materialize().contiguous()

    def float(self) -> Any:
        """Stay lazy: Mamba asks for it before its loss, which is in fp32 anyway, and accelerate at each step."""
        return self._then("float")

    def __reduce__(self) -> Any:
        return torch.clone, (self.materialize().detach(),)

    def __repr__(self) -> str:
        return f"LazyLogits(shape={(*self.shape,)})"


_STEPS: dict[str, Callable[[Tensor, float], Tensor]] = {
    "mul": lambda logits, number: logits * number,
    "div": lambda logits, number: logits / number,
    "tanh": lambda logits, _: torch.tanh(logits),
    "float": lambda logits, _: logits.float(),
}


class EvaluatedLogits(LazyLogits, Tensor):  # type: ignore[misc,override]
    """Lazy logits of a forward pass without gradients, which are a tensor: Trainer gathers predictions only of tensors.

    PyTorch's compiled code reads the memory of whatever passes for one by isinstance, so this is one in fact, without
    contents: what computes on it there is given the logits.
    """

    _with_gradients = False

    @staticmethod
    def __new__(
        cls,
        head: nn.Linear,
        hidden: Tensor,
        steps: tuple[tuple[str, float], ...] = (),
        computed_in: torch.dtype | None = None,
    ) -> Any:
        described = LazyLogits(head, hidden, steps, computed_in)
        make = without_contents()
        assert make is not None
        return make(cls, described.shape, dtype=described.dtype, device=described.device)

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, function: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        return function(*touched(args), **touched(kwargs or {}))


def objection(model: PreTrainedModel) -> str | None:
    """Return why the model's loss must stay unchanged, or None."""
    head = model.get_output_embeddings()
    if head is None:
        return "it has no language model head"
    if type(head) is not nn.Linear:
        return f"its head is not a plain linear layer: {type(head).__module__}.{type(head).__name__}"
    if getattr(model, "loss_function", None) is not ForCausalLMLoss:
        return "its loss is not ForCausalLMLoss"
    if "loss_function" not in inspect.unwrap(type(model).forward).__code__.co_names:
        return "its forward does not call its loss_function"
    return None


def head_forward(head: nn.Linear, hidden: Tensor) -> Any:
    """Compute the head's output: lazy logits while its model computes a loss."""
    # A head that is sharded or offloaded by itself has its weight during its forward only.
    alone = type(head) is nn.Linear and not hasattr(head, "_hf_hook") and not torch.compiler.is_compiling()
    if alone and _HEAD_OF_A_LOSS.get() is head:
        if torch.is_grad_enabled():
            return LazyLogits(head, hidden)
        if without_contents() is not None:
            return EvaluatedLogits(head, hidden)
    return nn.Linear.forward(head, hidden)


def forward_with_lazy_logits(model: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute a model's forward by its class's; with labels, its head returns lazy logits."""
    own = type(model).forward
    # A compiled model computes logits, as before; a restored one is called by what somebody put around this.
    if RECORD not in vars(model) or (torch.compiler.is_compiling() and active() is None):
        return own(model, *args, **kwargs)
    given = {**dict(zip(_names(own), args, strict=False)), **kwargs}
    if (divided := active()) is not None:
        args, kwargs = (), of_divided(model, divided, given)
    if given.get("labels") is None or torch.compiler.is_compiling():  # a compiled model computes logits, as before
        return own(model, *args, **kwargs)
    head = model.get_output_embeddings()
    if type(head) is nn.Linear and "forward" not in vars(head):
        told = "its head was replaced since make_memory_efficient (resize_token_embeddings?), so logits are computed"
        warnings.warn(f"{type(model).__name__}: {told}; restore(model), and call it again", stacklevel=2)
    token = _HEAD_OF_A_LOSS.set(head)
    try:
        return own(model, *args, **kwargs)
    finally:
        _HEAD_OF_A_LOSS.reset(token)


@cache
def _names(forward: Callable[..., Any]) -> list[str]:
    return list(inspect.signature(forward).parameters)[1:]


def of_divided(model: PreTrainedModel, divided: Divided, given: dict[str, Any]) -> dict[str, Any]:
    """Return the keywords of a model's forward where tokens are divided over processes.

    Raises ValueError for a cache or another number of tokens than the process has.
    """
    name = type(model).__name__
    if model.config._attn_implementation != NAME:
        refuse_divided(f"{name}, whose attention is its own")
    require(given.get("past_key_values") is None, "past_key_values", "None where tokens are divided", "a cache")
    require(not given.get("use_cache"), "use_cache", "False where tokens are divided", True)
    like = input_of(given.get("input_ids"), given.get("inputs_embeds"))
    expected = f"{divided.local_tokens} tokens, each process's part of the sequence"
    require(like.shape[1] == divided.local_tokens, "input_ids", expected, like.shape[1])
    tokens, positions = divided_tokens(divided, given.get("attention_mask"), given.get("position_ids"), like)
    return {**given, "attention_mask": tokens, "position_ids": positions, "use_cache": False}


def causal_lm_loss(
    logits: Any,
    labels: Tensor | None,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs: Any,
) -> Tensor:
    """Compute transformers' ``ForCausalLMLoss`` from lazy logits without materialising them.

    Labels ``(b, n)`` are shifted by one (shift_labels are shifted already); the sum over those that are not
    ignore_index is divided by num_items_in_batch, or by their number. Without a valid label the mean is 0, not NaN.
    """
    divided = active()
    if not isinstance(logits, LazyLogits) or logits._made is not None:
        refuse_divided("a loss from materialised logits")
        given: dict[str, Any] = {
            "num_items_in_batch": num_items_in_batch,
            "ignore_index": ignore_index,
            "shift_labels": shift_labels,
        }
        return ForCausalLMLoss(touched(logits), labels, vocab_size, **given, **kwargs)
    if shift_labels is None:
        assert labels is not None
        labels = labels if divided is None else divided.gather(labels)
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
        if divided is not None:
            shift_labels = shift_labels[:, divided.positions(labels.device)]
    rows = logits._hidden.shape[:-1]
    fits = shift_labels.numel() == rows.numel()
    require(fits, "labels", f"a number for each of the logits, {tuple(rows)}", tuple(shift_labels.shape))
    shift_labels = shift_labels.to(logits._hidden.device).reshape(rows)
    if num_items_in_batch is None:
        return logits.loss(shift_labels, ignore_index, "mean")
    if isinstance(num_items_in_batch, Tensor):
        num_items_in_batch = num_items_in_batch.to(logits._hidden.device)
    return logits.loss(shift_labels, ignore_index, "sum") / num_items_in_batch
