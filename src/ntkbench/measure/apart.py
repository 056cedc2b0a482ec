"""A function in a separate process under the limits; its result is passed on through a JSON file."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil

from ntkbench import ambient
from ntkbench.measure import journal, outcomes, timing, watchdog
from ntkbench.measure.limits import Limits
from ntkbench.measure.outcomes import Outcome


def run(
    function: Callable[..., Mapping[str, Any]], arguments: tuple[Any, ...], limits: Limits, threads: int, part: Path
) -> dict[str, Any]:
    """A function's result, with ``status`` and ``reason``; it runs again if something other than the limits killed it.

    Args:
        function: returns values that JSON can hold.
        arguments: arguments of the function.
        limits: only ``problem_s`` and ``memory_mb`` apply.
        threads: threads of every backend.
        part: a file for the result, which is removed.
    """
    found, killed = _once(function, arguments, limits, threads, part)
    return _once(function, arguments, limits, threads, part)[0] if killed else found


def _once(
    function: Callable[..., Mapping[str, Any]], arguments: tuple[Any, ...], limits: Limits, threads: int, part: Path
) -> tuple[dict[str, Any], bool]:
    """The result, and whether something other than the limits killed the process."""
    part.unlink(missing_ok=True)
    child = ambient.processes().Process(target=_find, args=(function, arguments, threads, part))
    child.start()
    watched = watchdog.Watched(psutil.Process(child.pid), time.monotonic(), limits.problem_s)
    with watchdog.Watch(lambda: [watched], limits.memory_bytes) as watch:
        child.join()
    if watch.verdict:
        return dict(Outcome(*watch.verdict).columns()), False
    try:
        return dict(json.loads(part.read_text(encoding="utf-8"))), False
    except (OSError, ValueError):
        return dict(outcomes.of_exit(child.exitcode or 0).columns()), child.exitcode == outcomes.KILLED
    finally:
        part.unlink(missing_ok=True)


def _find(function: Callable[..., Mapping[str, Any]], arguments: tuple[Any, ...], threads: int, part: Path) -> None:
    watchdog.end_with_parent()
    timing.use_threads(threads)
    found: Mapping[str, Any]
    try:
        found = {**Outcome(outcomes.OK).columns(), **function(*arguments)}
    except BaseException as error:
        found = outcomes.of_exception(error).columns()
    journal.write(part, found)
