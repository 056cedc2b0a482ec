"""Sizes of groups of probes for layerwise methods, with a stub engine that only has costs."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ntkbench import metrics
from ntkbench.methods.base.layerwise import TracedNetwork
from ntkbench.methods.base.structured import GroupedUStatistics, pair_bytes


def grouped(
    N: int,
    outputs: int = 1,
    cost: Callable[[int], float] = lambda k: k,
    memory: int = 2**30,
    max_gradients: int = 2048,
) -> GroupedUStatistics:
    """An accumulator of the norm; k probes of all samples take ``cost(k)`` passes."""
    engine = SimpleNamespace(O=outputs, memory=memory, passes=lambda sets, x, v: cost(v.shape[1]))
    end = TracedNetwork(engine, [torch.zeros(1)], torch.zeros(N, 1))
    return GroupedUStatistics([end], ("norm",), 0, max_gradients, 8, metrics.NOTHING)


@given(
    N=st.integers(1, 40),
    probes=st.integers(2, 100),
    slope=st.sampled_from([0.0, 0.1, 0.5]),
    memory=st.integers(1, 200_000),
)
def test_groups_have_pairs_and_stay_within_the_passes_and_the_memory(N, probes, slope, memory):
    """Passes per probe grow with the number of probes, as when columns are recomputed for each block of rows."""
    accumulator = grouped(N, cost=lambda k: k * (1 + slope * (k - 1)), memory=memory)
    sizes = accumulator._sizes(probes)
    assert all(size >= 2 for size in sizes)
    assert sum(accumulator._cost(size) for size in sizes) <= probes + 1e-9
    assert sizes or accumulator._cost(2) > probes
    needed = pair_bytes(N, 1, ("square",), 4).whole
    assert all(needed(size) <= memory or size == 2 for size in sizes)
    if slope == 0:
        assert probes - sum(sizes) <= 1


def by_trial(accumulator: GroupedUStatistics, N: int, exact: int, passes: float) -> list[int]:
    """Sizes of groups beside exact samples, with more and more groups until none is too large."""
    rows, cost, others = accumulator._rows, accumulator._cost, N - exact
    most = max(4, (accumulator._max_gradients - exact * accumulator._O) // others)
    affordable = range(2, int(passes * N / others) + 1)
    for count in itertools.count(1):
        k = max((k for k in affordable if count * rows(k, exact) <= passes * N), default=0)
        if k <= most:
            break
    while k >= 2:
        if cost(k, exact) <= passes:
            return [k] * int(passes / cost(k, exact) + 1e-9)
        k = k // 2 if k > 4 else k - 1
    return []


@given(
    N=st.integers(2, 20),
    exact=st.integers(1, 19),
    outputs=st.integers(1, 12),
    passes=st.integers(2, 300),
    max_gradients=st.integers(16, 200),
)
def test_groups_beside_exact_samples_are_the_fewest_that_are_not_too_large(N, exact, outputs, passes, max_gradients):
    exact = min(exact, N - 1)
    accumulator = grouped(N, outputs, max_gradients=max_gradients)
    assert accumulator._sizes_beside(exact, passes) == by_trial(accumulator, N, exact, passes)


@pytest.mark.parametrize("outputs", [1, 10, 1000])
def test_a_large_budget_beside_exact_samples_is_divided_quickly(outputs, monkeypatch):
    accumulator, calls = grouped(512, outputs), []
    rows = accumulator._rows
    monkeypatch.setattr(accumulator, "_rows", lambda *args: calls.append(args) or rows(*args))
    sizes = accumulator._sizes_beside(1, 100_000)
    assert set(sizes) == {4}
    assert len(calls) < 5000


def test_tables_beside_exact_samples_fit_in_memory():
    for memory in (100_000, 300_000, 1_000_000):
        accumulator = grouped(20, 5, memory=memory)
        sizes = accumulator._sizes_beside(2, 100)
        assert sizes
        assert all(accumulator._fits(k, 2) for k in sizes)
    assert grouped(20, 5, memory=1000)._sizes_beside(2, 100) == []


def test_no_pilot_probe_is_spent_if_none_would_be_left():
    accumulator = grouped(5, cost=lambda k: {1: 7.0, 2: 7.5}.get(k, 8.0))
    assert accumulator._plan(8) == ([8], 8.0)
