"""Accumulators and their U-statistics on small arrays: every branch that depends on a size."""

from __future__ import annotations

import itertools
import math
import tracemalloc
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from test_deflation import Dense

from ntkbench.errors import OverMemory
from ntkbench.estimators import accumulators, standard_errors
from ntkbench.estimators.accumulators import PairBytes, UStatistics
from ntkbench.operators import arrays

STRATA, DIM = 5, 3
MOMENTS = ("trace", "square", "square_f", "cross")


@given(size=st.integers(0, 40), count=st.integers(1, 9))
def test_chunks_are_adjacent_and_even(size, count):
    parts = arrays.chunks(size, count)
    assert [i for part in parts for i in range(size)[part]] == list(range(size))
    assert len(parts) == count
    lengths = {part.stop - part.start for part in parts}
    assert max(lengths) - min(lengths) <= 1


@given(sizes=st.lists(st.integers(0, 5), max_size=6))
def test_slices_have_their_sizes(sizes):
    parts = arrays.slices(sizes)
    assert [part.stop - part.start for part in parts] == sizes
    assert [i for part in parts for i in range(sum(sizes))[part]] == list(range(sum(sizes)))


@given(rows=st.integers(1, 12), chunks=st.integers(1, 6), min_rows=st.integers(1, 4))
def test_a_gram_matrix_by_its_lower_triangle_is_the_gram_matrix(rows, chunks, min_rows):
    a = np.random.default_rng(rows).standard_normal((rows, 3))
    gram = accumulators.symmetric_gram(a, chunks=chunks, min_rows=min_rows)
    np.testing.assert_allclose(gram, a @ a.T, rtol=1e-12, atol=1e-12)


class Fixture:
    """Normal vectors of two networks for a number of probes, drawn in advance."""

    def __init__(
        self, memory: int = 2**30, probes: int = 40, dim: int = DIM, strata: int = STRATA, uneven: bool = False
    ) -> None:
        rng = np.random.default_rng(0)
        self.strata, self.dim = strata, dim
        self.vectors = rng.standard_normal((2, probes, strata, dim))
        if uneven:
            self.vectors[:, :, 1] *= 100
        self.asked = 0
        self.computed = 0
        self.jacobians = [Dense(np.ones((strata, dim))) for _ in range(2)]
        for j in self.jacobians:
            j.memory = memory

    def sign(self, k: int) -> np.ndarray:
        self.asked += k
        return np.arange(self.asked - k, self.asked)

    def of(self, u: np.ndarray, strata: slice) -> list[np.ndarray]:
        self.computed += len(u) * len(range(self.strata)[strata])
        return [each[:, strata][u] for each in self.vectors]

    def accumulator(self, moments: tuple[str, ...] = MOMENTS, operators: int = 2, **sizes: Any) -> UStatistics:
        self.vectors, jacobians = self.vectors[:operators], self.jacobians[:operators]
        return UStatistics(moments, self.strata, self.dim, jacobians, self.sign, self.of, **sizes)

    def by_hand(self, probes: slice) -> np.ndarray:
        """The four moments over pairs of some probes, by their definition."""
        w, f = (each[probes] for each in self.vectors)
        sums = np.zeros(4)
        sums[0] = (w**2).sum() / len(w)
        for b, c in itertools.product(range(STRATA), repeat=2):
            m, m_f = w[:, b] @ w[:, c].T, f[:, b] @ f[:, c].T
            kept = np.ones_like(m, dtype=bool) if b != c else ~np.eye(len(m), dtype=bool)
            sums[1:] += [(x * y)[kept].mean() for x, y in ((m, m), (m_f, m_f), (m, m_f))]
        return sums


@pytest.mark.parametrize("batches", [(8,), (1, 2, 5), (4, 4), (6, 1, 1)])
def test_moments_match_their_definition_for_any_batches(batches):
    fixture = Fixture()
    accumulator = fixture.accumulator()
    for k in batches:
        accumulator.extend(k)
    assert accumulator.moments().means == pytest.approx(fixture.by_hand(slice(0, 8)), rel=1e-12)


@pytest.mark.parametrize(("moments", "rows"), [(("trace",), [0]), (("square",), [1]), (MOMENTS[1:], [1, 2, 3])])
def test_any_subset_of_moments_keeps_its_order(moments, rows):
    fixture = Fixture()
    accumulator = fixture.accumulator(moments)
    accumulator.extend(6)
    assert accumulator.moments().means == pytest.approx(fixture.by_hand(slice(0, 6))[rows], rel=1e-12)


@pytest.mark.parametrize(
    ("min_group", "batches", "groups"),
    [
        (3, (4,), [4]),
        (3, (8,), [4, 4]),
        (3, (9,), [3, 3, 3]),
        (3, (11,), [4, 4, 3]),
        (4, (11,), [4, 4]),  # 11 do not make three groups of 4
        (3, (3, 6), [4, 4]),  # 1 fills the first group, and 5 do not make two of 3
        (3, (4, 2), [4]),  # too few for a group of their own
        (3, (4, 3), [4, 3]),
    ],
)
def test_probes_beyond_the_size_of_a_group_form_further_groups(min_group, batches, groups):
    """With at most 4 probes in a group; groups are weighted by their number of probes."""
    fixture = Fixture()
    accumulator = fixture.accumulator(min_group=min_group, max_vectors=4 * STRATA)
    assert accumulator.max_group == 4
    for k in batches:
        accumulator.extend(k)
    assert fixture.asked == sum(groups)
    expected = sum((part.stop - part.start) * fixture.by_hand(part) for part in arrays.slices(groups)) / sum(groups)
    assert accumulator.moments().means == pytest.approx(expected, rel=1e-12)


def test_moments_do_not_depend_on_the_chunk_size():
    """The sums over a group run by chunks of strata whose number depends on ``max_vectors``."""
    found = []
    for max_vectors in (4 * STRATA, 2048):
        accumulator = Fixture().accumulator(max_vectors=max_vectors)
        accumulator.extend(4)
        found.append(accumulator.moments())
    for part in ("means", "single", "double", "bound", "degrees"):
        assert getattr(found[0], part) == pytest.approx(getattr(found[1], part), rel=1e-12)


@pytest.mark.parametrize("strata", [1, 2])
@pytest.mark.parametrize("dim", [3, 2000])
def test_what_does_not_fit_is_processed_in_chunks(dim, strata):
    """Moments, their covariance and notes are those of tables that are kept; long vectors are recomputed."""
    kept = Fixture(dim=dim, uneven=True)
    reference = kept.accumulator()
    reference.extend(5)
    sizes = PairBytes(STRATA, 2, 3, 8, dim)
    held = sizes.vectors(5, STRATA)
    memory = sizes.recomputed(5, strata) if dim > 3 else held + sizes.tables(5, 5 * strata)
    fixture = Fixture(memory, dim=dim, uneven=True)
    accumulator = fixture.accumulator()
    factor = accumulator.recompute_factor
    assert (factor > 1) == (dim > 3)
    assert accumulator.least == np.ceil(4 * factor)
    accumulator.extend(int(np.ceil(5 * factor)))
    assert fixture.asked == 5
    assert fixture.computed == pytest.approx(5 * STRATA * factor)
    for part in ("means", "single", "double", "bound", "degrees"):
        assert getattr(accumulator.moments(), part) == pytest.approx(getattr(reference.moments(), part), rel=1e-9)
    assert accumulator.notes == reference.notes != ()


@pytest.mark.parametrize("batches", [(2,), (4,), (4, 3), (6, 11), (23,)])
@pytest.mark.parametrize("moments", [("trace", "square"), MOMENTS])
@pytest.mark.parametrize(("strata", "dim"), [(1, 20_000), (30, 3), (30, 500)])
@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 1.0, 4.0])
def test_memory_stays_within_the_budget(strata, dim, moments, batches, share):
    """Down to the stated minimum; NumPy's allocations are counted."""
    one_by_one = share == 0.0 or (share, dim) == (0.02, 500)
    if one_by_one and strata == 30 and batches != (4,):
        strata = 8  # as every two strata are a step of their own: 36 steps for a group of probes, not 465
    operators = 1 if moments == MOMENTS[:2] else 2
    sizes = PairBytes(strata, operators, len(moments) - 1, 8, dim)
    memory = max(sizes.least(), int(share * sizes.whole(8)))
    fixture = Fixture(memory, dim=dim, strata=strata)
    accumulator = fixture.accumulator(moments, operators=operators)
    factor = accumulator.recompute_factor
    few = Fixture().accumulator()  # so that imports are not counted
    few.extend(4)
    few.moments()
    tracemalloc.start()
    try:
        for k in batches:
            if k < 4 and factor > 1:
                continue
            accumulator.extend(math.ceil(k * factor))
            accumulator.moments()
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak <= memory + 100_000


def test_the_trace_alone_keeps_no_vectors():
    fixture = Fixture(memory=1)
    accumulator = fixture.accumulator(("trace",))
    accumulator.extend(3)
    accumulator.extend(4)
    assert fixture.asked == 7
    assert accumulator.moments().means == pytest.approx(fixture.by_hand(slice(0, 7))[:1], rel=1e-12)
    assert not accumulator._held


def test_too_few_passes_to_recompute_are_refused():
    accumulator = Fixture(memory=1).accumulator()
    with pytest.raises(OverMemory, match=r"with memory=1 each vector is computed .* too few passes"):
        accumulator.extend(4)


def test_the_kernel_of_crossed_networks_takes_inner_products_between_them():
    rng = np.random.default_rng(0)
    w, f, v, g = rng.standard_normal((4, 3, 5))
    square, square_f, cross = accumulators.crossed_network_kernel([w, f], [v, g])
    np.testing.assert_allclose(square, (w @ v.T) ** 2)
    np.testing.assert_allclose(square_f, (f @ g.T) ** 2)
    np.testing.assert_allclose(cross, ((w @ g.T) ** 2 + (f @ v.T) ** 2) / 2)


def test_the_delta_method_scales_with_the_slope():
    """sqrt has the slope 1 / (2 sqrt), and a trace has slope 1."""
    estimates = standard_errors.MomentEstimates(
        np.array([3.0, 16.0]), np.diag([0.04, 0.5]), np.diag([0.0, 0.14]), np.zeros((2, 2)), 7
    )
    names = ("trace", "square")
    assert accumulators.delta_method("trace", names, estimates) == pytest.approx((3.0, 0.2, 7))
    assert accumulators.delta_method("norm", names, estimates) == pytest.approx((4.0, 0.8 / 8, 7))
    value, error, _ = accumulators.delta_method("effective_rank", names, estimates)
    assert value == pytest.approx(9 / 16 * (1 - 0.04 / 9 - 0.64 / 256), rel=1e-6)  # without its second-order bias
    assert error == pytest.approx(np.hypot(0.2 * 6 / 16, 0.8 * 9 / 256))
