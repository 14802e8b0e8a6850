"""Find the largest size that fits, in few evaluations."""

from __future__ import annotations

from collections.abc import Callable

FRACTION, GRANULE = 256, 64
_START = 1024  # the first size to be tried


def largest(
    need: Callable[[int], int],
    budget: int,
    limit: int | None = None,
    beyond: int | None = None,
    fraction: int = FRACTION,
    granule: int = GRANULE,
) -> int:
    """Return the largest ``n`` up to ``limit`` with ``need(n) <= budget``, or 0; ``need`` grows with n.

    The result fits and is accurate to 1 part in ``fraction``; it is a multiple of ``granule`` where one is within that.
    Memory is close to linear in n, so the secant through two known points usually finds the place in a few evaluations;
    where it does not, the interval is halved. ``beyond``: what ``limit + 1`` needs, where that is known to be too much;
    the search then starts at 1.
    """
    low, high = 0, None if limit is None else limit + 1
    n = _START if limit is None else min(_START, limit)
    known: dict[int, int] = {}
    if beyond is not None:
        assert high is not None
        known[high], n = beyond, 1
    halve = beyond is not None  # evaluating 1 is no secant step that missed: do not bisect after it
    while True:
        known[n] = need(n)
        before = (high or 0) - low
        if known[n] <= budget:
            low = n
        else:
            high = n
        width = max(1, low // fraction)
        if high is None:
            n = max(4 * n, _meeting(known, budget, 4 * n)) if len(known) < 2 else max(2 * n, _meeting(known, budget, n))
            continue
        if high - low <= width:
            return low
        halve = not halve and before > 0 and 2 * (high - low) > before
        n = (low + high) // 2 if halve else _meeting(known, budget, (low + high) // 2)
        # Next to a known end, step by the required accuracy: that closes the interval if the end is the answer.
        n = max(low + width, min(n, high - (width if high in known else 1)))
        if n < high - 1 and n > fraction * granule and n - n % granule > low:
            n -= n % granule


def _meeting(known: dict[int, int], budget: int, otherwise: int) -> int:
    """Return where the line through the two points closest to the budget, if possible on either side, meets it."""
    below = max((n for n, bytes_ in known.items() if bytes_ <= budget), default=None)
    above = min((n for n, bytes_ in known.items() if bytes_ > budget), default=None)
    ends = [n for n in (below, above) if n is not None]
    if len(ends) < 2:
        ends = sorted(known, key=lambda n: abs(known[n] - budget))[:2]
    if len(ends) < 2 or known[ends[0]] == known[ends[1]]:
        return otherwise
    a, b = ends
    return round(a + (budget - known[a]) * (b - a) / (known[b] - known[a]))
