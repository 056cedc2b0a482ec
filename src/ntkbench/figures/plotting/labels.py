"""Formatting of words and numbers in figures."""

from __future__ import annotations

import math
import re
import textwrap
from collections.abc import Iterable

import pandas as pd

from ntkbench.measure.outcomes import one_line
from ntkbench.metrics import SYMBOLS

WORDS = 60
"""Maximum number of words of a caption."""
SIGNATURE = ("method_map", "time_to_accuracy", "calibration", "mohamadi_drift")
"""Figures that a report shows first, in this order, after that of all claims."""
GROUPS = {
    "claims": "Reproduction of the papers",
    "hazelden": "Hazelden: trace estimation",
    "mohamadi": "Mohamadi, Bae, Sutherland: the pNTK",
    "novak": "Novak, Sohl-Dickstein, Schoenholz: fast finite-width kernels",
    "along": "Along training",
}
"""Groups of figures by the first word of their names, in the order of the report; the others come first."""
OWN = "The comparison"
ACRONYMS = {"mlp", "gru", "rnn", "lstm", "cnn", "mnist", "ntk"}
NOT_DRAWN = "Could not be drawn"
"""Begins the caption of a figure that raised an exception; the report looks for it."""
TITLE = "Title: "
"""Begins the line of a caption's file with the figure's title; the report looks for it."""
CLAIM = "Claim ("
"""Begins the line of a claim in a caption's file; the report looks for it."""


def group(name: str) -> str:
    """The group that a figure is shown in, by its name."""
    return GROUPS.get(name.split("_")[0], OWN)


def metric_label(metric: str) -> str:
    """A metric's name, with its symbol if it has one."""
    name, symbol = metric.replace("_", " "), SYMBOLS.get(metric, "")
    return f"{name}  {symbol}" if symbol.startswith("$") else name


def name_label(name: str) -> str:
    """A readable name: ``digits_mlp[N=64,T=8]`` becomes digits MLP, N = 64, T = 8."""
    family, *sizes = re.split(r"[\[\],]", name)
    words = [word.upper() if word in ACRONYMS else word for word in family.split("_")]
    return plain(", ".join([" ".join(words), *(size.strip().replace("=", " = ") for size in sizes if size)]))


def families(names: Iterable[str]) -> dict[str, str]:
    """Readable names of problems; sizes are given only where a family has several problems."""
    found = list(dict.fromkeys(names))
    families = [name.partition("[")[0] for name in found]
    return {
        name: name_label(name if families.count(family) > 1 else family)
        for name, family in zip(found, families, strict=True)
    }


def case_label(name: str, *details: str, by: str = ", ") -> str:
    """A problem or family with its setting, if settings differ, and other details that distinguish panels."""
    return by.join(part for part in (name_label(name), *map(plain, details)) if part)


def fitted(*sentences: str) -> str:
    """A caption of sentences, the most important ones first: those that do not fit into :data:`WORDS` are left out."""
    kept = ""
    for sentence in sentences:
        longer = f"{kept} {sentence}".strip()
        if len(longer.split()) <= WORDS:
            kept = longer
    return kept


def listed(words: Iterable[str], most: int = 3) -> str:
    """Words in a sentence: ``a and b``; if there are more than ``most``, the last ones are counted."""
    words = list(words)
    if len(words) > most:
        words = [*words[: most - 1], f"{len(words) - most + 1} others"]
    return " and ".join(words)


def line(text: str) -> str:
    """Text from a table as one line of characters that can be printed and encoded."""
    return one_line(" ".join(text.split()))


def plain(text: str) -> str:
    """Text from a table, escaped so that it is never read as a formula."""
    return text.replace("$", r"\$")


def short(text: str, most: int = 60) -> str:
    """The first words of a text, escaped as by :func:`plain`."""
    return plain(textwrap.shorten(text, most, placeholder=" \N{HORIZONTAL ELLIPSIS}"))


def power_label(value: float) -> str:
    """A tick as a power of ten; a plain number if it is not one."""
    power = round(math.log10(value))
    if not math.isclose(value, 10.0**power):
        return f"{value:g}"
    return rf"$10^{{{power}}}$"


def sizes_label(rows: pd.DataFrame, *columns: str) -> str:
    """Sizes in a title: ``n = 640,  P = 85 k``; a range where they differ."""
    return ",  ".join(f"{column} = {range_label(rows[column])}" for column in columns)


def count_label(count: float) -> str:
    """A large number in a title: 640, 85 k, 1.2 M."""
    if not count >= 0:
        return "?"
    for unit, word in ((1e12, " T"), (1e9, " G"), (1e6, " M")):
        if float(f"{count / unit:.3g}") >= 1:
            return f"{count / unit:.3g}{word}"
    return f"{count / 1e3:.3g} k" if count >= 1e4 else f"{count:.0f}"


def rounded(value: float, digits: int = 2) -> str:
    """A number in a sentence, to ``digits`` digits; no power of ten from 0.0001 to a million: 8800, 0.0043."""
    return f"{float(f'{value:.{digits}g}'):g}"


def interval_label(value: float, low: float, high: float, digits: int = 2) -> str:
    """A number with its interval: ``280 (190 to 420)``; an unknown end is ``?``."""
    ends = [rounded(end, digits) if math.isfinite(end) else "?" for end in (low, high)]
    return f"{rounded(value, digits)} ({ends[0]} to {ends[1]})"


def share_label(share: float) -> str:
    """A share in percent: 0.13 %."""
    return f"{rounded(100 * share)} %"


def range_label(counts: pd.Series) -> str:
    """One number, or from the smallest to the largest."""
    low, high = counts.min(), counts.max()
    return count_label(low) if low == high else f"{count_label(low)} to {count_label(high)}"


def span(values: Iterable[float]) -> str:
    """The range of some numbers in a sentence: ``2.7 to 23``; one number if both ends round to the same."""
    values = list(values)
    return " to ".join(dict.fromkeys((rounded(min(values)), rounded(max(values)))))


def status_label(status: str) -> str:
    """A readable status."""
    return status.replace("_", " ")


def _first_words(reason: str, most: int = 120) -> str:
    """A reason; a long one loses the brackets at its end, and is cut if it is still too long."""
    if len(reason) > most:
        reason = re.sub(r"\s*\(.*\)\s*$", "", reason, flags=re.DOTALL)
    return short(reason, most)


def why_not(rows: pd.DataFrame, most: int = 3) -> str:
    """The reasons of rows that are not ok, most frequent first, one per line."""
    rows = rows[rows["status"] != "ok"]
    if not len(rows):
        return "measured, but without these numbers"
    counts = rows.groupby(["status", "reason"]).size().reset_index(name="cells")
    counts = counts.sort_values(["cells", "status", "reason"], ascending=[False, True, True])
    lines = [
        f"{row.cells} {status_label(row.status)}" + (f": {_first_words(row.reason)}" if row.reason else "")
        for row in counts.head(most).itertuples()
    ]
    left = int(counts["cells"][most:].sum())
    return "\n".join([*lines, f"and {left} more"] if left else lines)
