"""The variance that the cross-sample terms add to a trace estimate, along the training of four networks."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.figures.plotting import base, canvas, labels, styles

TABLE = "cross_sample_share"
COLUMNS: tuple[str, ...] = ("network", "title", "init", "step", "N", "O", "P", "factor", "norm_ratio", "accuracy")
COLUMNS += ("effective_rank", "block_rank")
MEASURED = ["measured", "measured_low", "measured_high", "estimates"]
"""Present where variances were measured."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A panel for each network, a line for each run: the factor of variance, and the ratio of squared norms."""
    table = table.reindex(columns=[*dict.fromkeys([*table.columns, *MEASURED])])
    plotted = base.measured(table, "factor", "norm_ratio", "step")[[*COLUMNS, *MEASURED]]
    if not len(plotted):
        return base.nothing(table[[*COLUMNS, "status", "reason"]], labels.why_not(table))
    names = list(dict.fromkeys(plotted["network"]))
    most = plotted["N"].max()
    figure, grid = canvas.sheet(
        [canvas.Row(3.0, above=0.6, below=0.4)],
        len(names),
        title=_title(plotted),
        subtitle=f"scikit-learn's digits, N = {most:g} images, {plotted['O'].max():g} outputs  ·  "
        + base.settings_line(table),
        key=[("exact, one line a run", _reading()[:2]), ("how to read", _reading()[2:])],
        left=0.75,
        gap=0.2,
        bottom=0.1,
    )
    values = pd.concat([plotted[column] for column in ("factor", "norm_ratio", *MEASURED[:3])])
    limits = canvas.limits([*values, most, 1.0], pad=1.3)
    for panel, name in zip(grid[0], names, strict=True):
        here = plotted[plotted["network"] == name]
        _panel(panel, here, most, limits)
        last = here[here["step"] == here["step"].max()]
        canvas.title(
            panel,
            labels.short(here["title"].iloc[0]),
            f"P = {labels.count_label(here['P'].iloc[0])}, accuracy {_range(last['accuracy'], 2)}",
        )
        panel.tick_params(labelleft=panel is grid[0][0])
        panel.set_xlabel("training step")
    grid[0][0].set_ylabel("pooled over per sample")
    return base.Drawing(figure, plotted, _caption(plotted))


def _panel(panel: Axes, here: pd.DataFrame, most: float, limits: tuple[float, float]) -> None:
    for _, line in here.groupby("init"):
        line = line.sort_values("step")
        panel.plot(line["step"], line["factor"], color=styles.BLUE, marker="o", markersize=3, linewidth=1.2)
        panel.plot(line["step"], line["norm_ratio"], color=styles.ORANGE, linestyle="--", linewidth=1.2)
    seen = here[here["measured"].notna()]
    bars = [seen["measured"] - seen["measured_low"], seen["measured_high"] - seen["measured"]]
    panel.errorbar(seen["step"], seen["measured"], bars, color=styles.BLACK, fmt="D", markersize=4, elinewidth=1.1)
    panel.axhline(most, color=styles.GREY, linestyle=":", linewidth=1.0)
    last = here["step"].max()
    panel.set_xscale("symlog", linthresh=1, linscale=0.4)
    panel.xaxis.set_major_locator(FixedLocator([0, *(10**k for k in range(7) if 10**k <= last)]))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set(yscale="log", xlim=(-0.1, max(last, 1) * 1.4), ylim=limits)
    canvas.decades(panel.yaxis, *limits)
    panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))


def _reading() -> list[tuple[Line2D, str]]:
    return [
        (
            Line2D([], [], color=styles.BLUE, marker="o", markersize=3),
            "variance of a pooled trace over a per-sample one",
        ),
        (Line2D([], [], color=styles.ORANGE, linestyle="--"), "‖Θ‖² over the sum of ‖Θ_bb‖²"),
        (
            Line2D([], [], color=styles.BLACK, marker="D", markersize=4, linestyle=""),
            "variances over seeds, 95 % interval",
        ),
        (Line2D([], [], color=styles.GREY, linestyle=":"), "N, the maximum of the dashed line"),
    ]


def _range(values: pd.Series, digits: int = 3) -> str:
    """One number, or the smallest and the largest."""
    low, high = (labels.rounded(value, digits) for value in (values.min(), values.max()))
    return low if low == high else f"{low} to {high}"


def _ends(plotted: pd.DataFrame) -> tuple[pd.DataFrame, pd.DataFrame]:
    """The rows of each network's first step, and of its last."""
    steps = plotted.groupby("network")["step"]
    return plotted[plotted["step"] == steps.transform("min")], plotted[plotted["step"] == steps.transform("max")]


def _title(plotted: pd.DataFrame) -> str:
    first, last = _ends(plotted)
    steps, accuracy = _range(last["step"]), _range(last["accuracy"], 2)
    return (
        f"Without cross-sample terms, the variance of a trace is {_range(first['factor'], 2)} times smaller before "
        f"training, {_range(last['factor'], 2)} after {steps} steps, at an accuracy of {accuracy}"
    )


def _caption(plotted: pd.DataFrame) -> str:
    first, last = _ends(plotted)
    change = last.set_index(["network", "init"])["factor"] / first.set_index(["network", "init"])["factor"]
    means = {name: math.exp(part.map(math.log).mean()) for name, part in change.groupby("network", sort=False)}
    titles = plotted.drop_duplicates("network").set_index("network")["title"]
    turned = ", ".join(f"{titles[name]} {labels.rounded(value)}" for name, value in means.items())
    runs = _range(change.groupby("network").count())
    seen = plotted[plotted["measured"].notna()]
    inside = ((seen["measured_low"] <= seen["factor"]) & (seen["factor"] <= seen["measured_high"])).sum()
    return labels.fitted(
        "Variance of a pooled trace over a per-sample one at equal passes, on held-out images: at least "
        f"{labels.rounded(plotted['factor'].min())} in all {len(plotted)} cases.",
        f"Training multiplies it by (means of {runs} runs): {turned}.",
        f"Measured 95 % intervals contain it in {inside} of {len(seen)}." if len(seen) else "",
        f"Dashed: {_range(first['norm_ratio'], 2)} before, {_range(last['norm_ratio'], 2)} after.",
    )
