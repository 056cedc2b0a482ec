"""Functions in a separate process: results are passed back, whether or not the system can fork."""

from __future__ import annotations

import multiprocessing.context
import os
import signal
import sys

import pytest

from ntkbench import ambient
from ntkbench.measure import apart
from ntkbench.measure.limits import Limits

PLACE = "fresh"


def found(number: int) -> dict[str, object]:
    return {"square": number**2, "place": PLACE}


def killed() -> dict[str, object]:
    os.kill(os.getpid(), signal.SIGKILL)
    return {}


@pytest.fixture(params=["fork", "spawn"])
def method(request, monkeypatch):
    """The start method of processes: on Linux, and on a system that cannot fork."""
    if request.param == "spawn":
        monkeypatch.delitem(multiprocessing.context._concrete_contexts, "fork")
    return request.param


def test_processes_are_forked_where_that_is_possible(method):
    assert ambient.processes().get_start_method() == method


def test_a_function_runs_in_its_own_process(method, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PLACE", "here")  # a fork inherits it, a new process does not
    row = apart.run(found, (3,), Limits(), 1, tmp_path / "part")
    assert row == {"status": "ok", "reason": "", "square": 9, "place": "here" if method == "fork" else "fresh"}
    assert list(tmp_path.iterdir()) == []


def test_a_killed_process_is_retried_once(tmp_path, monkeypatch):
    tried = []
    once = apart._once
    monkeypatch.setattr(apart, "_once", lambda *given: tried.append(1) or once(*given))
    row = apart.run(killed, (), Limits(), 1, tmp_path / "part")
    assert row["status"] == "failed" and "SIGKILL" in row["reason"] and len(tried) == 2
