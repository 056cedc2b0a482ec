"""Hazelden 2025, figure 4: squared norm, alignment and effective rank of a trained network, error against runtime."""

from __future__ import annotations

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources
from ntkbench.measure import laws

TABLE = "hazelden_metrics"
COLUMNS = ("problem", "metric", "method", "title", "m", "n", "P", "share", *laws.COLUMNS)
METRICS = {"norm": "squared_norm", "alignment": "alignment", "effective_rank": "effective_rank"}
BASELINES = {"direct": "direct, in blocks", "direct_one_by_one": "direct, a column at a time"}


def draw(table: pd.DataFrame) -> base.Drawing:
    """A column for each metric, a row for each baseline."""
    plotted = shares(table)
    if not len(plotted):
        return base.nothing(plotted, labels.why_not(table))
    looks = {name: look for name, look in curves.looks(table).items() if name in set(plotted["method"])}
    metrics = [metric for metric in METRICS if metric in set(plotted["metric"])]
    baselines = [name for name in BASELINES if name in set(plotted["baseline"])]
    figure, grid = canvas.sheet(
        [canvas.Row(2.2, above=0.55, below=0.42) for _ in baselines],
        len(metrics),
        title=f"Related metrics (Hazelden, figure 4): {labels.name_label(plotted['problem'].iloc[0])}",
        subtitle=base.settings_line(table),
        key=[
            ("method", curves.entries(looks.values())),
            ("how to read", [curves.QUARTILES, curves.PUBLISHED]),
        ],
        gap=0.75,
    )
    for panels, baseline in zip(grid, baselines, strict=True):
        for panel, metric in zip(panels, metrics, strict=True):
            rows = plotted[(plotted["metric"] == metric) & (plotted["baseline"] == baseline)]
            there = sources.values("hazelden_figures", figure="related_terms", series=METRICS[metric])
            canvas.title(panel, METRICS[metric].replace("_", " "), f"runtime of {BASELINES[baseline]}")
            for method, line in rows.groupby("method", sort=False):
                curves.line(panel, line, "percent", "error", looks[method])
            curves.published(panel, there, "black")
            curves.logarithmic(
                panel,
                [*rows["percent"], *there["x"]],
                [*rows[["error", "error_q25", "error_q75"]].stack(), *there["y"]],
            )
            panel.set(xlabel="runtime, % of direct", ylabel="relative error")
    return base.Drawing(figure, plotted, _caption(table, plotted))


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """The estimates once for each baseline, their runtime in percent of it."""
    points = base.measured(table, "seconds")
    estimates = points[~points["method"].isin(BASELINES)].drop(columns="share")
    exact = points.loc[points["method"].isin(BASELINES), ["metric", "method", "seconds", "share"]]
    exact = exact.rename(columns={"method": "baseline", "seconds": "baseline_seconds", "share": "baseline_share"})
    both = estimates.merge(exact, on="metric")
    both["percent"] = 100 * both["seconds"] / both["baseline_seconds"]
    kept = ["problem", "metric", "method", "m", "baseline", "baseline_seconds", "baseline_share", "percent", "seconds"]
    return both[[*kept, "error", "error_q25", "error_q75"]]


def _caption(table: pd.DataFrame, plotted: pd.DataFrame) -> str:
    share = plotted["baseline_share"].min()
    on_mnist = "mnist" in plotted["problem"].iloc[0]
    data = "9,000 images of MNIST's test file" if on_mnist else "scikit-learn's digits (MNIST was not to be had)"
    timed = f"timed on {labels.share_label(share)} of its columns and extrapolated" if share < 1 else "timed in full"
    text = (
        "Relative errors of ||Theta||_F^2, alignment and effective rank of a ReLU network with two hidden layers of "
        f"256, trained on {data}, against the runtime in percent of direct's, {timed}: products with Theta for every "
        "basis vector, in blocks (above) and one at a time as the script has them (below). Medians over reruns with "
        "quartiles. Hutch++ takes a trace of its own for each of Theta^2, Theta_f^2 and Theta Theta_f; shared probes "
        "serve all three. Crosses are published, on MNIST."
    )
    best: list[str] = []
    errors: dict[str, np.ndarray] = {}
    points = base.measured(table, "seconds", "error", "passes")
    for metric, series in METRICS.items():
        rows = plotted[(plotted["metric"] == metric) & (plotted["baseline"] == "direct")]
        there = sources.values("hazelden_figures", figure="related_terms", series=series)
        rows = rows[rows["method"] == "hutchpp_paper"]
        mine = points[(points["metric"] == metric) & (points["method"] == "hutchpp_paper")]
        if len(rows) and len(mine):
            errors[metric] = laws.fit(mine, len(errors)).error(mine["passes"].max())
            words = f"{series.replace('_', ' ')} {_interval(errors[metric])} at {rows['percent'].max():.2g} %"
            best.append(f"{words} (published {there['y'].min():.1g} at {there['x'].max():.2g} %)")
    seeds = labels.range_label(points["seeds"])
    text += (
        f" Errors of Hutch++ with the most samples, 95 % bands ({seeds} seeds at a budget), in percent of direct's "
        f"time in blocks: {'; '.join(best)}."
    )
    if len(errors) == len(METRICS):
        hard, *others = (errors[name] for name in ("effective_rank", "norm", "alignment"))
        times, low, high = laws.banded(hard / np.maximum(*others))
        verdicts = "it is not here", "it is here", "these seeds do not tell"
        text += (
            " Claim: the effective rank is the hardest of the three. Measured: its error is "
            f"{labels.interval_label(times, low, high)} times the larger of the others. Conclusion: "
            f"{claims.compared(low, high, verdicts)}."
        )
    text += claims.shared_probes(points, "hutchpp_paper")
    return text + " Percentages need not agree: they are as much the baseline's, and the data and its rank are others."


def _interval(draws: np.ndarray) -> str:
    return labels.interval_label(*laws.banded(draws))
