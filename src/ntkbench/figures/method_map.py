"""Which method to use: the family of the fastest one by metric, tolerance and size of the problem."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks

TOLERANCES = {"10 %": "to 10 %", "1 %": "to 1 %", "exact": "exact"}
QUESTIONS = {"exact": "Do you need it exact?", "1 %": "Is 1 % enough?", "10 %": "Is 10 % enough?"}
CASE = ["metric", "problem", "setting"]
WIDEST = 2.2
"""Inches of a panel."""
STEP = 8.0
"""Points between the dots of tasks of the same size."""
PLURAL = {"exact": "exact", "approximate": "approximations", "stochastic": "estimates"}

Line = tuple[str, dict[str, Any], float]
"""Text, its style, and the inches down to the next line."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row of maps for each metric, a column for each tolerance, and the conclusions in words."""
    known = table[table[["n", "O"]].gt(0).all(axis=1)]
    chosen = _choices(known)
    if not chosen["method"].notna().any():
        return base.nothing(chosen, f"Nothing was measured.\n{labels.why_not(table)}")
    advice = _advice(chosen)
    rows = [(m, s) for m in base.metrics_in(chosen) for s in chosen.loc[chosen["metric"] == m, "setting"].unique()]
    figure, grid = canvas.sheet(
        [
            canvas.Row(1.0, above=0.33 if i else 0.55, below=0.25 if i == len(rows) - 1 else 0.0)
            for i in range(len(rows))
        ],
        len(TOLERANCES),
        title=_title(chosen),
        subtitle=base.settings_line(table),
        key=_key(chosen),
        left=1.05,
        gap=0.2,
        bottom=max(0.3, sum(space for *_, space in advice) - 1.33 * len(rows)),
        widest=WIDEST,
    )
    limits = {axis: canvas.limits(chosen[axis], pad=pad) for axis, pad in (("n", 3.5), ("O", 2.5))}
    for panels, (metric, setting) in zip(grid, rows, strict=True):
        for panel, name in zip(panels, TOLERANCES, strict=True):
            own = (chosen["metric"] == metric) & (chosen["setting"] == setting) & (chosen["tolerance"] == name)
            _map(panel, chosen[own], limits)
            panel.tick_params(labelleft=panel is panels[0], labelbottom=panels is grid[-1])
            canvas.title(panel, "", _rule(chosen[own], name))
        name = labels.case_label(labels.short(metric.replace("_", " "), 18), labels.short(setting, 18), by="\n")
        panels[0].set_ylabel(f"{name}\noutputs O", fontsize=9.5)
    for panel, words in zip(grid[0], TOLERANCES.values(), strict=True):
        canvas.title(panel, words, "")
    for panel in grid[-1]:
        panel.set_xlabel("n = N O, all outputs")
    _write(figure, grid[0][-1], advice)
    return base.Drawing(figure, chosen, _caption(chosen, len(table) - len(known)))


def _choices(known: pd.DataFrame) -> pd.DataFrame:
    """The fastest method of each task; without a method if none is within the tolerance.

    ``measured`` names the families measured on the problem and metric, ``lead`` is how much slower the next method is.
    """
    tried = known.drop_duplicates(CASE)[[*CASE, "n", "O", "P"]]
    tried = tried.merge(pd.DataFrame({"tolerance": list(TOLERANCES)}), how="cross")
    kinds = base.measured(known, "seconds", "error").sort_values("kind").groupby(CASE)["kind"].unique()
    tried = tried.merge(kinds.map(", ".join).rename("measured").reset_index(), how="left", on=CASE)
    won = tasks.winners(known).drop(columns=["n", "O", "P"])
    return tried.fillna({"measured": ""}).merge(won, how="left", on=tasks.TASK)


def _contested(chosen: pd.DataFrame, tolerance: str) -> pd.DataFrame:
    """The tasks measured with several families and solved by at least one."""
    return chosen[(chosen["tolerance"] == tolerance) & chosen["measured"].str.contains(",") & chosen["method"].notna()]


def _map(panel: Axes, here: pd.DataFrame, limits: dict[str, tuple[float, float]]) -> None:
    """Dots in the colour of the family that is the fastest; those of the same size side by side or above each other."""
    panel.set(xscale="log", yscale="log", xlim=limits["n"], ylim=limits["O"])
    canvas.decades(panel.xaxis, *limits["n"])
    canvas.decades(panel.yaxis, *limits["O"], most=4)
    spots: list[tuple[tuple[float, float], str]] = []
    for (n, outputs), same in here.groupby(["n", "O"]):
        offsets = STEP * (np.arange(len(same)) - (len(same) - 1) / 2) / 72
        at = panel.transData.transform((n, outputs)) / panel.figure.dpi
        for offset, row in zip(offsets, same.itertuples(), strict=True):
            x, y = at + ((offset, 0) if len(same) > 2 else (0, offset))
            contested = "," in row.measured or row.tolerance == "exact"
            mark = _mark(row.kind, contested)
            panel.plot(x, y, **mark, transform=panel.figure.dpi_scale_trans, clip_on=False, zorder=3)
            sure = row.fastest >= tasks.SURE
            least = "\N{GREATER-THAN OR EQUAL TO}" if sure and row.at_most else ""
            lead = f"{least}{row.lead:#.2g}".rstrip(".") + "\N{MULTIPLICATION SIGN}" if row.lead == row.lead else "only"
            shown = contested and row.tolerance != "exact" and isinstance(row.method, str)
            spots.append(((x, y), lead + ("" if sure else "?") if shown else ""))
    taken = [at for at, _ in spots]
    for (x, y), words in spots:
        if words:
            side = 0.04 * len(words) + 0.14
            tasks.label(panel, words, [(x + side, y), (x - side, y), (x, y + 0.15), (x, y - 0.15)], taken)


def _mark(kind: Any, contested: bool) -> dict[str, Any]:
    """Keywords for a dot: hollow and grey without a winner, small without a rival family."""
    if not isinstance(kind, str):
        return {"marker": "o", "color": styles.GREY, "markerfacecolor": "none", "markersize": 6, "linestyle": ""}
    look = tasks.FAMILIES.get(kind, styles.Look(kind, kind, kind, styles.GREY, "D"))
    style = look.line("torch") | {"linestyle": ""}
    return style if contested else style | {"markersize": 0.6 * style["markersize"]}


def _word(kind: str) -> str:
    return tasks.FAMILIES[kind].title if kind in tasks.FAMILIES else labels.short(kind, 12)


def _rule(here: pd.DataFrame, name: str) -> str:
    """Which family wins where in a panel, if the number of outputs decides it."""
    if name == "exact":
        return f"an exact method on {here['method'].notna().sum()} of {len(here)} tasks"
    rows = _contested(here, name).sort_values("O")
    if not len(rows):
        return "one family measured" if here["method"].notna().any() else "no method reaches it"
    by_outputs = rows.groupby("O")["kind"].unique()
    runs = [kind for kind, _ in itertools.groupby(by_outputs.map(lambda kinds: " / ".join(map(_word, kinds))))]
    if by_outputs.map(len).max() > 1 or len(runs) > 2:
        return "O alone does not decide"
    if len(runs) == 1:
        without = "" if rows["measured"].str.contains("exact").any() else "; no exact value"
        return f"{runs[0]} {len(rows)} of {len(rows)}{without}"
    there = by_outputs.index[by_outputs.map(lambda kinds: _word(kinds[0])) == runs[1]]
    return f"{runs[1]} at O = {labels.range_label(there)}"


def _key(chosen: pd.DataFrame) -> key.Key:
    """A heading for each family, and how often it wins."""
    columns: list[tuple[str, list[key.Entry]]] = []
    for kind in [k for k in base.KINDS if k in set(chosen["kind"].dropna())][:3]:
        counts = [f"{(_contested(chosen, t)['kind'] == kind).sum()} of {len(_contested(chosen, t))} {words}"
                  for t, words in TOLERANCES.items() if t != "exact"]  # fmt: skip
        columns.append((f"{_word(kind)} is fastest", [(Line2D([], [], **_mark(kind, True)), ", ".join(counts))]))
    nobody = int(chosen["method"].isna().sum())
    if nobody:
        columns.append(
            ("nothing within tolerance", [(Line2D([], [], **_mark(None, True)), f"{nobody} of {len(chosen)} tasks")])
        )
    return columns or [("fastest", [(Line2D([], [], **_mark("", True)), "other")])]


def _advice(chosen: pd.DataFrame) -> list[Line]:
    """Questions with the tasks' answers for each metric, and a line of code."""
    bold: dict[str, Any] = {"fontweight": "bold", "fontsize": 10.5}
    made: list[Line] = []
    for name, question in QUESTIONS.items():
        made.append((question, bold, 0.22))
        tried = chosen[chosen["tolerance"] == name] if name == "exact" else _contested(chosen, name)
        for metric in base.metrics_in(tried):
            own = tried[tried["metric"] == metric]
            counts = own["kind"].value_counts(sort=False)
            if not len(counts):
                continue
            first = counts.index[counts == counts.max()]
            words = f"{labels.short(metric.replace('_', ' '), 16)}: {' or '.join(map(_word, first))}"
            made.append((f"{words} on {counts.max()} of {len(own)}", {"color": styles.GREY}, 0.17))
            titles = own.loc[own["kind"] == first[0], "title"].value_counts(sort=False)
            best = ("" if len(titles) == 1 else "e.g. ") + labels.short(titles.idxmax(), 40)
            made.append((f"  {best if len(first) == 1 else 'the map shows where'}", {"fontsize": 8.5}, 0.19))
        if made[-1][0] == question:
            made.append(("   no comparison", {"color": styles.GREY}, 0.19))
        made[-1] = (*made[-1][:2], 0.31)
    metric = next((m for m in base.metrics_in(chosen) if m in ("trace", "norm", "effective_rank")), "trace")
    code = {"family": "monospace", "fontsize": 8.5, "bbox": {"facecolor": canvas.SHADE, "linewidth": 0, "pad": 3}}
    return [*made, ("Or let it choose:", bold, 0.25), (f"ntkbench.{metric}(model, x, rtol=0.01)", code, 0.2)]


def _write(figure: Figure, panel: Axes, lines: list[Line]) -> None:
    """Lines of text at the right of a panel, from the height of its title."""
    width, height = figure.get_size_inches()
    x, y = panel.get_position().x1 + 0.2 / width, panel.get_position().y1 + 0.4 / height
    for text, style, space in lines:
        figure.text(x, y, text, va="top", **{"fontsize": 9.5, **style})
        y -= space / height


def _title(chosen: pd.DataFrame) -> str:
    name = next((t for t in ("1 %", "10 %") if len(_contested(chosen, t))), None)
    if name is None:
        return "Which method? No task has two families of methods to choose from"
    counts = _contested(chosen, name)["kind"].value_counts()
    first, *others = (f"{PLURAL.get(kind, _word(kind))} {{}}on {count}" for kind, count in counts.items())
    verb = "is fastest " if counts.index[0] == "exact" else "are fastest "
    words = ", ".join([first.format(verb), *(other.format("") for other in others)])
    return f"Which method? To {name}, {words} of {counts.sum()} tasks"


def _caption(chosen: pd.DataFrame, lost: int) -> str:
    contested = pd.concat([_contested(chosen, t) for t in ("10 %", "1 %")])
    unsure = int((contested["fastest"] < tasks.SURE).sum())
    without = int((~contested["measured"].str.contains("exact")).sum())
    lead = contested["lead"].median()
    return (
        "Family of the fastest method. Numbers: time of the next method over that of the fastest"
        + (f" (median {lead:.2g})" if math.isfinite(lead) else "")
        + f"; ?: fewer than {100 * tasks.SURE:g} % of bootstrap reruns agree, or another method has only an upper "
        f"bound of its time ({unsure} of {len(contested)}); \N{GREATER-THAN OR EQUAL TO}: the fastest has one. "
        f"Small: one family measured, not counted. Hollow: no median error is small enough. {without} of "
        f"{len(contested)} choices lack exact methods." + (f" {lost} cells lack sizes." if lost else "")
    )
