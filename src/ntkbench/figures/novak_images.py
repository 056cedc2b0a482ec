"""Novak et al. 2022, figures 2 and 4: operations and seconds for an NTK of residual networks against O."""

from __future__ import annotations

import pandas as pd
from matplotlib.axes import Axes

from ntkbench.figures import _canvas, _labels, _looks, _published, _series, base

TABLE = "novak_images"
COLUMNS = ("network", "width", "side", "N", "O", "P", "method", "title", "quantity", "flops", "flops_per_entry")
COLUMNS += ("seconds", "seconds_q25", "seconds_q75", "memory_bytes")
NOTEBOOK = "ResNet18 224x224, eval BatchNorm"
SAME = {"network": "ResNet18", "width": 64, "side": 224}
"""The network of neural-tangents' notebook, as the study's table has it."""
LABELS = {"flops_per_entry": "FLOP per entry", "seconds": "seconds"}
OURS, THEIRS = "structured_derivatives", "nt_structured_derivatives"
NAMES = {
    "nt_jacobian_contraction": "Jacobian contraction",
    "nt_ntk_vector_products": "NTK-vector products",
    THEIRS: "structured derivatives",
    OURS: "ours",
}


def draw(table: pd.DataFrame) -> base.Drawing:
    """Operations for an entry above, seconds for the kernel below; a column for each network."""
    counted, timed = base.measured(table, "flops_per_entry"), base.measured(table, "seconds")
    if not len(counted):
        return base.nothing(table, _labels.why_not(table))
    looks, networks = _series.looks(pd.concat([counted, timed])), list(dict.fromkeys(counted["network"]))
    figure, grid = _canvas.sheet(
        [_canvas.Row(2.5, above=0.6, below=0.2), _canvas.Row(2.5, above=0.1, below=0.42)],
        len(networks),
        title="Operations and seconds for an NTK of residual networks (Novak et al., figures 2 and 4)",
        subtitle=base.settings_line(table),
        key=[
            ("program", _series.entries(looks.values())),
            ("how to read", [_series.QUARTILES, (_series.PUBLISHED[0], "published, on a V100")]),
        ],
        gap=0.3,
    )
    there = published(table)
    for column, network in enumerate(networks):
        both = {"flops_per_entry": counted, "seconds": timed}
        for panels, (quantity, points) in zip(grid, both.items(), strict=True):
            panel = panels[column]
            _lines(panel, points[points["network"] == network], quantity, looks)
            shown = there[(there["network"] == network) & (quantity == "seconds")]
            for method, rows in shown.groupby("method", sort=False):
                if method in looks:
                    _series.published(panel, rows, looks[method].colour, "O", "seconds")
            values = [*points[quantity], *(there["seconds"] if quantity == "seconds" else ())]
            _series.logarithmic(panel, [*table["O"], *there["O"]], values)
            _series.counts(panel, table["O"])
            panel.tick_params(labelleft=not column, labelbottom=panels is grid[-1])
            if not len(points[points["network"] == network]):
                _canvas.note(panel, "nothing timed")
        rows = table[table["network"] == network]
        heading = f"{network}, {rows['side'].iloc[0]:g} × {rows['side'].iloc[0]:g}, N = {rows['N'].iloc[0]:g}"
        _canvas.title(grid[0][column], heading, f"P = {_labels.count_label(rows['P'].min())}")
        grid[-1][column].set_xlabel("outputs O")
    for panels, label in zip(grid, LABELS.values(), strict=True):
        panels[0].set_ylabel(label)
    return base.Drawing(figure, table[[*COLUMNS, "status", "reason"]], _caption(table, counted, timed, there))


def published(table: pd.DataFrame) -> pd.DataFrame:
    """The notebook's seconds, where the table has the same network with as many samples."""
    same = table[(table[list(SAME)] == pd.Series(SAME)).all(axis=1)]
    known = _published.values("novak_notebooks", network=NOTEBOOK).assign(network=SAME["network"])
    known = known[known["N"].isin(set(same["N"]))]
    return known.assign(seconds=known["milliseconds"] / 1e3)


def _lines(panel: Axes, points: pd.DataFrame, quantity: str, looks: dict[str, _looks.Look]) -> None:
    for method, line in points.groupby("method", sort=False):
        _series.line(panel, line, "O", quantity, looks[method])


def _caption(table: pd.DataFrame, counted: pd.DataFrame, timed: pd.DataFrame, there: pd.DataFrame) -> str:
    text = (
        "Above: floating-point operations of the whole NTK over its N^2 O^2 entries, nothing being run and memory no "
        "object: of neural-tangents' programs and the Jacobian alone by the cost analysis of the lowered program; of "
        "our kernel by layers by the shapes of its matrix products and convolutions, without element-wise work. Below: "
        "seconds for the whole kernel, without compiling and tracing. BatchNorm in eval mode; ResNets have the stem of "
        "ImageNet, WideResNets one of 3x3."
    )
    operations = _wide(counted, "flops")
    text += f" Operations in units of neural-tangents' structured derivatives: {_ratios(operations)}."
    if len(timed):
        text += f" Seconds in the same unit: {_ratios(_wide(timed, 'seconds'))}."
    return text + _left_out(table) + _beside(operations, _wide(timed, "seconds"), there)


def _wide(points: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return points.pivot_table(index=["network", "N", "O"], columns="method", values=quantity)


def _ratios(wide: pd.DataFrame) -> str:
    others = [name for name in NAMES if name in wide and name != THEIRS and THEIRS in wide]
    said = [f"{NAMES[name]} {_series.ratio_words(wide[name] / wide[THEIRS])}" for name in others]
    return "; ".join(said) or "nothing to compare"


def _left_out(table: pd.DataFrame) -> str:
    """What was not timed, and why."""
    lost = table[(table["quantity"] == "seconds") & (table["status"] != "ok")]
    reasons = lost["reason"].str.replace("about .*, over", "over", regex=True)  # each O has its own number
    said = []
    for (network, reason), rows in lost.groupby(["network", reasons], sort=False):
        outputs = ", ".join(f"{output:g}" for output in sorted(rows["O"].unique()))
        said.append(f"{network} with O = {outputs}: {reason}")
    return f" Not timed: {'; '.join(said)}." if said else ""


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
