"""Novak et al. 2022, figures 2 and 4: operations for an NTK entry of ResNets on images of 224x224."""

from __future__ import annotations

import pandas as pd

from ntkbench.figures import _canvas, _labels, _published, _series, base

TABLE = "novak_resnets"
COLUMNS = ("depth", "N", "O", "P", "method", "title", "flops", "flops_per_entry")
NOTEBOOK = "ResNet18 224x224, eval BatchNorm"


def draw(table: pd.DataFrame) -> base.Drawing:
    """A column for each depth: operations for an entry against O."""
    points = base.measured(table, "flops_per_entry")
    if not len(points):
        return base.nothing(table, _labels.why_not(table))
    looks, depths = _series.looks(points), sorted(points["depth"].unique())
    figure, grid = _canvas.sheet(
        [_canvas.Row(2.6, above=0.6, below=0.42)],
        len(depths),
        title="Operations for an NTK entry of ResNets on images of 224 × 224 (Novak et al., figures 2 and 4)",
        subtitle=base.settings_line(table),
        key=[("program", _series.entries(looks.values()))],
        gap=0.3,
    )
    grid[0][0].set_ylabel("FLOP per entry")
    for panel, depth in zip(grid[0], depths, strict=True):
        rows = points[points["depth"] == depth]
        _canvas.title(
            panel, f"ResNet{depth:g}, N = {rows['N'].iloc[0]:g}", f"P = {_labels.count_label(rows['P'].min())}"
        )
        for method, line in rows.groupby("method", sort=False):
            _series.line(panel, line, "O", "flops_per_entry", looks[method])
        _series.logarithmic(panel, points["O"], points["flops_per_entry"])
        _series.counts(panel, points["O"])
        panel.set_xlabel("outputs O")
        panel.tick_params(labelleft=panel is grid[0][0])
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], _caption(points))


def _caption(points: pd.DataFrame) -> str:
    text = (
        "Floating-point operations of the whole NTK over its N^2 O^2 entries, by the cost analysis of the lowered "
        "programs of neural-tangents, nothing being run; BatchNorm in eval mode, the stem of ImageNet. Our kernel in "
        "PyTorch is not in it: it would have to be run to be counted."
    )
    wide = points.pivot_table(index=["depth", "O"], columns="method", values="flops")
    said = []
    for method, words in (("nt_jacobian_contraction", "Jacobian contraction"), ("nt_ntk_vector_products", "products")):
        if method in wide and "nt_structured_derivatives" in wide:
            ratio = wide[method] / wide["nt_structured_derivatives"]
            said.append(f"{words} {_series.ratio_words(ratio)}")
    there = _published.values("novak_notebooks", network=NOTEBOOK, N=1, O=128).set_index("method")["milliseconds"]
    seconds = there["nt_jacobian_contraction"] / there["nt_structured_derivatives"]
    return (
        f"{text} In units of structured derivatives: {'; '.join(said)}. Published, ResNet18 with O = 128 on a V100: "
        f"Jacobian contraction takes {seconds:.2g} times as long, and at O = 1000 the other two do not fit; operations "
        "are not seconds, and a convolution's positions cost structured derivatives what they save elsewhere."
    )
