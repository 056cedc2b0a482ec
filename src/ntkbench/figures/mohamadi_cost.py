"""Mohamadi et al. 2023, figure 1: seconds for NTK and pNTK of ResNets against depth."""

from __future__ import annotations

import pandas as pd

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources

TABLE = "mohamadi_cost"
COLUMNS = ("depth", "N", "O", "P", "method", "title", "kernel", "seconds", "seconds_per_pair", "pairs")
PUBLISHED = {"eNTK": "jacobian_contraction", "pNTK": "sum_of_logits"}
"""Kernels in the published figure and the methods nearest to how they were computed."""
BEST = {"structured_derivatives": "structured_sum_of_logits", "jacobian_contraction": "sum_of_logits"}
"""Pairs of methods for NTK and pNTK that work alike."""
CAPTION = (
    "Seconds for the kernel between two images of ResNets against depth: two images by themselves (three pairs, each "
    "with itself among them), and all pairs of N images, per pair. NTK: all O x O entries; pNTK: one; by layers, or "
    "gradients written out and multiplied. The ratio is at most O where passes dominate and goes up to O^2 where "
    "products do. Crosses are published, of other images and hardware."
)


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
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], CAPTION, _claims(table, points, there))


def ratios(points: pd.DataFrame) -> pd.DataFrame:
    """NTK over pNTK, seconds: a row for each depth, O, N and pair of methods that work alike."""
    keys = ["depth", "O", "N"]
    found = []
    for full, one in BEST.items():
        both = points[points["method"] == full].merge(points[points["method"] == one], on=keys, suffixes=("", "_pntk"))
        found.append(both.assign(ratio=both["seconds"] / both["seconds_pntk"])[[*keys, "method", "ratio"]])
    return pd.concat(found, ignore_index=True)


def _claims(table: pd.DataFrame, points: pd.DataFrame, there: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """NTK over pNTK at the most outputs and images, written out as published, and by layers."""
    wide = there.pivot_table(index="resnet_depth", columns="kernel", values="seconds_per_pair")
    quotient, outputs = wide["eNTK"] / wide["pNTK"], there["outputs"].max()
    found = ratios(points)
    found = found[found["O"] == found["O"].max()]
    found = found[found["N"] == found["N"].max()]
    if not len(found):
        return ()
    same = quotient[quotient.index.isin(found["depth"])]
    known = float((same if len(same) else quotient).median())
    by = {method: claims.ranged(rows["ratio"]) for method, rows in found.groupby("method")}
    alike = PUBLISHED["eNTK"]
    output, samples = found["O"].iloc[0], found["N"].iloc[0]
    return (
        claims.Claim(
            source="Mohamadi et al. 2023, figure 1",
            name=f"NTK over pNTK, seconds at O = {outputs:g}",
            statement=f"the NTK of a ResNet takes {labels.rounded(known, 3)} times as long as its pNTK at "
            f"O = {outputs:g} ({quotient.min():.0f} to {quotient.max():.0f} over all depths)",
            published=known,
            accuracy="2 %, read off an image",
            there="Tiny ImageNet, width 64, unnamed hardware, shared among many pairs as it seems",
            here=f"ResNets of {labels.range_label(table['P'])} parameters, O = {output:g}, pairs of {samples:g} images",
            measured=by.get(alike, claims.UNKNOWN),
            spread="range over depths",
            runs=int((found["method"] == alike).sum()),
            of="depths",
            unit="times",
            best=next((by[method] for method in BEST if method != alike and method in by), claims.UNKNOWN),
            best_title="the NTK by layers",
            addressed=bool(output == outputs),
            note="" if output == outputs else f"measured at O = {output:g}, and the ratio grows with O",
        ),
    )
