"""Performance profiles: the share of tasks that a method solves within a factor of the fastest."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, PercentFormatter

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks

FACTORS = np.geomspace(1, 1000, 121)
TOLD_APART = 6
"""Number of a panel's highest lines that have their method's colour and marker; the others are low and overlap."""
LINE = ["tolerance", "method", "backend"]
PALE: dict[str, Any] = {"color": canvas.PALE, "linewidth": 0.8}


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each tolerance."""
    solved = tasks.solutions(table)
    names = [name for name in tasks.TOLERANCES if name in set(solved["tolerance"])]
    if not names:
        return base.nothing(solved, f"Nothing was measured.\n{labels.why_not(table)}")
    profiles = pd.concat(
        [tasks.shares(solved[solved["tolerance"] == name], FACTORS).assign(tolerance=name) for name in names]
    )
    profiles["told_apart"] = highest(profiles)
    apart = profiles[profiles["told_apart"]]
    style = {m: look for m, look in styles.looks(table).items() if m in set(apart["method"])}
    used = {m: styles.backends_in(apart[apart["method"] == m]) for m in style}
    reading = key.backend_entries(styles.backends_in(apart))
    if not profiles["told_apart"].all():
        reading.append((Line2D([], [], **PALE), f"below a panel's {TOLD_APART} highest"))
    rows = canvas.in_rows(names, 2)
    figure, grid = canvas.sheet(
        [canvas.Row(2.6, above=0.55, below=0.42) for _ in rows],
        min(2, len(names)),
        title=_title(profiles),
        subtitle=base.settings_line(table),
        key=[*key.method_entries(style.values(), used), ("how to read", reading)],
        gap=0.3,
    )
    for panels, row in zip(grid, rows, strict=True):
        canvas.hide(panels[len(row) :])
        panels[0].set_ylabel("share of tasks")
        for panel, name in zip(panels, row, strict=False):
            here = profiles[profiles["tolerance"] == name]
            words = "exact methods" if name == "exact" else f"within {name}"
            bounds = solved.loc[solved["tolerance"] == name, "at_most"]
            detail = f"; {bounds.sum()} of {len(bounds)} times are upper bounds" if bounds.any() else ""
            canvas.title(panel, words, f"{here['tasks'].iloc[0]} tasks{detail}")
            for (method, backend), line in here.groupby(["method", "backend"], sort=False):
                high = line["told_apart"].all()
                drawn = style[method].line(backend) | {"markevery": 15, "zorder": 3} if high else PALE
                panel.plot(line["factor"], line["share"], **drawn, drawstyle="steps-post", clip_on=False)
            panel.set(xscale="log", xlim=(0.9, 1.2 * FACTORS[-1]), ylim=(0, 1.02), xlabel="factor τ of the fastest")
            canvas.decades(panel.xaxis, 1, FACTORS[-1])
            panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            panel.yaxis.set_major_formatter(PercentFormatter(1.0))
            panel.tick_params(labelleft=panel is panels[0])
    return base.Drawing(figure, profiles, _caption(profiles, solved))


def highest(profiles: pd.DataFrame) -> np.ndarray:
    """Whether a row's line is among its tolerance's highest: by the mean over factors, evenly spaced in their log."""
    heights = profiles.groupby(LINE)["share"].mean()
    places = heights.groupby("tolerance").rank(ascending=False, method="first")
    return profiles[LINE].merge(places.le(TOLD_APART).rename("apart").reset_index(), on=LINE)["apart"].to_numpy()


def _title(profiles: pd.DataFrame) -> str:
    """The method that is most often the fastest, to 1 % or else the first tolerance."""
    name = "1 %" if "1 %" in set(profiles["tolerance"]) else profiles["tolerance"].iloc[0]
    firsts = profiles[(profiles["tolerance"] == name) & (profiles["factor"] == profiles["factor"].min())]
    top = firsts.loc[firsts["share"].idxmax()]
    words = "among exact methods" if name == "exact" else f"to {name}"
    title = labels.short(top["title"], 40)
    return f"Most often the fastest {words}: {title}, on {100 * top['share']:.0f} % of {top['tasks']:g} tasks"


def _caption(profiles: pd.DataFrame, solved: pd.DataFrame) -> str:
    text = (
        "A task is a metric of a problem within a tolerance of the median relative error. A line starts at the share "
        "of tasks on which the method is the fastest and ends at the share that it solves at all; tasks on which it "
        f"was not measured count as unsolved. {tasks.RULE} Exact: at most {tasks.TOLERANCES['exact']:g}, exact methods "
        "alone."
    )
    from scipy.stats import binomtest

    firsts = profiles[profiles["factor"] == profiles["factor"].min()]
    said = []
    for name, rows in firsts.groupby("tolerance", sort=False):
        top = rows.loc[rows["share"].idxmax()]
        count = int(top["tasks"])
        bounds = binomtest(round(top["share"] * count), count).proportion_ci(method="wilson")
        share = f"{top['share']:.0%} ({bounds.low:.0%} to {bounds.high:.0%}) of {count}"
        said.append(f"{name}: {top['title']} ({styles.TITLES.get(top['backend'], top['backend'])}), {share}")
    won = solved.loc[solved.groupby(tasks.TASK)["seconds"].idxmin(), "fastest"]
    return (
        f"{text} Most often the fastest, with Wilson's 95 % interval over tasks: {'; '.join(said)}. Undecided, by "
        f"bootstrap or beside an upper bound: {(won < tasks.SURE).sum()} of {len(won)}."
    )
