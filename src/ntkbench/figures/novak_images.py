"""Novak et al. 2022, figures 2 and 4: operations and seconds for an NTK of networks for images against O."""

from __future__ import annotations

import math

import pandas as pd
from matplotlib.axes import Axes

from ntkbench.figures.plotting import base, canvas, claims, curves, labels, sources, styles

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
    drawn = table[[*COLUMNS, "status", "reason"]]
    return base.Drawing(figure, drawn, _caption(table, counted), _claims(table))


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


def _caption(table: pd.DataFrame, counted: pd.DataFrame) -> str:
    families = [said for name, said in FAMILIES.items() if table["network"].str.startswith(name).any()]
    text = (
        "Above: operations of the whole NTK over its N^2 O^2 entries, nothing being run. Below: seconds for the whole "
        f"kernel, without compiling. {'; '.join(families)}."
    )
    return text + _fewest(_wide(counted, "flops")) + _left_out(table)


def _wide(points: pd.DataFrame, quantity: str) -> pd.DataFrame:
    return points.pivot_table(index=["network", "N", "O"], columns="method", values=quantity, sort=False)


def _fewest(operations: pd.DataFrame) -> str:
    """Which of neural-tangents' implementations takes the fewest operations at the largest O."""
    theirs = operations[[name for name in operations if name in NAMES and name != OURS]].dropna()
    if len(theirs.columns) < 2 or not len(theirs):
        return ""
    most = theirs.index.get_level_values("O").max()
    last = theirs.xs(most, level="O")
    fewest = last.idxmin(axis=1).map(NAMES).value_counts()
    said = ", ".join(f"{name} for {count} of {len(last)} networks" for name, count in fewest.items())
    return f" With O = {most:g}, neural-tangents takes the fewest by {said}."


def _left_out(table: pd.DataFrame) -> str:
    """How much was not measured, and the main reason; the plotted numbers have each reason."""
    lost = table[table["status"] != "ok"]
    if not len(lost):
        return ""
    reasons = lost["reason"].str.replace("about .*, over", "over", regex=True)  # each O has its own number
    most = labels.short(reasons.mode().iloc[0], 120)
    return f" Not measured: {len(lost)} of {len(table)} cases, mostly: {most}."


def _claims(table: pd.DataFrame) -> tuple[claims.Claim, ...]:
    """The notebook's seconds over those of structured derivatives, where the table has the same network."""
    same = table[(table[list(SAME)] == pd.Series(SAME)).all(axis=1)]
    if not len(same):
        return ()
    known = sources.values("novak_notebooks", network=NOTEBOOK).dropna(subset="milliseconds")
    return tuple(
        _claim(same, rows.set_index("method"), method)
        for _, rows in known.groupby(["N", "O"], sort=False)
        for method in rows["method"]
        if method != THEIRS and THEIRS in set(rows["method"])
    )


def _claim(same: pd.DataFrame, known: pd.DataFrame, method: str) -> claims.Claim:
    """One implementation over structured derivatives, at the sizes of the rows that are known of it.

    Args:
        same: rows of the notebook's network.
        known: the notebook's, by method, of one case.
        method: the implementation.
    """
    samples, outputs, hardware = known[["N", "O", "hardware"]].iloc[0]
    ratio = float(known["milliseconds"][method] / known["milliseconds"][THEIRS])
    case = same[(same["N"] == samples) & (same["O"] == outputs)]
    seconds, operations = (_pair(case, quantity, method) for quantity in ("seconds", "flops"))
    measured: claims.Interval = claims.UNKNOWN
    notes: list[str] = []
    if operations:
        notes.append(f"in operations the ratio is {labels.rounded(operations[0]['flops'] / operations[1]['flops'])}")
    if seconds:
        one, other = seconds
        low, high = one["seconds_q25"] / other["seconds_q75"], one["seconds_q75"] / other["seconds_q25"]
        measured = float(one["seconds"] / other["seconds"]), float(low), float(high)
    else:
        notes.append(_why(case, samples, outputs))
    name = f"ResNet18, N = {samples:g}, O = {outputs:g}"
    return claims.Claim(
        source="neural-tangents' notebook",
        name=f"{name}, seconds of {NAMES[method]}",
        statement=f"structured derivatives are {labels.rounded(ratio, 3)} times faster than {NAMES[method]} ({name})",
        published=ratio,
        accuracy="printed in a notebook",
        there=f"{NOTEBOOK}, {hardware}",
        here=f"the same network, {same['device'].iloc[0]}",
        measured=measured,
        spread="quartiles of calls",
        runs=claims.count(min(row.get("calls", 1) for row in seconds)) if seconds else 0,
        of="calls",
        unit="times",
        note="; ".join(notes),
    )


def _pair(case: pd.DataFrame, quantity: str, method: str) -> list[pd.Series]:
    """The rows of a quantity by a method and by structured derivatives; none if one of them is missing."""
    rows = base.measured(case[case["quantity"] == quantity], quantity)
    rows = rows[rows[quantity] > 0].drop_duplicates("method").set_index("method")
    return [rows.loc[name] for name in (method, THEIRS)] if {method, THEIRS} <= set(rows.index) else []


def _why(case: pd.DataFrame, samples: float, outputs: float) -> str:
    """Why a case was not timed."""
    lost = case[(case["quantity"] == "seconds") & (case["status"] != "ok")]
    reason = lost["reason"].iloc[0] if len(lost) else f"the study has no N = {samples:g} with O = {outputs:g}"
    return f"not timed here: {reason}"
