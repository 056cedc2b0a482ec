"""Rows of a kernel in consecutive ranges: whole samples, or some directions of one sample.

Rows are sample-major: row ``b * K + k`` is direction k of sample b.
"""

from __future__ import annotations

from ntkbench.operators.arrays import chunks


def row_ranges(N: int, K: int, most: int) -> list[slice]:
    """The rows of N samples in K directions in the fewest almost equal ranges of at most ``most`` rows."""
    return within(slice(0, N * K), K, most)


def within(rows: slice, K: int, most: int) -> list[slice]:
    """A range split into the fewest almost equal ranges of at most ``most`` rows."""
    size = rows.stop - rows.start
    if size <= max(1, most):
        return [rows]
    if most >= K:
        samples = size // K
        parts = [slice(s.start * K, s.stop * K) for s in chunks(samples, -(-samples // (most // K)))]
    else:
        whole = range(0, size, K)  # starts of samples; a single one may have only some of its directions
        length = min(K, size)
        some = chunks(length, -(-length // max(1, most)))
        parts = [slice(first + s.start, first + s.stop) for first in whole for s in some]
    return [slice(rows.start + part.start, rows.start + part.stop) for part in parts]


def rectangle(rows: slice, K: int) -> tuple[slice, slice]:
    """The samples of a range, and their directions."""
    samples = slice(rows.start // K, -(-rows.stop // K))
    if samples.stop - samples.start > 1:
        return samples, slice(0, K)
    return samples, slice(rows.start - samples.start * K, rows.stop - samples.start * K)
