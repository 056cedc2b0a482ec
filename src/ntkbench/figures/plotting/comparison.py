"""The report of a comparison of methods on one network: a self-contained page of HTML."""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from ntkbench.figures.plotting import base, canvas, report, styles, tasks
from ntkbench.trials import Trial, Trials
from ntkbench.units import counted, percent_label, seconds_label

TEMPLATE = report.TEMPLATE.with_name("comparison.html")
COLOURS = {"exact": styles.BLUE, "approximate": styles.GREEN, "stochastic": styles.VERMILION}
LEAST = 1e-8
"""Smaller errors are drawn at this value; those of exact methods are 0 or rounding."""
DPI = 150
COLUMNS = ("Method", "Kind", "Value", "95 % interval", "Passes", "Seconds (quartiles)", "Calls", "Error", "Reason")


def page(trials: Trials, title: str, provenance: Mapping[str, str]) -> str:
    """The page: a picture of errors and seconds, a table of all methods, and the provenance.

    Args:
        trials: results and costs of the methods.
        title: heading of the page.
        provenance: names and values of the last table, such as the machine.
    """
    done = [one for one in trials if not one.reason]
    known = any(one.error is not None for one in done)
    environment = Environment(loader=FileSystemLoader(TEMPLATE.parent), autoescape=True, undefined=StrictUndefined)
    return environment.get_template(TEMPLATE.name).render(
        title=title,
        summary=_summary(trials, known),
        picture=_embedded(picture(trials)),
        caption=_caption(known),
        columns=COLUMNS,
        rows=[_row(one) for one in trials],
        provenance=provenance,
    )


def picture(trials: Trials) -> Figure:
    """A dot for each method with a value: its error against its seconds, with the quartiles of the seconds.

    Where no exact method was measured the error is not known, and half of the 95 % interval is drawn in its place.
    """
    known = any(one.error is not None for one in trials)
    dots = [(one, one.seconds, _height(one, known)) for one in trials if one.seconds is not None]
    with base.style():
        figure = Figure(figsize=(8.0, 4.6))
        panel = figure.add_axes((0.1, 0.12, 0.87, 0.78))
        drawn = [(one, x, max(y, LEAST)) for one, x, y in dots if y is not None]
        low, high = canvas.limits([x for _, x, _ in drawn], pad=8)
        bottom, top = canvas.limits([y for *_, y in drawn], pad=2.5)
        panel.set(xscale="log", yscale="log", xlim=(low, high), ylim=(bottom, top), xlabel="seconds of a call")
        panel.set_ylabel("relative error" if known else "half of the 95 % interval, relative")
        canvas.decades(panel.xaxis, low, high)
        canvas.decades(panel.yaxis, bottom, top)
        for one, x, y in drawn:
            colour = COLOURS[one.kind]
            panel.plot([one.seconds_q25 or x, one.seconds_q75 or x], [y, y], color=colour, linewidth=1.2)
            panel.plot(x, y, "o", color=colour, markersize=6)
        _label(panel, [(_name(one), COLOURS[one.kind], x, y) for one, x, y in drawn])
        kinds = [kind for kind in COLOURS if kind in {one.kind for one, *_ in drawn}]
        handles = [Line2D([], [], color=COLOURS[kind], marker="o", linestyle="") for kind in kinds]
        if not drawn:
            canvas.note(panel, "no method has a value and an error")
        else:
            figure.legend(handles, kinds, loc="upper left", ncols=len(kinds), frameon=False)
    return figure


def _label(panel: Axes, dots: Sequence[tuple[str, str, float, float]]) -> None:
    """The name of each dot in its colour, at a free place near it within the panel."""
    points = np.array([(x, y) for *_, x, y in dots]).reshape(-1, 2)
    placed = panel.transData.transform(points) / panel.figure.dpi
    taken = [(float(x), float(y)) for x, y in placed]
    (left, bottom), (right, top) = panel.bbox.get_points() / panel.figure.dpi
    for (name, colour, *_), (x, y) in zip(dots, list(taken), strict=True):
        half = 0.04 * len(name) + 0.05
        beside = [(x + sign * (half + 0.1), y + up) for up in (0.0, 0.17, -0.17, 0.34, -0.34) for sign in (1, -1)]
        places = [*beside, *((x, y + up) for up in (0.2, -0.2, 0.4, -0.4))]
        inside = [(a, b) for a, b in places if left <= a - half and a + half <= right and bottom <= b <= top]
        tasks.label(panel, name, inside or places, taken)
        panel.texts[-1].set_color(colour)


def _height(one: Trial, known: bool) -> float | None:
    """The error that is drawn for a method; ``None`` if it has none."""
    if known or one.value is None or one.low is None or one.high is None:
        return one.error
    width = (one.high - one.low) / 2
    return width / abs(one.value) if one.value and math.isfinite(width) else None


def _embedded(figure: Figure) -> dict[str, object]:
    """The picture as PNG in base64, with its size on the page."""
    with base.style():
        data = io.BytesIO()
        figure.savefig(data, format="png", dpi=DPI, metadata={"Software": None})
    width, height = (round(size * figure.dpi) for size in figure.get_size_inches())
    return {"data": base64.b64encode(data.getvalue()).decode(), "width": width, "height": height}


def _summary(trials: Trials, known: bool) -> str:
    done = [one for one in trials if not one.reason]
    said = f"{len(done)} of {counted(len(trials), 'method')} gave a value."
    if done:
        fastest = done[0]
        verb = "has the lowest median time," if len(done) > 1 else "takes"
        said += f" {_name(fastest)} {verb} {seconds_label(fastest.seconds or math.nan)}"
        error = f" with an error of {percent_label(fastest.error)}" if fastest.error else ""
        said += f"{', exact' if fastest.kind == 'exact' else error}."
    return said if known else f"{said} No exact method was measured, so errors are not known."


def _caption(known: bool) -> str:
    error = (
        "Root mean square of the relative errors of all calls, against the first exact method. Errors below "
        f"{LEAST:g} are drawn at {LEAST:g}"
        if known
        else "Half of the 95 % interval of the first call, relative to the value"
    )
    return f"{error}. Seconds are the median over calls of the prepared method, and lines are quartiles."


def _name(one: Trial) -> str:
    return one.method if one.by in ("", one.method) else f"{one.method} ({one.by})"


def _row(one: Trial) -> tuple[str, ...]:
    if one.value is None:
        return (_name(one), one.kind, "", "", "", "", "", "", one.reason)
    quartiles = [seconds_label(value) for value in (one.seconds_q25, one.seconds_q75) if value is not None]
    return (
        _name(one),
        one.kind,
        f"{one.value:.6g}",
        "unknown" if one.low is None else "exact" if one.kind == "exact" else f"{one.low:.4g} to {one.high:.4g}",
        "" if one.passes is None else f"{one.passes:g}",
        "" if one.seconds is None else f"{seconds_label(one.seconds)} ({' to '.join(quartiles)})",
        f"{one.calls}",
        "" if one.error is None else percent_label(one.error),
        "",
    )
