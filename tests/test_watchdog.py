"""Processes over a limit are terminated and reported, others are left alone, and nothing is left behind."""

import ctypes
import errno
import os
import select
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from benchmarks.history import cases
from ntkbench.measure import timing, watchdog
from ntkbench.measure.watchdog import Watch, Watched

HOG = "import sys, time; held = bytearray(int(sys.argv[1])); time.sleep(float(sys.argv[2]))"
STEP = """
import subprocess, sys, time
from ntkbench.measure import watchdog
ordinary = "import os, time; print(os.getpid(), flush=True); time.sleep(100)"
detached = "import os; os.setsid();" + ordinary
twin = "import os; os.fork() and os._exit(0);" + ordinary  # forked, and its parent gone
with watchdog.step():
    for code in (ordinary, detached, twin):
        child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
        print(child.stdout.readline().strip(), end=" ", flush=True)
    print(flush=True)
    time.sleep(float(sys.argv[1]))
"""


def hog(memory, seconds):
    return psutil.Popen([sys.executable, "-c", HOG, str(memory), str(seconds)])


def watched(process, seconds, memory):
    limited = Watched(process, time.monotonic(), seconds)
    with Watch(lambda: [limited], memory) as watch:
        code = process.wait(timeout=60)
    return code, watch.verdict


def test_a_process_within_its_limits_ends_by_itself():
    assert watched(hog(1, 0.3), 30, 2**33) == (0, None)


def test_a_process_over_its_time_is_ended_even_if_it_stopped_itself():
    process = hog(1, 50)
    process.send_signal(signal.SIGSTOP)
    code, verdict = watched(process, 0.5, 2**33)
    assert code == -signal.SIGKILL and verdict == ("timeout", "not finished within the limit of 0.5 s")


def test_a_process_over_its_memory_is_ended():
    code, (status, reason) = watched(hog(2**30, 50), 50, 2**28)
    assert code == -signal.SIGKILL and status == "out_of_memory" and "over the limit of 0.25 GiB" in reason


def gone(pid):
    try:
        return psutil.Process(pid).status() == psutil.STATUS_ZOMBIE
    except psutil.NoSuchProcess:
        return True


def all_gone(pids, within=10.0):
    until = time.monotonic() + within
    while time.monotonic() < until:
        if all(map(gone, pids)):
            return True
        time.sleep(0.05)
    return False


def begun(seconds, run="0"):
    """A step with three children: an ordinary one, one in a session of its own, and a forked twin."""
    environment = os.environ | {watchdog.RUN: run}
    process = subprocess.Popen(
        [sys.executable, "-c", STEP, str(seconds)], stdout=subprocess.PIPE, text=True, env=environment
    )
    return process, list(map(int, process.stdout.readline().split()))


def test_a_step_leaves_nothing_behind():
    process, pids = begun(0.1)
    assert len(pids) == 3 and process.wait(timeout=60) == 0
    assert all_gone(pids)


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_step_that_is_killed_leaves_nothing_behind(how):
    process, pids = begun(100)
    process.send_signal(how)
    process.wait(timeout=60)
    assert all_gone(pids)


def test_a_step_ends_with_its_run():
    run = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(100)"])
    process, pids = begun(100, str(run.pid))
    assert not any(map(gone, pids))
    run.kill()
    run.wait()
    assert process.wait(timeout=60) == -signal.SIGKILL
    assert all_gone(pids)


def test_processes_of_another_step_are_left_alone():
    other, others = begun(100)
    process, pids = begun(0.1)
    process.wait(timeout=60)
    assert all_gone(pids) and not any(map(gone, others))
    other.kill()
    other.wait()
    assert all_gone(others)


def test_children_are_those_that_run():
    child = hog(1, 20)
    assert child.pid in watchdog.children(os.getpid())
    child.kill()
    child.wait()
    assert child.pid not in watchdog.children(os.getpid())


def test_children_are_found_without_the_kernels_list(monkeypatch):
    child = hog(1, 20)
    monkeypatch.setattr(Path, "glob", lambda *pattern: iter(()))
    assert child.pid in watchdog.children(os.getpid())
    child.kill()
    child.wait()


def refuses(code, allowed=0):
    """``pidfd_open`` of a kernel that refuses it with an error, after as many calls as it allows."""
    left = iter(range(allowed))

    def pidfd_open(pid):
        if next(left, None) is None:
            raise OSError(code, os.strerror(code))
        return os.open(os.devnull, os.O_RDONLY)

    return lambda patch: patch.setattr(os, "pidfd_open", pidfd_open, raising=False)


WITHOUT = {
    "before Linux 5.3": refuses(errno.ENOSYS),
    "a sandbox": refuses(errno.EPERM),
    "no more files": refuses(errno.EMFILE, allowed=1),
    "macOS": lambda patch: patch.delattr(os, "pidfd_open", raising=False),
    "Windows": lambda patch: (patch.delattr(os, "pidfd_open", raising=False), patch.delattr(select, "poll")),
}
"""Systems that do not report the end of processes."""


@pytest.mark.parametrize("system", WITHOUT)
def test_the_first_process_that_is_gone_is_found_without_the_kernels_report(system, monkeypatch):
    WITHOUT[system](monkeypatch)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    process = subprocess.Popen([sys.executable, "-S", "-c", "input()"], stdin=subprocess.PIPE)
    assert not watchdog._is_gone(process.pid)
    process.kill()
    assert watchdog._first_gone([os.getpid(), process.pid]) == {process.pid}
    process.communicate()
    assert watchdog._is_gone(process.pid)


@pytest.mark.parametrize("system", WITHOUT)
def test_a_guardian_ends_what_a_step_left_without_the_kernels_report(system, monkeypatch):
    """The step is gone, or the run is: in the second case the step itself is ended."""
    WITHOUT[system](monkeypatch)
    # psutil has asked the system before.
    monkeypatch.setattr("psutil._psposix.can_use_pidfd_open", lambda: False, raising=False)
    monkeypatch.setattr(watchdog, "LOOK_SECONDS", 0.01)
    for gone_first in ("step", "run"):
        mark = f"{gone_first}-{time.time_ns()}"
        left = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, env={watchdog.STEP: mark})
        pids = {name: hog(1, 100) for name in ("step", "run")}
        pids[gone_first].kill()
        watchdog._guardian(pids["step"].pid, pids["run"].pid, mark)
        assert all_gone([left.pid])
        assert pids["step"].wait(timeout=60) == -signal.SIGKILL
        pids["run"].kill()
        pids["run"].wait()
        left.communicate()


def test_a_process_without_access_counts_as_running(monkeypatch):
    def denied(pid):
        raise psutil.AccessDenied(pid)

    monkeypatch.setattr(psutil, "Process", denied)
    assert not watchdog._is_gone(os.getpid())


@pytest.mark.parametrize("error", [AttributeError, OSError, TypeError])
def test_systems_without_the_calls_of_the_c_library_are_supported(error, monkeypatch):
    """Windows has no library of that name (``TypeError``), and others lack the function or forbid to load it."""

    def library(name):
        raise error

    monkeypatch.setattr(ctypes, "CDLL", library)
    watchdog.end_with_parent()
    timing.settle_memory()
    cases.settled_bytes()
