"""Code shared by studies: settings, rows with the outcome of their measurement, and set-ups that several rows share."""

from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Generic, NamedTuple, TypeVar

from ntkbench import methods, problems
from ntkbench.errors import NtkbenchError
from ntkbench.measure import journal as journals
from ntkbench.measure import outcomes, timing
from ntkbench.measure.settings import OF_TARGET as OF_TARGET
from ntkbench.measure.settings import Settings as Settings
from ntkbench.methods import Method
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.registry import Registry

if TYPE_CHECKING:
    import pandas as pd

T = TypeVar("T")
Row = dict[str, Any]
COUNTS = ("seeds", "calls")
"""Columns of every row: the number of seeds, and the number of timed calls."""


def row(case: Mapping[str, Any], measure: Callable[[], Mapping[str, Any]]) -> Row:
    """A row of a study: what was measured, how the measurement ended, and its results.

    A row that is ok counts one seed and no timed call, unless ``measure`` says otherwise.

    Args:
        case: columns that identify the measurement. They are known without computing anything.
        measure: returns the other columns. An exception becomes status and reason.
    """
    said = outcomes.one_line(", ".join(map(str, case.values())))
    kept = journals.CURRENT.get()
    key = kept.key(case) if kept else ""
    if kept:
        if before := kept.before(key):
            outcomes.say(f"{said}: {before['status']}, from before")
            return before
        kept.begin(key)
    start = time.perf_counter()
    try:
        made = {**case, **outcomes.Outcome(outcomes.OK).columns(), "seeds": 1, "calls": 0, **measure()}
        made = json.loads(json.dumps(made, default=journals.plain))  # the same as a row from the journal
    except (Exception, SystemExit) as error:  # the other rows are kept
        made = {**case, **outcomes.of_exception(error).columns()}
    if made["status"] != outcomes.OK:  # a row that was not run may still have its memory
        made = {name: value for name, value in made.items() if name not in COUNTS}
    seconds = time.perf_counter() - start
    if kept:
        made |= kept.whence
        kept.finish(key, made, seconds)
    outcomes.say(f"{said}: {made['status']} after {seconds:.2g} s {made['reason']}")
    return made


def rows(
    case: Mapping[str, Any],
    measure: Callable[[], Sequence[Mapping[str, Any]]],
    parts: Sequence[Mapping[str, Any]] = ({},),
) -> list[Row]:
    """Rows that come from one measurement.

    Args:
        case: as in :func:`row`.
        measure: returns the other columns of each row.
        parts: the rows' own columns if the measurement fails; each of these rows has the reason.
    """
    return unfolded(row(case, lambda: {"rows": measure()}), parts)


def unfolded(made: Row, parts: Sequence[Mapping[str, Any]] = ({},)) -> list[Row]:
    """The rows of a table that an entry of the journal stands for: one, those of :func:`rows`, or none for times.

    Args:
        made: the entry; it stays as it is.
        parts: as in :func:`rows`.
    """
    if isinstance(made.get("turns"), list):  # of in_turn, which adds the times to other rows
        return []
    if not isinstance(inside := made.get("rows"), list):
        return [{**made, **part} for part in parts]
    return [{name: value for name, value in made.items() if name != "rows"} | own for own in inside]


def left_out(case: Mapping[str, Any], reason: str) -> Row:
    """A row without a measurement."""
    return {**case, **outcomes.Outcome(outcomes.SKIPPED, reason).columns()}


def table(made: Iterable[Row]) -> pd.DataFrame:
    """Rows as a study's table, with the columns that every table has."""
    import pandas as pd

    found = pd.DataFrame(list(made))
    counts = {name: found.get(name, pd.Series(index=found.index, dtype=float)).astype("Int64") for name in COUNTS}
    return found.assign(**counts)


class Turn(NamedTuple):
    """A call that is timed in turn with others.

    Attributes:
        name: tells the call from others that may take turns with the same calls.
        row: gets the columns ``seconds``, with quartiles, and ``calls``.
        call: ends with a number on the host.
        warm: makes the first call, which is not timed. It is not made for times from before.
    """

    name: str
    row: Row
    call: Callable[[], Any]
    warm: Callable[[], Any]


def in_turn(case: Mapping[str, Any], turns: Sequence[Turn], rounds: int) -> list[list[float]]:
    """Time calls in turn, so that a temporary slowdown of the machine affects all of them.

    A call that fails gives its row status and reason, and the others continue without it. The journal's entry for the
    times then has the same status, so that ``retry: failed`` times all of these calls again.

    Args:
        case: columns that distinguish these turns from the study's others.
        turns: the calls.
        rounds: how often each is called.

    Returns:
        Seconds of each call; none if it failed.
    """
    failed: dict[int, dict[str, str]] = {}

    def guarded(number: int, call: Callable[[], Any]) -> None:
        if number not in failed:
            try:
                call()
            except (Exception, SystemExit) as error:  # the others continue
                failed[number] = outcomes.of_exception(error).columns()

    def measure() -> dict[str, Any]:
        for i, turn in enumerate(turns):
            guarded(i, turn.warm)
        calls = [functools.partial(guarded, i, turn.call) for i, turn in enumerate(turns)]
        times = timing.in_turn(calls, rounds)
        found: dict[str, Any] = {"times": [failed.get(i) or own for i, own in enumerate(times)]}
        # If several failed, a status that another attempt may change counts.
        ends = sorted(failed.values(), key=lambda end: end["status"] not in outcomes.PASSING)
        return found | (ends[0] if ends else {})

    if not turns:
        return []
    made = row({**case, "turns": [turn.name for turn in turns]}, measure)
    ended, times = {key: made[key] for key in ("status", "reason")}, made.get("times", [])
    found = times if made["status"] == outcomes.OK or ended in times else [ended] * len(turns)
    for turn, own in zip(turns, found, strict=True):
        turn.row.pop("seconds", None)
        turn.row.update(own if isinstance(own, dict) else {**timing.quartiles("seconds", own), "calls": len(own)})
    return [[] if isinstance(own, dict) else own for own in found]


class Once(Generic[T]):
    """A set-up that several rows share, made at the first call; if it fails, every call fails with the same exception.

    A failed set-up is therefore not tried again for each row, and each of these rows has the reason.
    """

    def __init__(self, make: Callable[[], T]) -> None:
        """``make`` is called at most once."""
        self._make: Callable[[], T] | None = make
        self._made: T
        self._error: Exception | SystemExit | None = None

    def __call__(self) -> T:
        if self._make:
            make, self._make = self._make, None
            try:
                self._made = make()
            except (Exception, SystemExit) as error:
                self._error = error
        if self._error:
            raise self._error.with_traceback(None)
        return self._made


JAX = ("ntkbench.operators.jax", "ntkbench.operators.recurrent.jax")
"""Modules that methods in JAX load by name, for studies that run methods on other backends than torch."""


def methods_and_problems() -> tuple[str, ...]:
    """Modules of all methods and problems, for studies that load them by names in their settings."""
    registries: tuple[Registry[Any], ...] = (methods.REGISTRY, problems.REGISTRY)
    return tuple(sorted({each.module(name) for each in registries for name in each.found()}))


def preparing(problem: Problem, target: Target) -> Callable[[Method], Any]:
    """A function that prepares each method for a problem once; methods with the same preparation share it."""
    made: dict[str, Any] = {}

    def prepare(method: Method) -> Any:
        key = method.prepares or method.name
        if key not in made:
            made[key] = method.prepare(problem, target)
        return made[key]

    return prepare


def sizes(problem: Problem) -> dict[str, int]:
    """Columns N, O, P and n of a problem."""
    return {size: getattr(problem, size) for size in ("N", "O", "P", "n")}


def title(method: str) -> str:
    """A method's title; its name if the method cannot be loaded."""
    try:
        return methods.get(method).title
    except NtkbenchError:
        return method
