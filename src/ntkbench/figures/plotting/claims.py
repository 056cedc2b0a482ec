"""Claims of the papers as data: the statement, the measurement here, and a verdict by the numbers alone.

A figure returns its claims in :class:`ntkbench.figures.plotting.base.Drawing`. They appear in captions, ``claims.csv``,
the table of the report and the figure of all claims.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import labels
from ntkbench.measure import laws

NAME = "claims"
"""Name of the files of all claims of a set of figures."""
SHARED = "shared_probe_alignment"

REPRODUCED, PARTLY, NOT, UNADDRESSED = VERDICTS = ("reproduced", "partly", "not", "not addressed")
"""Whether a claim is reproduced; see :attr:`Claim.verdict`."""
SAID = {REPRODUCED: "reproduced", PARTLY: "partly reproduced", NOT: "not reproduced", UNADDRESSED: "not addressed"}
"""Verdicts in a sentence."""

ABOUT, ABOVE, BELOW = "about", "above", "below"
"""What a source says of a value: that it is about a number, above it or below it."""

FACTOR, EXPONENT, SHARE, DIGITS = 2.0, math.sqrt(2), 1.05, 1.01
"""Factors within which magnitudes, exponents, accuracies and values of three digits are reproduced.

The factor for exponents: a reproduced exponent is closer, as a ratio, to the published one than to its half or double.
"""

EQUAL = 0.005
"""The distance of a ratio from 1 below which a value is called equal to the published one."""

Interval = tuple[float, float, float]
"""A value and the ends of its interval; an end that is ``nan`` is not known."""
UNKNOWN: Interval = (math.nan, math.nan, math.nan)
MEASURED = ("measured", "measured_low", "measured_high")
"""Columns of a value and its interval."""
FEWEST = 6
"""Minimum count of numbers whose median has a bootstrap interval."""


@dataclass(frozen=True, kw_only=True)
class Claim:
    """A claim of a paper, and the measurement here.

    Attributes:
        source: the paper, and the figure or sentence in it.
        name: the subject of the claim, in a few words.
        statement: the claim as a clause, with the published number in it.
        published: the published number; 1 if the claim is that a ratio is about, above or below 1.
        accuracy: how well the published number is known.
        there: the published setting.
        here: the setting of the measurement.
        same: whether both settings are equal except for the machine; for times, other hardware is another setting.
        relation: :data:`ABOUT`, :data:`ABOVE` or :data:`BELOW` the published number.
        within: the factor within which a number is reproduced; not used for the other relations.
        measured: the value and its interval; ``UNKNOWN`` if nothing was measured.
        spread: the kind of interval.
        runs: number of runs behind the value.
        of: the kind of runs: estimates, networks, cases.
        unit: unit of the value in a sentence: seconds, times.
        best: for a speed-up, the same with the best exact method instead of the published baseline.
        best_title: title of that method; not in the table if nothing was measured with it.
        addressed: whether the measurement tests the claim; if not, ``note`` says why.
        note: what a reader must know in addition to the numbers.
    """

    source: str
    name: str
    statement: str
    published: float = math.nan
    accuracy: str = ""
    there: str = ""
    here: str = ""
    same: bool = False
    relation: str = ABOUT
    within: float = FACTOR
    measured: Interval = UNKNOWN
    spread: str = "95 % interval"
    runs: int = 0
    of: str = "runs"
    unit: str = ""
    best: Interval = UNKNOWN
    best_title: str = ""
    addressed: bool = True
    note: str = ""

    @property
    def ratio(self) -> Interval:
        """Measured over published, with the ends in order; ``nan`` if the published number is missing or 0."""
        return self._over(self.measured)

    @property
    def best_ratio(self) -> Interval:
        """The same for :attr:`best`."""
        return self._over(self.best)

    def _over(self, interval: Interval) -> Interval:
        if not self.published:
            return UNKNOWN
        value, low, high = (number / self.published for number in interval)
        return (value, low, high) if self.published > 0 else (value, high, low)

    @property
    def verdict(self) -> str:
        """One of :data:`VERDICTS`, by the interval.

        A number is reproduced if the whole interval is within the factor of it, and not reproduced if none of it is.
        A claim that a value is above or below a number is reproduced if the whole interval is, and not reproduced if
        none of it is. Otherwise it is partly reproduced: in some cases only, or the runs do not decide. An unknown end
        bounds nothing. Without a published number, a value or any end of its interval, the claim is not addressed.
        """
        value, low, high = self.ratio if self.relation == ABOUT else self.measured
        known = not any(map(math.isnan, (self.published, value)))
        if not self.addressed or not known or (math.isnan(low) and math.isnan(high)):
            return UNADDRESSED
        if self.relation == ABOUT:
            inside = low >= 1 / self.within and high <= self.within
            outside = high < 1 / self.within or low > self.within
        else:
            above, below = low > self.published, high < self.published
            inside, outside = (above, below) if self.relation == ABOVE else (below, above)
        return REPRODUCED if inside else NOT if outside else PARTLY

    @property
    def reason(self) -> str:
        """The reason for the verdict, and the note."""
        return "; ".join(filter(None, [self._why(), self.note]))

    def _why(self) -> str:
        value, *ends = self.ratio if self.relation == ABOUT else self.measured
        verdict, unknown = self.verdict, any(math.isnan(end) for end in ends)
        if verdict == UNADDRESSED:
            known = self.addressed and not math.isnan(value)
            return "measured once, so that its interval is not known" if known else ""
        if self.relation == ABOUT:
            times = "equal to" if abs(value - 1) < EQUAL else f"{_not_one(value)} times"
            times += " the published value"
            part = f"the interval is in part within a factor of {self.within:.3g}"
            return {
                REPRODUCED: f"within a factor of {self.within:.3g} of the published value",
                NOT: times,
                PARTLY: f"{times}, and {'an end of the interval is not known' if unknown else part}",
            }[verdict]
        other = BELOW if self.relation == ABOVE else ABOVE
        number = labels.rounded(self.published, 3)
        return {
            REPRODUCED: f"the interval is {self.relation} {number}",
            NOT: f"the interval is {other} {number}",
            PARTLY: f"an end of the interval is not known, the other is {other} {number}"
            if unknown
            else f"the interval contains {number}",
        }[verdict]

    def sentence(self) -> str:
        """The claim, the measurement, and the verdict with its reason, in one sentence."""
        measured = "; nothing was measured"
        if not math.isnan(self.measured[0]):
            measured = f"; measured {_measured(self.measured, self.unit, self.spread, self.runs, self.of)}"
        if not math.isnan(self.best[0]):
            measured += f", and {labels.interval_label(*self.best, digits=3)} over {self.best_title}"
        reason = f" ({self.reason})" if self.reason else ""
        return f"{labels.CLAIM}{self.source}): {self.statement}{measured}: {SAID[self.verdict]}{reason}."

    def row(self) -> dict[str, Any]:
        """Columns of ``claims.csv``, see :data:`COLUMNS`."""
        row: dict[str, Any] = {
            "source": self.source,
            "name": self.name,
            "statement": self.statement,
            "relation": self.relation,
        }
        row |= {"published": self.published, "accuracy": self.accuracy, "setting_published": self.there}
        row |= {"setting_here": " ".join(self.here.split()), "same_setting": "yes" if self.same else "no"}
        row |= dict(zip(MEASURED, self.measured, strict=True))
        row |= {
            "unit": self.unit,
            "interval": self.spread,
            "runs": self.runs,
            "runs_of": self.of,
            "within": self.within,
        }
        row |= dict(zip(("ratio", "ratio_low", "ratio_high"), self.ratio, strict=True))
        row |= dict(zip(("best_ratio", "best_ratio_low", "best_ratio_high"), self.best_ratio, strict=True))
        title = "" if math.isnan(self.best_ratio[0]) else self.best_title
        return row | {"best_exact": title, "verdict": self.verdict, "reason": self.reason}


COLUMNS = ("figure", *Claim(source="", name="", statement="").row(), "git_sha", "machine")
"""Columns of ``claims.csv``: the figure that states a claim, the claim, and commit and machine of the measurement."""


def rows(figure: str, claims: Iterable[Claim], table: pd.DataFrame) -> list[dict[str, Any]]:
    """A row of ``claims.csv`` for each claim of a figure.

    Args:
        figure: name of the figure.
        claims: claims of the figure.
        table: table that the figure is drawn from, for the provenance.
    """
    made = {
        name: "; ".join(sorted(set(table[name].dropna().astype(str)) - {""})) if name in table else ""
        for name in ("git_sha", "machine")
    }
    nothing = dict.fromkeys(made, "")
    return [{"figure": figure} | claim.row() | (nothing if math.isnan(claim.measured[0]) else made) for claim in claims]


def table(rows: Sequence[Mapping[str, Any]] | pd.DataFrame) -> pd.DataFrame:
    """The table of ``claims.csv`` from its rows, sorted by the names of figures."""
    return pd.DataFrame(rows, columns=[*COLUMNS]).sort_values("figure", kind="stable", ignore_index=True)


def to_csv(made: pd.DataFrame) -> str:
    """The text of ``claims.csv``; numbers have six digits, so that it does not depend on their last bits."""
    return made.to_csv(index=False, lineterminator="\n", float_format="%.6g")


def readable(made: pd.DataFrame) -> list[dict[str, str]]:
    """The words that a page shows for each claim, by column of its table."""
    shown = []
    for row in made.astype(object).where(made.notna(), "").to_dict("records"):
        number = functools.partial(_number, row)
        published = {ABOVE: "> ", BELOW: "< "}.get(row["relation"], "") + number("published")
        interval = [math.nan if row[name] == "" else float(row[name]) for name in MEASURED]
        words = (row["unit"], row["interval"], row["runs"], row["runs_of"])
        measured = "" if math.isnan(interval[0]) else _measured(interval, *words)
        shown.append(
            {name: str(row[name]) for name in ("source", "statement", "verdict", "reason", "figure")}
            | {"published": published if number("published") else "", "measured": measured, "name": row["name"]}
            | {"accuracy": row["accuracy"], "there": row["setting_published"], "here": row["setting_here"]}
            | {"same": row["same_setting"]}
        )
    return shown


def _measured(interval: Sequence[float], unit: str, spread: str, runs: int, of: str) -> str:
    """A value in words: ``12 times (11 to ?; 95 % interval, 5 seeds)``."""
    value, *ends = (labels.rounded(number, 3) if math.isfinite(number) else "?" for number in interval)
    counted = f"{runs} {of.removesuffix('s') if runs == 1 else of}"
    return f"{value}{f' {unit}' if unit else ''} ({' to '.join(ends)}; {spread}, {counted})"


def _number(row: Mapping[str, Any], name: str) -> str:
    return "" if row[name] == "" else labels.rounded(row[name], 3)


def _not_one(ratio: float) -> str:
    """A ratio to two digits; to three if it would read 1."""
    return labels.rounded(ratio, 3 if labels.rounded(ratio) == "1" else 2)


def median(values: Sequence[float], seed: int = 0) -> Interval:
    """The median of numbers with its 95 % bootstrap interval, whose ends are ``nan`` for fewer than :data:`FEWEST`."""
    from scipy.stats import bootstrap

    finite = np.asarray([value for value in values if np.isfinite(value)])
    if len(finite) < FEWEST:
        return (float(np.median(finite)), math.nan, math.nan) if len(finite) else UNKNOWN
    found = bootstrap((finite,), np.median, n_resamples=2000, method="percentile", rng=seed, vectorized=True)
    low, high = map(float, found.confidence_interval)
    return float(np.median(finite)), low, high


def ranged(values: Iterable[float]) -> Interval:
    """The median of numbers with their minimum and maximum, which are ``nan`` for a single number."""
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if len(finite) < 2:
        return (float(finite[0]), math.nan, math.nan) if len(finite) else UNKNOWN
    return float(np.median(finite)), float(finite.min()), float(finite.max())


def quotient(above: pd.Series, below: pd.Series) -> Interval:
    """Seconds of one row over those of another; the ends are the quotients of opposite quartiles."""
    low, high = above["seconds_q25"] / below["seconds_q75"], above["seconds_q75"] / below["seconds_q25"]
    return float(above["seconds"] / below["seconds"]), float(low), float(high)


def count(number: float) -> int:
    """A number of runs from a table; 0 if it is missing."""
    return 0 if math.isnan(number) else int(number)


def exponent(slope: float, half: float) -> Interval:
    """A slope with the ends of its interval, from half of its width."""
    return slope, slope - half, slope + half


def shared_probes(points: pd.DataFrame, hutchpp: str) -> tuple[Claim, ...]:
    """Shared probes against three Hutch++ traces for the alignment, at the most passes that both have.

    Args:
        points: measured rows of one problem.
        hutchpp: the method of the traces.
    """
    rows = points[points["metric"] == "alignment"]
    both = [rows[rows["method"] == name] for name in (SHARED, hutchpp)]
    if not all(map(len, both)):
        return ()
    passes = min(each["passes"].max() for each in both)
    if passes < max(each["passes"].min() for each in both):
        return ()
    fitted = [laws.fit(each, seed) for seed, each in enumerate(both)]
    problem = labels.name_label(rows["problem"].iloc[0])
    return (
        Claim(
            source="Hazelden's blog post",
            name=f"shared probes against three Hutch++ traces, {problem}",
            statement=f"at equal passes ({passes:g}) three Hutch++ traces have a larger error than shared probes",
            published=1.0,
            accuracy="a sentence",
            there="two recurrent networks of 128 units, 100 trials of 10 steps",
            here=problem,
            relation=ABOVE,
            measured=laws.banded(fitted[1].error(passes) / fitted[0].error(passes)),
            runs=int(sum(each["seeds"].sum() for each in both)),
            of="estimates",
            unit="times as large",
        ),
    )
