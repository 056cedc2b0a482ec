"""Two methods in turn: what is reported is what was measured, and what cannot run is a row with its reason."""

import pandas as pd
import pytest
import torch
from click.testing import CliRunner
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.comparisons import side_by_side
from benchmarks.comparisons.bare_products import bare_products
from benchmarks.comparisons.computations import COMPUTATIONS
from benchmarks.comparisons.side_by_side import BARE, Comparison, measure
from ntkbench import methods, problems
from ntkbench.measure import timing
from ntkbench.options import Target


@pytest.fixture(scope="module")
def rows():
    chosen = {"jacobian_contraction": "fc_relu[N=3,O=2,width=8,depth=2]", BARE: "fc_relu[N=3,O=2,width=8,depth=2]"}
    chosen |= {"nt_structured_derivatives": "gru_hazelden[N=2,T=10]"}
    return {rival: measure(Comparison(label, (rival,)), rival, 1, 0.01) for rival, label in chosen.items()}


def test_a_row_has_ratio_memory_and_agreement(rows):
    row = rows["jacobian_contraction"]
    assert (row["N"], row["O"], row["n"], row["reason"]) == (3, 2, 6, "")
    assert row["rounds"] >= 3
    assert 0 < row["ratio_q25"] <= row["ratio"] <= row["ratio_q75"]
    assert row["seconds"] > 0 < row["rival_seconds"]
    assert row["memory_bytes"] >= 0
    assert row["difference"] < 1e-5
    assert rows[BARE]["difference"] is None
    assert rows[BARE]["ratio"] > 0


@pytest.mark.parametrize("block", ("64 VJPs", "64 JVPs"))
def test_blocks_of_products_are_held_against_their_matrix_products(block):
    row = measure(Comparison("mlp_hazelden[N=2]", (BARE,), block), BARE, 1, 0.01)
    assert (row["reason"], row["metric"]) == ("", "")
    assert row["ratio"] > 0.5


@pytest.mark.parametrize("work", ["plain", "expanded", "vmap", "in place", "convolution"])
def test_bare_products_are_all_products_and_nothing_else(work):
    """Counted by torch's own counter of floating-point operations."""
    a, b = torch.randn(3, 5), torch.randn(5, 4)
    image, kernel = torch.randn(2, 3, 8, 8), torch.randn(4, 3, 3, 3)
    computation = {
        "plain": lambda: torch.tanh(a @ b).sum() + torch.addmm(torch.ones(3, 4), a, b).sum(),
        "expanded": lambda: torch.ones(1, 5).expand(6, 5) @ b,
        "vmap": lambda: torch.func.vmap(lambda x: torch.exp(x @ b))(torch.randn(7, 2, 5)),
        "in place": lambda: torch.zeros(3, 4).addmm_(a, torch.mm(a.T, torch.mm(a, b, out=torch.empty(3, 4)))),
        "convolution": lambda: torch.relu(torch.conv2d(image, kernel)),
    }[work]
    repeat = bare_products(computation)
    flops = []
    for call in (computation, repeat):
        with FlopCounterMode(display=False) as counter:
            call()
        flops.append(counter.get_total_flops())
    assert flops[0] == flops[1] > 0


def test_a_rival_that_cannot_run_says_why(rows):
    assert "unrolls lax.scan" in rows["nt_structured_derivatives"]["reason"]
    assert "ratio" not in rows["nt_structured_derivatives"]


@pytest.mark.parametrize(
    ("subject", "rival", "difference"),
    [
        ("64 VJPs", "64 VJPs by torch.func", 1e-5),
        ("64 JVPs", "64 JVPs by torch.func", 1e-5),
        ("alignment by 50 probes", "alignment by 50 probes by torch.func", 0.2),  # other probes
    ],
)
def test_recurrent_products_by_hand_are_those_of_torch_func(subject, rival, difference):
    problem, target = problems.load("gru_hazelden[N=2,T=4]"), Target("torch", "float32", "cpu")
    ours, theirs = (COMPUTATIONS[name](problem, target)() for name in (subject, rival))
    assert ours == pytest.approx(theirs, rel=difference)


def test_every_comparison_names_methods_that_exist():
    for comparison in side_by_side.COMPARISONS:
        problems.check(comparison.problem)
        for name in (comparison.subject, *comparison.rivals):
            assert name == BARE or name in COMPUTATIONS or methods.get(name)


def test_turns_are_taken_one_by_one():
    calls = []
    times = timing.in_turn([lambda: calls.append("a"), lambda: calls.append("b")], 0.0)
    assert [len(t) for t in times] == [len(calls) // 2] * 2
    assert calls == ["a", "b"] * (len(calls) // 2)


def test_bad_input_is_named(tmp_path):
    for arguments, said in (
        (["--problem", "fc"], "unknown problem 'fc'"),
        (["--threads", "4096"], "this process may use"),
    ):
        done = CliRunner().invoke(side_by_side.main, ["--output", str(tmp_path / "t.csv"), *arguments])
        assert done.exit_code == 1
        assert said in done.output
    assert not (tmp_path / "t.csv").exists()


def test_the_table_is_written_as_it_grows(tmp_path, monkeypatch):
    row = {"problem": "p", "subject": "s", "ratio": 1.0, "memory_ratio": 1.0, "difference": 0.0, "reason": ""}
    monkeypatch.setattr(side_by_side, "measure", lambda comparison, rival, *_: row | {"rival": rival})
    monkeypatch.setattr("os.sched_setaffinity", lambda *_: None)
    done = CliRunner().invoke(side_by_side.main, ["--output", str(tmp_path / "t.csv"), "--threads", "1"])
    assert done.exit_code == 0, done.output
    assert len(pd.read_csv(tmp_path / "t.csv")) == sum(len(c.rivals) for c in side_by_side.COMPARISONS)
