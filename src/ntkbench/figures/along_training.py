"""Alignment, effective rank and norm of Theta, K and P P* along training, from several initialisations."""

from __future__ import annotations

import itertools
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator

from ntkbench.figures.plotting import base, canvas, labels
from ntkbench.figures.plotting.styles import BLACK, BLUE, GREEN, GREY, ORANGE, PINK, SKY, VERMILION, WINE

TABLE = "training"
COLUMNS: tuple[str, ...] = ("task", "kind", "N", "T", "H", "read", "parameters", "optimizer", "init", "gain", "rank")
COLUMNS += ("network", "step", "loss", "operator", "quantity", "value", "standard_error", "ratio")
COLUMNS += ("ratio_standard_error", "probes")

OPERATORS = {
    "Theta": (r"$\Theta = P K P^*$", "the NTK"),
    "K": (r"$K$", "the representation"),
    "P": (r"$P P^*$", "the dynamics"),
}
QUANTITIES = {"alignment": "alignment with step 0", "effective_rank": "effective rank", "norm": "Frobenius norm"}
COLOURS = (BLUE, ORANGE, GREEN, PINK, VERMILION, SKY, WINE, BLACK)
"""One per gain."""
STYLES = ("-", (0, (3.2, 1.6)), (0, (1, 1.2)), (0, (5, 1.5, 1, 1.5)))
"""One per rank, the full one first."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A column for each operator, a row for each quantity, a line for each network."""
    kept = ["init", "gain", "rank", "network", "step", "loss", "operator", "quantity", "value", "bar"]
    table = table.assign(bar=table["value"] / table["ratio"] * table["ratio_standard_error"])
    shown = base.measured(table, "value", "step", "gain", "rank")
    shown = shown[shown["operator"].isin(OPERATORS) & shown["quantity"].isin(QUANTITIES)]
    if not len(shown):
        return base.nothing(table[kept], "No network was trained.")
    gains, ranks = sorted(shown["gain"].unique()), sorted(shown["rank"].unique(), reverse=True)
    looks: dict[tuple[float, float], dict[str, Any]] = {
        (gain, rank): {"color": COLOURS[i % len(COLOURS)], "linestyle": STYLES[j % len(STYLES)]}
        for (i, gain), (j, rank) in itertools.product(enumerate(gains), enumerate(ranks))
    }
    full = shown["H"].iloc[0]
    solid, dark = STYLES[0], {"color": GREY}
    of_gains = [(Line2D([], [], **looks[gain, ranks[0]] | {"linestyle": solid}), f"{gain:g}") for gain in gains]
    of_ranks = [
        (Line2D([], [], **looks[gains[0], rank] | dark), "full" if rank == full else f"{rank:g}") for rank in ranks
    ]
    rows = [canvas.Row(2.0, above=0.62, below=0.1)] + [canvas.Row(2.0, above=0.12, below=0.1)] * 2
    figure, grid = canvas.sheet(
        rows,
        len(OPERATORS),
        title=_title(shown),
        subtitle=f"{_network(shown)}  ·  {base.settings_line(table)}",
        key=[("gain of recurrent weights", of_gains), ("their rank", of_ranks)],
        left=0.95,
        gap=0.55,
        bottom=0.5,
    )
    last = shown["step"].max()
    for (quantity, label), panels in zip(QUANTITIES.items(), grid, strict=True):
        for (operator, names_), panel in zip(OPERATORS.items(), panels, strict=True):
            lines = shown[(shown["operator"] == operator) & (shown["quantity"] == quantity)]
            _panel(panel, lines, looks, last, logarithmic=quantity != "alignment")
            panel.tick_params(labelbottom=quantity == "norm")
            if quantity == "alignment":
                panel.set_ylim(0, 1.03)
                canvas.title(panel, names_[0], names_[1])
            if quantity == "norm":
                panel.set_xlabel("training step")
        panels[0].set_ylabel(label)
    return base.Drawing(figure, shown[kept], _caption(shown))


def _panel(panel: Axes, lines: pd.DataFrame, looks: dict, last: int, *, logarithmic: bool) -> None:
    for (gain, rank, _), line in lines.groupby(["gain", "rank", "network"], sort=True):
        line = line.sort_values("step")
        look = looks[gain, rank]
        panel.plot(line["step"], line["value"], linewidth=1.3, **look)
        bars = line[line["bar"] > 0]
        panel.errorbar(bars["step"], bars["value"], bars["bar"], fmt="none", ecolor=look["color"], elinewidth=0.9)
    panel.set_xscale("symlog", linthresh=1, linscale=0.4)
    ticks = [0, *(10**k for k in range(7) if 10**k <= last)]
    panel.xaxis.set_major_locator(FixedLocator(ticks))
    panel.xaxis.set_minor_locator(NullLocator())
    panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    panel.set_xlim(-0.1, last * 1.2)
    if logarithmic:
        panel.set_yscale("log")
        low, high = canvas.limits(lines["value"], pad=1.4, ratio=12)
        panel.set_ylim(low, high)
        canvas.decades(panel.yaxis, low, high)


def _network(shown: pd.DataFrame) -> str:
    one = shown.iloc[0]
    sizes = f"N = {one['N']:g}, T = {one['T']:g}, H = {one['H']:g}"
    kind, task, optimizer = (labels.short(one[column]) for column in ("kind", "task", "optimizer"))
    return f"{kind.upper()} on {labels.name_label(task).lower()}, {sizes}, {optimizer.upper()}"


def _caption(shown: pd.DataFrame) -> str:
    one = shown.iloc[0]
    what = "the states" if one["read"] == "state" else "the outputs"
    return (
        f"The NTK of {what} of a recurrent network (parameters: {one['parameters']}) along training, and its factors "
        "K (representation, exact) and P P* (dynamics), one line per network. Bars: one standard error of the ratio to "
        f"step 0, from {one['probes']:g} paired probes. Ranks below full: recurrent weights truncated to their largest "
        "singular values at an unchanged norm."
    )


def _title(shown: pd.DataFrame) -> str:
    """The initialisations whose Theta is closest to step 0 after training, and farthest from it."""
    rows = shown[(shown["operator"] == "Theta") & (shown["quantity"] == "alignment")].sort_values("step")
    last = rows.groupby(["init", "network"])["value"].last()
    if not len(last):
        return "Theta, its representation K and its dynamics P P* along training"
    middle = last.groupby("init").median()
    ends = dict.fromkeys((middle.idxmax(), middle.idxmin()))
    said = " and ".join(
        f"{last[init].min():.2f} to {last[init].max():.2f} with {labels.short(str(init), 40)}" for init in ends
    )
    return f"After training, the alignment of Theta with its start is {said}"
