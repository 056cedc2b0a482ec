"""Checks of the results table: what a reader should know before trusting its numbers."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pandas as pd
from scipy.stats import binomtest

from ntkbench import metrics
from ntkbench.figures.plotting import base, labels

ERROR, WARNING, NOTE, PASSED = SEVERITIES = ("error", "warning", "note", "passed")
"""Severities, the worst first."""
OFF = {"float32": 1e-3, "float64": 1e-8}
"""Relative error above which an exact method disagrees with the reference, far above rounding, by precision."""
DISTINCT = 10
"""References whose relative difference exceeds this many times the largest of these errors count as distinct."""
CONFIDENCE = 0.95
"""Nominal coverage of the tested intervals."""
UNLIKELY = 0.01
"""Probability of any false alarm about coverage in a table."""
NOISY = 0.5
"""Quartile range of the seconds of a cell, relative to their median, above which its timing is noisy."""
FEWEST = 3
"""Minimum number of timed calls for meaningful quartiles."""
SHUFFLED = 8, 4, 64
"""Samples, outputs and parameters of the control's kernel."""
ROUNDING = 1e-5
"""Median error below which an estimate is exact to rounding, so that all of its intervals may hold."""


@dataclass(frozen=True)
class Check:
    """The result of a check.

    Attributes:
        severity: one of :data:`SEVERITIES`.
        title: what was checked.
        text: what was found.
        cases: the cells that it is about, in words.
    """

    severity: str
    title: str
    text: str
    cases: tuple[str, ...] = ()


def checks(table: pd.DataFrame) -> list[Check]:
    """All checks of the results table, the worst first.

    Args:
        table: what :func:`ntkbench.figures.plotting.base.checked` gives.
    """
    known = [name for name in ("value", "reference", "covered", "calls") if name in table]
    table = table.assign(**{name: pd.to_numeric(table[name], errors="coerce") for name in known})
    found = [_missing(table), _exact(table), _control(table), _shuffled(table), _coverage(table), _timings(table)]
    found.append(_code(table))
    return sorted(found, key=lambda check: SEVERITIES.index(check.severity))


def _missing(table: pd.DataFrame) -> Check:
    without = table[table["status"] != "ok"]
    if not len(without):
        return Check(PASSED, "Cells without a result", f"All {len(table)} cells have one.")
    ended = set(without["status"])
    severity = ERROR if "failed" in ended else NOTE if ended == {"skipped"} else WARNING
    reasons = without.groupby(["status", "reason"], sort=False).size().sort_values(ascending=False)
    cases = tuple(f"{count} {labels.status_label(status)}: {reason}" for (status, reason), count in reasons.items())
    return Check(severity, "Cells without a result", f"{len(without)} of {len(table)} cells have none.", cases)


def _exact(table: pd.DataFrame) -> Check:
    exact = _compared(table)
    off = exact[_is_off(exact, exact["reference"])]
    if not len(exact):
        return Check(NOTE, "Exact methods against the reference", "No exact method has a value and a reference.")
    text = f"{len(exact) - len(off)} of {len(exact)} values of exact methods agree with the reference."
    return Check(ERROR if len(off) else PASSED, "Exact methods against the reference", text, _cases(off))


def _control(table: pd.DataFrame) -> Check:
    """The same check with the reference of another problem, which it must detect.

    The other problem is the one that differs most; problems whose references hardly differ are left out.
    """
    exact = _compared(table)
    others: dict[tuple[str, str], float] = {}
    for metric, rows in exact.groupby("metric"):
        references = rows.groupby("problem")["reference"].first()
        for problem, own in references.items():
            other = references.iloc[int(np.argmax((references / own - 1).abs()))]
            if abs(other / own - 1) > DISTINCT * max(OFF.values()):
                others[metric, problem] = other
    keys = list(zip(exact["metric"], exact["problem"], strict=True))
    exchanged = exact[pd.Series([key in others for key in keys], index=exact.index, dtype=bool)]
    wrong = pd.Series([others[key] for key in keys if key in others], index=exchanged.index, dtype=float)
    seen = int(_is_off(exchanged, wrong).sum())
    if not len(exchanged):
        return Check(NOTE, "Control: references of other problems", "No two problems have distinct values.")
    text = f"{seen} of {len(exchanged)} values of exact methods disagree with another problem's reference; all should."
    return Check(PASSED if seen == len(exchanged) else ERROR, "Control: references of other problems", text)


def _shuffled(table: pd.DataFrame) -> Check:
    """The same check on a known kernel in float32, and on that kernel with its samples shuffled on one side.

    Shuffling does not change the norm, so the norm cannot detect it.
    """
    title = "Control: an exact kernel and a shuffled one"
    there = [name for name in base.metrics_in(table) if name in metrics.METRICS]
    if not there:
        return Check(NOTE, title, f"The table has none of the metrics {', '.join(metrics.METRICS)}.")
    samples, outputs, parameters = SHUFFLED
    rng = np.random.default_rng(0)
    jacobians = rng.standard_normal((2, samples * outputs, parameters))
    jacobians[1] += jacobians[0]
    theta, theta_f = (jacobian @ jacobian.T for jacobian in jacobians)
    order = np.arange(samples * outputs).reshape(samples, outputs)[np.roll(np.arange(samples), 1)].ravel()
    known, right, wrong = (
        metrics.from_gram(*pair)
        for pair in (
            (theta, theta_f),
            (theta.astype(np.float32), theta_f.astype(np.float32)),
            (theta[order], theta_f),
        )
    )
    values = [[float(found.metric(name)) for name in there] for found in (right, wrong)]
    references = pd.Series([float(known.metric(name)) for name in there], dtype=float)
    agree, caught = (
        ~_is_off(pd.DataFrame({"value": found, "dtype": "float32"}), references).to_numpy(bool) for found in values
    )
    blind = [name for name, same in zip(there, caught, strict=True) if same]
    kinds = _compared(table).groupby("problem")["metric"].agg(set)
    unseen = tuple(str(problem) for problem, measured in kinds.items() if measured <= {*blind})
    text = (
        f"Of {len(there)} metrics, {agree.sum()} agree with a known kernel in float32, and {(~caught).sum()} disagree "
        "with it if its samples are shuffled on one side"
        + (f" (not {', '.join(blind)}, the only metric of {len(unseen)} problems)" if blind else "")
    )
    right_kernel = agree.all() and set(blind) <= {"norm"}
    return Check(ERROR if not right_kernel else NOTE if unseen else PASSED, title, f"{text}.", unseen)


def _compared(table: pd.DataFrame) -> pd.DataFrame:
    columns = ["value", "reference", "error"]
    if not set(columns) <= set(table):
        return table.iloc[:0].reindex(columns=[*table.columns, *columns])
    return base.measured(table[table["kind"] == "exact"], *columns)


def _is_off(exact: pd.DataFrame, reference: pd.Series) -> pd.Series:
    return (exact["value"] / reference - 1).abs() > exact["dtype"].map(OFF).fillna(max(OFF.values()))


def _coverage(table: pd.DataFrame) -> Check:
    title = f"Coverage of {100 * CONFIDENCE:.0f} % intervals"
    if "covered" not in table:
        return Check(NOTE, title, "The table has no intervals.")
    rows = base.measured(table, "covered", "seeds")
    rows = rows[rows["seeds"] >= 1]
    if not len(rows):
        return Check(NOTE, title, "The table has no intervals.")
    hits = (rows["covered"] * rows["seeds"]).round().astype(int)
    limit = UNLIKELY / len(rows)
    rare = np.array(
        [
            binomtest(int(hit), int(seeds), CONFIDENCE).pvalue < limit
            for hit, seeds in zip(hits, rows["seeds"], strict=True)
        ]
    )
    low = rows[rare & (rows["covered"] < CONFIDENCE)]
    high = rows[rare & (rows["covered"] > CONFIDENCE) & ~(rows["error"] < ROUNDING)]
    share = hits.sum() / rows["seeds"].sum()
    text = (
        f"{labels.share_label(share)} of {int(rows['seeds'].sum())} intervals contain the reference. Coverage is lower "
        f"than chance explains in {len(low)} of {len(rows)} cells, and higher in {len(high)}."
    )
    cases = tuple(
        f"{case}: {labels.share_label(covered)} of {seeds:g}"
        for out in (low, high)
        for case, covered, seeds in zip(_cases(out), out["covered"], out["seeds"], strict=True)
    )
    return Check(WARNING if len(low) + len(high) else PASSED, title, text, cases)


def _timings(table: pd.DataFrame) -> Check:
    rows = base.measured(table, "seconds", "seconds_q25", "seconds_q75")
    rows = rows[rows["calls"] >= FEWEST] if "calls" in rows else rows.iloc[:0]
    if not len(rows):
        return Check(NOTE, "Noise of timings", f"No cell has {FEWEST} timed calls.")
    spread = (rows["seconds_q75"] - rows["seconds_q25"]) / rows["seconds"]
    noisy = rows[spread > NOISY]
    text = (
        f"{len(noisy)} of {len(rows)} cells with {FEWEST} timed calls or more have quartiles further apart "
        f"than {100 * NOISY:.0f} % of the median."
    )
    return Check(NOTE if len(noisy) else PASSED, "Noise of timings", text, _cases(noisy))


def _code(table: pd.DataFrame) -> Check:
    dirty = table["git_dirty"].str.lower().isin({"true", "1", "1.0", "yes"})
    kinds = {"git_sha": "commits", "machine": "machines", "device": "devices", "versions": "sets of package versions"}
    counts = {name: len(set(table[column]) - {""}) for column, name in kinds.items() if column in table}
    text = ", ".join(f"{name}: {count}" for name, count in counts.items())
    if dirty.any():
        return Check(WARNING, "Where the numbers come from", f"{text}; {dirty.sum()} cells with uncommitted changes.")
    return Check(PASSED if max(counts.values()) <= 1 else NOTE, "Where the numbers come from", f"{text}.")


def _cases(rows: pd.DataFrame) -> tuple[str, ...]:
    return tuple(
        f"{row.problem}, {row.metric.replace('_', ' ')}, {row.method} in {row.backend}"
        + (f", {row.passes:g} passes" if row.passes == row.passes else "")
        for row in rows.itertuples()
    )
