"""The front: the least time in which any method reaches an accuracy, and which method that is."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks

LADDER = {f"{error:.3g}": error for error in np.geomspace(0.3, 1e-6, 23)}
"""Tolerances of the median relative error, by what they are called in the CSV."""
COLUMNS = 3
CASE = ["metric", "problem", "setting"]


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each metric and problem: the front over all methods, and behind it all that was measured."""
    front = fronts(table)
    alone = front.groupby(CASE)["method"].transform("nunique") == 1
    front, single = (front, 0) if alone.all() else (front[~alone], len(front[alone].drop_duplicates(CASE)))
    if not len(front):
        return base.nothing(front, f"Nothing was measured.\n{labels.why_not(table)}")
    points = base.measured(table, "seconds", "error")
    style = {m: look for m, look in styles.looks(table).items() if m in set(front["method"])}
    used = {m: styles.backends_in(front[front["method"] == m]) for m in style}
    backends = key.backend_entries(styles.backends_in(front), linestyle=False)
    order = {metric: i for i, metric in enumerate(base.metrics_in(front))}
    cases = sorted(front.groupby(CASE, sort=False), key=lambda item: (order[item[0][0]], item[1]["n"].iloc[0]))
    rows = canvas.in_rows(cases, COLUMNS)
    figure, grid = canvas.sheet(
        [canvas.Row(2.0, above=0.6, below=0.35) for _ in rows],
        min(COLUMNS, len(rows[0])),
        title="The least time for an accuracy, over all methods",
        subtitle=base.settings_line(table),
        key=[*key.method_entries(style.values(), used), ("backend", backends)],
    )
    y = canvas.limits(front["seconds"])
    for panels, row in zip(grid, rows, strict=True):
        canvas.hide(panels[len(row) :])
        panels[0].set_ylabel("seconds")
        for panel, ((metric, problem, setting), line) in zip(panels, row, strict=False):
            name = f"{labels.case_label(problem, setting)}:  {labels.sizes_label(line, 'n', 'P')}"
            canvas.title(panel, labels.metric_label(metric), name)
            here = points[
                (points["metric"] == metric) & (points["problem"] == problem) & (points["setting"] == setting)
            ]
            panel.plot(
                here["error"].clip(lower=1e-6), here["seconds"], "o", color=canvas.PALE, markersize=2.5, zorder=1
            )
            panel.plot(line["error_allowed"], line["seconds"], color=canvas.PALE, linewidth=1.2, zorder=2)
            for (method, backend), part in line.groupby(["method", "backend"], sort=False):
                drawn = style[method].line(backend) | {"linestyle": ""}
                panel.plot(part["error_allowed"], part["seconds"], **drawn, zorder=3)
                ends = part["seconds_low"], part["seconds_high"].fillna(y[1])
                panel.vlines(part["error_allowed"], *ends, color=style[method].colour, linewidth=0.8, zorder=2.5)
            panel.set(xscale="log", yscale="log", xlim=(0.6, 0.6e-6), ylim=y, xlabel="relative error allowed")
            canvas.decades(panel.xaxis, 1e-6, 0.5)
            canvas.decades(panel.yaxis, *y)
            panel.tick_params(labelleft=panel is panels[0])
    return base.Drawing(figure, front, _caption(front, single))


def fronts(table: pd.DataFrame) -> pd.DataFrame:
    """The fastest method of each metric, problem and tolerance."""
    solved = tasks.solutions(table, LADDER)
    best = solved.loc[solved.groupby(tasks.TASK, sort=False)["seconds"].idxmin()]
    return best.assign(error_allowed=best["tolerance"].map(LADDER)).sort_values(
        ["metric", "n", "problem", "setting", "error_allowed"], ascending=[True, True, True, True, False]
    )


def _caption(front: pd.DataFrame, single: int) -> str:
    counts = front.groupby("title").size().sort_values(ascending=False)
    most = "; ".join(f"{title} {count / len(front):.0%}" for title, count in counts.head(4).items())
    sure = (front["fastest"] >= 0.95).mean()
    text = (
        "The least time of any method whose median relative error is what is allowed, from 30 % on the left to 1e-6 "
        f"on the right, with the colour and marker of the method; pale dots are all that was measured. {tasks.RULE} "
        "Bars are 95 % bands; one up to the edge is not bounded by what was measured. Where the front ends nothing "
        "measured is as accurate. Only methods that the "
        f"configuration gives a problem take part. Share of the front: {most}. At {sure:.0%} of its points the method "
        "is the fastest in at least 95 % of the bootstrap's reruns."
    )
    return text + (f" {single} fronts on which one method is the fastest throughout have no panel." if single else "")
