"""Progress bars of the passes of long computations."""

from __future__ import annotations

import io
import sys

import pytest
import torch
from torch import nn

import ntkbench
from ntkbench import progress_bar


@pytest.fixture
def shown(monkeypatch, capsys):
    """The lines shown so far by a terminal on which bars appear at once and are drawn at every pass."""
    monkeypatch.setattr(progress_bar, "_is_seen", lambda: True)
    monkeypatch.setattr(progress_bar, "DELAY", 0)
    monkeypatch.setattr(progress_bar, "INTERVAL", 0)
    return lambda: [line.strip() for line in capsys.readouterr().err.split("\r") if line.strip()]


torch.manual_seed(0)
NET, X = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 3)), torch.randn(5, 4)


def test_an_exact_value_shows_its_progress(shown):
    ntkbench.norm(NET, X, method="structured_derivatives")
    lines = shown()
    assert lines[0].startswith("norm by structured_derivatives: 0/3 passes")
    assert any("3/3 passes" in line for line in lines)


def test_an_estimate_shows_how_much_of_its_budget_is_spent(shown):
    ntkbench.trace(NET, X, method="hutchinson", passes=8)
    assert any("8/8 passes" in line for line in shown())


def test_an_estimate_to_a_tolerance_shows_its_target(shown):
    ntkbench.trace(NET, X, method="one_sided_reverse", rtol=0.02)
    lines = shown()
    assert "/" not in lines[-1].partition("passes")[0] and any("target 2 %" in line for line in lines)


def test_a_kernel_and_its_spectrum_have_one_bar(shown):
    kernel = ntkbench.Kernel(NET, X, memory=34 * 15**2)
    kernel.spectrum(2, passes=200)
    assert all(line.startswith("spectrum:") for line in shown())


def test_more_passes_than_expected_are_shown_without_their_total(shown):
    with progress_bar.of_passes("a kernel", 1, 2):
        for _ in range(4):
            progress_bar.advance(1)
    assert any(line.startswith("a kernel: 4 passes") for line in shown())
    whole = ntkbench.ntk(NET, X)
    assert torch.allclose(ntkbench.Kernel(NET, X, memory=2**12).ntk(), whole, rtol=1e-4)
    assert ntkbench.ntk(NET, X, torch.randn(7, 4)).shape == (15, 21)
    for kernel in ("last_layer", "sum_of_logits", "random_vector"):
        assert ntkbench.ntk(NET, X, kernel=kernel).shape == (5, 5)
    for method in ("jacobian_contraction", "batched_jacobian", "naive_jacobian"):
        found = ntkbench.norm(NET, X, method=method, memory=2**12)
        assert found.value == pytest.approx(float(whole.norm()), rel=1e-4)


class NoTerminal:
    def write(self, text: str) -> None: ...

    def flush(self) -> None: ...


@pytest.mark.parametrize("stderr", [NoTerminal(), None, "closed"], ids=["no terminal", "none", "closed"])
def test_stderr_may_be_anything(stderr, monkeypatch):
    if stderr == "closed":
        stderr = io.StringIO()
        stderr.close()
    monkeypatch.setattr(sys, "stderr", stderr)
    assert ntkbench.trace(NET, X).value > 0


def test_a_failing_bar_does_not_lose_the_result(shown, monkeypatch):
    monkeypatch.setattr("tqdm.auto.tqdm.update", lambda *_: 1 / 0)
    assert ntkbench.trace(NET, X, method="hutchinson", passes=8).value > 0


def test_nothing_is_shown_without_a_terminal(monkeypatch):
    monkeypatch.setattr(progress_bar, "DELAY", 0)
    monkeypatch.setattr(sys, "stderr", made := io.StringIO())
    ntkbench.trace(NET, X, method="hutchinson", passes=8)
    assert made.getvalue() == ""


def test_short_computations_have_no_bar(shown, monkeypatch):
    monkeypatch.setattr(progress_bar, "DELAY", 60)
    ntkbench.trace(NET, X)
    assert shown() == []


def test_a_failed_computation_removes_its_bar(shown):
    with pytest.raises(ZeroDivisionError), progress_bar.of_passes("nothing", 1, 2):
        raise ZeroDivisionError
    with progress_bar.of_passes("something", 1, 2):
        progress_bar.advance(2)
    assert any(line.startswith("something: 2/2") for line in shown())
