"""The cost of exact methods: seconds and peak memory against n, the size of Theta."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.ticker import FixedLocator, FuncFormatter, NullLocator
from matplotlib.transforms import ScaledTranslation

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.figures.plotting.styles import Look, backends_in, looks
from ntkbench.measure import laws

MOST = 4
"""Maximum number of networks side by side; those with the most sizes and methods are shown."""
ASIDE = 0.15
"""Inches between the markers of methods that were measured at a single size."""
MIB = 2.0**20
FLOOR = 0.1
"""MiB; smaller values are drawn here, since a peak minus a baseline can be zero or negative."""
QUANTITIES = {"seconds": "seconds", "memory_mib_drawn": "peak memory [MiB]"}
NETWORK = ["family", "setting"]
LINE = [*NETWORK, "method", "backend"]
KEPT = ["family", "setting", "problem", "N", "O", "P", "n", "metric", "method", "title", "backend", "status", "reason"]
KEPT += ["seconds", "seconds_q25", "seconds_q75", "seeds", "calls", "memory_bytes"]


def draw(table: pd.DataFrame) -> base.Drawing:
    """Seconds (above) and peak memory (below) against n, a column for each kind of network."""
    exact = table[table["kind"] == "exact"].sort_values([*NETWORK, "n", "problem", "method", "backend"])
    kept = [column for column in KEPT if column in exact]
    if not (exact["status"] == "ok").any():
        why = labels.why_not(exact) if len(exact) else "The table has no exact method."
        return base.nothing(exact[kept], why)
    metric = _metric(exact)
    exact = exact[exact["metric"] == metric]
    # A method whose cells of a backend are all skipped is left out for this backend.
    runs = exact.groupby(["method", "backend"])["status"].transform(lambda status: (status != "skipped").any())
    plotted = exact.loc[runs, kept].copy()
    plotted["memory_mib_drawn"] = (plotted["memory_bytes"] / MIB).clip(lower=FLOOR)
    networks = sorted((_one_network(cells) for _, cells in plotted.groupby(NETWORK)), key=_extent)[-MOST:]
    plotted = _with_slopes(pd.concat(networks, ignore_index=True))

    style = {m: look for m, look in looks(table).items() if m in set(plotted["method"])}
    used = {m: backends_in(plotted[plotted["method"] == m]) for m in style}
    names = {
        (method, backend): style[method].title + (f" ({styles.TITLES.get(backend, backend)})" if len(there) > 1 else "")
        for method, there in used.items()
        for backend in there
    }
    left, gap, right = 0.85, 0.18, canvas.text_width(names.values(), 9) + 0.4
    widest = max(0.8, (canvas.WIDTH - left - right - canvas.MARGIN - gap * (len(networks) - 1)) / len(networks))
    lost = (plotted["status"] != "ok").any()
    above = 0.6 + 0.22 * any(plotted["setting"]) + 0.1 * lost
    figure, grid = canvas.sheet(
        [canvas.Row(2.1, above=above, below=0.15), canvas.Row(2.1, 0, 0.45)],
        len(networks),
        title=_title(plotted, style, metric),
        subtitle=base.settings_line(exact),
        key=[("backend", key.backend_entries(backends_in(plotted)))],
        left=left,
        gap=gap,
        widest=min(widest, 3.2),
        bottom=0.05,
    )
    for row, (quantity, label) in zip(grid, QUANTITIES.items(), strict=True):
        low, high = canvas.limits(plotted[quantity].dropna())
        for panel, cells in zip(row, networks, strict=True):
            x = canvas.limits(cells["n"], pad=1.7, ratio=15)
            panel.set(xscale="log", yscale="log", xlim=x, ylim=(low, high * (high / low) ** 0.3))
            canvas.decades(panel.yaxis, *panel.get_ylim())
            _sizes(panel, sorted(cells["n"].dropna().unique()))
            _costs(panel, cells, quantity, style)
            panel.tick_params(labelbottom=row is grid[-1], labelleft=panel is row[0])
        row[0].set_ylabel(label)
        _names(row[-1], networks[-1], quantity, names, style)
    for top, bottom, cells in zip(*grid, networks, strict=True):
        _lost(top, cells, style)
        name = labels.case_label(*cells[NETWORK].iloc[0], by="\n")
        canvas.title(top, name, labels.sizes_label(cells, "O", "P"), offset=10 if lost else 4)
        bottom.set_xlabel("n = N O")
    figure.align_ylabels([row[0] for row in grid])
    return base.Drawing(figure, plotted, _caption(metric, plotted, exact["problem"].nunique()))


def _metric(exact: pd.DataFrame) -> str:
    """The norm, or else the metric with the most rows."""
    counts = exact[exact["status"] == "ok"].groupby("metric").size()
    return "norm" if "norm" in counts else counts.idxmax()


def _one_network(cells: pd.DataFrame) -> pd.DataFrame:
    """The rows of the network with the most values of n, in a family whose network depends on its sizes."""
    counts = cells.groupby("P", dropna=False)["n"].nunique()
    most = counts.index[int(np.argmax(counts))]
    return cells[cells["P"].isna() if pd.isna(most) else cells["P"] == most]


def _extent(cells: pd.DataFrame) -> tuple[int, int]:
    """The key by which networks are chosen and sorted: the number of lines, and the number of sizes."""
    measured = base.measured(cells, "n")
    return len(measured.drop_duplicates(LINE)), measured["n"].nunique()


def _with_slopes(plotted: pd.DataFrame) -> pd.DataFrame:
    """The rows with the exponents of n by which the seconds and memory of their line grow between the two largest n."""
    for quantity in QUANTITIES:
        ends = base.measured(plotted[(plotted["n"] > 0) & (plotted[quantity] > 0)], "n", quantity)
        slopes = {name: _slope(line.groupby("n")[quantity].median()) for name, line in ends.groupby(LINE)}
        names = plotted[LINE].itertuples(index=False, name=None)
        plotted[f"slope_{quantity.split('_')[0]}"] = [slopes.get(name, math.nan) for name in names]
    return plotted


def _slope(costs: pd.Series) -> float:
    if len(costs) < 2:
        return math.nan
    (n0, n1), (y0, y1) = costs.index[-2:], costs.iloc[-2:]
    return math.log(y1 / y0) / math.log(n1 / n0)


def _sizes(panel: Axes, sizes: Sequence[float]) -> None:
    """Ticks at the sizes of the network, or at powers of ten where there is no room for them."""
    low, high = panel.get_xlim()
    if all(math.log(b / a) > 0.25 * math.log(high / low) for a, b in itertools.pairwise(sizes) if a > 0):
        panel.xaxis.set_major_locator(FixedLocator(sizes))
        panel.xaxis.set_major_formatter(FuncFormatter(lambda value, _: labels.count_label(value)))
        panel.xaxis.set_minor_locator(NullLocator())
    else:
        canvas.decades(panel.xaxis, low, high, most=4)


def _costs(panel: Axes, cells: pd.DataFrame, quantity: str, style: dict[str, Look]) -> None:
    """Lines over n of one network, for seconds or for memory."""
    points = base.measured(cells, quantity)
    if not len(points):
        canvas.note(panel, labels.why_not(cells) if quantity == "seconds" else "no memory measured")
        return
    single = points["n"].nunique() == 1
    lines = list(points.groupby(["method", "backend"], sort=False))
    for i, ((method, backend), line) in enumerate(lines):
        drawn: dict[str, Any] = {"transform": _aside(panel, i, len(lines)) if single else panel.transData, "zorder": 3}
        panel.plot(line["n"], line[quantity], **style[method].line(backend), **drawn)
        if quantity == "seconds":
            low, high, colour = line["seconds_q25"], line["seconds_q75"], style[method].colour
            panel.vlines(line["n"], low, high, color=colour, linewidth=0.8, **drawn)
    if not single:
        _guides(panel)


def _aside(panel: Axes, place: int, count: int, transform: Any = None) -> Any:
    """The position of one of ``count`` markers side by side."""
    step = min(ASIDE, 0.8 * panel.get_position().width * canvas.WIDTH / count)
    beside = ScaledTranslation(step * (place - (count - 1) / 2), 0, panel.figure.dpi_scale_trans)
    return (panel.transData if transform is None else transform) + beside


def _guides(panel: Axes) -> None:
    """Guide lines n and n^2 in the upper left corner, which is free, since costs are low at small n."""
    (left, right), (low, high) = np.log(panel.get_xlim()), np.log(panel.get_ylim())
    width = min(0.28 * (right - left), 0.2 * (high - low))
    x, bottom = left + 0.06 * (right - left), high - 0.08 * (high - low) - 2 * width
    for power, label in ((1, "n"), (2, "n²")):
        ends = np.exp([x, x + width]), np.exp([bottom, bottom + power * width])
        panel.plot(*ends, color=styles.GREY, linewidth=1.0, linestyle=(0, (1, 1.5)), zorder=1)
        panel.annotate(label, (ends[0][1], ends[1][1]), xytext=(3, 0), textcoords="offset points", va="center",
                       fontsize=9, fontstyle="italic", color=styles.GREY)  # fmt: skip


def _lost(panel: Axes, cells: pd.DataFrame, style: dict[str, Look]) -> None:
    """Markers of unfinished cells on the upper edge, at their n."""
    for _, here in cells[cells["status"] != "ok"].groupby("n"):
        for i, row in enumerate(here.itertuples()):
            spot = _aside(panel, i, len(here), panel.get_xaxis_transform())
            panel.plot(row.n, 1, transform=spot, clip_on=False, zorder=4, **style[row.method].line(row.backend))


def _names(
    panel: Axes, cells: pd.DataFrame, quantity: str, names: dict[tuple[str, str], str], style: dict[str, Look]
) -> None:
    """Names of the methods right of the last column, at the ends of their lines; methods without a line are below."""
    low, high = np.log(panel.get_ylim())
    points = base.measured(cells[cells[quantity] > 0], quantity)
    ends = {pair: line[quantity].iloc[-1] for pair, line in points.groupby(["method", "backend"])}
    heights = {pair: (math.log(ends[pair]) - low) / (high - low) if pair in ends else 0.0 for pair in names}
    step = min(0.085, 1 / len(names))
    most, last = 1 - step * (len(names) - 0.5), -step
    for place, ((method, backend), height) in enumerate(sorted(heights.items(), key=lambda item: item[1])):
        last = max(last + step, min(height, most + step * place))
        marker = style[method].line(backend) | {"linestyle": ""}
        inches: dict[str, Any] = {"textcoords": "offset points", "xycoords": "axes fraction"}
        beside = panel.transAxes + ScaledTranslation(0.17, 0, panel.figure.dpi_scale_trans)
        panel.plot(1, last, transform=beside, clip_on=False, **marker)
        panel.annotate(names[method, backend], (1, last), xytext=(20, 0), va="center", fontsize=9, **inches)


def winners(plotted: pd.DataFrame, quantity: str) -> dict[tuple[str, str], str]:
    """The method of least cost at the largest n of each network; empty where none is certain, or has no rival there.

    The fastest method is the fastest with a probability of at least 95 %. Peaks are measured once: the one of least
    memory is strictly below all others, after the floor.
    """
    points = base.measured(plotted[plotted[quantity] > 0], quantity, "n")
    typical = laws.typical_spread(points)
    found: dict[tuple[str, str], str] = {}
    for network, rows in points.groupby(NETWORK):
        rows = rows[rows["n"] == rows["n"].max()]
        if quantity == "seconds":
            chances = laws.smallest(*laws.median_seconds(rows, typical=typical))
        else:
            least = (rows[quantity] == rows[quantity].min()).to_numpy(float)
            chances = least / least.sum()
        of_methods = pd.Series(chances, index=rows["method"]).groupby(level=0).sum()
        sure = len(of_methods) > 1 and of_methods.max() >= tasks.SURE
        found[network] = str(of_methods.idxmax()) if sure else ""
    return found


def _title(plotted: pd.DataFrame, style: dict[str, Look], metric: str) -> str:
    fastest, least = (list(winners(plotted, quantity).values()) for quantity in QUANTITIES)
    if not fastest:
        return f"Cost of exact methods for the {labels.metric_label(metric)}"
    networks = "networks" if plotted["setting"].nunique() == 1 else "panels"
    if not any(fastest):
        return f"No exact method is surely the fastest on any of {len(fastest)} {networks}"
    first = max(filter(None, fastest), key=lambda method: (fastest.count(method), least.count(method)))
    return (
        f"Of exact methods, {labels.short(style[first].title, 40)} is surely fastest on {fastest.count(first)} of "
        f"{len(fastest)} {networks} (undecided on {fastest.count('')}) and takes the least memory on "
        f"{least.count(first)}"
    )


def _caption(metric: str, plotted: pd.DataFrame, problems: int) -> str:
    titles = dict(zip(plotted["method"], plotted["title"], strict=True))
    won: dict[str, list[str]] = {}
    for (family, _), method in winners(plotted, "seconds").items():
        won.setdefault(titles[method] if method else "undecided", []).append(labels.name_label(family))
    said = "; ".join(f"{title} on {labels.listed(names, 2)}" for title, names in won.items())
    lost = plotted.loc[plotted["status"] != "ok", "status"].map(labels.status_label).value_counts()
    left = problems - plotted["problem"].nunique()
    slopes = {"Seconds grow": plotted["slope_seconds"].dropna(), "Memory grows": plotted["slope_memory"].dropna()}
    return labels.fitted(
        f"Seconds (with quartiles) and peak memory of an exact {metric.replace('_', ' ')} against n.",
        f"Surely fastest at the largest n: {said}." if said else "",
        f"On the upper edge: {', '.join(f'{count} {status}' for status, count in lost.items())}." if len(lost) else "",
        *(f"{name} as n^{found.min():.1f} to n^{found.max():.1f}." for name, found in slopes.items() if len(found)),
        f"{left} problems of other networks are left out." if left else "",
    )
