"""When an exact kernel is cheaper than an estimate: measured winners in passes and seconds, and in theory."""

from __future__ import annotations

import itertools
import math
from typing import Any, NamedTuple

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch

from ntkbench.errors import BadInput
from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.measure import laws
from ntkbench.studies.base.prescribed import Kernel

TABLE = "when_to_be_exact"
SIZES = ["N", "O", "rank", "share"]
COLUMNS: tuple[str, ...] = (*SIZES, "metric", "family", "title", "passes", "rms", "predicted", "seconds")
COLUMNS += ("seconds_q25", "seconds_q75", "seeds")
TOLERANCES = {0.1: "10 %", 0.01: "1 %", 0.001: "0.1 %"}
FAMILIES = {
    "exact": (styles.PINK, "exact"),
    "per-sample": (styles.BLUE, "per sample"),
    "pooled": (styles.ORANGE, "pooled"),
    "deflated": (styles.WINE, "pooled, deflated"),
}
"""Colours and names; the first family wins a tie."""
LINES: tuple[Any, ...] = ("--", (0, (5, 1.5, 1, 1.5)), ":")
"""Line styles of the theoretical boundaries for pooled estimates, by share."""
PREDICTED = ("per-sample", "pooled")
"""Families with a theoretical error."""
UNDECIDED = canvas.PALE
"""Colour where no family has the least cost with 95 % certainty."""
MARKERS = {"passes": "o", "seconds": "s"}
"""Markers of costs against theory; hollow where the cost is extrapolated."""


class Cost(NamedTuple):
    """The cost of an estimate to a relative error.

    Attributes:
        passes, seconds: cost to a root-mean-square error; ``nan`` if it is not known.
        tried: whether a measured budget reaches the error; otherwise the cost is extrapolated as 1 / error^2.
    """

    passes: float
    seconds: float
    tried: bool


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row of maps for each metric, a column for each error; below, measured against predicted costs."""
    points = base.measured(table, "rms", "passes", "seconds", *SIZES)
    there = np.array([_exists(*sizes) for sizes in points[SIZES].itertuples(index=False)], dtype=bool)
    points = points[there & (points["passes"] > 0) & (points["seconds"] > 0)]
    plotted = _costs(points)
    if not len(plotted):
        return base.nothing(table[[*COLUMNS, "status", "reason"]], labels.why_not(table))
    metrics, shares = base.metrics_in(plotted), sorted(plotted["share"].unique())
    figure, grid = canvas.sheet(
        [*(canvas.Row(2.5, above=0.55, below=0.4) for _ in metrics), canvas.Row(2.5, above=0.7, below=0.4)],
        len(TOLERANCES),
        title=_title(plotted),
        subtitle=f"N = {labels.range_label(plotted['N'])} samples  ·  {base.settings_line(table)}",
        key=[
            ("fewest passes (left half), least seconds (right)", _families(points)),
            ("how to read", _reading(shares)),
        ],
        left=0.75,
        gap=0.45,
        bottom=0.15,
    )
    for panels, metric in zip(grid, metrics, strict=False):
        theory = _theory(int(plotted["N"].iloc[0]), metric, math.ceil(math.log2(plotted["O"].max())) + 1, shares)
        for panel, (error, words) in zip(panels, TOLERANCES.items(), strict=True):
            here = plotted[(plotted["metric"] == metric) & (plotted["error"] == error)]
            canvas.title(panel, f"{labels.metric_label(metric)}, to {words}", "")
            _map(panel, here, math.log(error), shares, theory)
            panel.tick_params(labelleft=panel is panels[0])
        panels[0].set_ylabel("effective rank of a sample's block")
    for panel, metric in zip(grid[-1], metrics, strict=False):
        _against_theory(panel, plotted[plotted["metric"] == metric])
        canvas.title(panel, labels.metric_label(metric), "cost against predicted passes, over those of exact")
    canvas.hide(grid[-1][len(metrics) :])
    grid[-1][0].set_ylabel("cost over that of exact")
    return base.Drawing(figure, plotted, _caption(plotted))


def cost(rows: pd.DataFrame, error: float) -> Cost:
    """The passes and seconds of one method on one kernel to a relative error.

    Errors are a non-increasing curve fitted to all budgets, by isotonic regression of logarithms. Between budgets,
    passes are interpolated in logarithms, and seconds in passes. Beyond the largest budget, passes grow as 1 / error^2
    and seconds are proportional to passes; the costs of deflating methods, whose errors fall faster, are ``nan``.

    Args:
        rows: rows of one method and kernel, one for each budget.
        error: the requested error.
    """
    from scipy.optimize import isotonic_regression

    rows = rows.sort_values("passes")
    passes, seconds = rows["passes"].to_numpy(float), rows["seconds"].to_numpy(float)
    if rows["family"].iloc[0] == "exact":
        return Cost(passes[0], seconds[0], True)
    # Errors rise with passes only by chance, and an error of zero has no logarithm.
    logs = isotonic_regression(np.log(rows["rms"].to_numpy(float).clip(min=1e-15)), increasing=False).x
    wanted_log = math.log(error)
    if tried := logs[-1] <= wanted_log:
        enough = int(np.argmax(logs <= wanted_log))
        if not enough:
            return Cost(passes[0], seconds[0], True)
        step = slice(enough, enough - 2 if enough > 1 else None, -1)
        wanted = math.exp(np.interp(wanted_log, logs[step], np.log(passes[step])))
    elif rows["family"].iloc[0] == "deflated":
        return Cost(math.nan, math.nan, False)
    else:
        wanted = passes[-1] * math.exp(2 * (logs[-1] - wanted_log))
    within = float(np.interp(wanted, passes, seconds))
    return Cost(wanted, within * max(1.0, wanted / passes[-1]), bool(tried))


def spreads(rows: pd.DataFrame, error: float, typical: float) -> dict[str, float]:
    """Standard deviations of the logarithms of a method's passes and seconds to an error.

    The logarithm of a root mean square of k nearly normal errors has a standard deviation of 1 / sqrt(2 k). All errors
    of a method are assumed to be off by as much, to the side that matters more. Seconds also vary over calls, see
    :func:`ntkbench.measure.laws.median_seconds`.

    Args:
        rows, error: as for :func:`cost`.
        typical: what :func:`ntkbench.measure.laws.typical_spread` gives for the table.
    """
    off = 1 / math.sqrt(2 * rows["seeds"].fillna(1).clip(lower=1).max())
    logs = np.log([cost(rows, error * math.exp(side * off))[:2] for side in (0, -1, 1)])
    of_passes, of_seconds = np.nan_to_num(np.abs(logs[1:] - logs[0])).max(0)
    of_calls = laws.median_seconds(rows, typical=typical)[1].max()
    return {"passes": float(of_passes), "seconds": math.hypot(of_seconds, of_calls)}


def predicted_passes(kernel: Kernel, metric: str, family: str, error: float) -> float:
    """The theoretical passes to a relative error; at least two."""
    from scipy.optimize import brentq

    def excess(log_passes: float) -> float:
        return math.log(kernel.error(metric, family, math.exp(log_passes)) / error)

    low, high = math.log(2), math.log(1e12)
    return 2.0 if excess(low) <= 0 else math.exp(brentq(excess, low, high))


def _kernel(N: float, outputs: float, rank: float, share: float) -> Kernel:
    return Kernel(int(N), int(outputs), float(rank), float(share))


def _exists(*sizes: float) -> bool:
    try:
        _kernel(*sizes)
    except BadInput:
        return False
    return True


def _costs(points: pd.DataFrame) -> pd.DataFrame:
    """One row for each kernel, metric, error and family: its cost, and the family that wins.

    A family wins if its cost is the least with a probability of at least 95 %; the winner is empty if none is.
    ``chance_of_exact_in_passes`` is the probability that exact takes the fewest passes; likewise for seconds.
    """
    made = []
    typical = laws.typical_spread(points)
    for (*sizes, metric), kernel_rows in points.groupby([*SIZES, "metric"]):
        if "exact" not in set(kernel_rows["family"]):
            continue
        kernel = _kernel(*sizes)
        for error in TOLERANCES:
            costs = {f: cost(kernel_rows[kernel_rows["family"] == f], error) for f in FAMILIES
                     if f in set(kernel_rows["family"])}  # fmt: skip
            theory = {f: predicted_passes(kernel, metric, f, error) for f in PREDICTED if f in costs}
            theory["exact"] = kernel.O
            apart = {f: spreads(kernel_rows[kernel_rows["family"] == f], error, typical) for f in costs}
            chances = {by: _chances(costs, apart, by) for by in MARKERS}
            for family, found in costs.items():
                row = {**dict(zip(SIZES, sizes, strict=True)), "metric": metric, "error": error, "family": family}
                row |= found._asdict() | {"predicted_passes": theory.get(family, math.nan)}
                row |= {"exact_passes": kernel.O, "exact_seconds": costs["exact"].seconds}
                for by, shares in chances.items():
                    row[f"winner_in_{by}"] = next((f for f, share in shares.items() if share >= tasks.SURE), "")
                    row[f"chance_of_exact_in_{by}"] = shares["exact"]
                made.append({**row, "winner_in_theory": _least(theory), "seeds": kernel_rows["seeds"].max()})
    return pd.DataFrame(made)


def _chances(costs: dict[str, Cost], apart: dict[str, dict[str, float]], by: str) -> dict[str, float]:
    """The probability of each family that its passes or seconds are the least; the first family wins a tie.

    A family without a rival has a probability of a half: nothing is decided.
    """
    if len(costs) < 2:
        return dict.fromkeys(costs, 0.5)
    known = [family for family, found in costs.items() if math.isfinite(getattr(found, by))]
    middle = np.log([getattr(costs[family], by) for family in known])
    shares = laws.smallest(middle, np.array([apart[family][by] for family in known]))
    return dict(zip(known, map(float, shares), strict=True))


def _least(costs: dict[str, float]) -> str:
    """The family with the least cost; if several tie, the first one in :data:`FAMILIES`."""
    known = {family: costs[family] for family in FAMILIES if math.isfinite(costs.get(family, math.nan))}
    return min(known, key=known.__getitem__)


class Theory(NamedTuple):
    """Errors of estimates with as many passes as exact takes.

    Attributes:
        outputs, ranks: O and ranks of a block, ``[ranks, octaves]``.
        logs: logarithms of the errors there, by family and share.
    """

    outputs: np.ndarray
    ranks: np.ndarray
    logs: dict[tuple[str, float], np.ndarray]


def _theory(N: int, metric: str, octaves: int, shares: list[float]) -> Theory:
    """The errors for O = 2, 4, ..., 2^octaves, and for ranks from 1 to almost O."""
    outputs = np.tile(2.0 ** np.arange(1, octaves + 1), (30, 1))
    ranks = outputs ** np.linspace(0, 0.995, len(outputs))[:, None]
    logs = {(family, share): np.empty_like(outputs) for family in PREDICTED for share in shares}
    for place in np.ndindex(outputs.shape):
        for share in shares:
            kernel = Kernel(N, int(outputs[place]), float(ranks[place]), share)
            for family in PREDICTED:
                logs[family, share][place] = math.log(kernel.error(metric, family, kernel.O))
    return Theory(outputs, ranks, logs)


def _map(panel: Axes, here: pd.DataFrame, level: float, shares: list[float], theory: Theory) -> None:
    """Winners over O and rank, shares side by side, and where the theoretical log error equals ``level``."""
    outputs, ranks = sorted(here["O"].unique()), sorted(here["rank"].unique())
    low, high = min(outputs) / 2, max(outputs) * 2
    panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(0.95, max(max(ranks) * 2.0, 4.0)))
    exact = theory.logs["per-sample", shares[0]]
    panel.contourf(theory.outputs, theory.ranks, exact, [level, math.inf], colors=[canvas.SHADE])
    lines = [("per-sample", shares[0], "-"), *(("pooled", *pair) for pair in zip(shares, itertools.cycle(LINES)))]
    for family, share, line in lines:
        logs = theory.logs[family, share]
        if logs.min() < level < logs.max():
            style: dict[str, Any] = {"colors": [FAMILIES[family][0]], "linestyles": [line]}
            panel.contour(theory.outputs, theory.ranks, logs, [level], **style)
    panel.plot([1, high], [1, high], color=canvas.PALE, linewidth=0.9)
    offsets = np.linspace(-1, 1, len(shares)) * (0.24 if len(shares) > 1 else 0)
    for offset, share in zip(offsets, shares, strict=True):
        for row in here[(here["share"] == share) & (here["family"] == "exact")].itertuples():
            winners = (row.winner_in_passes, row.winner_in_seconds)
            left, right = (FAMILIES[winner][0] if winner else UNDECIDED for winner in winners)
            panel.plot(row.O * 2**offset, row.rank, marker="o", markersize=8, fillstyle="left", markerfacecolor=left,
                       markerfacecoloralt=right, markeredgecolor="white", markeredgewidth=0.8, zorder=4)  # fmt: skip
    panel.set_xticks(outputs, [f"{size:g}" for size in outputs])
    panel.set_yticks(ranks, [f"{rank:g}" for rank in ranks])
    panel.minorticks_off()
    panel.set_xlabel("outputs O")


def _against_theory(panel: Axes, here: pd.DataFrame) -> None:
    """Passes and seconds of estimates over those of exact, against predicted passes over O; hollow if extrapolated."""
    here = here[here["predicted_passes"].notna() & (here["family"] != "exact")]
    x = here["predicted_passes"] / here["exact_passes"]
    costs = {quantity: here[quantity] / here[f"exact_{quantity}"] for quantity in MARKERS}
    both = (*x, *costs["passes"], *costs["seconds"])
    panel.set(xscale="log", yscale="log", xlim=canvas.limits(x), ylim=canvas.limits(both))
    for family, (quantity, marker), tried in itertools.product(PREDICTED, MARKERS.items(), (True, False)):
        own, colour = (here["family"] == family) & (here["tried"] == tried), FAMILIES[family][0]
        style: dict[str, Any] = {"color": colour, "markerfacecolor": colour if tried else "none"}
        panel.plot(x[own], costs[quantity][own], **style, marker=marker, linestyle="", markersize=4, zorder=3)
    ends = canvas.limits(x)
    panel.plot(ends, ends, color=canvas.PALE, linewidth=1.2, zorder=1)
    panel.axhline(1, color=styles.GREY, linewidth=0.8, linestyle=":")
    for axis, limits in ((panel.xaxis, panel.get_xlim()), (panel.yaxis, panel.get_ylim())):
        canvas.decades(axis, *limits)
    panel.set_xlabel("predicted passes / O")


def _families(points: pd.DataFrame) -> list[key.Entry]:
    titles = points.groupby("family")["title"].unique()
    entries = [
        (colour, f"{words}: {' / '.join(map(labels.short, titles[family]))}")
        for family, (colour, words) in FAMILIES.items()
        if family in titles
    ]
    dot: dict[str, Any] = {"marker": "o", "markersize": 8, "linestyle": ""}
    return [(Line2D([], [], color=colour, **dot), words) for colour, words in [*entries, (UNDECIDED, "undecided")]]


def _reading(shares: list[float]) -> list[key.Entry]:
    said = " / ".join(f"{100 * share:g} %" for share in shares)
    pooled = [
        (Line2D([], [], color=FAMILIES["pooled"][0], linestyle=line), f"the same, pooled, with {100 * share:g} %")
        for share, line in zip(shares, itertools.cycle(LINES), strict=False)
    ]
    small: dict[str, Any] = {"color": styles.GREY, "markersize": 4, "linestyle": ""}
    return [
        (Line2D([], [], linestyle=""), f"side by side: {said} of ‖Θ‖² between samples"),
        (
            Patch(color=canvas.SHADE),
            f"theory: exact takes fewer passes than per sample, with {100 * shares[0]:g} %",
        ),
        (Line2D([], [], color=FAMILIES["per-sample"][0]), "theory: O passes per sample have this error"),
        *pooled,
        (Line2D([], [], **small, marker=MARKERS["passes"]), "below: passes over O"),
        (Line2D([], [], **small, marker=MARKERS["seconds"]), "below: seconds over those of exact"),
        (Line2D([], [], **small, marker="o", markerfacecolor="none"), "below, hollow: extrapolated, not measured"),
    ]


def _kernels(plotted: pd.DataFrame) -> pd.DataFrame:
    """One row for each kernel, metric and error."""
    return plotted[plotted["family"] == "exact"]


def _is_open(rows: pd.DataFrame, by: str) -> pd.Series:
    """Whether it is undecided, row by row, if the cost of exact is the least."""
    return rows[f"chance_of_exact_in_{by}"].between(1 - tasks.SURE, tasks.SURE, inclusive="neither")


def _title(plotted: pd.DataFrame) -> str:
    rows, estimates = _kernels(plotted), plotted[plotted["family"] != "exact"]
    of, said = (rows["error"] == rows["error"].iloc[0]).sum(), []
    for error, words in TOLERANCES.items():
        wins = (rows.loc[rows["error"] == error, "winner_in_passes"] == "exact").sum()
        tried = estimates.loc[(estimates["error"] == error) & estimates["passes"].notna(), "tried"].astype(bool)
        how = "" if tried.all() else f" ({tried.sum()} of {len(tried)} estimates measured)"
        said.append(f"to {words} in {wins}{how}")
    return (
        f"Of {of} cases, exact surely takes the fewest passes {', '.join(said)}; "
        f"{_is_open(rows, 'passes').sum()} of all {len(rows)} are undecided"
    )


def _by_rule(rows: pd.DataFrame) -> pd.Series:
    """Whether the rule N O rank < 2 / error^2 predicts, row by row, if exact takes the fewest passes."""
    below = rows["N"] * rows["O"] * rows["rank"] < 2 / rows["error"] ** 2
    return below == (rows["winner_in_passes"] == "exact")


def _caption(plotted: pd.DataFrame) -> str:
    rows = _kernels(plotted)
    estimates = plotted[plotted["family"].isin(PREDICTED)]
    text = (
        "Passes (left half) and seconds (right) to a relative root-mean-square error. Exact surely takes the least "
        f"seconds in {(rows['winner_in_seconds'] == 'exact').sum()} of {len(rows)} cases (undecided: "
        f"{_is_open(rows, 'seconds').sum()})."
    )
    if len(decided := rows[~_is_open(rows, "passes")]):
        text += f" N O rank < 2 / error² predicts {100 * _by_rule(decided).mean():.0f} % of cases decided in passes."
    text += f" Below: {estimates['tried'].sum()} of {len(estimates)} estimates are measured; hollow: extrapolated."
    inside = estimates[estimates["tried"] & (estimates["passes"] > 4)]
    if len(inside):
        ratio = inside["passes"] / inside["predicted_passes"]
        low, middle, high = map(labels.rounded, ratio.quantile([0.025, 0.5, 0.975]))
        text += f" Measured over predicted passes: {middle} ({low} to {high} in 95 %)."
    return text
