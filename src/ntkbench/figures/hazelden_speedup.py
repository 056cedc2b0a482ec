"""Hazelden 2025, figure 1: the speed-up of an estimated trace over an exact one, at equal accuracy."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources
from ntkbench.figures.plotting.sources import HAZELDEN
from ntkbench.figures.plotting.styles import BLACK
from ntkbench.measure import laws

TABLE = "hazelden_trace"
COLUMNS = ("problem", "network", "method", "title", "m", "n", "P", "share", "calls", *laws.COLUMNS)
BASELINES = {
    "direct_one_by_one": "direct, a column at a time",
    "direct": "direct, columns in blocks",
    "structured_derivatives": "structured derivatives",
}
NETWORKS = ("mlp", "gru")
CAPTION = (
    "Time of an exact trace over that of an estimate with a median error of 1 - accuracy, by a fitted law with its "
    "95 % band. Rows are baselines: Theta column by column, one product at a time as in "
    "the paper's script or in blocks, and the exact trace by layers, not in the paper. Crosses: published."
)
ACCURACIES = np.geomspace(1e-2, 1e-5, 20)
"""One minus the accuracies on the paper's axis, 99 % to 99.999 %."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each baseline, a column for each network."""
    plotted = speedups(table)
    if not plotted["speedup"].notna().any():
        return base.nothing(plotted, "No estimate reached 99 % on a network with a measured baseline.")
    looks = {name: look for name, look in curves.looks(table).items() if name in set(plotted["method"])}
    networks = [name for name in NETWORKS if name in set(plotted["network"])]
    baselines = [name for name in BASELINES if plotted.loc[plotted["baseline"] == name, "speedup"].notna().any()]
    figure, grid = canvas.sheet(
        [canvas.Row(1.9, above=0.55, below=0.42) for _ in baselines],
        len(networks),
        title=_title(plotted),
        subtitle=base.settings_line(table),
        key=[("method", curves.entries(looks.values())), ("how to read", [curves.BAND, curves.PUBLISHED])],
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
            for method, line in rows.dropna(subset="speedup").groupby("method", sort=False):
                ends = line["speedup_low"].fillna(panel.get_ylim()[0]), line["speedup_high"]
                panel.fill_between(line["inaccuracy"], *ends, color=looks[method].colour, alpha=0.15, linewidth=0)
            panel.axhline(1, color="black", linewidth=0.8, zorder=1)
            panel.set_xlim(1.4e-2, 0.7e-5)
            panel.set(xlabel="1 \N{MINUS SIGN} accuracy", ylabel="times faster")
    return base.Drawing(figure, plotted, CAPTION, _claims(table, plotted))


def _title(plotted: pd.DataFrame) -> str:
    """Speed-ups of the best estimate at the lowest accuracy, over a column at a time and over the best exact method."""
    said = []
    for network, rows in plotted[plotted["inaccuracy"] == ACCURACIES[0]].dropna(subset="speedup").groupby("network"):
        best = rows.groupby("baseline")["speedup"].max()
        said.append(f"{str(network).upper()} {labels.span(best)}\N{MULTIPLICATION SIGN}")
    if not said:
        return "Speed-up of estimates of a trace at equal accuracy (Hazelden, figure 1)"
    return f"Best estimate of a trace to 99 % over exact methods: {', '.join(said)} (Hazelden, figure 1)"


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each network, method, baseline and accuracy: times of the baseline over those of the method.

    The method's time is where the law of its errors crosses the accuracy, with a 95 % band, from all numbers of samples
    and ``seeds`` estimates; nothing is extrapolated.
    """
    rows = []
    points = base.measured(table, "seconds")
    points = points[points["network"].isin(NETWORKS)]
    fitted = laws.fits(base.measured(points[points["method"].isin(HAZELDEN)], "error", "passes"), ["network", "method"])
    for network, here in points.groupby("network", sort=False):
        for baseline in BASELINES:
            exact = here[here["method"] == baseline]
            if not len(exact):
                continue
            seconds, share = exact[["seconds", "share"]].iloc[0]
            for method in HAZELDEN:
                if (network, method) not in fitted:
                    continue
                seeds = here.loc[here["method"] == method, "seeds"].sum()
                for inaccuracy in ACCURACIES:
                    found = fitted[network, method].reached(inaccuracy)
                    row = {"network": network, "problem": here["problem"].iloc[0], "method": method, "seeds": seeds}
                    row |= {"title": here.loc[here["method"] == method, "title"].iloc[0], "inaccuracy": inaccuracy}
                    row |= {"baseline": baseline, "baseline_seconds": seconds, "baseline_share": share}
                    row |= {"passes": found.passes, "seconds": found.seconds, "speedup": seconds / found.seconds}
                    rows.append(
                        row | {"speedup_low": seconds / found.seconds_high, "speedup_high": seconds / found.seconds_low}
                    )
    columns = ["network", "problem", "method", "title", "baseline", "baseline_seconds", "baseline_share", "inaccuracy"]
    columns += ["passes", "seeds", "seconds", "speedup", "speedup_low", "speedup_high"]
    return pd.DataFrame(rows, columns=columns)


def _extrapolated(rows: pd.DataFrame) -> str:
    share = rows["baseline_share"].iloc[0]
    return f", from {labels.share_label(share)} of its columns" if share < 1 else ""


def _claims(table: pd.DataFrame, plotted: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """The two ends of each curve of the paper: the fastest of the three estimators over a column at a time."""
    return tuple(
        _claim(table, plotted[plotted["network"] == network], network, accuracy)
        for network in dict.fromkeys(plotted["network"])
        for accuracy in (ACCURACIES[0], ACCURACIES[-1])
    )


def _claim(table: pd.DataFrame, rows: pd.DataFrame, network: str, inaccuracy: float) -> claims.Claim:
    there = sources.values("hazelden_figures", figure="speedup", problem=network)
    known = float(there["y"].iloc[(there["x"] - inaccuracy).abs().argmin()])
    percent = f"{100 * (1 - inaccuracy):g} %"
    rows = rows[(rows["inaccuracy"] == inaccuracy) & rows["speedup"].notna()]
    fastest = rows.loc[rows.groupby("baseline", sort=False)["speedup"].idxmax()].set_index("baseline")
    best = fastest["baseline_seconds"].idxmin() if len(fastest) > 1 else ""
    one_by_one = "direct_one_by_one" in fastest.index
    of_it = table[table["network"] == network]
    note = "the baseline was not measured" if len(fastest) else "no number of samples reached this accuracy"
    if one_by_one:
        share, calls = of_it.loc[of_it["method"] == "direct_one_by_one", ["share", "calls"]].iloc[0]
        note = f"by {fastest['title'].iloc[0]}, the fastest of the three; the interval leaves out the baseline, "
        note += f"{calls:g} call{'' if calls == 1 else 's'} on {labels.share_label(share)} of its columns"
    return claims.Claim(
        source="Hazelden 2025, figure 1",
        name=f"{network.upper()}, speed-up of a trace to {percent}",
        statement=f"a trace of the {network.upper()} to {percent} is estimated {labels.rounded(known, 3)} times faster "
        "than it is computed a column at a time",
        published=known,
        accuracy="read off a vector figure",
        there=f"the paper's {network.upper()}, an unnamed CPU",
        here=f"{labels.name_label(of_it['problem'].iloc[0])}, {labels.sizes_label(of_it, 'n', 'P')}",
        measured=_interval(fastest.loc["direct_one_by_one"]) if one_by_one else claims.UNKNOWN,
        runs=int(fastest["seeds"].iloc[0]) if len(fastest) else 0,
        of="estimates",
        spread="95 % interval of the estimate's time",
        unit="times",
        best=_interval(fastest.loc[best]) if best and best != "direct_one_by_one" else claims.UNKNOWN,
        best_title=BASELINES.get(best, ""),
        note=note,
    )


def _interval(row: pd.Series) -> claims.Interval:
    return float(row["speedup"]), float(row["speedup_low"]), float(row["speedup_high"])
