"""Contract checks for plug-ins: what ntkbench relies on, each with an ``AssertionError`` that says what is broken.

>>> from ntkbench import testing
>>> testing.check_method("my_method")                           # doctest: +SKIP
>>> testing.check_problem("my_problem")                         # doctest: +SKIP
>>> testing.check_study("my_study", {"seeds": 2})               # doctest: +SKIP
>>> testing.check_figure("my_figure", table)                    # doctest: +SKIP
>>> testing.check_rule("my_rule", network, inputs)              # doctest: +SKIP

They hold for every plug-in that comes with ntkbench. Exact values come from J written out by a loop of plain autograd,
not from ntkbench's operators.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import importlib
import math
import random
import tempfile
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from scipy.stats import binom

from ntkbench import errors, methods, problems, registry
from ntkbench.errors import BadInput
from ntkbench.estimate import THETA, Estimate
from ntkbench.estimators.regression import regression_error
from ntkbench.methods.base import Incremental, Method
from ntkbench.metrics import METRICS, REGRESSION, SPECTRAL, of_eigenvalues
from ntkbench.options import BACKENDS, Target
from ntkbench.problem import Problem
from ntkbench.problems.base.outputs import change_by_training

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

__all__ = [
    "check_calibration",
    "check_figure",
    "check_method",
    "check_problem",
    "check_rule",
    "check_study",
    "explicit_jacobian",
    "metrics_of",
    "recurrent_problem",
    "smooth_problem",
]

ROUNDING = {"float64": 1e-9, "float32": 1e-4}
"""Relative errors that exact methods may have."""

COVERAGE = 0.9
"""Least coverage of 95 % intervals from few probes; see :meth:`ntkbench.estimate.Estimate.interval`."""

CHANCE = 1e-4
"""Probability that intervals of this coverage fail :func:`check_calibration`."""

WIDEST = 6
"""Most standard deviations of the estimates in half of a 95 % interval; 2 for many degrees of freedom, 4.3 for two."""

STEPS = {"trace": 8}
"""Ratio of the larger budget of :func:`check_calibration` to the smaller one; 3 for metrics of pairs of probes."""


# --- small problems and their exact metrics


@functools.cache
def smooth_problem(name: str = "tanh_net", N: int = 3, inputs: int = 3, hidden: int = 4, outputs: int = 2) -> Problem:
    """Two tanh layers in both backends, with two sets of random weights; n = 6 and P = 26 unless sizes are given."""
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ends = [nn.Sequential(nn.Linear(inputs, hidden), nn.Tanh(), nn.Linear(hidden, outputs)) for _ in range(2)]
        x = torch.randn(N, inputs)

    def jax_forward(weights: Mapping[str, Any], x: Any) -> Any:
        import jax.numpy as jnp

        hidden = jnp.tanh(x @ weights["0.weight"].T + weights["0.bias"])
        return hidden @ weights["2.weight"].T + weights["2.bias"]

    return Problem(name, ends[0], x.numpy(), _weights(ends[0]), _weights(ends[1]), jax_forward)


@functools.cache
def recurrent_problem(N: int = 3, T: int = 3, inputs: int = 2, hidden: int = 2) -> Problem:
    """The states of a GRU that declares its recurrence, in both backends, with two sets of random weights."""
    import torch

    from ntkbench.networks.recurrent import Recurrent, jax_forward

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        ends = [Recurrent("gru", inputs, hidden) for _ in range(2)]
        x = torch.randn(N, T, inputs)
    return Problem("small_gru", ends[0], x.numpy(), _weights(ends[0]), _weights(ends[1]), jax_forward(ends[0]))


def _weights(module: Any) -> dict[str, np.ndarray]:
    return {key: w.detach().numpy().copy() for key, w in module.named_parameters()}


def explicit_jacobian(problem: Problem, end: str = "theta_0") -> np.ndarray:
    """J in float64, ``[n, P]``, by a backward pass of plain autograd for each output."""
    import torch

    module = _own_module(problem).double()
    weights = problem.weights(end)
    with torch.no_grad():
        module.load_state_dict({k: torch.from_numpy(w) for k, w in problem.fixed(end).items()}, strict=False)
        for key, w in module.named_parameters():
            if key in weights:
                w.copy_(torch.from_numpy(weights[key]))
    theta = [w for key, w in module.named_parameters() if key in weights]
    x = torch.from_numpy(problem.x)
    return _rows(module, theta, x.double() if x.is_floating_point() else x).numpy()


def _rows(module: nn.Module, theta: list[Any], x: Any) -> Any:
    """J by a loop over outputs of plain autograd, ``[n, P]``."""
    import torch

    rows = []
    for output in module(x).reshape(-1):
        grads = torch.autograd.grad(output, theta, retain_graph=True, materialize_grads=True)
        rows.append(torch.cat([g.reshape(-1) for g in grads]))
    return torch.stack(rows)


def _own_module(problem: Problem) -> nn.Module:
    """A copy of the problem's network in torch."""
    assert problem.module is not None, f"{problem.name} has no network in torch"
    return copy.deepcopy(problem.module)


def metrics_of(theta: np.ndarray, theta_f: np.ndarray | None = None) -> dict[str, float]:
    """The metrics by their definitions, from Theta (and Theta_f) written out."""
    norm = np.linalg.norm(theta)
    values = {"trace": np.trace(theta), "norm": norm, "effective_rank": np.trace(theta) ** 2 / norm**2}
    if theta_f is not None:
        values["alignment"] = np.trace(theta @ theta_f) / (norm * np.linalg.norm(theta_f))
    return {key: float(value) for key, value in values.items()}


def _own(problem: Problem) -> Problem:
    """The problem with a copy of its network, which a method may damage."""
    return dataclasses.replace(problem, module=_own_module(problem))


def _truth(problem: Problem, metric: str, kernel: str = THETA) -> float:
    thetas = [KERNELS[kernel](problem, explicit_jacobian(problem, end)) for end in ("theta_0", "theta_f")]
    if metric in SPECTRAL:
        return of_eigenvalues(metric, np.linalg.eigvalsh(thetas[0]))
    if metric == REGRESSION:
        return regression_error(thetas[0], change_by_training(problem))
    return metrics_of(*thetas)[metric]


def _of_theta(problem: Problem, J: np.ndarray) -> np.ndarray:
    return J @ J.T


def _of_combination(weights: Callable[[int], np.ndarray]) -> Callable[[Problem, np.ndarray], np.ndarray]:
    """The kernel of a combination of the outputs of a sample, times I_O."""

    def kernel(problem: Problem, J: np.ndarray) -> np.ndarray:
        g = np.einsum("o,bop->bp", weights(problem.O), J.reshape(problem.N, problem.O, -1))
        return np.kron(g @ g.T, np.eye(problem.O))

    return kernel


def _of_traces(problem: Problem, J: np.ndarray) -> np.ndarray:
    rows = J.reshape(problem.N, -1)
    return np.kron(rows @ rows.T / problem.O, np.eye(problem.O))


def _of_last_layer(problem: Problem, J: np.ndarray) -> np.ndarray:
    layer = list(problem.theta_0)[-1].rpartition(".")[0]
    own = [np.full(w.size, name.rpartition(".")[0] == layer) for name, w in problem.theta_0.items()]
    return _of_traces(problem, J[:, np.concatenate(own)])


KERNELS: Mapping[str, Callable[[Problem, np.ndarray], np.ndarray]] = {
    THETA: _of_theta,
    "pNTK ⊗ I_O": _of_combination(lambda O: np.full(O, O**-0.5)),  # noqa: E741 - the field's symbol
    "single-logit kernel ⊗ I_O": _of_combination(lambda O: np.eye(O)[0]),  # noqa: E741
    "trace kernel ⊗ I_O": _of_traces,
    "last-layer trace kernel ⊗ I_O": _of_last_layer,
}
"""Kernels ``[n, n]`` from J ``[n, P]``, by the name that a method ``computes``."""


# --- methods


def check_method(name: str, backend: str | None = None, metric: str | None = None) -> None:
    """The contract of a method, on small problems and on the CPU.

    - It refuses what it does not support in one line, before anything is computed: other metrics and backends, budgets
      that are too small, a network that is missing in JAX, trained weights that are missing, samples that interact.
    - It returns an :class:`~ntkbench.estimate.Estimate` of finite floats under its own name.
    - The same seed gives the same number; another one gives another, unless the estimate is exact.
    - It spends no more passes than its budget, or exactly those that it announced. Its operators count the same number.
      With ample memory, later estimates run the network in PyTorch at most once for each pass.
    - An exact method agrees with J written out, in float64, in float32, and with memory for one row at a time, and in
      float64 on a second, larger problem. So does an approximate method that ``computes`` one of :data:`KERNELS`.
      Values of a kernel that is not among these differ between the two problems.
    - The error of a stochastic method is below six standard errors, in the same four cases.
    - An incremental method gives the same estimate by ``estimates``, which also stops at a tolerance.
    - Exact and stochastic values have a certificate and a bound on their rounding.
    - In its first backend alone: the larger problem, and the comparison of ``estimates`` with ``estimate``.
    - It changes neither the network (values, gradients, hooks, mode) nor the process: the global random states of
      PyTorch, NumPy and Python, the default precision, the recording of gradients, deterministic algorithms and the
      number of threads. The process is restored before the check fails.

    Cost: some hundred estimates of problems with at most 40 outputs.

    Args:
        name: of the method.
        backend: one of the method's; all of them if not given.
        metric: one of the method's; all of them if not given.

    Raises:
        BadInput: there is no such method, or it is broken.
        AssertionError: it breaks the contract; says how.
    """
    method = methods.get(name)
    for one in (backend,) if backend else method.backends:
        if one in method.backends:
            importlib.import_module(one)  # importing JAX draws from NumPy's random state
        for each in (metric,) if metric else (m for m in method.given if m != "condition_number"):
            problem = _supported(method, each, one)
            with _said(f"method {name!r}, {one}, {each}"):
                _check_unsupported(method, problem, each, one)
                if method.takes_passes:
                    _check_stochastic(method, problem, each, one)
                else:
                    _check_deterministic(method, problem, each, one)


def _supported(method: Method, metric: str, backend: str, *, larger: bool = False) -> Problem:
    """The first of some small problems that a method supports, or the first one if it supports none."""
    target = Target(backend, "float64", "cpu")
    few: tuple[Problem, ...]
    if larger:
        few = (
            smooth_problem("larger_net", 7, 4, 5, 4),
            recurrent_problem(7, 2),
            smooth_problem("larger_wide_net", 7, hidden=2, outputs=5),
        )
    else:
        few = (smooth_problem(), recurrent_problem(), smooth_problem("wide_net", hidden=2, outputs=5))
    return _own(next((each for each in few if method.unsupported_reason(each, metric, target, 10**6) is None), few[0]))


def check_calibration(
    name: str, metric: str, *, passes: int | None = None, seeds: int = 200, slack: float = 0.3
) -> None:
    """Check that the standard errors of a stochastic method match the spread of its estimates, on 320 outputs.

    - The mean of squared standard errors equals the variance over seeds to within ``slack``.
    - As many 95 % intervals contain the exact value as if each did with a probability of :data:`COVERAGE`, up to chance
      (:data:`CHANCE`). Intervals are at most :data:`WIDEST` standard deviations wide to either side, in the median.
    - The mean estimate is within half a standard deviation of the exact value. This holds for a third of the seeds at a
      larger budget, too, where a bias shows more: 8 times the passes for a trace and 3 times for other metrics.
    - What :func:`check_method` requires of a single estimate.

    Args:
        name: of the method.
        metric: one of the method's.
        passes: budget; five times the smallest if not given.
        seeds: number of estimates.
        slack: relative tolerance of the variance.

    Raises:
        AssertionError: they do not match, or the method is biased.
    """
    method = methods.get(name)
    target = Target(method.backends[0], "float64", "cpu")
    few = (smooth_problem("wide", 40, 6, 10, 8), smooth_problem("wide_headed", 40, 6, 3, 8))
    problem = next((each for each in few if method.unsupported_reason(each, metric, target) is None), few[0])
    budget = passes or 5 * _smallest_budget(method, problem, metric, target)
    estimate = _Estimator(method, _own(problem), metric, target)
    truth = _truth(problem, metric)

    def drawn(passes: int, seeds: int) -> tuple[list[Estimate], float]:
        """Estimates, which are not biased, and their standard deviation."""
        found = [estimate(passes, seed) for seed in range(seeds)]
        values = np.array([each.value for each in found])
        bias, deviation = abs(values.mean() - truth), values.std(ddof=1)
        allowed = max(0.5 * deviation, ROUNDING["float64"] * abs(truth))
        _require(bias <= allowed, f"a bias of {bias:.3g} at a standard deviation of {deviation:.3g}")
        return found, float(deviation)

    with _said(f"method {name!r}, {metric}, {budget} passes"):
        estimates, deviation = drawn(budget, seeds)
        variance, claimed = deviation**2, np.mean([_standard_error(each) ** 2 for each in estimates])
        _require(
            (1 - slack) * variance < claimed < (1 + slack) * variance,
            f"standard errors imply a variance of {claimed:.3g}, but over seeds it is {variance:.3g}",
        )
        covered, least = sum(each.covers(truth, "float64") for each in estimates), binom.ppf(CHANCE, seeds, COVERAGE)
        _require(covered >= least, f"{covered} of {seeds} intervals at 95 % contain the exact value")
        reach = float(np.median([high - low for low, high in (each.interval() for each in estimates)])) / 2
        _require(
            reach <= WIDEST * deviation,
            f"intervals reach {reach:.3g} to either side, at a standard deviation of {deviation:.3g}",
        )
    larger = STEPS.get(metric, 3) * budget
    with _said(f"method {name!r}, {metric}, {larger} passes"):
        drawn(larger, max(2, seeds // 3))


def _check_unsupported(method: Method, problem: Problem, metric: str, backend: str) -> None:
    target = Target(backend, "float64", "cpu")

    def shapes_only(_: Any, arguments: tuple[Any, ...]) -> None:
        _require(all(x.is_meta for x in arguments), "runs the network to determine what it does not support")

    def jax_forward(weights: Mapping[str, Any], x: Any) -> Any:
        import jax

        _require(isinstance(x, jax.core.Tracer), "runs the network to determine what it does not support")
        assert problem.jax_forward is not None
        return problem.jax_forward(weights, x)

    module = _own_module(problem)
    module.register_forward_pre_hook(shapes_only)
    idle = dataclasses.replace(problem, module=module, jax_forward=jax_forward, _shape=[])

    def reason(problem: Problem, metric: str, target: Target, passes: int | None = None) -> str | None:
        said = method.unsupported_reason(problem, metric, target, passes)
        fine = said is None or (isinstance(said, str) and len(said.splitlines()) == 1)
        _require(fine, f"a reason must be one line, or None; got {said!r}")
        return said

    _require(reason(idle, metric, target) is None, f"does not support {problem.name}: {reason(idle, metric, target)}")
    for other in {*METRICS, "no_metric"} - set(method.metrics):
        _require(reason(idle, other, target), f"gives no reason against the metric {other!r}")
    for other in set(BACKENDS) - set(method.backends):
        _require(
            reason(idle, metric, Target(other, "float64", "cpu")), f"gives no reason against the backend {other!r}"
        )
    if backend == "jax":
        without = dataclasses.replace(idle, jax_forward=None)
        _require(reason(without, metric, target), "gives no reason against a problem without a network in JAX")
    if metric == "alignment":
        without = dataclasses.replace(idle, theta_f=None)
        _require(reason(without, metric, target), "gives no reason against a problem without trained weights")
    mixed = reason(dataclasses.replace(idle, samples_interact=True), metric, target)
    _require(
        bool(mixed) == method.needs_independent_samples,
        f"needs_independent_samples is {method.needs_independent_samples}; for interacting samples it says {mixed!r}",
    )
    if method.needs_recurrence:
        _require(reason(smooth_problem(), metric, target), "gives no reason against a network without a recurrence")
    passes = _smallest_budget(method, idle, metric, target) if method.takes_passes else None
    held = method.bytes_needed(idle, metric, target, passes)
    _require(held >= 0, f"bytes_needed must be known beforehand; got {held!r}")


def _check_deterministic(method: Method, problem: Problem, metric: str, backend: str) -> None:
    roomy, tight, single = _estimators(method, problem, metric, backend)
    first, second = roomy(None, seed=0), roomy(None, seed=1)
    _require(first.kernel == method.computes, f"computes {method.computes}, but its estimate is of {first.kernel}")
    if method.draws:
        _require(first == roomy(None, seed=0), "two calls with one seed differ")
        _require(first.value != second.value, f"draws is True, but two seeds give {first}")
    else:
        _require(first == second, f"two calls differ: {first} and {second}")
    _require(first.standard_error is None, f"is deterministic, but has a standard error of {first.standard_error}")
    needed = method.passes_needed(problem, metric, Target(backend, "float64", "cpu"))
    known = first.passes is None if needed is None else first.passes is not None and math.isclose(first.passes, needed)
    _require(known, f"announced {needed} passes, but spent {first.passes}")
    little = tight(None)
    _close(little.value, first.value, 1e-12, "with memory for one row at a time")
    fewer = first.passes is not None and (little.passes is None or little.passes < first.passes)
    _require(not fewer, "takes fewer passes with less memory")
    known = method.kind == "exact" or method.computes in set(KERNELS) - {THETA}
    if method.kind == "exact":
        _check_bounds(first)
    if known:
        truth = _truth(problem, metric, method.computes)
        _close(first.value, truth, ROUNDING["float64"], "in float64")
        _close(single(None).value, truth, ROUNDING["float32"], "in float32")
    if backend != method.backends[0]:
        return
    larger = _supported(method, metric, backend, larger=True)
    after = _Estimator(method, larger, metric, Target(backend, "float64", "cpu"))(None)
    if known:
        _close(after.value, _truth(larger, metric, method.computes), ROUNDING["float64"], _sizes(larger))
    else:
        _require(first.value != after.value, f"is {first.value!r} for two different networks and inputs")


def _sizes(problem: Problem) -> str:
    return f"for N={problem.N} and O={problem.O}"


def _check_bounds(found: Estimate) -> None:
    for name in ("certificate", "rounding"):
        bound = getattr(found, name)
        _require(bound is not None and 0 <= bound < 1, f"has the {name} {bound!r}; it must be a relative difference")


def _check_stochastic(method: Method, problem: Problem, metric: str, backend: str) -> None:
    target = Target(backend, "float64", "cpu")
    least = _smallest_budget(method, problem, metric, target)
    for passes in {0, 1, least - 1} - {least}:
        said = method.unsupported_reason(problem, metric, target, passes)
        _require(said, f"gives no reason against {passes} passes")
    try:
        method.estimate(method.prepare(problem, target), metric)
    except BadInput:
        pass
    else:
        raise AssertionError("estimates without a budget")
    estimators = _estimators(method, problem, metric, backend)
    roomy = estimators[0]
    for passes in (least, least + 1, 3 * least - 1, 40 * least):
        first, again, other = (roomy(passes, seed) for seed in (5, 5, 6))
        _require(first.kernel == method.computes, f"computes {method.computes}, but its estimate is of {first.kernel}")
        _require(first.to_json() == again.to_json(), f"one seed gives {first} and {again}")  # nan equals nan
        error = _standard_error(first)
        _require(not error < 0, f"has a standard error of {error}")
        known = first.degrees > 0 or math.isnan(error)
        _require(known, f"has {first.degrees!r} degrees of freedom at a standard error of {error}")
        _check_bounds(first)
        exact = error <= 1e-6 * abs(first.value)  # as for some methods with more probes than outputs
        # Values at the end of the metric's range are equal, but their errors are not.
        same = first.value == other.value and first.standard_error == other.standard_error
        _require(exact or not same, f"another seed gives the same number, {first.value!r}")
    truth = _truth(problem, metric)
    for estimate, where in zip(estimators, ("", " with memory for one probe", " in float32"), strict=True):
        _check_error(estimate(30 * least), truth, where)
    if backend != method.backends[0]:
        return
    larger = _supported(method, metric, backend, larger=True)
    passes = 30 * _smallest_budget(method, larger, metric, target)
    _check_error(_Estimator(method, larger, metric, target)(passes), _truth(larger, metric), f" {_sizes(larger)}")
    if isinstance(method, Incremental):
        first, shared = roomy(3 * least, 5), roomy(3 * least, 5, by_estimates=True)
        _require(first.to_json() == shared.to_json(), f"estimate gives {first}, but estimates gives {shared}")
        _check_error(roomy(40 * least, 5, by_estimates=True, rtol=0.3), truth, " with rtol=0.3")


def _check_error(found: Estimate, truth: float, where: str) -> None:
    wrong, allowed = abs(found.value - truth), 6 * _standard_error(found) + 1e-5 * abs(truth)
    _require(wrong <= allowed, f"is wrong by {wrong:.3g}{where}, but six standard errors are {allowed:.3g}")


def _standard_error(found: Estimate) -> float:
    if found.standard_error is None:
        raise AssertionError("is stochastic, but has no standard error")
    return found.standard_error


def _smallest_budget(method: Method, problem: Problem, metric: str, target: Target) -> int:
    for passes in range(1, 10_000):
        if method.unsupported_reason(problem, metric, target, passes) is None:
            return passes
    raise AssertionError("takes no budget below 10,000 passes on a small problem")


class _Estimator:
    """Estimates from one preparation, checked against the contract."""

    def __init__(self, method: Method, problem: Problem, metric: str, target: Target) -> None:
        self._method, self._problem, self._metric = method, problem, metric
        self._ample, self._certified = target.memory == Target().memory, False
        with _unchanged(problem):
            self._prepared = method.prepare(problem, target)
        self._operators: list[Any] = []
        if jacobians := getattr(self._prepared, "jacobians", None):

            def noted(*args: Any) -> Any:
                made = jacobians(*args)
                self._operators += made
                return list(made)

            self._prepared.jacobians = noted

    def __call__(
        self, passes: int | None, seed: int = 0, *, by_estimates: bool = False, rtol: float | None = None
    ) -> Estimate:
        """Make an estimate, and check its values, its names, and its passes against the operators' count."""
        self._operators.clear()
        with _unchanged(self._problem), _runs(self._problem) as runs:
            if by_estimates:
                assert isinstance(self._method, Incremental) and passes is not None
                several = self._method.estimates(self._prepared, (self._metric,), passes, seed, rtol)
                _require(list(several) == [self._metric], f"estimates gives {', '.join(several)}")
                found = several[self._metric]
            else:
                found = self._method.estimate(self._prepared, self._metric, passes, seed)
        _require(isinstance(found, Estimate), f"returns a {type(found).__name__}, not an Estimate")
        _require(type(found.value) is float and math.isfinite(found.value), f"has the value {found.value!r}")
        _require(found.method == self._method.name, f"names itself {found.method!r}")
        _require(found.metric == self._metric, f"reports the metric {found.metric!r}")
        if found.passes is not None:
            _require(math.isfinite(found.passes) and found.passes > 0, f"spent {found.passes!r} passes")
        if passes is not None:
            _require(found.passes is not None and found.passes <= passes, f"spent {found.passes} of {passes} passes")
        if self._operators:
            counted = sum(operator.passes for operator in self._operators)
            _require(found.passes == counted, f"reports {found.passes} passes, but its operators counted {counted}")
        if self._ample and self._certified and found.passes is not None:
            most = math.ceil(found.passes)
            _require(sum(runs) <= most, f"reports {found.passes} passes, but runs the network {sum(runs):g} times")
        self._certified = True
        return found


@contextlib.contextmanager
def _runs(problem: Problem) -> Iterator[list[float]]:
    """The share of the inputs in each call of the problem's network in torch; tracing it counts as well."""
    from torch.nn.modules.module import register_module_forward_pre_hook

    runs: list[float] = []

    def note(module: nn.Module, arguments: tuple[Any, ...]) -> None:
        if type(module) is type(problem.module):
            runs.append(len(arguments[0]) / len(problem.x))

    handle = register_module_forward_pre_hook(note)
    try:
        yield runs
    finally:
        handle.remove()


@contextlib.contextmanager
def _unchanged(problem: Problem) -> Iterator[None]:
    """Require that a call changes neither the problem nor the process, which is restored."""
    import torch

    restored: list[Callable[[], object]] = [
        functools.partial(np.random.set_state, np.random.get_state()),
        functools.partial(random.setstate, random.getstate()),
        functools.partial(torch.set_default_dtype, torch.get_default_dtype()),
        functools.partial(torch.set_grad_enabled, torch.is_grad_enabled()),
        functools.partial(
            torch.use_deterministic_algorithms,
            torch.are_deterministic_algorithms_enabled(),
            warn_only=torch.is_deterministic_algorithms_warn_only_enabled(),
        ),
    ]
    threads = torch.get_num_threads()
    try:
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(UNUSUAL)
            np.random.seed(UNUSUAL)
            random.seed(UNUSUAL)
            before = _state(problem)
            yield
            after = _state(problem)
    finally:
        for restore in restored:
            restore()
        if torch.get_num_threads() != threads:
            torch.set_num_threads(threads)
    changed = [what for what in before if before[what] != after[what]]
    _require(not changed, f"changes {' and '.join(changed)}")


UNUSUAL = 271_828_183
"""A seed that no method sets by chance, so that seeding the global generators shows."""


def _state(problem: Problem) -> dict[str, Any]:
    """What a method must leave as it is, by name."""
    import torch

    network = problem.network
    modules, parameters = list(network.modules()), list(network.parameters())
    numpy: Any = np.random.get_state()
    return {
        "the problem's inputs, weights or other tensors": problem.contents(),
        "values of the network": [_bytes(tensor) for tensor in network.state_dict().values()],
        "gradients of parameters": [_bytes(w.grad) for w in parameters],
        "requires_grad of parameters": [w.requires_grad for w in parameters],
        "hooks of the network": [list(hooks) for each in (*modules, *parameters) for hooks in _hooks(each)],
        "the mode of the network": [module.training for module in modules],
        "PyTorch's random state": _bytes(torch.get_rng_state()),
        "NumPy's random state": (numpy[1].tobytes(), *numpy[2:]),
        "Python's random state": random.getstate(),
        "the default precision": torch.get_default_dtype(),
        "whether gradients are recorded": (torch.is_grad_enabled(), torch.is_inference_mode_enabled()),
        "the number of threads": torch.get_num_threads(),
        "deterministic algorithms": torch.are_deterministic_algorithms_enabled(),
    }


def _bytes(tensor: Any) -> bytes | None:
    return None if tensor is None else tensor.detach().numpy().tobytes()


def _hooks(module: Any) -> Iterator[Mapping[int, Any]]:
    """Those of a module, or those of a parameter on its gradient."""
    own = {**vars(module), "_backward_hooks": module._backward_hooks}
    yield from (hooks or {} for name, hooks in sorted(own.items()) if name.endswith("_hooks"))


def _estimators(method: Method, problem: Problem, metric: str, backend: str) -> tuple[_Estimator, ...]:
    """Estimators in float64, in float64 with memory for one row or probe at a time, and in float32."""
    targets = (
        Target(backend, "float64", "cpu"),
        Target(backend, "float64", "cpu", 1),
        Target(backend, "float32", "cpu"),
    )
    return tuple(_Estimator(method, problem, metric, target) for target in targets)


# --- problems


def check_problem(label: str) -> None:
    """The contract of a problem.

    - It is bitwise the same at every load, and does not change torch's random state.
    - With fewer samples it has the first of its inputs and the same weights.
    - Both backends compute the same network, at both ends of training.
    - Samples interact if it says so, and only then.
    - Training moves every weight, to finite numbers in float32, if the network is trained at all.

    Cost: the problem is loaded twice (and trained twice, if trained weights are not kept).

    Args:
        label: of the problem, with smaller sizes than its own if it is large.

    Raises:
        BadInput: there is no such problem, or it is broken.
        Unavailable: its data are not available.
        AssertionError: it breaks the contract; says how.
    """
    import torch

    with _said(f"problem {label!r}"):
        _require(problems.describe(label.partition("[")[0]).strip(), "has no first line in its docstring")
        problems.load.cache_clear()
        whole = problems.load(label)
        problems.load.cache_clear()
        state = torch.get_rng_state()
        again = problems.load(label)
        _require(torch.equal(torch.get_rng_state(), state), "changes torch's random state")
        _require(again.digest() == whole.digest(), "is not the same at every load")
        ends = ("theta_0",) if whole.theta_f is None else ("theta_0", "theta_f")
        for key, w in whole.theta_0.items():
            trained = whole.weights(ends[-1])[key]
            _require(w.dtype == trained.dtype == np.float32, f"{key} is not kept in float32")
            _require(w.shape == trained.shape and np.isfinite(trained).all(), f"training makes {key} invalid")
            moved = whole.theta_f is None or not np.array_equal(w, trained)
            _require(moved, f"training leaves {key} unchanged")
        fewer = _with_three_samples(whole.name)
        few = problems.load(fewer)
        _require(few.name == fewer, f"names itself {few.name!r} with N=3")
        _require(few.N == 3 and np.array_equal(few.x, whole.x[:3]), "with N=3 does not have its first three inputs")
        for end in ends:
            same = all(np.array_equal(few.weights(end)[key], w) for key, w in whole.weights(end).items())
            _require(same and list(few.weights(end)) == list(whole.weights(end)), f"with N=3 has another {end}")
        if few.jax_forward:
            for end in ends:
                for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-11)):
                    _check_twins(few, end, dtype, tolerance)
        _check_interaction(few)


def _with_three_samples(label: str) -> str:
    """The label with N=3, other options as they are and in their order."""
    name, _, inside = label.partition("[")
    others = [part for part in inside.rstrip("]").split(",") if part and not part.startswith("N=")]
    return f"{name}[{','.join(sorted(['N=3', *others]))}]"


def outputs_in_torch(problem: Problem, end: str, dtype: str) -> np.ndarray:
    """Outputs of the network in PyTorch at one end of training, ``[N, ...]``."""
    import torch

    module = _own_module(problem).to(getattr(torch, dtype))
    values = {**problem.fixed(end), **problem.weights(end)}
    module.load_state_dict({key: torch.from_numpy(w) for key, w in values.items()}, strict=False)
    x = torch.from_numpy(problem.x)
    with torch.no_grad():
        return module(x.to(getattr(torch, dtype)) if x.is_floating_point() else x).numpy()


def outputs_in_jax(problem: Problem, end: str, dtype: str) -> np.ndarray:
    """The same in JAX."""
    import jax
    import jax.numpy as jnp

    assert problem.jax_forward is not None
    with jax.enable_x64(dtype == "float64"):
        weights = {key: jnp.asarray(w, dtype) for key, w in {**problem.fixed(end), **problem.weights(end)}.items()}
        x = jnp.asarray(problem.x, dtype if np.issubdtype(problem.x.dtype, np.floating) else None)
        return np.asarray(problem.jax_forward(weights, x))


def _check_twins(problem: Problem, end: str, dtype: str, tolerance: float) -> None:
    torch, jax = (outputs(problem, end, dtype) for outputs in (outputs_in_torch, outputs_in_jax))
    _require(torch.dtype == jax.dtype == dtype, f"computes in {torch.dtype} and {jax.dtype} instead of {dtype}")
    _require(torch.shape == jax.shape == problem.output_shape, f"gives {torch.shape} in torch and {jax.shape} in JAX")
    error = np.abs(torch - jax).max() / np.abs(torch).max()
    _require(error <= tolerance, f"torch and JAX differ by {error:.2g} at {end} in {dtype}")


def _check_interaction(problem: Problem) -> None:
    together = outputs_in_torch(problem, "theta_0", "float64")
    alone = [dataclasses.replace(problem, x=problem.x[i : i + 1]) for i in range(problem.N)]
    apart = np.concatenate([outputs_in_torch(one, "theta_0", "float64") for one in alone])
    interact = bool(np.abs(together - apart).max() > 1e-9 * np.abs(together).max())
    _require(interact == problem.samples_interact, f"samples_interact is {problem.samples_interact}; it is {interact}")


# --- rules


def check_rule(name: str, network: nn.Module, inputs: Any) -> None:
    """The contract of a rule for an operation, on a network that uses it.

    - The network has a weight whose uses all have rules, and this plug-in covers one of the uses.
    - The kernel, a part of it, its diagonal and its sum over outputs agree with J written out, in float64, in float32,
      and with memory for one row at a time.
    - Plain autograd certifies each of them.

    Cost: n backward passes and some layerwise kernels of the network; choose a small one.

    Args:
        name: of the plug-in.
        network: a module whose samples do not interact.
        inputs: a tensor ``[N, ...]`` of at least two samples.

    Raises:
        BadInput: there is no such plug-in, or it is broken.
        AssertionError: it breaks the contract; says how.
    """
    from ntkbench.layerwise.kernel import LayerwiseKernel

    rules = registry.of("rule").get(name)
    with _said(f"rule {name!r}"):
        for dtype, memory in (("float64", 2**30), ("float64", 1), ("float32", 2**30)):
            module, x = copy.deepcopy(network).to(_dtype(dtype)), inputs
            if x.is_floating_point():
                x = x.to(_dtype(dtype))
            theta = {key: w for key, w in module.named_parameters() if w.requires_grad}
            values = [w.detach() for w in theta.values()]
            J = _rows(module, list(theta.values()), x).double()
            N, O = len(x), len(J) // len(x)  # noqa: E741 - the field's symbol
            whole = (J @ J.T).view(N, O, N, O)
            where = f"in {dtype}" + (" with memory for one row at a time" if memory == 1 else "")
            try:
                engine = LayerwiseKernel(module, dict(zip(theta, values, strict=True)), x, memory)
                used = {use.node.target for layer in engine.layers for use in layer.uses}
                _require(used & set(rules), "is used for no weight of the network")
                computed = (
                    ("the kernel", engine.kernel(values, x), whole.reshape(N * O, N * O)),
                    ("the kernel with one sample", engine.kernel(values, x[:1], x), whole[:1].reshape(O, N * O)),
                    ("the diagonal", engine.diagonal(values, x), whole.reshape(N * O, N * O).diagonal().view(N, O)),
                    ("the sum over outputs", engine.kernel(values, x, fold=True), whole.diagonal(0, 1, 3).sum(-1)),
                )
            except AssertionError:
                raise
            except Exception as error:  # whatever the rule does
                raise AssertionError(f"{errors.reason(error)}, {where}") from error
            for what, found, expected in computed:
                wrong = float((found.double() - expected).abs().max() / whole.abs().max())
                _require(wrong <= ROUNDING[dtype], f"{what} is wrong by {wrong:.1e} of the largest entry, {where}")


def _dtype(name: str) -> Any:
    import torch

    return getattr(torch, name)


# --- studies and figures


def check_study(name: str, settings: Mapping[str, Any]) -> pd.DataFrame:
    """The contract of a study: it has rows, each with a status and reason, and with ``seeds`` and ``calls``.

    No two rows are the same, and ``error`` and ``seconds`` of rows that are ok are finite and not negative.

    Args:
        name: of the study.
        settings: its sizes; choose small ones, since the whole study is measured.

    Returns:
        its table.

    Raises:
        BadInput: there is no such study, or it is broken.
        AssertionError: it breaks the contract; says how.
    """
    studies = importlib.import_module(registry.PACKAGES["study"])
    statuses = importlib.import_module("ntkbench.measure.outcomes").STATUSES
    with _said(f"study {name!r}"):
        table = studies.run(name, studies.settings(name, settings))
        _require(len(table), "has no rows")
        missing = {"status", "reason", "seeds", "calls"} - set(table.columns)
        _require(not missing, f"has no columns {', '.join(sorted(missing))}")
        strange = set(table["status"]) - set(statuses)
        _require(not strange, f"has the statuses {strange}; allowed: {', '.join(statuses)}")
        silent = table[(table["status"] != "ok") & (table["reason"] == "")]
        _require(not len(silent), f"gives no reason for {len(silent)} rows that are not ok")
        files = importlib.import_module("ntkbench.figures.plotting.files")
        for row, column, said in files.faults(table, is_grid=False):
            _require(False, f"row {row + 1}: {column}: {said}")
    return table


def check_figure(name: str, table: pd.DataFrame) -> None:
    """The contract of a figure.

    - It draws a table, a table without rows, and one without measurements.
    - It leaves the table as it was.
    - The same table gives the same bytes.
    - There is a caption of at most 60 words, and the numbers that are plotted are written beside the picture.

    Args:
        name: of the figure.
        table: the results table, or that of its study.

    Raises:
        BadInput: there is no such figure, it is broken, or the table lacks columns.
        AssertionError: it breaks the contract; says how.
    """
    figures = importlib.import_module(registry.PACKAGES["figure"])

    def drawn(table: pd.DataFrame) -> dict[str, bytes]:
        with tempfile.TemporaryDirectory() as folder:
            return {path.suffix: path.read_bytes() for path in figures.draw(name, table, Path(folder))}

    with _said(f"figure {name!r}"):
        before = table.copy()
        first, again = drawn(table), drawn(table)
        _require(table.equals(before), "changes the table that it is given")
        for form in (".png", ".pdf", ".csv", ".txt"):
            _require(first.get(form), f"has no {form}")
            _require(first[form] == again[form], f"gives another {form} for the same table")
        caption = first[".txt"].decode().partition("\n")[0].partition(". ")[2]
        _require(len(caption.split()) <= 60, f"has a caption of more than 60 words: {caption}")
        failed = table.assign(status="failed", reason="for a test")
        for other in (table.iloc[:0], failed):
            _require(drawn(other)[".png"], "draws no picture of a table without measurements")


# --- messages


@contextlib.contextmanager
def _said(subject: str) -> Iterator[None]:
    """Prefix assertion messages with their subject."""
    try:
        yield
    except AssertionError as error:
        raise AssertionError(f"{subject}: {error}") from None


def _require(holds: object, says: str) -> None:
    if not holds:
        raise AssertionError(says)


def _close(value: float, expected: float, tolerance: float, where: str) -> None:
    _require(math.isclose(value, expected, rel_tol=tolerance), f"is {value!r} instead of {expected!r} {where}")
