"""Novak et al. 2022, figure 1, right: seconds and memory of an NTK against width, and where memory runs out."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources, styles

TABLE = "novak_time"
COLUMNS = ("N", "O", "width", "method", "title", "seconds", "seconds_q25", "seconds_q75", "memory_bytes", "budget_mb")
OURS, THEIRS, CONTRACTION = "structured_derivatives", "nt_structured_derivatives", "nt_jacobian_contraction"
OTHERS = {CONTRACTION: "Jacobian contraction", "nt_ntk_vector_products": "NTK-vector products"}
NOTEBOOK, SAME = "FC 3072-2048x3-8", {"inputs": 3072, "depth": 3, "width": 2048}
"""The network of neural-tangents' notebook, and its sizes in the study's table."""
PAPER = {"inputs": 784, "depth": 9}
"""Sizes of the paper's networks; older tables have only these, and lack the columns."""
MIB = 2.0**20
LABELS = {"seconds": "seconds", "memory_mib": "memory [MiB]"}


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds above, memory below; a column for each O. Programs over budget are at the top of their panel."""
    whole = table.assign(memory_mib=table["memory_bytes"] / MIB)
    table = _of(whole, PAPER) if set(PAPER) <= set(whole) else whole
    points = base.measured(table, "seconds", "N", "O", "width")
    if not len(points):
        return base.nothing(whole, labels.why_not(whole))
    known = table[table[["memory_mib", "N", "O", "width"]].notna().all(axis=1)]
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
            rows = points if quantity == "seconds" else known[known["method"].isin(list(looks))]
            rows = rows[rows["O"] == output]
            if quantity == "seconds":
                canvas.title(panel, f"O = {output:g}, N = {table['N'].iloc[0]:g}", "")
            for method, line in rows.groupby("method", sort=False):
                curves.line(panel, line, "width", quantity, looks[method])
            curves.logarithmic(panel, table["width"], spans[quantity])
            panel.set_ylim(top=3 * panel.get_ylim()[1])  # room for programs over the budget
            _lost(panel, table[(table["O"] == output) & (table["status"] == "out_of_memory")], looks)
            curves.counts(panel, table["width"])
            panel.tick_params(labelleft=panel is panels[0], labelbottom=panel in grid[1])
    for panel in grid[1]:
        panel.set_xlabel("width")
        panel.axhline(budget, color="black", linewidth=0.9, linestyle=(0, (4, 2)), zorder=1)
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], _caption(table), _claims(whole, table))


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
        f"Programs over {table['budget_mb'].iloc[0]:g} MiB (dashed) are compiled but not run."
    )
    if (table["status"] == "skipped").any():
        text += " Other missing seconds would take more operations than this run allows."
    return text


def _of(table: pd.DataFrame, sizes: dict[str, int]) -> pd.DataFrame:
    """The rows of networks with these sizes; none if the table lacks their columns."""
    if not set(sizes) <= set(table):
        return table.iloc[:0]
    return table[(table[list(sizes)] == pd.Series(sizes)).all(axis=1)]


def _claims(whole: pd.DataFrame, table: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """The notebook's ratios of seconds, and the memory in the paper's figure.

    Args:
        whole: all rows.
        table: those of the paper's networks.
    """
    there = sources.values("novak_notebooks", network=NOTEBOOK).set_index("method")
    samples, outputs = there[["N", "O"]].iloc[0]
    same = _of(whole, {**SAME, "N": samples, "O": outputs})
    made = [_notebook(same, there, method) for method in OTHERS]
    known = table[table["memory_bytes"].notna() & table["width"].notna()]
    here = f"ten layers, width {labels.range_label(table['width'])}, N = {table['N'].iloc[0]:g}, "
    common: dict[str, Any] = {
        "source": "Novak et al. 2022, figure 1, right",
        "published": 1.0,
        "accuracy": "read off a figure",
        "there": "a ReLU network of ten layers on 784 inputs, a GPU",
        "here": f"{here}O = {labels.range_label(table['O'])}, {table['device'].iloc[0]}",
        "relation": claims.ABOVE,
        "unit": "times as much by contraction",
    }
    memory = known.pivot_table(index=["O", "width"], columns="method", values="memory_bytes")
    if {CONTRACTION, THEIRS} <= set(memory):
        ratios = (memory[CONTRACTION] / memory[THEIRS]).dropna()
        made.append(
            claims.Claim(
                name="memory of structured derivatives",
                statement="structured derivatives take less memory than Jacobian contraction",
                measured=claims.ranged(ratios),
                spread="range over widths and O",
                runs=len(ratios),
                of="cases",
                **common,
            )
        )
    further = widest(table)
    budget = table["budget_mb"].iloc[0]
    made.append(
        claims.Claim(
            name="where memory runs out",
            statement="structured derivatives go on to larger widths in the same memory",
            measured=claims.ranged(further),
            spread="range over O",
            runs=len(further),
            of="values of O",
            note=f"{budget:g} MiB, by the compiler's plan; widths interpolated"
            if len(further)
            else "the memory of programs that were not run is not in this table",
            **common | {"unit": "times as wide"},
        )
    )
    return tuple(made)


def widest(table: pd.DataFrame) -> pd.Series:
    """By O, the width at which structured derivatives fill the budget over that at which contraction does.

    Widths are interpolated in logarithms. If structured derivatives fit at all widths, or contraction at none, the
    ratio is a lower bound. Values of O at which contraction never runs out of memory, or at which the memory of a
    program is unknown, are left out.
    """
    found = {}
    for outputs, rows in table.groupby("O"):
        ends = [_end(rows[rows["method"] == method]) for method in (THEIRS, CONTRACTION)]
        if np.isfinite(ends).all() and ends[1] < 0.999 * rows["width"].max():
            found[outputs] = ends[0] / ends[1]
    return pd.Series(found, dtype=float)


def _end(rows: pd.DataFrame) -> float:
    """The width at which a program fills the budget, within the measured widths; ``nan`` if its memory is unknown."""
    rows = rows.sort_values("width")
    if not len(rows) or rows[["memory_bytes", "budget_mb"]].isna().any(axis=None):
        return math.nan
    filled = np.log(rows["memory_bytes"] / (MIB * rows["budget_mb"]))
    return float(np.exp(np.interp(0.0, np.maximum.accumulate(filled), np.log(rows["width"]))))


def _notebook(same: pd.DataFrame, there: pd.DataFrame, method: str) -> claims.Claim:
    """One implementation over structured derivatives on the notebook's network.

    Args:
        same: rows of this network.
        there: the notebook's rows, by method.
        method: the implementation.
    """
    samples, outputs, hardware = there[["N", "O", "hardware"]].iloc[0]
    known = float(there["milliseconds"][method] / there["milliseconds"][THEIRS])
    rows = base.measured(same, "seconds").drop_duplicates("method").set_index("method")
    both = {method, THEIRS} <= set(rows.index)
    lost = same[same["method"].isin([method, THEIRS]) & (same["status"] != "ok")]
    why = lost["reason"].iloc[0] if len(lost) else "this table does not have the network"
    note = "" if both else f"not timed here: {why}"
    title = OTHERS[method]
    return claims.Claim(
        source="neural-tangents' notebook",
        name=f"fully connected, seconds of {title}",
        statement=f"structured derivatives are {labels.rounded(known, 3)} times faster than {title}",
        published=known,
        accuracy="printed in a notebook",
        there=f"{NOTEBOOK}, N = {samples}, O = {outputs}, {hardware}",
        here=f"the same network and sizes, {same['device'].iloc[0]}" if len(same) else "",
        measured=claims.quotient(rows.loc[method], rows.loc[THEIRS]) if both else claims.UNKNOWN,
        spread="quartiles of calls",
        runs=claims.count(rows["calls"].reindex([method, THEIRS]).min()) if both and "calls" in rows else 0,
        of="calls",
        unit="times",
        best=claims.quotient(rows.loc[OURS], rows.loc[THEIRS]) if both and OURS in rows.index else claims.UNKNOWN,
        best_title="our kernel by layers",
        note=note,
    )
