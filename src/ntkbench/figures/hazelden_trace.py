"""Hazelden 2025, figures 2 and 3: trace estimates against m, and their errors against runtime."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources
from ntkbench.figures.plotting.sources import HAZELDEN

TABLE = "hazelden_trace"
QUANTITIES = tuple(f"{name}{q}" for name in ("seconds", "value", "error") for q in ("", "_q25", "_q75"))
COLUMNS = ("problem", "network", "method", "title", "grid", "m", "n", "P", "reference", "seeds", *QUANTITIES)
FLOOR = 1e-8
RATE = -0.5
"""Power of m that the errors of independent probes follow."""
CAPTION = (
    "Estimates of tr Theta by the three estimators of the paper's script, medians over reruns with quartiles. Left: "
    "estimate over exact value, against the script's m. Then: relative error against the seconds of one estimate, "
    f"for large and for small m. Errors below {FLOOR:g}, which are rounding, are drawn there. Crosses: published "
    "medians, estimates to three digits."
)


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each network: the estimate against m; the error against seconds, for large and for small m."""
    plotted = table[table["method"].isin(HAZELDEN)].copy()
    points = base.measured(plotted, "seconds", "error")
    if not len(points):
        return base.nothing(plotted, labels.why_not(table))
    points["error"] = points["error"].clip(lower=FLOOR)
    points["error_q25"] = points["error_q25"].clip(lower=FLOOR)
    looks = curves.looks(points)
    networks = [name for name in ("mlp", "gru") if name in set(points["network"])]
    figure, grid = canvas.sheet(
        [canvas.Row(2.5, above=0.62, below=0.42) for _ in networks],
        3,
        title=_title(points),
        subtitle=base.settings_line(points),
        key=[
            ("method", curves.entries(looks.values())),
            ("how to read", [curves.QUARTILES, curves.PUBLISHED]),
        ],
        gap=0.75,
    )
    for panels, network in zip(grid, networks, strict=True):
        rows = points[points["network"] == network]
        name = f"{labels.name_label(rows['problem'].iloc[0])}: {labels.sizes_label(rows, 'n', 'P')}"
        for panel, heading in zip(panels, ("estimate", "error, large m", "error, small m"), strict=True):
            canvas.title(panel, heading, name if panel is panels[0] else "")
        _estimates(panels[0], rows[rows["grid"] == "large"], network, looks)
        for panel, size in zip(panels[1:], ("large", "small"), strict=True):
            _errors(panel, rows[rows["grid"] == size], network, size, looks)
    return base.Drawing(figure, plotted, CAPTION, _claims(points))


def _title(points: pd.DataFrame) -> str:
    """How errors at equal m compare with those published."""
    errors = next((claim for claim in _at_equal_samples(points) if claim.name.startswith("errors")), None)
    if errors is None:
        return "Estimates of the trace (Hazelden, figures 2 and 3)"
    value, low, high = map(labels.rounded, errors.measured)
    ends = f" ({low} to {high} over cases)" if low != "nan" else ""
    return f"At equal m, errors of the trace are {value} times those published{ends} (Hazelden, figures 2 and 3)"


def _estimates(panel: Axes, rows: pd.DataFrame, network: str, looks: dict) -> None:
    if not len(rows):
        canvas.note(panel, "not measured")
        return
    exact = rows["reference"].iloc[0]
    rows = rows.assign(**{name: rows[name] / exact for name in ("value", "value_q25", "value_q75")})
    panel.axhline(1, color="black", linewidth=0.9, zorder=1)
    for method, line in rows.groupby("method", sort=False):
        curves.line(panel, line, "m", "value", looks[method])
        there = sources.values("hazelden_figures", figure="trace_estimate", problem=network, series=HAZELDEN[method])
        curves.published(panel, there.assign(y=there["y"] / exact), looks[method].colour)
    panel.set(xscale="log", xlabel="m, nominal samples", ylabel="estimate of tr Θ, over its exact value")
    panel.margins(y=0.12)
    canvas.decades(panel.xaxis, *panel.get_xlim())


def _errors(panel: Axes, rows: pd.DataFrame, network: str, size: str, looks: dict) -> None:
    there = sources.values("hazelden_figures", figure=f"trace_error_{size}_m", problem=network)
    for method, line in rows.groupby("method", sort=False):
        curves.line(panel, line, "seconds", "error", looks[method])
        curves.published(panel, there[there["series"] == HAZELDEN[method]], looks[method].colour)
    curves.logarithmic(panel, [*rows["seconds"], *there["x"]], [*rows["error"], *rows["error_q25"], *there["y"]])
    panel.set(xlabel="seconds", ylabel="relative error")


def _claims(points: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """The traces themselves, errors and seconds at equal m, and the decay of errors of one-sided estimators."""
    networks = [name for name in ("mlp", "gru") if name in set(points["network"])]
    return (
        *(_trace(points[points["network"] == network], network) for network in networks),
        *_at_equal_samples(points),
        *filter(None, (_rate(rows, *case) for case, rows in points.groupby(["network", "method"], sort=False))),
    )


def _common(points: pd.DataFrame, **more: Any) -> dict[str, Any]:
    """The common part of claims on these rows."""
    problems = dict.fromkeys(points["problem"])
    common = {"there": "the paper's MLP and GRU, an unnamed CPU", "here": ", ".join(map(labels.name_label, problems))}
    return common | {"same": not any("[" in problem for problem in problems)} | more


def _trace(points: pd.DataFrame, network: str) -> claims.Claim:
    there = sources.values(
        "hazelden_figures", figure="trace_estimate", problem=network, series=HAZELDEN["hutchpp_paper"]
    )
    known, exact = float(there["y"].iloc[-1]), float(points["reference"].iloc[0])
    return claims.Claim(
        source="Hazelden 2025, figures 2 and 3",
        name=f"{network.upper()}, trace at the most samples",
        statement=f"the trace of the {network.upper()} is estimated as {labels.rounded(known, 3)}",
        published=known,
        accuracy="three digits",
        within=claims.DIGITS,
        measured=(exact, exact, exact),
        spread="exact in float64",
        runs=1,
        of="value",
        **_common(points),
    )


def _at_equal_samples(points: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """Errors and seconds over those published at the same m: medians for each network, estimator and range of m."""
    errors: list[float] = []
    times: list[float] = []
    for network, size in _samples():
        for method, series in HAZELDEN.items():
            there = published_errors(network, size, series)
            here = points[(points["network"] == network) & (points["grid"] == size) & (points["method"] == method)]
            both = here.merge(there, on="m")
            both = both[both["y"] > 1e-5]
            if len(both):
                errors.append(float((both["error"] / both["y"]).median()))
                times.append(float((both["seconds"] / both["x"]).median()))
    if not errors:
        return ()
    common = {"source": "Hazelden 2025, figures 2 and 3", "published": 1.0, "accuracy": "read off vector figures"}
    common |= {"spread": "range over networks, estimators and ranges of m", "runs": len(errors), "of": "medians"}
    common |= {"unit": "times the published ones"}
    reruns = f"{labels.range_label(points['seeds'])} reruns a point here, 50 there"
    return (
        claims.Claim(
            name="errors of traces at equal m",
            statement="the three estimators have the published errors at equal m",
            measured=claims.ranged(errors),
            note=reruns,
            **_common(points, **common),
        ),
        claims.Claim(
            name="seconds of traces at equal m",
            statement="the three estimators take the published seconds at equal m",
            measured=claims.ranged(times),
            addressed=False,
            note="seconds of another machine do not compare; probes go in blocks here",
            **_common(points, **common) | {"same": False},
        ),
    )


def _rate(rows: pd.DataFrame, network: str, method: str) -> claims.Claim | None:
    """The rate at which errors fall with m, if the estimator is one-sided and has enough points for an interval."""
    if method == "hutchpp_paper":
        return None
    slope, half = curves.slope(rows["m"], rows["error"])
    if not np.isfinite(half):
        return None
    name = f"{network.upper()}, {rows['title'].iloc[0].partition(' (')[0]}"
    return claims.Claim(
        source="Hazelden 2025, figures 2 and 3",
        name=f"power of m, {name}",
        statement=f"errors fall as m to the power {RATE:g} ({name})",
        published=RATE,
        accuracy="theory",
        within=claims.EXPONENT,
        measured=claims.exponent(slope, half),
        runs=len(rows),
        of="points",
        **_common(rows),
    )


def published_errors(network: str, size: str, series: str) -> pd.DataFrame:
    """Published errors with their m, which the figures do not show.

    Points are in the order of m; if some are missing, those present have the first m. The order of runtimes can
    differ, since the script's first estimate is slower than its second.
    """
    there = sources.values("hazelden_figures", figure=f"trace_error_{size}_m", problem=network, series=series)
    return there.assign(m=_samples()[network, size][: len(there)])


def _samples() -> dict[tuple[str, str], list[int]]:
    """The paper's grids of m."""
    small = [6 * int(m) for m in np.linspace(1, 50, 20)]
    mlp = [60, 93, 145, 225, 351, 546, 850, 1322, 2057, 3200]
    gru = [60, 87, 127, 186, 272, 398, 581, 848, 1238, 1808, 2640, 3855, 5629, 8219, 12000]
    return {("mlp", "large"): mlp, ("gru", "large"): gru, ("mlp", "small"): small, ("gru", "small"): small}
