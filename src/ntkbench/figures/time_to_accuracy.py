"""Where estimating begins to pay off: the fastest exact method and the fastest estimate to 1 % against the size."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, curves, key, labels, styles, tasks

TOLERANCE = {"1 %": 0.01}
COLUMNS = 3
CASE = ["metric", "setting"]
LEAST, MOST = "\N{GREATER-THAN OR EQUAL TO}", "\N{LESS-THAN OR EQUAL TO}"


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each metric: seconds against n, and a line from the exact method to the estimate of a task."""
    known = table[table["n"] > 0]
    best = _best(known)
    if not len(best):
        return base.nothing(best, f"Nothing reached a median error of 1 %.\n{labels.why_not(table)}")
    order = base.metrics_in(best)
    cases = sorted(best.groupby(CASE, sort=False), key=lambda item: order.index(item[0][0]))
    rows = canvas.in_rows(cases, COLUMNS)
    figure, grid = canvas.sheet(
        [canvas.Row(3.3, above=0.55, below=0.35) for _ in rows],
        len(rows[0]),
        title=_title(_pairs(best)),
        subtitle=base.settings_line(table),
        key=_key(best),
        gap=0.25,
        bottom=0.2,
    )
    x, y = canvas.limits(best["n"], pad=2.5), canvas.limits([*best["seconds"], *best["seconds_low"]], pad=1.9)
    for panels, row in zip(grid, rows, strict=True):
        canvas.hide(panels[len(row) :])
        panels[0].set_ylabel("seconds to 1 %")
        for panel, ((metric, setting), here) in zip(panels, row, strict=False):
            panel.set(xscale="log", yscale="log", xlim=x, ylim=y, xlabel="n = N O, all outputs")
            canvas.decades(panel.xaxis, *x)
            canvas.decades(panel.yaxis, *y)
            panel.tick_params(labelleft=panel is panels[0])
            pairs = _pairs(here)
            _panel(panel, here, pairs)
            name = labels.metric_label(metric) + (f",  {labels.short(setting, 20)}" if setting else "")
            canvas.title(panel, name, _finding(pairs))
            if crossing := _crossing(pairs):
                panel.axvline(crossing, color=styles.GREY, linestyle=":", linewidth=1.2)
    return base.Drawing(figure, best, _caption(best, known))


def _best(known: pd.DataFrame) -> pd.DataFrame:
    """The fastest method of each kind and task, by size; ``at_most`` if any method of the kind has an upper bound."""
    solved = tasks.solutions(known, TOLERANCE)
    solved = solved[solved["kind"].isin(tasks.FAMILIES)]
    solved = solved.assign(at_most=solved.groupby([*tasks.TASK, "kind"])["at_most"].transform("any"))
    best = solved.loc[solved.groupby([*tasks.TASK, "kind"], sort=False)["seconds"].idxmin()]
    return best.sort_values(["metric", "setting", "n", "problem", "kind"]).reset_index(drop=True)


def _pairs(best: pd.DataFrame) -> pd.DataFrame:
    """Tasks with an exact method and an estimate: ``ratio`` of their seconds, and ``sure`` if their bands are disjoint.

    An exact method is not surely faster than an estimate whose seconds are an upper bound.
    """
    exact, estimate = (best[best["kind"] == kind] for kind in ("exact", "stochastic"))
    both = exact.merge(estimate, on=tasks.TASK, suffixes=("", "_estimated"))
    pays = both["seconds_estimated"] < both["seconds"]
    apart = both["seconds_high_estimated"] < both["seconds_low"], both["seconds_high"] < both["seconds_low_estimated"]
    sure = apart[0].where(pays, apart[1] & ~both["at_most_estimated"])
    return both.assign(pays=pays, ratio=both["seconds"] / both["seconds_estimated"], sure=sure)


def _panel(panel: Axes, here: pd.DataFrame, pairs: pd.DataFrame) -> None:
    """The points of one metric, tasks of one size side by side, and the factor between those of one task."""
    low, high = panel.get_xlim()
    step = (high / low) ** 0.035
    places: dict[str, float] = {}
    for n, same in here.groupby("n"):
        names = list(dict.fromkeys(same["problem"]))
        places |= {name: n * step ** (i - (len(names) - 1) / 2) for i, name in enumerate(names)}
    for row in pairs.itertuples():
        at, ends = places[row.problem], sorted((row.seconds, row.seconds_estimated))
        colour = tasks.FAMILIES["stochastic" if row.pays else "exact"].colour
        panel.plot([at, at], ends, color=colour, linewidth=1.6, zorder=2)
    for row in here.itertuples():
        at = places[row.problem]
        panel.plot(at, row.seconds, **_mark(row.kind, row.at_most), zorder=3)
        ends = [[0.0 if row.at_most else row.seconds - row.seconds_low], [row.seconds_high - row.seconds]]
        if np.isfinite(ends).all():
            panel.errorbar(at, row.seconds, np.clip(ends, 0, None), color=tasks.FAMILIES[row.kind].colour, capsize=3)
    _label(panel, here, pairs, places)


def _label(panel: Axes, here: pd.DataFrame, pairs: pd.DataFrame, places: dict[str, float]) -> None:
    """The factor between the two points of a task: above, below or beside them."""

    def inches(problem: str, seconds: Any) -> np.ndarray:
        at = np.column_stack(np.broadcast_arrays(places[problem], seconds))
        return panel.transData.transform(at) / panel.figure.dpi

    ends = here[["seconds", "seconds_low", "seconds_high"]].itertuples(index=False)
    taken = [tuple(at) for name, own in zip(here["problem"], ends, strict=True) for at in inches(name, own)]
    taken = [at for at in taken if np.isfinite(at).all()]
    for row in pairs.itertuples():
        line = np.geomspace(row.seconds, row.seconds_estimated, 12)
        taken += [tuple(at) for at in inches(row.problem, line)]
    for row in pairs.itertuples():
        sign = (LEAST if row.pays else MOST) if row.at_most_estimated else ""
        words = f"{sign}{max(row.ratio, 1 / row.ratio):.2g}\N{MULTIPLICATION SIGN}{'' if row.sure else '?'}"
        (x, low), (_, high) = inches(row.problem, sorted([row.seconds, row.seconds_estimated]))
        side, middle = 0.04 * len(words) + 0.1, (low + high) / 2
        tasks.label(panel, words, [(x, high + 0.16), (x, low - 0.16), (x - side, middle), (x + side, middle)], taken)


def _mark(kind: str, at_most: bool = False) -> dict[str, Any]:
    """Keywords for a point; approximate methods, whose error is fixed, are hollow, and upper bounds point down."""
    style = tasks.FAMILIES[kind].line("jax" if kind == "approximate" else "torch") | {"linestyle": ""}
    return style | ({"marker": "v"} if at_most else {})


def _key(best: pd.DataFrame) -> key.Key:
    words = {"exact": "fastest exact method", "approximate": "fastest approximate", "stochastic": "fastest estimate"}
    entries: list[key.Entry] = [
        (Line2D([], [], **_mark(kind)), f"{text}: {(best['kind'] == kind).sum()} tasks")
        for kind, text in words.items()
        if kind in set(best["kind"])
    ]
    if bounds := best["at_most"].sum():
        entries.append((Line2D([], [], **_mark("stochastic", True)), f"at most, an upper bound: {bounds} tasks"))
    lines: list[key.Entry] = [
        (Line2D([], [], color=tasks.FAMILIES["stochastic"].colour), "the estimate is faster"),
        (Line2D([], [], color=tasks.FAMILIES["exact"].colour), "exact is faster"),
    ]
    return [("to a median error of 1 %", entries), ("a task with both, and the factor", lines)]


def _crossing(pairs: pd.DataFrame) -> float:
    """The n above which estimates are faster, by a power law of the ratio; 0 if the pairs do not determine it.

    Ratios to upper bounds are left out.
    """
    pairs = pairs[~pairs["at_most_estimated"]]
    if len(pairs) < 4 or pairs["n"].nunique() < 3 or pairs["pays"].nunique() < 2:
        return 0.0
    slope, half = curves.slope(list(pairs["n"]), list(pairs["ratio"]))
    if not slope > half:
        return 0.0
    x, y = np.log(pairs["n"]), np.log(pairs["ratio"])
    found = math.exp(x.mean() - y.mean() / slope)
    return found if pairs["n"].min() <= found <= pairs["n"].max() else 0.0


def _counts(pairs: pd.DataFrame) -> tuple[int, int, int]:
    """Numbers of tasks on which estimating surely pays, on which exact surely wins, and on which neither is sure."""
    pays, wins = int((pairs["sure"] & pairs["pays"]).sum()), int((pairs["sure"] & ~pairs["pays"]).sum())
    return pays, wins, len(pairs) - pays - wins


def _finding(pairs: pd.DataFrame) -> str:
    if not len(pairs):
        return "no task has both kinds"
    pays, wins, undecided = _counts(pairs)
    won = f"estimates win {pays}, exact {wins}, undecided {undecided}"
    if crossing := _crossing(pairs):
        return f"{won}; crossing at n = {labels.count_label(crossing)}"
    return won


def _title(pairs: pd.DataFrame) -> str:
    if not len(pairs):
        return "Where estimating begins to pay: no task has an exact value and an estimate to a median error of 1 %"
    (pays, wins, undecided), sure = _counts(pairs), pairs.loc[pairs["sure"], "ratio"]
    text = f"To 1 %, estimating surely pays on {pays} of {len(pairs)} tasks"
    if pays:
        more = " or more" if pairs.loc[sure.idxmax(), "at_most_estimated"] else ""
        text += f" (by up to {labels.rounded(sure.max())}\N{MULTIPLICATION SIGN}{more})"
    text += f", exact on {wins}"
    text += f" (by up to {labels.rounded(1 / sure.min())}\N{MULTIPLICATION SIGN})" if wins else ""
    return f"{text}, undecided on {undecided}"


def _caption(best: pd.DataFrame, known: pd.DataFrame) -> str:
    pairs = _pairs(best)
    tried = known.drop_duplicates(tasks.TASK[:3])
    text = (
        "Seconds of the fastest exact method and of the fastest estimate with a median error of 1 %, with 95 % bands; "
        "? where bands overlap or are not bounded. Approximate methods are hollow. "
    )
    if bounds := best["at_most"].sum():
        text += f"Triangles ({bounds}): upper bounds. "
    unsolved = len(tried) - len(best[best["kind"] != "approximate"].drop_duplicates(tasks.TASK))
    return text + f"{len(pairs)} of {len(tried)} tasks have both, {unsolved} neither."
