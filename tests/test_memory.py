"""Peak memory of stochastic methods, against the memory that they are given."""

from __future__ import annotations

import functools
import tracemalloc
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.profiler import ProfilerActivity, profile

import ntkbench
from ntkbench import methods, testing
from ntkbench.errors import OverMemory
from ntkbench.methods.base import Stochastic
from ntkbench.metrics import words
from ntkbench.operators import memory as host
from ntkbench.options import Target
from ntkbench.problem import Problem

STOCHASTIC = [method for name in methods.names() if isinstance(method := methods.get(name), Stochastic)]
SIZES = {"many samples": (256, 3, 4, 2), "one output": (256, 3, 4, 1), "many parameters": (6, 300, 40, 2)}
SLOW = ("block_u_statistics", "group_u_statistics")
"""Methods that form many small tables of pairs of many samples."""
TIMES = 3
"""Programs, vectors and tables may each take all of the memory."""
SLACK = 2**18


def peak_bytes(run: Callable[[], Any]) -> int:
    """Sum of the peaks of torch's and of NumPy's bytes during a run."""
    tracemalloc.start()
    try:
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
            before, _ = tracemalloc.get_traced_memory()
            tracemalloc.reset_peak()
            run()
            numpy = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    events = profiled.profiler.kineto_results.events()
    changes = sorted((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]")
    held = most = 0
    for _, change in changes:
        held += change
        most = max(most, held)
    return most + numpy


def test_the_peak_is_that_of_the_bytes_held():
    def run() -> None:
        held = [torch.ones(1000, 1000)]
        held.append(held[0] * 2)
        del held[0]
        held.append(torch.zeros(500, 1000).numpy().copy())

    assert 10e6 <= peak_bytes(run) <= 10.2e6


def served(method: Stochastic, size: str) -> Problem:
    target, shape = Target(method.backends[0], "float32", "cpu"), SIZES[size]
    few = (testing.smooth_problem(size, *shape), testing.smooth_problem(f"{size}, head", *shape[:2], 2, 8))
    return next((each for each in few if method.unsupported_reason(each, method.given[0], target) is None), few[0])


def cases() -> list[Any]:
    return [
        pytest.param(
            method,
            size,
            id=f"{method.name}-{size}",
            marks=pytest.mark.slow if method.name in SLOW and size != "many parameters" else (),
        )
        for method in STOCHASTIC
        for size in SIZES
    ]


@pytest.mark.parametrize(("method", "size"), cases())
def test_methods_stay_within_their_memory(method, size):
    """Unless they need more, which they announce or report.

    In the two smallest memories in which they run; the slowest methods with many samples only in the smallest one.
    """
    problem, done = served(method, size), 0
    most = 1 if method.name in SLOW and size == "many samples" else 2
    for metric in sorted({"norm", "alignment"} & set(method.metrics)) or method.given:
        measured = 0
        for memory in (2**18, 2**20, 2**22):
            if measured == most:
                break
            target = Target(method.backends[0], "float32", "cpu", memory)
            passes = max(64, 2 * method.least_passes(problem, metric))
            if method.unsupported_reason(problem, metric, target, passes) is not None:
                continue
            if method.bytes_needed(problem, metric, target, passes) > memory:
                done += 1
                continue
            ready = method.prepare(problem, target)
            try:
                method.estimate(ready, metric, passes)  # traced and certified
                peak = peak_bytes(functools.partial(method.estimate, ready, metric, passes))
            except OverMemory:
                continue
            assert peak <= TIMES * memory + SLACK, (metric, memory, peak)
            measured += 1
            done += 1
    if not done:
        pytest.skip("does not apply")


def net(outputs: int = 2, inputs: int = 3) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return nn.Linear(inputs, outputs)


@pytest.mark.parametrize("name", ["gram_reverse", "one_sided_orthonormal", "one_sided_paper_forward"])
def test_vectors_that_do_not_fit_are_refused_before_any_work(name):
    """The requested method cannot do without them."""
    model, x = net(inputs=1000), torch.randn(300, 1000)
    metric = methods.get(name).metrics[-1] if name != "gram_reverse" else "norm"
    with pytest.raises(
        OverMemory, match=rf"{name} needs .*B at once for the {words(metric)}, and memory= is 9.8 KiB: raise memory"
    ):
        getattr(ntkbench, metric)(model, x, method=name, memory=10_000, passes=64)


def test_many_samples_are_left_to_a_method_with_chunks_of_tables():
    """Tables of all pairs of two probes would take 40 MB."""
    x = torch.randn(500, 3)
    found = ntkbench.norm(net(20), x, memory=2**22, passes=8)
    exact = ntkbench.norm(net(20), x, dtype="float64", method="parameter_gram")
    assert found.method == "block_u_statistics"
    assert any(note.startswith("passed over structured_block_u_statistics: ") for note in found.notes)
    assert float(found) == pytest.approx(float(exact), rel=0.05)


@pytest.mark.parametrize("share", [1.1, 1.5, 1.9, 4.0])
@pytest.mark.parametrize("method", ["auto", "batched_jacobian"])
def test_recomputed_rows_count_before_they_are_spent(method, share):
    """J fits in the memory, but not in half of it: a budget is kept or refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 12), nn.BatchNorm1d(12), nn.Tanh(), nn.Linear(12, 4))
    model, x = model.double().train(), torch.randn(20, 6, dtype=torch.float64)
    n, P = 80, sum(w.numel() for w in model.parameters())
    budget = {"passes": 80} if method == "auto" else {}
    try:
        found = ntkbench.norm(model, x, method=method, memory=int(share * n * P * 8), **budget)
    except ntkbench.BadInput:
        return
    if method == "auto":
        assert found.passes <= 80
    elif share == 4.0:
        assert found.passes == n
    else:
        problem = ntkbench.from_module(model, x, dtype="float64")
        target = Target("torch", "float64", "cpu", int(share * n * P * 8))
        chosen = methods.get(method)
        assert found.passes <= chosen.planned_passes(chosen.prepare(problem, target), "norm") and found.passes > n


class AcrossTheBatch(nn.Module):
    """Attention between all samples, with a weight for each pair of them."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x):
        h = torch.tanh(self.layer(x))
        return torch.softmax(h @ h.T, dim=-1) @ h


def test_what_autograd_saves_of_interacting_samples_grows_quadratically():
    from ntkbench.operators import linearise
    from ntkbench.operators.torch import saved_bytes

    model, x = AcrossTheBatch(), torch.randn(300, 4)
    problem = ntkbench.from_module(model, x)
    j = linearise(problem, "theta_0", Target("torch", "float32", "cpu", 2**30))
    saved = saved_bytes(lambda: model(x))
    assert saved > 300 * 300 * 4
    assert j.bytes_per_probe() >= 2 * saved


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("own", ["/job/step", "/"])
def test_the_limit_of_a_control_group_counts(version, own, tmp_path, monkeypatch):
    """A container or a job may use less memory than the machine has; cached files are freed on demand."""
    controllers, root = ("", tmp_path) if version == 2 else ("cpu,memory", tmp_path / "memory")
    (tmp_path / "of_process").write_text(f"3:{controllers}:{own}\n4:pids:/\n")
    folder = root / own.lstrip("/")
    folder.mkdir(parents=True, exist_ok=True)
    limit, used, reclaimed = host.NAMES["" if version == 2 else "memory"]
    for name, text in ((limit, "900000"), (used, "500000"), ("memory.stat", f"anon 1\n{reclaimed} 100000\n")):
        (folder / name).write_text(text)
    monkeypatch.setattr(host, "GROUPS", tmp_path)
    monkeypatch.setattr(host, "OF_PROCESS", tmp_path / "of_process")
    assert host.free_on_host() == 500_000
    (folder / limit).write_text("max" if version == 2 else str(2**63 - 1))
    assert host.free_on_host() > 500_000
    (tmp_path / "of_process").unlink()
    assert host.free_on_host() > 500_000
