"""Mohamadi et al. 2023, figure 1: seconds for NTK and pNTK of ResNets against depth."""

from __future__ import annotations

import pandas as pd

from ntkbench.figures.plotting import base, canvas, curves, labels, sources

TABLE = "mohamadi_cost"
COLUMNS = ("depth", "N", "O", "P", "method", "title", "kernel", "seconds", "seconds_per_pair", "pairs")
PUBLISHED = {"eNTK": "jacobian_contraction", "pNTK": "sum_of_logits"}
"""Kernels in the published figure and the methods nearest to how they were computed."""
BEST = {"structured_derivatives": "structured_sum_of_logits", "jacobian_contraction": "sum_of_logits"}
"""Pairs of methods for NTK and pNTK that work alike."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds for a pair, two images by themselves above, all pairs of N below; a column for each O."""
    points = base.measured(table, "seconds_per_pair", "N", "O", "depth")
    if not len(points):
        return base.nothing(table, labels.why_not(table))
    looks = curves.looks(points)
    there = sources.values("mohamadi_figure1_tiny_imagenet")
    samples, outputs = sorted(points["N"].unique()), sorted({*points["O"], *there["outputs"]})
    figure, grid = canvas.sheet(
        [canvas.Row(2.3, above=0.6, below=0.42) for _ in samples],
        len(outputs),
        title="Seconds for a pair of images, NTK and pNTK of ResNets (Mohamadi et al., figure 1)",
        subtitle=base.settings_line(table),
        key=[
            ("method", curves.entries(looks.values())),
            ("how to read", [(curves.PUBLISHED[0], "published, Tiny ImageNet")]),
        ],
    )
    seconds, depths = (
        [*points["seconds_per_pair"], *there["seconds_per_pair"]],
        [*table["depth"], *there["resnet_depth"]],
    )
    for panels, N in zip(grid, samples, strict=True):
        for panel, output in zip(panels, outputs, strict=True):
            rows = points[(points["N"] == N) & (points["O"] == output)]
            shown = there[there["outputs"] == output] if max(samples) == N else there.iloc[:0]
            if not len(rows) and not len(shown):
                canvas.hide([panel])
                continue
            heading = "two images by themselves" if min(samples) == N else f"all pairs of {N:g} images"
            if not len(rows):
                heading = "as published"
            canvas.title(panel, heading, f"O = {output:g}")
            for method, line in rows.groupby("method", sort=False):
                curves.line(panel, line, "depth", "seconds_per_pair", looks[method])
            for kernel, method in PUBLISHED.items():
                if method in looks:
                    only = shown[shown["kernel"] == kernel]
                    curves.published(panel, only, looks[method].colour, "resnet_depth", "seconds_per_pair")
            curves.logarithmic(panel, depths, seconds)
            curves.counts(panel, depths)
            panel.set(xlabel="depth", ylabel="seconds per pair" if panel is panels[0] else None)
            panel.tick_params(labelleft=panel is panels[0])
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], _caption(table, points, there))


def ratios(points: pd.DataFrame) -> pd.DataFrame:
    """NTK over pNTK, seconds: a row for each depth, O, N and pair of methods that work alike."""
    keys = ["depth", "O", "N"]
    found = []
    for full, one in BEST.items():
        both = points[points["method"] == full].merge(points[points["method"] == one], on=keys, suffixes=("", "_pntk"))
        found.append(both.assign(ratio=both["seconds"] / both["seconds_pntk"])[[*keys, "method", "ratio"]])
    return pd.concat(found, ignore_index=True)


def _caption(table: pd.DataFrame, points: pd.DataFrame, there: pd.DataFrame) -> str:
    parameters = labels.range_label(table["P"])
    text = (
        f"Seconds for the kernel between two images of ResNets ({parameters} parameters) by the depth, with O outputs: "
        "for two images by themselves (three pairs, each with itself among them) and for all pairs of N images, in "
        "seconds per pair. NTK: all O x O entries; pNTK: one. By layers, or by gradients written out and multiplied. "
        "Crosses are published, for Tiny ImageNet (O = 200), on unnamed hardware and shared among many pairs as it "
        "seems; they stand where O = 200, and are of other networks and images than the lines beside them."
    )
    wide = there.pivot_table(index="resnet_depth", columns="kernel", values="seconds_per_pair")
    quotient = wide["eNTK"] / wide["pNTK"]
    text += (
        f" Claim: the NTK takes {quotient.min():.0f} to {quotient.max():.0f} times as long as the pNTK at O = 200. "
        "Measured, median and range:"
    )
    found = ratios(points)
    for N, rows in found.groupby("N"):
        top = rows[rows["O"] == rows["O"].max()]
        if len(top):
            where = "two images by themselves" if found["N"].min() == N else f"all pairs of {N:g}"
            text += f" {curves.ratio_words(top['ratio'])} for {where}, O = {top['O'].iloc[0]:g};"
    if len(found):
        above = int((found["ratio"] >= quotient.min()).sum())
        text = f"{text[:-1]}. Conclusion: {above} of {len(found)} ratios here are as large as the least published one."
    return (
        f"{text} The NTK takes O backward passes for each image and O^2 products for each pair, the pNTK one of "
        "either: the ratio is at most O where passes dominate, as for images by themselves, and goes up to O^2 where "
        "products do, so ratios far above O can only be amortised ones, over many pairs."
    )
