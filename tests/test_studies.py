"""Studies: their values against dense kernels, their configurations, and the figures drawn from them."""

from __future__ import annotations

import functools
import math
import re
import subprocess
import sys

import matplotlib.image
import numpy as np
import pandas as pd
import pytest
import torch
import yaml
from click.testing import CliRunner

import ntkbench
from ntkbench import figures, methods, operators, paths, problems, studies
from ntkbench.cli import main
from ntkbench.data import images
from ntkbench.errors import BadInput, Unavailable
from ntkbench.figures import hazelden_trace as hazelden_trace_figure
from ntkbench.figures import mohamadi_cost as mohamadi_cost_figure
from ntkbench.figures import mohamadi_quality as mohamadi_quality_figure
from ntkbench.figures import mohamadi_training as mohamadi_training_figure
from ntkbench.figures import novak_images as novak_images_figure
from ntkbench.figures import novak_time as novak_time_figure
from ntkbench.figures.plotting import base, curves, files, report, sources
from ntkbench.measure import fingerprints
from ntkbench.measure.config import Config
from ntkbench.measure.settings import OPTIONAL
from ntkbench.measure.timing import Timed
from ntkbench.networks import classifiers, initialisation, residual
from ntkbench.options import Target
from ntkbench.problems.base import reference
from ntkbench.studies import hazelden_trace, mohamadi_cost, mohamadi_quality
from ntkbench.studies.base import descent, estimates, pntk, programs, runner

BLOCK = {"problems": ["digits_conv[N=4]"], "methods": ["direct"], "metrics": ["trace"]}
PATCHLESS = {"transformers": [], "mixers": []}
TINY = {
    "hazelden_trace": {"problems": {"mlp": "mlp_hazelden[N=2]"}, "mlp": [12, 60], "small": [6]},
    "hazelden_metrics": {"problems": ["digits_conv[N=8]"], "samples": [6]},
    "hazelden_blog": {"problem": "gru_hazelden[N=2,T=5]", "samples": [2]},
    "mohamadi_cost": {"depths": [18], "outputs": [2], "width": 2, "side": 8, "samples": 3},
    "mohamadi_quality": {
        "widths": {"fc": [16, 64, 256]},
        "inits": 2,
        "trained": 1,
        "steps": [0, 8, 60],
        "train": 10,
        "test": 4,
    },
    "mohamadi_drift": {"width": 32, "steps": 200, "looks": 3, "inits": 1, "images": 6, "rate": 0.1, "decay": 0.1},
    "novak_flops": {"widths": [16, 32], "outputs": [4], "samples": [2]},
    "novak_time": {"widths": [16, 64], "outputs": [4], "samples": 2, "limits": {"memory_mb": 0.3}},
    "novak_images": {"depths": [18], "wide_factors": [], "outputs": [2], "width": 2, "side": 32} | PATCHLESS,
}
QUICK = {"threads": 1, "seeds": 5, "calls": 2}
PROVENANCE = {"device": "cpu", "dtype": "float32", "threads": 1, "git_sha": "0123456789abcdef", "git_dirty": False}
PROVENANCE |= {"machine": "a laptop", "versions": "", "python": ""}


def config(**changes):
    return Config.check({"profile": "test", "threads": 1, "grid": [BLOCK]} | changes, "test.yaml")


def quick(name, **sizes):
    """Settings of a study on one thread; with few seeds and calls if it uses them."""
    uses = ("threads", *studies.REGISTRY.get(name).Settings.USES)
    return studies.settings(name, {key: value for key, value in QUICK.items() if key in uses} | sizes)


@pytest.fixture(scope="module")
def tables():
    """Every study at a tiny size, as the command measures it but in this process."""
    made = {}
    for name, sizes in TINY.items():
        settings = quick(name, **sizes)
        made[name] = sys.modules[f"ntkbench.studies.{name}"].run(settings).assign(**PROVENANCE)
    return made


def ok(table: pd.DataFrame) -> pd.DataFrame:
    assert set(table["status"]) == {"ok"}, table.loc[table["status"] != "ok", "reason"].unique()
    return table


# --- what is measured


@pytest.mark.slow
@pytest.mark.parametrize("name", hazelden_trace.SIDES)
def test_the_off_diagonal_share_gives_the_variance_of_a_one_sided_estimate(name):
    """The relative variance is 2 v (1 - 2 q / dim) / (m - q), as in the theory of the speed-up."""
    subject, m, q, seeds = estimates.Subject(["gru_hazelden[N=2,T=5]"]), 60, 10, 300
    problem, method = subject.problem(), methods.get(name)
    dim = {"reverse": problem.n, "forward": problem.P}[hazelden_trace.SIDES[name]]
    prepared = method.prepare(problem, Target())
    values = [method.estimate(prepared, "trace", m, seed).value for seed in range(seeds)]
    variance = np.var(np.array(values) / subject.exact()["trace"], ddof=1)
    expected = (
        2 * hazelden_trace.off_diagonal(subject, hazelden_trace.SIDES[name], Target()) * (1 - 2 * q / dim) / (m - q)
    )
    assert abs(variance / expected - 1) < 4 * (2 / seeds) ** 0.5


def test_every_study_of_a_paper_has_a_tiny_size():
    assert {name for name in studies.names() if name.split("_")[0] in ("hazelden", "mohamadi", "novak")} == set(TINY)


@pytest.mark.slow
def test_estimates_have_errors_against_exact_values_and_the_samples_of_the_script(tables):
    table = ok(tables["hazelden_trace"])
    exact = reference.exact(problems.load("mlp_hazelden[N=2]"))["trace"]
    estimates = table[table["m"].notna()]
    assert set(estimates["m"]) == {6, 12, 60}
    np.testing.assert_allclose(estimates["reference"], exact)
    one_sided = estimates[estimates["method"].str.startswith("one_sided")]
    assert (one_sided["passes"] == one_sided["m"]).all()
    assert (estimates["error_q25"] <= estimates["error"]).all() and (estimates["error"] <= estimates["error_q75"]).all()
    baselines = table[table["m"].isna()].set_index("method")
    assert set(baselines.index) == set(hazelden_trace.BASELINES)
    assert baselines.loc["structured_derivatives", "error"] < 1e-5
    assert (baselines["share"] == 1).all()


def in_blocks(monkeypatch, share, memory_mb, name="direct", metric="trace"):
    """The row of a baseline by columns on 80 outputs, as if every column took a second, and the spans that it took."""
    spans = []

    def timed(call, calls):
        call()
        return Timed(9.0, [float(sum(stop - start for start, stop in spans))] * calls, 0.0)

    def basis(self, start, stop):
        spans.append((start, stop))
        return basis_of(self, start, stop)

    problem, target = problems.load("digits_conv[N=8]"), estimates.Settings().target()
    operator = type(methods.get("direct").prepare(problem, target).jacobians("norm")[0])
    basis_of = operator.basis
    monkeypatch.setattr(operator, "basis", basis)
    monkeypatch.setattr(estimates, "timed", timed)
    monkeypatch.setattr(estimates, "_MEASURED", {})
    settings = estimates.WithBaselines(**QUICK, direct_share=share, limits={"block_mb": memory_mb})
    return estimates.baseline(settings, estimates.Subject(["digits_conv[N=8]"]), metric, name), spans


@pytest.mark.parametrize("share", [0.01, 0.4, 1.0])
def test_baselines_are_timed_on_whole_blocks_and_scaled_up_to_all_columns(monkeypatch, share):
    with monkeypatch.context() as once:
        _, spans = in_blocks(once, 1.0, 8)
    sizes = [stop - start for start, stop in spans]
    assert len(sizes) > 3 and sum(sizes) == 80, "the test needs several blocks"
    row, timed_spans = in_blocks(monkeypatch, share, 8)
    assert timed_spans == spans[: math.ceil(share * len(spans))]
    columns = timed_spans[-1][1]
    assert (row["status"], row["calls"], row["share"]) == ("ok", 2, columns / 80)
    assert row["seconds"] == row["seconds_q25"] == pytest.approx(80)


def test_a_baseline_one_by_one_takes_blocks_of_one_and_alignment_twice_the_time(monkeypatch):
    row, spans = in_blocks(monkeypatch, 0.1, 20, estimates.ONE_BY_ONE, "alignment")
    assert spans == [(i, i + 1) for i in range(8)]
    assert row["seconds"] == pytest.approx(160) and "twice" in row["notes"]


@pytest.mark.slow
def test_a_baseline_is_measured_once_for_all_metrics(tables):
    rows = tables["hazelden_metrics"].set_index(["method", "metric"])["seconds"]
    for name in ("direct", estimates.ONE_BY_ONE):
        assert rows[name, "norm"] == rows[name, "effective_rank"] == rows[name, "alignment"] / 2


@pytest.mark.slow
def test_seeds_and_calls_are_those_of_the_settings(tables):
    for name, table in tables.items():
        good = table[table["status"] == "ok"]
        timed = good["seconds"].notna() if "seconds" in table else pd.Series(False, good.index)
        stochastic = good["m"].notna() if "m" in table else pd.Series(False, good.index)
        assert set(good.loc[stochastic, "seeds"]) <= {5} and set(good.loc[~stochastic, "seeds"]) <= {1}
        assert set(good.loc[stochastic, "calls"]) <= {4}, "all seeds but the first are timed"
        assert set(good.loc[timed & ~stochastic, "calls"]) <= {2} and set(good.loc[~timed, "calls"]) <= {0}
        assert timed.any() == studies.is_timed(name)
        assert table.loc[table["status"] != "ok", ["seeds", "calls"]].isna().all(axis=None)


@pytest.mark.slow
def test_references_of_the_fourth_figure_and_budgets_of_the_blog_are_those_stated(tables):
    table = ok(tables["hazelden_metrics"])
    assert set(table["metric"]) == {"norm", "alignment", "effective_rank"}
    row = table[(table["metric"] == "norm") & table["m"].notna()].iloc[0]
    assert row["reference"] == reference.exact(problems.load("digits_conv[N=8]"))["norm"]
    blog = ok(tables["hazelden_blog"]).set_index(["metric", "method"])
    assert (
        blog.loc[("alignment", "hutchpp"), "passes"] == 9 * blog.loc[("alignment", "shared_probe_alignment"), "passes"]
    )


def test_the_blogs_shared_probes_may_go_further_than_hutchpp(monkeypatch):
    from ntkbench.studies import hazelden_blog

    asked = []
    monkeypatch.setattr(estimates, "stochastic", lambda *given: asked.append(given[2:]) or [])
    hazelden_blog.run(quick("hazelden_blog", samples=[2, 5], shared=[300]))
    assert asked == [
        ("trace", "hutchpp", [2, 5]),
        ("alignment", "shared_probe_alignment", [2, 5, 300]),
        ("alignment", "hutchpp", [2, 5]),
    ]


@pytest.mark.parametrize("family", list(classifiers.FAMILIES))
@pytest.mark.slow
def test_kernels_read_off_theta_are_those_of_the_library(family):
    network = initialisation.seeded(lambda: classifiers.network(family, 2, 3), 0)
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    full = pntk.Theta(network, x)(network)
    torch.testing.assert_close(full.reshape(9, 9), dense(network, x))
    for name, kernel in pntk.standing_in(full, pntk.features_and_outputs(network, x)[0], seed=3).items():
        if "resnet" in family and name != "sum_of_logits":
            continue  # deep networks take seconds to trace; shallow ones test the other kernels
        torch.testing.assert_close(kernel, ntkbench.ntk(network, x, kernel=name, seed=3, dtype="float64"))
        dense_difference = (torch.kron(kernel, torch.eye(3).double()) - full.reshape(9, 9)).norm() / full.norm()
        assert pntk.difference(full, kernel) == pytest.approx(float(dense_difference), rel=1e-10)
        assert pntk.difference(full, kernel) >= pntk.difference(full, full.diagonal(dim1=1, dim2=3).mean(-1)) - 1e-12


def dense(network, x):
    """Theta from a Jacobian by plain autograd."""
    network = network.double()
    rows = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(y, list(network.parameters()), retain_graph=True)])
        for y in network(x.double()).reshape(-1)
    ]
    network.float()
    return torch.stack(rows) @ torch.stack(rows).T


def test_kernel_regression_is_the_same_by_kernel_and_by_its_kronecker_product():
    rng = torch.Generator().manual_seed(0)
    root, at_0, y = (torch.randn(*s, generator=rng, dtype=torch.float64) for s in ((7, 9), (7, 2), (5, 2)))
    kernel = root @ root.T
    whole = torch.einsum("ab,op->aobp", kernel, torch.eye(2).double())
    torch.testing.assert_close(pntk.predictions(kernel, at_0, y, 5), pntk.predictions(whole, at_0, y, 5))
    expected = at_0[5:] + kernel[5:, :5] @ torch.linalg.inv(kernel[:5, :5]) @ (y - at_0[:5])
    torch.testing.assert_close(pntk.predictions(kernel, at_0, y, 5), expected, rtol=1e-4, atol=1e-4)


def test_off_diagonal_mass_of_a_known_kernel():
    block = torch.tensor([[2.0, -1.0], [-1.0, 2.0]]).double()
    full = torch.einsum("ab,op->aobp", torch.ones(3, 3).double(), block)
    assert pntk.off_diagonal_mass(full) == pytest.approx(0.5)


@pytest.mark.slow
def test_the_pntk_approaches_theta_with_width(tables):
    table = ok(tables["mohamadi_quality"]).query("step == 0")
    found = table.groupby(["kernel", "width"])["difference"].mean()
    for kernel in ("sum_of_logits", "single_logit", "random_vector", "trace"):
        assert found[kernel].is_monotonic_decreasing
    assert (found["trace"] <= found["sum_of_logits"]).all()
    value, _ = mohamadi_quality_figure.slope(table, "sum_of_logits")
    assert -0.8 < value < -0.3


def test_residual_networks_get_their_share_of_images_and_steps():
    settings = mohamadi_quality.Settings(train=5, test=4, steps=[0, 1, 2, 7], deep_share=0.5)
    sizes = {f: (s.train, s.test, s.steps) for f in ("conv", "wide_resnet") for s in [settings.of(f)]}
    assert sizes == {"conv": (5, 4, [0, 1, 2, 7]), "wide_resnet": (3, 2, [0, 1, 4])}
    small = settings.model_copy(update={"inits": 1, "trained": 0})
    table = pd.DataFrame(mohamadi_quality._rows(small.of("fc"), "fc", 8))
    assert (ok(table)["train"] == 5).all() and (table["test"] == 4).all() and (table["step"] == 0).all()


@pytest.mark.parametrize("family", ["fc", "resnet18"])
@pytest.mark.slow
def test_theta_traced_once_is_that_of_other_weights_too(family):
    first, other = (initialisation.seeded(lambda: classifiers.network(family, 2, 3), seed) for seed in (0, 1))
    x = torch.randn(3, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    theta = pntk.Theta(first, x)
    expected = dense(other, x)
    torch.testing.assert_close(theta(other).reshape(9, 9), expected)
    with torch.no_grad():
        other[-1].weight.mul_(2)
    assert (theta(other).reshape(9, 9) - expected).norm() > 0.1 * expected.norm()


@pytest.mark.slow
def test_only_the_networks_to_be_trained_are_trained(tables):
    table = ok(tables["mohamadi_quality"])
    steps = table.groupby("init")["step"].unique()
    assert (list(steps[0]), list(steps[1])) == ([0, 8, 60], [0])
    once = table[(table["kernel"] == "full") & (table["init"] == 0)].set_index(["width", "step"])["network_accuracy"]
    for width in (16, 64, 256):
        assert once[width, 60] > once[width, 0] + 0.3


@pytest.fixture
def cifar(tmp_path, monkeypatch):
    """A file instead of the part of CIFAR-10."""
    file = tmp_path / images.CIFAR10.name
    file.parent.mkdir()
    rng, arrays = np.random.default_rng(0), {}
    for part, each in images.CIFAR_SIZES.items():
        arrays[f"x_{part}"] = rng.integers(0, 256, (10 * each, 32, 32, 3), np.uint8)
        arrays[f"y_{part}"] = np.tile(np.arange(10, dtype=np.uint8), each)
    np.savez(file, **arrays)
    monkeypatch.setenv("NTKBENCH_DATA", str(tmp_path))
    return file


OF_CIFAR = {"data": "cifar10", "inits": 1, "trained": 1, "steps": [0, 2], "train": 4, "test": 2}


def test_kernels_are_compared_on_cifar_too(cifar, tmp_path, monkeypatch):
    sizes = OF_CIFAR | {"widths": {"fc": [8], "conv": [2]}}
    table = ok(mohamadi_quality.run(quick("mohamadi_quality", **sizes)).assign(**PROVENANCE))
    assert set(table["data"]) == {"cifar10"} and set(table["step"]) == {0, 2}
    parameters = table.groupby("family")["P"].first()
    assert parameters["fc"] == 3072 * 8 + 8 + 8 * 8 + 8 + 8 * 10 + 10
    assert parameters["conv"] == 27 * 2 + 2 + 2 * (18 * 2 + 2) + 2 * 10 + 10
    assert (512 * table["network_accuracy"] % 1 == 0).all()
    monkeypatch.setattr(files, "METADATA", {})  # no pictures
    for name in ("mohamadi_quality", "mohamadi_training"):
        caption = figures.draw(name, table, tmp_path)[1].read_text()
        assert "a part of CIFAR-10 (JPEG copies)" in caption and "scikit" not in caption
    said = [mohamadi_quality_figure.pntk.data(rows) for rows in (table.assign(data="digits"), table[["family"]])]
    assert said == ["scikit-learn's digits"] * 2, "older tables do not say it"


def test_without_its_images_every_row_says_how_to_provide_them(cifar, monkeypatch):
    def gone(self, read):
        raise Unavailable("CIFAR-10 not found")

    monkeypatch.setattr(type(images.CIFAR10), "read", gone)
    table = mohamadi_quality.run(quick("mohamadi_quality", **OF_CIFAR | {"widths": {"fc": [8]}}))
    assert set(table["status"]) == {"skipped"} and set(table["reason"]) == {"CIFAR-10 not found"} and len(table) == 12


def test_a_study_is_stale_if_its_images_change(cifar):
    digits, pictures = (config(studies={"mohamadi_quality": {"data": data}}) for data in ("digits", "cifar10"))
    before = [fingerprints.study(one, "mohamadi_quality") for one in (digits, pictures)]
    cifar.write_bytes(b"other pixels")
    after = [fingerprints.study(one, "mohamadi_quality") for one in (digits, pictures)]
    assert after[0] == before[0] and after[1] != before[1]


def test_kernel_regression_starts_from_the_outputs_of_the_network():
    """With the identity as kernel, regression does not change the network's outputs for other images."""
    f, y = torch.arange(6.0).reshape(3, 2).double(), torch.ones(2, 2).double()
    torch.testing.assert_close(pntk.predictions(torch.eye(3).double(), f, y, 2), f[2:])


@pytest.mark.parametrize(("rate", "said"), [(1e30, "outputs are not finite"), (1e8, "the same for all images")])
def test_a_diverging_network_is_a_failed_row_and_its_earlier_rows_stand(rate, said):
    settings = mohamadi_quality.Settings(train=4, test=2, inits=1, steps=[0, 20, 30], rate=rate)
    table = pd.DataFrame(mohamadi_quality._rows(settings, "fc", 8)).drop_duplicates("step").set_index("step")
    assert list(table["status"]) == ["ok", "failed", "failed"]
    assert table.loc[[20, 30], "reason"].str.contains(f"training diverged: .*{said}").all()


def test_a_network_without_kernels_has_the_reason_at_every_step(monkeypatch):
    def broken(*_):
        raise BadInput("cannot be traced")

    monkeypatch.setattr(pntk, "Theta", broken)
    settings = mohamadi_quality.Settings(train=4, test=2, inits=1, steps=[0, 2])
    table = pd.DataFrame(mohamadi_quality._rows(settings, "fc", 8)).drop_duplicates("step").set_index("step")
    assert table["reason"].str.contains("cannot be traced").all() and set(table.index) == {0, 2}


def test_looking_at_a_network_does_not_change_its_training():
    settings = mohamadi_quality.Settings(train=4, test=2, inits=1, steps=[0, 2, 5])
    course, late = (mohamadi_quality.Course(mohamadi_quality.Architecture(settings, "fc", 8), 0) for _ in range(2))
    assert [course.look(step) for step in settings.steps][-1] == late.look(5) != late.look(0)


def test_training_in_parts_is_training_in_one_go():
    ends = []
    for stops in ([7], [0, 3, 3, 7]):
        network = initialisation.seeded(lambda: classifiers.network("fc", 8, 10), 0)
        course = descent.Descent(network, torch.nn.functional.cross_entropy, rate=0.1, momentum=0.9, batch=16, seed=1)
        for stop in stops:
            course.to(stop)
        assert course.steps == 7
        ends.append(torch.cat([w.detach().reshape(-1) for w in network.parameters()]))
    assert torch.equal(*ends)


def test_batch_norm_keeps_its_statistics_in_training_and_learns_its_scale():
    network = initialisation.seeded(lambda: classifiers.network("wide_resnet", 1, 10), 0)
    before = {name: value.clone() for name, value in network.state_dict().items()}
    course = descent.Descent(network, torch.nn.functional.cross_entropy, rate=1e-3, batch=8, seed=0)
    course.to(2)
    same = {name: torch.equal(value, before[name]) for name, value in network.state_dict().items()}
    assert all(kept for name, kept in same.items() if "running" in name)
    assert not same["1.weight"] and not same["1.bias"]


@pytest.mark.slow
def test_weight_decay_under_cross_entropy_takes_the_pntk_to_the_last_layer(tables):
    ends = ok(tables["mohamadi_drift"]).query("kernel == 'sum_of_logits'").set_index(["loss", "step"])
    decayed, plain = (ends.loc[(loss, 200)] for loss in ("cross_entropy_decay", "cross_entropy"))
    # 1^T V shrinks by 1 - rate * decay per step, and nothing else changes it.
    assert decayed["sum_direction"] < 0.5 * ends.loc[("cross_entropy_decay", 0), "sum_direction"]
    assert decayed["pntk_to_last_layer"] < 0.5 * plain["pntk_to_last_layer"]


def test_gradient_descent_on_cross_entropy_does_not_change_the_sum_of_the_readout():
    network = initialisation.seeded(lambda: classifiers.network("fc", 8, 4), 0).double()
    before = network[-1].weight.sum(0).detach().clone()
    x = torch.randn(16, 1, 8, 8, generator=torch.Generator().manual_seed(0)).double()
    optimizer = torch.optim.SGD(network.parameters(), lr=0.5)
    for _ in range(5):
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(network(x), torch.arange(16) % 4).backward()
        optimizer.step()
    torch.testing.assert_close(network[-1].weight.sum(0).detach(), before)


@pytest.mark.slow
def test_costs_of_resnets_are_given_or_have_a_reason(tables):
    table = ok(tables["mohamadi_cost"])
    assert set(table["N"]) == {2, 3} and set(table["method"]) == set(mohamadi_cost.METHODS)
    np.testing.assert_allclose(table["seconds_per_pair"] * table["pairs"], table["seconds"])
    settings = quick("mohamadi_cost", **TINY["mohamadi_cost"] | {"limits": {"gigaflop": 1e-4}})
    left = mohamadi_cost.run(settings)
    assert set(left["status"]) == {"skipped"} and left["reason"].str.contains("over limits.gigaflop").all()


@pytest.mark.slow
def test_contracting_a_jacobian_that_does_not_fit_in_memory_is_left_out(monkeypatch):
    monkeypatch.setattr(mohamadi_cost, "METHODS", ("jacobian_contraction",))
    settings = quick("mohamadi_cost", **TINY["mohamadi_cost"] | {"limits": {"block_mb": 0.1}})
    left = mohamadi_cost.run(settings).set_index("method").loc["jacobian_contraction"]
    assert set(left["status"]) == {"skipped"} and left["reason"].str.contains("recomputed for every pair").all()


@pytest.mark.parametrize("depth", list(residual.RESNETS))
def test_resnets_have_the_layers_of_their_name(depth):
    network = residual.network(depth, 5, width=1)
    layers = [m for m in network.modules() if isinstance(m, torch.nn.Conv2d | torch.nn.Linear)]
    shortcuts = [m for name, m in network.named_modules() if "shortcut" in name and isinstance(m, torch.nn.Conv2d)]
    assert len(layers) - len(shortcuts) == depth


@pytest.mark.slow
def test_operations_agree_with_the_table_of_the_paper(tables):
    flops = ok(tables["novak_flops"]).set_index(["method", "O", "width"])["flops"]
    assert flops["nt_structured_derivatives", 4, 32] < flops["nt_jacobian_contraction", 4, 32]
    assert flops["nt_ntk_vector_products", 4, 32] > flops["nt_structured_derivatives", 4, 32]
    entries = tables["novak_flops"]
    table = ok(tables["novak_images"])
    resnets = table[table["quantity"] == "flops"].set_index("method")["flops"]
    assert resnets["jacobian"] < resnets["nt_jacobian_contraction"]
    assert resnets["structured_derivatives"] < resnets["nt_ntk_vector_products"]
    timed = table[table["quantity"] == "seconds"].set_index("method")["seconds"]
    assert set(timed.index) == set(resnets.index) - {"jacobian"} and (timed > 0).all()
    np.testing.assert_allclose(entries["flops_per_entry"], entries["flops"] / (entries["N"] * entries["O"]) ** 2)


@pytest.mark.slow
def test_programs_over_the_memory_budget_are_rows_with_a_reason(tables):
    table = tables["novak_time"]
    lost = table[table["status"] == "out_of_memory"]
    assert len(lost) and lost["reason"].str.contains("over the budget").all()
    assert set(table["status"]) == {"ok", "out_of_memory"}
    assert (table.loc[table["status"] == "ok", "memory_bytes"].dropna() >= 0).all()


def test_programs_of_too_many_operations_are_rows_with_a_reason_and_their_memory(monkeypatch):
    from ntkbench.studies import novak_time

    lower, known = programs.lowered, {}

    def lowered(name, forward, weights, x):
        """Both runs lower and compile the same programs; the test is that the rows of both have the memory."""
        key = (name, *weights.items(), x)
        if key not in known:
            known[key] = lower(name, forward, weights, x)
        return known[key]

    monkeypatch.setattr(programs, "lowered", lowered)
    monkeypatch.setattr(programs, "compiled", functools.cache(programs.compiled))
    sizes = TINY["novak_time"] | {"widths": [16], "depth": 2}
    sizes |= {"others": [{"inputs": 5, "depth": 1, "width": 3, "outputs": 2}]}
    ran = novak_time.run(quick("novak_time", **sizes | {"limits": {}}))
    table = novak_time.run(quick("novak_time", **sizes | {"limits": {"gigaflop": 1e-9}}))
    assert set(table["status"]) == {"skipped"} and table["reason"].str.contains("over limits.gigaflop").all()
    assert table["budget_mb"].notna().all() and "seconds" not in table
    jax = table["method"] != "structured_derivatives"
    assert (table.loc[jax, "memory_bytes"] == ran.loc[jax, "memory_bytes"]).all()
    other = table[table["inputs"] == 5]
    assert set(zip(other["depth"], other["width"], other["O"], strict=True)) == {(1, 3, 2)}
    weights = 4 * (5 * 3 + 3 + 3 * 2 + 2)
    assert (other.loc[jax, "memory_bytes"] > weights).all()


def test_the_widest_network_in_memory_is_read_off_programs_that_were_not_run():
    rows = []
    for width in (16, 32, 64, 128):
        for method, power in (("nt_structured_derivatives", 1), ("nt_jacobian_contraction", 2)):
            row = {"N": 2, "O": 4, "width": width, "method": method, "budget_mb": 64.0, "status": "skipped"}
            rows.append(row | {"memory_bytes": 2.0**20 * (width / 4) ** power})
    table = pd.DataFrame(rows)
    # 64 MiB are 4 * 64 wide at the power 1, which is more than was measured, and 4 * 8 at the power 2.
    assert novak_time_figure.widest(table).to_dict() == {4: pytest.approx(128 / 32)}
    assert novak_time_figure.widest(table.assign(budget_mb=1e6)).empty, "neither runs out of memory"
    gone = table["memory_bytes"].where(table["width"] < 128)
    assert novak_time_figure.widest(table.assign(memory_bytes=gone)).empty, "not all programs are known"


def notebook(**changes):
    """Rows of the study for the notebook's network, with the notebook's own seconds."""
    there = sources.values("novak_notebooks", network=novak_time_figure.NOTEBOOK)
    rows = [
        {"method": row.method, "title": row.method, "seconds": row.milliseconds / 1e3, "status": "ok", "reason": ""}
        for row in there.itertuples()
    ]
    table = pd.DataFrame(rows).assign(N=16, O=8, memory_bytes=1e6, budget_mb=1e4, calls=3, **novak_time_figure.SAME)
    return table.assign(seconds_q25=table["seconds"], seconds_q75=table["seconds"], **PROVENANCE).assign(**changes)


def test_the_notebooks_claim_is_judged_on_the_notebooks_network_alone():
    def verdicts(extra):
        papers = notebook(inputs=784, depth=9, width=16, seconds=1.0)
        table = base.checked_study(pd.concat([papers, extra]), novak_time_figure.COLUMNS)
        with base.style():
            made = novak_time_figure.draw(table).claims
        return [claim.verdict for claim in made if claim.source == "neural-tangents' notebook"]

    assert verdicts(notebook()) == ["reproduced"] * 2
    assert verdicts(notebook(width=1024)) == verdicts(notebook(depth=9)) == ["not addressed"] * 2
    assert verdicts(notebook(status="skipped", reason="too large")) == ["not addressed"] * 2


def test_lowered_programs_compute_the_kernel():
    import jax

    from ntkbench.problems.novak import fc_relu
    from ntkbench.studies.base import programs

    network = fc_relu(N=2, O=3, width=8, depth=2)
    weights = {name: w.detach().numpy() for name, w in network.module.named_parameters()}
    expected = dense(network.module, torch.from_numpy(network.x)).float().numpy()
    for name in programs.IMPLEMENTATIONS:
        lowered = programs.lowered(name, network.jax_forward, {k: w.shape for k, w in weights.items()}, network.x.shape)
        theta = jax.device_get(lowered.compile()(weights, network.x))
        np.testing.assert_allclose(theta.transpose(0, 2, 1, 3).reshape(6, 6), expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize(
    ("name", "sizes"),
    [
        ("fc_relu", {"N": 4, "O": 3, "width": 8, "depth": 2}),  # pairwise, and with a triangle
        ("conv_relu", {"N": 2, "O": 3, "width": 4}),  # written out
    ],
)
def test_operations_by_shapes_are_those_of_a_run(name, sizes):
    from ntkbench.options import Target
    from ntkbench.problems import novak
    from ntkbench.studies.base import programs

    network = getattr(novak, name)(**sizes)
    kernel, parameters, x = programs.engine(network.module, network.x, Target("torch", device="cpu"))
    kernel.kernel(parameters, x)  # traced, which takes operations of its own
    ran = programs.torch_flops(lambda: kernel.kernel(parameters, x))
    assert programs.engine_flops(network.module, network.x) == ran > 0


def test_programs_that_would_take_too_long_are_skipped_with_a_reason(monkeypatch):
    from ntkbench.studies import novak_images
    from ntkbench.studies.base import programs

    monkeypatch.setattr(novak_images.Case, "_operations", lambda self, name: {"flops": 1.0, "flops_per_entry": 1.0})
    timed = {"seconds": 1.0}
    monkeypatch.setattr(programs, "timed_program", lambda *_: timed)
    monkeypatch.setattr(programs, "timed_engine", lambda *_: timed)
    monkeypatch.setattr(programs, "lowered", lambda *_: None)
    sizes = {"depths": [18], "wide_factors": [1], "outputs": [1, 10], "side": 32} | PATCHLESS
    # Multiplications of ResNet18 (width 64, 224 x 224) are 1.8e9 (He et al. 2016), and go as the side squared.
    limit = 3 * 2 * 1.8 * (32 / 224) ** 2 * 5
    table = novak_images.run(quick("novak_images", **sizes, limits={"gigaflop": limit}))
    ends = table[(table["quantity"] == "seconds") & (table["network"] == "ResNet18")].groupby("O")
    assert {o: set(rows["status"]) for o, rows in ends} == {1: {"ok"}, 10: {"skipped"}}
    assert table.loc[table["status"] == "skipped", "reason"].str.contains("over limits.gigaflop").all()
    assert set(table["network"]) == {"ResNet18", "WideResNet-16-1"}
    assert table.loc[table["O"] == 10, "P"].max() == 11_181_642  # torchvision's resnet18 with ten classes


def test_memory_of_our_kernel_on_a_gpu_is_that_of_the_gpu(monkeypatch):
    """As for the programs that it is compared with."""
    network, x = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.ReLU()), np.ones((2, 3), np.float32)
    target, reset, peaks = Target(device="cpu"), [], iter([3, 7])
    assert programs.timed_engine(network, x, target, 1)["memory_bytes"] >= 4 * (16 + 6)
    monkeypatch.setattr(operators, "reset_device_memory", reset.append)
    monkeypatch.setattr(operators, "device_memory", lambda target: next(peaks, 7))
    assert programs.timed_engine(network, x, target, 1)["memory_bytes"] == 7 and reset == [target]


@pytest.mark.slow
def test_published_seconds_are_drawn_for_the_same_network_alone(tables):
    figure = novak_images_figure
    table = tables["novak_images"]
    assert figure.published(table).empty
    known = figure.published(table.assign(**figure.SAME))
    assert set(known["N"]) == {1} and set(known["O"]) == {128, 1000}
    assert known.set_index(["method", "O"])["seconds"]["nt_structured_derivatives", 128] == 0.113
    # With the notebook's outputs, seconds are judged and operations are stated beside them.
    rows = table.assign(**figure.SAME, O=128.0)
    with base.style():
        made = figure.draw(base.checked_study(rows, figure.COLUMNS)).claims
    judged = {claim.published: claim for claim in made if "O = 128" in claim.name}
    assert sorted(judged) == pytest.approx([150 / 113, 454 / 113]) and len(made) == 4
    seconds = rows[rows["quantity"] == "seconds"].set_index("method")["seconds"]
    for published, claim in judged.items():
        method = "nt_jacobian_contraction" if published > 2 else "nt_ntk_vector_products"
        assert claim.measured[0] == pytest.approx(seconds[method] / seconds["nt_structured_derivatives"])
        assert "in operations the ratio is" in claim.reason and claim.runs == QUICK["calls"] and not claim.same
    others = [claim for claim in made if "O = 8," in claim.name]
    assert all(claim.verdict == "not addressed" and "has no N = 8 with O = 8" in claim.reason for claim in others)


@pytest.mark.slow
def test_programs_for_images_are_compared_with_ours_and_captions_say_what_is_missing(tables, tmp_path):
    one = tables["novak_images"]
    names = ["ResNet18", "ViT-Ti/16", "Mixer-S/32", "ViT-S/16", "Mixer-S/16"]
    several = pd.concat([one.assign(network=name) for name in names], ignore_index=True)
    lost = (several["network"] == names[1]) & (several["method"] == "nt_ntk_vector_products")
    several.loc[lost, ["status", "reason", "flops", "flops_per_entry", "seconds"]] = [
        "failed",
        "no rule",
        *[np.nan] * 3,
    ]
    figures.draw("novak_images", several, tmp_path)
    plotted = pd.read_csv(tmp_path / "novak_images.csv")
    values = ok(one).set_index(["quantity", "method"])
    for row in plotted.itertuples():
        ours = values.loc[(row.quantity, "structured_derivatives"), row.quantity]
        assert row.ratio == pytest.approx(values.loc[(row.quantity, row.method), row.quantity] / ours)
    assert len(plotted) == 5 * (len(values) - 2) - lost.sum()
    caption = (tmp_path / "novak_images.txt").read_text()
    assert f"Not measured: {lost.sum()} of {len(several)} cases." in caption
    winners = re.search(r"At O = 2, neural-tangents' program with the fewest operations is (.*?)\.", caption)[1]
    counted = one[one["quantity"] == "flops"].set_index("method")["flops"].filter(like="nt_")
    assert winners == f"{novak_images_figure.NAMES[counted.idxmin()]} for 4 of 4 networks"


# --- configurations and commands


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ({"mohamadi_qualty": {}}, ["studies", "mohamadi_qualty", "did you mean 'mohamadi_quality'"]),
        ({"mohamadi_quality": {"inits": 0}}, ["studies.mohamadi_quality.inits", "0", "greater than 0"]),
        ({"mohamadi_quality": {"width": 3}}, ["studies.mohamadi_quality.width", "unknown key", "widths", "train"]),
        ({"mohamadi_quality": {"train": 1286}}, ["studies.mohamadi_quality", "digits has 1285 training images"]),
        ({"mohamadi_quality": {"steps": [2, 4]}}, ["studies.mohamadi_quality.steps", "begin with 0"]),
        ({"mohamadi_quality": {"steps": [0, 4, 4]}}, ["studies.mohamadi_quality.steps", "4 is given twice"]),
        ({"mohamadi_quality": {"widths": {"mlp": [3]}}}, ["studies.mohamadi_quality.widths.mlp", "'fc'", "'conv'"]),
        ({"hazelden_trace": {"small": []}}, ["studies.hazelden_trace.small", "at least 1"]),
        ({"hazelden_trace": {"direct_share": 2}}, ["studies.hazelden_trace.direct_share", "less than or equal to 1"]),
        ({"novak_flops": 3}, ["studies.novak_flops", "3", "dictionary"]),
        ({"novak_images": {"side": 48, "mixers": ["S/32"]}}, ["studies.novak_images", "side 48", "32", "S/32"]),
    ],
)
def test_bad_sizes_are_named(given, said):
    with pytest.raises(BadInput) as caught:
        config(studies=given)
    assert all(part in str(caught.value) for part in ["test.yaml", *said]), str(caught.value)


def test_a_study_takes_the_configurations_keys_where_it_says_nothing():
    made = config(seeds=7, dtype="float64", studies={"hazelden_blog": {"seeds": 9}, "solves": {}})
    assert (made.study("hazelden_blog").seeds, made.study("solves").seeds) == (9, 7)
    assert made.study("solves").dtype == "float64"


READS = {
    **dict.fromkeys(("device", "dtype", "limits.block_mb"), r"\.target\("),
    "seeds": r"\b(settings|s)\.seeds\b",
    "calls": r"\bsettings\.calls\b",
    "limits.passes": r"\.check_passes\(",
    "limits.gigaflop": r"\.check_operations\(",
    "limits.patience_s": r"\blimits\.patience_s\b",
    "limits.times_exact": r"\.times_exact\b",
}
"""How a study reads the settings that not every study uses."""


@pytest.mark.parametrize("name", studies.names())
def test_a_study_declares_the_settings_that_it_reads(name):
    file = studies.REGISTRY.file(name)
    imported = fingerprints.imports(f"ntkbench.studies.{name}", file)
    shared = {each.split(".")[3] for each in imported if each.startswith("ntkbench.studies.base.")}
    own = file.read_text()
    texts = [own, *(module.read_text() for module in file.parent.glob("base/*.py") if module.stem in shared)]
    uses = studies.REGISTRY.get(name).Settings.USES
    assert set(READS) == set(OPTIONAL)
    for setting, pattern in READS.items():
        if setting in uses:
            assert any(re.search(pattern, text) for text in texts), setting
        elif setting != "dtype":  # some take the device and the memory of the target alone
            assert not re.search(pattern, own), setting


@pytest.mark.parametrize("name", studies.names())
def test_every_setting_is_used_or_refused(name):
    values = {"device": "cpu", "dtype": "float64", "seeds": 30, "calls": 30}
    for setting in OPTIONAL:
        outer, _, key = setting.rpartition(".")
        value = values.get(setting, 3.0 if key != "passes" else 3)
        given = {name: {outer: {key: value}} if outer else {key: value}}
        if setting in studies.REGISTRY.get(name).Settings.USES:
            chosen = config(studies=given).study(name)
            assert getattr(chosen.limits if outer else chosen, key) == value
        else:
            with pytest.raises(BadInput, match=f"studies.{name}.*{setting} has no effect on this study"):
                config(studies=given)


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        *((name, "float64") for name in ("effective_ranks", "mohamadi_quality", "mohamadi_drift")),
        ("cross_sample_share", "float64"),
        *((name, "float32") for name in ("novak_time", "novak_images", "novak_flops", "distillation")),
    ],
)
def test_a_table_names_the_precision_of_its_study_whatever_that_of_the_run(name, dtype, tmp_path):
    for given in ("float32", "float64"):
        runner._write(config(dtype=given, studies={name: {}}), name, tmp_path / "table.csv", [{"status": "ok"}])
        assert set(pd.read_csv(tmp_path / "table.csv")["dtype"]) == {dtype}


@pytest.mark.parametrize("name", ["distillation", "novak_flops"])
def test_studies_that_run_on_the_cpu_alone_do_not_name_a_gpu(name, monkeypatch):
    monkeypatch.setattr(operators, "device_name", lambda target: "a GPU" if target.device == "auto" else target.device)
    chosen = config(studies={name: {}, "training": {}})
    assert runner._whence(chosen.study("training"))["device"] == "a GPU"
    assert runner._whence(chosen.study(name))["device"] == "cpu"


def test_a_studys_fingerprint_follows_its_settings():
    one, other = (config(studies={"hazelden_blog": {"samples": [s]}, "novak_flops": {}}) for s in (2, 3))
    assert fingerprints.study(one, "hazelden_blog") != fingerprints.study(other, "hazelden_blog")
    assert fingerprints.study(one, "novak_flops") == fingerprints.study(other, "novak_flops")


def test_the_command_refuses_a_study_that_the_configuration_lacks(tmp_path):
    file = tmp_path / "config.yaml"
    raw = {"profile": "test", "threads": 1, "grid": [BLOCK], "studies": {"mohamadi_drift": TINY["mohamadi_drift"]}}
    file.write_text(yaml.safe_dump(raw))
    output = tmp_path / "studies" / "flops.csv"
    done = CliRunner().invoke(main, ["study", "novak_flops", "--config", str(file), "--output", str(output)])
    assert done.exit_code == 1 and not output.exists()
    assert "unknown study 'novak_flops'; allowed: mohamadi_drift" in done.output


def test_studies_import_no_backend():
    code = "import sys; from ntkbench import studies; [studies.fields(n) for n in studies.names()];"
    code += "sys.exit(bool({'torch', 'jax'} & set(sys.modules)))"
    subprocess.run([sys.executable, "-c", code], check=True)


# --- figures


def of_studies():
    return [(name, figures.study_of(name)) for name in figures.names() if figures.study_of(name) in TINY]


def without_pdf(patch):
    """Figures that are drawn from now on have no PDF."""
    patch.setattr(files, "METADATA", {"png": files.METADATA["png"]})


@pytest.mark.slow
def test_every_study_is_drawn_the_same_from_a_file_and_twice(tables, tmp_path, monkeypatch):
    without_pdf(monkeypatch)
    for name, study in of_studies():
        first = {path.name: path.read_bytes() for path in figures.draw(name, tables[study], tmp_path)}
        assert set(first) == {f"{name}.{kind}" for kind in ("csv", "txt", "png")}
        file = tmp_path / f"{study}.table.csv"
        tables[study].to_csv(file, index=False)
        again = figures.draw(name, pd.read_csv(file), tmp_path)
        assert {path.name: path.read_bytes() for path in again} == first
        caption = (tmp_path / f"{name}.txt").read_text()
        assert all(part in caption for part in ("0123456789", "a laptop", f"Rows of the study {study}", "1 thread"))
        assert not re.search(r"\bnan\b", caption), caption
    assert {study for _, study in of_studies()} == set(TINY)


@pytest.mark.slow
def test_a_figure_refuses_the_table_of_another_study(tables, tmp_path):
    with pytest.raises(BadInput, match="lacks columns that this figure needs"):
        figures.draw("novak_flops", tables["mohamadi_drift"], tmp_path)


def test_published_values_are_committed_and_drawn():
    assert len(sources.values("hazelden_figures", figure="speedup", problem="mlp")) == 20
    with pytest.raises(BadInput, match="hazelden_figures"):
        sources.values("hazelden")
    text = (paths.PUBLISHED / "README.md").read_text()
    assert all(f"`{file.name}`" in text for file in paths.PUBLISHED.glob("*.csv"))


def test_published_errors_have_their_samples():
    """The first estimate of the script is its slowest, which must not change its place."""
    there = hazelden_trace_figure.published_errors("mlp", "large", "hutch++").set_index("m")
    assert list(there.index) == [60, 93, 145]
    assert (there.loc[60, "x"], there.loc[60, "y"]) == (0.06367, 0.0367)


@pytest.mark.slow
def test_published_ratios_state_their_number_of_outputs(tables):
    """Ours are for other numbers of outputs, and must not be compared with them."""
    assert 200 not in set(tables["mohamadi_cost"]["O"])
    drawing = mohamadi_cost_figure.draw(base.checked_study(tables["mohamadi_cost"], mohamadi_cost_figure.COLUMNS))
    there = sources.values("mohamadi_figure1_tiny_imagenet")
    wide = there.pivot_table(index="resnet_depth", columns="kernel", values="seconds_per_pair")
    panels = [panel for panel in drawing.figure.axes if panel.get_visible()]
    for panel in panels:
        (crosses,) = (line for line in panel.lines if line.get_marker() == "x")
        np.testing.assert_allclose(crosses.get_ydata(), wide["eNTK"] / wide["pNTK"])
        assert "published, O = 200" in [text.get_text() for text in panel.texts]


@pytest.mark.slow
def test_the_figure_at_initialisation_does_not_depend_on_later_steps(tables, tmp_path, monkeypatch):
    without_pdf(monkeypatch)
    table = tables["mohamadi_quality"]
    later = table["step"] > 0
    numbers = ["difference", "accuracy", "prediction_difference"]
    changed = table.assign(**{name: table[name].where(~later, 7 * table[name] + 1) for name in numbers})
    drawn = []
    for rows in (table, changed):
        paths = figures.draw("mohamadi_quality", rows, tmp_path)
        drawn.append([path.read_bytes() for path in paths if path.suffix in (".csv", ".png")])
    assert drawn[0] == drawn[1]


def courses(*slopes_by_step, families=("fc",)):
    """A table of the study whose differences follow a slope by width at each step, three initialisations."""
    rng, rows = np.random.default_rng(0), []
    for family in families:
        for width in (64, 128, 256, 512):
            for init in range(3):
                for step, power in zip((0, 10, 100), slopes_by_step, strict=True):
                    for kernel, title in ({"full": "NTK"} | pntk.KERNELS).items():
                        row = {"family": family, "width": width, "init": init, "step": step, "kernel": kernel}
                        row |= dict.fromkeys(mohamadi_training_figure.QUANTITIES, 0.5)
                        row |= {"title": title, "P": 9, "train": 8, "test": 4, "rate": 6, "momentum": 0.9, "batch": 32}
                        row |= {"difference": 0.9 * (width / 64) ** power * np.exp(0.02 * rng.standard_normal())}
                        rows.append(row | {"status": "ok", "reason": ""})
    return base.checked_study(pd.DataFrame(rows).assign(**PROVENANCE), mohamadi_training_figure.COLUMNS)


@pytest.mark.parametrize("power", [-0.4, 0.3, 0.0])
def test_growth_along_training_is_that_of_the_table(power):
    """At width 64 the power has no effect, so that its error is constant."""
    with base.style():
        drawing = mohamadi_training_figure.draw(courses(-0.5, -0.5, power))
    title = drawing.figure.texts[0].get_text().replace("\n", " ")
    low, high = map(float, re.search(r"error of the pNTK by (\S+) to (\S+) ", title).groups())
    assert (low, high) == (pytest.approx(1, abs=0.05), pytest.approx(8 ** (power + 0.5), rel=0.1))
    grown = int(re.search(r"grows for (\d) of 4 families and widths", drawing.caption)[1])
    assert grown >= 3


def test_lines_along_training_are_one_per_width_and_darker_for_wider_networks():
    table = courses(-0.5, -0.3, -0.2)
    with base.style():
        drawing = mohamadi_training_figure.draw(table)
    panel = drawing.figure.axes[0]
    lines = [line for line in panel.lines if line.get_marker() == "*"]
    assert [list(line.get_xdata()) for line in lines] == [[0, 10, 100]] * 4
    brightness = [sum(int(line.get_color()[i : i + 2], 16) for i in (1, 3, 5)) for line in lines]
    assert brightness == sorted(brightness, reverse=True) and len(set(brightness)) == 4
    once = table[(table["kernel"] == "sum_of_logits") & (table["width"] == 64)]
    np.testing.assert_allclose(lines[0].get_ydata(), once.groupby("step")["difference"].median())
    low, high = panel.get_xlim()
    assert low < 0 and high > 100


def test_a_figure_without_trained_networks_says_so():
    table = courses(-0.5, -0.5, -0.5)
    with base.style():
        drawing = mohamadi_training_figure.draw(table[table["step"] == 0])
    assert "None was trained" in drawing.caption


def test_intervals_of_slopes_cover():
    rng = np.random.default_rng(0)
    x = np.repeat([1.0, 2.0, 4.0, 8.0], 5)
    inside = 0
    for _ in range(200):
        value, half = curves.slope(x, x**-0.5 * np.exp(0.1 * rng.standard_normal(len(x))))
        inside += abs(value + 0.5) <= half
    assert 180 <= inside <= 199


def _size(picture):
    height, width = matplotlib.image.imread(picture).shape[:2]
    return width, height


@pytest.mark.slow
def test_the_report_needs_no_other_file(tables, tmp_path):
    made = [figures.draw(name, tables[study], tmp_path)[2] for name, study in of_studies()[:2]]
    page = report.page(made, "All <figures>")
    assert "All &lt;figures&gt;" in page and page.count("data:image/webp;base64,") == 2
    beside = {f"figures/{file.stem}.{end}" for file in made for end in ("csv", "pdf", "png")}
    assert set(re.findall(r'(?:src|href)="(?!data:|#)([^"]*)"', page)) == beside
    assert set(re.findall(r'(?:href="#|aria-describedby="|aria-labelledby=")([^"]+)"', page)) <= set(
        re.findall(r'id="([^"]+)"', page)
    )
    assert len(re.findall(r'<img [^>]* alt="[^"]{20,}"', page)) == 2
    assert re.findall(r'width="(\d+)" height="(\d+)"', page) == [tuple(map(str, _size(file))) for file in sorted(made)]
    made[0].with_suffix(".txt").unlink()
    with pytest.raises(BadInput, match="has no caption"):
        report.page(made, "x")
