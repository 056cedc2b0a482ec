"""Novak et al. 2022, figure 1, right: seconds and memory of an NTK against width, and where memory runs out."""

from __future__ import annotations

from typing import Any

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources, styles

TABLE = "novak_time"
COLUMNS = ("N", "O", "width", "method", "title", "seconds", "seconds_q25", "seconds_q75", "memory_bytes", "budget_mb")
OURS, THEIRS, CONTRACTION = "structured_derivatives", "nt_structured_derivatives", "nt_jacobian_contraction"
OTHERS = {CONTRACTION: "Jacobian contraction", "nt_ntk_vector_products": "NTK-vector products"}
NOTEBOOK = "FC 3072-2048x3-8"
MIB = 2.0**20
LABELS = {"seconds": "seconds", "memory_mib": "memory [MiB]"}


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds above, memory below; a column for each O. Programs over budget are at the top of their panel."""
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
        title=_title(points),
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
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], _caption(table), _claims(table, points))


def _title(points: pd.DataFrame) -> str:
    """Our time and memory over those of neural-tangents' structured derivatives."""
    said = []
    for name, words in (("seconds", "time"), ("memory_mib", "memory")):
        wide = points.pivot_table(index=["O", "width"], columns="method", values=name)
        if {OURS, THEIRS} <= set(wide):
            ratios = (wide[OURS] / wide[THEIRS]).dropna()
            said += [f"{labels.span(ratios)} in {words}"] if len(ratios) else []
    if not said:
        return "Seconds and memory of the NTK of a 10-layer ReLU network (Novak et al., figure 1, right)"
    return f"Our kernel by layers over neural-tangents' structured derivatives: {', '.join(said)}"


def _lost(panel: Axes, lost: pd.DataFrame, looks: dict[str, styles.Look]) -> None:
    for i, (method, rows) in enumerate(lost.groupby("method", sort=False)):
        if method in looks:
            top = panel.get_xaxis_transform()
            panel.plot(rows["width"], [0.98 - 0.06 * i] * len(rows), marker=7, linestyle="", transform=top,
                       color=looks[method].colour, markersize=7, clip_on=False, zorder=5)  # fmt: skip


def _caption(table: pd.DataFrame) -> str:
    text = (
        "Seconds (without compilation) and memory of the whole NTK. Memory of the JAX programs: arguments, results and "
        "temporaries as the compiler plans them; of ours: the peak above that before the call, plus the arguments. "
        f"Programs over the budget of {table['budget_mb'].iloc[0]:g} MiB (dashed) are compiled but not run."
    )
    if (table["status"] == "skipped").any():
        text += " Other missing points would take more operations than this run allows."
    return text


def _claims(table: pd.DataFrame, points: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """The notebook's ratios of seconds, and the memory of Jacobian contraction, over structured derivatives."""
    seconds, memory = (
        points.pivot_table(index=["O", "width"], columns="method", values=name) for name in ("seconds", "memory_bytes")
    )
    if THEIRS not in seconds:
        return ()
    sizes = f"ten layers, width {labels.range_label(points['width'])}, N = {table['N'].iloc[0]:g}, "
    here = f"{sizes}O = {labels.range_label(points['O'])}"
    common: dict[str, Any] = {"here": here, "spread": "range over widths and O", "of": "cases"}
    there = sources.values("novak_notebooks", network=NOTEBOOK).set_index("method")
    samples, outputs, hardware = there[["N", "O", "hardware"]].iloc[0]
    made = []
    for method, title in OTHERS.items():
        if method not in seconds:
            continue
        ratios = (seconds[method] / seconds[THEIRS]).dropna()
        known = there["milliseconds"][method] / there["milliseconds"][THEIRS]
        best = claims.ranged(seconds[OURS] / seconds[THEIRS]) if OURS in seconds else claims.UNKNOWN
        made.append(
            claims.Claim(
                source="neural-tangents' notebook",
                name=f"fully connected, seconds of {title}",
                statement=f"structured derivatives are {labels.rounded(known, 3)} times faster than {title}",
                published=float(known),
                accuracy="printed in a notebook",
                there=f"{NOTEBOOK}, N = {samples}, O = {outputs}, {hardware}",
                measured=claims.ranged(ratios),
                runs=len(ratios),
                unit="times",
                best=best,
                best_title="our kernel by layers",
                **common,
            )
        )
    if CONTRACTION in memory and THEIRS in memory:
        ratios = (memory[CONTRACTION] / memory[THEIRS]).dropna()
        made.append(
            claims.Claim(
                source="Novak et al. 2022, figure 1, right",
                name="memory of structured derivatives",
                statement="structured derivatives take less memory than Jacobian contraction",
                published=1.0,
                accuracy="read off a figure",
                there="a ReLU network of ten layers on 784 inputs, a GPU",
                relation=claims.ABOVE,
                measured=claims.ranged(ratios),
                runs=len(ratios),
                unit="times as much by contraction",
                **common,
            )
        )
    return tuple(made)
