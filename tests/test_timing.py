"""Seconds and bytes of calls."""

import json
import subprocess
import sys

import pytest

from ntkbench.measure import timing


def test_freed_memory_counts_for_the_call_that_takes_it_again():
    size, count = 2**20, 64

    def take():
        return [b"x" * size + bytes([i]) for i in range(count)]

    large = b"x" * 2**24
    del large  # from now on the C library keeps what is smaller
    freed, still_held = take(), b"x" * size * 2
    del freed  # its memory lies below what is still held
    peak = timing.peak_bytes(take)
    assert len(still_held) == 2 * size
    assert peak is None or 0.9 < peak / (size * count) < 2


@pytest.mark.slow
def test_the_number_of_threads_holds_for_all_libraries_and_later_imports():
    code = """
import json, numpy, threadpoolctl, torch
from ntkbench.measure import timing
timing.use_threads(1, pinned=False)
import scipy.linalg, sklearn.linear_model
pools = threadpoolctl.threadpool_info()
print(json.dumps({"torch": torch.get_num_threads(), **{pool["filepath"]: pool["num_threads"] for pool in pools}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert len(found) > 2 and set(found.values()) == {1}, found


@pytest.mark.parametrize("calls", [1, 2, 7])
def test_the_number_of_calls_is_the_one_asked_for(calls):
    made = []
    found = timing.timed(lambda: made.append(len(made)) or len(made), calls)
    assert len(made) == calls + 1
    assert found.first == 1 and len(found.seconds) == calls
    columns = found.columns()
    assert columns["calls"] == calls and columns["first_call_seconds"] == found.first_seconds
    assert columns["seconds_q25"] <= columns["seconds"] <= columns["seconds_q75"]


def test_calls_take_turns():
    order = []
    times = timing.in_turn([lambda: order.append("a"), lambda: order.append("b")], 3)
    assert order == ["a", "b"] * 3
    assert [len(own) for own in times] == [3, 3]


def test_quartiles():
    assert timing.quartiles("x", [4, 1, 3, 2, 5]) == {"x": 3.0, "x_q25": 2.0, "x_q75": 4.0}
