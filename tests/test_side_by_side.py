"""Two computations in turn: rows report what was measured, or the reason why nothing was."""

from __future__ import annotations

import multiprocessing
import os
import signal

import pandas as pd
import pytest
import torch
from pydantic import ValidationError
from torch.utils.flop_counter import FlopCounterMode

from ntkbench import problems, studies
from ntkbench.errors import NtkbenchError
from ntkbench.measure import timing
from ntkbench.operators import linearise
from ntkbench.options import Target
from ntkbench.studies import side_by_side
from ntkbench.studies.base.bare_products import bare_products
from ntkbench.studies.base.computations import COMPUTATIONS
from ntkbench.studies.side_by_side import BARE

SMALL = "fc_relu[N=3,O=2,width=8,depth=2]"
RNN = "gru_hazelden[N=2,T=10]"


def run(*comparisons: dict, **changes: object) -> pd.DataFrame:
    given = {"threads": 1, "device": "cpu", "calls": 4, "comparisons": list(comparisons)}
    return studies.run("side_by_side", studies.settings("side_by_side", given | changes))


@pytest.fixture(scope="module")
def table() -> pd.DataFrame:
    measured = side_by_side._peak_memory

    def peak_memory(settings, name, *given):
        """Memory of methods alone: no test looks at that of the products."""
        return 6 if name in COMPUTATIONS else measured(settings, name, *given)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(side_by_side, "_peak_memory", peak_memory)
        made = run(
            {"problem": SMALL, "rivals": ["jacobian_contraction", BARE], "calls": 7},
            {"problem": RNN, "rivals": ["nt_structured_derivatives"]},
            {"problem": "mlp_hazelden[N=2]", "rivals": [BARE], "subject": "64 VJPs"},
        )
    return made.set_index(["subject", "rival"])


@pytest.mark.slow
def test_a_row_has_ratio_memory_and_agreement(table):
    row = table.loc["structured_derivatives", "jacobian_contraction"]
    assert (row["N"], row["O"], row["n"], row["status"], row["reason"]) == (3, 2, 6, "ok", "")
    assert (row["calls"], row["seeds"]) == (7, 1)
    for name in ("seconds", "rival_seconds", "ratio"):
        assert 0 < row[f"{name}_q25"] <= row[name] <= row[f"{name}_q75"]
    assert row["memory_bytes"] >= 0 and row["rival_memory_bytes"] >= 0
    assert row["difference"] < 1e-5
    bare = table.loc["structured_derivatives", BARE]
    assert pd.isna(bare["difference"]) and pd.isna(bare["rival_memory_bytes"]) and bare["ratio"] > 0
    assert bare["memory_bytes"] == row["memory_bytes"], "the subject's memory is measured once"


def test_a_share_of_the_rows_is_scaled_up_and_has_no_difference(monkeypatch):
    seen = []
    in_turn = timing.in_turn
    monkeypatch.setattr(timing, "in_turn", lambda calls, rounds: seen.append(in_turn(calls, rounds)) or seen[-1])
    monkeypatch.setattr(side_by_side, "_peak_memory", lambda *_: 6)
    case = {"problem": SMALL, "rivals": ["naive_jacobian"], "metric": "trace", "share": 0.3}
    (row,) = run(case).to_dict("records")
    assert (row["status"], row["share"]) == ("ok", 2 / 6), row["reason"]
    _, third = seen[0]
    assert row["rival_seconds"] == pytest.approx(3 * pd.Series(third).median())
    assert pd.isna(row["difference"]) and pd.isna(row["rival_memory_bytes"]) and row["memory_bytes"] == 6
    settings = studies.settings("side_by_side", {"threads": 1, "device": "cpu"})
    whole = side_by_side._call(settings, "naive_jacobian", SMALL, "trace")()
    (every, all_rows), (some, two_rows) = (side_by_side._some_rows(settings, SMALL, share) for share in (1.0, 0.3))
    assert (every, some) == (1, 2 / 6)
    assert all_rows() == pytest.approx(whole, rel=1e-6) and 0 < two_rows() < whole
    with pytest.raises(ValidationError, match="only timed for naive_jacobian"):
        run(case | {"metric": "norm"})


def test_a_tangent_for_each_trial_gives_the_products_of_each_trial():
    problem, target = problems.load(RNN), Target("torch", "float64", "cpu")
    found = COMPUTATIONS["64 JVPs, a tangent for each trial"](problem, target)()
    j = linearise(problem, "theta_0", target)
    w = j.rng(0).sign(64 * j.N, j.P)[-1:]
    assert found == pytest.approx(float(j.jvp(w)[0, -1]))


@pytest.mark.slow
def test_blocks_of_products_are_compared_with_their_matrix_products(table):
    row = table.loc["64 VJPs", BARE]
    assert (row["status"], row["metric"], row["calls"]) == ("ok", "", 4)
    assert row["ratio"] > 0.5


@pytest.mark.slow
def test_a_rival_that_cannot_run_has_a_reason(table):
    row = table.loc["structured_derivatives", "nt_structured_derivatives"]
    assert row["status"] == "skipped" and "unrolls lax.scan" in row["reason"]
    assert pd.isna(row["ratio"]) and pd.isna(row["calls"])


def test_a_subject_that_cannot_run_is_a_reason_for_each_rival_and_is_tried_once(monkeypatch):
    tried = []

    def call(settings, name, label, metric):
        tried.append(name)
        raise RuntimeError("no such device")

    monkeypatch.setattr(side_by_side, "_call", call)
    table = run({"problem": SMALL, "rivals": ["jacobian_contraction", BARE]})
    assert table["reason"].tolist() == ["RuntimeError: no such device"] * 2
    assert tried == ["structured_derivatives"]


def test_ratios_are_of_neighbouring_calls(monkeypatch):
    """Subject and rival slow down together, so that every ratio is one half."""
    times = [[1.0, 10.0, 100.0, 1000.0], [2.0, 20.0, 200.0, 2000.0]]
    monkeypatch.setattr(timing, "in_turn", lambda calls, rounds: times)
    monkeypatch.setattr(side_by_side, "_peak_memory", lambda *_: 6)
    (row,) = run({"problem": SMALL, "rivals": ["jacobian_contraction"]}).to_dict("records")
    assert (row["ratio_q25"], row["ratio"], row["ratio_q75"]) == (0.5, 0.5, 0.5)
    assert row["memory_ratio"] == 1


@pytest.mark.parametrize(
    ("limits", "says"), [({"memory_mb": 50}, "over the limit of 0.0488 GiB"), ({"time_s": 0.2}, "limit of 0.2 s")]
)
def test_the_process_that_measures_memory_keeps_the_limits(limits, says):
    settings = studies.settings("side_by_side", {"threads": 1, "device": "cpu", "limits": limits})
    with pytest.raises(NtkbenchError, match=f"^memory of structured_derivatives: .*{says}"):
        side_by_side._peak_memory(settings, "structured_derivatives", SMALL, "norm")


@pytest.mark.parametrize("name", ["structured_derivatives", "64 VJPs"])
def test_memory_is_that_of_a_later_call(monkeypatch, name):
    """Rivals compile in their first call, and ntkbench before it."""
    done = []
    monkeypatch.setattr(side_by_side.watchdog, "end_with_parent", lambda: None)
    monkeypatch.setattr(timing, "use_threads", lambda threads: None)
    monkeypatch.setattr(timing, "settle_memory", lambda: done.append("settle"))
    monkeypatch.setattr(side_by_side, "_call", lambda *_: lambda: done.append("call"))
    monkeypatch.setattr(side_by_side.operators, "reset_device_memory", lambda target: done.append("reset"))
    settings = studies.settings("side_by_side", {"threads": 1, "device": "cpu"})
    here, there = multiprocessing.Pipe(duplex=False)
    side_by_side._send_peak_memory(there, settings, name, SMALL, "norm")
    assert done == ["call", "settle", "reset", "call"] and here.recv() is None


def test_memory_on_a_gpu_is_not_compared_if_it_is_not_that_of_a_later_call(monkeypatch):
    """JAX cannot reset its peak, which includes the first call."""
    monkeypatch.setattr(side_by_side, "_peak_memory", lambda _, name, *__: None if name.startswith("nt_") else 6)
    monkeypatch.setattr(side_by_side, "_call", lambda *_, **__: lambda: 1.0)
    (row,) = run({"problem": SMALL, "rivals": ["nt_jacobian_contraction"]}).to_dict("records")
    assert row["status"] == "ok" and row["memory_bytes"] == 6
    assert pd.isna(row["rival_memory_bytes"]) and pd.isna(row["memory_ratio"])
    # The process with the rival, whose first call raised the peak to what it is.
    monkeypatch.setattr(side_by_side.watchdog, "end_with_parent", lambda: None)
    monkeypatch.setattr(timing, "use_threads", lambda threads: None)
    monkeypatch.setattr(side_by_side.operators, "device_memory", lambda target: 100)
    monkeypatch.setattr(side_by_side.operators, "reset_device_memory", lambda target: None)
    here, there = multiprocessing.Pipe(duplex=False)
    settings = studies.settings("side_by_side", {"threads": 1, "device": "cpu"})
    side_by_side._send_peak_memory(there, settings, "nt_jacobian_contraction", SMALL, "norm")
    assert here.recv() is None


def kill_itself(there, *_):
    os.kill(os.getpid(), signal.SIGKILL)


def fail(there, *_):
    there.send(("failed", "ValueError: no"))


@pytest.mark.parametrize(("does", "says"), [(kill_itself, "SIGKILL"), (fail, "ValueError: no")])
def test_a_process_that_measures_memory_and_dies_is_a_reason(monkeypatch, does, says):
    """The process is forked, so that it imports nothing before it dies."""
    fork = multiprocessing.get_context("fork")
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: fork)
    monkeypatch.setattr(side_by_side, "_send_peak_memory", does)
    (row,) = run({"problem": SMALL, "rivals": ["jacobian_contraction"]}).to_dict("records")
    assert row["status"] == "failed"
    assert row["reason"].startswith("NtkbenchError: memory of structured_derivatives: ") and says in row["reason"]


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


def test_every_default_comparison_is_valid_in_a_configuration():
    given = [comparison.model_dump() for comparison in side_by_side.COMPARISONS]
    assert studies.settings("side_by_side", {"comparisons": given}).comparisons == side_by_side.COMPARISONS


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"problem": "fc"}, "unknown problem 'fc'"),
        ({"problem": SMALL, "rivals": ["jacobian_contractoin"]}, "did you mean 'jacobian_contraction'"),
        ({"problem": SMALL, "rivals": ["64 JVPs"]}, "methods are compared with methods"),
        ({"problem": SMALL, "subject": BARE}, "methods are compared with methods"),
        ({"problem": SMALL, "rivals": []}, "at least 1"),
        ({"problem": SMALL, "rounds": 3}, "rounds"),
    ],
)
def test_impossible_comparisons_are_refused(wrong, says):
    with pytest.raises(ValidationError, match=says):
        run(wrong)
