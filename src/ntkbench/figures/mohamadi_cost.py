"""Mohamadi et al. 2023, figure 1: seconds for NTK and pNTK of ResNets against depth."""

from __future__ import annotations

import pandas as pd
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources, styles

TABLE = "mohamadi_cost"
COLUMNS = ("depth", "N", "O", "P", "method", "title", "kernel", "seconds", "seconds_per_pair", "pairs")
PUBLISHED = {"eNTK": "jacobian_contraction", "pNTK": "sum_of_logits"}
"""Kernels in the published figure and the methods closest to their computation."""
BEST = {"structured_derivatives": "structured_sum_of_logits", "jacobian_contraction": "sum_of_logits"}
"""Pairs of methods for NTK and pNTK that work alike."""
WAYS = {"structured_derivatives": "by layers", "jacobian_contraction": "gradients written out"}
"""How both kernels are computed, by the method of the NTK."""
CAPTION = (
    "Seconds of the NTK (all O x O entries) over those of the pNTK (one) for ResNets: two images alone, and all pairs "
    "of N images. Both are computed by layers or from gradients written out. Theory: O where passes dominate, "
    "O^2 where products do. Crosses: published, at O = 200, on other images and hardware."
)


def draw(table: pd.DataFrame) -> base.Drawing:
    """Ratios of seconds, a panel for each N: against depth if one O was measured, else against O."""
    points = base.measured(table, "seconds_per_pair", "N", "O", "depth")
    found = ratios(points)
    found = found[found["ratio"] > 0]
    if not len(found):
        return base.nothing(table, labels.why_not(table))
    looks = curves.looks(points)
    there = sources.values("mohamadi_figure1_tiny_imagenet")
    wide = there.pivot_table(index="resnet_depth", columns="kernel", values="seconds_per_pair")
    known = pd.DataFrame({"ratio": wide["eNTK"] / wide["pNTK"]}).rename_axis("depth").reset_index()
    known = known.assign(O=there["outputs"].max())
    published = f"published, O = {there['outputs'].max():g}"
    x = "O" if found["O"].nunique() > 1 else "depth"
    samples, sizes = sorted(found["N"].unique()), [*found[x], *known[x]]
    ways = [method for method in BEST if method in set(found["method"])]
    theory = Line2D([], [], color=styles.GREY, linewidth=1.0, linestyle="--")
    low, high = found["O"].min(), found["O"].max()
    figure, (panels,) = canvas.sheet(
        [canvas.Row(3.2, above=0.55, below=0.42)],
        len(samples),
        title=f"The NTK of a ResNet takes {labels.span(found['ratio'])} times as long as its pNTK at "
        f"O = {labels.range_label(found['O'])}",
        subtitle=base.settings_line(table),
        key=[
            ("both kernels", [(Line2D([], [], **curves.style(looks[way])), WAYS[way]) for way in ways]),
            ("how to read", [(curves.PUBLISHED[0], f"{published}, Tiny ImageNet"), (theory, "theory: O and O²")]),
        ],
        gap=0.6,
    )
    for panel, N in zip(panels, samples, strict=True):
        rows = found[found["N"] == N]
        canvas.title(panel, "two images alone" if N == 2 else f"all pairs of {N:g} images", labels.span(rows["ratio"]))
        for method in ways:
            for _, line in rows[rows["method"] == method].groupby("depth" if x == "O" else "O"):
                curves.line(panel, line, x, "ratio", looks[method])
        curves.published(panel, known, "black", x, "ratio")
        if x == "depth":  # the published O differs from ours
            where = known[["depth", "ratio"]].iloc[-1]
            panel.annotate(published, where, xytext=(4, -15), textcoords="offset points", ha="right", fontsize=9)
        curves.logarithmic(panel, sizes, [*found["ratio"], *known["ratio"], low, high**2])
        for power, name in ((1, "O"), (2, "O²")):
            ends = panel.get_xlim()
            values = [end**power if x == "O" else low**power for end in ends]
            panel.plot(ends, values, color=styles.GREY, linewidth=1.0, linestyle="--", zorder=1)
            where = (ends[0], values[0]) if x == "depth" else (low, low**power)
            said = name if x == "O" else f"{name} = {low**power:g}"
            panel.annotate(said, where, xytext=(4, 3), textcoords="offset points", color=styles.GREY, fontsize=9)
        curves.counts(panel, sizes)
        panel.set(xlabel="outputs O" if x == "O" else "depth")
    panels[0].set_ylabel("seconds, NTK over pNTK")
    return base.Drawing(figure, found, CAPTION, _claims(table, points, there))


def ratios(points: pd.DataFrame) -> pd.DataFrame:
    """NTK over pNTK, seconds: a row for each depth, O, N and pair of methods that work alike."""
    keys = ["depth", "O", "N"]
    found = []
    for full, one in BEST.items():
        both = points[points["method"] == full].merge(points[points["method"] == one], on=keys, suffixes=("", "_pntk"))
        found.append(both.assign(ratio=both["seconds"] / both["seconds_pntk"])[[*keys, "method", "ratio"]])
    return pd.concat(found, ignore_index=True)


def _claims(table: pd.DataFrame, points: pd.DataFrame, there: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """NTK over pNTK at the most outputs and images: from gradients written out, as published, and by layers."""
    wide = there.pivot_table(index="resnet_depth", columns="kernel", values="seconds_per_pair")
    quotient, outputs = wide["eNTK"] / wide["pNTK"], there["outputs"].max()
    found = ratios(points)
    found = found[found["O"] == found["O"].max()]
    found = found[found["N"] == found["N"].max()]
    if not len(found):
        return ()
    alike = PUBLISHED["eNTK"]
    common = quotient.index.intersection(found.loc[found["method"] == alike, "depth"])
    if len(common):  # depths that were published and measured alike
        found = found[found["depth"].isin(common)]
    known = float(quotient[common if len(common) else quotient.index].median())
    by = {method: claims.ranged(rows["ratio"]) for method, rows in found.groupby("method")}
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
