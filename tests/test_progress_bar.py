"""Bars of the passes of long computations."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import ntkbench
from ntkbench import progress_bar


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.fixture
def terminal(monkeypatch):
    """A terminal on which bars appear at once, and are drawn at every pass."""
    made = Terminal()
    monkeypatch.setattr(sys, "stderr", made)
    monkeypatch.setattr(progress_bar, "DELAY", 0)
    monkeypatch.setenv("TQDM_MININTERVAL", "0")
    return made


torch.manual_seed(0)
NET, X = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4)


def shown(terminal: Terminal) -> list[str]:
    return [line.strip() for line in terminal.getvalue().split("\r") if line.strip()]


def test_an_exact_value_says_how_far_it_is(terminal):
    ntkbench.norm(NET, X, method="structured_derivatives")
    lines = shown(terminal)
    assert lines[0].startswith("norm by structured_derivatives: 0/3 passes")
    assert any("3/3 passes" in line for line in lines)


def test_an_estimate_says_how_much_of_its_budget_is_spent(terminal):
    ntkbench.trace(NET, X, method="hutchinson", passes=8)
    assert any("8/8 passes" in line for line in shown(terminal))


def test_a_tolerance_says_how_close_it_is(terminal):
    ntkbench.trace(NET, X, method="one_sided_reverse", rtol=0.02)
    lines = shown(terminal)
    assert "/" not in lines[-1].partition("passes")[0] and any("of 2 %" in line for line in lines)


def test_kernels_and_what_is_made_of_them_have_one_bar(terminal):
    kernel = ntkbench.Kernel(NET, X, memory=2**12)
    kernel.spectrum(2, passes=200)
    assert all(line.startswith("spectrum:") for line in shown(terminal))


def test_nothing_is_shown_elsewhere(monkeypatch):
    monkeypatch.setattr(progress_bar, "DELAY", 0)
    monkeypatch.setattr(sys, "stderr", made := io.StringIO())
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)  # an import would fail
    ntkbench.trace(NET, X, method="hutchinson", passes=8)
    assert made.getvalue() == ""


def test_short_computations_have_no_bar(monkeypatch):
    monkeypatch.setattr(sys, "stderr", made := Terminal())
    ntkbench.trace(NET, X)
    assert made.getvalue().strip() == ""


def test_a_computation_that_fails_takes_its_bar_away(terminal):
    with pytest.raises(ZeroDivisionError), progress_bar.of_passes("nothing", 1, 2):
        raise ZeroDivisionError
    with progress_bar.of_passes("something", 1, 2):
        progress_bar.advance(2)
    assert any(line.startswith("something: 2/2") for line in shown(terminal))
