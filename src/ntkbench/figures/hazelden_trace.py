"""Hazelden 2025, figures 2 and 3: trace estimates against m, and their errors against runtime."""

from __future__ import annotations

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources
from ntkbench.figures.plotting.sources import HAZELDEN

TABLE = "hazelden_trace"
QUANTITIES = tuple(f"{name}{q}" for name in ("seconds", "value", "error") for q in ("", "_q25", "_q75"))
COLUMNS = ("problem", "network", "method", "title", "grid", "m", "n", "P", "reference", "seeds", *QUANTITIES)
FLOOR = 1e-8


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
        title="Estimates of the trace (Hazelden, figures 2 and 3)",
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
    return base.Drawing(figure, plotted, _caption(points))


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


def _caption(points: pd.DataFrame) -> str:
    text = (
        "Estimates of tr Theta by the three estimators of the paper's script, medians over reruns with quartiles: on "
        "the left over the exact value against the script's m, then their relative errors against the seconds of one "
        f"estimate, for large and for small m. Errors below {FLOOR:g} are drawn there. Crosses are the published "
        "medians, estimates to three digits."
    )
    errors, times = [], []
    for network, size in _samples():
        for method, series in HAZELDEN.items():
            there = published_errors(network, size, series)
            here = points[(points["network"] == network) & (points["grid"] == size) & (points["method"] == method)]
            both = here.merge(there, on="m")
            both = both[both["y"] > 1e-5]
            errors += list(both["error"] / both["y"])
            times += list(both["seconds"] / both["x"])
    if not errors:
        return text
    _, low, high = claims.median(errors)
    words = "ours are smaller", "ours are larger", "they agree"
    text += (
        f" Claim: the published errors. Measured at equal m, ours over published: {claims.ratio(errors, 'points')}, of "
        f"{labels.range_label(points['seeds'])} reruns each. Conclusion: {claims.compared(low, high, words)}."
    )
    one_sided = points[points["method"] != "hutchpp_paper"].groupby(["network", "title"], sort=False)
    slopes = {case: curves.slope(rows["m"], rows["error"]) for case, rows in one_sided}
    slopes = {case: fit for case, fit in slopes.items() if np.isfinite(fit[1])}
    if slopes:
        said = [f"{title}, {network.upper()} {at:.2f} ± {half:.2f}" for (network, title), (at, half) in slopes.items()]
        held = sum(abs(at + 0.5) <= half for at, half in slopes.values())
        text += (
            f" Claim: one-sided errors fall as m to the power -1/2. Measured, 95 % intervals: {'; '.join(said)}. "
            f"Conclusion: -1/2 is inside {held} of {len(slopes)} intervals."
        )
    least = points.loc[points["method"] == "hutchpp_paper", "error"].min()
    return text + (
        f" The least error of Hutch++ is {least:.1g}; it is rounding once its sketch holds all that Theta's rank "
        f"amounts to. Seconds, ours over published: {claims.ratio(times, 'points')}; machines differ, and we put "
        "probes into blocks."
    )


def published_errors(network: str, size: str, series: str) -> pd.DataFrame:
    """Published errors with their m, which the figures do not show.

    Points are in the order of m, the first ones where some lack; not always in that of runtimes, since the script's
    first estimate is slower than its second.
    """
    there = sources.values("hazelden_figures", figure=f"trace_error_{size}_m", problem=network, series=series)
    return there.assign(m=_samples()[network, size][: len(there)])


def _samples() -> dict[tuple[str, str], list[int]]:
    """The paper's grids of m."""
    small = [6 * int(m) for m in np.linspace(1, 50, 20)]
    mlp = [60, 93, 145, 225, 351, 546, 850, 1322, 2057, 3200]
    gru = [60, 87, 127, 186, 272, 398, 581, 848, 1238, 1808, 2640, 3855, 5629, 8219, 12000]
    return {("mlp", "large"): mlp, ("gru", "large"): gru, ("mlp", "small"): small, ("gru", "small"): small}
