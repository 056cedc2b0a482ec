"""Hazelden 2025, figure 4: squared norm, alignment and effective rank of a trained network, error against runtime."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources
from ntkbench.measure import laws

TABLE = "hazelden_metrics"
COLUMNS = ("problem", "metric", "method", "title", "m", "n", "P", "share", *laws.COLUMNS)
METRICS = {"norm": "squared_norm", "alignment": "alignment", "effective_rank": "effective_rank"}
BASELINES = {"direct": "direct, in blocks", "direct_one_by_one": "direct, a column at a time"}


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each metric: errors against runtime in percent of one baseline, the published script's if timed."""
    plotted = shares(table)
    if not len(plotted):
        return base.nothing(plotted, labels.why_not(table))
    looks = {name: look for name, look in curves.looks(table).items() if name in set(plotted["method"])}
    metrics = [metric for metric in METRICS if metric in set(plotted["metric"])]
    claimed = _claims(table, plotted)
    figure, (panels,) = canvas.sheet(
        [canvas.Row(2.9, above=0.55, below=0.42)],
        len(metrics),
        title=_title(plotted),
        subtitle=base.settings_line(table),
        key=[
            ("method", curves.entries(looks.values())),
            ("how to read", [curves.QUARTILES, curves.PUBLISHED]),
        ],
        gap=0.75,
    )
    for panel, metric in zip(panels, metrics, strict=True):
        of_metric = plotted[plotted["metric"] == metric]
        baseline = _shown(of_metric)
        rows = of_metric[of_metric["baseline"] == baseline]
        there = sources.values("hazelden_figures", figure="related_terms", series=METRICS[metric])
        shift = _shift(of_metric)
        canvas.title(
            panel,
            METRICS[metric].replace("_", " "),
            f"in % of direct in blocks: {labels.rounded(shift)} times as much" if np.isfinite(shift) else "",
        )
        for method, line in rows.groupby("method", sort=False):
            curves.line(panel, line, "percent", "error", looks[method])
        curves.published(panel, there, "black")
        curves.logarithmic(
            panel,
            [*rows["percent"], *there["x"]],
            [*rows[["error", "error_q25", "error_q75"]].stack(), *there["y"]],
        )
        panel.set(xlabel=f"runtime, % of {BASELINES[baseline]}")
    panels[0].set_ylabel("relative error")
    return base.Drawing(figure, plotted, _caption(plotted), claimed)


def _shown(rows: pd.DataFrame) -> str:
    """The baseline to draw: that of the published script, a column at a time, if it was timed."""
    return next(name for name in reversed(BASELINES) if name in set(rows["baseline"]))


def _shift(rows: pd.DataFrame) -> float:
    """Seconds of the script's baseline over those in blocks, for one metric; ``nan`` if one was not timed."""
    seconds = rows.groupby("baseline")["baseline_seconds"].first()
    blocks = float(seconds.get("direct", np.nan))
    return float(seconds.get("direct_one_by_one", np.nan)) / blocks if blocks else math.nan


def _title(plotted: pd.DataFrame) -> str:
    """How the errors compare with those published."""
    found = {metric: _at_equal_share(plotted, metric) for metric in METRICS}
    said = [
        f"{METRICS[metric].replace('_', ' ')} {labels.rounded(claim.measured[0])}"
        for metric, claim in found.items()
        if claim is not None and np.isfinite(claim.measured[0])
    ]
    if not said:
        return f"Related metrics (Hazelden, figure 4): {labels.name_label(plotted['problem'].iloc[0])}"
    return f"Hutch++ errors over published ones, at equal share of direct's runtime: {', '.join(said)}"


def shares(table: pd.DataFrame) -> pd.DataFrame:
    """A row for each estimate and baseline, with the runtime in percent of the baseline's."""
    points = base.measured(table, "seconds")
    estimates = points[~points["method"].isin(BASELINES)].drop(columns="share")
    exact = points.loc[points["method"].isin(BASELINES), ["metric", "method", "seconds", "share"]]
    exact = exact.rename(columns={"method": "baseline", "seconds": "baseline_seconds", "share": "baseline_share"})
    both = estimates.merge(exact, on="metric")
    both["percent"] = 100 * both["seconds"] / both["baseline_seconds"]
    kept = ["problem", "metric", "method", "m", "baseline", "baseline_seconds", "baseline_share", "percent", "seconds"]
    return both[[*kept, "error", "error_q25", "error_q75"]]


def _caption(plotted: pd.DataFrame) -> str:
    share = plotted["baseline_share"].min()
    timed = f"timed on at least {labels.share_label(share)} of its columns" if share < 1 else "timed in full"
    return labels.fitted(
        f"Relative errors for a trained network ({labels.name_label(plotted['problem'].iloc[0])}) against runtime in "
        f"percent of direct, {timed}; medians over reruns with quartiles.",
        "Hutch++ takes a separate trace for each of Theta^2, Theta_f^2 and Theta Theta_f; shared probes serve all.",
        "Panels state the factor to direct in blocks.",
        "Crosses: published.",
    )


def _claims(table: pd.DataFrame, plotted: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """Errors at the same share of the runtime, the order of the three metrics, and shared probes."""
    points = base.measured(table, "seconds", "error", "passes")
    found = [*(_at_equal_share(plotted, metric) for metric in METRICS), _hardest(points)]
    return (*filter(None, found), *claims.shared_probes(points, "hutchpp_paper"))


def _at_equal_share(plotted: pd.DataFrame, metric: str) -> claims.Claim | None:
    """Errors of Hutch++ over those published, at the same percentage of the script's baseline."""
    rows = plotted[(plotted["metric"] == metric) & (plotted["baseline"] == "direct_one_by_one")]
    rows = rows[(rows["method"] == "hutchpp_paper") & (rows["error"] > 0) & rows["percent"].between(0, 1e9, "neither")]
    rows = rows.sort_values("percent")
    there = sources.values("hazelden_figures", figure="related_terms", series=METRICS[metric])
    if not len(rows):
        return None
    there = there[there["x"].between(rows["percent"].min(), rows["percent"].max())]
    ours = np.exp(np.interp(np.log(there["x"]), np.log(rows["percent"]), np.log(rows["error"])))
    name = METRICS[metric].replace("_", " ")
    return claims.Claim(
        source="Hazelden 2025, figure 4",
        name=f"{name}, error at equal share of runtime",
        statement=f"the {name} has the published errors at equal shares of direct's runtime, a column at a time",
        published=1.0,
        accuracy="read off a vector figure",
        measured=claims.ranged(ours / there["y"]),
        spread="range over points read off one curve",
        runs=len(there),
        of="points",
        unit="times the published ones",
        note="shares are as much the baseline's, whose machines differ",
        **_settings(rows),
    )


def _hardest(points: pd.DataFrame) -> claims.Claim | None:
    """The effective rank's error over the larger of the others, at the most samples."""
    lines = {metric: points[(points["metric"] == metric) & (points["method"] == "hutchpp_paper")] for metric in METRICS}
    if not all(map(len, lines.values())):
        return None
    errors = {name: laws.fit(rows, i).error(rows["passes"].max()) for i, (name, rows) in enumerate(lines.items())}
    hard, *others = (errors[name] for name in ("effective_rank", "norm", "alignment"))
    return claims.Claim(
        source="Hazelden 2025, figure 4",
        name="effective rank against the others",
        statement="the effective rank has the largest error of the three at the most samples",
        published=1.0,
        accuracy="read off a vector figure",
        relation=claims.ABOVE,
        measured=laws.banded(hard / np.maximum(*others)),
        runs=int(sum(rows["seeds"].sum() for rows in lines.values())),
        of="estimates",
        unit="times the larger of the others",
        **_settings(points),
    )


def _settings(rows: pd.DataFrame) -> dict[str, Any]:
    there = "two hidden layers of 256, trained on MNIST, an unnamed CPU"
    return {"there": there, "here": labels.name_label(rows["problem"].iloc[0])}
