"""Readable numbers and tables."""

from __future__ import annotations

from collections.abc import Sequence


def seconds_label(seconds: float) -> str:
    """Seconds with two digits, in a unit that is easy to read: 340 ms, 2.5 min."""
    return _label(seconds, ((3600, "h"), (60, "min"), (1, "s"), (1e-3, "ms"), (1e-6, "us")))


def bytes_label(count: float) -> str:
    """Bytes with two digits, in a unit that is easy to read."""
    return _label(count, ((2**30, "GiB"), (2**20, "MiB"), (2**10, "KiB")))


def over_memory(needed: float, memory: int, what: str = "") -> str:
    """Bytes that are needed at once for something, and the ``memory=`` below them; exact if they round to the same."""
    labels = bytes_label(needed), bytes_label(memory)
    if memory < 2**10 or len(set(labels)) == 1:
        labels = f"{needed:,.0f} bytes", f"{memory:,} bytes"
    return f"{labels[0]} at once{what and f' {what}'}, and memory= is {labels[1]}"


def percent_label(share: float) -> str:
    """A share with two digits, in per cent."""
    return f"{float(f'{100 * share:.2g}'):g} %"


def counted(count: float, one: str, several: str = "") -> str:
    """A count with its noun: 1 pass, 2 passes; the plural defaults to the noun with an s."""
    number = count if isinstance(count, int) else f"{count:g}"
    return f"{number} {one if count == 1 else several or f'{one}s'}"


def aligned(rows: Sequence[Sequence[str]]) -> str:
    """Rows of cells as lines of text, with columns of equal width."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = ("  ".join(cell.ljust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
    return "\n".join(map(str.rstrip, lines))


def _label(value: float, units: Sequence[tuple[float, str]]) -> str:
    """A number with two digits, in the largest unit in which it rounds to at least 1, or else in the last one."""
    scaled = [(float(f"{value / size:.2g}"), unit) for size, unit in units]
    number, unit = next((each for each in scaled if each[0] >= 1), scaled[-1])
    return f"{number:g} {unit}"
