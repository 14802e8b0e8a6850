"""The largest size that fits is found on the right side, closely and in few evaluations."""

import pytest

from memory_efficient_attention_pytorch.planner.search import FRACTION, largest

NEEDS = {
    "line": lambda n: 10**8 + 5000 * n,
    "stairs": lambda n: 10**8 + 5000 * -(-n // 512) * 512,
    "bend": lambda n: max(10**9, 4000 * n + 10**6),
    "square": lambda n: 10**6 + n * n,
}


@pytest.mark.parametrize("budget", [10**9 + 10**6, 8 * 10**9])
@pytest.mark.parametrize("name", NEEDS)
def test_found_closely_and_soon(name, budget):
    asked = []

    def need(n):
        asked.append(n)
        return NEEDS[name](n)

    found = largest(need, budget)
    assert NEEDS[name](found) <= budget
    assert NEEDS[name](found + found // FRACTION + 1) > budget
    assert len(asked) <= {"line": 6, "stairs": 10}.get(name, 25)


def test_a_limit_is_reached_and_not_passed():
    assert largest(NEEDS["line"], 10**9, limit=4096) == 4096
    assert largest(NEEDS["line"], 10**9, limit=7) == 7


def test_nothing_fits():
    assert largest(NEEDS["line"], 10**7) == 0
