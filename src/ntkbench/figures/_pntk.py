"""What the figures of how well kernels between samples stand for the NTK share: quantities, looks and words."""

from __future__ import annotations

from collections.abc import Iterable

import pandas as pd

from ntkbench.figures import _looks, _series

QUANTITIES = {
    "difference": "‖A ⊗ I − Θ‖ / ‖Θ‖",
    "lambda_max_error": "largest eigenvalue,\nrelative error",
    "condition_ratio": "condition number,\nover that of Θ",
    "off_diagonal": "off-diagonal mass of\nΘ's O × O blocks",
    "prediction_difference": "kernel regression,\ndifference of predictions",
    "accuracy": "kernel regression,\ntest accuracy",
}
COLUMNS = ("family", "width", "init", "step", "train", "test", "kernel", "title", "P", *QUANTITIES)
METHODS = {"trace": "trace_kernel"}
"""Kernels whose method has another name, and with it its look."""
FAMILIES = {"fc": "fully connected", "conv": "ConvNet", "resnet18": "ResNet18", "wide_resnet": "WideResNet"}


def looks_of(plotted: pd.DataFrame) -> dict[str, _looks.Look]:
    """The look of each kernel, by the kernel's name."""
    named = plotted[plotted["kernel"] != "full"]
    methods = named.assign(method=named["kernel"].replace(METHODS))
    found = _series.looks(methods)
    back = {method: kernel for kernel, method in METHODS.items()}
    return {back.get(method, method): look for method, look in found.items()}


def summary(points: pd.DataFrame, quantities: Iterable[str]) -> pd.DataFrame:
    """Medians and quartiles over initialisations, one row for each family, width, step, kernel and quantity."""
    case = ["family", "width", "step", "kernel", "title"]
    long = points.melt(case, list(quantities), "quantity", "value").dropna()
    groups = long.groupby([*case, "quantity"], sort=False)["value"]
    made = groups.quantile([0.25, 0.5, 0.75]).unstack()
    made.columns = ["value_q25", "value", "value_q75"]
    return made.assign(inits=groups.size()).reset_index()


def slope(points: pd.DataFrame, kernel: str) -> tuple[float, float]:
    """Of the relative difference by width, over all initialisations, with half of its 95 % interval."""
    rows = points[(points["kernel"] == kernel) & points["difference"].notna()]
    return _series.slope(rows["width"], rows["difference"])


def images(points: pd.DataFrame) -> str:
    """Training and held-out images, of which some families may have fewer."""
    sizes = points.groupby(["train", "test"], sort=False)["family"].unique()
    said = [
        f"{train:g} training and {test:g} held-out images"
        + (f" for {', '.join(FAMILIES[family] for family in families)}" if len(sizes) > 1 else "")
        for (train, test), families in sizes.items()
    ]
    return ", ".join(said)
