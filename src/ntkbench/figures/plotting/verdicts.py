"""The figure of all claims: a dot at measured over published for each published number, from ``claims.csv``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FixedLocator, NullLocator

from ntkbench.figures.plotting import base, canvas, labels, styles
from ntkbench.figures.plotting.claims import ABOUT, REPRODUCED, UNADDRESSED, VERDICTS

COLOURS = {"Hazelden": styles.VERMILION, "Mohamadi, Bae, Sutherland": styles.INDIGO}
COLOURS |= {"Novak, Sohl-Dickstein, Schoenholz": styles.BLUE}
"""Colours of papers, by their names in the report."""
BAND = "#D9EEE7"
ROW, HEADING = 0.25, 0.38
"""Heights in inches of a dot's row and of a group's heading."""
ENDS = ("ratio", "ratio_low", "ratio_high")


def draw(table: pd.DataFrame) -> base.Drawing:
    """A group of rows for each paper, without claims that a value is above or below a number.

    Args:
        table: ``claims.csv``.
    """
    numbers = table[(table["relation"] == ABOUT) & (table["verdict"] != UNADDRESSED)].sort_values(
        "source", kind="stable"
    )
    if not len(numbers):
        return base.Drawing(base.words("Nothing to show", "No claim has a number here."), table, _caption(table))
    papers = numbers["figure"].map(labels.group).str.partition(":")[0]
    groups = {paper: numbers[papers == paper].to_dict("records") for paper in sorted(set(papers))}
    lines = len(numbers) + int(numbers["best_ratio"].notna().sum())
    height = ROW * lines + HEADING * len(groups)
    names = [_label(row) for row in numbers.to_dict("records")]
    reproduced = int((numbers["verdict"] == REPRODUCED).sum())
    figure, ((panel,),) = canvas.sheet(
        [canvas.Row(height, above=0.1, below=0.3)],
        1,
        title=f"{reproduced} of {len(numbers)} published numbers and exponents reproduce, each within its band",
        subtitle=_others(table),
        key=_key(),
        left=canvas.text_width(names, 9.5) + 0.3,
        widest=canvas.WIDTH,
    )
    panel.set(xscale="log", xlim=_limits(numbers), ylim=(height, 0))
    canvas.decades(panel.xaxis, *panel.get_xlim())
    panel.xaxis.set_major_formatter("{x:g}")
    panel.axvline(1, color="black", linewidth=0.9, zorder=1)
    panel.grid(visible=False, axis="y")
    panel.set_xlabel("measured here over published")
    ticks, at = {}, 0.0
    for paper, rows in groups.items():
        panel.annotate(
            paper, (0, at + 0.62 * HEADING), xycoords=("axes fraction", "data"), xytext=(-6, 0), ha="right",
            textcoords="offset points", fontweight="bold", va="center", annotation_clip=False,
        )  # fmt: skip
        at += HEADING
        for row in rows:
            same = row["same_setting"] == "yes"
            ends = [at + 0.1 * ROW, at + 0.9 * ROW], 1 / row["within"], row["within"]
            panel.fill_betweenx(*ends, color=BAND, linewidth=0, zorder=0)
            ticks[at + ROW / 2] = _label(row)
            _dot(panel, [row[end] for end in ENDS], at + ROW / 2, COLOURS.get(paper, "black"), "o", filled=same)
            at += ROW
            if not math.isnan(row["best_ratio"]):
                ticks[at + ROW / 2] = labels.plain(f"over {row['best_exact']}")
                _dot(panel, [row[f"best_{end}"] for end in ENDS], at + ROW / 2, styles.GREY, "D", filled=same)
                at += ROW
    panel.yaxis.set_major_locator(FixedLocator([*ticks]))
    panel.yaxis.set_minor_locator(NullLocator())
    for text, said in zip(panel.set_yticklabels([*ticks.values()]), ticks.values(), strict=True):
        text.set_color(styles.GREY if said.startswith("over ") else "black")
    panel.tick_params(axis="y", length=0)
    return base.Drawing(figure, table, _caption(table))


def settings(table: pd.DataFrame) -> str:
    """Commits and machines of the measurements, on two lines."""
    found = {
        name: sorted({part for cell in table[name].dropna() for part in str(cell).split("; ")})
        for name in ("git_sha", "machine")
    }
    return f"Code: git {', '.join(sha[:10] for sha in found['git_sha'])}.\nMachines: {'; '.join(found['machine'])}."


def _label(row: Mapping[str, Any]) -> str:
    """The place of a claim in its paper, and its subject."""
    source = str(row["source"])
    where = source.partition(", ")[2] or source.partition("'s ")[2] or source
    return labels.plain(f"{where}: {row['name']}")


def _limits(numbers: pd.DataFrame) -> tuple[float, float]:
    """Limits around all dots and their intervals, with room for the numbers beside them."""
    columns = [*ENDS, *(f"best_{end}" for end in ENDS)]
    low, high = canvas.limits([*numbers[columns].stack(), 0.4, 2.5], pad=1.5)
    return low, high * (high / low) ** 0.1


def _dot(panel: Axes, interval: list[float], y: float, colour: str, marker: str, *, filled: bool) -> None:
    """A value with its interval; an end that is unknown or not above 0 is drawn at the edge of the panel."""
    value, low, high = interval
    edges = panel.get_xlim()
    ends = [max(edge if math.isnan(end) else end, edges[0]) for end, edge in zip((low, high), edges, strict=True)]
    panel.plot(ends, [y, y], color=colour, alpha=0.55, linewidth=2.2, solid_capstyle="butt", zorder=2)
    size = 7 if marker == "o" else 5.5
    face, dot = colour if filled else "white", max(value, edges[0])
    panel.plot([dot], [y], marker=marker, markersize=size, markerfacecolor=face, color=colour, zorder=3)
    at = dot if math.isnan(high) else max(dot, high)
    panel.annotate(f"{labels.rounded(value)}×", (at, y), xytext=(8, 0), textcoords="offset points", va="center",
                   fontsize=9.5, color=styles.GREY if marker == "D" else "black", zorder=4)  # fmt: skip


def _key() -> list[tuple[str, list[tuple[Any, str]]]]:
    def dot(marker: str, filled: bool) -> Line2D:
        face = styles.GREY if filled else "white"
        return Line2D([], [], color=styles.GREY, marker=marker, markerfacecolor=face, linewidth=2.2)

    dots = [(dot("o", True), "the published setting"), (dot("o", False), "another setting")]
    best = (dot("D", True), "the speed-up over the best exact method")
    band = (Patch(color=BAND, linewidth=0), "reproduced, if all of the line is within")
    return [("measured over published, with its interval", dots), ("how to read", [best, band])]


def _others(table: pd.DataFrame) -> str:
    """Counts of the other claims: those that a value is above or below a number, and those that nothing here tests."""
    orders = table.loc[(table["relation"] != ABOUT) & (table["verdict"] != UNADDRESSED), "verdict"]
    said = f"{(orders == REPRODUCED).sum()} of {len(orders)} claims that a value is above or below a number reproduce"
    parts = [said] if len(orders) else []
    left = int((table["verdict"] == UNADDRESSED).sum())
    return "  ·  ".join([*parts, *([f"{left} claims are not addressed"] if left else [])])


def _caption(table: pd.DataFrame) -> str:
    counts = table["verdict"].value_counts()
    said = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
    return (
        "Measured value over a published number or a theoretical exponent, with its interval. A number is reproduced "
        "if the whole interval is in the band: a factor of 2, less for exponents (chosen after the data were seen), "
        f"accuracies and traces. Open: another network, data set or hardware. All {len(table)} claims: {said}."
    )
