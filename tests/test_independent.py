"""Agreement with independent libraries: curvlinops for PyTorch, matfree for JAX.

Their operators are built independently (or by plain ``jax.vjp`` and ``jax.jvp``). Estimators that exist on both sides
get the same probes, so that results agree to round-off and not just on average.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator
from typing import Any

import curvlinops
import jax
import jax.numpy as jnp
import matfree.decomp
import matfree.funm
import matfree.stochtrace
import numpy as np
import pytest
import torch
from conftest import loaded
from jax.flatten_util import ravel_pytree
from test_deflation import SPECTRA, Dense, drawn, jacobian

from ntkbench import methods
from ntkbench.estimators import lanczos
from ntkbench.operators import JacobianOperator, Rng, linearise
from ntkbench.options import Target

PROBLEMS = ("wide", "gru_hazelden[N=2,T=2]", "digits_conv[N=3]")
"""More outputs than parameters, a recurrent network, and a convolution."""
K = 6


class Given(Rng):
    """Probes that were drawn beforehand."""

    def __init__(self, *blocks: Any) -> None:
        self._blocks = iter(blocks)

    def normal(self, k: int, dim: int) -> Any:
        block = next(self._blocks)
        assert block.shape == (k, dim)
        return block

    sign = normal


def probes(kind: str, k: int, dim: int, seed: int = 0) -> np.ndarray:
    rng = np.random.default_rng(seed)
    return rng.standard_normal((k, dim)) if kind == "normal" else rng.choice([-1.0, 1.0], (k, dim))


class Ready:
    """An operator instead of a prepared problem, with probes that were drawn beforehand."""

    def __init__(self, j: JacobianOperator, *blocks: Any) -> None:
        self._j, self._blocks = j, blocks

    def jacobians(self, metric: str) -> list[JacobianOperator]:
        j = self._j.fresh()
        j.rng = lambda seed: Given(*self._blocks)
        return [j]


def ours(name: str, metric: str, j: JacobianOperator, *blocks: Any) -> tuple[float, float]:
    """Value and standard error of a method on given probes."""
    method = methods.get(name)
    estimate = method.estimate(Ready(j, *blocks), metric, method.cost(metric, len(blocks[0])))
    return estimate.value, estimate.standard_error


# --- PyTorch: curvlinops


def torch_operators(label: str) -> tuple[JacobianOperator, Any]:
    """J of a problem, in float64: ours and theirs."""
    problem = loaded(label)
    module = copy.deepcopy(problem.module).double()
    weights = problem.weights("theta_0")
    with torch.no_grad():
        for key, w in module.named_parameters():
            w.copy_(torch.from_numpy(weights[key]))
    batch = torch.from_numpy(problem.x).double(), torch.zeros(problem.output_shape, dtype=torch.float64)
    theirs = curvlinops.JacobianLinearOperator(module, list(module.parameters()), [batch])
    return linearise(problem, "theta_0", Target("torch", "float64", "cpu")), theirs


@contextlib.contextmanager
def draws(*blocks: torch.Tensor) -> Iterator[None]:
    """Make curvlinops, which draws one probe at a time, draw the rows of these blocks."""
    rows = iter(torch.cat(blocks))
    modules = ("trace.hutchinson", "trace.meyer2020hutch", "trace.epperly2024xtrace", "norm.hutchinson")
    with pytest.MonkeyPatch.context() as patch:
        for module in modules:
            patch.setattr(f"curvlinops.{module}.random_vector", lambda *_: next(rows))
        yield
    assert next(rows, None) is None, "not all probes were used"


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-9 * float(other.abs().max()))


@pytest.mark.parametrize("label", PROBLEMS)
def test_products_are_those_of_curvlinops(label):
    j, theirs = torch_operators(label)
    assert theirs.shape == (j.n, j.P)
    u, w = (torch.from_numpy(probes("normal", 3, dim)) for dim in (j.n, j.P))
    close(j.vjp(u), (theirs.adjoint() @ u.T).T)
    close(j.jvp(w), (theirs @ w.T).T)
    close(j.ntk(u), (theirs @ theirs.adjoint() @ u.T).T)


def test_generalised_gauss_newton_is_that_of_curvlinops(load):
    """For half the sum of squared residuals it is J^T J, and the trace of that is Theta's."""
    problem = load("tanh_net")
    j, theirs = torch_operators("tanh_net")
    x, y = next(iter(theirs._data))
    loss = torch.nn.MSELoss(reduction="sum")
    ggn = curvlinops.GGNLinearOperator(theirs._model_func, loss, list(theirs._params), [(x, y)])
    w = torch.from_numpy(probes("normal", 3, j.P))
    close(2 * j.vjp(j.jvp(w)), (ggn @ w.T).T)
    whole = methods.get("jacobian_contraction")
    trace = whole.estimate(whole.prepare(problem, Target("torch", "float64", "cpu")), "trace").value
    assert torch.trace(ggn @ torch.eye(j.P, dtype=torch.float64)) == pytest.approx(2 * trace)


@pytest.mark.parametrize("label", PROBLEMS)
def test_estimators_are_those_of_curvlinops_on_the_same_probes(label):
    j, J = torch_operators(label)
    theta = J @ J.adjoint()
    s, g = (torch.from_numpy(probes("sign", K, j.n, seed)) for seed in (0, 1))
    with draws(s):
        trace = float(curvlinops.hutchinson_trace(theta, K))
    assert ours("hutchinson", "trace", j, s)[0] == pytest.approx(trace, rel=1e-9)
    assert ours("one_sided_reverse", "trace", j, s)[0] == pytest.approx(trace, rel=1e-9)
    with draws(s):
        square = float(curvlinops.hutchinson_squared_fro(theta, K))
    assert ours("hutchinson", "norm", j, s)[0] ** 2 == pytest.approx(square, rel=1e-9)
    effective_rank = ours("hutchinson", "effective_rank", j, s)[0]
    assert effective_rank == pytest.approx(trace**2 / square, rel=1e-9)
    with draws(s, g):
        trace = float(curvlinops.hutchpp_trace(theta, 3 * K))
    assert ours("hutchpp", "trace", j, s, g)[0] == pytest.approx(trace, rel=1e-9)
    assert ours("hutchpp_one_sided", "trace", j, s, g)[0] == pytest.approx(trace, rel=1e-9)
    with draws(s, g):
        square = float(curvlinops.hutchpp_trace(theta @ theta, 3 * K))
    assert ours("hutchpp", "norm", j, s, g)[0] ** 2 == pytest.approx(square, rel=1e-9)


def test_one_sided_estimates_are_the_squared_norms_of_curvlinops():
    """It multiplies with the taller of J and J^T: here with J, there with J^T."""
    for label, name, side in (("wide", "one_sided_forward", 1), ("digits_conv[N=3]", "one_sided_reverse", 0)):
        j, J = torch_operators(label)
        u = torch.from_numpy(probes("sign", K, (j.n, j.P)[side]))
        with draws(u):
            square = float(curvlinops.hutchinson_squared_fro(J if side else J.adjoint(), K))
        assert ours(name, "trace", j, u)[0] == pytest.approx(square, rel=1e-9)


@pytest.mark.slow
def test_leave_one_out_traces_have_the_mean_of_curvlinops():
    """Its XTrace does not normalise probes to the sphere, so only means agree; our XTrace is not noisier."""
    J = torch.from_numpy(jacobian("spike"))
    theta = J @ J.T
    torch.manual_seed(0)
    theirs = np.array([float(curvlinops.xtrace(theta, 2 * K, "normal")) for _ in range(200)])
    for method in ("xtrace", "xnystrace"):
        values = np.array([drawn(methods.get(method), "trace", [J], K, seed)[0] for seed in range(400)])
        error = math.hypot(*(each.std(ddof=1) / math.sqrt(len(each)) for each in (values, theirs)))
        assert abs(values.mean() - theirs.mean()) < 4 * error
        # XNysTrace sketches J^T U, which is less than Theta U, and takes 2 passes per probe instead of XTrace's 3.
        assert method == "xnystrace" or values.std(ddof=1) < 1.1 * theirs.std(ddof=1)


# --- JAX: matfree


def jax_operators(label: str) -> tuple[JacobianOperator, Any, Any]:
    """J of a problem, in float64: ours, and v -> J^T v and w -> J w by plain JAX, for one vector."""
    problem = loaded(label)
    j = linearise(problem, "theta_0", Target("jax", "float64", "cpu"))
    weights = {key: jnp.asarray(w, jnp.float64) for key, w in problem.weights("theta_0").items()}
    theta, unravel = ravel_pytree(weights)
    x = jnp.asarray(problem.x, jnp.float64)

    def forward(theta: jax.Array) -> jax.Array:
        return problem.jax_forward(unravel(theta), x).reshape(-1)

    pull = jax.vjp(forward, theta)[1]
    return j, jax.jit(lambda v: pull(v)[0]), jax.jit(lambda w: jax.jvp(forward, (theta,), (w,))[1])


@pytest.mark.parametrize("label", PROBLEMS[1:])
@pytest.mark.slow
def test_estimators_are_those_of_matfree_on_the_same_probes(label):
    j, vjp, jvp = jax_operators(label)
    stochtrace = matfree.stochtrace

    def theirs(integrand: Any, matvec: Any, u: jax.Array) -> tuple[float, float]:
        estimate = stochtrace.estimator_monte_carlo_mean_and_sem(integrand, lambda _: u)
        return tuple(map(float, estimate(matvec, None)))

    def agree(name: str, metric: str, u: jax.Array, said: tuple[float, float]) -> None:
        value, error = ours(name, metric, j, u)
        assert value == pytest.approx(said[0], rel=1e-9)
        # Its standard error divides by K where an unbiased variance divides by K - 1.
        assert error == pytest.approx(said[1] * math.sqrt(K / (K - 1)), rel=1e-7)

    u, w = (jnp.asarray(probes("sign", K, dim)) for dim in (j.n, j.P))
    lengths = stochtrace.monte_carlo_frobeniusnorm_squared()
    trace = theirs(stochtrace.monte_carlo_trace(), lambda v: jvp(vjp(v)), u)
    agree("hutchinson", "trace", u, trace)
    agree("one_sided_reverse", "trace", u, theirs(lengths, vjp, u))
    agree("one_sided_forward", "trace", w, theirs(lengths, jvp, w))
    square, spread = theirs(lengths, lambda v: jvp(vjp(v)), u)
    value, error = ours("hutchinson", "norm", j, u)
    assert value**2 == pytest.approx(square, rel=1e-9)
    # The jackknife of the root equals the delta method to first order in 1/K.
    assert error == pytest.approx(spread / (2 * value), rel=0.5)


@pytest.mark.parametrize("label", PROBLEMS[:1])
@pytest.mark.slow
def test_leave_one_out_traces_are_those_of_matfree_on_the_same_probes(label):
    """matfree uses the paper's algorithms with normalisation, and ours a QR of J^T U or of J W."""
    j, vjp, jvp = jax_operators(label)
    u, w = (jnp.asarray(probes("normal", K, dim)) for dim in (j.n, j.P))
    integrands = {
        "xtrace": (matfree.stochtrace.leave_one_out_xtrace(), lambda v: jvp(vjp(v)), u),
        "xnystrace": (matfree.stochtrace.leave_one_out_xnystrace(), lambda v: jvp(vjp(v)), u),
        "xnystrace_forward": (matfree.stochtrace.leave_one_out_xnystrace(), lambda v: vjp(jvp(v)), w),
    }
    for name, (integrand, matvec, given) in integrands.items():
        estimate = matfree.stochtrace.estimator_leave_one_out(integrand, lambda _, given=given: given)
        assert ours(name, "trace", j, given)[0] == pytest.approx(float(estimate(matvec, None)), rel=1e-8)


@pytest.mark.parametrize("name", SPECTRA)
def test_leave_one_out_traces_on_all_spectra_are_those_of_matfree(name):
    """A wide range of decays, steps and spikes; where the spectrum drops below round-off both still agree."""
    jax.config.update("jax_enable_x64", True)
    J = jnp.asarray(jacobian(name))
    u = jnp.asarray(probes("normal", 12, len(J)))
    exact = SPECTRA[name].sum()
    for method, integrand in (
        ("xtrace", matfree.stochtrace.leave_one_out_xtrace()),
        ("xnystrace", matfree.stochtrace.leave_one_out_xnystrace()),
    ):
        estimate = matfree.stochtrace.estimator_leave_one_out(integrand, lambda _: u)
        theirs = float(estimate(lambda v: J @ (v @ J), None))
        assert ours(method, "trace", Dense(J), u)[0] == pytest.approx(theirs, abs=1e-8 * exact)


@pytest.mark.parametrize("name", ["1/i", "cliff"])
@pytest.mark.slow
def test_lanczos_quadrature_is_that_of_matfree(name):
    """tr f(Theta) by Lanczos on Theta, and by Golub and Kahan's bidiagonalisation of J^T, which never squares J."""
    jax.config.update("jax_enable_x64", True)
    J, steps = jnp.asarray(jacobian(name)), 10
    j = Dense(J)
    density = lanczos.density(j, probes=K, steps=steps, seed=3)
    u = j.rng(3).normal(K, j.n)
    u = u * math.sqrt(j.n) / jnp.linalg.norm(u, axis=1, keepdims=True)
    entropy = lambda x: jnp.where(x > 0, x * jnp.log(jnp.where(x > 0, x, 1.0)), 0.0)  # noqa: E731
    for f in (jnp.sqrt, entropy):
        funm = matfree.funm
        symmetric = funm.monte_carlo_funm_sym(funm.dense_funm_sym_eigh(f), matfree.decomp.tridiag_sym(steps))
        product = funm.monte_carlo_funm_product(funm.dense_funm_product_svd(f), matfree.decomp.bidiag(steps))
        here = j.n * float((density.weights * np.asarray(f(jnp.asarray(density.nodes)))).sum())
        for integrand, matvec in ((symmetric, lambda v: J @ (v @ J)), (product, lambda v: v @ J)):
            estimate = matfree.stochtrace.estimator_monte_carlo(integrand, lambda _: u)
            assert here == pytest.approx(float(estimate(matvec, None)), rel=1e-7)
