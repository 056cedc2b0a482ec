"""Novak et al. 2022, figure 1, right: seconds and memory of an NTK against width, and where memory runs out."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, curves, labels, sources, styles

TABLE = "novak_time"
COLUMNS = ("N", "O", "width", "method", "title", "seconds", "seconds_q25", "seconds_q75", "memory_bytes", "budget_mb")
MIB = 2.0**20
LABELS = {"seconds": "seconds", "memory_mib": "memory [MiB]"}


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds above, memory below; a column for each O. What would go over the budget is at the top of its panel."""
    table = table.assign(memory_mib=table["memory_bytes"] / MIB)
    points = base.measured(table, "seconds", "N", "O", "width")
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    looks, outputs = curves.looks(points), sorted(table["O"].dropna().unique())
    over = Line2D([], [], color=styles.GREY, marker=7, linestyle=""), "over the memory budget"
    dashed = Line2D([], [], color="black", linewidth=0.9, linestyle=(0, (4, 2))), "the memory budget"
    figure, grid = canvas.sheet(
        [canvas.Row(2.3, above=0.5, below=0.2), canvas.Row(2.3, above=0.1, below=0.42)],
        len(outputs),
        title="Seconds and memory of the NTK of a 10-layer ReLU network (Novak et al., figure 1, right)",
        subtitle=base.settings_line(table),
        key=[("program", curves.entries(looks.values())), ("how to read", [curves.QUARTILES, over, dashed])],
        gap=0.3,
    )
    budget = table["budget_mb"].iloc[0]
    spans = {"seconds": points["seconds"], "memory_mib": [*points["memory_mib"], budget]}
    for panels, (quantity, label) in zip(grid, LABELS.items(), strict=True):
        panels[0].set_ylabel(label)
        for panel, output in zip(panels, outputs, strict=True):
            rows = points[points["O"] == output]
            if quantity == "seconds":
                canvas.title(panel, f"O = {output:g}, N = {table['N'].iloc[0]:g}", "")
            for method, line in rows.groupby("method", sort=False):
                curves.line(panel, line, "width", quantity, looks[method])
            curves.logarithmic(panel, table["width"], spans[quantity])
            panel.set_ylim(top=3 * panel.get_ylim()[1])  # room for what is over the budget
            _lost(panel, table[(table["O"] == output) & (table["status"] == "out_of_memory")], looks)
            curves.counts(panel, table["width"])
            panel.tick_params(labelleft=panel is panels[0], labelbottom=panel in grid[1])
    for panel in grid[1]:
        panel.set_xlabel("width")
        panel.axhline(budget, color="black", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], _caption(table, points))


def _lost(panel: Axes, lost: pd.DataFrame, looks: dict[str, styles.Look]) -> None:
    for i, (method, rows) in enumerate(lost.groupby("method", sort=False)):
        if method in looks:
            top = panel.get_xaxis_transform()
            panel.plot(rows["width"], [0.98 - 0.06 * i] * len(rows), marker=7, linestyle="", transform=top,
                       color=looks[method].colour, markersize=7, clip_on=False, zorder=5)  # fmt: skip


def _caption(table: pd.DataFrame, points: pd.DataFrame) -> str:
    budget = table["budget_mb"].iloc[0]
    text = (
        "Seconds (without compiling) and memory of the whole NTK of a ReLU network with ten layers, N = "
        f"{table['N'].iloc[0]:g}. Memory of the JAX programs: arguments, results and temporaries as the compiler plans "
        "them; of ours: the peak over that before the call, and the arguments. Programs that would go over the budget "
        f"of {budget:g} MiB (dashed) are compiled and not run."
    )
    lost = table[table["status"] == "out_of_memory"]
    if len(lost):
        firsts = lost.groupby(["title", "O"])["width"].min()
        text += " Over the budget from: " + "; ".join(
            f"{title} at width {width:g} (O = {output:g})" for (title, output), width in firsts.items()
        )
        text += "."
    if (table["status"] == "skipped").any():
        text += " What is not drawn and not over the budget would take more operations than this run allows a program."
    wide = points.pivot_table(index=["O", "width"], columns="method", values="seconds")
    theirs = wide.get("nt_structured_derivatives")
    if theirs is not None and "nt_jacobian_contraction" in wide:
        gain = wide["nt_jacobian_contraction"] / theirs
        there = sources.values("novak_notebooks", network="FC 3072-2048x3-8").set_index("method")["milliseconds"]
        known = there["nt_jacobian_contraction"] / there["nt_structured_derivatives"]
        text += (
            f" Claim: structured derivatives are {known:.0f} times faster than Jacobian contraction (neural-tangents' "
            "notebook: 3 layers of 2048, N = 16, O = 8, a T4). Measured, median and range over widths and O: "
            f"{curves.ratio_words(gain)}. Conclusion: the published ratio is "
            f"{labels.beside(known, gain.min(), gain.max())} the range, and structured derivatives are faster in "
            f"{int((gain > 1).sum())} of {int(gain.notna().sum())} cases."
        )
    if theirs is not None and "structured_derivatives" in wide:
        ratio = wide["structured_derivatives"] / theirs
        text += (
            f" Ours in PyTorch over neural-tangents' compiled program: {curves.ratio_words(ratio)}; small networks "
            "pay for Python's calls."
        )
    return text
