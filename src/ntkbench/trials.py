"""Measured results and costs of several methods on one network."""

from __future__ import annotations

import csv
import dataclasses
import io
import itertools
import math
import statistics
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np

from ntkbench.errors import BadInput, reason
from ntkbench.estimate import Estimate
from ntkbench.units import aligned, percent_label, seconds_label

PUBLISHED = ("hutchinson", "hutchpp", "sum_of_logits")
"""Methods of the papers that are measured besides those that ``auto`` tries."""
PASSES = 64
"""The budget of stochastic methods if neither passes nor a tolerance is given."""


@dataclass(frozen=True)
class Trial:
    """Measured result and cost of one method.

    Attributes:
        method: its name.
        by: the method that gave the value, which differs if the name is ``auto``; empty if there is no value.
        kind: ``exact``, ``approximate`` or ``stochastic``.
        value: the first estimate; ``None`` if there is none.
        low, high: its 95 % interval, as wide as rounding for an exact value; ``None`` if the method is biased by an
            unknown amount, or gives no value.
        passes: passes of the first estimate; ``None`` if its cost is not a number of passes.
        seconds, seconds_q25, seconds_q75: median and quartiles over calls of the prepared method.
        calls: number of timed calls, each with its own seed.
        error: root mean square of the relative errors of all calls, against the value of the first measured exact
            method in the same precision; 0 for that method, and ``None`` if there is none.
        reason: why there is no value; empty if there is one.
    """

    method: str
    by: str = ""
    kind: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    passes: float | None = None
    seconds: float | None = None
    seconds_q25: float | None = None
    seconds_q75: float | None = None
    calls: int = 0
    error: float | None = None
    reason: str = ""


HEADER = ("method", "value", "95 % interval", "passes", "seconds", "error", "")


class Trials(list[Trial]):
    """Measured results and costs of methods, the fastest first, and those without a value last.

    Attributes:
        metric: the metric that the methods estimate.
    """

    def __init__(self, trials: Iterable[Trial], metric: str) -> None:
        self.metric = metric
        super().__init__(sorted(trials, key=lambda one: (bool(one.reason), one.seconds or math.inf, one.method)))

    def csv(self) -> str:
        """All numbers as comma-separated values, with a line for each method."""
        names = [field.name for field in dataclasses.fields(Trial)]
        text = io.StringIO()
        writer = csv.DictWriter(text, ["metric", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"metric": self.metric} | dataclasses.asdict(one) for one in self)
        return text.getvalue()

    def __repr__(self) -> str:
        return aligned([HEADER, *map(_cells, self)])


def _cells(one: Trial) -> tuple[str, ...]:
    name = one.method if one.by in ("", one.method) else f"{one.method} ({one.by})"
    if one.value is None:
        return name, "", "", "", "", "", one.reason
    interval = "unknown" if one.low is None else "exact" if one.kind == "exact" else f"[{one.low:.4g}, {one.high:.4g}]"
    return (
        name,
        f"{one.value:.6g}",
        interval,
        "" if one.passes is None else f"{one.passes:g}",
        "" if one.seconds is None else seconds_label(one.seconds),
        "" if one.error is None else percent_label(one.error),
        "",
    )


Entry = tuple[str, Callable[[int], Estimate]]
"""The kind of a method, empty for ``auto``, and a function from a seed to its estimate."""


def entry(use: Callable[..., Estimate], name: str, *, passes: int | None, rtol: float | None) -> Entry:
    """The kind of a method, and a function from a seed to its estimate with the options that it takes.

    Raises:
        BadInput: there is no such method.
    """
    from ntkbench import methods

    given: dict[str, int | float | None] = {"passes": passes, "rtol": rtol}
    if name == "auto":
        return "", lambda seed: use(method=name, seed=seed, **given)
    method = methods.get(name)
    if not method.takes_passes:
        given = {}
    return method.kind, lambda seed: use(method=name, seed=seed, **given)


def chosen(names: Iterable[str]) -> list[str]:
    """Names of methods, each once.

    Raises:
        BadInput: there are none, or they are one string.
    """
    found = [] if isinstance(names, str) else list(dict.fromkeys(names))
    if not found:
        raise BadInput(f"methods must be a list of names, such as ['auto', 'hutchpp']; got {names!r}")
    return found


def run(entries: dict[str, Entry], metric: str, calls: int) -> Trials:
    """Measure methods in turn, call by call, so that a temporary slowdown of the machine affects all of them.

    The number of probes may depend on the seed, and the program for a new number is traced at its first call. Methods
    share such programs, so that the first one in a round would trace for all. Each seed therefore has a round that is
    not timed, except with methods that take no probes.

    Args:
        entries: entries by the names of methods.
        metric: the metric that they estimate.
        calls: timed calls of each method, with seeds 1, 2, ...; a first call, with seed 0, prepares the method.
    """
    found: dict[str, dict[int, Estimate]] = {name: {} for name in entries}
    times: dict[str, list[float]] = {name: [] for name in entries}
    refused: dict[str, Trial] = {}
    rounds = [*((seed, False) for seed in range(calls + 1)), *((seed, True) for seed in range(1, calls + 1))]
    for (seed, is_timed), (name, (kind, ask)) in itertools.product(rounds, entries.items()):
        if name in refused or (seed and not is_timed and kind not in ("", "stochastic")):
            continue
        start = time.perf_counter()
        try:
            found[name][seed] = ask(seed)
        except Exception as error:  # a method that fails does not stop the others
            refused[name] = Trial(name, kind=kind, reason=reason(error))
            continue
        if is_timed:
            times[name].append(time.perf_counter() - start)
    measured = [name for name in entries if name not in refused]
    made = {name: list(found[name].values()) for name in measured}
    kinds = {name: entries[name][0] or _kind(made[name][0]) for name in measured}
    exact = next((made[name][0].value for name in measured if kinds[name] == "exact"), None)
    trials = (_trial(name, kinds[name], made[name], times[name], exact) for name in measured)
    return Trials([*trials, *refused.values()], metric)


def _kind(estimate: Estimate) -> str:
    from ntkbench import methods

    return methods.get(estimate.method).kind


def _trial(name: str, kind: str, made: list[Estimate], times: list[float], exact: float | None) -> Trial:
    first = made[0]
    low, high = first.interval() if kind != "approximate" else (None, None)
    error = math.sqrt(statistics.fmean((each.value / exact - 1) ** 2 for each in made)) if exact else None
    q25, q50, q75 = np.quantile(times, (0.25, 0.5, 0.75)).tolist()
    return Trial(name, first.method, kind, first.value, low, high, first.passes, q50, q25, q75, len(times), error)
