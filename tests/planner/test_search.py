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


@pytest.mark.parametrize("now", [16, 8192, 2**20])
@pytest.mark.parametrize("name", ["line", "stairs"])
def test_what_is_known_to_be_too_much_is_not_asked_again(name, now):
    asked = []

    def need(n):
        asked.append(n)
        return NEEDS[name](n)

    budget = (NEEDS[name](1) + NEEDS[name](now)) // 2 - 1
    found = largest(need, budget, limit=now - 1, beyond=NEEDS[name](now), fraction=32, granule=4)
    assert NEEDS[name](found) <= budget
    # Stairs have several sizes that need the same.
    assert NEEDS[name](found + found // 32 + 1) > budget
    assert max(asked) < now
    assert len(asked) <= 5


def test_where_one_is_too_much_nothing_else_is_asked():
    asked = []
    assert largest(lambda n: asked.append(n) or 10**9, 10**6, limit=1000, beyond=10**10) == 0
    assert asked == [1]
