"""Seconds until a metric reaches a given error: the fastest method of each kind, and all others."""

from __future__ import annotations

import math
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter

from ntkbench.figures.plotting import base, canvas, labels, styles
from ntkbench.units import seconds_label

TABLE = "time_to_error"
COLUMNS: tuple[str, ...] = ("problem", "metric", "goal", "method", "title", "kind", "published")
COLUMNS += ("seconds", "passes", "ratio", "rival", "seeds", "calls")
LATER = ["backend", "ratio_low", "ratio_high", "reference_error"]
"""Columns that older tables do not have."""

ROLES = {
    "published": (styles.BLACK, "o", "published method"),
    "estimated": (styles.VERMILION, "o", "estimator of this suite"),
    "exact": (styles.BLUE, "s", "exact, of this suite"),
    "biased": (styles.GREY, "D", "biased, within the error here"),
}
"""Colour, marker and meaning of the methods that are named."""
ABOVE = ("published", "estimated")
"""Roles whose labels stand above the line; the others' stand below."""
CLOSE = 1.2
"""Ratio of two times below which no arrow connects them."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A line for each goal: seconds of the fastest method of each kind, named, and of all others."""
    table = table.reindex(columns=[*dict.fromkeys([*table.columns, *LATER])])
    timed = base.measured(table, "seconds", "goal")
    timed = timed[timed["seconds"].between(0, math.inf, inclusive="neither")]
    if not len(timed):
        return base.nothing(table, labels.why_not(table))
    plotted = pd.concat([_with_roles(rows) for _, rows in timed.groupby(["problem", "metric", "goal"], sort=False)])
    plotted = plotted[[*COLUMNS, *LATER, "role", "tied"]]
    goals = list(plotted.groupby(["problem", "metric", "goal"], sort=False))
    names = [f"{labels.name_label(problem)}\n{_wanted(metric, goal, rows)}" for (problem, metric, goal), rows in goals]
    named = _named(plotted)
    figure, ((panel,),) = canvas.sheet(
        [canvas.Row(0.72 * len(goals), above=0.3, below=0.3)],
        1,
        title=_title(goals),
        subtitle=f"{base.settings_line(table)}  ·  {labels.range_label(plotted['calls'])} calls each, interleaved",
        key=[("fastest of its kind", named[:2]), (" ", named[2:]), ("others", _others(plotted))],
        left=0.3 + canvas.text_width(names, 10),
        widest=7.4,
        bottom=0.35,
    )
    _frame(panel, plotted["seconds"], names)
    for line, (_, rows) in enumerate(goals):
        _line(panel, line, rows)
    return base.Drawing(figure, plotted, _caption(goals))


def _with_roles(rows: pd.DataFrame) -> pd.DataFrame:
    """The rows of a goal with a role for the fastest method of each kind, and an empty role for the others.

    ``tied`` says whether another method of its kind may be as fast; see :func:`is_tied`.
    """
    published = rows["published"].astype(str).str.lower() == "true"
    exact, biased = rows["kind"] == "exact", rows["kind"] == "approximate"
    groups = {
        "published": published,
        "exact": exact & ~published,
        "estimated": ~exact & ~biased & ~published,
        "biased": biased & ~published,
    }
    roles, tied = pd.Series("", index=rows.index), pd.Series(False, index=rows.index)
    for role, members in groups.items():
        if members.any():
            first = rows.loc[members, "seconds"].idxmin()
            roles[first], tied[first] = role, is_tied(rows[members])
    return rows.assign(role=roles, tied=tied)


def is_tied(rows: pd.DataFrame) -> bool:
    """Whether the interval of another method overlaps with that of the fastest; an unknown end bounds nothing."""
    low, high = rows["ratio_low"].fillna(0.0), rows["ratio_high"].fillna(math.inf)
    first = rows["seconds"].idxmin()
    return bool(((low <= high[first]) & (low[first] <= high)).drop(first).any())


def is_estimated(rows: pd.DataFrame) -> bool:
    """Whether errors are relative to an estimate, because the exact value is not available."""
    return bool((rows["reference_error"] > 0).any())


def _frame(panel: Axes, seconds: pd.Series, names: list[str]) -> None:
    low, high = seconds.min(), seconds.max()
    span = math.log10(high / low) or 1.0
    panel.set(xscale="log", xlim=(low / 10 ** (0.6 * span), high * 10 ** (0.75 * span)), ylim=(len(names) - 0.4, -0.7))
    canvas.decades(panel.xaxis, *panel.get_xlim())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: seconds_label(value)))
    panel.set_yticks(range(len(names)), names)
    panel.tick_params(axis="y", length=0)
    panel.set_xlabel("time at the budget where the fitted median error is the goal")
    panel.grid(False)
    panel.text(1.12, -0.7, "published / best here", transform=panel.get_yaxis_transform(), ha="right", va="bottom",
               fontsize=9, color=styles.GREY)  # fmt: skip


def _line(panel: Axes, line: int, rows: pd.DataFrame) -> None:
    """All methods of a goal on its line, the named ones in front."""
    panel.axhline(line, color=canvas.SHADE, linewidth=2.5, zorder=0)
    others = rows[rows["role"] == ""]
    panel.plot(others["seconds"], [line] * len(others), "o", color=canvas.PALE, markersize=4, alpha=0.7, zorder=1)
    named = {row["role"]: row for _, row in rows[rows["role"] != ""].iterrows()}
    for role, row in named.items():
        colour, marker, _ = ROLES[role]
        panel.plot([row["seconds"]], [line], marker, color=colour, markersize=8, zorder=3)
    for above in (True, False):
        side = sorted((row["seconds"], role) for role, row in named.items() if (role in ABOVE) == above)
        for place, (seconds, role) in enumerate(side):
            ha = "center" if len(side) == 1 else ("right", "left")[place]
            _label(panel, line, above, ha, seconds, named[role], ROLES[role][0])
    best = _best(named)
    if best is not None and "published" in named and math.isfinite(_times(best)):
        _ratio(panel, line, best)
        rival = named["published"]["seconds"]
        if abs(math.log(best["seconds"] / rival)) > math.log(CLOSE):
            arrow = {"arrowstyle": "-|>", "color": ROLES[best["role"]][0], "linewidth": 2.0, "shrinkA": 6, "shrinkB": 6}
            panel.annotate("", (best["seconds"], line), xytext=(rival, line), arrowprops=arrow, zorder=2)


def _label(panel: Axes, line: int, above: bool, ha: str, seconds: float, row: pd.Series, colour: str) -> None:
    jax = " (JAX)" if row["backend"] == "jax" else ""
    tied = " or tied" if row["tied"] else ""
    panel.annotate(
        f"{labels.short(row['title'], 34)}{jax}{tied}, {seconds_label(seconds)}",
        (seconds, line),
        xytext=({"right": -2, "left": 2}.get(ha, 0), 7 if above else -7),
        textcoords="offset points",
        ha=ha,
        va="bottom" if above else "top",
        fontsize=9,
        color=colour,
    )


def _ratio(panel: Axes, line: int, best: pd.Series) -> None:
    """The time of the published method over that of the best one, with its interval, at the right end of the line."""
    said, ends = f"{labels.rounded(_times(best))}×", [labels.rounded(end) if math.isfinite(end) else "?"
                                                     for end in _band(best)]  # fmt: skip
    where: dict[str, Any] = {"transform": panel.get_yaxis_transform(), "ha": "right"}
    panel.text(1.12, line, said, **where, va="bottom", fontweight="bold", fontsize=11, color=ROLES[best["role"]][0])
    panel.text(1.12, line, f"{ends[0]} to {ends[1]}", **where, va="top", fontsize=9, color=styles.GREY)


def _best(named: dict[str, pd.Series]) -> pd.Series | None:
    """The fastest method of this suite that is exact or unbiased."""
    ours = [row for role, row in named.items() if role in {"estimated", "exact"}]
    return min(ours, key=lambda row: row["seconds"], default=None)


def _times(best: pd.Series) -> float:
    """The time of the fastest published method over that of the best one; ``nan`` where it is not known."""
    return 1 / best["ratio"] if 0 < best["ratio"] < math.inf else math.nan


def _band(best: pd.Series) -> tuple[float, float]:
    """The ends of the 95 % interval of :func:`_times`; ``nan`` where they are not known."""
    low, high = (1 / best[end] if best[end] > 0 else math.nan for end in ("ratio_high", "ratio_low"))
    return low, high


def _bests(goals: list[tuple[Any, pd.DataFrame]]) -> list[tuple[Any, pd.Series, pd.Series | None]]:
    """The name of each goal, our fastest method, and the fastest published one."""
    found = []
    for name, rows in goals:
        named = {row["role"]: row for _, row in rows[rows["role"] != ""].iterrows()}
        if (best := _best(named)) is not None:
            found.append((name, best, named.get("published")))
    return found


def _title(goals: list[tuple[Any, pd.DataFrame]]) -> str:
    """The factors by which the best method here is faster, and the number of tasks on which it surely is."""
    pairs = [(best, rival) for _, best, rival in _bests(goals) if rival is not None and math.isfinite(_times(best))]
    bests = [best for best, _ in pairs]
    if not any((rows["role"] == "published").any() for _, rows in goals):
        return "No published method reaches any of these errors"
    if not bests:
        return "Seconds until a metric reaches a given error"
    faster = sum(_band(best)[0] > 1 for best in bests)
    slower = [rival["kind"] for best, rival in pairs if _band(best)[1] < 1]
    biased = slower.count("approximate")
    of_these = f" ({biased} against a biased kernel)" if biased else ""
    return (
        f"To the same error, the best method here is {labels.span(map(_times, bests))} times as fast as the best "
        f"published one: surely faster on {faster} of {len(bests)} tasks, surely slower on {len(slower)}{of_these}"
    )


def _caption(goals: list[tuple[Any, pd.DataFrame]]) -> str:
    text = (
        "Seconds at the budget where a law fitted to median errors reaches the goal. Right: time of the fastest "
        "published method over that of the fastest exact or unbiased one here, with its 95 % interval (?: not known). "
        "Or tied: the interval of another method overlaps."
    )
    alone = sum(rival is None for _, _, rival in _bests(goals))
    return text + (f" No published method reaches {alone} of the goals." if alone else "")


def _named(plotted: pd.DataFrame) -> list[tuple[Line2D, str]]:
    return [
        (Line2D([], [], color=colour, marker=marker, markersize=8, linestyle=""), meaning)
        for role, (colour, marker, meaning) in ROLES.items()
        if (plotted["role"] == role).any()
    ]


def _others(plotted: pd.DataFrame) -> list[tuple[Line2D, str]]:
    dot = Line2D([], [], color=canvas.PALE, marker="o", markersize=4, linestyle="")
    return [(dot, "all other methods that reach the goal")] if (plotted["role"] == "").any() else []


def _wanted(metric: str, goal: float, rows: pd.DataFrame) -> str:
    of = " of an estimate" if is_estimated(rows) else ""
    return f"{metric.replace('_', ' ')} to {labels.rounded(100 * goal)} %{of}"
