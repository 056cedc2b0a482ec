"""Hazelden 2025, figure 1: how much faster than an exact trace an estimate is, at equal accuracy."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base, canvas, curves, labels, sources
from ntkbench.figures.plotting.sources import HAZELDEN
from ntkbench.figures.plotting.styles import BLACK

TABLE = "hazelden_trace"
COLUMNS = ("problem", "network", "method", "title", "m", "n", "P", "seconds", "error", "share")
BASELINES = {
    "direct_one_by_one": "direct, a column at a time",
    "direct": "direct, columns in blocks",
    "structured_derivatives": "structured derivatives",
}
NETWORKS = ("mlp", "gru")
ACCURACIES = np.geomspace(1e-2, 1e-5, 20)
"""One less the accuracies of the paper's axis, 99 % to 99.999 %."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each baseline, a column for each network."""
    plotted = speedups(table)
    if not plotted["speedup"].notna().any():
        return base.nothing(plotted, "No estimate reached 99 % beside a measured baseline.")
    looks = {name: look for name, look in curves.looks(table).items() if name in set(plotted["method"])}
    networks = [name for name in NETWORKS if name in set(plotted["network"])]
    baselines = [name for name in BASELINES if plotted.loc[plotted["baseline"] == name, "speedup"].notna().any()]
    figure, grid = canvas.sheet(
        [canvas.Row(1.9, above=0.55, below=0.42) for _ in baselines],
        len(networks),
        title="Speed-up at equal accuracy (Hazelden, figure 1)",
        subtitle=base.settings_line(table),
        key=[("method", curves.entries(looks.values())), ("how to read", [curves.PUBLISHED])],
        gap=0.8,
    )
    for panels, baseline in zip(grid, baselines, strict=True):
        for panel, network in zip(panels, networks, strict=True):
            rows = plotted[(plotted["network"] == network) & (plotted["baseline"] == baseline)]
            if not len(rows):
                canvas.hide([panel])
                continue
            there = sources.values("hazelden_figures", figure="speedup", problem=network)
            there = there if baseline == "direct_one_by_one" else there.iloc[:0]
            seconds = rows["baseline_seconds"].iloc[0]
            name = labels.name_label(rows["problem"].iloc[0])
            canvas.title(
                panel, f"over {BASELINES[baseline]}", f"{name}: {labels.rounded(seconds, 3)} s" + _extrapolated(rows)
            )
            for method, line in rows.groupby("method", sort=False):
                curves.line(panel, line, "inaccuracy", "speedup", looks[method])
            curves.published(panel, there, BLACK)
            curves.logarithmic(panel, ACCURACIES, [1.0, *rows["speedup"], *there["y"]])
            panel.axhline(1, color="black", linewidth=0.8, zorder=1)
            panel.set_xlim(1.4e-2, 0.7e-5)
            panel.set(xlabel="1 \N{MINUS SIGN} accuracy", ylabel="times faster")
    return base.Drawing(figure, plotted, _caption(plotted))


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each network, method, baseline and accuracy: times of the baseline over the least time that reached it.

    Nothing is interpolated: only numbers of samples that were measured count, by their median error.
    """
    rows = []
    points = base.measured(table, "seconds")
    points = points[points["network"].isin(NETWORKS)]
    for network, here in points.groupby("network", sort=False):
        for baseline in BASELINES:
            exact = here[here["method"] == baseline]
            if not len(exact):
                continue
            seconds, share = exact[["seconds", "share"]].iloc[0]
            for method in HAZELDEN:
                mine = here[here["method"] == method]
                for inaccuracy in ACCURACIES if len(mine) else ():
                    best = mine.loc[mine["error"] <= inaccuracy, "seconds"].min()
                    row = {"network": network, "problem": here["problem"].iloc[0], "method": method}
                    row |= {"baseline": baseline, "baseline_seconds": seconds, "baseline_share": share}
                    rows.append(row | {"inaccuracy": inaccuracy, "seconds": best, "speedup": seconds / best})
    columns = ["network", "problem", "method", "baseline", "baseline_seconds", "baseline_share", "inaccuracy"]
    return pd.DataFrame(rows, columns=[*columns, "seconds", "speedup"])


def _extrapolated(rows: pd.DataFrame) -> str:
    share = rows["baseline_share"].iloc[0]
    return f", from {labels.share_label(share)} of its columns" if share < 1 else ""


def _caption(plotted: pd.DataFrame) -> str:
    text = (
        "Time of an exact trace over that of the fastest estimate whose median error is within 1 - accuracy, of the "
        "numbers of samples that were measured; where no mark is, none was. The baselines: Theta column by column, one "
        "product at a time as in the paper's script, or in blocks (where the panel says so a share of the columns was "
        "timed and the rest extrapolated), and the exact trace by layers, which is not in the paper. Crosses are the "
        "published values."
    )
    said, far, gains, number = [], [], [], labels.rounded
    for network in dict.fromkeys(plotted["network"]):
        rows = plotted[(plotted["network"] == network) & (plotted["inaccuracy"] == ACCURACIES[0])]
        ours = {b: rows.loc[rows["baseline"] == b, "speedup"].max() for b in BASELINES}
        there = sources.values("hazelden_figures", figure="speedup", problem=network)["y"].iloc[0]
        first = ours["direct_one_by_one"]
        if not np.isfinite(first):
            continue
        words = f"{network.upper()} at 99 %: {number(first)} times here, {number(there)} published"
        if np.isfinite(ours["direct"]):
            words += f", {number(ours['direct'])} times against blocks"
            gains.append(first / ours["direct"])
        if np.isfinite(ours["structured_derivatives"]):
            words += f", {number(ours['structured_derivatives'])} times against the exact trace by layers"
        said.append(words)
        far.append(not 0.1 < first / there < 10)
    if not said:
        return f"{text} Nothing was measured against a column at a time."
    text += f" {'; '.join(said)}."
    verdict = "What does not agree" if any(far) else "What agrees within a factor of ten"
    text += f" {verdict}: the speed-up against a column at a time, which depends on the machine."
    if gains:
        text += (
            f" What does not: how much of it is the estimate's. Blocks alone make direct {curves.ratio_words(gains)} "
            "times faster, and an exact trace without columns leaves what the lowest panels show."
        )
    return text
