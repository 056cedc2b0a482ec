"""Which method to use: the family of the fastest method, by metric, tolerance and size of the problem."""

from __future__ import annotations

from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch, Rectangle

from ntkbench.figures.plotting import base, canvas, key, labels, styles, tasks
from ntkbench.metrics import METRICS

TOLERANCES = {"10 %": "to 10 %", "1 %": "to 1 %", "exact": "exact"}
QUESTIONS = {"exact": "Do you need it exact?", "1 %": "Is 1 % enough?", "10 %": "Is 10 % enough?"}
ERRORS = {"1 %": 0.01, "10 %": 0.1}
CASE = ["metric", "problem", "setting"]
WIDEST = 2.2
"""Inches of a panel."""
STEP = 8.0
"""Points between the dots of tasks of the same size."""
PLURAL = {"exact": "exact", "approximate": "approximations", "stochastic": "estimates"}
TINT = 0.22
"""Opacity of a region in the colour of its family."""
PIXELS = 200
"""Width and height of the picture of the regions."""
UNMEASURED: dict[str, Any] = {"facecolor": "none", "edgecolor": canvas.PALE, "hatch": "//////", "linewidth": 0}
CODE: dict[str, Any] = {"family": "monospace", "fontsize": 8.5}
LONGEST = 38
"""Characters of a line of code beside the panels."""

Line = tuple[str, dict[str, Any], float]
"""Text, its style, and the inches down to the next line."""


def draw(table: pd.DataFrame) -> base.Drawing:
    """A row of maps for each metric, a column for each tolerance, and the conclusions in words and code."""
    known = table[table[["n", "O"]].gt(0).all(axis=1)]
    chosen = _choices(known)
    if not chosen["method"].notna().any():
        return base.nothing(chosen, f"Nothing was measured.\n{labels.why_not(table)}")
    advice = _advice(chosen)
    rows = [(m, s) for m in base.metrics_in(chosen) for s in chosen.loc[chosen["metric"] == m, "setting"].unique()]
    figure, grid = canvas.sheet(
        [
            canvas.Row(1.2, above=0.33 if i else 0.55, below=0.25 if i == len(rows) - 1 else 0.0)
            for i in range(len(rows))
        ],
        len(TOLERANCES),
        title=_title(chosen),
        subtitle=base.settings_line(table),
        key=_key(chosen),
        left=1.05,
        gap=0.2,
        bottom=max(0.3, sum(space for *_, space in advice) - 1.53 * len(rows)),
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
    """The fastest method of each task, missing if no method is within the tolerance.

    ``measured`` names the families measured on the problem and metric, and ``sure`` says whether the family of the
    fastest method surely wins.
    """
    tried = known.drop_duplicates(CASE)[[*CASE, "n", "O", "P"]]
    tried = tried.merge(pd.DataFrame({"tolerance": list(TOLERANCES)}), how="cross")
    kinds = base.measured(known, "seconds", "error").sort_values("kind").groupby(CASE)["kind"].unique()
    tried = tried.merge(kinds.map(", ".join).rename("measured").reset_index(), how="left", on=CASE)
    won = tasks.winners(known).drop(columns=["n", "O", "P"])
    chosen = tried.fillna({"measured": ""}).merge(won, how="left", on=tasks.TASK)
    return chosen.assign(sure=chosen["fastest_of_kind"] >= tasks.SURE)


def _contested(chosen: pd.DataFrame, tolerance: str) -> pd.DataFrame:
    """The tasks measured with several families and solved by at least one."""
    return chosen[(chosen["tolerance"] == tolerance) & chosen["measured"].str.contains(",") & chosen["method"].notna()]


def _map(panel: Axes, here: pd.DataFrame, limits: dict[str, tuple[float, float]]) -> None:
    """Dots in the colour of the fastest family; those of the same size side by side or above each other."""
    panel.set(xscale="log", yscale="log", xlim=limits["n"], ylim=limits["O"])
    _regions(panel, here, limits)
    canvas.decades(panel.xaxis, *limits["n"])
    canvas.decades(panel.yaxis, *limits["O"], most=4)
    spots: list[tuple[tuple[float, float], str]] = []
    for (n, outputs), same in here.groupby(["n", "O"]):
        offsets = STEP * (np.arange(len(same)) - (len(same) - 1) / 2) / 72
        at = panel.transData.transform((n, outputs)) / panel.figure.dpi
        for offset, row in zip(offsets, same.itertuples(), strict=True):
            x, y = at + ((offset, 0) if len(same) > 2 else (0, offset))
            contested = "," in row.measured or row.tolerance == "exact"
            sure = row.sure or row.tolerance == "exact"
            mark = _mark(row.kind, contested, sure)
            panel.plot(x, y, **mark, transform=panel.figure.dpi_scale_trans, clip_on=False, zorder=3)
            least, lead = "\N{GREATER-THAN OR EQUAL TO}" if sure and row.at_most else "", row.lead_of_kind
            lead = f"{least}{lead:#.2g}".rstrip(".") + "\N{MULTIPLICATION SIGN}" if lead == lead else "only"
            shown = contested and row.tolerance != "exact" and isinstance(row.method, str)
            spots.append(((x, y), lead + ("" if sure else "?") if shown else ""))
    taken = [at for at, _ in spots]
    for (x, y), words in spots:
        if words:
            side = 0.04 * len(words) + 0.14
            tasks.label(panel, words, [(x + side, y), (x - side, y), (x, y + 0.15), (x, y - 0.15)], taken)


def _regions(panel: Axes, here: pd.DataFrame, limits: dict[str, tuple[float, float]]) -> None:
    """Half a decade around each task in the colour of a family that surely wins, else white; hatched beyond."""
    (left, right), (low, high) = np.log10(limits["n"]), np.log10(limits["O"])
    panel.add_patch(Rectangle((0, 0), 1, 1, transform=panel.transAxes, zorder=0, **UNMEASURED))
    panel.text(0.03, 0.93, "O > n", transform=panel.transAxes, va="top", fontsize=8.5, color=styles.GREY)
    x, y = np.meshgrid(np.linspace(left, right, PIXELS), np.linspace(low, high, PIXELS))
    image = np.ones((PIXELS, PIXELS, 4))
    tasks_at = np.log10(here[["n", "O"]].to_numpy(float))
    away = np.maximum(abs(x[..., None] - tasks_at[:, 0]), abs(y[..., None] - tasks_at[:, 1]))
    least = away.min(-1, keepdims=True)
    image[(least[..., 0] > 0.5) & (y <= x)] = 0
    counted = here["sure"] & here["measured"].str.contains(",") | (here["tolerance"] == "exact")
    won = here["kind"].where(counted).to_numpy(object)
    for kind, look in tasks.FAMILIES.items():
        here_alone = ((away > least + 1e-9) | (won == kind)).all(-1) & (least[..., 0] <= 0.5) & (y <= x)
        image[here_alone, :3] = 1 - TINT * (1 - np.array(to_rgb(look.colour)))
    panel.imshow(image, extent=(0, 1, 0, 1), transform=panel.transAxes, aspect="auto", origin="lower", zorder=0.3)
    panel.set(xlim=limits["n"], ylim=limits["O"])


def _mark(kind: Any, contested: bool, sure: bool = True) -> dict[str, Any]:
    """Keywords for a dot: a grey cross without a winner, small without a rival family, open if it is not sure."""
    if not isinstance(kind, str):
        return {"marker": "x", "color": styles.GREY, "markersize": 6, "linestyle": ""}
    look = tasks.FAMILIES.get(kind, styles.Look(kind, kind, kind, styles.GREY, "D"))
    style = look.line("torch") | {"linestyle": ""}
    if not contested:
        return style | {"markersize": 0.6 * style["markersize"]}
    return style if sure else style | {"markerfacecolor": "white"}


def _word(kind: str) -> str:
    return tasks.FAMILIES[kind].title if kind in tasks.FAMILIES else labels.short(kind, 12)


def _counts(rows: pd.DataFrame) -> list[str]:
    """``exact 2``, ``undecided 1``: how many tasks each family surely wins, the most first."""
    won = [f"{_word(kind)} {count}" for kind, count in rows.loc[rows["sure"], "kind"].value_counts().items()]
    undecided = int((~rows["sure"]).sum())
    return won + ([f"undecided {undecided}"] if undecided else [])


def _rule(here: pd.DataFrame, name: str) -> str:
    """The number of tasks of a panel that each family surely wins."""
    if name == "exact":
        return f"an exact method on {here['method'].notna().sum()} of {len(here)} tasks"
    rows = _contested(here, name)
    if not len(rows):
        return "one family measured" if here["method"].notna().any() else "no method reaches it"
    return ", ".join(_counts(rows))


def _key(chosen: pd.DataFrame) -> key.Key:
    """A heading for each family with the number of its sure wins, the undecided tasks, and what regions mean."""
    known = [t for t in TOLERANCES if t != "exact"]
    columns: list[tuple[str, list[key.Entry]]] = []
    for kind in [k for k in base.KINDS if k in set(chosen["kind"].dropna())][:3]:
        rows = [(t, _contested(chosen, t)) for t in known]
        said = [f"{(own['sure'] & (own['kind'] == kind)).sum()} of {len(own)} {TOLERANCES[t]}" for t, own in rows]
        columns.append((f"{_word(kind)} surely fastest", [(Line2D([], [], **_mark(kind, True)), ", ".join(said))]))
    unsure = ", ".join(f"{(~own['sure']).sum()} {TOLERANCES[t]}" for t in known if len(own := _contested(chosen, t)))
    reading: list[key.Entry] = []
    if unsure:
        reading.append((Line2D([], [], **_mark("", True, False)), f"open: undecided, {unsure}"))
    if nobody := int(chosen["method"].isna().sum()):
        reading.append((Line2D([], [], **_mark(None, True)), f"nothing within tolerance: {nobody} of {len(chosen)}"))
    reading.append((Patch(facecolor=styles.GREY, alpha=TINT), "tint: surely won by one family, half a decade around"))
    reading.append((Patch(**UNMEASURED), "hatched: not measured"))
    return [*columns, ("how to read", reading)]


def _advice(chosen: pd.DataFrame) -> list[Line]:
    """Questions with the tasks' answers for each metric, and a line of code for each question."""
    bold: dict[str, Any] = {"fontweight": "bold", "fontsize": 10.5}
    made: list[Line] = []
    for name, question in QUESTIONS.items():
        made.append((question, bold, 0.22))
        tried = chosen[chosen["tolerance"] == name] if name == "exact" else _contested(chosen, name)
        for metric in base.metrics_in(tried):
            own = tried[tried["metric"] == metric]
            got = int(own["method"].notna().sum())
            said = f"on {got} of {len(own)} tasks" if name == "exact" else ", ".join(_counts(own))
            words = f"{labels.short(metric.replace('_', ' '), 16)}: {said}"
            made.append((words, {"color": styles.GREY, "fontsize": 8.5}, 0.17))
        if made[-1][0] == question:
            made.append(("no comparison", {"color": styles.GREY}, 0.17))
        made[-1] = (*made[-1][:2], 0.22)
        if code := _code(chosen[chosen["tolerance"] == name], tried, name):
            made.append((code, CODE, 0.3 + 0.15 * code.count("\n")))
    return made


def _code(own: pd.DataFrame, tried: pd.DataFrame, tolerance: str) -> str:
    """The call for a tolerance: ``auto``, or the exact method in PyTorch that is surely fastest on the most tasks.

    It is empty without a metric whose call takes a method.

    Args:
        own: all tasks of the tolerance.
        tried: those with a comparison.
        tolerance: a key of :data:`TOLERANCES`.
    """
    metrics = [metric for metric in base.metrics_in(own) if metric in METRICS]
    if not metrics:
        return ""
    if tolerance in ERRORS:
        return _call(metrics[0], f"rtol={ERRORS[tolerance]:g}")
    sure = tried[(tried["backend"] == "torch") & (tried["fastest"] >= tasks.SURE) & tried["metric"].isin(metrics)]
    if not len(sure):
        return "# none in PyTorch is surely fastest"
    metric, method = sure.groupby(["metric", "method"], sort=False).size().idxmax()
    return _call(metric, f'method="{labels.short(method, 30)}"')


def _call(metric: str, option: str) -> str:
    """The call of a metric, in two lines if it does not fit into one."""
    line = tasks.call(metric, "torch", option)
    return line if len(line) <= LONGEST else line.replace(f", {option}", f",\n  {option}")


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
    rows = _contested(chosen, name)
    counts = rows.loc[rows["sure"], "kind"].value_counts()
    won = [f"{PLURAL.get(kind, _word(kind))} on {count}" for kind, count in counts.items()]
    undecided = int((~rows["sure"]).sum())
    if won:
        verb = "is surely fastest" if counts.index[0] == "exact" else "are surely fastest"
        won[0] = won[0].replace(" on ", f" {verb} on ")
    words = ", ".join([*won, f"undecided on {undecided}"])
    return f"Which method? To {name}, {words} of {len(rows)} tasks"


def _caption(chosen: pd.DataFrame, lost: int) -> str:
    contested = pd.concat([_contested(chosen, t) for t in ERRORS])
    without = int((~contested["measured"].str.contains("exact")).sum())
    return (
        "Family of the fastest method; numbers: time of the best other family over it. Open with ?: fewer than "
        f"{100 * tasks.SURE:g} % of bootstrap reruns agree, or another time is an upper bound; "
        "\N{GREATER-THAN OR EQUAL TO}: the fastest has one. Small: one family measured, not counted. "
        f"{without} of {len(contested)} choices lack exact methods." + (f" {lost} cells lack sizes." if lost else "")
    )
