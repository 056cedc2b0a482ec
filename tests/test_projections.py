"""Projected gradients are J S, unbiased, and as accurate as published; approximations of Theta are named."""

from __future__ import annotations

import dataclasses
import functools
import math
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
import scipy.linalg
import torch
from conftest import mostly_slow
from torch import nn

import ntkbench
from ntkbench import figures, methods, modules, problems, readme, studies, testing
from ntkbench.errors import BadInput, OverMemory, Unavailable, Undefined
from ntkbench.estimators import projections
from ntkbench.figures import projections as figure
from ntkbench.layerwise import sample_kernels
from ntkbench.methods import count_sketch
from ntkbench.methods.base import projected
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.studies import projections as study
from ntkbench.testing import explicit_jacobian, metrics_of, smooth_problem
from ntkbench.units import percent_label

TARGET = Target("torch", "float64", "cpu")
UNBIASED = ("dense_jl", "sparse_jl", "grass", "kronecker_projection")
SEEDS = 300


@functools.cache
def wide() -> Problem:
    return smooth_problem("wide_projected", 12, 24, 24, 3)


@functools.cache
def prepared(name, problem=smooth_problem):
    return methods.get(name).prepare(problem(), TARGET)


@functools.cache
def jacobians(problem=smooth_problem):
    return [explicit_jacobian(problem(), end) for end in ("theta_0", "theta_f")]


def features(name, k, seed, problem=smooth_problem, metric="alignment", replicates=None):
    return methods.get(name).features(prepared(name, problem), metric, k, seed, replicates=replicates)[0]


def z_of(values, expected):
    """Errors of the means over seeds in units of their standard errors, by entry."""
    values = np.array(values)
    return (values.mean(0) - expected) / (values.std(0, ddof=1) / math.sqrt(len(values)))


# --- the features are J S


def test_dense_features_are_the_products_of_all_rows_with_signs():
    (j, _) = prepared("dense_jl").jacobians("alignment")
    S = j.rng(3).sign(40, j.P).numpy()
    for J, found in zip(jacobians(), features("dense_jl", 40, 3), strict=True):
        assert found.shape == (40, 6, 1)
        np.testing.assert_allclose(found[:, :, 0].T, J @ S.T, rtol=1e-10)


def test_dense_features_do_not_depend_on_memory_and_are_distributed_as_jvps():
    problem, small = smooth_problem(), dataclasses.replace(TARGET, memory=2**12)
    method = methods.get("dense_jl")
    (found,), _ = method.features(method.prepare(problem, small), "norm", 40, 3)
    np.testing.assert_allclose(found, features("dense_jl", 40, 3, metric="norm")[0], rtol=1e-12)
    forward = methods.get("gram_forward")
    ready = forward.prepare(problem, TARGET)
    made = [method.estimate(prepared("dense_jl"), "norm", 32, s) for s in range(100)]
    others = [forward.estimate(ready, "norm", 32, s) for s in range(100)]
    for attribute in ("value", "standard_error"):
        ours, theirs = ([getattr(each, attribute) for each in some] for some in (made, others))
        assert abs(np.mean(ours) - np.mean(theirs)) < 4 * math.hypot(np.std(ours), np.std(theirs)) / 10


def test_sparse_features_have_one_sign_of_each_parameter_in_each_block():
    (j, _) = prepared("sparse_jl").jacobians("alignment")
    S = methods.get("sparse_jl").sketch(j, 40, 7, None)(j.parameter_basis(0, j.P)).numpy()
    assert S.shape == (j.P, 8, 5) and set(np.unique(S)) == {-1.0, 0.0, 1.0}
    assert (abs(S).sum(2) == 1).all()
    for J, found in zip(jacobians(), features("sparse_jl", 40, 7), strict=True):
        np.testing.assert_allclose(found, np.einsum("np,prw->rnw", J, S), atol=1e-12)


def test_masked_features_have_the_signs_of_some_parameters_in_each_block():
    (j, _) = prepared("grass").jacobians("alignment")
    S = methods.get("grass").sketch(j, 40, 7, None)(j.parameter_basis(0, j.P)).numpy()
    kept = methods.get("grass").kept * (40 // 16)
    np.testing.assert_allclose(abs(S).sum((0, 2)), kept * math.sqrt(j.P / kept))
    assert ((S != 0).sum((0, 2)) == kept).all() and len(set(map(tuple, (S != 0).any(2).T))) > 1
    for J, found in zip(jacobians(), features("grass", 40, 7), strict=True):
        np.testing.assert_allclose(found, np.einsum("np,prw->rnw", J, S), atol=1e-12)


def test_two_sided_features_are_those_of_the_layers_gradients():
    """B G A^T of G = [dW, db] for both layers, with the projections A and B of each layer."""
    (found,) = features("kronecker_projection", 2 * 8 * 4, 1, metric="norm")
    (end,) = prepared("kronecker_projection").ends("norm")
    made = projected_by(end, 2, 1)
    J = jacobians()[0]
    layers = {"0": (J[:, :12].reshape(6, 4, 3), J[:, 12:16]), "2": (J[:, 16:24].reshape(6, 2, 4), J[:, 24:])}
    parts = []
    for number, layer in enumerate(end.engine.layers):
        dW, db = layers[layer.parameters[0].partition(".")[0]]
        G = np.concatenate([dW, db[:, :, None]], axis=2)
        A, B = made[number]
        parts.append(np.einsum("rjc,ncd,rid->rnji", B, G, A).reshape(8, 6, -1))
    np.testing.assert_allclose(found, np.concatenate(parts, axis=2), atol=1e-12)


def projected_by(end, d, seed):
    """A and B of each layer, ``[R, d, D]`` and ``[R, d, C]``."""
    from ntkbench.methods.kronecker_projection import _Projections

    sides = _Projections(end, 8, d, seed)
    like = end.parameters[0]
    sizes = [((1, 5), (1, 2)), ((1, 4), (1, 4))]  # inputs with the bias, and outputs
    by_layer = [sizes["0." in layer.parameters[0]] for layer in end.engine.layers]
    return [
        tuple(sides._side(number, side, size, d, like)[:, 0].numpy() for side, size in enumerate(both))
        for number, both in enumerate(by_layer)
    ]


def test_sides_that_are_not_larger_than_the_projection_are_exact():
    J, J_f = jacobians()
    (found, found_f) = features("kronecker_projection", 2 * 8 * 36, 0)
    np.testing.assert_allclose(projections.gram(found), J @ J.T, rtol=1e-10)
    np.testing.assert_allclose(projections.gram(found_f), J_f @ J_f.T, rtol=1e-10)
    estimate = methods.get("kronecker_projection").estimate(prepared("kronecker_projection"), "norm", 2 * 8 * 36)
    assert estimate.value == pytest.approx(metrics_of(J @ J.T)["norm"]) and estimate.standard_error < 1e-9


def test_few_features_on_a_side_are_noted():
    """In the calibration, with one feature on each side, 76 % of the intervals of a transformer's norm covered it."""
    method = methods.get("kronecker_projection")
    few, more = (method.estimate(prepared("kronecker_projection"), "norm", 2 * 8 * d**2) for d in (2, 3))
    assert "only 2 features on each side of a layer" in few.notes[0] and not more.notes


# --- unbiased, with the published scaling


@pytest.mark.parametrize("name", mostly_slow(UNBIASED, {"dense_jl", "sparse_jl", "kronecker_projection"}))
def test_gram_matrix_and_moments_are_unbiased_over_seeds(name):
    J, J_f = jacobians()
    thetas = J @ J.T, J_f @ J_f.T
    grams, found, published = [], [], []
    for seed in range(SEEDS):
        both = features(name, 32, seed)
        grams.append(projections.gram(both[0]))
        tables = projections.pair_tables("alignment", both)
        found.append(projections.moments(*tables).means)
        published.append(projections.plug_in(*tables).square)
    assert abs(z_of(grams, thetas[0])).max() < 4.5
    exact = [
        (thetas[0] ** 2).sum(),
        (thetas[1] ** 2).sum(),
        (thetas[0] * thetas[1]).sum(),
        ((thetas[1] - thetas[0]) ** 2).sum(),
        (thetas[0] * (thetas[1] - thetas[0])).sum(),
    ]
    assert abs(z_of(found, exact)).max() < 4.5
    assert z_of(published, exact[0]) > 5, "the published value has the variance of the Gram matrix in it"
    assert np.mean(published) == pytest.approx(np.mean([(gram**2).sum() for gram in grams]))


@pytest.mark.parametrize(("name", "replicates", "slope"), [
    ("dense_jl", None, -0.5), ("sparse_jl", None, -0.5), ("sparse_jl", 1, -0.5), ("grass", None, -0.5),
    ("kronecker_projection", 1, -0.25),
])  # fmt: skip
def test_the_error_of_the_gram_matrix_falls_as_published(name, replicates, slope):
    J = jacobians(wide)[0]
    theta = J @ J.T
    sizes = (32, 128, 512)
    errors = [
        math.sqrt(np.mean([
            ((projections.gram(features(name, k, seed, wide, "norm", replicates)[0]) - theta) ** 2).sum()
            for seed in range(40)
        ]))
        / np.linalg.norm(theta)
        for k in sizes
    ]  # fmt: skip
    assert np.polyfit(np.log(sizes), np.log(errors), 1)[0] == pytest.approx(slope, abs=0.08)
    if slope == -0.5 and name != "grass":  # whose mask adds variance
        rank = metrics_of(theta)["effective_rank"]
        assert errors == pytest.approx([math.sqrt((1 + rank) / k) for k in sizes], rel=0.25)


@pytest.mark.parametrize("outputs", mostly_slow([1, 6], 1))
def test_the_error_of_count_sketches_falls_as_published(outputs):
    """Against tr_O Theta, as 1 / sqrt(width) for one output; for several, with probes in proportion to the width."""
    problem = smooth_problem(f"sketched_{outputs}", 6, 8, 8, outputs)
    J = explicit_jacobian(problem).reshape(6, outputs, -1)
    summed = np.einsum("aop,bop->ab", J, J)
    (j,) = methods.get("count_sketch").prepare(problem, TARGET).jacobians("norm")
    sizes, width = (2, 8, 32), 32 if outputs == 1 else 128
    errors = [
        math.sqrt(np.mean([
            ((count_sketch.kernel(count_sketch.probed(j, probes, width * size, seed)) - summed) ** 2).sum()
            for seed in range(25)
        ]))
        for size, probes in ((size, 1 if outputs == 1 else size) for size in sizes)
    ]  # fmt: skip
    assert np.polyfit(np.log(sizes), np.log(errors), 1)[0] == pytest.approx(-0.5, abs=0.14)


class Quadratic(nn.Module):
    """f(x, y) = x w + y w^2 / 2: J is x at w = 0, and x + y at w = 1."""

    def __init__(self, P, w):
        super().__init__()
        self.w = nn.Parameter(torch.full((P,), w, dtype=torch.float64))

    def forward(self, both):
        x, y = both.chunk(2, 1)
        return (x @ self.w + y @ self.w**2 / 2)[:, None]


def prescribed(J, change=None):
    """A problem with a given J, and the exact metrics."""
    change = np.zeros_like(J) if change is None else change
    both = torch.from_numpy(np.concatenate([J, change], axis=1))
    problem = ntkbench.Kernel(Quadratic(J.shape[1], 0.0), both, dtype="float64").problem
    moved = {"w": np.ones(J.shape[1])}
    J_f = J + change
    return dataclasses.replace(problem, theta_f=moved, fixed_f=problem.fixed_0), metrics_of(J @ J.T, J_f @ J_f.T)


def columns(kind, n=20, P=4000):
    """J with columns of different sizes."""
    rng = np.random.default_rng(0)
    J, index = rng.normal(size=(n, P)), np.arange(1, P + 1)
    J[:, 0] *= {"one x10": 10, "one x20": 20, "one x1000": 1000}.get(kind, 1)
    J[:, :30] *= 5 if kind == "thirty x5" else 1
    J[:, 40:] *= 0 if kind == "forty only" else 1
    if kind == "tokens":  # rows of a table, few of which any sample uses
        J *= rng.random((n, P // 10)).repeat(10, axis=1) < 0.001
    if kind == "aligned":
        J[:, :100] = 8 * np.outer(rng.normal(size=n), rng.normal(size=100))
    if kind == "one sample":
        J[0] *= 30
    if kind == "heavy tails":
        J *= np.exp(1.5 * rng.normal(size=P))
    if kind.startswith("power"):
        J *= index ** -float(kind.split()[1])
    if kind == "a common direction":
        J += 1
    return J


def outcomes(name, problem, exact, metric, passes, seeds):
    """Seeds whose interval does not contain the exact metric, and notes of those whose error is unknown."""
    method = methods.get(name)
    ready, missed, said = method.prepare(problem, TARGET), [], []
    for seed in range(seeds):
        try:
            found = method.estimate(ready, metric, passes, seed)
        except Undefined as error:
            said.append(str(error))
            continue
        if math.isnan(found.standard_error):
            said.extend(note for note in found.notes if note.startswith("unknown error"))
        elif not found.covers(exact[metric], "float64"):
            missed.append(seed)
    return missed, said


EVEN = ("even", "a common direction", "power 0.1")
"""Kinds of columns that masks sample well."""
UNEVEN = (
    "one sample", "one x10", "one x20", "one x1000", "thirty x5", "forty only", "tokens", "aligned", "heavy tails",
    "power 0.2", "power 0.4", "power 0.7", "power 1", "power 2",
)  # fmt: skip


@pytest.mark.parametrize("metric", ["trace", "norm", "effective_rank"])
@pytest.mark.parametrize("kind", mostly_slow([*EVEN, *UNEVEN], {"even", "one x1000", "tokens"}))
def test_masked_intervals_cover_or_say_which_parameters_masks_miss(kind, metric):
    """Where few parameters have much of the gradient, masks that all miss them agree on too small a value."""
    problem, exact = prescribed(columns(kind))
    for passes in (64, 256, 1024):
        missed, said = outcomes("grass", problem, exact, metric, passes, 40)
        assert len(said) in (0, 40), "whether the error is known depends on J, not on the masks"
        assert len(missed) <= 7, (passes, missed)  # more than 7 of 40 have a probability of 0.06 % at 93 % coverage
        assert not said or kind not in EVEN
        assert all("of the trace is due to" in each for each in said)
        if kind == "one x1000":
            assert said


@pytest.mark.slow
@pytest.mark.parametrize("metric", ["trace", "norm", "effective_rank"])
@pytest.mark.parametrize("name", ["sparse_jl", "dense_jl"])
@pytest.mark.parametrize("kind", UNEVEN)
def test_projections_of_all_parameters_cover_whatever_their_gradients(kind, name, metric):
    problem, exact = prescribed(columns(kind, P=1000))
    missed, said = outcomes(name, problem, exact, metric, 256, 40)
    assert not said and len(missed) <= 7, missed


@pytest.mark.parametrize(("kind", "name"), [
    ("few columns", "the change of the kernel"), ("one large", "the change of the kernel"), ("heavy", "other trace"),
    ("even", ""),
])  # fmt: skip
def test_masks_that_miss_the_change_of_the_kernel_do_not_show_that_there_is_none(kind, name):
    rng = np.random.default_rng(0)
    J = rng.normal(size=(20, 4000))
    change = {
        "few columns": np.where(np.arange(4000) < 3, 5.0, 0.0) * rng.normal(size=J.shape),
        "one large": np.where(np.arange(4000) < 1, 5.0, 0.1) * rng.normal(size=J.shape),
        "heavy": np.where(np.arange(4000) < 1, 100.0, 0.1) * rng.normal(size=J.shape),
        "even": 0.3 * rng.normal(size=J.shape),
    }[kind]
    missed, said = outcomes("grass", *prescribed(J, change), "alignment", 256, 40 if kind == "even" else 10)
    assert len(missed) <= 7 and len(said) == (10 if name else 0)
    assert all(f"{name} is due to" in each for each in said)


def test_masks_of_an_embedding_are_not_trusted():
    """12 sentences of a vocabulary of 2000: each row of J has a gradient at few rows of the table."""
    torch.manual_seed(0)

    class Sentences(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.readout = nn.Embedding(2000, 16), nn.Linear(16, 3)

        def forward(self, x):
            return self.readout(torch.tanh(self.table(x)).mean(1))

    kernel = ntkbench.Kernel(Sentences().double(), torch.randint(0, 40, (12, 7)))
    for metric in ("trace", "norm", "effective_rank"):
        found = getattr(kernel, metric)(method="grass", seed=1)
        assert math.isnan(found.standard_error) and "of the trace is due to" in found.notes[-1]


def test_ordinary_networks_are_masked_without_a_note():
    for widths, N in (((10, 1000, 2), 10), ((64, 100, 10), 6)):
        torch.manual_seed(0)
        network = nn.Sequential(nn.Linear(*widths[:2]), nn.Tanh(), nn.Linear(*widths[1:]))
        for metric in ("trace", "norm", "effective_rank"):
            found = getattr(ntkbench.Kernel(network, torch.randn(N, widths[0])), metric)(method="grass", passes=512)
            assert found.standard_error > 0 and not found.notes


def test_masks_that_miss_the_gradient_do_not_show_that_theta_is_zero():
    """Two of 4000 parameters have a gradient, and each of 16 masks keeps eight."""
    x = torch.zeros(2, 4000, dtype=torch.float64)
    x[0, 7] = x[1, 9] = 1
    method = methods.get("grass")
    ready = method.prepare(ntkbench.from_module(nn.Linear(4000, 1, bias=False).double(), x, dtype="float64"), TARGET)
    for seed in range(10):
        found = method.estimate(ready, "norm", 16, seed)
        assert math.isnan(found.standard_error) and "100 % of the trace is due to" in found.notes[-1]
        with pytest.raises(Undefined, match=r"effective rank cannot be estimated: 100 % of the trace is due to"):
            method.estimate(ready, "effective_rank", 16, seed)


def test_masks_of_a_gradient_that_is_zero_are_exact():
    """The columns of J show that Theta is zero, whatever the masks keep."""
    method = methods.get("grass")
    linear = nn.Linear(4000, 1, bias=False).double()
    ready = method.prepare(ntkbench.from_module(linear, torch.zeros(2, 4000), dtype="float64"), TARGET)
    found = method.estimate(ready, "norm", 16)
    assert found.value == found.standard_error == 0 and not found.notes
    with pytest.raises(Undefined, match="zero"):
        method.estimate(ready, "effective_rank", 16)


def test_the_heaviest_parameters_are_those_that_masks_keep_a_few_times():
    """16 masks of 100 out of 10000 parameters keep 0.16 of each on average."""

    def missed(terms, hits=3.0):
        return projections.missed(np.array(terms), 100, 16, hits)

    even = np.ones(10000)
    assert missed(even) is None and missed(np.zeros(10000)) is None
    heavy = even.copy()
    heavy[7] = 1e4
    found = missed(heavy)
    assert found.number == 18 and found.share == pytest.approx((1e4 + 17) / (1e4 + 9999))
    assert missed(heavy, 5.0).number == 31
    assert missed(np.where(np.arange(10000) < 50, 1.0, 0.0)).share == pytest.approx(18 / 50)
    assert missed(np.full(10000, np.inf)).share == 1
    assert projections.missed(heavy, 10000, 16, 3.0) is None, "all parameters are kept"
    assert projections.missed(heavy, 2000, 16, 3.0) is None, "16 masks keep each parameter three times"


@pytest.mark.parametrize("name", UNBIASED)
def test_equal_weights_have_alignment_one(name):
    problem = smooth_problem()
    same = dataclasses.replace(problem, theta_f=problem.theta_0)
    method = methods.get(name)
    found = method.estimate(method.prepare(same, TARGET), "alignment", 128)
    assert found.value == pytest.approx(1) and found.complement == pytest.approx(0, abs=1e-9)


def test_features_take_the_passes_of_the_rows_whatever_their_number():
    for name in UNBIASED:
        found = methods.get(name).estimate(prepared(name), "norm", 200)
        assert found.passes == 2
        assert found.certificate < 1e-9


# --- approximations of Theta


def test_count_sketches_have_the_mean_of_the_trace_kernel():
    J = jacobians()[0]
    summed = np.einsum("aop,bop->ab", J.reshape(3, 2, -1), J.reshape(3, 2, -1))
    (j,) = prepared("count_sketch").jacobians("norm")
    found = [count_sketch.kernel(count_sketch.probed(j, 2, 8, seed)) for seed in range(SEEDS // 2)]
    assert abs(z_of(found, summed)).max() < 4.5


def test_count_sketch_is_that_of_the_gradients_of_the_probes():
    J = jacobians()[0].reshape(3, 2, -1)
    (j,) = prepared("count_sketch").jacobians("norm")
    v, S = j.rng(0).sign(3, 2).numpy(), projected.hashed(j, 1, 16, 0)(j.parameter_basis(0, j.P))[:, 0].numpy()
    np.testing.assert_allclose(count_sketch.probed(j, 3, 16), np.einsum("ro,nop,pw->rnw", v, J, S), atol=1e-12)


def kfac_by_hand(module, x):
    """A ⊗ B of each layer of an MLP of Linear and Tanh, by autograd row by row."""
    layers = [layer for layer in module if isinstance(layer, nn.Linear)]
    inputs, outputs, value = [], [], x
    for layer in module:
        if isinstance(layer, nn.Linear):
            inputs.append(torch.cat([value, torch.ones(len(x), 1, dtype=x.dtype)], 1).detach())
            value = layer(value)
            value.retain_grad()
            outputs.append(value)
        else:
            value = layer(value)
    found = [torch.zeros(out.shape[1], out.shape[1], dtype=x.dtype) for out in outputs]
    for o in range(value.shape[1]):
        grads = torch.autograd.grad(value[:, o].sum(), outputs, retain_graph=True)
        found = [b + g.T @ g for b, g in zip(found, grads, strict=True)]
    return [torch.kron(b, a.T @ a / len(x)) for a, b in zip(inputs, found, strict=True)], layers


@pytest.mark.parametrize("metric", ["trace", "norm", "effective_rank", "alignment"])
def test_kfac_is_the_kronecker_product_of_each_layer(metric):
    problem = smooth_problem()
    blocks = []
    for weights in (problem.theta_0, problem.theta_f):
        module = modules.copied(problem.module).double()
        modules.load(module, weights).requires_grad_()
        made, _ = kfac_by_hand(module, torch.from_numpy(problem.x).double())
        blocks.append(torch.block_diag(*made).detach().numpy())
    found = methods.get("kfac").estimate(prepared("kfac"), metric)
    assert found.value == pytest.approx(metrics_of(*blocks)[metric], rel=1e-9)


def test_kfac_is_exact_for_one_sample_and_one_layer_and_biased_elsewhere():
    torch.manual_seed(0)
    linear = nn.Linear(3, 2)
    weights = {name: w.detach().numpy() for name, w in linear.named_parameters()}
    one = Problem("one_layer", linear, torch.randn(1, 3).numpy(), weights)
    method = methods.get("kfac")
    exact = metrics_of((J := explicit_jacobian(one)) @ J.T)
    for metric in ("trace", "norm", "effective_rank"):
        assert method.estimate(method.prepare(one, TARGET), metric).value == pytest.approx(exact[metric])
    J = jacobians()[0]
    biased = method.estimate(prepared("kfac"), "norm").value
    assert biased != pytest.approx(metrics_of(J @ J.T)["norm"], rel=0.01)


def nearest_by_svd(J, shapes):
    """The nearest Kronecker product to the block of J^T J of each weight with its bias, by an SVD of each block."""
    found, start = [], 0
    for C, D in shapes:
        weight, bias = J[:, start : start + C * D].reshape(-1, C, D), J[:, start + C * D : start + C * (D + 1)]
        G = np.concatenate([weight, bias[:, :, None]], axis=2)
        arranged = np.einsum("rci,rdj->cdij", G, G).reshape(C * C, (D + 1) ** 2)
        U, s, V = np.linalg.svd(arranged)
        found.append(s[0] * np.kron(U[:, 0].reshape(C, C), V[0].reshape(D + 1, D + 1)))
        start += C * (D + 1)
    return scipy.linalg.block_diag(*found)


@functools.cache
def kfoc(backend):
    method = methods.get("kfoc")
    return method, method.prepare(smooth_problem(), Target(backend, "float64", "cpu"))


@pytest.mark.parametrize("backend", mostly_slow(["torch", "jax"], 1))
@pytest.mark.parametrize("metric", ["trace", "norm", "effective_rank", "alignment"])
def test_kfoc_is_the_nearest_kronecker_product_of_each_layer(metric, backend):
    problem = smooth_problem()
    shapes = [layer.weight.shape for layer in problem.module if isinstance(layer, nn.Linear)]
    blocks = [nearest_by_svd(J, shapes) for J in jacobians()]
    method, ready = kfoc(backend)
    found = method.estimate(ready, metric)
    assert found.value == pytest.approx(metrics_of(*blocks)[metric], rel=1e-7)
    assert found.passes == problem.O * len(blocks if metric == "alignment" else blocks[:1])


def test_kfoc_is_exact_for_kronecker_products_and_for_blocks_of_vectors():
    """A layer with one output of one sample; scales and shifts have a block each."""
    torch.manual_seed(0)
    linear, scales = nn.Linear(3, 1).double(), nn.Sequential(nn.LayerNorm(3), nn.Flatten()).double()
    for module, x in ((linear, torch.randn(1, 3)), (scales, torch.randn(4, 3))):
        found = ntkbench.norm(module, x.double(), method="kfoc", dtype="float64")
        J = explicit_jacobian(ntkbench.from_module(module, x.double()))
        blocks = [J] if module is linear else [J[:, :3], J[:, 3:]]
        assert found.value**2 == pytest.approx(sum(((b.T @ b) ** 2).sum() for b in blocks))


class Scaled(nn.Module):
    """The outputs of a linear layer, multiplied by its inputs."""

    def __init__(self, size=2):
        super().__init__()
        self.layer = nn.Linear(size, size, bias=False)

    def forward(self, x):
        return self.layer(x) * x


@pytest.mark.parametrize("second", [0.5, 0.9998, 0.9999999])
def test_kfoc_is_the_nearest_product_however_close_the_second_singular_value(second):
    """The rearranged block has the singular values 1 and second^4, and the nearest product has rank one."""
    problem = ntkbench.from_module(Scaled().double(), torch.diag(torch.tensor([1, second], dtype=torch.float64)))
    method = methods.get("kfoc")
    ready = method.prepare(problem, TARGET)
    for metric in ("trace", "norm", "effective_rank"):
        found = method.estimate(ready, metric)
        assert found.value == pytest.approx(1, rel=1e-6) and not found.notes
    (said,) = method.estimate(method.prepare(problem, dataclasses.replace(TARGET, dtype="float32")), "norm").notes or (
        "",
    )
    assert bool(said) == (second > 0.9)


@pytest.mark.parametrize("size", [2, 3, 12])
def test_kfoc_says_where_the_nearest_product_is_not_unique(size):
    """At equal inputs, every direction of the leading space gives a product that is as near."""
    problem = ntkbench.from_module(Scaled(size).double(), torch.eye(size, dtype=torch.float64))
    method = methods.get("kfoc")
    (said,) = method.estimate(method.prepare(problem, TARGET), "trace").notes
    assert said.startswith("layer.weight: the nearest Kronecker product is known to ") and "singular values" in said


def test_kfoc_says_where_it_ends_before_it_has_converged(monkeypatch):
    torch.manual_seed(0)
    problem = ntkbench.from_module(nn.Sequential(nn.Linear(30, 20), nn.Tanh(), nn.Linear(20, 9)), torch.randn(6, 30))
    method = methods.get("kfoc")
    ready = method.prepare(problem, TARGET)
    assert not method.estimate(ready, "norm").notes
    monkeypatch.setattr(type(method), "steps", 2)
    assert "the nearest Kronecker product is known to" in method.estimate(ready, "norm").notes[0]


@pytest.mark.parametrize(("C", "D", "held"), [(1, 7, 40), (9, 5, 40), (12, 20, 6)])
def test_the_leading_pair_of_a_layer_is_that_of_a_singular_value_decomposition(monkeypatch, C, D, held):
    method = methods.get("kfoc")
    monkeypatch.setattr(type(method), "held", held)
    G = np.random.default_rng(0).normal(size=(8, C, D)) * np.arange(1, D + 1) ** -0.5
    U, s, V = np.linalg.svd(np.einsum("rci,rdj->cdij", G, G).reshape(C * C, D * D))
    (a, b), gap, error = method._nearest(G, 1e-15)
    np.testing.assert_allclose(np.kron(b, a), s[0] * np.kron(U[:, 0].reshape(C, C), V[0].reshape(D, D)), atol=1e-8)
    assert error < 1e-6
    if C > 1:  # the second value has a smaller residual than it needs
        assert gap == pytest.approx(1 - s[1] / s[0], rel=0.2)
    nothing = method._nearest(np.zeros((8, C, D)), 1e-15)
    assert not nothing[0][0].any() or not nothing[0][1].any()
    assert nothing[2] == 0


# --- refusals


def refusal(name, module, x, passes=4096):
    weights = {key: w.detach().numpy() for key, w in module.named_parameters()}
    return methods.get(name).unsupported_reason(Problem("given", module, x.numpy(), weights), "norm", TARGET, passes)


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.one, self.other = nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)
        self.other.weight = self.one.weight

    def forward(self, x):
        return self.other(torch.tanh(self.one(x)))


def test_layers_that_are_not_covered_are_refused_by_name():
    x = torch.zeros(2, 3)
    assert refusal("kronecker_projection", Tied(), x) == (
        "projects each layer separately, and one.weight is also other.weight"
    )
    normalised = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(3, 2)))
    assert "computed from parameters" in refusal("kronecker_projection", normalised, x)
    scaled = nn.Sequential(nn.Linear(3, 3), nn.LayerNorm(3), nn.Linear(3, 2))
    assert refusal("kronecker_projection", scaled, x) is None
    assert refusal("kfac", scaled, x) == (
        "has rules for Linear and ungrouped Conv2d only, and 1.weight is of LayerNorm"
    )
    assert "one vector of outputs" in refusal("kfac", nn.Linear(3, 2), torch.zeros(2, 4, 3))


def test_layers_whose_factors_kfac_does_not_compute_are_refused_by_name():
    assert refusal("kfac", Tied(), torch.zeros(2, 3)) == (
        "treats each layer separately, and one.weight is also other.weight"
    )
    padded = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1, padding_mode="circular"), nn.Flatten())
    assert refusal("kfac", padded, torch.zeros(2, 1, 4, 4)) == (
        "has a rule for padding with zeros only, and that of 0.weight is circular"
    )
    with pytest.warns(FutureWarning):
        normalised = nn.Sequential(nn.utils.weight_norm(nn.Linear(3, 2)))
    assert "weights and biases only" in refusal("kfac", normalised, torch.zeros(2, 3))


class Called(nn.Module):
    """Two layers, and a function that applies them to sequences."""

    def __init__(self, call):
        super().__init__()
        self.layer, self.readout, self.call = nn.Linear(3, 3), nn.Linear(3, 2), call

    def forward(self, x):
        return self.readout(self.call(self.layer, x))


CALLS = {
    "one call": lambda layer, x: layer(x).tanh().mean(1),
    "all positions on one axis": lambda layer, x: layer(x.flatten(0, 1)).tanh().unflatten(0, (len(x), -1)).mean(1),
    "time first": lambda layer, x: layer(x.transpose(0, 1)).tanh().mean(0),
    "two calls": lambda layer, x: layer(layer(x).tanh()).mean(1),
    "no call": lambda layer, x: (x @ layer.weight.T + layer.bias).tanh().mean(1),
    "a call and another use": lambda layer, x: (layer(x) @ layer.weight).tanh().mean(1),
}


@pytest.mark.parametrize("kind", CALLS)
def test_kfac_takes_layers_that_are_called_once_on_the_samples(kind):
    torch.manual_seed(0)
    module = Called(CALLS[kind])
    weights = {name: w.detach().numpy() for name, w in module.named_parameters()}
    problem, method = Problem(kind, module, torch.randn(4, 5, 3).numpy(), weights), methods.get("kfac")
    if kind == "one call":
        assert method.estimate(method.prepare(problem, TARGET), "trace").value > 0
        return
    with pytest.raises(Unavailable, match=r"used in one call.*; layer is not"):
        method.prepare(problem, TARGET)


def test_too_few_features_are_refused_in_one_line():
    for name in UNBIASED:
        assert refusal(name, nn.Linear(3, 2), torch.zeros(2, 3), 3) is not None
        with pytest.raises(BadInput, match=f"{name}: "):
            methods.get(name).features(prepared(name), "norm", 1, 0)


def test_scales_shifts_tables_and_convolutions_are_projected_unbiased():
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Embedding(9, 8), nn.LayerNorm(8), nn.Unflatten(1, (1, 6)), nn.Conv2d(1, 4, 3), nn.Tanh(), nn.Flatten(),
        nn.Linear(96, 2),
    )  # fmt: skip
    weights = {key: w.detach().numpy() for key, w in module.named_parameters()}
    problem = Problem("mixed", module, torch.randint(9, (4, 6)).numpy(), weights)
    J = explicit_jacobian(problem)
    method = methods.get("kronecker_projection")
    ready = method.prepare(problem, TARGET)
    grams = [projections.gram(method.features(ready, "norm", 5 * 8 * 4, seed)[0][0]) for seed in range(SEEDS // 2)]
    assert abs(z_of(grams, J @ J.T)).max() < 4.5
    np.testing.assert_allclose(
        projections.gram(method.features(ready, "norm", 5 * 8 * 100**2, 0)[0][0]), J @ J.T, rtol=1e-9
    )


@pytest.mark.parametrize("d", [2, 4])
def test_features_of_grouped_convolutions_are_unbiased_and_as_many_as_those_of_one_group(d):
    """The first layer has one output and two inputs in each group: neither side is projected."""
    torch.manual_seed(0)
    groups = [nn.Conv1d(4, 4, 1, groups=4), nn.Conv1d(4, 6, 2, groups=2), nn.Conv1d(6, 6, 3, groups=6)]
    module = nn.Sequential(*(each for layer in groups for each in (layer, nn.Tanh())), nn.Flatten(), nn.Linear(6, 2))
    weights = {key: w.detach().numpy() for key, w in module.named_parameters()}
    problem = Problem("grouped", module, torch.randn(3, 4, 4).numpy(), weights)
    J = explicit_jacobian(problem)
    method = methods.get("kronecker_projection")
    ready, k = method.prepare(problem, TARGET), 4 * 8 * d**2
    found = [method.features(ready, "norm", k, seed)[0][0] for seed in range(SEEDS // 2)]
    assert found[0].shape[0] * found[0].shape[2] <= k
    assert abs(z_of([projections.gram(each) for each in found], J @ J.T)).max() < 4.5


# --- the study and its figure


@pytest.fixture(scope="module")
def table():
    given = {"problems": ["digits_conv[N=2]"], "k": [16, 32, 128], "passes": [8, 16], "seeds": 3, "calls": 1}
    made = studies.run("projections", studies.settings("projections", given | {"threads": 1, "device": "cpu"}))
    return made.assign(
        device="cpu", dtype="float32", threads=1, git_sha="0123456789", git_dirty=False, machine="a laptop"
    )


@pytest.mark.slow
def test_the_study_has_a_row_for_each_method_and_size(table):
    refused = table[table["status"] != "ok"]
    assert list(zip(refused["method"], refused["passes"], refused["status"], strict=True)) == [
        ("sample_subset", 8, "skipped")
    ], refused["reason"]
    assert set(table["method"]) == set(study.ALL)
    of = table.set_index(["method", "k"])
    for method in (*study.PROJECTIONS, study.SKETCH):
        assert of.loc[(method, 16), "gram_error"] > of.loc[(method, 128), "gram_error"] > 0
        assert of.loc[(method, 128), "bytes"] <= 20 * 128 * 4
    by = table.set_index("method")
    assert by.loc["structured_derivatives", "norm_plug_in"] < 1e-5
    assert 0 < by.loc["structured_derivatives", "gram_error"] < 1e-5
    assert pd.isna(by.loc["jacobian_contraction", "gram_error"]), "its kernel is never formed"
    assert by.loc["structured_sum_of_logits", "pntk_error"] < 1e-5 < by.loc["structured_sum_of_logits", "gram_error"]
    assert by.loc["trace_kernel", "gram_error"] <= by.loc["structured_sum_of_logits", "gram_error"]
    assert (by.loc["gram_forward", "norm_unbiased"] > 0).all()


@pytest.mark.slow
def test_the_figure_states_its_result(table, tmp_path):
    figures.draw("projections", table, tmp_path)
    said = (tmp_path / "projections.txt").read_text()
    assert len(said.splitlines()[0].split()) <= 61, "60 words and the name"
    assert "and most accurate: For the Gram matrix: " in said and "  3 seeds" in said
    assert len(pd.read_csv(tmp_path / "projections.csv")) == len(table) - 1  # a budget is refused


@pytest.mark.slow
def test_the_figure_keeps_its_contract(table):
    testing.check_figure("projections", table)


@pytest.mark.slow
def test_a_method_is_named_only_where_the_choice_is_certain(table):
    """It must be faster than every exact kernel, and more accurate than the other methods that are."""
    rows = table[table["status"] == "ok"]
    quartiles = {f"seconds_{end}": 1.0 for end in ("q25", "q75")}
    equal = rows.assign(seconds=1.0, calls=5, **quartiles)
    assert figure.choice(equal, "gram_error") == figure.NONE, "exact kernels are as fast"
    exact = equal["kind"] == "exact"
    slow = equal.assign(**{name: np.where(exact, 10.0, 1.0) for name in ("seconds", *quartiles)})
    best = slow["method"] == "dense_jl"
    for low, high, chosen in ((0.9, 1.1, "dense projection (JL)"), (0.2, 5.0, figure.SEVERAL)):
        error = np.where(best, 0.1, np.where(slow["gram_error"] > 0, 0.15, np.nan))
        given = slow.assign(gram_error=error, gram_error_low=low * error, gram_error_high=high * error)
        assert figure.choice(given, "gram_error") == chosen
    assert figure._title(equal) == "No projection is surely faster than the exact kernel on any of 1 problems"
    within = given.assign(gram_error_high=0.17)
    assert figure._title(within).endswith("on 1 of 1 problems, and give the Gram matrix to 17 % at best")


def on_problems(problems: dict[str, str], exact: float = 10.0) -> pd.DataFrame:
    """An exact kernel, and three projections that take a second; on each problem another one is the most accurate."""
    rows = []
    for problem, best in problems.items():
        for method in ("structured_derivatives", "dense_jl", "sparse_jl", "grass"):
            known = methods.get(method)
            row = {"problem": problem, "method": method, "title": known.title, "calls": 50, "seeds": 10, "n": 40}
            seconds = exact if known.kind == "exact" else 1.0
            row |= dict.fromkeys(("seconds", "seconds_q25", "seconds_q75"), seconds)
            error = float("nan") if known.kind == "exact" else 0.01 if method == best else 0.5
            for column in figure.VALUES:
                row |= {column: error, f"{column}_low": 0.9 * error, f"{column}_high": 1.1 * error}
            rows.append(row | {"kind": "exact" if known.kind == "exact" else "projection"})
    return pd.DataFrame(rows)


THREE = {"digits_mlp[N=4]": "dense_jl", "digits_conv[N=4]": "sparse_jl", "gru_hazelden[N=2]": "grass"}
"""The most accurate projections by problem."""


def test_the_caption_of_projections_has_at_most_sixty_words():
    said = figure._caption(on_problems(THREE))
    assert len(said.split()) <= 60 and said.count(" on ") == 6, "on each problem, for both errors"
    assert "dense projection (JL) on digits MLP" in said
    long = {f"digits_mlp[N={N},width=300]": best for N, best in enumerate(THREE.values())}
    assert len(figure._caption(on_problems(long)).split()) <= 60


def test_projections_are_compared_only_where_an_exact_kernel_was_measured():
    rows = on_problems(THREE)
    lost = (rows["problem"] == "digits_conv[N=4]") & (rows["kind"] == "exact")
    assert figure.choice(rows[~lost & (rows["problem"] == "digits_conv[N=4]")], "norm") == figure.UNCOMPARED
    assert figure._caption(rows[~lost]).count("not compared on digits conv") == 2
    assert "on 2 of 2 problems" in figure._title(rows[~lost])
    assert "Projected gradients" in figure._title(rows[rows["kind"] != "exact"])


def test_where_no_projection_is_surely_faster_none_is_named():
    rows = on_problems(THREE, exact=1.0)
    assert "For the Gram matrix: none. For the norm: none." in figure._caption(rows)
    assert figure._title(rows) == "No projection is surely faster than the exact kernel on any of 3 problems"


@pytest.mark.slow
def test_biases_of_deterministic_methods_are_those_of_their_estimates(table):
    by = table[table["status"] == "ok"].set_index("method")
    problem = problems.load("digits_conv[N=2]")
    exact = metrics_of((J := explicit_jacobian(problem)) @ J.T)
    for name in ("kfac", "kfoc", "trace_kernel"):
        method = methods.get(name)
        ready = method.prepare(problem, dataclasses.replace(TARGET, dtype="float32"))
        for metric in ("trace", "norm", "effective_rank"):
            found = method.estimate(ready, metric).value / exact[metric] - 1
            assert by.loc[name, f"{metric}_bias"] == pytest.approx(found, abs=1e-4)
    assert abs(by.loc["trace_kernel", "trace_bias"]) < 1e-5 < abs(by.loc["kfac", "trace_bias"])
    assert (
        by.loc["kfac", "kernel"] == "K-FAC's approximation of J^T J" and by.loc["dense_jl", "kernel"].eq("Theta").all()
    )


def test_intervals_of_errors_cover_over_seeds():
    """Root mean squares of 5 errors each, of normal errors with standard deviation 1."""
    rng = np.random.default_rng(0)
    made = [study._rms("error", list(rng.normal(size=20))) for _ in range(400)]
    inside = [each["error_low"] <= 1 <= each["error_high"] for each in made]
    assert 0.9 < np.mean(inside) < 0.99
    assert study._rms("error", [0.0, 0.0]) == {"error": 0, "error_low": 0, "error_high": 0}


@pytest.mark.parametrize(("factor", "error"), [(1.0, 1e-6), (1.1, 0.1)])
def test_the_error_of_an_exact_kernel_is_measured(monkeypatch, factor, error):
    problem = smooth_problem()
    settings = studies.settings("projections", {"threads": 1, "device": "cpu", "seeds": 2, "calls": 1})
    truth = study.Truth(problem, tuple(J @ J.T for J in jacobians()))
    full, compute = sample_kernels.get("full"), sample_kernels.SampleKernel.compute

    def scaled(self, *given, **named):
        return compute(self, *given, **named) * (factor if self is full else 1.0)

    monkeypatch.setattr(sample_kernels.SampleKernel, "compute", scaled)
    found = {}
    for name in ("structured_derivatives", "jacobian_contraction"):
        ready = studies.base.Once(functools.partial(methods.get(name).prepare, problem, settings.target()))
        found[name] = study._fixed(settings, studies.base.Once(lambda: truth), ready, name)
    for column in ("gram_error", "pntk_error"):
        assert 0 < found["structured_derivatives"][column] == pytest.approx(error, abs=1e-6)
        assert column not in found["jacobian_contraction"], "its kernel is never formed"
    assert {row["bytes"] for row in found.values()} == {6 * 6 * 4}


def test_networks_that_a_method_does_not_cover_are_skipped_with_a_reason():
    """More outputs than features, more layers than features, and layers without a rule; not failures."""
    torch.manual_seed(0)
    problem = problems.load("transformer_flipflop[N=2]")
    settings = studies.settings("projections", {"threads": 1, "device": "cpu", "seeds": 2, "k": [16, 32], "calls": 1})
    exact = studies.base.Once(lambda: SimpleNamespace(problem=problem))  # its kernels are not needed for a refusal
    for name, said in {
        "dense_jl": "k must be at least",
        "sparse_jl": "k must be at least",
        "kronecker_projection": "k must be at least",
        "kfac": "takes one vector of outputs per sample",
    }.items():
        ready = studies.base.Once(functools.partial(methods.get(name).prepare, problem, settings.target()))
        with pytest.raises(Unavailable, match=said):
            if name == "kfac":
                study._fixed(settings, exact, ready, name)
            else:
                study._projection(settings, exact, ready, name, 16, 0)
    small = settings.model_copy(update={"limits": settings.limits.model_copy(update={"memory_mb": 1})})
    with pytest.raises(OverMemory, match="would hold"):
        study._check(small, problem, "kfoc")


@pytest.mark.slow
def test_the_page_has_the_largest_number_of_features(table):
    said = readme.projections(SimpleNamespace(read=lambda _: table))
    row = table[(table["method"] == "dense_jl") & (table["k"] == 128)].iloc[0]
    (line,) = (line for line in said.splitlines() if "`dense_jl`" in line)
    assert "k = 128" in line and percent_label(row["gram_error"]) in line and "| Theta |" in line
    (line,) = (line for line in said.splitlines() if "`kfac`" in line)
    assert f"| {percent_label(table.set_index('method').loc['kfac', 'trace_bias'])} |" in line
