"""Novak et al. 2022, figures 2 and 4: operations and seconds for an NTK of networks for images against O."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes

from ntkbench.figures.plotting import base, canvas, curves, labels, sources, styles

TABLE = "novak_images"
COLUMNS: tuple[str, ...] = ("network", "width", "side", "N", "O", "P", "method", "title", "quantity", "flops")
COLUMNS += ("flops_per_entry", "seconds", "seconds_q25", "seconds_q75", "memory_bytes")
NOTEBOOK = "ResNet18 224x224, eval BatchNorm"
SAME = {"network": "ResNet18", "width": 64, "side": 224}
"""The network of neural-tangents' notebook, as the study's table has it."""
MOST = 4
"""Networks side by side."""
LABELS = {"flops_per_entry": "FLOP per entry", "seconds": "seconds"}
OURS, THEIRS = "structured_derivatives", "nt_structured_derivatives"
NAMES = {
    "nt_jacobian_contraction": "Jacobian contraction",
    "nt_ntk_vector_products": "NTK-vector products",
    THEIRS: "structured derivatives",
    OURS: "ours",
}
FAMILIES = {
    "ResNet": "ResNets have the stem of ImageNet and BatchNorm in eval mode",
    "WideResNet": "WideResNets have a stem of 3x3 and BatchNorm in eval mode",
    "ViT": "Vision Transformers are read out at the class token",
    "Mixer": "MLP-Mixers are read out at the mean over patches",
}
"""How a network's title begins, and what is to be said of its family."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A column for each network, wrapped into rows: operations for an entry above, seconds for the kernel below."""
    counted, timed = base.measured(table, "flops_per_entry"), base.measured(table, "seconds")
    if not len(counted):
        return base.nothing(table, labels.why_not(table))
    looks, networks = curves.looks(pd.concat([counted, timed])), list(dict.fromkeys(counted["network"]))
    columns = math.ceil(len(networks) / math.ceil(len(networks) / MOST))  # rows as full as each other
    rows = canvas.in_rows(networks, columns)
    height = 2.5 if len(rows) == 1 else 2.0
    figure, grid = canvas.sheet(
        [canvas.Row(height, above=0.6, below=0.2), canvas.Row(height, above=0.1, below=0.5)] * len(rows),
        columns,
        title="Operations and seconds for an NTK of networks for images (Novak et al., figures 2 and 4)",
        subtitle=base.settings_line(table),
        key=[
            ("program", curves.entries(looks.values())),
            ("how to read", [curves.QUARTILES, (curves.PUBLISHED[0], "published, on a V100")]),
        ],
        gap=0.3,
    )
    there = published(table)
    for row, above, below in zip(rows, grid[::2], grid[1::2], strict=True):
        for panels, (quantity, label) in zip((above, below), LABELS.items(), strict=True):
            points = counted if panels is above else timed
            panels[0].set_ylabel(label)
            canvas.hide(panels[len(row) :])
            for panel, network in zip(panels, row, strict=False):
                _fill(panel, points[points["network"] == network], quantity, looks)
                shown = there.dropna(subset="seconds") if panels is below else there.iloc[:0]
                for method, known in shown[shown["network"] == network].groupby("method", sort=False):
                    if method in looks:
                        curves.published(panel, known, looks[method].colour, "O", "seconds")
                curves.logarithmic(panel, [*table["O"], *there["O"]], [*points[quantity], *shown["seconds"]])
                curves.counts(panel, [*table["O"], *there["O"]])
                panel.tick_params(labelleft=panel is panels[0], labelbottom=panels is below)
        for top, bottom, network in zip(above, below, row, strict=False):
            of_it = table[table["network"] == network]
            side, samples, parameters = of_it["side"].iloc[0], of_it["N"].iloc[0], of_it["P"].min()
            detail = f"{side:g} × {side:g}, N = {samples:g}, P = {labels.count_label(parameters)}"
            canvas.title(top, labels.short(network), detail)
            bottom.set_xlabel("outputs O")
    caption = _caption(table, counted, timed, there)
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], caption)


def published(table: pd.DataFrame) -> pd.DataFrame:
    """The notebook's seconds, where the table has the same network with as many samples."""
    same = table[(table[list(SAME)] == pd.Series(SAME)).all(axis=1)]
    known = sources.values("novak_notebooks", network=NOTEBOOK).assign(network=SAME["network"])
    known = known[known["N"].isin(set(same["N"]))]
    return known.assign(seconds=known["milliseconds"] / 1e3)


def _fill(panel: Axes, points: pd.DataFrame, quantity: str, looks: dict[str, styles.Look]) -> None:
    for method, line in points.groupby("method", sort=False):
        curves.line(panel, line, "O", quantity, looks[method])
    if not len(points):
        canvas.note(panel, "nothing timed")


def _caption(table: pd.DataFrame, counted: pd.DataFrame, timed: pd.DataFrame, there: pd.DataFrame) -> str:
    families = [said for name, said in FAMILIES.items() if table["network"].str.startswith(name).any()]
    text = (
        "Above: floating-point operations of the whole NTK over its N^2 O^2 entries, nothing being run and memory no "
        "object: of neural-tangents' programs and the Jacobian alone by the cost analysis of the lowered program; of "
        "our kernel by layers by the shapes of its matrix products and convolutions, without element-wise work. Below: "
        f"seconds for the whole kernel, without compiling and tracing. {'; '.join(families)}."
    )
    operations = _wide(counted, "flops")
    text += f" Operations in units of neural-tangents' structured derivatives: {_ratios(operations)}."
    text += _fewest(operations)
    if len(timed):
        text += f" Seconds in the same unit: {_ratios(_wide(timed, 'seconds'))}."
    text += _left_out(table, "flops", "counted") + _left_out(table, "seconds", "timed")
    return text + _beside(operations, _wide(timed, "seconds"), there)


def _wide(points: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return points.pivot_table(index=["network", "N", "O"], columns="method", values=quantity, sort=False)


def _ratios(wide: pd.DataFrame) -> str:
    others = [name for name in NAMES if name in wide and name != THEIRS and THEIRS in wide]
    said = [f"{NAMES[name]} {curves.ratio_words(wide[name] / wide[THEIRS])}" for name in others]
    return "; ".join(said) or "nothing to compare"


def _fewest(operations: pd.DataFrame) -> str:
    """Which of neural-tangents' implementations takes the fewest operations at the largest O."""
    theirs = operations[[name for name in operations if name in NAMES and name != OURS]].dropna()
    if len(theirs.columns) < 2 or not len(theirs):
        return ""
    most = theirs.index.get_level_values("O").max()
    last = theirs.xs(most, level="O")
    best: dict[str, list[str]] = {}
    for (network, _), name in last.idxmin(axis=1).items():
        best.setdefault(NAMES[name], []).append(network)
    said = "; ".join(f"{name} for {', '.join(networks)}" for name, networks in best.items())
    return f" With O = {most:g}, neural-tangents takes the fewest by {said}."


def _left_out(table: pd.DataFrame, quantity: str, done: str) -> str:
    """What was not measured, and why."""
    rows = table[table["quantity"] == quantity]
    everything, lost = set(rows["title"]), rows[rows["status"] != "ok"]
    reasons = lost["reason"].str.replace("about .*, over", "over", regex=True)  # each O has its own number
    alike: dict[tuple[str, str], list[str]] = {}
    for (network, reason), cases in lost.groupby(["network", reasons], sort=False):
        titles = list(dict.fromkeys(cases["title"]))
        by = "" if set(titles) == everything else f" by {', '.join(titles)}"
        outputs = ", ".join(f"{output:g}" for output in sorted(cases["O"].unique()))
        alike.setdefault((f"O = {outputs}{by}", reason), []).append(network)
    said = [f"{', '.join(networks)} with {case}: {reason}" for (case, reason), networks in alike.items()]
    return f" Not {done}: {'; '.join(said)}." if said else ""


def _beside(operations: pd.DataFrame, seconds: pd.DataFrame, there: pd.DataFrame) -> str:
    """Published seconds beside operations, and beside seconds where they are of the same case."""
    said = []
    for at, rows in there.dropna(subset="seconds").groupby(["network", "N", "O"]):
        known = rows.set_index("method")["seconds"]
        if len(known) < 2 or at not in operations.index:
            continue
        said.append(f" With N = {at[1]:g}, O = {at[2]:g}: published {_over_theirs(known)}")
        for what, wide in (("operations", operations), ("seconds here", seconds)):
            values = wide.reindex(columns=known.index).loc[at] if at in wide.index else known.iloc[:0]
            if len(values) and values.notna().all():
                said[-1] += f"; {what} {_over_theirs(values)}, {_verdict(values, known)}"
    if not said:
        return ""
    text = f" Published seconds of ResNet18 on a V100, in the same unit.{'.'.join(said)}."
    if len(lost := there[there["seconds"].isna()]):
        names = " and ".join(NAMES[name] for name in lost["method"])
        text += f" With O = {lost['O'].iloc[0]:g} {names} did not fit there."
    return (
        f"{text} Operations are not seconds: contraction writes all of the Jacobian, O P numbers a sample, and reads "
        "it again."
    )


def _over_theirs(values: pd.Series) -> str:
    return " and ".join(f"{NAMES[name]} {values[name] / values[THEIRS]:.2g}" for name in values.index if name != THEIRS)


def _verdict(values: pd.Series, known: pd.Series) -> str:
    if list(values.sort_values().index) == list(known.sort_values().index):
        return "in the same order"
    cheapest = "agreeing" if values.idxmin() == known.idxmin() else "not agreeing"
    return f"in another order, {cheapest} on the cheapest"
