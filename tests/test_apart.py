"""A function in a process of its own: what it finds is passed on, wherever the system can fork or not."""

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
    """How processes are started: on Linux, and on a system that cannot fork."""
    if request.param == "spawn":
        monkeypatch.delitem(multiprocessing.context._concrete_contexts, "fork")
    return request.param


def test_processes_are_forked_where_that_is_possible(method):
    assert ambient.processes().get_start_method() == method


def test_a_function_has_a_process_of_its_own(method, tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "PLACE", "here")  # a fork finds it, a new process does not
    row = apart.run(found, (3,), Limits(), 1, tmp_path / "part")
    assert row == {"status": "ok", "reason": "", "square": 9, "place": "here" if method == "fork" else "fresh"}
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_is_killed_is_tried_once_more(method, tmp_path, monkeypatch):
    tried = []
    once = apart._once
    monkeypatch.setattr(apart, "_once", lambda *given: tried.append(1) or once(*given))
    row = apart.run(killed, (), Limits(), 1, tmp_path / "part")
    assert row["status"] == "failed" and "SIGKILL" in row["reason"] and len(tried) == 2
