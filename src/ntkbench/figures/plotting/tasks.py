"""Tasks, each a metric of a problem within a tolerance, and the times that methods take to solve them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from ntkbench.figures.plotting import base, styles
from ntkbench.measure import laws
from ntkbench.metrics import OF_KERNEL

TOLERANCES = {"10 %": 1e-1, "1 %": 1e-2, "0.1 %": 1e-3, "exact": 1e-4}
"""Largest median relative error; the last one is for exact methods only, and allows for float32's rounding."""
RULE = (
    "A method's time is where a law fitted to all its measured budgets crosses the tolerance, without extrapolation "
    "(errors fall at least as fast as 1 / sqrt(passes), and seconds grow with passes). It is an upper bound "
    "('at most') if the error at the smallest budget is below a third of the tolerance."
)
"""How a method's time is derived, for captions."""
SURE = 0.95
"""Share of bootstrap reruns in which the fastest method must win to be named without a question mark."""
FAMILIES = {
    "exact": styles.Look("exact", "exact", "exact", styles.BLUE, "s"),
    "approximate": styles.Look("approximate", "approximate", "approximate", styles.GREEN, "*"),
    "stochastic": styles.Look("stochastic", "estimate", "stochastic", styles.VERMILION, "o"),
}
"""How figures that compare families of methods draw them, by kind."""
ESTIMATOR_MARKS = {
    "Hutchinson, one-sided": "o",
    "Hutch++, Nyström++": "D",
    "XTrace, XNysTrace": "<",
    "per sample, U-statistics": "p",
    "Gram matrices, projections": ">",
    "Lanczos": "h",
}
"""Families of estimators, with their markers."""
_HUTCHINSON, _HUTCHPP, _EXCHANGEABLE, _SAMPLES, _GRAMS, _LANCZOS = ESTIMATOR_MARKS
ESTIMATORS = {
    **dict.fromkeys(["hutchinson", "one_sided_reverse", "one_sided_forward", "one_sided_orthonormal"], _HUTCHINSON),
    **dict.fromkeys(["one_sided_paper_reverse", "one_sided_paper_forward"], _HUTCHINSON),
    **dict.fromkeys(["hutchpp", "hutchpp_paper", "hutchpp_one_sided", "hutchpp_adaptive"], _HUTCHPP),
    **dict.fromkeys(["hutchpp_adaptive_forward", "nystrompp"], _HUTCHPP),
    **dict.fromkeys(["xtrace", "xnystrace", "xnystrace_forward", "nystrom_loo"], _EXCHANGEABLE),
    **dict.fromkeys(["per_sample_trace", "per_sample_trace_forward", "block_u_statistics"], _SAMPLES),
    **dict.fromkeys(["group_u_statistics", "structured_block_u_statistics", "wide_head_u_statistics"], _SAMPLES),
    **dict.fromkeys(["sample_subset"], _SAMPLES),
    **dict.fromkeys(["gram_reverse", "gram_forward", "shared_probe_alignment", "dense_jl", "sparse_jl"], _GRAMS),
    **dict.fromkeys(["grass", "kronecker_projection"], _GRAMS),
    **dict.fromkeys(["block_lanczos"], _LANCZOS),
}
"""The family of each estimator; those that are not listed form a family by kind."""
CALLS = {
    "torch": {
        "alignment": "ntkbench.alignment(model, other, x, {})",
        "spectrum": "ntkbench.spectrum(model, x)",
        "regression_error": "ntkbench.Kernel(model, x).regress(held_out, y, ridge=ridge)",
        "": "ntkbench.{}(model, x, {})",
    },
    "jax": {
        "alignment": "ntkbench.alignment(f, other_params, x, params=params, {})",
        "spectrum": "ntkbench.spectrum(f, x, params=params)",
        "regression_error": "ntkbench.Kernel(f, x, params=params).regress(held_out, y, ridge=ridge)",
        "": "ntkbench.{}(f, x, params=params, {})",
    },
}
"""Calls of the API by backend, and by metric where it takes its own arguments."""
OF_SPECTRUM = {
    "largest_eigenvalue": "largest",
    "condition_number": "condition_number",
    "entropy_effective_rank": "entropy_effective_rank",
}
"""Attributes of a spectrum by metric."""
TASK = ["problem", "setting", "metric", "tolerance"]
LINE = [*TASK[:3], "method", "backend"]
SIZES = ["family", "N", "O", "P", "n"]
COLUMNS = [
    *TASK,
    *SIZES,
    "effective_rank",
    "method",
    "backend",
    "title",
    "kind",
    "error",
    "seeds",
    *laws.Reached._fields,
]
COLUMNS += ["at_most", "fastest", "fastest_of_kind"]


def call(metric: str, backend: str, options: str) -> str:
    """The line of Python that computes a metric.

    Args:
        metric: the metric.
        backend: the backend.
        options: arguments such as ``method="direct"``. Where the API takes none, the line says so in a comment.
    """
    forms = CALLS["jax" if backend == "jax" else "torch"]
    if metric in OF_KERNEL:
        form = f"{forms['spectrum']}.{OF_SPECTRUM[metric]}" if metric in OF_SPECTRUM else forms[metric]
        return f"{form}  # ntkbench chooses the method"
    return forms[metric].format(options) if metric in forms else forms[""].format(metric, options)


def solutions(
    table: pd.DataFrame, tolerances: Mapping[str, float] = TOLERANCES, drift: float = laws.DRIFT
) -> pd.DataFrame:
    """The time of each method and backend for each task that it solves, by the law of :mod:`ntkbench.measure.laws`.

    ``seeds`` is the number of estimates behind the law, and ``passes`` and ``seconds`` have 95 % bands. ``at_most``
    says whether the seconds are an upper bound, because even the smallest budget is far too large. ``fastest`` is the
    share of bootstrap reruns in which the method solves the task and nothing else does so faster; a method that solves
    it in some reruns only is a rival too. The share is 0 if another method has an upper bound and one of its passes
    takes less time, or if no other method was measured on the problem and metric. ``fastest_of_kind`` is the sum over
    all methods of this kind.

    Args:
        table: what :func:`ntkbench.figures.plotting.base.checked` gives.
        tolerances: names to largest median errors; ``exact`` counts exact methods alone.
        drift: as for :func:`ntkbench.measure.laws.fit`; 0 for costs that are counted.
    """
    points = _points(table)
    methods = points.groupby(TASK[:3])["method"].nunique()
    firsts = points.drop_duplicates(LINE).set_index(LINE, drop=False)
    seeds = points.groupby(LINE)["seeds"].sum()
    fitted = laws.fits(points, LINE, drift)
    made: list[dict[str, Any]] = []
    for name, largest in tolerances.items():
        draws: dict[tuple[object, ...], dict[int, np.ndarray]] = {}
        for case, law in fitted.items():
            first = firsts.loc[case]
            if name == "exact" and first["kind"] != "exact":
                continue
            reached = law.reached(largest)
            draws.setdefault(case[:3], {})[len(made)] = law.seconds(law.budgets(largest))[1:]
            budgeted = bool(np.isfinite(first["passes"]))
            error = np.nan if np.isnan(reached.passes) else law.error(reached.passes)[0]
            row = first.to_dict() | reached._asdict() | {"tolerance": name, "error": error, "seeds": seeds[case]}
            row["at_most"] = budgeted and law.at_most(largest)
            made.append(row | ({} if budgeted else dict.fromkeys(laws.Reached._fields[:3], np.nan)))
        for case, rivals in draws.items():
            times = np.nan_to_num(np.stack(list(rivals.values())), nan=np.inf)
            wins = ((times <= times.min(0)) & np.isfinite(times)).mean(1)
            # Seconds grow at most in proportion to passes, so no budget takes less than this.
            least = {i: made[i]["seconds"] / max(made[i]["passes"], 1.0) for i in rivals if made[i]["at_most"]}
            for i, share in zip(rivals, wins, strict=True):
                may_be_faster = any(not least[k] >= made[i]["seconds"] for k in least.keys() - {i})
                made[i]["fastest"] = 0.0 if may_be_faster or methods[case] < 2 else float(share)
    found = pd.DataFrame(made, columns=COLUMNS).astype({"at_most": bool})
    found["fastest_of_kind"] = found.groupby([*TASK, "kind"])["fastest"].transform("sum")
    return found[found["seconds"].notna()].reset_index(drop=True)


def _points(table: pd.DataFrame) -> pd.DataFrame:
    """The rows with seconds and an error."""
    return base.measured(table[table["seconds"] > 0], "seconds", "error")


def winners(
    table: pd.DataFrame, tolerances: Mapping[str, float] = TOLERANCES, drift: float = laws.DRIFT
) -> pd.DataFrame:
    """The fastest method of each task, and ``lead``, the factor by which the fastest other method is slower.

    ``lead_of_kind`` is the same for methods of other kinds. ``fastest_of_kind`` is 0 if no other kind was measured on
    the problem and metric.

    Args:
        table: as for :func:`solutions`.
        tolerances: as for :func:`solutions`.
        drift: as for :func:`solutions`.
    """
    solved = solutions(table, tolerances, drift)
    if not len(solved):
        return solved.assign(**dict.fromkeys(("lead", "lead_of_kind"), pd.Series(dtype=float)))
    kinds = _points(table).groupby(TASK[:3])["kind"].nunique()
    found = []
    for task, rows in solved.groupby(TASK):
        first = rows.loc[rows["seconds"].idxmin()]
        others, same = rows["method"] != first["method"], rows["kind"] == first["kind"]
        found.append(
            first.to_dict()
            | {
                "lead": rows.loc[others, "seconds"].min() / first["seconds"],
                "lead_of_kind": rows.loc[~same, "seconds"].min() / first["seconds"],
                "fastest_of_kind": first["fastest_of_kind"] if kinds[task[:3]] > 1 else 0.0,
            }
        )
    order = {metric: i for i, metric in enumerate(base.metrics_in(solved))}
    chosen = pd.DataFrame(found)
    place = chosen["metric"].map(order), chosen["tolerance"].map(list(tolerances).index)
    chosen = chosen.assign(_metric=place[0], _tolerance=place[1])
    chosen = chosen.sort_values(["_metric", "n", "P", "problem", "setting", "_tolerance"])
    return chosen.drop(columns=["_metric", "_tolerance"]).reset_index(drop=True)


def label(panel: Axes, words: str, places: Sequence[tuple[float, float]], taken: list[tuple[float, float]]) -> None:
    """Text at the first free place, or the freest one if none is free. Its place is added to those taken.

    Args:
        places: of the text's middle, in inches of the figure.
        taken: what the text must not cover, in inches of the figure.
    """
    half = 0.04 * len(words) + 0.05
    spots = np.array(taken)
    free = [np.max(np.abs(spots - place) / (half + 0.03, 0.12), axis=1).min() for place in places]
    x, y = places[next((i for i, room in enumerate(free) if room >= 1), int(np.argmax(free)))]
    panel.text(x, y, words, transform=panel.figure.dpi_scale_trans, ha="center", va="center", fontsize=9)
    taken += [(x + part * half, y) for part in (-1, -0.5, 0, 0.5, 1)]
