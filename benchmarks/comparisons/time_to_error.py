"""Seconds to a given error, all methods in turn: ``python -m benchmarks.comparisons.time_to_error --output FILE``.

For every method the smallest budget is looked for whose median relative error over seeds, against the exact value (or
what :class:`Goal` has stand for it), is within the tolerance; then all methods at their budgets take turns, as in
``side_by_side``. A method that does not get there within the largest budget, or would take too long, is a row with its
reason. Deterministic methods take part where their own error is within the tolerance.
"""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.comparisons.side_by_side import use_threads
from ntkbench import errors, methods, paths, problems
from ntkbench.errors import NtkbenchError
from ntkbench.measure import timing
from ntkbench.measure.provenance import provenance
from ntkbench.methods.base import Stochastic
from ntkbench.options import Target
from ntkbench.problems.base import reference

AS_PUBLISHED = (
    "hutchpp",
    "hutchpp_paper",
    "one_sided_paper_reverse",
    "one_sided_paper_forward",
    "nystrompp",
    "shared_probe_alignment",
)
"""Estimators in the form of their sources, against which the others are held."""

MEMORY = 2**30
SEEDS = 51
MOST_PASSES = 4096
DETERMINISTIC_PASSES = 64
CLOSE = 1.3
"""How near a budget that is enough and one that is not have to be for the former to count as the smallest."""
REFERENCE, REFERENCE_PASSES, REFERENCE_SEED = "group_u_statistics", 2**15, 2**31
"""What stands for exact values, the most that it may spend, and a seed that no entrant has."""
CLOSER = 3
"""By how much the interval of such a value is narrower than the goal, to either side."""


@dataclass(frozen=True)
class Goal:
    """A metric of a problem that is wanted to a relative error.

    Where the exact value cannot be had (a Gram matrix that does not fit in memory, or takes hours), errors are against
    an estimate in float64 whose 95 % interval reaches no further than a third of the goal.

    Attributes:
        problem, metric, error: what is wanted, and how well.
        exact: whether the exact value can be had.
        patience: seconds of one estimate beyond which no larger budget is tried, and a deterministic method does not
            take part.
    """

    problem: str
    metric: str
    error: float
    exact: bool = True
    patience: float = 0.3


GOALS = (
    Goal("gru_hazelden", "trace", 0.003),
    Goal("digits_mlp", "alignment", 0.01),
    Goal("digits_conv[N=64]", "trace", 0.01),
    Goal("digits_conv[N=64]", "norm", 0.01),
    Goal("mlp_he", "alignment", 0.03, patience=1),
    Goal("rnn_flipflop[H=128,N=100]", "alignment", 0.08, exact=False, patience=1),
)


@dataclass(frozen=True)
class Entrant:
    """A method at the budget that gets it to the goal."""

    method: str
    passes: int | None
    error: float
    call: Callable[[int], float]


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seconds", type=float, default=6.0, show_default=True, help="of each goal's turns")
@click.option("--problem", "only", multiple=True, help="these problems only")
def main(output: Path, threads: int, seconds: float, only: tuple[str, ...]) -> None:
    """Measure every goal and write a row for each method."""
    with errors.as_one_line():
        if strangers := set(only) - {goal.problem for goal in GOALS}:
            raise errors.unknown("problem", sorted(strangers)[0], sorted({goal.problem for goal in GOALS}))
        use_threads(threads)
    rows: list[dict[str, Any]] = []
    for goal in tqdm([goal for goal in GOALS if not only or goal.problem in only], unit="goal"):
        rows += measure(goal, threads, seconds)
        paths.write_atomically(output, pd.DataFrame(rows).to_csv(index=False))  # what is measured is not lost
    table = pd.DataFrame(rows)
    columns = ["problem", "metric", "goal", "method", "passes", "error", "seconds", "ratio", "reason"]
    click.echo(table[columns].to_string())


def measure(goal: Goal, threads: int, seconds: float) -> list[dict[str, Any]]:
    """A row for each method; ``ratio`` is its time over that of the fastest as-published estimator."""
    problem = problems.load(goal.problem)
    exact, uncertainty = _reference(goal)
    common = {"problem": goal.problem, "n": problem.n, "P": problem.P, "metric": goal.metric, "goal": goal.error}
    common |= {"reference": exact, "reference_error": uncertainty}
    common |= {"threads": threads, "memory": MEMORY, **provenance().columns()}
    entrants, rows = [], []
    for name in methods.names():
        if "torch" not in methods.get(name).backends or goal.metric not in methods.get(name).metrics:
            continue
        row = {**common, "method": name, "kind": methods.get(name).kind, "published": name in AS_PUBLISHED}
        found = _entrant(name, goal, exact)
        if isinstance(found, Entrant):
            entrants.append(found)
            row |= {"passes": found.passes, "error": found.error, "reason": ""}
        else:
            row |= {"reason": found}
        rows.append(row)
    times = timing.in_turn([_changing_seeds(entrant) for entrant in entrants], seconds)
    medians = {entrant.method: statistics.median(own) for entrant, own in zip(entrants, times, strict=True)}
    rival = min(filter(medians.__contains__, AS_PUBLISHED), key=medians.__getitem__, default=None)
    taken = {entrant.method: own for entrant, own in zip(entrants, times, strict=True)}
    for row in rows:
        if row["method"] in medians:
            row["seconds"], row["rounds"] = medians[row["method"]], len(taken[row["method"]])
            if rival:
                ratios = [a / b for a, b in zip(taken[row["method"]], taken[rival], strict=True)]
                quartiles = np.quantile(ratios, (0.25, 0.5, 0.75))
                row |= {"rival": rival, **dict(zip(("ratio_q25", "ratio", "ratio_q75"), quartiles, strict=True))}
    return rows


def _reference(goal: Goal) -> tuple[float, float]:
    """The value that errors are against, and its own relative standard error."""
    problem = problems.load(goal.problem)
    if goal.exact:
        return reference.exact(problem)[goal.metric], 0.0
    method = methods.get(REFERENCE)
    prepared = method.prepare(problem, Target("torch", "float64", memory=MEMORY))
    names, rtol = (goal.metric,), goal.error / CLOSER
    (found,) = method.estimates(prepared, names, REFERENCE_PASSES, REFERENCE_SEED, rtol=rtol).values()
    if found.notes:
        raise NtkbenchError(f"{goal.problem}: {found.notes[-1]}")
    return found.value, found.standard_error / abs(found.value)


def _entrant(name: str, goal: Goal, exact: float) -> Entrant | str:
    """The method at its smallest budget, or why it does not take part."""
    method, problem, target = methods.get(name), problems.load(goal.problem), Target("torch", memory=MEMORY)
    if reason := method.unsupported_reason(problem, goal.metric, target):
        return reason
    if not isinstance(method, Stochastic):
        needed = method.passes_needed(problem, goal.metric, target)
        if needed is None or needed > DETERMINISTIC_PASSES:
            return f"takes {needed or problem.n:g} passes, over {DETERMINISTIC_PASSES}"
    if method.bytes_needed(problem, goal.metric, target) > MEMORY:
        return "does not fit in memory"
    try:
        prepared = method.prepare(problem, target)
        failed, passes = 0, method.least_passes(problem, goal.metric) if isinstance(method, Stochastic) else None
        found: Entrant | None = None
        while True:

            def call(seed: int, passes: int | None = passes) -> float:
                return method.estimate(prepared, goal.metric, passes, seed).value

            off, slow = _median_error(call, exact, SEEDS if passes else 1, goal.patience)
            if off <= goal.error and not slow:
                found = Entrant(name, passes, off, call)
            elif found:
                failed = passes
            elif slow:
                return f"error {off:.2g} after over {goal.patience:g} s"
            elif passes is None or passes >= MOST_PASSES:
                return f"error {off:.2g} with {passes or 'all'} passes"
            else:
                failed = passes
            if not found:
                # Errors fall at least as the root of the budget; large steps are for where there is a long way to go.
                passes = min(MOST_PASSES, math.ceil(passes * min(max((off / goal.error) ** 1.5, 2**0.5), 4.0)))
                continue
            if not failed or found.passes <= max(CLOSE * failed, failed + 1):
                return found
            passes = round(math.sqrt(failed * found.passes))
    except (NtkbenchError, MemoryError, RuntimeError) as error:
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def _median_error(call: Callable[[int], float], exact: float, seeds: int, patience: float) -> tuple[float, bool]:
    """Median relative error over seeds, and whether an estimate takes too long to go on to larger budgets."""
    values, start = [], time.perf_counter()
    for seed in range(seeds):
        values.append(call(seed))
        spent = time.perf_counter() - start
        if (len(values) >= 5 and spent > 5 * patience) or spent > 2 * patience * len(values):
            break
    off = statistics.median(abs(value - exact) / abs(exact) for value in values)
    return off, spent > patience * len(values)


def _changing_seeds(entrant: Entrant) -> Callable[[], float]:
    seeds = iter(range(10**9))
    return lambda: entrant.call(next(seeds))


if __name__ == "__main__":
    main()
