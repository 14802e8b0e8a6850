"""``plan`` and ``max_seq_len``: predict what a training step needs before it runs."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..common.errors import require
from ..common.sizes import format_size, parse_size
from ..models.config import TransformerConfig
from ..models.transformer import Transformer, pieces_chosen
from .accounting import Accounting, accounting_for
from .candidates import Candidate, candidates
from .dry_run import OptimizerMaker
from .search import GRANULE, largest
from .timeline import CATEGORIES, Operation, Timeline
from .workload import Config, ExampleInputs, Workload

DTYPES = {"fp64": torch.float64, "fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(frozen=True)
class Option:
    """A way of running the step that was considered: its settings, peak in bytes and floating-point operations.

    Examples:
        >>> from memory_efficient_attention_pytorch import plan
        >>> from memory_efficient_attention_pytorch.planner import Option
        >>> config = dict(num_tokens=256, max_seq_len=4096, dim=64, depth=2, causal=True)
        >>> options = plan(config, batch_size=1, seq_len=4096, device="cuda", budget="1GiB").options
        >>> isinstance(options[0], Option), options[0].name
        (True, 'store everything')
    """

    name: str
    settings: Mapping[str, Any]
    peak_bytes: int
    flops: float


@dataclass(frozen=True)
class Plan:
    """Holds what a training step needs.

    ``timeline`` has the bytes that are live during every operation. ``settings`` are the chosen Transformer keywords:
    without a budget the numbers of pieces that its layers choose, where more than one; with a budget the fastest
    settings that fit, and ``options`` all that were considered on the way, fastest first. Where nothing fits,
    ``remedies`` has what would fit, each by itself: the largest ``batch_size``, ``seq_len`` or ``depth``, to within 1
    part in 32, and the ``budget`` needed, in bytes.

    Examples:
        >>> from memory_efficient_attention_pytorch import Plan, plan
        >>> config = dict(num_tokens=256, max_seq_len=4096, dim=64, depth=2, causal=True)
        >>> made = plan(config, batch_size=1, seq_len=4096, device="cuda", autocast="bf16")
        >>> isinstance(made, Plan), made.fits("1GiB"), made.peak.phase
        (True, True, 'backward')
    """

    timeline: Timeline
    device: torch.device
    batch_size: int | None
    seq_len: int | None
    budget: int | None = None
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: tuple[Option, ...] = ()
    remedies: Mapping[str, int] = field(default_factory=dict)

    @property
    def peak_bytes(self) -> int:
        """The most bytes live at once: parameters, gradients, optimizer state, activations and workspaces.

        The runtime is not included: the interpreter, PyTorch's own code, a CUDA context.
        """
        return int(self.timeline.totals[self.timeline.peak])

    @property
    def breakdown(self) -> dict[str, int]:
        """The bytes of each category at the peak; they add up to ``peak_bytes``."""
        return self.timeline.breakdown(self.timeline.peak)

    @property
    def peak(self) -> Operation:
        """The operation at the peak, with the module and the phase it ran in."""
        return self.timeline.operations[self.timeline.peak]

    @property
    def flops(self) -> float:
        """Floating-point operations of the step: two per multiply-add, recomputation included, causality ignored."""
        return self.timeline.flops

    @property
    def advice(self) -> str | None:
        """The remedies in words; None where the step fits or there is no budget."""
        if not self.remedies:
            return None
        words = [_REMEDIES[name].format(amount) for name, amount in self.remedies.items() if name != "budget"]
        changes = " or ".join([*words, f"a budget of {format_size(self.remedies['budget'])}"]) + " would fit"
        if self.budget is None or self.state_bytes < self.budget:
            return changes
        return f"parameters, gradients and optimizer state alone take {format_size(self.state_bytes)}: {changes}"

    @property
    def state_bytes(self) -> int:
        """The most bytes that parameters, gradients and optimizer state take, whatever the batch and its length."""
        state = [CATEGORIES.index(name) for name in ("parameters", "gradients", "optimizer")]
        return int(self.timeline.live[:, state].sum(axis=1).max())

    def as_dict(self) -> dict[str, Any]:
        """Return everything but the timeline, in types that JSON has."""
        return {
            "peak_bytes": self.peak_bytes,
            "breakdown": self.breakdown,
            "peak": self.peak._asdict(),
            "flops": self.flops,
            "device": str(self.device),
            "batch_size": self.batch_size,
            "seq_len": self.seq_len,
            "budget": self.budget,
            "fits": None if self.budget is None else self.fits(),
            "settings": dict(self.settings),
            "options": [asdict(option) for option in self.options],
            "remedies": dict(self.remedies),
            "advice": self.advice,
        }

    def fits(self, budget: int | float | str | None = None) -> bool:
        """Return whether the peak is within the budget (by default the one planned for).

        Raises ValueError without a budget here and in ``plan``.
        """
        limit = self.budget if budget is None else parse_size(budget)
        require(limit is not None, "budget", "a size such as 8GiB, since the plan was made without a budget", None)
        assert limit is not None
        return self.peak_bytes <= limit


_REMEDIES = {"batch_size": "a batch of {:,}", "seq_len": "sequences of {:,} tokens", "depth": "a depth of {}"}


def plan(
    model_or_config: Config | nn.Module,
    *,
    batch_size: int | None = None,
    seq_len: int | None = None,
    dtype: torch.dtype | str | None = None,
    autocast: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    optimizer: str | OptimizerMaker | None = "adamw",
    budget: int | float | str | None = None,
    example_inputs: ExampleInputs = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    training: bool = True,
    threads: int | None = None,
    keep_gradients: bool = True,
    shards: int = 1,
    context: int = 1,
) -> Plan:
    """Plan a training step (forward, backward, optimizer) without running it, by running its code on fake tensors.

    Args:
        model_or_config: keywords of :class:`Transformer`, a built one, or any module with ``example_inputs``.
        batch_size, seq_len: shape of the tokens that a Transformer is trained on.
        dtype: of parameters, gradients and floating-point buffers: ``"fp64"``, ``"fp32"``, ``"bf16"``, ``"fp16"`` or a
            ``torch.dtype``; the model's own if None.
        autocast: the dtype of mixed precision, given as ``dtype`` is; off if None.
        device: ``"cpu"`` or ``"cuda"``, which need not exist here. Default: the device of a built model, else CUDA if
            available.
        optimizer: ``"adamw"``, ``"adam"``, ``"sgd"``, ``"rmsprop"``, ``"adagrad"``, a function from a list of
            parameters to an optimizer, or None for forward and backward alone.
        budget: a size (``"8GiB"``, ``"8000M"``, bytes). For a configuration the fastest settings that fit are chosen
            among those that it leaves open: ``reversible``, ``keep_attention``, ``ff_chunks``, ``head_chunks``,
            ``loss_chunk_size`` and, under autocast, ``exact``.
        example_inputs: arguments of the module's forward: a tensor, a tuple, a mapping of keywords, or a function of
            ``(batch_size, seq_len)`` that makes one. Values do not matter, so ``meta`` tensors are enough.
        loss_fn: turns the module's output into a scalar; default: the output itself, or its attribute ``loss``.
        training: False plans a forward pass without gradients in eval mode; for a Transformer, generation: the prompt
            of ``seq_len`` tokens, which fills the cache of keys and values, and the next token.
        threads: of the CPU's kernels; each thread has buffers, and attention's tiles depend on their number.
            Default: PyTorch's number.
        keep_gradients: whether gradients exist when the step begins, as in gradient accumulation; False: backward
            allocates them, as after ``optimizer.zero_grad()``.
        shards: processes over which FSDP2 shards parameters, gradients and optimizer state, gathered block by block.
        context: processes over which ``distributed.ContextParallel`` divides the tokens of each sequence. Bytes are
            those of the first process, batch and length those of the whole sequence.

    The planned step is any but the first: the optimizer's state exists when it begins.

    Raises:
        ValueError: an argument is invalid or missing.
        NotImplementedError: the module's shapes or control flow depend on the data; the message names the operation.

    Examples:
        >>> from memory_efficient_attention_pytorch import Transformer, plan
        >>> config = dict(num_tokens=256, max_seq_len=4096, dim=64, depth=2, causal=True)
        >>> made = plan(config, batch_size=1, seq_len=4096, device="cuda", budget="1GiB")
        >>> made.fits()
        True
        >>> model = Transformer(**{**config, **made.settings})
    """
    types = _dtype(dtype, "dtype"), _dtype(autocast, "autocast")
    rest = optimizer, *types, example_inputs, loss_fn, training, keep_gradients, shards, context
    workload = Workload(model_or_config, batch_size, seq_len, *rest)
    accounting = accounting_for(_device(device, model_or_config), threads)
    limit = None if budget is None else parse_size(budget)
    if limit is not None and isinstance(model_or_config, Mapping):
        return _plan_within(limit, workload, accounting)
    made = _planned(workload, accounting, limit)
    if limit is None or made.fits():
        return made
    return replace(made, remedies=_remedies(workload, accounting, made, made.peak_bytes))


def max_seq_len(
    model_or_config: Config | nn.Module,
    *,
    budget: int | float | str,
    batch_size: int = 1,
    dtype: torch.dtype | str | None = None,
    autocast: torch.dtype | str | None = None,
    device: torch.device | str | None = None,
    optimizer: str | OptimizerMaker | None = "adamw",
    example_inputs: ExampleInputs = None,
    loss_fn: Callable[[Any], Tensor] | None = None,
    training: bool = True,
    threads: int | None = None,
    keep_gradients: bool = True,
    shards: int = 1,
    context: int = 1,
) -> int:
    """Return the longest sequence, in tokens, for which the step's peak is within the budget; 0 if not even one fits.

    Arguments are those of :func:`plan`; ``example_inputs`` must be a function of ``(batch_size, seq_len)``. Settings
    are not changed: to use leaner ones, merge ``plan(…, budget=…).settings`` into the configuration. The result fits
    with one part in 128 of the budget left free, is within 1 part in 256 of the longest that does, and from 4096
    tokens on is a multiple of 64. A Transformer with learned positions gets at most as many tokens as positions.

    Examples:
        >>> from memory_efficient_attention_pytorch import max_seq_len
        >>> config = dict(num_tokens=256, max_seq_len=1000, dim=64, depth=2, causal=True)
        >>> max_seq_len(config, budget="8GiB", device="cuda")  # learned positions: no more than there are
        1000
    """
    require(
        example_inputs is None or callable(example_inputs), "example_inputs", "a function of (batch, length)", "none"
    )
    types = _dtype(dtype, "dtype"), _dtype(autocast, "autocast")
    rest = optimizer, *types, example_inputs, loss_fn, training, keep_gradients, shards, context
    workload = Workload(model_or_config, batch_size, 1, *rest)
    accounting = accounting_for(_device(device, model_or_config), threads)
    return _longest(workload, accounting, parse_size(budget))


def _planned(workload: Workload, accounting: Accounting, budget: int | None = None) -> Plan:
    timeline = workload.run_dry(accounting)
    settings = {name: number for name, number in _pieces(workload, accounting).items() if number > 1}
    return Plan(timeline, accounting.device, workload.batch_size, workload.seq_len, budget, settings)


def _pieces(workload: Workload, accounting: Accounting) -> dict[str, int]:
    """Return the numbers of pieces that layers choose in training, where a Transformer's keywords leave them open."""
    subject = workload.subject
    if not isinstance(subject, Mapping) or not workload.training:
        return {}
    itemsize = (workload.autocast or workload.dtype or torch.float32).itemsize
    batch, length = workload.token_shape
    kind, threads, divided = accounting.device.type, accounting.threads, workload.context > 1
    chosen = pieces_chosen(subject, batch, length, itemsize, kind, threads, divided)
    return {name: number for name, number in chosen.items() if subject.get(name) is None}


def _plan_within(budget: int, workload: Workload, accounting: Accounting) -> Plan:
    """Return the fastest candidate that fits, else the leanest one with remedies. One that saves nothing is skipped."""
    options: list[Option] = []
    chosen: Plan | None = None

    def considered(name: str, changes: Mapping[str, Any]) -> int:
        nonlocal chosen
        settings = changes if chosen is None else {**chosen.settings, **changes}
        made = replace(_planned(_with(workload, settings), accounting, budget), settings=settings)
        if chosen is None or made.peak_bytes < chosen.peak_bytes:
            options.append(Option(name, settings, made.peak_bytes, made.flops))
            chosen = replace(made, options=tuple(options))
        return made.peak_bytes

    for candidate in _candidates(workload, accounting):
        if considered(*candidate) <= budget:
            break
    assert chosen is not None
    if chosen.fits():
        return chosen
    # Two changes that save nothing each, since the other part of the step needs as much, may save together.
    leanest = considered("all that may save", _leanest_settings(workload, accounting))
    return chosen if chosen.fits() else replace(chosen, remedies=_remedies(workload, accounting, chosen, leanest))


def _candidates(workload: Workload, accounting: Accounting) -> list[Candidate]:
    assert isinstance(workload.subject, Mapping)
    mixed_precision, offload = workload.autocast is not None, accounting.device.type == "cuda"
    pieces = _pieces(_with(workload, {"reversible": workload.subject.get("reversible", True)}), accounting)
    return candidates(workload.subject, *workload.token_shape, mixed_precision, offload, pieces)


def _leanest_settings(workload: Workload, accounting: Accounting) -> dict[str, Any]:
    """Merge all candidates' changes."""
    return {key: value for _, changes in _candidates(workload, accounting) for key, value in changes.items()}


def _remedies(workload: Workload, accounting: Accounting, made: Plan, peak_bytes: int) -> dict[str, int]:
    """Return the largest batch, length or, where neither helps, depth that fits, and the budget that is needed.

    To within 1 part in 32, with the leanest settings. ``made`` does not fit; ``peak_bytes``: of the leanest settings.
    """
    assert made.budget is not None
    budget = made.budget

    def most(name: str, now: int) -> dict[str, int]:
        def need(size: int) -> int:
            sized = _sized(workload, name, size)
            if isinstance(sized.subject, Mapping):
                sized = _with(sized, _leanest_settings(sized, accounting))
            return _peak(sized, accounting)

        # Accurate enough for advice, which should not take longer than the plan.
        found = largest(need, budget, now - 1, beyond=peak_bytes, fraction=32, granule=4)
        return {name: found} if found else {}

    found: dict[str, int] = {}
    batch, length = workload.batch_size or 1, workload.seq_len or 1
    sized = made.state_bytes < budget and (workload.of_transformer or callable(workload.example_inputs))
    if sized and batch > 1:
        found |= most("batch_size", batch)
    if sized and length > 1:
        found |= most("seq_len", length)
    if not found and isinstance(workload.subject, Mapping) and workload.subject["depth"] > 1:
        found |= most("depth", workload.subject["depth"])
    return found | {"budget": made.peak_bytes}


def _sized(workload: Workload, name: str, size: int) -> Workload:
    if name == "depth":
        return _with(workload, {name: size})
    return replace(workload, batch_size=size) if name == "batch_size" else replace(workload, seq_len=size)


def _with(workload: Workload, settings: Mapping[str, Any]) -> Workload:
    assert isinstance(workload.subject, Mapping)
    return replace(workload, subject={**workload.subject, **settings})


_LONG = 4096


def _longest(workload: Workload, accounting: Accounting, budget: int) -> int:
    # A prediction may be a little under what the step takes: one part in 128 of the budget stays free.
    room = budget - budget // 128
    most = _most_tokens(workload.subject)

    def need(granules: int, size: int = GRANULE) -> int:
        return _peak(replace(workload, seq_len=granules * size), accounting)

    longest = largest(lambda n: need(n, 1), room, most)
    if longest == most or longest < _LONG:
        return longest
    # For ragged lengths libraries compile other kernels, which keep other amounts of memory.
    granules = longest // GRANULE
    return GRANULE * (granules if need(granules) <= room else largest(need, room, granules - 1))


def _peak(workload: Workload, accounting: Accounting) -> int:
    return int(workload.run_dry(accounting).totals.max())


def _most_tokens(subject: Config | nn.Module) -> int | None:
    """Return how many learned positions a Transformer has; None if its positions set no limit."""
    if isinstance(subject, Mapping):
        learned = subject.get("positions", TransformerConfig.positions) == "learned"
        return subject.get("max_seq_len") if learned else None
    return subject.max_seq_len if isinstance(subject, Transformer) and subject.pos_emb is not None else None


def _dtype(value: torch.dtype | str | None, argument: str) -> torch.dtype | None:
    if value is None or (isinstance(value, torch.dtype) and value.is_floating_point):
        return value
    expected = f"a floating-point torch.dtype, None or one of {', '.join(DTYPES)}"
    require(isinstance(value, str) and value in DTYPES, argument, expected, repr(value))
    return DTYPES[str(value)]


def _device(device: torch.device | str | None, subject: Config | nn.Module) -> torch.device:
    if device is None:
        tensor = None if isinstance(subject, Mapping) else next(subject.parameters(), None)
        if tensor is None or tensor.device.type == "meta":
            return torch.device("cuda" if torch.cuda.is_available() else "cpu")
        return tensor.device
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device: expected cpu, cuda or another device of PyTorch's, got {device!r}") from error
    require(found.type != "meta", "device", "a device with memory, such as cpu or cuda", "meta")
    return found
