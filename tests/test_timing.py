"""Seconds and bytes of calls."""

import json
import subprocess
import sys

import pytest

from ntkbench import operators
from ntkbench.measure import timing
from ntkbench.options import Target


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
from ntkbench import operators
from ntkbench.measure import timing
from ntkbench.options import Target
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


class Allocator:
    """The memory of a GPU: 10 bytes are held, a first call takes 90 more, and later ones 50."""

    def __init__(self, monkeypatch, *, resets):
        self.peak, self._resets, self._calls = 10, resets, 0
        monkeypatch.setattr(operators, "device_memory", lambda target: self.peak)
        monkeypatch.setattr(operators, "reset_device_memory", lambda target: self._reset())

    def _reset(self):
        if self._resets:
            self.peak = 10

    def call(self):
        self._calls += 1
        self.peak = max(self.peak, 100 if self._calls == 1 else 60)


@pytest.mark.parametrize(("resets", "peak"), [(True, 60), (False, None)])
def test_the_peak_of_a_later_call_is_not_that_of_the_first_one(monkeypatch, resets, peak):
    """It is not known if the peak cannot be reset, as in JAX."""
    gpu = Allocator(monkeypatch, resets=resets)
    gpu.call()
    assert timing.device_peak_bytes(gpu.call, Target()) == peak
    assert timing.peak_bytes_on(Target(), gpu.call) == peak


def test_the_peak_of_a_first_call_is_known_even_if_it_cannot_be_reset(monkeypatch):
    assert timing.peak_bytes_on(Target(), Allocator(monkeypatch, resets=False).call) == 100
