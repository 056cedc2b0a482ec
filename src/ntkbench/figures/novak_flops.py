"""Novak et al. 2022, figure 1, left: operations per NTK entry of a 10-layer ReLU network against width."""

from __future__ import annotations

import pandas as pd

from ntkbench.figures.plotting import base, canvas, claims, curves, labels
from ntkbench.units import counted

TABLE = "novak_flops"
COLUMNS = ("N", "O", "width", "P", "method", "title", "flops", "flops_per_entry")
THEIRS = "nt_structured_derivatives"
OTHERS = ("nt_jacobian_contraction", "nt_ntk_vector_products")
WIDEST = 4096
"""The smallest width at which the setting counts as the paper's."""
CAPTION = (
    "Floating-point operations of the whole NTK over its N^2 O^2 entries. neural-tangents' programs and the Jacobian "
    "alone: from the cost analysis of the lowered program, which is not run. Our kernel by layers: from the shapes of "
    "its matrix products, without element-wise work; it computes a triangle of a symmetric kernel where that pays."
)


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
        title=_title(points),
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
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], CAPTION, _claims(points))


def _ratios(points: pd.DataFrame) -> pd.Series:
    """Operations of the cheaper of the two others over those of structured derivatives, at the largest width.

    They are by N and O, and missing where one of the three was not measured.
    """
    at_widest = points[points["width"] == points["width"].max()]
    wide = at_widest.pivot_table(index=["N", "O"], columns="method", values="flops_per_entry")
    wide = wide.reindex(columns=[*OTHERS, THEIRS])
    return wide[[*OTHERS]].min(axis=1, skipna=False) / wide[THEIRS]


def _title(points: pd.DataFrame) -> str:
    ratios = _ratios(points).dropna()
    if not len(ratios):
        return "Operations for an NTK entry of a 10-layer ReLU network (Novak et al., figure 1, left)"
    return (
        f"At width {points['width'].max():g} the others take {labels.span(ratios)} times the operations of structured "
        "derivatives (Novak et al., figure 1)"
    )


def _claims(points: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """The claim that structured derivatives take fewer operations."""
    cases, widest = _ratios(points), points["width"].max()
    ratios = cases.dropna()
    if not len(ratios):
        return ()
    dropped = len(cases) - len(ratios)
    return (
        claims.Claim(
            source="Novak et al. 2022, figure 1, left",
            name="operations of structured derivatives",
            statement="structured derivatives take fewer operations than the two others at the largest width",
            published=1.0,
            accuracy="read off a figure",
            there="a ReLU network of ten layers on 784 inputs",
            here=f"the same, width {widest:g}, {labels.sizes_label(points, 'N', 'O')}",
            same=bool(widest >= WIDEST),
            relation=claims.ABOVE,
            measured=claims.ranged(ratios),
            spread="range over N and O",
            runs=len(ratios),
            of="cases",
            unit="times as many by the cheaper of the others",
            note=f"{counted(dropped, 'case')} without all three programs left out" if dropped else "",
        ),
    )
