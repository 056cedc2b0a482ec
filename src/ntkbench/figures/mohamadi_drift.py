"""A caveat to Mohamadi et al. 2023: in training with weight decay, the pNTK drifts to the last layer's kernel."""

from __future__ import annotations

import pandas as pd
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, curves, labels
from ntkbench.figures.plotting.pntk import looks_of

TABLE = "mohamadi_drift"
COLUMNS = ("loss", "loss_title", "init", "step", "kernel", "title", "difference", "sum_direction", "pntk_to_last_layer")
TO_LAST = "pntk_to_last_layer"
DECAY = "cross_entropy_decay"
"""The loss that the explanation in the caption is about."""
FEWEST = 3
"""Minimum number of initialisations whose quartiles are compared."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A column for each loss: differences of all kernels above, the readout's sum and the pNTK's drift below."""
    points = base.measured(table, "difference", "step")
    if not len(points):
        return base.nothing(points, labels.why_not(table))
    plotted = _summary(points)
    looks = looks_of(plotted)
    losses = list(dict.fromkeys(plotted["loss"]))
    titles = points.drop_duplicates("loss").set_index("loss")["loss_title"]
    own = [
        (Line2D([], [], color="black", linewidth=1.6), "‖1ᵀV‖ / ‖V‖, V the readout"),
        (Line2D([], [], color=canvas.PALE, linewidth=2.2, linestyle="--"), "‖pNTK − last layer‖ / ‖pNTK‖"),
    ]
    figure, grid = canvas.sheet(
        [canvas.Row(2.4, above=0.6, below=0.3), canvas.Row(2.0, above=0.1, below=0.45)],
        len(losses),
        title=_title(plotted, titles),
        subtitle=base.settings_line(table),
        key=[("kernel", curves.entries(looks.values())), ("below", own), ("how to read", [curves.QUARTILES])],
        gap=0.35,
    )
    for column, loss in enumerate(losses):
        here, below = plotted[plotted["loss"] == loss], grid[1][column]
        panel = grid[0][column]
        canvas.title(panel, labels.short(titles[loss]), "")
        for kernel, rows in here.groupby("kernel", sort=False):
            curves.line(panel, rows, "step", "difference", looks[kernel])
        panel.set_ylim(0, 1.02 * max(1.0, plotted["difference_q75"].max()))
        once = here[here["kernel"] == "sum_of_logits"]
        for quantity, style in (("sum_direction", own[0][0]), (TO_LAST, own[1][0])):
            below.plot(once["step"], once[quantity], color=style.get_color(), linewidth=style.get_linewidth(),
                       linestyle=style.get_linestyle(), zorder=3)  # fmt: skip
            below.fill_between(once["step"], once[f"{quantity}_q25"], once[f"{quantity}_q75"], alpha=0.15,
                               color=style.get_color(), linewidth=0)  # fmt: skip
        values = plotted[["sum_direction", TO_LAST]].stack()
        below.set(yscale="log", xlabel="steps of gradient descent", ylim=canvas.limits(values))
        canvas.decades(below.yaxis, *below.get_ylim())
        for axes in (panel, below):
            axes.tick_params(labelleft=column == 0)
        panel.tick_params(labelbottom=False)
    grid[0][0].set_ylabel("‖A ⊗ I − Θ‖ / ‖Θ‖")
    grid[1][0].set_ylabel("shares")
    return base.Drawing(figure, plotted, _caption(plotted, titles))


def _summary(points: pd.DataFrame) -> pd.DataFrame:
    quantities = ["difference", "sum_direction", TO_LAST]
    groups = points.groupby(["loss", "step", "kernel", "title"], sort=False)[quantities]
    parts = [groups.quantile(q).add_suffix(suffix) for q, suffix in ((0.5, ""), (0.25, "_q25"), (0.75, "_q75"))]
    return pd.concat(parts, axis=1).assign(inits=groups.size()).reset_index()


def _ends(plotted: pd.DataFrame, titles: pd.Series) -> dict[str, pd.Series]:
    """The pNTK at the last step, by the title of the loss, sorted from the nearest to the last layer's kernel."""
    once = plotted[plotted["kernel"] == "sum_of_logits"]
    ends = {titles[loss]: rows.iloc[-1] for loss, rows in once.groupby("loss", sort=False)}
    return dict(sorted(ends.items(), key=lambda item: item[1][TO_LAST]))


def _title(plotted: pd.DataFrame, titles: pd.Series) -> str:
    ends = _ends(plotted, titles)
    if not ends:
        return "Kernels between samples along training"
    (near, last), *others = ends.items()
    loss = labels.short(near, 40).replace(", ", " and ")
    text = f"Trained with {loss}, the pNTK differs from the last layer's kernel by {last[TO_LAST]:.2g}"
    if others:
        text += f" (other losses: {labels.span([end[TO_LAST] for _, end in others])})"
    return text


def _caption(plotted: pd.DataFrame, titles: pd.Series) -> str:
    """What is drawn, and which loss brings the pNTK closest to the last layer's kernel."""
    said = "Kernels between samples against Theta (above) and the last layer's kernel (below), medians with quartiles."
    ends = _ends(plotted, titles)
    if not ends:
        return said
    nearest, *others = ends
    near = labels.interval_label(*(ends[nearest][f"{TO_LAST}{end}"] for end in ("", "_q25", "_q75")))
    found = f"With {nearest}, the pNTK ends {f'closest to it: {near}' if others else f'at {near} from it'}"
    if others and min(end["inits"] for end in ends.values()) >= FEWEST:
        apart = ends[nearest][f"{TO_LAST}_q75"] < min(ends[other][f"{TO_LAST}_q25"] for other in others)
        found += ", quartiles apart from all others" if apart else ", quartiles overlap with others"
    why = (
        "Cross-entropy's gradients sum to zero over logits, so weight decay shrinks the readout along their sum, and "
        "the pNTK keeps the last layer alone."
    )
    return labels.fitted(said, f"{found}.", why if ends[nearest]["loss"] == DECAY else "")
