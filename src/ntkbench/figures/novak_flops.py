"""Novak et al. 2022, figure 1, left: operations for an NTK entry of a 10-layer ReLU network against width."""

from __future__ import annotations

import pandas as pd

from ntkbench.figures.plotting import base, canvas, curves, labels

TABLE = "novak_flops"
COLUMNS = ("N", "O", "width", "P", "method", "title", "flops", "flops_per_entry")
OURS, THEIRS = "structured_derivatives", "nt_structured_derivatives"
OTHERS = {
    "nt_jacobian_contraction": "contraction",
    "nt_ntk_vector_products": "NTK-vector products",
    "jacobian": "the Jacobian alone",
}


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row for each N, a column for each O."""
    points = base.measured(table, "flops_per_entry", "N", "O", "width")
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    looks = curves.looks(points)
    samples, outputs = sorted(points["N"].unique()), sorted(points["O"].unique())
    figure, grid = canvas.sheet(
        [canvas.Row(2.3, above=0.5, below=0.42) for _ in samples],
        len(outputs),
        title="Operations for an NTK entry of a 10-layer ReLU network (Novak et al., figure 1, left)",
        subtitle=base.settings_line(table),
        key=[("program", curves.entries(looks.values()))],
        gap=0.3,
    )
    for panels, N in zip(grid, samples, strict=True):
        panels[0].set_ylabel("FLOP per entry")
        for panel, output in zip(panels, outputs, strict=True):
            rows = points[(points["N"] == N) & (points["O"] == output)]
            canvas.title(panel, f"O = {output:g}, N = {N:g}", "")
            for method, line in rows.groupby("method", sort=False):
                curves.line(panel, line, "width", "flops_per_entry", looks[method])
            curves.logarithmic(panel, points["width"], points["flops_per_entry"])
            curves.counts(panel, points["width"])
            panel.set_xlabel("width")
            panel.tick_params(labelleft=panel is panels[0])
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], _caption(points))


def _caption(points: pd.DataFrame) -> str:
    text = (
        "Floating-point operations of the whole NTK, over its N^2 O^2 entries, of a ReLU network with ten layers on "
        "784 inputs. neural-tangents' programs and the Jacobian alone: the cost analysis of the lowered program, "
        "nothing is run. Our kernel by layers: its matrix products are counted by their shapes, element-wise work is "
        "not, and of a symmetric kernel it computes a triangle where that pays."
    )
    wide = points.pivot_table(index=["N", "O", "width"], columns="method", values="flops_per_entry")
    last = wide.xs(wide.index.get_level_values("width").max(), level="width")
    if THEIRS not in last:
        return text
    others = {name: title for name, title in OTHERS.items() if name in last}
    said = []
    for (N, output), row in last.dropna(subset=THEIRS).iterrows():
        ratios = (row[list(others)] / row[THEIRS]).dropna()
        words = [f"{others[name]} {labels.rounded(ratio)}" for name, ratio in ratios.items()]
        said += [f"N = {N:g}, O = {output:g}: {', '.join(words)}"] if words else []
    if said:
        verdict = "agrees" if _structured_wins(last) else "does not agree"
        text += (
            f" At the largest width, in units of neural-tangents' structured derivatives: {'; '.join(said)}. That "
            f"structured derivatives take the fewest of the three there {verdict} with the paper."
        )
    if OURS in wide:
        text += f" Ours over neural-tangents' structured derivatives: {curves.ratio_words(wide[OURS] / wide[THEIRS])}."
    return text


def _structured_wins(last: pd.DataFrame) -> bool:
    others = [c for c in ("nt_jacobian_contraction", "nt_ntk_vector_products") if c in last]
    return bool((last[others].min(axis=1) >= last[THEIRS]).all())
