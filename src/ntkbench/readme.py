"""The measured numbers of the README and of the documentation, written from the committed tables.

A block of a page between ``<!-- table: NAME -->`` and ``<!-- end -->`` is written by the function NAME in
:data:`TABLES` from the tables in ``results/reference/``. A number in a sentence stands between
``<!-- value: NAME -->`` and ``<!-- end -->``, and comes from :data:`VALUES`.
"""

from __future__ import annotations

import functools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import pandas as pd

from ntkbench.errors import BadInput, unknown
from ntkbench.figures import calibration as coverage
from ntkbench.figures import cost_model as predicted
from ntkbench.figures import effective_ranks as of_ranks
from ntkbench.figures import solves as of_solves
from ntkbench.figures import spectra as of_spectra
from ntkbench.figures import time_to_error as times
from ntkbench.figures.plotting.claims import VERDICTS
from ntkbench.paths import write_atomically
from ntkbench.units import bytes_label, counted, percent_label, seconds_label

TITLES = {
    "bare matrix products": "the bare matrix products in it",
    "jacobian_contraction": "Jacobian contraction (torch.func)",
    "naive_jacobian": "a backward pass for each output",
    "nt_jacobian_contraction": "neural-tangents, Jacobian contraction",
    "nt_ntk_vector_products": "neural-tangents, NTK-vector products",
    "nt_structured_derivatives": "neural-tangents, structured derivatives",
    "sum_of_logits": "pNTK by vmap and one product",
}
"""Names of the compared methods on the pages."""
NAMED = {"structured_sum_of_logits": " (pNTK)", "wide_head": " (trace alone)"}
"""Additions to a problem's name if a row is not on its whole kernel, by method of this suite."""
AUTO = "auto"
CLOSE = 1.5
"""``auto`` is about as fast as the fastest method if it takes at most this many times its seconds."""
PAGES = ("README.md", "docs/large.md", "docs/measured.md", "docs/papers.md")
"""The pages with measured numbers, relative to the checkout."""
_BLOCK = re.compile(r"<!-- (table|value): ([^>]*?) -->(.*?)<!-- end -->", re.DOTALL)
_MARK = re.compile(r"<!-- (?:table|value):")


def update(root: Path, *, check: bool = False) -> list[str]:
    """Write the measured numbers of the pages from the committed tables.

    Args:
        root: the checkout, whose ``results/reference/`` holds the tables. A page is written only where a block changes.
        check: write nothing.

    Returns:
        the names of the blocks that were out of date, in their order.

    Raises:
        BadInput: a block has an unknown name or no end, or its table is missing and it is not in :data:`PENDING`; no
            page is then written.
    """
    tables = Tables(root / "results" / "reference")
    pages = [root / page for page in PAGES]
    found = [written(page.read_text(encoding="utf-8"), tables) for page in pages]
    for page, (text, stale) in zip(pages, found, strict=True):
        if stale and not check:
            write_atomically(page, text)
    return [name for _, stale in found for name in stale]


class Tables:
    """The committed tables; each is read once."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.read = functools.cache(self._read)

    def _path(self, name: str) -> Path:
        return self._folder / f"{name}.csv"

    def _read(self, name: str) -> pd.DataFrame:
        path = self._path(name)
        try:
            return pd.read_csv(path, low_memory=False, encoding="utf-8")
        except OSError as error:
            raise Absent(f"the pages need the table {path}: {error.strerror}") from None


class Absent(BadInput):
    """A missing table."""


def written(text: str, tables: Tables) -> tuple[str, list[str]]:
    """The text with every block rewritten, and the names of those that changed."""
    stale: list[str] = []

    def block(found: re.Match[str]) -> str:
        kind, name, old = found.groups()
        known = TABLES if kind == "table" else VALUES
        if name not in known:
            raise unknown(f"{kind} of a page", name, known)
        try:
            made = known[name](tables)
        except Absent:
            if name not in PENDING:
                raise
            made = f"*Not measured yet: `config/{PENDING[name]}.yaml` writes this table.*"
        new = f"\n{made}\n" if kind == "table" else made
        stale.extend([name] if new != old else [])
        return f"<!-- {kind}: {name} -->{new}<!-- end -->"

    written, blocks = _BLOCK.subn(block, text)
    if any(_MARK.search(inside[2]) for inside in _BLOCK.finditer(text)) or blocks != len(_MARK.findall(text)):
        raise BadInput("a table or value of a page has no <!-- end -->")
    return written, stale


def fastest_estimators(tables: Tables, name: str = "head_to_head/studies/time_to_error") -> str:
    """For each goal of ``time_to_error``: our fastest exact or unbiased method, and the fastest published one.

    "Or tied" means that the interval of another method overlaps, or is not known. Biased kernels between samples are
    named if they are faster and their bias is within the error.
    """
    table = tables.read(name)
    rows = []
    for (problem, metric, goal), methods in table.groupby(["problem", "metric", "goal"], sort=False):
        timed = methods[methods["seconds"].notna()]
        published = timed["published"].astype(bool)
        own = timed[~published & (timed["kind"] != "approximate")]
        ours, theirs = _fastest(own), _fastest(timed[published])
        biased = _fastest(timed[timed["kind"] == "approximate"])
        ratio = "" if ours is None or theirs is None else _ratio(ours, bold=True, ends=("low", "high"))
        wanted = f"{metric.replace('_', ' ')}, {100 * goal:g} %"
        if times.is_estimated(methods):
            wanted += f" of an estimate, whose standard error is {100 * methods['reference_error'].max():.2g} %"
        faster = (
            "" if biased is None or (ours is not None and biased["seconds"] >= ours["seconds"]) else _entrant(biased)
        )
        if not len(timed):
            why = ": ".join(filter(None, ["none reaches it", _mostly(methods)]))
            rows.append([f"`{problem}`", wanted, why, *[""] * 4])
            continue
        said = [
            "none reaches it" if row is None else _entrant(row) + (" (or tied)" if times.is_tied(rivals) else "")
            for row, rivals in ((ours, own), (theirs, timed[published]))
        ]
        rows.append([f"`{problem}`", wanted, *said, ratio, f"{timed['calls'].min():g}", faster])
    columns = [
        "problem",
        "metric, error",
        "fastest of this suite",
        "fastest published method",
        "time, ours / theirs (95 %)",
        "calls",
        "faster, but biased: within the error on this network",
    ]
    return _markdown(columns, rows) + _provenance(table)


def _fastest(rows: pd.DataFrame) -> pd.Series | None:
    return rows.loc[rows["seconds"].idxmin()] if len(rows) else None


def _entrant(row: pd.Series) -> str:
    backend = " in JAX" if row.get("backend") == "jax" else ""
    if row["kind"] != "stochastic":
        return f"`{row['method']}`{backend}, {row['kind']}, {_seconds(row['seconds'])}"
    passes = counted(row["passes"], "pass", "passes")
    if not pd.isna(row.get("passes_low")):
        passes += f" ({row['passes_low']:.0f} to {'?' if pd.isna(row['passes_high']) else round(row['passes_high'])})"
    return f"`{row['method']}`{backend}, {passes}, {counted(row['seeds'], 'seed')}, {_seconds(row['seconds'])}"


def products(tables: Tables) -> str:
    """The comparisons of ``side_by_side`` of blocks of products and of metrics of recurrent networks."""
    table = _side_by_side(tables, kernels=False)
    rows = [
        [f"`{row['problem']}`", row["subject"], row["rival"], *_seconds_of_both(row), *_times(row)]
        for _, row in table.iterrows()
    ]
    columns = ["problem", "ours", "against", "seconds, ours", "seconds, theirs", *RATIO]
    return _markdown(columns, rows) + _goals(table, PRODUCT_GOALS) + _provenance(table)


def kernels(tables: Tables) -> str:
    """The comparisons of ``side_by_side`` of whole kernels."""
    table = _side_by_side(tables, kernels=True)
    rows = [
        [
            f"`{row['problem']}`" + NAMED.get(row["subject"], ""),
            TITLES.get(row["rival"], row["rival"]) + _timed_share(row),
            *_seconds_of_both(row),
            *_times(row),
            "" if pd.isna(row["memory_ratio"]) else f"{row['memory_ratio']:.2g}",
        ]
        for _, row in table.iterrows()
    ]
    columns = ["problem", "against", "ours", "theirs", *RATIO, "memory, ours / theirs, one call each"]
    return _markdown(columns, rows) + _goals(table, KERNEL_GOALS) + _provenance(table)


class Goal(NamedTuple):
    """A ratio that comparisons of ``side_by_side`` should not exceed.

    Attributes:
        says: what is compared.
        most: the largest ratio.
        subject, rival, problem: patterns of the compared rows.
        column: the ratio, of seconds or of memory.
    """

    says: str
    most: float
    subject: str
    rival: str
    problem: str = ".*"
    column: str = "ratio"


PRODUCT_GOALS = (
    Goal("64 products against their bare matrix products", 1.2, "64 [JV]+Ps", "bare matrix products"),
    Goal("64 JVPs with a tangent for each trial against shared ones", 1.5, "64 JVPs, a tangent.*", "64 JVPs"),
    Goal("alignment of the GRU against torch.func", 0.4, "alignment by 50 probes", ".* by torch.func", "gru.*"),
)
KERNEL_GOALS = (
    Goal("kernel of n = 5,120 against its bare matrix products", 1.2, "structured_derivatives", "bare matrix products"),
    Goal(
        "Theta of ResNet-18, N = 32, against neural-tangents",
        1.0,
        "structured_derivatives",
        "nt_.*",
        r"resnet18\[N=32\]",
    ),
    Goal(
        "its memory against neural-tangents",
        1 / 3,
        "structured_derivatives",
        "nt_.*",
        r"resnet18\[N=32\]",
        "memory_ratio",
    ),
    Goal("trace by the wide head against a backward pass for each output", 0.1, "wide_head", "naive_jacobian"),
    Goal("pNTK by layers against gradients", 1.0, "structured_sum_of_logits", "sum_of_logits"),
)
"""Goals below the tables of products and of kernels."""


def _goals(table: pd.DataFrame, goals: Sequence[Goal]) -> str:
    """For each goal the problems that reach it and those that miss it, with their ratios."""
    lines = []
    for goal in goals:
        is_meant = pd.Series(True, index=table.index)
        for column, pattern in (("subject", goal.subject), ("rival", goal.rival), ("problem", goal.problem)):
            is_meant &= table[column].str.fullmatch(pattern)
        rows = table[is_meant]
        known = rows[rows[goal.column].notna()]
        reached = known[goal.column] <= goal.most
        said = [
            f"{word} {', '.join(_ratio_of(row, goal) for _, row in known[of].iterrows())}"
            for word, of in (("reached:", reached), ("missed:", ~reached))
            if of.any()
        ]
        lines.append(f"- {goal.says}, at most {goal.most:.2g}: {'; '.join(said) or 'not measured yet'}")
    return "\n\nGoals (ratio, ours / theirs):\n\n" + "\n".join(lines)


def _ratio_of(row: pd.Series, goal: Goal) -> str:
    kind = f" ({row['subject']})" if "[" in goal.subject else ""
    rounded = f"{row[goal.column]:.2g}"
    if (float(rounded) <= goal.most) != (row[goal.column] <= goal.most):  # the verdict is that of all digits
        rounded = f"{row[goal.column]:.3g}"
    return f"`{row['problem']}`{kind} {rounded}"


def _timed_share(row: pd.Series) -> str:
    """A note on a rival whose seconds are scaled up from a share of its passes."""
    share = row.get("share", 1.0)
    return f", scaled up from {100 * share:.3g} % of them" if share < 1 else ""


def certificates(tables: Tables) -> str:
    """The cost of certificates, as a share of an estimate and in plain passes."""
    table = tables.read(HEAD_TO_HEAD["certificate_cost"])
    rows = []
    for _, row in table.iterrows():
        asked = [f"`{row['problem']}`", f"`{row['method']}`, {row['metric']}"]
        if row["status"] != "ok":
            rows.append([*asked, _cell(str(row["reason"])), *[""] * 5])
            continue
        share, *ends = (100 * row[f"share{end}"] for end in ("", "_q25", "_q75"))
        rows.append(
            [
                *asked,
                f"{row['passes_spent']:g}",
                _seconds(row["seconds"]),
                _seconds(row["pass_seconds"]),
                f"{share:.2g} % ({ends[0]:.2g} to {ends[1]:.2g})",
                _ratio(row, "cost_in_passes"),
                f"{row['calls']:g}",
            ]
        )
    columns = ["problem", "estimate", "its passes", "its time", "a plain pass", "certificate", "in plain passes"]
    columns.append("calls")
    return _markdown(columns, rows) + _provenance(table)


def calibration(tables: Tables) -> str:
    """For each method the verdicts of its cases of ``calibration``, their coverage, and errors / stated errors.

    Below the table is the cost of stopping at a tolerance. The figure counts and compares by the same functions.
    """
    table = tables.read(CALIBRATION)
    cases = coverage.cases(table)
    counts = coverage.counts(cases)
    rows = []
    for method in sorted(counts.index, key=lambda method: method != AUTO):
        here = cases[cases["method"] == method]
        rows.append(
            [
                f"`{method}`",
                str(len(here)),
                *map(str, counts.loc[method]),
                coverage.share_of_intervals(here),
                _range(100 * here["covered"], ".3g"),
                _median_and_range(here["ratio"], ".2g"),
            ]
        )
    columns = ["method", "cases", *counts, "coverage of all intervals (95 %)", "coverage of cases, %"]
    columns.append("error / stated: median (range)")
    below = "".join(f"\n\n{said}" for said in (coverage.of_auto(cases), coverage.stopping(table)) if said)
    return _markdown(columns, rows) + f"{below}\n\n*{_listed(cases['seeds'].unique())} seeds; {_provenance(table)[3:]}"


def _range(values: pd.Series, how: str) -> str:
    known = values.dropna()
    return f"{known.min():{how}} to {known.max():{how}}" if len(known) else ""


def _median_and_range(values: pd.Series, how: str) -> str:
    known = values.dropna()
    return f"{known.median():{how}} ({known.min():{how}} to {known.max():{how}})" if len(known) else ""


def choices(tables: Tables) -> str:
    """For each problem of ``auto_choice``: how often ``auto`` is about as fast as the fastest, and the worst task.

    A task counts only if ``auto`` reaches the tolerance; without a rival, that suffices.
    """
    table = tables.read(AUTO_CHOICE)
    tasks = _tasks(table)
    rows = []
    for problem, here in [*tasks.groupby("problem", sort=False), ("all", tasks)]:
        rows.append(
            [
                "all" if problem == "all" else f"`{problem}`",
                str(len(here)),
                str(here["within"].sum()),
                str(here["method"].isna().sum()),
                str((~here["reached"]).sum()),
                *_worst(here[here["ratio"].notna()]),
            ]
        )
    counts = ["tasks", f"within {CLOSE:g} times the fastest", "without a rival", "tolerance not reached"]
    return _markdown(["problem", *counts, "median ratio", "largest ratio", "its task"], rows) + _provenance(table)


def _tasks(table: pd.DataFrame) -> pd.DataFrame:
    """All tasks of ``auto_choice``: the choice of ``auto``, and the fastest rival if there is one.

    ``reached`` is whether the interval of ``auto`` is within the tolerance, and ``within`` whether ``auto`` is also
    about as fast as the rival.
    """
    task = ["problem", "metric", "rtol"]
    auto = table.loc[table["method"] == AUTO, [*task, "status", "by", "seconds", "relative_width"]]
    rival = ["method", "seconds", "calls", "ratio", "ratio_q25", "ratio_q75"]
    rivals = table.loc[table["fastest"].eq(True), [*task, *rival]]
    tried = table.loc[table["status"] != "skipped", task].drop_duplicates()  # not alignments of untrained networks
    tasks = tried.merge(auto.rename(columns={"seconds": "auto_seconds"}), on=task, how="left")
    tasks = tasks.merge(rivals, on=task, how="left")
    tasks["reached"] = (tasks["status"] == "ok") & (tasks["relative_width"] <= tasks["rtol"])
    tasks["within"] = tasks["reached"] & ~(tasks["ratio"] > CLOSE)
    return tasks


def _worst(compared: pd.DataFrame) -> list[str]:
    """The median ratio of tasks with a rival, the largest one, and its task."""
    if not len(compared):
        return ["", "", ""]
    worst = compared.loc[compared["ratio"].idxmax()]
    return [
        f"{compared['ratio'].median():.2g}",
        _ratio(worst),
        f"{worst['metric'].replace('_', ' ')}, {percent_label(worst['rtol'])}: `{worst['by']}` in "
        f"{_seconds(worst['auto_seconds'])}, `{worst['method']}` in {_seconds(worst['seconds'])}",
    ]


def claims(tables: Tables) -> str:
    """Numbers of claims of each source by verdict."""
    table = tables.read("claims")
    counts = table.groupby([table["source"].str.split(",").str[0], "verdict"], sort=False).size().unstack(fill_value=0)
    rows = [
        [source, *(str(row.get(verdict, 0)) for verdict in VERDICTS), str(row.sum())]
        for source, row in counts.iterrows()
    ]
    rows.append(["all", *(str((table["verdict"] == verdict).sum()) for verdict in VERDICTS), str(len(table))])
    return _markdown(["source", *VERDICTS, "claims"], rows)


def prepared(tables: Tables) -> str:
    """Seconds of first, later and prepared calls, and their ratios to the alternatives that a user would write."""
    table = tables.read(HEAD_TO_HEAD["prepared_kernel"])
    ways = ("engine", "prepared", "later", "first", "textbook", "hooks")
    ratios = ("prepared_over_engine", "first_over_textbook", "later_over_textbook")
    rows = []
    for _, row in table.iterrows():
        if row["status"] != "ok":
            rows.append([f"`{row['problem']}`", _cell(str(row["reason"])), *[""] * (len(ways) + len(ratios))])
            continue
        rows.append(
            [
                f"`{row['problem']}`",
                *("" if pd.isna(row[f"{way}_seconds"]) else _seconds(row[f"{way}_seconds"]) for way in ways),
                *(_ratio(row, ratio, bold=True) for ratio in ratios),
                f"{row['calls']:g}",
            ]
        )
    named = ["prepared / engine", "first / textbook", "later / textbook", "calls"]
    return _markdown(["problem", *ways, *named], rows) + _provenance(table)


def _side_by_side(tables: Tables, *, kernels: bool) -> pd.DataFrame:
    """The rows that compare whole kernels, whose subject is the name of a method; or the others."""
    table = tables.read(HEAD_TO_HEAD["side_by_side"])
    return table[table["subject"].str.fullmatch(r"\w+") == kernels]


RATIO = ("time, ours / theirs", "calls")


def _times(row: pd.Series) -> tuple[str, str]:
    """The ratio of seconds with its quartiles, and the number of calls."""
    return _ratio(row, bold=True), "" if pd.isna(row["ratio"]) else f"{row['calls']:g}"


def large_networks(tables: Tables) -> str:
    """Large cases on a GPU: seconds, and their ratios to those at the device's peak rate and to those of a rival.

    A case that was not measured has the reason instead of its seconds.
    """
    table = tables.read("gpu/large")
    rows = []
    for _, row in table.iterrows():
        known = row["status"] == "ok"
        limit = f"{row['times_limit']:.2g}" if row["times_limit"] > 0 else "not counted"
        rows.append(
            [
                _cell(str(row["case"])),
                {"float32": "float32", "tf32": "TF32"}[row["dtype"]],
                _seconds(row["seconds"]) if known else _cell(str(row["reason"])),
                limit if known else "",
                _against(row),
                "" if pd.isna(row["error"]) else f"{row['error']:.1g}",
                f"{row['calls']:g}" if known else "",
            ]
        )
    columns = ["case", "products in", "time", "time / operations at the peak rate"]
    columns += ["time, ours / theirs", "error", "calls"]
    commits = ", ".join(sha[:10] for sha in table["git_sha"].unique())
    return _markdown(columns, rows) + f"\n\n*{', '.join(table['device_name'].unique())}; commit {commits}.*"


def _against(row: pd.Series) -> str:
    """The rival of a large case with the ratio of times, or with the reason why there is none; empty if it has none."""
    if pd.isna(row["rival"]):
        return ""
    said = _cell(str(row["rival_reason"])) if pd.isna(row["ratio"]) else f"**{row['ratio']:.2g}**"
    return f"{TITLES.get(row['rival'], row['rival'])}: {said}"


def predictions(tables: Tables) -> str:
    """Predicted over measured seconds and memory of the rows of ``cost_model``, by the kind of the method.

    The figure computes the same numbers.
    """
    table = tables.read(COST_MODEL)
    points, (in_full, slow) = predicted.ratios(table), predicted.left_out(table)
    lost = int(points["seconds"].isna().sum())
    rows = [
        [
            kind,
            f"{len(here)}",
            *_accuracy(here["seconds_ratio"]),
            *_accuracy(here["memory_ratio"].dropna()),
        ]
        for kind, here in [*points.groupby("kind", sort=True), ("all", points)]
    ]
    near = f"within a factor of {predicted.FACTOR:g}"
    columns = ["kind", "rows", f"seconds: {near}", "median error", f"memory: {near}", "median error"]
    said = f"\n\nRows left out: {in_full} predicted by running on all samples, and {slow} predicted to take too long."
    if lost:
        said += f" Rows that ended without seconds count as missed: {lost}."
    return _markdown(columns, rows) + said + _provenance(table)


def _accuracy(ratios: pd.Series) -> tuple[str, str]:
    """The share of ratios within the factor, and their median error; missing ones count as missed."""
    if not len(ratios):
        return "", ""
    off = predicted.median_factor(ratios) - 1
    return percent_label(predicted.within(ratios)), "" if math.isnan(off) else percent_label(off)


def real_size(tables: Tables) -> str:
    """First calls of ``auto`` on networks of real size: what they take, and the interval that they give."""
    table = tables.read(REAL_SIZE)
    rows = []
    for _, row in table.iterrows():
        asked = [f"`{row['problem']}`", f"{row['metric'].replace('_', ' ')}, {percent_label(row['rtol'])}"]
        if row["status"] != "ok":
            rows.append([*asked, _cell(str(row["reason"])), *[""] * 7])
            continue
        rows.append(
            [
                *asked,
                f"`{row['by']}`",
                *("" if pd.isna(row[size]) else f"{row[size]:,.0f}" for size in ("n", "P", "passes_spent")),
                _with_interval(row),
                seconds_label(row["seconds"]),
                _memory_of(row),
                _goal_of(row),
            ]
        )
    columns = ["problem", "metric, tolerance", "method", "n", "P", "passes", "value (95 % interval)", "time"]
    return _markdown([*columns, "memory, of `memory=` and weights", "goal"], rows) + _provenance(table)


def _with_interval(row: pd.Series) -> str:
    """A value with its 95 % interval, if that is known."""
    ends = "" if pd.isna(row["low"]) or pd.isna(row["high"]) else f" ({row['low']:.4g} to {row['high']:.4g})"
    return f"{row['value']:.4g}{ends}"


def _memory_of(row: pd.Series) -> str:
    """The peak memory, if it was measured, of the bytes that are allowed and those of the weights."""
    peak = "not measured," if pd.isna(row["memory_bytes"]) else bytes_label(row["memory_bytes"])
    return f"{peak} of {bytes_label(row['allowed_bytes'] + row['weights_bytes'])}"


def _goal_of(row: pd.Series) -> str:
    """The limits of a case's goal, and whether it is reached; empty without a goal."""
    if pd.isna(row["goal_met"]):
        return ""
    limits = f"{seconds_label(row['most_seconds'])}, {bytes_label(row['most_bytes'])}"
    return f"{limits}: {'reached' if row['goal_met'] else 'missed'}"


def kernels_in_files(tables: Tables) -> str:
    """Kernels written to files, killed and resumed: their sizes, and what both processes take."""
    table = tables.read(KERNEL_IN_FILE)
    rows = []
    for _, row in table.iterrows():
        if row["status"] != "ok":
            rows.append([f"`{row['problem']}`", _cell(str(row["reason"])), *[""] * 5])
            continue
        rows.append(
            [
                f"`{row['problem']}`",
                f"{row['n']:,.0f}",
                bytes_label(row["file_bytes"]),
                f"{row['kept']:g} of {row['parts']:g}",
                seconds_label(row["seconds"]),
                _memory_of(row),
                f"{row['difference']:.1g}",
            ]
        )
    columns = ["problem", "n", "file", "parts kept at the kill", "time", "memory, of `memory=` and weights"]
    return _markdown([*columns, "difference from memory"], rows) + _provenance(table)


def distillation(tables: Tables) -> str:
    """Quantities of students by weight of the regulariser, with differences from no regulariser and verdicts."""
    table = tables.read(DISTILLATION)
    rows = []
    for _, row in table.iterrows():
        if row["status"] != "ok":
            rows.append([f"{row['weight']:g}", _cell(str(row["reason"])), *[""] * 4])
            continue
        difference = f"{row['difference']:+.2g} ({row['difference_low']:+.2g} to {row['difference_high']:+.2g})"
        is_reference = row["verdict"] == "reference"
        rows.append(
            [
                f"{row['weight']:g}",
                row["quantity"],
                f"{row['value']:.3g} ({row['low']:.3g} to {row['high']:.3g})",
                "" if is_reference else difference,
                row["verdict"],
                f"{row['seeds']:g}",
            ]
        )
    columns = ["weight", "quantity", "mean (95 %)", "difference from weight 0 (95 %)", "verdict", "students"]
    return _markdown(columns, rows) + _provenance(table)


def language_training(tables: Tables) -> str:
    """Metrics of a transformer's NTK, of its parts and of its factors, at the last step that was measured."""
    table = tables.read(LANGUAGE_TRAINING)
    found = table[table["status"] == "ok"]
    if not len(found):
        return f"*Not measured: {_cell(str(table['reason'].iloc[0]))}.*"
    last = found[found["step"] == found["step"].max()]
    rows = []
    for part, metrics in last.groupby("part", sort=False):
        of = metrics.set_index("metric")
        aligned = of.loc["alignment"]
        exact = part == "K"
        rows.append(
            [
                {"P": "P P*"}.get(str(part), str(part)),
                f"{aligned['parameters']:,.0f}",
                f"{aligned['value']:.2g}" + ("" if exact else f" ({aligned['low']:.2g} to {aligned['high']:.2g})"),
                *(
                    f"{row['ratio']:.2g}" + ("" if exact else f" ± {1.96 * row['ratio_standard_error']:.1g}")
                    for _, row in of.loc[["effective_rank", "trace", "norm"]].iterrows()
                ),
            ]
        )
    columns = ["part", "parameters", "alignment with step 0 (95 %)"]
    columns += [f"{metric}, as a multiple of step 0" for metric in ("effective rank", "trace", "norm")]
    one = last.iloc[0]
    said = f"\n\n`{one['problem']}` after {one['step']:g} steps, at a loss of {one['loss']:.3g} nats per token."
    return _markdown(columns, rows) + said + _provenance(table)


def _seconds_of_both(row: pd.Series) -> tuple[str, str]:
    """Our seconds and theirs; if they were not measured, the reason instead of theirs."""
    if pd.isna(row["ratio"]):
        return "", _cell(re.sub(r"^\w+: ", "", str(row["reason"])))
    return _seconds(row["seconds"]), _seconds(row["rival_seconds"])


def _seconds(value: float) -> str:
    return f"{1e3 * value:.3g} ms" if value < 1 else f"{value:.3g} s"


def _ratio(row: pd.Series, name: str = "ratio", *, bold: bool = False, ends: Sequence[str] = ("q25", "q75")) -> str:
    """A ratio, rounded, with the ends of its spread: by default its quartiles."""
    if pd.isna(row[name]):
        return ""
    value = f"**{row[name]:.2g}**" if bold else f"{row[name]:.2g}"
    low, high = (row.get(f"{name}_{end}", math.nan) for end in ends)
    if (pd.isna(low) and pd.isna(high)) or row["calls"] < 2:
        return value
    return f"{value} ({' to '.join('?' if pd.isna(end) else f'{end:.2g}' for end in (low, high))})"


def _mostly(rows: pd.DataFrame) -> str:
    """The most frequent reason of rows, escaped for a cell; empty if they have none."""
    reasons = rows["reason"].dropna()
    return _cell(str(reasons.mode().iloc[0])) if len(reasons) else ""


def _cell(text: str) -> str:
    """Text escaped for a cell of a Markdown table."""
    return " ".join(text.split()).replace("|", r"\|")


def _markdown(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    head = [f"| {' | '.join(columns)} |", f"|{'---|' * len(columns)}"]
    return "\n".join([*head, *(f"| {' | '.join(row)} |" for row in rows)])


def _provenance(table: pd.DataFrame) -> str:
    """A line below a table with machine, threads and commit of its numbers; of several commits, the rows of each."""
    commits = table.groupby(["git_sha", "git_dirty"], sort=False).size()
    code = ", ".join(
        f"{sha[:10]}{' with uncommitted changes' if dirty else ''}{f' ({rows} rows)' if len(commits) > 1 else ''}"
        for (sha, dirty), rows in commits.items()
    )
    threads = table["threads"].unique()
    said = [*map(str, table["machine"].unique()), f"{_listed(threads)} thread{'' if list(threads) == [1] else 's'}"]
    return f"\n\n*{', '.join(said)}; commit {code}.*"


def _measured(table: pd.DataFrame) -> str:
    """The number of cells with a value, of all cells."""
    return f"{(table['status'] == 'ok').sum()} of {len(table)}"


def _reproduced(table: pd.DataFrame) -> str:
    """The number of reproduced values among the published numbers that were measured."""
    numbers = table.loc[(table["relation"] == "about") & (table["verdict"] != "not addressed"), "verdict"]
    return f"{(numbers == 'reproduced').sum()} of {len(numbers)}"


def _listed(values: Iterable[object]) -> str:
    return " or ".join(f"{value:g}" for value in values)


def projections(tables: Tables) -> str:
    """Errors of projections, estimators and kernels with the most features or passes, biases, seconds and bytes."""
    table = tables.read(PROJECTIONS)
    rows = []
    for (problem, _), here in table.groupby(["problem", "method"], sort=False):
        good = here[here["status"] == "ok"]
        row = (good if len(good) else here).sort_values(["k", "passes"], kind="stable").iloc[-1]
        size = f"k = {row['k']:g}" if row["k"] > 0 else f"{row['passes']:g} passes" if row["passes"] > 0 else ""
        said = [f"`{problem}`", f"`{row['method']}`", _cell(str(row["kernel"])), size]
        if not len(good):
            rows.append([*said, _cell(str(row["reason"])), *[""] * 8])
            continue
        norms = [_with_ends(row, f"{name}_{how}") for name in ("norm", "alignment") for how in ("unbiased", "plug_in")]
        biases = [_share(row[f"{name}_bias"]) for name in ("trace", "norm", "effective_rank")]
        held = "" if pd.isna(row["bytes"]) else bytes_label(row["bytes"])
        errors = [_with_ends(row, name) for name in ("gram_error", "pntk_error")]
        each = [" / ".join(filter(None, norms[i : i + 2])) for i in (0, 2)]
        rows.append([*said, *errors, *each, *biases, _seconds(row["seconds"]), held])
    columns = ["problem", "method", "kernel", "size", "Gram matrix", "pNTK", "norm", "alignment"]
    columns += ["trace, bias", "norm, bias", "effective rank, bias", "time of the norm", "bytes kept"]
    return _markdown(columns, rows) + _provenance(table)


SMALL = 1e-5
"""Errors and biases below this are shown as rounding, that of float32."""


def _share(value: float) -> str:
    if pd.isna(value):
        return ""
    return percent_label(value) if abs(value) >= SMALL else "rounding"


def _with_ends(row: pd.Series, name: str) -> str:
    """An error with the ends of its 95 % interval if it has one."""
    if pd.isna(row[f"{name}_low"]) or not abs(row[name]) >= SMALL:
        return _share(row[name])
    low, high = (percent_label(row[f"{name}_{end}"]).removesuffix(" %") for end in ("low", "high"))
    return f"{percent_label(row[name])} ({low} to {high})"


def spectra(tables: Tables) -> str:
    """Median errors of spectral quantities by each method with its most passes."""
    table = tables.read(SPECTRA)
    rows = []
    for (problem, method), here in table.groupby(["problem", "method"], sort=False):
        good = here[here["status"] == "ok"]
        if not len(good):
            reason = _cell(str(here["reason"].iloc[0]))
            rows.append([f"`{problem}`", here["title"].iloc[0], reason, *[""] * (1 + len(of_spectra.QUANTITIES))])
            continue
        most = of_spectra.at_most(good, method).set_index("quantity")
        errors = [
            f"{most['error'][name]:.2g} decades" if name == "density" else percent_label(most["error"][name])
            for name in of_spectra.QUANTITIES
            if name in most.index
        ]
        given = iter(errors)
        cells = [next(given) if name in most.index else "" for name in of_spectra.QUANTITIES]
        first = most.iloc[0]
        rows.append([f"`{problem}`", first["title"], f"{first['passes_spent']:g}", _seconds(first["seconds"]), *cells])
    named = [words for words, _ in of_spectra.QUANTITIES.values()]
    return _markdown(["problem", "method", "passes", "time", *named], rows) + _provenance(table)


def solves(tables: Tables) -> str:
    """Seconds of solutions to the smallest residual, and which of factor and products is faster with 95 % certainty."""
    table = tables.read(SOLVES)
    ok = table[table["status"] == "ok"]
    faster = of_solves.fastest(ok).set_index(["problem", "share", "rtol"])["winner"].to_dict()
    titles = table.drop_duplicates("method").set_index("method")["title"]
    last, rows = table["rtol"].min(), []
    for (problem, share), here in table[table["rtol"] == last].groupby(["problem", "share"], sort=False):
        known = ok[(ok["problem"] == problem) & (ok["share"] == share)].head(1)
        if not len(known):
            rows.append([f"`{problem}`", "", f"at most {1 + 1 / share:.2g}", _mostly(here), *[""] * len(titles)])
            continue
        by = here.drop_duplicates("method").set_index("method")
        cells = [_solution(by.loc[method]) if method in by.index else "" for method in titles.index]
        winner = faster.get((problem, share, last))
        condition, size = f"{known['condition'].iloc[0]:.2g}", f"{known['n'].iloc[0]:g}"
        rows.append(
            [f"`{problem}`", size, condition, *cells, "none reaches it" if winner is None else winner or "undecided"]
        )
    columns = ["problem", "n", "condition number", *titles, "faster, with 95 % certainty"]
    said = f"Solutions to a relative residual of {last:g}.\n\n"
    return said + _markdown(columns, rows) + _provenance(table)


def _solution(row: pd.Series) -> str:
    """The cost of a solution, or why it was not reached."""
    if row["status"] != "ok":
        return _cell(str(row["reason"]))
    if row["residual"] > of_solves.SLACK * row["rtol"]:
        return "not reached"
    return f"{_seconds(row['seconds'])}, {row['passes_spent']:g} passes"


def effective_ranks(tables: Tables) -> str:
    """Effective ranks of each kernel by weights and statistics of BatchNorm."""
    table = tables.read(EFFECTIVE_RANKS)
    rows = []
    for (problem, weights, statistics), here in table.groupby(["problem", "weights", "statistics"], sort=False):
        asked = [f"`{problem}`", weights, of_ranks.STATISTICS[statistics][2]]
        good = here[here["status"] == "ok"].set_index("kernel")
        cells = [_rank(good.loc[kernel]) if kernel in good.index else "" for kernel in of_ranks.KERNELS]
        rows.append([*asked, *(cells if len(good) else [_mostly(here), *[""] * (len(cells) - 1)])])
    columns = ["problem", "weights", "statistics of BatchNorm", *of_ranks.KERNELS.values()]
    return _markdown(columns, rows) + _provenance(table)


def _rank(row: pd.Series) -> str:
    """An effective rank; of several kernels the median and the range."""
    ends = f" ({row['effective_rank_low']:.3g} to {row['effective_rank_high']:.3g})" if row["kernels"] > 1 else ""
    return f"{row['effective_rank']:.3g}{ends}"


CALIBRATION = "calibration/studies/calibration"
AUTO_CHOICE = "head_to_head/studies/auto_choice"
COST_MODEL = "cost_model/studies/cost_model"
DISTILLATION, KERNEL_IN_FILE, LANGUAGE_TRAINING, REAL_SIZE, OF_TRANSFORMER = (
    f"language/studies/{name}"
    for name in ("distillation", "kernel_in_file", "language_training", "real_size", "time_to_error")
)
PROJECTIONS = "projections/studies/projections"
EFFECTIVE_RANKS, SOLVES, SPECTRA = (f"spectra/studies/{name}" for name in ("effective_ranks", "solves", "spectra"))
"""Where the tables of studies are in ``results/reference/``."""
PENDING = {
    "distillation": "language",
    "effective ranks": "spectra",
    "fastest estimators on a transformer": "language",
    "kernels in files": "language",
    "language training": "language",
    "predictions": "cost_model",
    "projections": "projections",
    "real size": "language",
    "solves": "spectra",
    "spectra": "spectra",
}
"""Blocks of pages whose tables may still be missing, and the configurations that write them."""
HEAD_TO_HEAD = {
    name: f"head_to_head/studies/{name}"
    for name in ("certificate_cost", "prepared_kernel", "side_by_side", "time_to_error")
}
"""Where the tables of interleaved comparisons are in ``results/reference/``."""

TABLES: dict[str, Callable[[Tables], str]] = {
    "calibration": calibration,
    "certificates": certificates,
    "choices": choices,
    "claims": claims,
    "distillation": distillation,
    "effective ranks": effective_ranks,
    "fastest estimators": fastest_estimators,
    "fastest estimators on a transformer": lambda tables: fastest_estimators(tables, OF_TRANSFORMER),
    "kernels": kernels,
    "kernels in files": kernels_in_files,
    "language training": language_training,
    "large networks": large_networks,
    "predictions": predictions,
    "prepared": prepared,
    "products": products,
    "projections": projections,
    "real size": real_size,
    "solves": solves,
    "spectra": spectra,
}
VALUES: dict[str, Callable[[Tables], str]] = {
    "claims reproduced": lambda tables: _reproduced(tables.read("claims")),
    "default commit": lambda tables: ", ".join(tables.read("default/table")["git_sha"].str[:10].unique()),
    "default cells": lambda tables: _measured(tables.read("default/table")),
    "default machine": lambda tables: ", ".join(tables.read("default/table")["machine"].unique()),
    "head-to-head machine": lambda tables: ", ".join(tables.read(HEAD_TO_HEAD["time_to_error"])["machine"].unique()),
    "default threads": lambda tables: _listed(tables.read("default/table")["threads"].unique()),
}
