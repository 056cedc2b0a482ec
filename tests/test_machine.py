"""Speeds of a machine: measured with the test's clock, kept, and measured again where a file cannot be used."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
import torch

from ntkbench.cost import machine
from ntkbench.options import Target

TARGET = Target(device="cpu")


class Clock:
    """A clock that advances by the same time at each reading, and counts the readings."""

    def __init__(self, step: float) -> None:
        self.step, self.reads = step, 0

    def __call__(self) -> float:
        self.reads += 1
        return self.step * self.reads


@pytest.fixture(autouse=True)
def empty(tmp_path, monkeypatch):
    """An empty cache, and small sizes."""
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path))
    monkeypatch.delenv(machine.SWITCH, raising=False)
    monkeypatch.setattr(machine, "_known", {})
    monkeypatch.setattr(machine, "SIDE", {"cpu": 8})
    monkeypatch.setattr(machine, "ENTRIES", {"cpu": 16})
    return tmp_path / "machine"


def forget():
    machine._known.clear()


def test_speeds_are_those_on_the_clock(empty):
    clock = Clock(0.07)
    found = machine.speeds(TARGET, clock=clock)
    assert found.operations == pytest.approx(2 * 8**3 / 0.07)
    assert found.bandwidth == pytest.approx(2 * 16 * 4 / 0.07)
    assert found.call == pytest.approx(0.07 / machine.CALLS)
    assert clock.reads == 3 * 2 * 3, "each speed takes three calls, of SECONDS in total"
    assert found.seconds(0, 128, 0) == pytest.approx(0.07)
    assert found.seconds(2 * 8**3, 64, machine.CALLS) == pytest.approx(0.14)


def test_speeds_are_measured_once_and_kept(empty):
    found = machine.speeds(TARGET, clock=Clock(0.05))
    again = Clock(0.01)
    assert machine.speeds(TARGET, clock=again) == found
    forget()
    assert machine.speeds(TARGET, clock=again) == found and not again.reads
    (file,) = empty.iterdir()
    assert json.loads(file.read_text())["made_for"]["threads"] == torch.get_num_threads()


def test_another_precision_has_its_own_speeds(empty):
    machine.speeds(TARGET, clock=Clock(0.05))
    double = machine.speeds(Target(device="cpu", dtype="float64"), clock=Clock(0.05))
    assert double.bandwidth == pytest.approx(2 * 16 * 8 / 0.05)
    assert len(list(empty.iterdir())) == 2


@pytest.mark.parametrize(
    "change",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"torch": "', '"torch": "0.'),
        lambda text: json.dumps({**json.loads(text), "call": 0.0}),
        lambda text: json.dumps({**json.loads(text), "operations": "fast"}),
        lambda text: json.dumps({**json.loads(text), "bandwidth": float("nan")}),
    ],
    ids=["damaged", "empty", "of another version", "zero", "no number", "not finite"],
)
def test_a_file_that_cannot_be_used_is_measured_again(empty, change):
    first = machine.speeds(TARGET, clock=Clock(0.05))
    (file,) = empty.iterdir()
    file.write_text(change(file.read_text()))
    forget()
    second = machine.speeds(TARGET, clock=Clock(0.1))
    assert second.operations == pytest.approx(first.operations / 2)
    forget()
    assert machine.speeds(TARGET, measured=False) == second, "it was written anew"


def test_measuring_can_be_switched_off(empty, monkeypatch):
    assert machine.speeds(TARGET, measured=False) is None
    monkeypatch.setenv(machine.SWITCH, "off")
    assert machine.speeds(TARGET, clock=Clock(0.05)) is None
    assert not empty.exists()


def test_a_cache_that_cannot_be_written_is_no_failure(empty):
    empty.write_text("a file instead of the folder")
    assert machine.speeds(TARGET, clock=Clock(0.05)).call > 0


@pytest.mark.slow
def test_importing_and_estimating_measure_nothing(empty):
    code = (
        "import torch, ntkbench, ntkbench.cost; from ntkbench.cost import machine\n"
        "ntkbench.trace(torch.nn.Linear(3, 2), torch.ones(4, 3), rtol=0.1)\n"
        "assert not machine._known and not (ntkbench.paths.cache() / 'machine').exists()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
