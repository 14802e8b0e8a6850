"""Search what fits in a budget: the fastest settings, and the largest batch, length or depth."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch

from ..common.errors import require
from ..models.transformer import pieces_chosen
from .accounting import Accounting
from .candidates import Candidate, candidates, leanest
from .result import Option, Plan
from .search import GRANULE, largest
from .workload import Workload

_LONG = 4096
_ENDLESS = 2**48  # tokens that no memory holds


def plan_step(workload: Workload, accounting: Accounting, budget: int | None) -> Plan:
    """Return the step's plan; for a configuration and a budget with the fastest settings that fit."""
    if budget is not None and isinstance(workload.subject, Mapping):
        workload.transformer(1)  # refuses wrong keywords, before settings are computed from them
        return _fastest_within(budget, workload, accounting)
    made = _planned(workload, accounting, budget)
    if budget is None or made.fits():
        return made
    return replace(made, remedies=_remedies(workload, accounting, made, made.peak_bytes))


def longest(workload: Workload, accounting: Accounting, budget: int) -> int:
    """Return the most tokens with which the step fits, as :func:`max_seq_len` says."""
    # A prediction may be a little under what the step takes: one part in 128 of the budget stays free.
    room = budget - budget // 128
    most = workload.most_tokens

    def need(length: int) -> int:
        require(length < _ENDLESS, "example_inputs", "inputs that grow with seq_len", f"ones that fit at {_ENDLESS:,}")
        return _peak(replace(workload, seq_len=length), accounting)

    found = largest(need, room, most)
    if found == most or found < _LONG:
        return found
    # For ragged lengths libraries compile other kernels, which keep other amounts of memory.
    granules = found // GRANULE
    if need(GRANULE * granules) <= room:
        return GRANULE * granules
    return GRANULE * largest(lambda n: need(GRANULE * n), room, granules - 1)


def _planned(workload: Workload, accounting: Accounting, budget: int | None) -> Plan:
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


def _fastest_within(budget: int, workload: Workload, accounting: Accounting) -> Plan:
    """Return the fastest candidate that fits, else the leanest one with remedies. One that saves nothing is skipped."""
    options: list[Option] = []
    chosen: Plan | None = None

    def considered(name: str, changes: Mapping[str, Any]) -> int:
        nonlocal chosen
        settings = changes if chosen is None else {**chosen.settings, **changes}
        made = replace(_planned(workload.with_settings(settings), accounting, budget), settings=settings)
        if chosen is None or made.peak_bytes < chosen.peak_bytes:
            options.append(Option(name, settings, made.peak_bytes, made.flops))
            chosen = replace(made, options=tuple(options))
        return made.peak_bytes

    found = _candidates(workload, accounting)
    for candidate in found:
        if considered(*candidate) <= budget:
            break
    assert chosen is not None
    if chosen.fits():
        return chosen
    # Two changes that save nothing each, since the other part of the step needs as much, may save together.
    peak_bytes = considered("all that may save", leanest(found))
    return chosen if chosen.fits() else replace(chosen, remedies=_remedies(workload, accounting, chosen, peak_bytes))


def _candidates(workload: Workload, accounting: Accounting) -> list[Candidate]:
    assert isinstance(workload.subject, Mapping)
    mixed_precision, offload = workload.autocast is not None, accounting.device.type == "cuda"
    pieces = _pieces(workload.with_settings({"reversible": workload.subject.get("reversible", True)}), accounting)
    return candidates(workload.subject, *workload.token_shape, mixed_precision, offload, pieces)


def _remedies(workload: Workload, accounting: Accounting, made: Plan, peak_bytes: int) -> dict[str, int]:
    """Return the largest batch, length or, where neither helps, depth that fits, and the budget that is needed.

    To within 1 part in 32, with the leanest settings. ``made`` does not fit; ``peak_bytes``: of the leanest settings.
    """
    assert made.budget is not None
    budget = made.budget

    def most(name: str, now: int) -> dict[str, int]:
        def need(size: int) -> int:
            changes: dict[str, Any] = {name: size}
            sized = workload.with_settings(changes) if name == "depth" else replace(workload, **changes)
            if isinstance(sized.subject, Mapping):
                sized = sized.with_settings(leanest(_candidates(sized, accounting)))
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


def _peak(workload: Workload, accounting: Accounting) -> int:
    return workload.run_dry(accounting).peak_bytes
