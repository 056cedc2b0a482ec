"""Exact values: both sides of J, stored values that are valid, and committed ones recomputed."""

from __future__ import annotations

import errno
import json
import os
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
from conftest import metrics_of, written_out

from ntkbench import paths, problems
from ntkbench.errors import BadInput, NoExactValue, NtkbenchError, OverMemory, Unavailable
from ntkbench.metrics import METRICS
from ntkbench.problems import base
from ntkbench.problems.base import reference, storage, weights
from ntkbench.testing import smooth_problem

COMMITTED = {path.stem: json.loads(path.read_text()) for path in sorted((paths.REFERENCE / "exact").glob("*.json"))}
KNOWN = {  # to two decimals, known before any of this was written
    "mlp_hazelden": {"trace": 2314.23, "norm": 397.04, "effective_rank": 33.97},
    "gru_hazelden": {"trace": 223056.46},
}


@pytest.fixture
def own_cache(monkeypatch, tmp_path):
    """A cache and a folder of committed references of this test's own."""
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    return tmp_path


def truth(problem):
    J, J_f = written_out(problem), written_out(problem, "theta_f")
    return metrics_of(J @ J.T, J_f @ J_f.T)


@pytest.mark.parametrize("sizes", [(3, 3, 4, 2), (20, 2, 3, 4)])
def test_both_sides_of_the_jacobian_give_the_moments(sizes):
    problem = smooth_problem("net", *sizes)
    for moments in (reference.by_outputs(problem), reference.by_parameters(problem)):
        for metric, value in truth(problem).items():
            assert moments.metric(metric) == pytest.approx(value, rel=1e-11)


def test_both_sides_agree_in_many_blocks(monkeypatch):
    problem = smooth_problem("net", 20, 2, 3, 4)
    monkeypatch.setattr(reference, "MEMORY", 20_000)
    (j, _) = reference._jacobians(problem)
    assert len(reference._blocks(problem, j)[0]) > 4
    for moments in (reference.by_outputs(problem), reference.by_parameters(problem)):
        assert moments.metric("alignment") == pytest.approx(truth(problem)["alignment"], rel=1e-11)
        assert moments.metric("effective_rank") == pytest.approx(truth(problem)["effective_rank"], rel=1e-11)


@pytest.mark.parametrize(("N", "side"), [(3, "n x n"), (20, "P x P")])
def test_the_smaller_side_is_computed_and_recorded(N, side):
    problem = smooth_problem("net", N, 2, 3, 4)
    record = reference.compute(problem)
    assert record["side"] == side
    assert (record["n"], record["P"]) == (problem.n, problem.P)
    assert record["dtype"] == "float64"
    assert record["digest"] == problem.digest()
    assert set(record["metrics"]) == set(METRICS)
    assert record["metrics"] == pytest.approx(truth(problem), rel=1e-11)


@pytest.mark.parametrize("N", [3, 20])
def test_without_trained_weights_there_is_no_alignment(N):
    problem = replace(smooth_problem("net", N, 2, 3, 4), theta_f=None)
    J = written_out(problem)
    assert reference.compute(problem)["metrics"] == pytest.approx(metrics_of(J @ J.T), rel=1e-11)


@pytest.mark.parametrize("N", [3, 20])
def test_exact_values_of_interacting_samples_are_right(N):
    from torch import nn

    net = smooth_problem("net", N, 2, 3, 4)
    module = nn.Sequential(net.module[0], nn.BatchNorm1d(3, affine=False, track_running_stats=False), net.module[2])
    problem = replace(net, module=module, samples_interact=True, jax_forward=None, _shape=[])
    assert reference.compute(problem)["metrics"] == pytest.approx(truth(problem), rel=1e-10)


@pytest.mark.parametrize("folder", ["reference", "cache"])
def test_a_stored_value_with_the_same_digest_is_used(folder, own_cache, tiny, monkeypatch):
    storage.write(
        reference.file_of(tiny.name, own_cache / folder), {"metrics": {"trace": 42.0}, "digest": tiny.digest()}
    )
    monkeypatch.setattr(reference, "compute", lambda problem: pytest.fail("computed again"))
    assert reference.exact(tiny) == {"trace": 42.0}


@pytest.mark.parametrize("folder", ["reference", "cache"])
def test_a_stored_value_with_another_digest_is_recomputed(folder, own_cache, tiny):
    stored = {"metrics": {"trace": 42.0}, "digest": "0" * 16}
    path = reference.file_of(tiny.name, own_cache / folder)
    storage.write(path, stored)
    assert reference.exact(tiny) == pytest.approx(truth(tiny), rel=1e-11)
    if folder == "reference":  # committed files are written only on request
        assert storage.read(path) == stored


def test_exact_values_are_computed_once_and_cached(own_cache, tiny, monkeypatch):
    first = reference.exact(tiny)
    record = json.loads(reference.file_of(tiny.name, own_cache / "cache").read_text())
    assert record["metrics"] == first
    monkeypatch.setattr(reference, "compute", lambda problem: pytest.fail("computed again"))
    assert reference.exact(tiny) == first
    assert not list(own_cache.rglob("*.half"))


@pytest.mark.parametrize("label", COMMITTED)
def test_committed_references_match_todays_problems(label):
    record = COMMITTED[label]
    try:
        problem = problems.load(label)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert record["problem"] == problem.name == label
    assert record["digest"] == problem.digest()
    assert (record["n"], record["P"]) == (problem.n, problem.P)
    assert reference.exact(problem) == record["metrics"]
    assert record["command"] == f"ntkbench reference '{label}'"
    training = problems.define(label).training
    assert training is None or not training.kept or weights.committed_file(base.parse_label(label)[0]).exists()


CHEAP = sorted(COMMITTED, key=lambda label: COMMITTED[label]["seconds"])[:3]


@pytest.mark.parametrize("label", CHEAP)
def test_the_cheapest_committed_references_are_reproduced(label, request):
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(os.cpu_count())  # the only large products in these tests
    request.addfinalizer(lambda: torch.set_num_threads(threads))
    again = reference.compute(problems.load(label))
    assert again["metrics"] == pytest.approx(COMMITTED[label]["metrics"], rel=1e-9)


@pytest.mark.parametrize(("label", "metric"), [(label, metric) for label in KNOWN for metric in KNOWN[label]])
def test_known_values_agree_to_all_given_digits(label, metric):
    assert label in COMMITTED, f"results/reference/exact/{label}.json is not there"
    assert round(COMMITTED[label]["metrics"][metric], 2) == KNOWN[label][metric]


@pytest.mark.parametrize("label", COMMITTED)
def test_committed_values_satisfy_the_inequalities_of_a_gram_matrix(label):
    values = COMMITTED[label]["metrics"]
    rank = min(COMMITTED[label]["n"], COMMITTED[label]["P"])
    assert 1 <= values["effective_rank"] <= rank
    assert values["norm"] <= values["trace"] <= np.sqrt(rank) * values["norm"]
    assert values["effective_rank"] == pytest.approx((values["trace"] / values["norm"]) ** 2, rel=1e-12)
    assert 0 <= values["alignment"] <= 1


def test_commit_writes_weights_and_values_to_the_committed_folder(own_cache):
    (record,) = reference.commit(["digits_conv[N=2]"])
    problem = problems.load("digits_conv[N=2]")
    assert record["metrics"] == pytest.approx(truth(problem), rel=1e-11)
    assert storage.read(own_cache / "reference" / "exact" / "digits_conv[N=2].json") == record
    stored = storage.read(own_cache / "reference" / "weights" / "digits_conv.npz")
    np.testing.assert_array_equal(stored["theta_f/0.weight"], problem.theta_f["0.weight"])
    problems.load.cache_clear()


def test_values_that_cannot_be_written_are_not_computed(own_cache, monkeypatch):
    (own_cache / "reference").write_text("in the way", encoding="utf-8")
    monkeypatch.setattr(reference, "compute", lambda problem: pytest.fail("computed"))
    with pytest.raises(BadInput, match="reference cannot be written: "):
        reference.commit(["digits_conv[N=2]"])


def test_networks_with_the_same_weights_do_not_share_a_value(own_cache, tiny):
    from torch import nn

    other = replace(tiny, module=nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2)), jax_forward=None)
    assert reference.exact(tiny) == pytest.approx(truth(tiny), rel=1e-11)
    assert reference.exact(other) == pytest.approx(truth(other), rel=1e-11)
    assert reference.exact(other)["trace"] != pytest.approx(truth(tiny)["trace"], rel=1e-3)


def test_a_value_that_cannot_be_computed_is_a_one_line_error(own_cache, tiny):
    from torch import nn

    class Broken(nn.Sequential):
        def forward(self, x):
            raise RuntimeError("no such kernel\nat line 3")

    class Infinite(nn.Sequential):
        def forward(self, x):
            return super().forward(x) * float("inf")

    for module, says in (
        (Broken(*tiny.module), "exact values of tanh_net cannot be computed: RuntimeError: no such kernel"),
        (Infinite(*tiny.module), "exact values of tanh_net.*gradient is not finite"),
    ):
        problem = replace(tiny, module=module, jax_forward=None, _shape=[tiny.output_shape])
        with pytest.raises(NoExactValue, match=f"^{says}") as error:
            reference.exact(problem)
        assert "\n" not in str(error.value)
    assert not list(own_cache.rglob("*.json"))


def test_matrices_beyond_the_machines_memory_are_refused_before_they_are_made(own_cache, monkeypatch):
    problem = smooth_problem("net", 20, 2, 3, 4)
    monkeypatch.setattr(
        "psutil.virtual_memory", lambda: SimpleNamespace(total=3 * 8 * problem.P**2 - 1, available=2**40)
    )
    with pytest.raises(OverMemory, match=r"exact values of net: 3 matrices of P x P with P = 25 take .* GiB, but this"):
        reference.exact(problem)


def test_a_full_disk_is_reported_in_one_line(own_cache, tiny, monkeypatch):
    def full(*_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pathlib.Path.write_bytes", full)
    with pytest.raises(NtkbenchError, match=r"cache/exact/tanh_net\.json cannot be written: No space left on device$"):
        reference.exact(tiny)
    assert not list(own_cache.rglob("*.half"))
