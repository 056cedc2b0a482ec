"""Hazelden 2025, figure 1: the speed-up of an estimated trace over an exact one, at equal accuracy."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.lines import Line2D

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
ONE_SIDED = {"one_sided_paper_reverse": "n", "one_sided_paper_forward": "P"}
"""The one-sided estimators, and the column with the dimension of their probes."""
QUARTILE = 0.6745
"""Median of |x| for a standard normal x."""
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
    dashed = Line2D([], [], color="black", linewidth=1.0, linestyle="--")
    theory = [(dashed, "theory, one-sided")] * bool(plotted["theory"].notna().any())
    figure, grid = canvas.sheet(
        [canvas.Row(1.9, above=0.55, below=0.42) for _ in baselines],
        len(networks),
        title=_title(plotted),
        subtitle=base.settings_line(table),
        key=[("method", curves.entries(looks.values())), ("how to read", [curves.BAND, curves.PUBLISHED, *theory])],
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
            for method, line in rows.dropna(subset="theory").groupby("method", sort=False):
                panel.plot(
                    line["inaccuracy"], line["theory"], color=looks[method].colour, linewidth=1.0, linestyle="--"
                )
            for method, line in rows.dropna(subset="speedup").groupby("method", sort=False):
                ends = line["speedup_low"].fillna(panel.get_ylim()[0]), line["speedup_high"]
                panel.fill_between(line["inaccuracy"], *ends, color=looks[method].colour, alpha=0.15, linewidth=0)
            panel.axhline(1, color="black", linewidth=0.8, zorder=1)
            panel.set_xlim(1.4e-2, 0.7e-5)
            panel.set(xlabel="1 \N{MINUS SIGN} accuracy", ylabel="times faster")
    return base.Drawing(figure, plotted, CAPTION, _claims(table, plotted))


def _title(plotted: pd.DataFrame) -> str:
    """Speed-ups of the best estimate at the lowest accuracy: the range over baselines, by network."""
    said = []
    for network, rows in plotted[plotted["inaccuracy"] == ACCURACIES[0]].dropna(subset="speedup").groupby("network"):
        best = rows.groupby("baseline")["speedup"].max()
        said.append(f"{str(network).upper()} {labels.span(best)}\N{MULTIPLICATION SIGN}")
    if not said:
        return "Speed-up of estimates of a trace at equal accuracy (Hazelden, figure 1)"
    return f"Best estimate of a trace to 99 % over exact methods: {', '.join(said)} (Hazelden, figure 1)"


def speedups(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each network, method, baseline and accuracy: times of the baseline over those of the method.

    The method's time is where the law of its errors, fitted to all numbers of samples and ``seeds`` estimates, crosses
    the accuracy; nothing is extrapolated. The 95 % band includes the spread of both times; its low end is ``nan`` if
    the budgets may not reach the accuracy. ``theory`` is the speed-up of a one-sided estimate at the passes that its
    variance requires, with the measured seconds of that many passes.
    """
    rows = []
    points = base.measured(table, "seconds")
    points = points[points["network"].isin(NETWORKS)]
    typical = laws.typical_spread(points) if len(points) else 0.0
    fitted = laws.fits(base.measured(points[points["method"].isin(HAZELDEN)], "error", "passes"), ["network", "method"])
    for network, here in points.groupby("network", sort=False):
        for number, baseline in enumerate(BASELINES):
            exact = here[here["method"] == baseline].head(1)
            if not len(exact):
                continue
            seconds, share, calls = exact[["seconds", "share", "calls"]].iloc[0]
            times = laws.fit(exact.fillna({"error": laws.FLOOR}), number, typical=typical).times[:, 0]
            for method in HAZELDEN:
                if (network, method) not in fitted:
                    continue
                law, own = fitted[network, method], here[here["method"] == method]
                row = {"network": network, "problem": here["problem"].iloc[0], "method": method}
                row |= {"title": own["title"].iloc[0], "seeds": own["seeds"].sum(), "baseline": baseline}
                row |= {"baseline_seconds": seconds, "baseline_share": share, "baseline_calls": calls}
                for inaccuracy in ACCURACIES:
                    budgets = law.budgets(inaccuracy)
                    own_times = law.seconds(budgets)
                    slower = laws.banded(own_times / times)  # infinite where a rerun does not reach the accuracy
                    row |= {"inaccuracy": inaccuracy, "passes": budgets[0], "seconds": own_times[0]}
                    row |= {"speedup": 1 / slower[0], "speedup_low": 1 / slower[2], "speedup_high": 1 / slower[1]}
                    rows.append(row | {"theory": _by_theory(law, own, inaccuracy, seconds)})
    columns = ["network", "problem", "method", "title", "baseline", "baseline_seconds", "baseline_share"]
    columns += ["baseline_calls", "inaccuracy", "passes", "seeds", "seconds", "speedup", "speedup_low", "speedup_high"]
    return pd.DataFrame(rows, columns=[*columns, "theory"])


def _by_theory(law: laws.Law, own: pd.DataFrame, inaccuracy: float, seconds: float) -> float:
    """The speed-up that theory gives; ``nan`` for other estimators, and outside of the measured passes.

    The relative variance of m passes is 2 v (1 - 2 q / dim) / (m - q) with q = m / 6, where v is ``off_diagonal`` of
    :mod:`ntkbench.studies.hazelden_trace`. The median error is 0.6745 standard deviations.
    """
    method = own["method"].iloc[0]
    if method not in ONE_SIDED or "off_diagonal" not in own:
        return np.nan
    without_basis = 2.4 * own["off_diagonal"].iloc[0] * (QUARTILE / inaccuracy) ** 2
    passes = without_basis / (1 + without_basis / (3 * own[ONE_SIDED[method]].iloc[0]))
    if not law.passes[0] <= passes <= law.passes[-1]:
        return np.nan
    return float(seconds / np.exp(np.interp(np.log(passes), np.log(law.passes), np.log(law.times[0]))))


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
    rows = rows[rows["inaccuracy"] == inaccuracy]
    theory = rows.loc[rows["baseline"] == "direct_one_by_one", "theory"].max()
    rows = rows[rows["speedup"].notna()]
    fastest = rows.loc[rows.groupby("baseline", sort=False)["speedup"].idxmax()].set_index("baseline")
    best = fastest["baseline_seconds"].idxmin() if len(fastest) > 1 else ""
    one_by_one = "direct_one_by_one" in fastest.index
    of_it = table[table["network"] == network]
    note = "the baseline was not measured" if len(fastest) else "no number of samples reached this accuracy"
    if one_by_one:
        share, calls = fastest.loc["direct_one_by_one", ["baseline_share", "baseline_calls"]]
        note = f"by {fastest.loc['direct_one_by_one', 'title']}, the fastest of the three"
        if np.isfinite(theory):
            note += f"; {labels.rounded(theory, 3)} times by theory for one-sided estimates"
        note += (
            f"; the baseline: {calls:g} call{'' if calls == 1 else 's'} on {labels.share_label(share)} of its columns"
        )
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
        runs=int(fastest.loc["direct_one_by_one", "seeds"]) if one_by_one else 0,
        of="estimates",
        unit="times",
        best=_interval(fastest.loc[best]) if best and best != "direct_one_by_one" else claims.UNKNOWN,
        best_title=BASELINES.get(best, ""),
        note=note,
    )


def _interval(row: pd.Series) -> claims.Interval:
    return float(row["speedup"]), float(row["speedup_low"]), float(row["speedup_high"])
