"""Methods side by side on one network: what each gives and what it takes, measured."""

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

from ntkbench.errors import reason
from ntkbench.estimate import Estimate
from ntkbench.units import seconds_label


@dataclass(frozen=True)
class Trial:
    """Measured result and cost of one method.

    Attributes:
        method: its name.
        by: the method that gave the value, which differs if the name is ``auto``; empty if there is no value.
        kind: ``exact``, ``approximate`` or ``stochastic``.
        value, low, high: the first estimate, and its interval; equal if the value is exact, ``None`` if the method has
            no error estimate, or gives no value.
        passes: passes of an estimate; ``None`` if its cost is not a number of passes.
        first_seconds: seconds of the first call, in which the network is traced and certified.
        seconds, seconds_q25, seconds_q75: median and quartiles of the seconds of later calls.
        calls: number of later calls, each with its own seed.
        error: root mean square of the relative errors of all calls; ``None`` if no exact method is measured.
        reason: why there is no value; empty if there is one.
    """

    method: str
    by: str = ""
    kind: str = ""
    value: float | None = None
    low: float | None = None
    high: float | None = None
    passes: float | None = None
    first_seconds: float | None = None
    seconds: float | None = None
    seconds_q25: float | None = None
    seconds_q75: float | None = None
    calls: int = 0
    error: float | None = None
    reason: str = ""


PUBLISHED = ("hutchinson", "hutchpp", "sum_of_logits")
"""Methods of the papers that are measured beside those that ``auto`` stands for."""

HEADER = ("method", "value", "95 % in", "passes", "first call", "later calls", "error", "")


class Trials(list[Trial]):
    """Measured results and costs of methods, the fastest first, and those without a value last.

    Attributes:
        metric: what is measured.
    """

    def __init__(self, trials: Iterable[Trial], metric: str) -> None:
        self.metric = metric
        super().__init__(sorted(trials, key=lambda one: (bool(one.reason), one.seconds or math.inf, one.method)))

    def csv(self) -> str:
        """All numbers as a table of comma-separated values, with a line for each method."""
        names = [field.name for field in dataclasses.fields(Trial)]
        text = io.StringIO()
        writer = csv.DictWriter(text, ["metric", *names], lineterminator="\n")
        writer.writeheader()
        writer.writerows({"metric": self.metric} | dataclasses.asdict(one) for one in self)
        return text.getvalue()

    def __repr__(self) -> str:
        rows = [HEADER, *map(_cells, self)]
        widths = [max(len(row[i]) for row in rows) for i in range(len(HEADER))]
        return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in rows)


def _cells(one: Trial) -> tuple[str, ...]:
    name = one.method if one.by in ("", one.method) else f"{one.method} ({one.by})"
    if one.value is None:
        return name, "", "", "", "", "", "", one.reason
    interval = "" if one.low is None else "exact" if one.kind == "exact" else f"[{one.low:.4g}, {one.high:.4g}]"
    return (
        name,
        f"{one.value:.6g}",
        interval,
        "" if one.passes is None else f"{one.passes:g}",
        seconds_label(one.first_seconds or 0.0),
        seconds_label(one.seconds or 0.0),
        "" if one.error is None else f"{100 * one.error:.2g} %",
        "",
    )


def run(ways: dict[str, tuple[str, Callable[[int], Estimate]]], metric: str, calls: int) -> Trials:
    """Measure methods: a first call of each, then later calls in turn, so that a slow machine slows all of them.

    Args:
        ways: by name, a kind (empty for ``auto``) and a function from a seed to an estimate.
        metric: what they estimate.
        calls: later calls of each, with seeds 1, 2, ...
    """
    found: dict[str, list[Estimate]] = {}
    times: dict[str, list[float]] = {}
    refused: dict[str, Trial] = {}
    for seed, (name, (kind, ask)) in itertools.product(range(calls + 1), ways.items()):
        if name in refused:
            continue
        start = time.perf_counter()
        try:
            made = ask(seed)
        except Exception as error:  # whatever a method does to a network, the others are measured
            found.pop(name, None)
            refused[name] = Trial(name, kind=kind, reason=reason(error))
            continue
        times.setdefault(name, []).append(time.perf_counter() - start)
        found.setdefault(name, []).append(made)
    kinds = {name: ways[name][0] or _kind(made[0]) for name, made in found.items()}
    exact = next((made[0].value for name, made in found.items() if kinds[name] == "exact"), None)
    measured = (_trial(name, kinds[name], made, times[name], exact) for name, made in found.items())
    return Trials([*measured, *refused.values()], metric)


def _kind(estimate: Estimate) -> str:
    from ntkbench import methods

    return methods.get(estimate.method).kind


def _trial(name: str, kind: str, made: list[Estimate], times: list[float], exact: float | None) -> Trial:
    first, later = made[0], times[1:]
    low, high = first.interval() if kind != "approximate" else (None, None)
    quartiles = statistics.quantiles(later, n=4, method="inclusive") if len(later) > 1 else 3 * later
    errors = [] if not exact else [each.value / exact - 1 for each in made]
    return Trial(
        name,
        first.method,
        kind,
        first.value,
        low,
        high,
        first.passes,
        times[0],
        quartiles[1],
        quartiles[0],
        quartiles[2],
        len(later),
        math.sqrt(statistics.fmean(e**2 for e in errors)) if errors else None,
    )


def way(
    use: Callable[..., Estimate], name: str, *, passes: int | None, rtol: float | None
) -> tuple[str, Callable[[int], Estimate]]:
    """The kind of a method, and a function from a seed to its estimate, which gets the options that the method takes.

    Raises:
        BadInput: there is no such method.
    """
    from ntkbench import methods
    from ntkbench.methods.base import Incremental

    if name == "auto":
        kind, given = "", {"passes": passes, "rtol": rtol}
    else:
        method = methods.get(name)
        kind, given = method.kind, {"passes": passes} if method.takes_passes else {}
        if isinstance(method, Incremental):
            given["rtol"] = rtol
    return kind, lambda seed: use(method=name, seed=seed, **given)
