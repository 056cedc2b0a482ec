"""The README and the page of measurements have the numbers of the committed tables."""

from __future__ import annotations

import importlib
import re
import shutil

import pandas as pd
import pytest

from ntkbench import figures, readme
from ntkbench.errors import BadInput
from ntkbench.paths import ROOT

README = ROOT / "README.md"


def test_the_pages_have_the_numbers_of_the_committed_tables():
    assert readme.update(ROOT, check=True) == [], "out of date; `ntkbench readme` updates these blocks"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the pages and of the tables behind them."""
    (tmp_path / "docs").mkdir()
    for page in readme.PAGES:
        shutil.copy(ROOT / page, tmp_path / page)
    for table in (ROOT / "results" / "reference").rglob("*.csv"):
        there = tmp_path / table.relative_to(ROOT)
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(table, there)
    return tmp_path


def test_a_table_that_is_not_committed_yet_is_named_in_its_place(checkout):
    shutil.rmtree(checkout / "results" / "reference" / "projections", ignore_errors=True)
    readme.update(checkout)
    assert "*Not measured yet: `config/projections.yaml` writes this table.*" in text_of(checkout)
    assert readme.update(checkout, check=True) == []


def text_of(checkout):
    return "\n".join((checkout / page).read_text(encoding="utf-8") for page in readme.PAGES)


def change(checkout, name, edit):
    path = checkout / "results" / "reference" / f"{name}.csv"
    edit(pd.read_csv(path)).to_csv(path, index=False)


def test_a_changed_number_is_noticed_and_then_written(checkout):
    change(checkout, readme.HEAD_TO_HEAD["side_by_side"], lambda t: t.assign(rival_seconds=12.345))
    change(checkout, "default/table", lambda t: t.iloc[:17].assign(status=["skipped", *["ok"] * 16]))
    before = text_of(checkout)
    assert readme.update(checkout, check=True) == ["default cells", "kernels", "products"]
    assert text_of(checkout) == before, "a check wrote"
    assert readme.update(checkout) == ["default cells", "kernels", "products"]
    after = text_of(checkout)
    assert after.count("12.3 s") >= 30 and "-->16 of 17<!-- end --> cells" in after
    assert readme.update(checkout) == []
    blocks = re.compile(r"<!-- (?:table|value).*?<!-- end -->", re.DOTALL)
    assert blocks.split(after) == blocks.split(before), "text outside of the blocks was changed"


def test_the_fastest_of_either_kind_is_named(checkout):
    numbers = {
        ("mlp_he", "gram_forward"): {"passes": 660, "seconds": 0.5, "ratio": 0.25, "published": False},
        ("mlp_he", "nystrom_loo"): {"passes": 30, "seconds": 0.6, "ratio": 0.3, "published": False},
        ("mlp_he", "hutchpp_paper"): {"passes": 411, "seconds": 2.0, "ratio": 1.0, "published": True},
        ("mlp_he", "sum_of_logits"): {"seconds": 0.4, "ratio": 0.2, "published": False, "kind": "approximate"},
        ("digits_mlp", "sample_subset"): {"passes": 1, "seconds": 0.00542, "published": False},
        ("digits_mlp", "sum_of_logits"): {"seconds": 0.1, "published": False, "kind": "approximate"},
        ("gru_hazelden", "direct"): {"seconds": 0.3, "ratio": 3.0, "published": False, "kind": "exact"},
        ("gru_hazelden", "hutchpp"): {"seconds": 0.1, "ratio": 1.0, "published": True, "backend": "jax"},
    }
    for row in numbers.values():
        row.update({"seeds": 51, "calls": 15})
    numbers["gru_hazelden", "direct"] |= {"ratio_low": 2.5, "ratio_high": float("nan")}
    numbers["gru_hazelden", "hutchpp"] |= {"passes": 40, "passes_low": 31.7, "passes_high": 52.1}

    def edit(table):
        table[["seconds", "ratio_low", "ratio_high", "passes_low", "passes_high"]] = float("nan")
        table["backend"] = "torch"
        for (problem, method), row in numbers.items():
            first = table.index[(table["problem"] == problem) & (table["method"] == method)][0]
            table.loc[first, list(row)] = list(row.values())
        return table

    change(checkout, readme.HEAD_TO_HEAD["time_to_error"], edit)
    readme.update(checkout)
    text = text_of(checkout)
    ours, theirs = (
        "`gram_forward`, 660 passes, 51 seeds, 500 ms (or tied)",
        "`hutchpp_paper`, 411 passes, 51 seeds, 2 s",
    )
    assert f"| {ours} | {theirs} | **0.25** | 15 | `sum_of_logits`, approximate, 400 ms |" in text
    assert "| `sample_subset`, 1 pass, 51 seeds, 5.42 ms | none reaches it |  | 15 |  |" in text
    theirs = "`hutchpp` in JAX, 40 passes (32 to 52), 51 seeds, 100 ms"
    assert f"| `direct`, exact, 300 ms | {theirs} | **3** (2.5 to ?) | 15 |  |" in text, "theirs may be the faster one"


def test_a_row_without_numbers_has_its_reason_in_one_cell(checkout):
    reason = "OverMemory: would need\n40 GiB | or so"

    def edit(table):
        table.loc[table["subject"] == "structured_derivatives", ["seconds", "rival_seconds", "ratio"]] = float("nan")
        return table.assign(reason=reason)

    change(checkout, readme.HEAD_TO_HEAD["side_by_side"], edit)
    readme.update(checkout)
    rows = [line for line in text_of(checkout).splitlines() if "40 GiB" in line]
    assert len(rows) > 10 and all(re.split(r"(?<!\\)\|", row)[4] == r" would need 40 GiB \| or so " for row in rows)


MEASURED = {"status": "ok", "machine": "M", "threads": 2, "git_sha": "a" * 40, "git_dirty": False}


def block_of(folder, block, name, rows):
    """A block of a page from one table."""
    path = folder / f"{name}.csv"
    path.parent.mkdir(parents=True)
    pd.DataFrame([MEASURED | row for row in rows]).to_csv(path, index=False)
    return readme.TABLES[block](readme.Tables(folder)).splitlines()


def test_the_coverage_of_each_method_is_counted(tmp_path):
    case = {"problem": "p", "metric": "trace", "way": "passes", "seeds": 300, "rmse": 0.1, "passes_spent": 40}
    case["exact"] = 0.0
    hutchinson, auto = case | {"method": "hutchinson"}, case | {"method": "auto"}
    rows = [
        hutchinson | {"verdict": "in range", "covered": 0.951, "ratio": 1.0},
        hutchinson | {"verdict": "in range", "covered": 0.93, "ratio": 1.234},
        hutchinson | {"verdict": "noted", "covered": 0.8, "ratio": 2.0},
        hutchinson | {"verdict": "exact", "exact": 1.0},
        auto | {"verdict": "below", "covered": 0.5, "ratio": 3.0, "way": "rtol"},
        auto | {"verdict": "above", "covered": 0.9, "ratio": 9.0, "way": "matched", "rmse": 0.05, "git_sha": "b" * 40},
        {"method": "never", "status": "skipped"},
    ]
    lines = block_of(tmp_path, "calibration", readme.CALIBRATION, rows)
    assert lines[2:5] == [
        "| `auto` | 1 | 0 | 0 | 1 | 0 | 0 | 50.0 % (44.4 to 55.6) | 50 to 50 | 3 (3 to 3) |",
        "| `hutchinson` | 4 | 2 | 1 | 0 | 0 | 1 | 89.3 % (87.1 to 91.2) | 80 to 95.1 | 1.2 (1 to 2) |",
        "",
    ]
    assert "50.0 % (44.4 to 55.6) with rtol=; by network" in lines[5]
    assert lines[7].startswith("Stopping at a tolerance takes 4.00 times") and "against 90.0 %" in lines[7]
    assert lines[8:] == ["", "*300 seeds; M, 2 threads; commit aaaaaaaaaa (6 rows), bbbbbbbbbb (1 rows).*"]


def test_calls_on_networks_of_real_size_state_their_cost(tmp_path):
    asked = {"problem": "gpt2", "metric": "effective_rank", "rtol": 0.05}
    sizes = {"n": 6_432_896, "P": 124_439_808, "passes_spent": 20.0, "allowed_bytes": 2**31, "weights_bytes": 2**29}
    found = {"value": 1.23456e10, "low": 1.2e10, "high": 1.3e10, "seconds": 91.0, "memory_bytes": 2**31, "by": "some"}
    goal = {"most_seconds": 600, "most_bytes": 2**33, "goal_met": True}
    rows = [asked | sizes | found | goal, asked | {"status": "failed", "reason": "a | b"}]
    rows += [asked | sizes | found, asked | sizes | found | goal | {"goal_met": False}]
    lines = block_of(tmp_path, "real size", readme.REAL_SIZE, rows)
    assert lines[2] == (
        "| `gpt2` | effective rank, 5 % | `some` | 6,432,896 | 124,439,808 | 20 | 1.235e+10 (1.2e+10 to 1.3e+10) "
        "| 1.5 min | 2 GiB of 2.5 GiB | 10 min, 8 GiB: reached |"
    )
    assert lines[3] == r"| `gpt2` | effective rank, 5 % | a \| b |  |  |  |  |  |  |  |"
    assert lines[4].endswith("2.5 GiB |  |") and lines[5].endswith("| 10 min, 8 GiB: missed |")
    unknown = dict.fromkeys(("passes_spent", "low", "high", "memory_bytes"))
    lines = block_of(tmp_path / "unknown", "real size", readme.REAL_SIZE, [asked | sizes | found | goal | unknown])
    assert "| 124,439,808 |  | 1.235e+10 | 1.5 min | not measured, of 2.5 GiB |" in lines[2]


def test_goals_of_ratios_name_the_cases_that_reach_and_miss_them(tmp_path):
    case = {"metric": "", "seconds": 1.0, "rival_seconds": 1.0, "calls": 1}
    rows = [
        case | {"problem": "a", "subject": "64 VJPs", "rival": "bare matrix products", "ratio": 1.2},
        case | {"problem": "b", "subject": "64 JVPs", "rival": "bare matrix products", "ratio": 1.34},
        case | {"problem": "b", "subject": "64 JVPs", "rival": "64 JVPs by torch.func", "ratio": 9.0},
        case | {"problem": "rnn", "subject": "alignment by 50 probes", "rival": "x by torch.func", "ratio": 0.1},
    ]
    lines = block_of(tmp_path, "products", readme.HEAD_TO_HEAD["side_by_side"], rows)
    assert lines[7:12] == [
        "Goals (ratio, ours / theirs):",
        "",
        "- 64 products against their bare matrix products, at most 1.2: reached: `a` (64 VJPs) 1.2; missed: "
        "`b` (64 JVPs) 1.3",
        "- 64 JVPs with a tangent for each trial against shared ones, at most 1.5: not measured yet",
        "- alignment of the GRU against torch.func, at most 0.4: not measured yet",
    ]


def test_seconds_scaled_up_from_a_share_are_labelled(tmp_path):
    row = {"problem": "a", "metric": "trace", "subject": "wide_head", "rival": "naive_jacobian", "share": 262 / 2**17}
    row |= {"seconds": 1.0, "rival_seconds": 100.0, "ratio": 0.01, "memory_ratio": None, "calls": 3}
    lines = block_of(tmp_path, "kernels", readme.HEAD_TO_HEAD["side_by_side"], [row])
    assert "| a backward pass for each output, scaled up from 0.2 % of them |" in lines[2]


def test_only_some_tables_may_be_missing(tmp_path):
    tables = readme.Tables(tmp_path)
    page = "<!-- table: {} -->\n*Not measured yet: `config/{}.yaml` writes this table.*\n<!-- end -->"
    for name, config in readme.PENDING.items():
        assert readme.written(page.format(name, config), tables) == (page.format(name, config), [])
    with pytest.raises(BadInput, match="the pages need the table"):
        readme.written(page.format("products", "head_to_head"), tables)


def test_kernels_in_files_state_their_cost(tmp_path):
    found = {"problem": "fc", "n": 50_000, "file_bytes": 10 * 2**30, "parts": 20, "kept": 7, "seconds": 90.0}
    found |= {"memory_bytes": 2**30, "allowed_bytes": 2**30, "weights_bytes": 0, "difference": 2e-7}
    rows = [found, {"problem": "fc", "status": "failed", "reason": "full"}]
    lines = block_of(tmp_path, "kernels in files", readme.KERNEL_IN_FILE, rows)
    assert lines[2] == "| `fc` | 50,000 | 10 GiB | 7 of 20 | 1.5 min | 1 GiB of 1 GiB | 2e-07 |"
    assert lines[3] == "| `fc` | full |  |  |  |  |  |"


def test_distillation_has_a_difference_and_a_verdict_for_each_weight(tmp_path):
    row = {"quantity": "loss", "value": 0.5, "low": 0.4, "high": 0.6, "seeds": 6, "difference": 0, "weight": 0}
    row |= {"difference_low": 0, "difference_high": 0, "verdict": "reference"}
    other = {"weight": 1, "difference": -0.1, "difference_low": -0.15, "difference_high": -0.05, "verdict": "better"}
    lines = block_of(tmp_path, "distillation", readme.DISTILLATION, [row, row | other])
    assert lines[2] == "| 0 | loss | 0.5 (0.4 to 0.6) |  | reference | 6 |"
    assert lines[3] == "| 1 | loss | 0.5 (0.4 to 0.6) | -0.1 (-0.15 to -0.05) | better | 6 |"


def test_training_of_a_language_model_is_shown_at_its_last_step(tmp_path):
    row = {"problem": "small", "loss": 2.1, "parameters": 1234, "low": 0.2, "high": 0.3, "value": 0.25}
    rows = [
        row | {"part": part, "metric": metric, "step": step, "ratio": ratio, "ratio_standard_error": 0.1}
        for part in ("all parameters", "P")
        for step, ratio in ((0, 1.0), (1500, 2.0))
        for metric in ("alignment", "effective_rank", "trace", "norm")
    ]
    lines = block_of(tmp_path, "language training", readme.LANGUAGE_TRAINING, rows)
    assert lines[2] == "| all parameters | 1,234 | 0.25 (0.2 to 0.3) | 2 ± 0.2 | 2 ± 0.2 | 2 ± 0.2 |"
    assert lines[3].startswith("| P P* |") and "`small` after 1500 steps, at a loss of 2.1 nats per token." in lines


def test_predicted_costs_are_beside_measured_ones(tmp_path):
    """Rows whose method ran on all samples are left out, and counted like those that were predicted too slow."""
    rows = [
        {"kind": kind, "predicted_seconds": 0.1 * ratio, "seconds": 0.1, "predicted_bytes": 4e6, "memory_bytes": held}
        | {"samples": samples, "N": 64}
        for kind, ratio, held, samples in (
            ("exact", 1.25, 4e6, None),
            ("exact", 0.8, 1e7, 32),
            ("exact", 1.0, 4e6, 64),
            ("stochastic", 4.0, None, None),
        )
    ]
    rows += [{"kind": "exact", "status": "skipped", "reason": "is predicted to take 12 s, over 2 times patience_s (5)"}]
    lines = block_of(tmp_path / "all", "predictions", readme.COST_MODEL, rows)
    assert lines[2:5] == [
        "| exact | 2 | 100 % | 25 % | 50 % | 58 % |",
        "| stochastic | 1 | 0 % | 300 % |  |  |",
        "| all | 3 | 67 % | 25 % | 50 % | 58 % |",
    ]
    assert lines[6] == "Rows left out: 1 predicted by running on all samples, and 1 predicted to take too long."
    late = {"kind": "approximate", "predicted_seconds": 0.1, "N": 64, "status": "timeout", "reason": "took 60 s"}
    lines = block_of(tmp_path / "late", "predictions", readme.COST_MODEL, [*rows, late])
    assert lines[2] == "| approximate | 1 | 0 % |  |  |  |" and lines[5].startswith("| all | 4 | 50 % | 25 % |")
    assert lines[7].endswith("predicted to take too long. Rows that ended without seconds count as missed: 1.")


REASON = {"status": "skipped", "reason": "too | large"}


def test_the_cost_of_certificates_has_its_range_and_rows_without_it_their_reason(tmp_path):
    case = {"problem": "p", "method": "hutchpp", "metric": "trace"}
    found = {"passes_spent": 64, "seconds": 0.1, "pass_seconds": 0.01, "share": 0.135, "share_q25": -0.15, "calls": 9}
    found |= {"share_q75": 0.4, "cost_in_passes": 2.0, "cost_in_passes_q25": -1.0, "cost_in_passes_q75": 3.0}
    lines = block_of(tmp_path, "certificates", readme.HEAD_TO_HEAD["certificate_cost"], [case | found, case | REASON])
    cells = "64 | 100 ms | 10 ms | 14 % (-15 to 40) | 2 (-1 to 3) | 9 |"
    assert lines[2] == f"| `p` | `hutchpp`, trace | {cells}"
    assert lines[3] == r"| `p` | `hutchpp`, trace | too \| large |  |  |  |  |  |"


def test_a_prepared_case_that_was_not_measured_has_its_reason(tmp_path):
    ways = ("engine", "prepared", "later", "first", "textbook", "hooks")
    found = {f"{way}_seconds": 0.1 for way in ways} | {"calls": 3, "problem": "p"}
    found |= dict.fromkeys(("prepared_over_engine", "first_over_textbook", "later_over_textbook"), 2.0)
    lines = block_of(tmp_path, "prepared", readme.HEAD_TO_HEAD["prepared_kernel"], [found, {"problem": "q"} | REASON])
    assert lines[2].startswith("| `p` | 100 ms |") and lines[3].startswith(r"| `q` | too \| large |  |")
    assert lines[2].count("|") == lines[3].count("|") - 1 == lines[0].count("|"), "one is in the reason"


def test_effective_ranks_that_were_not_measured_have_their_reason(tmp_path):
    case = {"problem": "p", "weights": "initial", "statistics": "stored"}
    found = {"effective_rank": 3.0, "effective_rank_low": 2.0, "effective_rank_high": 4.0, "kernels": 2}
    rows = [case | found | {"kernel": "theta", "kernels": 1}, case | found | {"kernel": "single_logit"}]
    rows += [case | {"weights": "trained", "kernel": kernel} | REASON for kernel in ("theta", "trace")]
    lines = block_of(tmp_path, "effective ranks", readme.EFFECTIVE_RANKS, rows)
    assert lines[2:4] == [
        "| `p` | initial | of training | 3 |  |  | 3 (2 to 4) |",
        r"| `p` | trained | of training | too \| large |  |  |  |",
    ]


def test_a_goal_that_nothing_reaches_has_the_most_frequent_reason(tmp_path):
    goal = {"problem": "p", "metric": "trace", "goal": 0.01, "kind": "stochastic", "published": False, "seconds": None}
    lost = [goal | REASON | {"method": name, "reference_error": None, "calls": None} for name in ("a", "b")]
    lost += [lost[0] | {"method": "c", "reason": "other"}]
    lines = block_of(tmp_path, "fastest estimators", readme.HEAD_TO_HEAD["time_to_error"], lost)
    assert lines[2] == r"| `p` | trace, 1 % | none reaches it: too \| large |  |  |  |  |"


def test_the_time_of_auto_is_beside_that_of_the_fastest_method(tmp_path):
    """Including tasks in which it does not reach the tolerance, or which have no rival."""
    small, large = ({"problem": p, "metric": "effective_rank", "rtol": 0.1, "calls": 9} for p in ("small", "large"))
    auto = {"method": "auto", "by": "direct", "relative_width": 0.1}
    worst = {"seconds": 0.1, "ratio": 4.0, "ratio_q25": 3.0, "ratio_q75": 5.0, "fastest": True}
    rows = [
        {**small, **auto, "seconds": 0.1},
        {**small, "method": "direct", "by": "direct", "seconds": 0.1, "ratio": 1.0, "fastest": True},
        {**small, "method": "hutchpp", "by": "hutchpp", "seconds": 0.2, "ratio": 0.5, "fastest": False},
        {**large, **auto, "seconds": 0.4},
        {**large, "method": "hutchpp", "by": "hutchpp", **worst},
        {**large, **auto, "metric": "norm", "seconds": 0.4},
        {**large, "metric": "norm", "method": "hutchpp", "status": "skipped"},
        {**large, **auto, "rtol": 0.01, "seconds": 0.4},
        {**small, **auto, "metric": "trace", "relative_width": 0.2, "seconds": 0.1},
        {**small, "metric": "trace", "method": "direct", "seconds": 0.1, "ratio": 1.0, "fastest": True},
        {**small, **auto, "metric": "norm", "status": "failed", "relative_width": 0.0},
        {**small, **auto, "metric": "alignment", "status": "skipped"},
        {**small, "metric": "alignment", "method": "direct", "status": "skipped"},
        {**small, "problem": "alone", **auto, "seconds": 0.4},
    ]
    lines = block_of(tmp_path, "choices", readme.AUTO_CHOICE, rows)
    said = "4 (3 to 5) | effective rank, 10 %: `direct` in 400 ms, `hutchpp` in 100 ms |"
    assert lines[2:6] == [
        "| `small` | 3 | 1 | 1 | 2 | 1 | 1 | effective rank, 10 %: `direct` in 100 ms, `direct` in 100 ms |",
        f"| `large` | 3 | 1 | 2 | 1 | 4 | {said}",
        "| `alone` | 1 | 1 | 1 | 0 |  |  |  |",
        f"| all | 7 | 3 | 4 | 3 | 1 | {said}",
    ]


def test_a_large_case_that_was_not_measured_has_its_reason(tmp_path):
    case = {"dtype": "float32", "device_name": "D", "rival": "nt_jacobian_contraction", "calls": 3}
    measured = case | {"case": "a", "seconds": 0.5, "times_limit": 2.0, "error": 0.001, "ratio": 0.5}
    late = {"status": "timeout", "reason": "cut | off", "rival_reason": "cut | off", "calls": None}
    rows = [
        measured,
        measured | {"ratio": None, "rival_reason": "too large"},
        case | {"case": "b"} | late,
        case | {"case": "c", "rival": None} | late,
    ]
    lines = block_of(tmp_path, "large networks", "gpu/large", rows)
    assert lines[2:6] == [
        "| a | float32 | 500 ms | 2 | neural-tangents, Jacobian contraction: **0.5** | 0.001 | 3 |",
        "| a | float32 | 500 ms | 2 | neural-tangents, Jacobian contraction: too large | 0.001 | 3 |",
        r"| b | float32 | cut \| off |  | neural-tangents, Jacobian contraction: cut \| off |  |  |",
        r"| c | float32 | cut \| off |  |  |  |  |",
    ]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: kernles --><!-- end -->", "unknown table of a page 'kernles' .did you mean 'kernels'"),
        ("<!-- value: kernels --><!-- end -->", "unknown value of a page 'kernels'"),
        ("<!-- table: kernels -->", "no <!-- end -->"),
        ("<!-- table: kernels --> <!-- value: default cells --><!-- end -->", "no <!-- end -->"),
    ],
)
def test_a_block_that_cannot_be_written_is_refused(checkout, text, said):
    change(checkout, "default/table", lambda t: t.iloc[:17])  # so that the README would be written
    before = (checkout / "README.md").read_text(encoding="utf-8")
    file = checkout / "docs" / "measured.md"
    file.write_text(text)
    with pytest.raises(BadInput, match=said):
        readme.update(checkout)
    assert file.read_text() == text and (checkout / "README.md").read_text(encoding="utf-8") == before


def test_a_missing_table_is_named(checkout):
    (checkout / "results" / "reference" / "default" / "table.csv").unlink()
    with pytest.raises(BadInput, match=r"default.table\.csv"):
        readme.update(checkout)


def test_values_do_not_begin_a_line():
    """Markdown takes a line that begins with a comment for HTML, which ends the paragraph."""
    assert not re.search("^<!-- value", README.read_text(encoding="utf-8"), re.MULTILINE)


@pytest.mark.parametrize("page", [*readme.PAGES, "docs/study.md"])
def test_what_a_page_names_exists(page):
    text = (ROOT / page).read_text(encoding="utf-8")
    for name in set(re.findall(r"ntkbench\.([\w.]+)\(", text)):
        *modules, attribute = name.split(".")
        assert hasattr(importlib.import_module(".".join(["ntkbench", *modules])), attribute), name
    files = re.findall(r"`((?:src|config|profiles|benchmarks|scripts|results/reference)/[\w./]+)`", text)
    assert files and all((ROOT / file).exists() for file in files)


def test_the_page_of_the_study_names_every_figure_and_configuration():
    text = (ROOT / "docs" / "study.md").read_text(encoding="utf-8")
    assert set(figures.names()) <= set(re.findall(r"`(\w+)`", text))
    named = set(re.findall(r"`config/(\w+\.yaml)`", text))
    assert named == {path.name for path in (ROOT / "config").glob("*.yaml")}
