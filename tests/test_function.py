"""Functions in JAX with pytrees of parameters: their kernels and metrics against an explicit J, and refusals."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import subprocess
import sys

import numpy as np
import pytest
from conftest import metrics_of, mostly_slow

import ntkbench
from ntkbench import methods, problems
from ntkbench.ambient import own_jax_settings
from ntkbench.errors import BadInput
from ntkbench.layerwise import sample_kernels
from ntkbench.metrics import METRICS
from ntkbench.operators import certificate, check_result, jax_kernel, linearise, neural_tangents, programs
from ntkbench.operators.certificate import Uncertified
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base import function
from ntkbench.problems.base.function import from_function, with_columns

jax = pytest.importorskip("jax")
import jax.numpy as jnp  # noqa: E402

# neural-tangents is archived and uses deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore:No Jacobian rule found")

TARGET = Target("jax", "float64", "cpu")


# Functions, inputs and parameters


def rng(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


def dense(seed: int, inputs: int, outputs: int) -> dict[str, np.ndarray]:
    w = rng(seed).standard_normal((inputs, outputs)) / inputs**0.5
    return {"w": w, "b": rng(seed + 100).standard_normal(outputs)}


def mlp(params, x):
    for layer in params["hidden"]:
        x = jnp.tanh(x @ layer["w"] + layer["b"])
    return x @ params["last"]["w"] + params["last"]["b"]


def mlp_params(seed: int = 0):
    return {"hidden": [dense(seed, 3, 5), dense(seed + 1, 5, 4)], "last": dense(seed + 2, 4, 2)}


def nested(params, x):
    (a, (b, c)), (d,) = params
    return jnp.stack([jnp.sin(x @ a) @ c, jnp.cos(x @ b) @ c * d], axis=1)


def nested_params(seed: int = 0):
    draw = rng(seed).standard_normal
    return [[draw((3, 4)), (draw((3, 4)), draw(4))], [np.float64(draw())]]


@jax.tree_util.register_pytree_node_class
class Frozen:
    """An immutable container, like those of flax; its leaves have no keys."""

    def __init__(self, values, scale):
        self._values, self.scale = dict(values), scale

    def __getitem__(self, key):
        return self._values[key]

    def tree_flatten(self):
        return tuple(self._values.values()), (tuple(self._values), self.scale)

    @classmethod
    def tree_unflatten(cls, kept, leaves):
        keys, scale = kept
        return cls(zip(keys, leaves, strict=True), scale)


def frozen(params, x):
    return params.scale * jax.nn.softplus(x @ params["kernel"]) @ params["out"]["kernel"]


def frozen_params(seed: int = 0):
    draw = rng(seed).standard_normal
    return Frozen({"kernel": draw((3, 4)), "out": Frozen({"kernel": draw((4, 2))}, 1.0)}, 0.5)


def several(params, x):
    seen = jnp.tanh(x["image"].reshape(len(x["image"]), -1) @ params["image"])
    read = params["table"][x["words"]].mean(1)
    return jnp.concatenate([seen, read], 1) @ params["x.words"]


def several_params(seed: int = 0):
    draw = rng(seed).standard_normal
    return {"image": draw((4, 3)), "table": draw((7, 2)), "x.words": draw((5, 2))}


def several_inputs(N: int, seed: int = 0):
    return {"image": rng(seed).standard_normal((N, 2, 2)), "words": rng(seed).integers(0, 7, (N, 3))}


def constant(params, x):
    """Selected inputs, with indices, an activation and a random key among the leaves."""
    noise = jax.random.normal(params["key"], (4,))
    return params["act"](x[:, params["chosen"]] @ params["w"] + noise) * params["times"] + (params["on"] & True)


def constant_params(seed: int = 0):
    w = rng(seed).standard_normal((2, 4))
    return {"act": jnp.tanh, "chosen": np.array([0, 2]), "key": jax.random.key(1), "on": True, "times": 3, "w": w}


def conv(params, x):
    for kernel in params["kernels"]:
        x = jax.lax.conv_general_dilated(x, kernel, (1, 1), "SAME", dimension_numbers=("NHWC", "HWIO", "NHWC"))
        x = jax.nn.relu(x + params["shift"])
    return x.mean((1, 2)) @ params["w"]


def conv_params(seed: int = 0):
    draw = rng(seed).standard_normal
    return {"kernels": (draw((3, 3, 2, 3)), draw((3, 3, 3, 3)) / 3), "shift": draw(3), "w": draw((3, 2))}


def scan(params, x):
    step = lambda h, u: (h := jnp.tanh(h @ params["w"] + u[:, None] * params["b"]), h)  # noqa: E731
    return jax.lax.scan(step, jnp.zeros((len(x), 3), x.dtype), x.T)[1].transpose(1, 0, 2)


def scan_params(seed: int = 0):
    return {"w": rng(seed).standard_normal((3, 3)), "b": rng(seed).standard_normal(3)}


def rows(*shape: int):
    return lambda N, seed=0: rng(seed).standard_normal((N, *shape))


CASES = {
    "dicts": (mlp, mlp_params, rows(3)),
    "lists": (nested, nested_params, rows(3)),
    "frozen": (frozen, frozen_params, rows(3)),
    "several inputs": (several, several_params, several_inputs),
    "constants": (constant, constant_params, rows(3)),
    "convolutions": (conv, conv_params, rows(4, 4, 2)),
    "scan": (scan, scan_params, rows(2)),
}


def jacobian(f, x, params) -> np.ndarray:
    """J by one plain ``jax.vjp`` pass per output, with respect to all arrays of real numbers; columns by leaf."""
    leaves, structure = jax.tree.flatten(params)
    real = [i for i, leaf in enumerate(leaves) if getattr(getattr(leaf, "dtype", None), "kind", "") == "f"]

    def of(theta):
        filled = dict(enumerate(leaves)) | dict(zip(real, theta, strict=True))
        return f(jax.tree.unflatten(structure, filled.values()), x).reshape(-1)

    with own_jax_settings("float64"):
        outputs, pull = jax.vjp(of, [jnp.asarray(leaves[i], "float64") for i in real])
        gradients = [pull(unit)[0] for unit in jnp.eye(outputs.size)]
        return np.stack([np.concatenate([np.asarray(part).reshape(-1) for part in row]) for row in gradients])


X = rows(3)(4)
W = {"w": rng().standard_normal((3, 2))}


def linear(params, x):
    return x @ params["w"]


@functools.cache
def wrapped(name: str) -> Problem:
    """A problem of four samples with two sets of parameters."""
    f, params, inputs = CASES[name]
    return from_function(f, inputs(4), params(0), params(7))


@functools.cache
def case(name: str) -> tuple[Problem, np.ndarray, np.ndarray]:
    """The problem, and J at both sets of parameters."""
    f, params, inputs = CASES[name]
    return wrapped(name), *(jacobian(f, inputs(4), params(seed)) for seed in (0, 7))


def close(found, expected, tolerance: float = 1e-10) -> bool:
    found, expected = np.asarray(found), np.asarray(expected)
    return found.shape == expected.shape and abs(found - expected).max() <= tolerance * abs(expected).max()


# Kernels


@pytest.mark.parametrize("name", CASES)
@pytest.mark.slow
def test_every_way_gives_the_kernel_of_the_explicit_jacobian(name):
    problem, J, _ = case(name)
    assert not problem.samples_interact
    for way in jax_kernel.ways(problem):
        assert close(way(problem, None, None, False, TARGET), J @ J.T), way


@pytest.mark.slow
@pytest.mark.parametrize("name", ["dicts", "several inputs"])
def test_every_way_gives_the_kernel_between_two_sets_of_inputs(name):
    f, params, inputs = CASES[name]
    problem, J, _ = case(name)
    J2 = jacobian(f, inputs(3, seed=5), params(0))
    wide, columns = with_columns(problem, inputs(3, seed=5))
    for way in jax_kernel.ways(wide, columns):
        assert close(way(wide, columns, None, False, TARGET), J @ J2.T), way


@pytest.mark.parametrize("kind", mostly_slow(["sum_of_logits", "random_vector", "trace"], {"random_vector", "trace"}))
def test_kernels_between_samples(kind):
    f, params, inputs = CASES["dicts"]
    problem, J, _ = case("dicts")
    J2 = jacobian(f, inputs(3, seed=5), params(0))
    kernel = sample_kernels.get(kind)
    drawn = None if kernel.directions is None else kernel.directions(problem.O, 3)
    blocks = np.einsum("aop,bqp->aobq", *(each.reshape(-1, problem.O, problem.P) for each in (J, J2)))
    u = np.eye(problem.O) if drawn is None else drawn
    exact = np.einsum("ko,aobq,kq->ab", u, blocks, u) / (problem.O if kernel.averaged else 1)
    wide, columns = with_columns(problem, inputs(3, seed=5))
    for way in jax_kernel.ways(wide, columns):
        assert close(way(wide, columns, drawn, kernel.averaged, TARGET), exact), way


@pytest.mark.parametrize(("N", "N2", "K", "memory"), [(1, 4, 1, 1), (4, 1, 3, 1000), (3, 2, 2, 2**30)])
@pytest.mark.slow
def test_rows_of_any_sizes(N, N2, K, memory):
    f, params, inputs = linear, lambda: W, rows(3)
    x, x2, u = inputs(N), inputs(N2, seed=5), rng(K).standard_normal((K, 2))
    problem = from_function(f, x, params())
    J, J2 = (np.einsum("ko,bop->bkp", u, jacobian(f, at, params()).reshape(len(at), 2, -1)) for at in (x, x2))
    target = dataclasses.replace(TARGET, memory=memory)
    found = jax_kernel.sample_by_sample(problem, x2, u, False, target)
    assert close(found, J.reshape(N * K, -1) @ J2.reshape(N2 * K, -1).T)
    found = jax_kernel.row_by_row(problem, None, u, True, target)
    assert close(found, np.einsum("akp,bkp->ab", J, J) / K)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_precision_and_settings_are_those_of_the_problem_not_of_the_caller(dtype):
    problem, J, _ = case("dicts")
    weights = {key: w.astype(dtype) for key, w in problem.theta_0.items()}
    problem = dataclasses.replace(problem, x=problem.x.astype(dtype), theta_0=weights)
    before = jax.config.read("jax_enable_x64")
    with jax.numpy_rank_promotion("raise"), jax.numpy_dtype_promotion("strict"), own_jax_settings(dtype):
        kernels = [way(problem, None, None, False, Target("jax", dtype, "cpu")) for way in jax_kernel.ways(problem)]
    assert {kernel.dtype.name for kernel in kernels} == {dtype}
    assert all(close(kernel, J @ J.T, 1e-10 if dtype == "float64" else 1e-5) for kernel in kernels)
    assert jax.config.read("jax_enable_x64") == before


@pytest.mark.slow
def test_arrays_that_a_function_makes_in_float64_do_not_change_the_precision():
    jax.config.update("jax_enable_x64", True)
    f = lambda params, x: mlp(params, x) + jnp.zeros(2)  # noqa: E731
    x, (_, J, _) = rows(3)(4).astype("float32"), case("dicts")
    problem = from_function(f, x, jax.tree.map(lambda w: w.astype("float32"), mlp_params()))
    target = Target("jax", "float32", "cpu")
    for way in jax_kernel.ways(problem):
        found = way(problem, None, None, False, target)
        assert found.dtype == "float32" and close(found, J @ J.T, 1e-5)
    assert linearise(problem, "theta_0", target).row(0).dtype == "float32"


# Metrics


EXACT = ("nt_structured_derivatives", "nt_jacobian_contraction", "nt_ntk_vector_products", "direct")
ESTIMATED = tuple(
    name
    for name in methods.names()
    if "jax" in methods.get(name).backends
    and methods.get(name).kind == "stochastic"
    and not methods.get(name).needs_recurrence
)


@pytest.mark.parametrize("name", ["several inputs", "constants"])
@pytest.mark.parametrize("method", EXACT)
@pytest.mark.slow
def test_exact_metrics(name, method):
    problem, *ends = case(name)
    truth = metrics_of(*(J @ J.T for J in ends))
    prepared = methods.get(method).prepare(problem, TARGET)
    for metric in METRICS:
        assert methods.get(method).unsupported_reason(problem, metric, TARGET) is None
        found = methods.get(method).estimate(prepared, metric)
        assert found.value == pytest.approx(truth[metric], rel=1e-9)
        assert found.certificate < 1e-9


@pytest.mark.parametrize("method", ESTIMATED)
@pytest.mark.slow
def test_estimated_metrics(method):
    problem, *ends = case("several inputs")
    truth = metrics_of(*(J @ J.T for J in ends))
    chosen = methods.stochastic(method)
    prepared = chosen.prepare(problem, TARGET)
    for metric in chosen.metrics:
        budget = max(chosen.least_passes(problem, metric), 400)
        assert chosen.unsupported_reason(problem, metric, TARGET, budget) is None
        found = chosen.estimate(prepared, metric, budget, seed=1)
        assert found.certificate < 1e-9
        assert abs(found.value - truth[metric]) <= max(6 * found.standard_error, 0.1 * truth[metric])


def test_sum_of_logits_is_the_kernel_of_that_name():
    problem, J, _ = case("dicts")
    method = methods.get("sum_of_logits")
    G = J.reshape(problem.N, problem.O, -1).sum(1) / problem.O**0.5
    exact = np.trace(G @ G.T) * problem.O
    assert method.estimate(method.prepare(problem, TARGET), "trace").value == pytest.approx(exact, rel=1e-9)


def test_methods_in_torch_say_that_there_is_no_network():
    problem = wrapped("dicts")
    for name in methods.names():
        method = methods.get(name)
        if "torch" in method.backends:
            said = method.unsupported_reason(problem, method.given[0], Target("torch"))
            assert said == "the problem has no network in torch"
    with pytest.raises(BadInput, match="has no network in torch; allowed backends for it: jax"):
        linearise(problem, "theta_0", Target("torch"))
    with pytest.raises(BadInput, match="use kernel='trace'"):
        problems.base.module.last_layer(problem)


# Custom and wrong derivatives


@jax.custom_vjp
def clipped(x):
    return jnp.clip(x, -1, 1)


clipped.defvjp(lambda x: (clipped(x), None), lambda _, g: (3 * g,))


def test_jvps_of_custom_vjps_take_two_reverse_passes():
    f = lambda params, x: clipped(x @ params["w"]) @ params["v"]  # noqa: E731
    params = {"w": rng().standard_normal((3, 5)), "v": rng(1).standard_normal((5, 2))}
    x = rows(3)(4)
    problem, J = from_function(f, x, params), jacobian(f, x, params)
    found = methods.get("direct").estimate(methods.get("direct").prepare(problem, TARGET), "norm")
    assert found.value == pytest.approx(metrics_of(J @ J.T)["norm"], rel=1e-9)
    assert "each JVP is computed by two reverse passes" in " ".join(found.notes)
    assert found.passes == 3 * problem.n
    j = linearise(problem, "theta_0", TARGET)
    w = rng(2).standard_normal((2, 4, problem.P))
    assert j.sample_jvp(slice(0, 4), jnp.asarray(w)).shape == (2, 4, 2)
    assert j.passes == 2 * 2 and "each per-sample JVP" in " ".join(j.notes)


@jax.custom_vjp
def armed(x):
    return x


armed.defvjp(lambda x: (x, None), lambda _, g: (1.5 * g if isinstance(g, jax.core.Tracer) else g,))


def test_products_that_contradict_plain_vjp_are_refused():
    """A derivative that is different under jit and vmap, which leaves plain ``jax.vjp``."""
    f = lambda params, x: armed(jnp.tanh(x @ params["w"])) @ params["v"]  # noqa: E731
    params = {"w": rng().standard_normal((3, 5)), "v": rng(1).standard_normal((5, 2))}
    problem = from_function(f, rows(3)(4), params)
    *ways, last = jax_kernel.ways(problem)
    for way in ways:
        with pytest.raises(Uncertified):
            way(problem, None, None, False, TARGET)
    plain = lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"]  # noqa: E731
    J = jacobian(plain, rows(3)(4), params)
    assert close(last(problem, None, None, False, TARGET), J @ J.T)
    chosen = methods.stochastic("per_sample_trace")
    with pytest.raises(Uncertified):
        chosen.estimate(chosen.prepare(problem, TARGET), "trace", 8)
    with pytest.raises(Uncertified):
        methods.get("nt_jacobian_contraction").estimate(
            methods.get("nt_jacobian_contraction").prepare(problem, TARGET), "norm"
        )


def test_a_wrong_kernel_by_neural_tangents_is_refused(monkeypatch):
    problem = wrapped("dicts")
    real = jax_kernel.programs.kernel_function
    for off in (lambda theta: 1.01 * theta, lambda theta: theta.at[0, 1].mul(2), lambda theta: theta * np.nan):
        wrong = lambda *given, off=off: lambda *arguments: off(real(*given)(*arguments))  # noqa: E731
        monkeypatch.setattr(jax_kernel.programs, "kernel_function", wrong)
        for averaged in (False, True):
            jax_kernel._compiled.cache_clear()
            with pytest.raises(Uncertified):
                jax_kernel.jacobian_contraction(problem, None, None, averaged, TARGET)
    jax_kernel._compiled.cache_clear()


@pytest.mark.parametrize("metric", METRICS)
def test_a_wrong_metric_by_neural_tangents_is_refused(metric, monkeypatch):
    problem = wrapped("dicts")
    real = jax_kernel.programs.kernel_function
    wrong = lambda *given: lambda *arguments: 1.01 * real(*given)(*arguments)  # noqa: E731
    monkeypatch.setattr(jax_kernel.programs, "kernel_function", wrong)
    method = methods.get("nt_jacobian_contraction")
    with pytest.raises(Uncertified):
        method.estimate(method.prepare(problem, TARGET), metric)


def test_without_neural_tangents_its_methods_say_so_and_kernels_go_by_rows(monkeypatch):
    problem, J, _ = case("dicts")
    monkeypatch.setattr(neural_tangents, "is_installed", lambda: False)
    neural_tangents.load.cache_clear()
    jax_kernel._compiled.cache_clear()
    structured, contraction, *by_rows = jax_kernel.ways(problem)
    for way in (structured, contraction):
        with pytest.raises(ntkbench.Unavailable, match="not installed"):
            way(problem, None, None, False, TARGET)
    assert all(close(way(problem, None, None, False, TARGET), J @ J.T) for way in by_rows)


@pytest.mark.parametrize("lacking", mostly_slow(["the package", "the analysis of memory"], 1))
def test_kernels_go_by_rows_without_neural_tangents_or_the_analysis_of_memory(lacking, monkeypatch):
    _, J, _ = case("dicts")
    theta, y = J @ J.T, np.ones((4, 2))
    if lacking == "the package":
        monkeypatch.setattr(neural_tangents, "is_installed", lambda: False)
        neural_tangents.load.cache_clear()
    else:
        monkeypatch.setattr(jax.stages.Compiled, "memory_analysis", lambda self: None)
    jax_kernel._compiled.cache_clear()
    kernel = ntkbench.Kernel(mlp, rows(3)(4), params=mlp_params())
    assert close(kernel.ntk(), theta)
    largest = np.linalg.eigvalsh(theta)[:4:-1]
    assert close(kernel.eigenvalues(3).values, largest, 1e-8)
    assert close(kernel.spectrum(3).values, largest, 1e-8)
    assert close(kernel.solve(y, ridge=1.0).values.reshape(-1), np.linalg.solve(theta + np.eye(8), y.reshape(-1)), 1e-4)
    assert float(kernel.trace()) == pytest.approx(np.trace(theta))


@pytest.mark.slow
def test_programs_over_the_memory_budget_are_not_run(monkeypatch, tmp_path):
    _, J, _ = case("dicts")
    run, compiled = [], programs.compile_within
    monkeypatch.setattr(programs, "compile_within", lambda *given: run.append(compiled(*given)) or run[-1])
    jax_kernel._compiled.cache_clear()
    x, params = rows(3)(4), mlp_params()
    small = ntkbench.Kernel(mlp, x, params=params, memory=500)  # the arguments of a program take more
    assert close(small.ntk(), J @ J.T) and close(small.ntk(file=tmp_path / "theta.npy"), J @ J.T)
    with pytest.raises(ntkbench.OverMemory, match=r"for mlp would need .* GiB, over the budget"):
        small.trace(method="nt_structured_derivatives")
    assert not run
    assert close(ntkbench.ntk(mlp, x, params=params), J @ J.T) and run


@pytest.mark.slow
def test_the_precision_of_the_process_is_not_changed_on_a_gpu(monkeypatch):
    changed = []
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.config, "update", lambda name, value: changed.append(name))
    x, params = rows(3)(4), mlp_params()
    kernel = ntkbench.Kernel(mlp, x, params=params)
    kernel.trace(), kernel.ntk(), kernel.spectrum()
    assert "jax_default_matmul_precision" not in changed
    linearise(from_function(mlp, x, params), "theta_0", Target("jax", "float32"))
    assert "jax_default_matmul_precision" in changed, "as in measurements, which have no settings of their own"


@pytest.mark.slow
def test_a_row_does_not_depend_on_the_residuals_of_the_forward_pass():
    """The boolean mask of a relu comes first among the residuals; a linear function has none."""
    for f in (lambda p, x: jax.nn.relu(x @ p["w"]), lambda p, x: jnp.broadcast_to(p["w"].sum(0), (len(x), 2))):
        params, x = {"w": rng().standard_normal((3, 2))}, rows(3)(4)
        J = jacobian(f, x, params)
        j = linearise(from_function(f, x, params), "theta_0", TARGET)
        assert all(close(j.row(i), J[i]) for i in np.flatnonzero(abs(J).max(1)))


# Samples that interact


def normed(params, x):
    hidden = x @ params["w"]
    return jnp.tanh((hidden - hidden.mean(0)) / (1 + hidden.std(0))) @ params["v"]


def attending(params, x):
    """Samples interact through a term whose gate starts at zero."""
    return x @ params["w"] + (jax.nn.softmax(x @ x.T) @ x) @ params["w"] * params["gate"].sum()


@pytest.mark.parametrize("f", [normed, attending])
@pytest.mark.slow
def test_interacting_samples_are_detected_and_go_by_rows(f):
    params = {"w": rng().standard_normal((3, 2)), "v": rng(1).standard_normal((2, 2)), "gate": np.zeros(2)}
    x = rows(3)(5)
    problem, J = from_function(f, x, params, params), jacobian(f, x, params)
    assert problem.samples_interact
    (way,) = jax_kernel.ways(problem)
    assert close(way(problem, None, None, False, TARGET), J @ J.T)
    with pytest.raises(BadInput, match="samples interact"):
        jax_kernel.ways(problem, x)
    method = methods.stochastic("hutchinson")
    truth = metrics_of(J @ J.T, J @ J.T)
    found = method.estimate(method.prepare(problem, TARGET), "trace", 400)
    assert abs(found.value - truth["trace"]) <= 6 * found.standard_error
    assert "samples interact" in methods.get("per_sample_trace").unsupported_reason(problem, "trace", TARGET)


def test_samples_that_only_seem_to_interact_are_independent():
    f = lambda params, x: x @ params["w"] + 0 * x.sum() * params["w"].sum()  # noqa: E731
    assert not from_function(f, rows(3)(5), {"w": rng().standard_normal((3, 2))}).samples_interact
    assert not from_function(normed, rows(3)(1), {"w": np.ones((3, 2)), "v": np.ones((2, 2))}).samples_interact


# The wrapped problem


def test_leaves_are_named_by_their_paths_and_sorted_into_kinds():
    problem = wrapped("dicts")
    assert list(problem.theta_0) == [
        *(f"hidden.{i}.{key}" for i in (0, 1) for key in ("b", "w")),
        *(f"last.{key}" for key in ("b", "w")),
    ]
    assert (problem.name, problem.module, problem.N, problem.O, problem.fixed_0) == ("mlp", None, 4, 2, {})
    problem = wrapped("constants")
    assert set(problem.theta_0) == {"w"} and set(problem.fixed_0) == {"chosen"}
    problem = wrapped("several inputs")
    assert set(problem.theta_0) == {"image", "table", "x.words"} and problem.x.shape == (4, 4 + 3)
    single = from_function(lambda w, x: x @ w, rows(3)(2), *(rng(seed).standard_normal((3, 2)) for seed in range(2)))
    assert set(single.theta_0) == set(single.theta_f) == {"params"} and single.name == "function"


def test_parameters_that_are_one_array_are_told_from_a_target():
    f = lambda w, x: jnp.tanh(x @ w)  # noqa: E731
    ends = [rng(seed).standard_normal((3, 2)) for seed in range(2)]
    thetas = [J @ J.T for J in (jacobian(f, X, w) for w in ends)]
    found = ntkbench.Kernel(f, X, params=ends[0]).alignment(ends[1])
    assert float(found) == pytest.approx(metrics_of(*thetas)["alignment"])
    kernel = ntkbench.Kernel(f, X[:3], params=ends[0])  # its outputs have the shape of its parameters
    for use in (kernel.alignment, kernel.metrics):
        with pytest.raises(BadInput, match=r"\(3, 2\) may be .* a target: .* or a target as \(6,\) or"):
            use(ends[1])
    thetas = [J @ J.T for J in (jacobian(f, X[:3], w) for w in ends)]
    assert float(kernel.alignment(kernel.at(ends[1]))) == pytest.approx(metrics_of(*thetas)["alignment"])


def test_collections_other_than_the_parameters_need_a_selection():
    """As the running statistics among the variables of a Flax module."""
    f = lambda variables, x: linear(variables["params"], x) - variables["batch_stats"]["mean"]  # noqa: E731
    variables = {"params": W, "batch_stats": {"mean": np.zeros(2)}}
    with pytest.raises(BadInput, match=r"collections params, batch_stats: give parameters='params'.*'\*' for all"):
        ntkbench.trace(f, X, params=variables)
    for J, selected in ((jacobian(linear, X, W), "params"), (jacobian(f, X, variables), "*")):
        assert float(ntkbench.trace(f, X, params=variables, parameters=selected)) == pytest.approx((J**2).sum())
    groups = ntkbench.trace(f, X, params=variables, parameters={"trained": "params", "mean": "batch_stats"})
    assert sum(map(float, groups.values())) == pytest.approx((J**2).sum())


def test_the_memory_of_a_product_includes_the_branches_of_a_condition():
    plain = lambda params, x: jnp.tanh(linear(params, x))  # noqa: E731
    either = lambda params, x: jax.lax.cond(x.sum() > 0, lambda: plain(params, x), lambda: linear(params, x))  # noqa: E731
    one, two = (linearise(from_function(f, X, W), "theta_0", TARGET).bytes_per_probe() for f in (plain, either))
    assert two > one


@pytest.mark.slow
def test_colliding_names_are_distinguished():
    params = {"a.b": rng(0).standard_normal((3, 2)), "a": {"b": rng(1).standard_normal((3, 2))}}
    f = lambda p, x: jnp.sin(x @ p["a.b"]) * (x @ p["a"]["b"])  # noqa: E731
    problem, J = from_function(f, rows(3)(2), params), jacobian(f, rows(3)(2), params)
    assert len(problem.theta_0) == 2
    assert close(jax_kernel.sample_by_sample(problem, None, None, False, TARGET), J @ J.T)


def test_values_are_copied():
    params, x = mlp_params(), rows(3)(4)
    problem, own = from_function(mlp, x, params), x.copy()
    before = {key: w.copy() for key, w in problem.theta_0.items()}
    params["last"]["w"] += 1
    x += 1
    assert all((problem.theta_0[key] == before[key]).all() for key in before)
    assert (problem.x == own).all()


def test_precision_is_that_of_the_parameters_unless_it_is_given():
    params = jax.tree.map(lambda w: w.astype("float32"), mlp_params())
    assert from_function(mlp, rows(3)(4), params).x.dtype == "float32"
    assert from_function(mlp, rows(3)(4), params, dtype="float64").theta_0["last.w"].dtype == "float64"
    half = jax.tree.map(lambda w: jnp.asarray(w, "bfloat16"), params)
    with pytest.raises(BadInput, match="parameters are bfloat16; choose the precision"):
        from_function(mlp, rows(3)(4), half)
    with pytest.raises(BadInput, match="parameters are float32, float64; choose"):
        from_function(mlp, rows(3)(4), params | {"last": mlp_params()["last"]})
    assert from_function(mlp, rows(3)(4), half, dtype="float32").theta_0["last.w"].dtype == "float32"


@pytest.mark.slow
def test_equal_functions_share_compiled_programs_unless_they_have_changed():
    params, x = mlp_params(), rows(3)(4)
    first, second = (from_function(mlp, x, mlp_params(seed)).jax_forward for seed in (0, 1))
    assert first == second and hash(first) == hash(second)
    outside = {}
    f = lambda params, x: outside["scale"] * mlp(params, x)  # noqa: E731
    for outside["scale"] in (1.0, 2.0, 3.0):
        problem, J = from_function(f, x, params), jacobian(f, x, params)
        for way in jax_kernel.ways(problem):
            assert close(way(problem, None, None, False, TARGET), J @ J.T)
    unhashable = {"w": rng().standard_normal((3, 2)), "on": [jax.random.key(0)]}
    assert from_function(lambda p, x: x @ p["w"], x, unhashable).jax_forward is not None


@pytest.mark.slow
def test_a_second_call_compiles_nothing(monkeypatch):
    compiled = []
    monkeypatch.setattr(programs, "lower", lambda *a, lower=programs.lower: compiled.append(a) or lower(*a))
    x = rows(3)(4)
    f = lambda params, x: 3 * mlp(params, x)  # noqa: E731
    for seed in (0, 1):
        params = mlp_params(seed)
        for metric in (ntkbench.trace, ntkbench.norm):
            assert metric(f, x, params=params).method == "nt_structured_derivatives"
        if seed == 0:
            first, traced = len(compiled), function._gradient.cache_info().misses
    assert len(compiled) == first > 0 and function._gradient.cache_info().misses == traced


@pytest.mark.slow
def test_a_function_whose_gradients_alone_have_changed_is_compiled_again():
    stopped, params, x = {}, mlp_params(), rows(3)(4)

    def f(params, x):
        last = jax.lax.stop_gradient(params["last"]) if stopped["on"] else params["last"]
        return mlp({**params, "last": last}, x)

    for stopped["on"] in (False, True, False):
        J = jacobian(f, x, params)
        for metric in ("trace", "norm"):
            found = getattr(ntkbench, metric)(f, x, params=params)
            assert float(found) == pytest.approx(metrics_of(J @ J.T)[metric], rel=1e-4), (stopped, found)


def test_a_closure_that_changes_a_small_output_or_few_samples_is_traced_again():
    outside, x, params = {}, rows(3)(12), {"w": rng().standard_normal((3, 5)), "v": rng(1).standard_normal((5, 2))}
    table = np.ones(2)
    x[:, 0] = np.arange(12) - 8.0

    def f(params, x):
        gate = jnp.where(x[:, :1] > 1, outside["scale"], 1.0) * table
        return jnp.concatenate([1e6 + x @ params["w"][:, :1], gate * (jnp.tanh(x @ params["w"]) @ params["v"])], 1)

    forwards = []
    for outside["scale"], table[-1] in ((1.0, 1.0), (2.0, 1.0), (1.0, 3.0), (1.0, 1.0)):
        problem, J = from_function(f, x, params), jacobian(f, x, params)
        found = methods.get("nt_jacobian_contraction")
        estimate = found.estimate(found.prepare(problem, TARGET), "trace")
        assert float(estimate) == pytest.approx(metrics_of(J @ J.T)["trace"], rel=1e-9), outside
        forwards.append(problem.jax_forward)
    assert forwards[0] == forwards[3] and len(set(forwards)) == 3


def test_a_function_that_changes_few_samples_is_traced_again_at_other_parameters():
    outside, x = {"scale": 1.0}, np.random.default_rng(0).uniform(-1, 0, (40, 3))
    x[17, 0] = 5
    f = lambda p, x: jnp.where(x[:, :1] > 1, outside["scale"], 1.0) * jnp.tanh(x @ p["w"])  # noqa: E731
    kernel = ntkbench.Kernel(f, x, params={"w": np.ones((3, 1))})
    unchanged = kernel.at({"w": np.full((3, 1), 2.0)})
    assert unchanged.problem.jax_forward == kernel.problem.jax_forward
    kernel.trace(method="nt_jacobian_contraction")
    outside["scale"], params = 100.0, {"w": np.full((3, 1), 0.5)}
    J = jacobian(f, x, params)
    assert float(kernel.at(params).trace(method="nt_jacobian_contraction")) == pytest.approx((J**2).sum(), rel=1e-9)
    outside["scale"] = None
    with pytest.raises(BadInput, match="f cannot be differentiated at these parameters"):
        kernel.at(params)


def test_a_function_that_has_changed_is_checked_again_at_other_parameters():
    outside, x = {}, rows(3)(5)

    def f(params, x):
        hidden = jnp.tanh(x @ params["w"])
        kinds = {"alone": hidden, "mean": hidden - hidden.mean(0), "narrow": hidden[:, :1], "infinite": hidden / 0}
        return kinds[outside["as"]]

    outside["as"] = "alone"
    kernel = ntkbench.Kernel(f, x, params=W)
    for outside["as"] in ("mean", "narrow"):
        J, other = jacobian(f, x, W), kernel.at(W)
        assert other.problem.samples_interact == (outside["as"] == "mean") and other.problem.n == len(J)
        assert float(other.norm()) == pytest.approx(metrics_of(J @ J.T)["norm"], rel=1e-9)
    outside["as"] = "infinite"
    with pytest.raises(BadInput, match="f returns nan or infinite outputs"):
        kernel.at(W)


def test_wrong_kernels_of_equal_samples_are_detected(monkeypatch):
    """The quadratic form of a kernel of equal rows is zero for signs that cancel."""
    signs = certificate.random_signs(64, np.empty(0))
    N = 1 + int(np.flatnonzero(np.cumsum(signs) == 0)[0])
    x, params = np.repeat(rows(3)(1), N, 0), {"w": rng().standard_normal((3, 1))}
    J = jacobian(linear, x, params)
    for metric, method in (("trace", "nt_jacobian_contraction"), ("norm", "nt_structured_derivatives")):
        found = getattr(ntkbench, metric)(linear, x, params=params, method=method)
        assert float(found) == pytest.approx(metrics_of(J @ J.T)[metric], rel=1e-5)
    problem, original = from_function(linear, x, params), programs.kernel_function

    def wrong(*arguments):
        kernel = original(*arguments)
        return lambda weights, x1, x2=None: 3 * kernel(weights, x1, x2)

    monkeypatch.setattr(programs, "kernel_function", wrong)
    for directions in (None, np.eye(1)):
        with pytest.raises(Uncertified):
            jax_kernel.structured_derivatives(problem, None, directions, False, TARGET)


def test_a_function_with_a_comparison_that_fails_is_unlike_all_others():
    @dataclasses.dataclass
    class Scaled:
        scale: np.ndarray

        def __hash__(self):
            return 7

        def __call__(self, params, x):
            return linear(params, x) * self.scale

    for scale in (2.0, 2.0, 3.0):  # equal traces have equal hashes, so the first two are compared
        f = Scaled(np.array([scale, 1.0]))
        J = jacobian(f, X, W)
        assert close(ntkbench.ntk(f, X, params=W), J @ J.T)


def test_the_certificate_of_a_trace_is_of_random_samples(monkeypatch):
    """A wrong program that is right for the first samples."""
    original = programs.kernel_function

    def wrong(*arguments):
        kernel = original(*arguments)
        return lambda weights, x1, x2=None: kernel(weights, x1, x2) * jnp.where(jnp.arange(len(x1)) < 16, 1, 2)

    monkeypatch.setattr(programs, "kernel_function", wrong)
    problem = from_function(lambda params, x: jnp.sin(linear(params, x)[:, :1]), rows(3)(64), W)
    method = methods.get("nt_jacobian_contraction")
    with pytest.raises(Uncertified):
        method.estimate(method.prepare(problem, TARGET), "trace")


@pytest.mark.slow
def test_the_digest_follows_function_parameters_inputs_and_constants():
    f, params, inputs = CASES["several inputs"]
    other = lambda p, x: 2 * f(p, x)  # noqa: E731
    digests = [
        from_function(f, inputs(4), params()).digest(),
        from_function(f, inputs(4), params(1)).digest(),
        from_function(f, inputs(4, 1), params()).digest(),
        from_function(other, inputs(4), params()).digest(),
        from_function(f, inputs(4), params(), params(1)).digest(),
    ]
    assert len(set(digests)) == 5
    assert digests[0] == from_function(f, inputs(4), params()).digest()
    x = rows(3)(100)
    last = lambda p, inputs: mlp(p, inputs) * (1 + (inputs == x[-1]).all(1))[:, None]  # noqa: E731
    assert len({from_function(g, x, mlp_params()).digest() for g in (mlp, last)}) == 2


def test_the_shape_of_outputs_needs_no_computation():
    problem = wrapped("several inputs")
    assert dataclasses.replace(problem, _shape=[]).output_shape == (4, 2)


def test_a_result_that_does_not_fit_in_memory_is_refused():
    with pytest.raises(ntkbench.OverMemory, match="GiB are free"):
        check_result(10**9, 10**9, TARGET)
    check_result(10, 10, TARGET)


# Precision


def in_float32(*leaves: np.ndarray) -> list[np.ndarray]:
    return [leaf.astype("float32") for leaf in leaves]


def dropped(params, x):
    """Another network in float64, where the key draws another mask."""
    mask = jax.random.bernoulli(jax.random.key(0), 0.5, (12,))
    return (jnp.tanh(x @ params["w"]) * mask) @ params["v"]


def dropped_params():
    w, v = in_float32(rng().standard_normal((3, 12)), rng(1).standard_normal((12, 1)))
    return {"w": w, "v": v}


def test_solutions_are_of_the_function_in_its_own_precision():
    params, (x, x2) = dropped_params(), in_float32(rows(3)(5), rows(3)(2, 1))
    with own_jax_settings("float32"):
        masked = np.asarray(jax.random.bernoulli(jax.random.key(0), 0.5, (12,)))
    same = lambda params, x: (jnp.tanh(x @ params["w"]) * masked) @ params["v"]  # noqa: E731
    J, J2, y = jacobian(same, x, params), jacobian(same, x2, params), rng(3).standard_normal((5, 1))
    kernel = ntkbench.Kernel(dropped, x, params=params)
    expected = np.linalg.solve(J @ J.T + 5 * np.eye(5), y)
    assert kernel._precise().dtype == "float32"
    assert ntkbench.Kernel(same, x, params=params)._precise().dtype == "float64"
    assert close(kernel.solve(y, ridge=5).values, expected, 1e-4)
    assert close(kernel.regress(x2, y, ridge=5).values, J2 @ J.T @ expected, 1e-4)


def test_a_function_that_is_another_one_in_the_precision_asked_for_is_refused():
    (x,) = in_float32(rows(3)(5))
    with pytest.raises(BadInput, match="something else in float64 than in float32, the precision of its arguments"):
        from_function(dropped, x, dropped_params(), dtype="float64")
    from_function(dropped, x, jax.tree.map(np.float64, dropped_params()))


STAMPS = 1.7e9 + 40.0 * np.arange(8)[:, None]
"""Time stamps, which float32 rounds to multiples of 128."""


def since(params, x):
    return jnp.tanh((x - params["start"]) / 100 * params["w"])


def since_a_constant(params, x):
    return jnp.tanh((x - 1.7e9) / 100 * params["w"])


def test_precisions_that_round_the_arguments_of_a_function_are_refused():
    """Parameters and inputs are compared before they are rounded."""
    start = {"start": np.array([1.7e9])}
    wide, narrow = ({"w": np.ones(1, dtype)} for dtype in ("float64", "float32"))
    for f, params in ((since_a_constant, wide), (since, wide | start), (since, narrow | start)):
        with pytest.raises(BadInput, match="something else in float32 than in float64, the precision of its arguments"):
            from_function(f, STAMPS, params, dtype="float32")
    mixed = ntkbench.ntk(since, STAMPS, params=narrow | start, dtype="float64")
    assert close(mixed, ntkbench.ntk(since, STAMPS, params=wide | start))
    with jax.enable_x64(True), pytest.raises(BadInput, match="something else in float32 than in float64"):
        from_function(since_a_constant, STAMPS, narrow)
    with jax.enable_x64(False):
        assert from_function(since_a_constant, STAMPS, narrow).x.dtype == "float32", "as JAX itself rounds"


@pytest.mark.parametrize("N", [2, 6, 8])
def test_gradients_that_random_signs_cancel(N):
    """J is a column of ones."""
    f = lambda params, x: jnp.tanh(x) + params["b"]  # noqa: E731
    x, params = np.arange(float(N))[:, None], {"b": np.zeros(1)}
    assert not from_function(f, x, params).samples_interact
    for dtype in ("float32", "float64"):
        assert close(ntkbench.ntk(f, x, params=params, dtype=dtype), np.ones((N, N)), 1e-6)


def test_interaction_is_measured_in_a_precision_with_the_same_function():
    """Samples interact in float32 alone."""

    def f(params, x):
        hidden = x @ params["w"]
        return jnp.tanh(hidden - hidden.mean(0) if x.dtype == "float32" else hidden) @ params["v"]

    (x,) = in_float32(rows(3)(5))
    assert from_function(f, x, dropped_params()).samples_interact
    assert not from_function(f, x, jax.tree.map(np.float64, dropped_params())).samples_interact


MIXED = {
    "float32 inside": (lambda p, x: jnp.tanh(x.astype("float32") @ p["w"].astype("float32")), "float64", 1e-6),
    "bfloat16 inside": (lambda p, x: jnp.tanh(x.astype("bfloat16") @ p["w"].astype("bfloat16")), "float32", 0.1),
}


@pytest.mark.parametrize("case", MIXED)
def test_mixed_precision_goes_by_plain_vjp(case):
    f, dtype, tolerance = MIXED[case]
    x, w = (each.astype(dtype) for each in (rows(3)(4), W["w"]))
    J = jacobian(lambda p, x: jnp.tanh(x @ p["w"]), x, {"w": w})
    assert float(ntkbench.trace(f, x, params={"w": w})) == pytest.approx(metrics_of(J @ J.T)["trace"], rel=tolerance)
    assert close(ntkbench.ntk(f, x, params={"w": w}), J @ J.T, tolerance)


@jax.custom_vjp
def limited(x):
    return x


limited.defvjp(lambda x: (x, None), lambda _, g: (g / jnp.maximum(1, jnp.linalg.norm(g)),))


def test_a_clipped_gradient_goes_row_by_row():
    f = lambda params, x: limited(jnp.tanh(x @ params["w"])) @ params["v"]  # noqa: E731
    params = {"w": rng().standard_normal((3, 5)), "v": 3 * rng(1).standard_normal((5, 2))}
    x = rows(3)(4)
    J = jacobian(f, x, params)
    found = ntkbench.norm(f, x, params=params)
    assert (found.method, found.standard_error) == ("naive_jacobian", None)
    assert float(found) == pytest.approx(metrics_of(J @ J.T)["norm"])
    with pytest.raises(Uncertified, match="not linear in the cotangent"):
        ntkbench.trace(f, x, params=params, method="one_sided_reverse", passes=4)


def test_a_network_with_a_torch_module_is_not_certified_by_its_own_vjp():
    module = ntkbench.testing.smooth_problem("twin", 3, 4, 5, 2)
    assert not linearise(module, "theta_0", TARGET)._next_way("vjp", "differs")


def test_scans_in_float64_have_their_own_precision():
    def f(params, x):
        step = lambda h, t: (h + 0.1 * jnp.tanh(h @ params["w"] + t), None)  # noqa: E731
        return jax.lax.scan(step, x, jnp.linspace(0.0, 1.0, 11))[0]

    params, x = {"w": rng().standard_normal((3, 3))}, rows(3)(4)
    problem, J = from_function(f, x, params), jacobian(f, x, params)
    assert programs.longest_scan(problem) == 11
    assert float(ntkbench.trace(f, x, params=params)) == pytest.approx(metrics_of(J @ J.T)["trace"])
    failing = dataclasses.replace(problem, jax_forward=lambda weights, x: 1 / 0)
    assert programs.longest_scan(failing) == 1


def test_jvps_that_take_two_passes_count_in_a_budget():
    def f(params, x):
        hidden = clipped(x @ params["w"])
        return hidden - hidden.mean(0)

    params, x = {"w": rng().standard_normal((3, 3))}, rows(3)(5)
    problem, J = from_function(f, x, params), jacobian(f, x, params)
    assert problem.P < problem.n < 2 * problem.P
    found = ntkbench.norm(f, x, params=params, method="batched_jacobian")
    assert (found.passes, float(found)) == (problem.n, pytest.approx(metrics_of(J @ J.T)["norm"]))
    assert ntkbench.norm(f, x, params=params, passes=12).passes <= 12
    assert ntkbench.norm(f, rows(3)(7), params=params, method="batched_jacobian").passes == 2 * problem.P


def test_interaction_is_measured_again_at_other_flags():
    def f(params, x):
        hidden = x @ params["w"]
        return jnp.tanh(hidden - jnp.where(params["train"], hidden.mean(0), 0.0))

    kernel = ntkbench.Kernel(f, X, params=W | {"train": np.array(False)})
    training = kernel.at(W | {"train": np.array(True)})
    assert training.problem.samples_interact and not kernel.problem.samples_interact
    assert not training.at(W | {"train": np.array(False)}).problem.samples_interact
    with pytest.raises(BadInput, match="samples interact"):
        training.regress(X, np.ones((4, 2)), ridge=1.0)


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_seeds_beyond_32_bits_have_their_own_streams(dtype):
    j = linearise(from_function(linear, X, W, dtype=dtype), "theta_0", Target("jax", dtype, "cpu"))
    with own_jax_settings(dtype):
        streams = [np.asarray(j.rng(seed).normal(1, 8)) for seed in (1, 1 + 2**32, 1 + 2**33)]
        key = jax.random.split(jax.random.key(1))[1]
        assert np.array_equal(streams[0], jax.random.normal(key, (1, 8), dtype))
    assert all((one != other).all() for one, other in itertools.combinations(streams, 2))


def test_a_transfer_guard_of_the_caller_does_not_matter():
    with jax.transfer_guard("disallow"):
        assert ntkbench.trace(linear, X, params=W).standard_error is None


TWO_DEVICES = """
import os
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=2"
import jax, jax.numpy as jnp, numpy as np, ntkbench
scale = jax.device_put(jnp.ones(2), jax.devices()[1])
try:
    ntkbench.ntk(lambda w, x: x @ w * scale, np.ones((4, 3)), params=np.ones((3, 2)))
except ntkbench.BadInput as error:
    print(error)
"""


@pytest.mark.slow
def test_arrays_on_another_device_are_named():
    done = subprocess.run([sys.executable, "-c", TWO_DEVICES], capture_output=True, text=True, check=True)
    assert "f closes over arrays on cpu:1, and is computed on cpu:0" in done.stdout


# Refusals


class Counter:
    calls = 0

    def __call__(self, params, x):
        self.calls += 1
        return linear(params, x) * self.calls


class Complex:
    @staticmethod
    def parts(params, x):
        return jnp.exp(1j * linear(params, x))


REFUSED = {
    "f must be a function": (None, X, W),
    "no arrays of real numbers": (linear, X, {"w": np.ones((3, 2), int)}),
    "an array of complex128; allowed are real numbers.*real and imaginary": (linear, X, {"w": W["w"] * 1j}),
    "'scale', a Python float: make it an array": (linear, X, W | {"scale": 2.0}),
    "'w' is a torch Tensor": (linear, X, {"w": pytest.importorskip("torch").ones(3, 2)}),
    "'x' is a torch Tensor": (linear, pytest.importorskip("torch").ones(4, 3), W),
    "nan or infinite values: 'w'": (linear, X, {"w": W["w"] * np.inf}),
    "'0.0' is of type int": (linear, [[1, 2, 3]], W),
    "one without leaves": (linear, [], W),
    "at least one sample": (linear, X[:0], W),
    "x must be real or integer; 'x' is complex128": (linear, X * 1j, W),
    "the same number of samples": (lambda p, x: x["a"] @ p["w"], {"a": X, "b": X[:2]}, W),
    r"cannot be called as f\(params, x\): TypeError": (lambda p: p, X, W),
    "one array .*got tuple: wrap it": (lambda p, x: (linear(p, x), 0), X, W),
    r"a row for each of the N = 4 samples, got shape \(2, 4\)": (lambda p, x: linear(p, x).T, X, W),
    r"got shape \(\)": (lambda p, x: linear(p, x).sum(), X, W),
    "must return real numbers, got complex": (Complex.parts, X, W),
    "must return real numbers, got bool": (lambda p, x: linear(p, x) > 0, X, W),
    "nan or infinite outputs": (lambda p, x: linear(p, x) / 0, X, W),
    "random or keeps a state": (Counter(), X, W),
    "cannot be compiled by jax.jit": (lambda p, x: linear(p, x) if linear(p, x).sum() > -1e9 else x, X, W),
    "no output of f depends": (lambda p, x: jax.lax.stop_gradient(linear(p, x)), X, W),
    "cannot be differentiated": (
        lambda p, x: jax.lax.while_loop(lambda y: y.sum() < 1, lambda y: y + 1 + p["w"].sum() ** 2, linear(p, x)),
        X,
        W,
    ),
    "f donates its arguments": (jax.jit(lambda p, x: p["w"] + x, donate_argnums=0), X[:3, :2], W),
    "unknown dtype 'float16'": (functools.partial(linear), X, W, None, "float16"),
    "'n' has integers beyond 16777216, which float32 cannot hold": (
        lambda p, x: linear(p, x["x"]) * x["n"][:, None],
        {"x": X, "n": np.full(4, 2**24 + 1)},
        W,
        None,
        "float32",
    ),
    "the same structure": (linear, X, W, {"v": W["w"]}),
    r"the same arrays; 'w' is \(3, 2\) of float64 and \(3, 3\) of float64": (linear, X, W, {"w": np.ones((3, 3))}),
    "the same arrays; 'v' is .* and no array": (linear, X, W | {"v": X}, W | {"v": "none"}),
    "only in the values of arrays; 'act' differs": (linear, X, W | {"act": np.sin}, W | {"act": np.cos}),
    "f with params_f returns nan": (lambda p, x: linear(p, x) / (p["w"][0, 0] + 7), X, W, {"w": np.full((3, 2), -7.0)}),
}


@pytest.mark.parametrize("said", REFUSED)
@pytest.mark.filterwarnings("ignore:divide by zero")
def test_invalid_functions_are_refused_in_one_line(said):
    f, x, params, *more = REFUSED[said]
    params_f, dtype = (*more, None, None)[:2]
    with pytest.raises(BadInput, match=said) as caught:
        from_function(f, x, params, params_f, dtype=dtype)
    assert len(str(caught.value).splitlines()) == 1


def test_arrays_that_are_not_differentiated_cannot_be_selected():
    with pytest.raises(BadInput, match="matches only frozen parameters: allowed are arrays of real numbers"):
        ntkbench.ntk(linear, X, params=W | {"i": np.arange(3)}, parameters="i")


def test_values_that_are_being_traced_are_refused():
    with pytest.raises(BadInput, match=r"no values to copy at 'w', as inside jax\.jit"):
        jax.jit(lambda w: from_function(linear, X, {"w": w}).x)(W["w"])


def test_columns_must_be_like_the_rows():
    problem = wrapped("several inputs")
    good = several_inputs(2)
    for wrong, said in (
        (good["image"], "a pytree like the first"),
        (good | {"image": good["image"][:, :1]}, "samples like the first"),
        (good | {"words": good["words"] * 1.0}, "samples like the first"),
        (good | {"words": good["words"] > 0}, "samples like the first"),
        (good | {"words": good["words"][:1]}, "the same number of samples"),
    ):
        with pytest.raises(BadInput, match=said):
            with_columns(problem, wrong)
    assert with_columns(wrapped("dicts"), X)[1].shape == (4, 3)


WITHOUT_JAX = """
import sys
import ntkbench, torch
ntkbench.trace(torch.nn.Linear(3, 2), torch.ones(4, 3))
import ntkbench.problems.base.function
assert not {"jax", "neural_tangents"} & set(sys.modules)
sys.modules["jax"] = None
import importlib.util
importlib.util.find_spec = lambda name, package=None: None
try:
    ntkbench.from_function(lambda params, x: x, 1, 2)
except ntkbench.Unavailable as error:
    assert "needs jax, which is not installed; install it with: pip install '.[jax]'" in str(error)
else:
    raise AssertionError
"""


@pytest.mark.slow
def test_jax_is_imported_only_for_functions_and_reported_if_missing():
    subprocess.run([sys.executable, "-c", WITHOUT_JAX], check=True)


def test_kernels_in_parts_show_samples_that_interact(monkeypatch, tmp_path):
    """A batch takes no more than 16 samples; parts of the kernel in a file, and checks of the function, have fewer."""
    monkeypatch.setattr(function, "TOGETHER", 8)

    def crowded(p, x):
        return jnp.tanh(x @ p["a"]) * (jnp.arange(len(x)) < 16)[:, None] @ p["b"]

    params, x = {"a": rng().normal(size=(4, 8)), "b": rng(1).normal(size=(8, 2))}, rows(4)(20)
    J = jacobian(crowded, x, params)
    kernel = ntkbench.Kernel(crowded, x, params=params, memory=20_000)
    assert not kernel.problem.samples_interact
    assert close(kernel.ntk(file=tmp_path / "theta.npy"), J @ J.T)
    part = jax_kernel.in_parts(jax_kernel.structured_derivatives, kernel.problem, None, None, False, kernel._target)
    with pytest.raises(Uncertified, match="samples interact"):
        part(slice(0, 10), slice(0, 10))


def test_gradients_that_are_not_finite_are_no_interaction():
    """The square root has no gradient at zero."""
    params, x = {"a": rng().normal(size=(4, 3))}, rows(4)(5)
    kernel = ntkbench.Kernel(lambda p, x: jnp.sqrt((x @ p["a"] * (x @ p["a"] > 0)) ** 2), x, params=params)
    assert not kernel.problem.samples_interact
    with pytest.raises(BadInput, match="not finite"):
        kernel.trace()
    with pytest.raises(BadInput, match="nan or infinite"):
        kernel.regress(x, np.ones((5, 3)), ridge=0.1)
