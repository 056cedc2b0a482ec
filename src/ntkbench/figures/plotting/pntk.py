"""Code shared by the figures of kernels between samples that approximate the NTK: quantities, looks and labels."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from ntkbench.figures.plotting import base, canvas, curves, labels, styles

QUANTITIES = {
    "difference": "‖A ⊗ I − Θ‖ / ‖Θ‖",
    "lambda_max_error": "largest eigenvalue,\nrelative error",
    "condition_ratio": "condition number,\nover that of Θ",
    "off_diagonal": "off-diagonal mass of\nΘ's O × O blocks",
    "prediction_difference": "kernel regression,\ndifference of predictions",
    "accuracy": "kernel regression,\ntest accuracy",
}
COLUMNS = ("family", "width", "init", "step", "train", "test", "kernel", "title", "P", *QUANTITIES)
PNTK = "sum_of_logits"
METHODS = {"trace": "trace_kernel"}
"""Methods of the kernels whose names differ from the method's; looks are by method."""
DATA = {"digits": "scikit-learn's digits", "cifar10": "a part of CIFAR-10 (JPEG copies)"}
FAMILIES = {"fc": "fully connected", "conv": "ConvNet", "resnet18": "ResNet18", "wide_resnet": "WideResNet"}


def panels(
    table: pd.DataFrame,
    plotted: pd.DataFrame,
    quantities: Mapping[str, str],
    *,
    title: str,
    key: list[tuple[str, list]],
    above: float,
    xlabel: str,
) -> tuple[Figure, dict[tuple[str, str], Axes]]:
    """A row for each quantity, labelled, and a column for each family; panels by quantity and family.

    Args:
        table: table of the study, for the settings.
        plotted: medians and quartiles, as :func:`summary` returns them.
        quantities: names to labels, from top to bottom.
        title, key: title and key of the figure.
        above: inches above each row but the first.
        xlabel: label of the x axes of the last row.
    """
    families = sorted(set(plotted["family"]), key=lambda name: ([*FAMILIES, name].index(name), name))
    figure, grid = canvas.sheet(
        [canvas.Row(1.75, above=above if i else 0.75, below=0.28) for i in range(len(quantities))],
        len(families),
        title=title,
        subtitle=base.settings_line(table),
        key=key,
        left=1.15,
        gap=0.65,
    )
    for row, label in zip(grid, quantities.values(), strict=True):
        row[0].set_ylabel(label)
    for panel in grid[-1]:
        panel.set_xlabel(xlabel)
    made = {
        (quantity, family): panel
        for row, quantity in zip(grid, quantities, strict=True)
        for panel, family in zip(row, families, strict=True)
    }
    return figure, made


def family_label(name: str) -> str:
    """The title of a family of networks."""
    return FAMILIES.get(name, labels.name_label(name))


def looks_of(plotted: pd.DataFrame) -> dict[str, styles.Look]:
    """The look of each kernel, by the kernel's name."""
    named = plotted[plotted["kernel"] != "full"]
    methods = named.assign(method=named["kernel"].replace(METHODS))
    found = curves.looks(methods)
    back = {method: kernel for kernel, method in METHODS.items()}
    return {back.get(method, method): look for method, look in found.items()}


def summary(points: pd.DataFrame, quantities: Iterable[str]) -> pd.DataFrame:
    """Medians and quartiles over initialisations, one row for each family, width, step, kernel and quantity."""
    case = ["family", "width", "step", "kernel", "title"]
    long = points.melt(case, list(quantities), "quantity", "value").dropna()
    groups = long.groupby([*case, "quantity"], sort=False)["value"]
    parts = {"value_q25": groups.quantile(0.25), "value": groups.median(), "value_q75": groups.quantile(0.75)}
    return pd.DataFrame(parts).assign(inits=groups.size()).reset_index()


def slope(points: pd.DataFrame, kernel: str) -> tuple[float, float]:
    """Slope of the relative difference by width, over all initialisations, with half of its 95 % interval."""
    rows = points[(points["kernel"] == kernel) & points["difference"].notna()]
    return curves.slope(rows["width"], rows["difference"])


def data(points: pd.DataFrame) -> str:
    """The images that networks are trained on; older tables lack the column, and have digits."""
    names = points["data"].unique() if "data" in points else ["digits"]
    return " and ".join(DATA.get(name, labels.name_label(name)) for name in names)


def images(points: pd.DataFrame) -> str:
    """Numbers of training and held-out images; some families may have fewer."""
    sizes = points.groupby(["train", "test"], sort=False)["family"].unique()
    said = [
        f"{train:g} training and {test:g} held-out images"
        + (f" for {', '.join(map(family_label, families))}" if len(sizes) > 1 else "")
        for (train, test), families in sizes.items()
    ]
    return ", ".join(said)
