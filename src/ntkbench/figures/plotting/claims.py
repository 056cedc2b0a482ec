"""What a source claims, what was measured, and what follows: sentences for captions, worded by intervals alone."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pandas as pd

from ntkbench.figures.plotting import labels
from ntkbench.measure import laws

SHARED = "shared_probe_alignment"


def median(values: Sequence[float], seed: int = 0) -> tuple[float, float, float]:
    """The median of positive numbers with its 95 % bootstrap interval; ``nan`` where there is none."""
    finite = np.asarray([value for value in values if np.isfinite(value)])
    if not len(finite):
        return (np.nan,) * 3
    draws = np.random.default_rng(seed).choice(finite, (2000, len(finite)))
    low, high = np.quantile(np.median(draws, 1), (0.025, 0.975))
    return float(np.median(finite)), float(low), float(high)


def ratio(values: Sequence[float], what: str = "cases") -> str:
    """A median ratio with its interval and count: ``1.1 (0.9 to 1.3; 12 cases)``."""
    return f"{labels.interval_label(*median(values), 3).removesuffix(')')}; {len(values)} {what})"


def compared(low: float, high: float, words: tuple[str, str, str], known: float = 1.0) -> str:
    """A conclusion: the first of the words if the interval is below a number, the second if above, else the third."""
    return {"above": words[0], "below": words[1], "inside": words[2]}[labels.beside(known, low, high)]


def shared_probes(points: pd.DataFrame, hutchpp: str) -> str:
    """Shared probes against three Hutch++ traces for the alignment, at the budgets that both were given.

    Args:
        points: measured rows of one problem.
        hutchpp: the method whose traces these are.
    """
    rows = points[points["metric"] == "alignment"]
    both = [rows[rows["method"] == name] for name in (SHARED, hutchpp)]
    if not all(map(len, both)):
        return ""
    least, most = max(each["passes"].min() for each in both), min(each["passes"].max() for each in both)
    fitted = [laws.fit(each, seed) for seed, each in enumerate(both)]
    said, verdicts = [], []
    for passes in sorted({least, most}) if least <= most else ():
        ours, theirs = (law.error(passes) for law in fitted)
        times, low, high = laws.banded(theirs / ours)
        said.append(f"{labels.interval_label(times, low, high)} at {passes:g} passes")
        verdict = compared(low, high, ("it does not hold", "it holds", "these seeds do not tell"))
        verdicts.append(f"{verdict} at {passes:g} passes")
    if not said:
        return ""
    estimates = sum(each["seeds"].sum() for each in both)
    return (
        " Claim of the blog post: at equal passes shared probes are more accurate than three Hutch++ traces. Measured "
        f"on {labels.name_label(rows['problem'].iloc[0])}, the traces' error over that of shared probes (95 % bands, "
        f"{estimates:g} estimates): {', '.join(said)}. Conclusion: {', '.join(verdicts)}."
    )
