"""Which method to use: the fastest one by problem, metric and tolerance, problems in the order of their size."""

from __future__ import annotations

import pandas as pd
import seaborn as sns
from matplotlib.patches import Rectangle

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.units import seconds_label

HEIGHT = 0.27
"""Inches of a line."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A line for each problem and metric, a column for each tolerance, and the fastest method and its time in each."""
    chosen = tasks.winners(table)
    if not len(chosen):
        return base.nothing(chosen, f"Nothing was measured.\n{labels.why_not(table)}")
    style = {m: look for m, look in styles.looks(table).items() if m in set(chosen["method"])}
    used = {m: styles.backends_in(chosen[chosen["method"] == m]) for m in style}
    lines = list(dict.fromkeys(chosen[["metric", "problem", "setting"]].itertuples(index=False, name=None)))
    tolerances = list(tasks.TOLERANCES)
    names = [_name(chosen, *line) for line in lines]
    backends = key.backend_entries(styles.backends_in(chosen), linestyle=False)
    figure, grid = canvas.sheet(
        [canvas.Row(HEIGHT * len(lines), above=0.35, below=0.1)],
        1,
        title="Which method to use",
        subtitle=base.settings_line(table),
        key=[*key.method_entries(style.values(), used), ("backend", backends)],
        left=canvas.text_width(names, 8.5) + 0.3,
        widest=12,
    )
    panel = grid[0][0]
    panel.set(xlim=(0, len(tolerances)), ylim=(len(lines), 0))
    panel.grid(False)
    panel.set_yticks([i + 0.5 for i in range(len(lines))], labels=names, fontsize=8.5)
    words = ["exact" if name == "exact" else f"within {name}" for name in tolerances]
    panel.set_xticks([i + 0.5 for i in range(len(tolerances))], labels=words)
    panel.tick_params(length=0, labeltop=True, labelbottom=False)
    sns.despine(ax=panel, left=True, bottom=True)
    for row in chosen.itertuples():
        y, x = lines.index((row.metric, row.problem, row.setting)), tolerances.index(row.tolerance)
        look = style[row.method]
        panel.add_patch(Rectangle((x + 0.01, y + 0.06), 0.98, 0.88, color=look.colour, alpha=0.14, linewidth=0))
        panel.plot(x + 0.05, y + 0.5, **(look.line(row.backend) | {"linestyle": "", "markersize": 5}))
        lead = f", {row.lead:.2g}\N{MULTIPLICATION SIGN}" if row.lead == row.lead else ""
        mark = "" if row.fastest >= tasks.SURE else " ?"
        panel.text(x + 0.1, y + 0.52, f"{seconds_label(row.seconds)}{lead}{mark}", fontsize=8.5, va="center")
    for i in range(1, len(lines)):
        if lines[i][0] != lines[i - 1][0]:
            panel.axhline(i, color=canvas.PALE, linewidth=0.9)
    return base.Drawing(figure, chosen, _caption(chosen))


def _name(chosen: pd.DataFrame, metric: str, problem: str, setting: str) -> str:
    row = chosen[(chosen["problem"] == problem) & (chosen["setting"] == setting)].iloc[0]
    rank = f", rank {row['effective_rank']:.3g}" if row["effective_rank"] == row["effective_rank"] else ""
    sizes = (
        f"n {labels.count_label(row['n'])}, P {labels.count_label(row['P'])}, O {labels.count_label(row['O'])}{rank}"
    )
    return f"{metric.replace('_', ' ')}: {labels.case_label(problem, setting)} ({sizes})"


def _caption(chosen: pd.DataFrame) -> str:
    return (
        "For each metric and problem, from small to large n, the method that reaches the tolerance of the median "
        "relative error in the least time, this time, and by what factor the fastest other method there is slower. "
        f"{tasks.RULE} n is the size of Theta, P the number of parameters, O that of outputs a sample, rank the "
        "effective rank where the table tells it. An empty field: nothing measured is as accurate. Exact: at most "
        f"{tasks.TOLERANCES['exact']:g}, exact methods alone. Of {len(chosen)} tasks the fastest is so in at least "
        f"{100 * tasks.SURE:g} % of the bootstrap's reruns for {int((chosen['fastest'] >= tasks.SURE).sum())}; the "
        "others have a question mark, and the next method may be as fast."
    )
