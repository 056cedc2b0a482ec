"""Readable seconds and bytes."""

from __future__ import annotations

import pytest

from ntkbench.units import bytes_label, counted, over_memory, seconds_label


@pytest.mark.parametrize(
    ("seconds", "said"),
    [
        (4e-7, "0.4 us"),
        (4e-5, "40 us"),
        (4e-4, "400 us"),
        (0.0123, "12 ms"),
        (0.9999, "1 s"),
        (3.14, "3.1 s"),
        (45, "45 s"),
        (100, "1.7 min"),
        (3599, "1 h"),
        (11160, "3.1 h"),
        (1e6, "280 h"),
    ],
)
def test_seconds_have_two_digits_and_no_powers_of_ten(seconds, said):
    assert seconds_label(seconds) == said


def test_a_count_of_one_is_in_the_singular():
    assert [counted(count, "pass", "passes") for count in (0, 1, 1.0, 2, 0.5)] == [
        *("0 passes", "1 pass", "1 pass", "2 passes", "0.5 passes")
    ]
    assert counted(1234567, "row") == "1234567 rows" and counted(1, "row") == "1 row"


def test_bytes_are_in_binary_units():
    assert [bytes_label(b) for b in (512, 3 * 2**20, 2.8 * 2**30, 1e12)] == ["0.5 KiB", "3 MiB", "2.8 GiB", "930 GiB"]


def test_too_much_memory_is_told_from_the_limit():
    assert over_memory(2**31, 2**30) == "2 GiB at once, and memory= is 1 GiB"
    assert over_memory(4608, 1000, "for the norm") == "4,608 bytes at once for the norm, and memory= is 1,000 bytes"
    assert over_memory(2**30 + 5, 2**30) == "1,073,741,829 bytes at once, and memory= is 1,073,741,824 bytes"
