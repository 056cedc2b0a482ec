"""Novak et al. 2022, figures 2 and 4: operations and seconds of NTK programs for image networks."""

from __future__ import annotations

import math

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter

from ntkbench.figures.plotting import base, canvas, claims, curves, key, labels, sources, styles

TABLE = "novak_images"
COLUMNS: tuple[str, ...] = ("network", "width", "side", "N", "O", "P", "method", "title", "quantity", "flops")
COLUMNS += ("flops_per_entry", "seconds", "seconds_q25", "seconds_q75", "memory_bytes")
NOTEBOOK = "ResNet18 224x224, eval BatchNorm"
SAME = {"network": "ResNet18", "width": 64, "side": 224}
"""The network of neural-tangents' notebook, in the columns of the study's table."""
OURS, THEIRS = "structured_derivatives", "nt_structured_derivatives"
NAMES = {
    "nt_jacobian_contraction": "Jacobian contraction",
    "nt_ntk_vector_products": "NTK-vector products",
    THEIRS: "structured derivatives",
    OURS: "ours",
}
KINDS = {"ResNet": "o", "WideResNet": "D", "ViT": "^", "Mixer": "v"}
"""Markers of seconds, by the beginning of the network's name."""
OTHER = "s"
"""Marker of other networks."""
OWN = (styles.PINK, "structured derivatives here")
"""Colour and name of the reference."""
CASE = ["network", "N", "O", *base.SETTINGS]


def draw(table: pd.DataFrame) -> base.Drawing:
    """Operations (lines) and seconds (markers) over those of our structured derivatives, against O."""
    plotted = ratios(table)
    if not len(plotted):
        why = f"No program was measured together with structured derivatives.\n{labels.why_not(table)}"
        return base.nothing(table, why if (table["status"] == "ok").any() else labels.why_not(table))
    there = _published_ratios(table)
    looks = curves.looks(plotted)
    settings = [rows for _, rows in plotted.groupby(list(base.SETTINGS), dropna=False)]
    rows = canvas.in_rows(settings, 2)
    right = 0.4 + canvas.text_width([look.title for look in looks.values()], 9.5)
    columns = len(rows[0])
    figure, grid = canvas.sheet(
        [canvas.Row(3.6, above=0.25, below=0.4)] * len(rows),
        columns,
        title=_title(plotted),
        subtitle=f"{_sizes(plotted, table)}  ·  {base.settings_line(table)}",
        key=_reading(plotted, there),
        left=0.9,
        gap=right + 0.3,
        widest=(canvas.WIDTH - 0.9 - columns * (right + 0.3)) / columns,
    )
    for line, row in zip(grid, rows, strict=True):
        canvas.hide(line[len(row) :])
        for panel, here in zip(line, row, strict=False):
            _panel(panel, here, there, looks)
            if len(settings) > 1:
                apart = [column for column in base.SETTINGS if plotted[column].nunique(dropna=False) > 1]
                panel.set_title(labels.short(", ".join(f"{here[column].iloc[0]}" for column in apart), 40), loc="left")
        line[0].set_ylabel("ratio to structured derivatives here")
    return base.Drawing(figure, plotted, _caption(table, plotted), _claims(table))


def ratios(table: pd.DataFrame) -> pd.DataFrame:
    """One row for each network, N, O, program and quantity: its value over that of structured derivatives here."""
    made = []
    for quantity in ("flops", "seconds"):
        points = base.measured(table[table["quantity"] == quantity], quantity, "O")
        points = points[(points[quantity] > 0) & (points["O"] > 0)].drop_duplicates([*CASE, "method"])
        ours = points[points["method"] == OURS].set_index(CASE)[quantity]
        rows = points[points["method"] != OURS].join(ours.rename("ours"), on=CASE, how="inner")
        made.append(rows.assign(value=rows[quantity], ratio=rows[quantity] / rows["ours"]))
    return pd.concat(made)[[*CASE, "P", "method", "title", "quantity", "value", "ours", "ratio"]]


def _published_ratios(table: pd.DataFrame) -> pd.DataFrame:
    """The notebook's seconds over those of its structured derivatives."""
    known = published(table).dropna(subset="seconds")
    theirs = known[known["method"] == THEIRS].set_index(["N", "O"])["seconds"].rename("theirs")
    known = known[known["method"] != THEIRS].join(theirs, on=["N", "O"], how="inner")
    return known.assign(ratio=known["seconds"] / known["theirs"])


def _kind(network: str) -> str:
    """The kind of a network; empty if it has none."""
    return next((kind for kind in KINDS if network.startswith(kind)), "")


def _panel(panel: Axes, here: pd.DataFrame, there: pd.DataFrame, looks: dict[str, styles.Look]) -> None:
    """One setting: programs by colour, each with its name at the right end of its lines."""
    outputs = [*here["O"], *there["O"]]
    low, high = canvas.limits([1.0, *here["ratio"], *there["ratio"]], pad=1.15, ratio=3)
    panel.set(xscale="log", yscale="log", xlim=canvas.limits(outputs, ratio=8), ylim=(low, high))
    curves.counts(panel, outputs)
    ticks = [tick for tick in (0.1, 0.2, 0.5, 1, 2, 3, 5, 10, 20, 50, 100) if low <= tick <= high]
    if len(ticks) > 1 and high / low < 1e3:
        panel.set_yticks(ticks)
        panel.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}×"))
        panel.minorticks_off()
    else:
        canvas.decades(panel.yaxis, low, high)
    panel.axhline(1, color=OWN[0], linewidth=3, zorder=1.5)
    networks = list(dict.fromkeys(here["network"]))
    for method, rows in here[here["quantity"] == "flops"].groupby("method", sort=False):
        line = rows.groupby("O")["ratio"].agg(["median", "min", "max"])
        panel.plot(line.index, line["median"], color=looks[method].colour, linewidth=1.6)
        panel.fill_between(line.index, line["min"], line["max"], color=looks[method].colour, alpha=0.12, linewidth=0)
    for (network, method), rows in here[here["quantity"] == "seconds"].groupby(["network", "method"], sort=False):
        aside = 1.1 ** (networks.index(network) - (len(networks) - 1) / 2)
        marker = KINDS.get(_kind(network), OTHER)
        panel.plot(rows["O"] * aside, rows["ratio"], color=looks[method].colour, marker=marker, markersize=7,
                   markeredgecolor="white", markeredgewidth=0.7, linestyle="", zorder=3)  # fmt: skip
    for method, rows in there[there["method"].isin(list(looks))].groupby("method", sort=False):
        panel.plot(rows["O"], rows["ratio"], color=looks[method].colour, marker="x", markersize=9,
                   markeredgewidth=2.2, linestyle="", zorder=4)  # fmt: skip
    _names(panel, here, looks)
    panel.set_xlabel("outputs O")


def _names(panel: Axes, here: pd.DataFrame, looks: dict[str, styles.Look]) -> None:
    """Names of the programs to the right of the panel, at the median of their ratios at the largest O."""
    inch = 1 / (panel.get_position().width * canvas.WIDTH)
    low, high = np.log(panel.get_ylim())
    ends = {OURS: 1.0}
    for method, rows in here.sort_values("quantity").groupby("method", sort=False):
        last = rows[rows["quantity"] == rows["quantity"].iloc[0]]
        ends[method] = last.loc[last["O"] == last["O"].max(), "ratio"].median()
    last = -1.0
    for method, ratio in sorted(ends.items(), key=lambda item: item[1]):
        last = max(last + 0.06, (math.log(ratio) - low) / (high - low))
        colour, title = (looks[method].colour, looks[method].title) if method in looks else OWN
        ends_at = [1 + 0.08 * inch, 1 + 0.28 * inch]
        panel.plot(ends_at, [last, last], color=colour, linewidth=3, transform=panel.transAxes, clip_on=False)
        panel.text(1 + 0.36 * inch, last, title, transform=panel.transAxes, fontsize=9.5, va="center")


def _sizes(plotted: pd.DataFrame, table: pd.DataFrame) -> str:
    return labels.plain(
        f"{plotted['network'].nunique()} networks,  N = {labels.range_label(plotted['N'])},  "
        f"{labels.range_label(table['side'].dropna())} pixels a side"
    )


def _reading(plotted: pd.DataFrame, there: pd.DataFrame) -> key.Key:
    networks = pd.Series(plotted["network"].unique())
    entries: list[key.Entry] = []
    for kind, names in networks.groupby(networks.map(_kind), sort=False):
        handle = Line2D([], [], color=styles.GREY, linestyle="", marker=KINDS.get(kind, OTHER), markersize=7)
        entries.append((handle, labels.short(", ".join(names), 50)))
    reading: list[key.Entry] = [
        (Line2D([], [], color=styles.GREY, linewidth=1.6), "line: operations, median over the networks"),
        (Patch(color=styles.GREY, alpha=0.25, linewidth=0), "band: minimum to maximum"),
        (Line2D([], [], color=styles.GREY, marker="o", markersize=7, linestyle=""), "marker: seconds of one network"),
    ]
    if len(there):
        cross = Line2D([], [], color=styles.GREY, marker="x", markersize=9, markeredgewidth=2.2, linestyle="")
        reading.append((cross, "seconds published, on a V100, over neural-tangents structured derivatives"))
    return [("networks", entries), ("how to read", reading)]


def _title(plotted: pd.DataFrame) -> str:
    """Operations and seconds of neural-tangents' best program over ours."""
    theirs = plotted[plotted["method"].isin(set(NAMES) - {OURS})]
    best = theirs.groupby([*CASE, "quantity"], dropna=False)["ratio"].min().groupby("quantity")
    spans = {quantity: labels.span(found) for quantity, found in best}
    words = [
        f"{spans[q]} times our {name}" for q, name in (("flops", "operations"), ("seconds", "seconds")) if q in spans
    ]
    return f"neural-tangents' best program takes {' and '.join(words)}" if words else "NTK programs for image networks"


def published(table: pd.DataFrame) -> pd.DataFrame:
    """The notebook's seconds, where the table has the same network with the same N."""
    same = table[(table[list(SAME)] == pd.Series(SAME)).all(axis=1)]
    known = sources.values("novak_notebooks", network=NOTEBOOK).assign(network=SAME["network"])
    known = known[known["N"].isin(set(same["N"]))]
    return known.assign(seconds=known["milliseconds"] / 1e3)


def _caption(table: pd.DataFrame, plotted: pd.DataFrame) -> str:
    middle = plotted[plotted["method"].isin(set(NAMES) - {OURS})].groupby("quantity")["ratio"].median()
    said = [f"{labels.rounded(ratio)} in {'operations' if q == 'flops' else q}" for q, ratio in middle.items()]
    left_out = _left_out(table)
    return labels.fitted(
        "Operations and seconds of each program for the whole NTK over those of structured derivatives here.",
        f"Medians of neural-tangents: {', '.join(said)}." if said else "",
        *left_out[:1],
        _fewest(_wide(base.measured(table, "flops_per_entry"), "flops")),
        *left_out[1:],
    )


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
    return f"At O = {most:g}, neural-tangents' program with the fewest operations is {said}."


def _left_out(table: pd.DataFrame) -> list[str]:
    """The number of cases not measured, and the most frequent reason; the study's table has all reasons."""
    lost = table[table["status"] != "ok"]
    if not len(lost):
        return []
    reasons = lost["reason"].str.replace("about .*, over", "over", regex=True)  # each O has its own number
    most = labels.short(reasons.mode().iloc[0], 120)
    return [f"Not measured: {len(lost)} of {len(table)} cases.", f"Mostly missing: {most}."]


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
    """One implementation over structured derivatives, at the sizes of its published rows.

    Args:
        same: rows of the notebook's network.
        known: the notebook's rows of one case, by method.
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
        measured = claims.quotient(*seconds)
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
