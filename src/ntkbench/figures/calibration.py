"""Measured over stated error, and coverage of 95 % intervals, of ``auto`` and every stochastic method."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.figures.plotting import base, canvas, key, labels, styles
from ntkbench.figures.plotting.styles import looks

TABLE = "calibration"
COLUMNS: tuple[str, ...] = ("problem", "metric", "method", "title", "kind", "way", "covered", "covered_low", "verdict")
COLUMNS += ("covered_high", "target_low", "target_high", "ratio", "rmse", "noted", "exact", "passes_spent", "seeds")

AUTO = "auto"
RATIOS, COVERED = (0.4, 2.5), (0.70, 1.0)
"""Ranges of the axes; points beyond are drawn at the ends. A ratio without a stated error is beyond the upper one."""
TICKS = {"ratio": [0.5, 1.0, 2.0], "covered": [0.75, 0.85, 0.95]}
MARKERS = {"default": "o", "passes": "s", "rtol": "^"}
"""Markers by how an estimate is requested."""
WAYS = {"default": "by default", "passes": "with passes=", "rtol": "with rtol="}
COLOURS = {
    "trace": styles.BLUE,
    "norm": styles.VERMILION,
    "effective_rank": styles.GREEN,
    "alignment": styles.PINK,
}
VERDICTS = ("in range", "noted", "below", "above", "exact")
"""Verdicts on a case. ``noted``: out of range, but at least half of the estimates have a note; never for ``auto``."""
LOST = ("below", "above")
"""Verdicts out of range."""
RING: dict[str, Any] = {"color": styles.BLACK, "marker": "o", "markersize": 8, "fillstyle": "none", "linestyle": ""}
BANDS = {False: ("#E3EFE8", "the others"), True: ("#C9DFD3", AUTO)}
"""Colour of the target and the methods that it is for, by whether that is ``auto``."""

KEPT = ["problem", "metric", "method", "title", "way", "ratio", "covered", "covered_low", "covered_high", "noted"]
KEPT += ["exact", "passes_spent", "rmse", "seeds", "target_low", "target_high", "verdict"]


def cases(table: pd.DataFrame) -> pd.DataFrame:
    """The cases of each method as requested: all measured rows except the ``matched`` ones.

    Those request by name the method that most runs of ``auto`` to the tolerance used; only :func:`stopping` reads them.
    """
    return table[(table["status"] == "ok") & table["way"].isin(WAYS)]


def pooled(some: pd.DataFrame) -> tuple[float, float, float]:
    """The share of all intervals of some cases that contain the value, without exact ones, with Wilson's 95 % interval.

    Args:
        some: rows of :func:`cases`.
    """
    from scipy.stats import binomtest

    estimated = some[some["verdict"] != "exact"]
    exact = (estimated["exact"] * estimated["seeds"]).round()
    total = int((estimated["seeds"] - exact).sum())
    if not total:
        return math.nan, math.nan, math.nan
    hits = int(((estimated["covered"] * estimated["seeds"]).round() - exact).sum())
    ends = binomtest(hits, total).proportion_ci(method="wilson")
    return hits / total, ends.low, ends.high


def share_of_intervals(some: pd.DataFrame) -> str:
    """:func:`pooled` in per cent, with its interval."""
    share, low, high = pooled(some)
    return "" if math.isnan(share) else f"{100 * share:.1f} % ({100 * low:.1f} to {100 * high:.1f})"


def of_auto(some: pd.DataFrame) -> str:
    """A sentence on the intervals of ``auto`` by how they are requested and by network; empty if there are none.

    Args:
        some: rows of :func:`cases`.
    """
    auto = some[some["method"] == AUTO]
    ways = [f"{share} {WAYS[way]}" for way in WAYS if (share := share_of_intervals(auto[auto["way"] == way]))]
    networks = {name: pooled(rows)[0] for name, rows in auto.groupby("problem", sort=False)}
    known = pd.Series(networks, dtype=float).dropna()
    if not ways or known.empty:
        return ""
    ends = [
        f"{share_of_intervals(auto[auto['problem'] == name])} on {name!r}" for name in (known.idxmin(), known.idxmax())
    ]
    return (
        f"Of the intervals of `auto` that are not exact, these contain the value: {', '.join(ways)}; by network, from "
        f"{' to '.join(ends)}."
    )


def counts(some: pd.DataFrame) -> pd.DataFrame:
    """The number of cases of each verdict, by method.

    Args:
        some: rows of :func:`cases`.
    """
    return pd.DataFrame(
        {verdict: (some["verdict"] == verdict).groupby(some["method"], sort=False).sum() for verdict in VERDICTS}
    )


def draw(table: pd.DataFrame) -> base.Drawing:
    """A line for each method, with the cases of all problems: errors on the left, coverage on the right."""
    points = base.measured(cases(table), "covered")
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    style = {m: look for m, look in looks(table).items() if m in set(points["method"])}
    lines = {m: i for i, m in enumerate(sorted(style, key=lambda method: method != AUTO))}
    titles = [style[method].title for method in lines]
    figure, grid = canvas.sheet(
        [canvas.Row(0.22 * len(lines) + 0.2, above=0.35, below=0.3)],
        2,
        title=_finding(points),
        subtitle=base.settings_line(table),
        key=[("metric", _metrics(points)), ("requested", _ways(points)), ("how to read", _reading(points))],
        left=0.3 + canvas.text_width(titles, 9.5),
        gap=0.3,
    )
    heads = {
        "ratio": ("measured error / stated error", *RATIOS),
        "covered": ("coverage of 95 % intervals [%]", *COVERED),
    }
    for panel, (column, (head, low, high)) in zip(grid[0], heads.items(), strict=True):
        panel.set(xlim=(low, high), ylim=(len(lines) - 0.45, -0.55))
        panel.set_yticks(range(len(lines)), titles if column == "ratio" else [""] * len(lines))
        panel.tick_params(axis="y", length=0)
        if column == "ratio":
            _ratio_axis(panel)
        else:
            _coverage_axis(panel, _targets(points))
        panel.set_title(head, loc="left")
        _points(panel, points, column, lines)
    return base.Drawing(figure, points[KEPT].reset_index(drop=True), _caption(points))


def _targets(points: pd.DataFrame) -> dict[bool, tuple[float, float]]:
    """Targets of the coverage, that of ``auto`` last."""
    first = points.groupby(points["method"] == AUTO)[["target_low", "target_high"]].first()
    return {bool(auto): (low, high) for auto, low, high in first.itertuples(name=None)}


def _ratio_axis(panel: Axes) -> None:
    panel.set_xscale("log")
    panel.xaxis.set_major_locator(FixedLocator(TICKS["ratio"]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.axvline(1, color=canvas.PALE, linewidth=1.2, zorder=1)


def _coverage_axis(panel: Axes, targets: dict[bool, tuple[float, float]]) -> None:
    panel.set_xlim(COVERED[0] - 0.01, COVERED[1] + 0.01)
    panel.xaxis.set_major_locator(FixedLocator(TICKS["covered"]))
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{100 * value:.0f}"))
    for auto, target in targets.items():
        panel.axvspan(*target, color=BANDS[auto][0], linewidth=0, zorder=0)


def _points(panel: Axes, here: pd.DataFrame, column: str, lines: dict[str, int]) -> None:
    """Metrics below each other within the line of a method; hollow where estimates have a note, ringed out of range."""
    metrics = base.metrics_in(here)
    low, high = RATIOS if column == "ratio" else COVERED
    for row in here.assign(at=here[column].fillna(high).clip(low, high)).to_dict("records"):
        y = lines[row["method"]] + 0.6 * ((metrics.index(row["metric"]) + 0.5) / len(metrics) - 0.5)
        colour = COLOURS.get(row["metric"], styles.BLACK)
        panel.plot(
            row["at"],
            y,
            color=colour,
            marker=MARKERS[row["way"]],
            markersize=3.6,
            markeredgewidth=0.8,
            markerfacecolor="white" if row["noted"] >= 0.5 else colour,
            linestyle="",
            zorder=3,
            clip_on=False,
        )
        if row["verdict"] in LOST:
            panel.plot(row["at"], y, **RING, zorder=4, clip_on=False)


def _finding(points: pd.DataFrame) -> str:
    is_auto = points["method"] == AUTO
    said = []
    for name, here in (("auto", points[is_auto]), ("the other methods", points[~is_auto])):
        if share := share_of_intervals(here):
            inside = (here["verdict"] == "in range").sum()
            said.append(f"{share} of {name}, in range in {inside} of {len(here)} cases")
    return f"95 % intervals contain the exact value: {'; '.join(said)}"


def _metrics(points: pd.DataFrame) -> list[key.Entry]:
    return [
        (
            Line2D([], [], color=COLOURS.get(m, styles.BLACK), marker="o", markersize=5, linestyle=""),
            labels.metric_label(m),
        )
        for m in base.metrics_in(points)
    ]


def _ways(points: pd.DataFrame) -> list[key.Entry]:
    there = set(points["way"])
    return [
        (Line2D([], [], color=styles.GREY, marker=marker, markersize=5, linestyle=""), WAYS[way])
        for way, marker in MARKERS.items()
        if way in there
    ]


def _reading(points: pd.DataFrame) -> list[key.Entry]:
    hollow: dict[str, Any] = {"color": styles.GREY, "marker": "o", "markersize": 5, "markerfacecolor": "white"}
    entries: list[key.Entry] = []
    if (points["noted"] >= 0.5).any():
        entries.append((Line2D([], [], **hollow, linestyle=""), "at least half have a note"))
    if points["verdict"].isin(LOST).any():
        entries.append((Line2D([], [], **RING), "coverage out of range"))
    return [
        *entries,
        (Line2D([], [], color=canvas.PALE, linewidth=1.2), "errors as stated"),
        *(
            (
                Patch(color=BANDS[auto][0], linewidth=0),
                f"target for {BANDS[auto][1]}, {100 * low:g} to {100 * high:g} %",
            )
            for auto, (low, high) in _targets(points).items()
        ),
    ]


def _caption(points: pd.DataFrame) -> str:
    beyond, unknown = int((~points["ratio"].between(*RATIOS)).sum()), int(points["ratio"].isna().sum())
    said = f" ({unknown} without a stated error)" if unknown else ""
    under = int((points["covered"] < COVERED[0]).sum())
    lost = points["verdict"].isin(LOST).sum()
    return (
        "Root-mean-square measured over stated error (left), and coverage of 95 % intervals (right), on "
        f"{points['problem'].nunique()} networks. Out of range: {lost} of {len(points)} cases, whose Wilson interval "
        "is disjoint from the target; a note at half of the estimates excuses all but auto. Beyond the axes: "
        f"{beyond} ratios{said}, {under} coverages."
    )


def stopping(table: pd.DataFrame) -> str:
    """A sentence on the cost of stopping at a tolerance over that of a fixed budget; empty if it was not measured."""
    rows = base.measured(table, "covered", "rmse", "passes_spent")
    case = ["problem", "metric", "method"]
    both = rows[rows["way"] == "rtol"].merge(rows[rows["way"] == "matched"], on=case, suffixes=("", "_fixed"))
    both = both[(both["rmse"] > 0) & (both["rmse_fixed"] > 0)]
    if not len(both):
        return ""
    cost = (both["rmse"] / both["rmse_fixed"]) ** 2 * both["passes_spent"] / both["passes_spent_fixed"]
    held, fixed = (100 * both[column].mean() for column in ("covered", "covered_fixed"))
    return (
        f"Stopping at a tolerance takes {cost.median():.2f} times the passes of a fixed budget for the same error "
        f"(median of {len(both)} cases that are not exact); {held:.1f} % of its intervals contain the value, against "
        f"{fixed:.1f} % for fixed budgets."
    )
