"""Projected gradients, estimators, approximations and exact kernels: errors against k, seconds and bytes.

A projection gives k features of each row of J, and their Gram matrix approximates Theta. Its relative error in the
Frobenius norm is compared at equal k, at equal seconds and at equal bytes, and so are its norm, its alignment and its
pNTK. The norm and the alignment are computed twice from the same features: from the Gram matrix, as published
(``plug_in``), and from pairs of independent parts of the projection (``unbiased``). Other methods give only their
estimates. An N x N kernel A approximates Theta as A ⊗ I_O.

Root-mean-square errors over seeds have 95 % intervals in columns ``_low`` and ``_high``. ``seconds`` are those of the
norm, from weights to a number, and ``alignment_seconds`` those of the alignment. Bytes are those of the stored n k
features, of the kernel, or of Kronecker factors. For deterministic methods the biases of trace, norm and effective rank
are relative to the exact values.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field
from scipy.special import stdtrit

from ntkbench import methods, problems
from ntkbench.errors import Unavailable
from ntkbench.estimators import projections
from ntkbench.measure.schema import ProblemLabel
from ntkbench.measure.timing import Timed, quartiles, timed
from ntkbench.methods import count_sketch
from ntkbench.methods.base import kronecker, projected
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.studies import base
from ntkbench.studies.base import thetas

TIMED = True
PROJECTIONS = {"dense_jl": None, "sparse_jl": None, "grass": None, "kronecker_projection": 1}
"""Number of replicates of each projection as published; ``None`` for the method's own choice."""
SKETCH = "count_sketch"
ESTIMATORS = ("gram_forward", "structured_block_u_statistics", "sample_subset")
FIXED = ("structured_sum_of_logits", "trace_kernel", "kfac", "kfoc", "structured_derivatives", "jacobian_contraction")
"""Deterministic methods, approximate and exact."""
KERNELS = {"structured_derivatives": "full", "structured_sum_of_logits": "sum_of_logits", "trace_kernel": "trace"}
"""Methods whose kernel is compared with Theta, and its name in the layerwise engine."""
ALL = (*PROJECTIONS, SKETCH, *ESTIMATORS, *FIXED)
PLUGINS = tuple(f"ntkbench.methods.{name}" for name in ALL)


class Settings(base.Settings):
    """Problems and numbers of features.

    Attributes:
        seeds: projections, or estimates, behind each error.
        problems: labels of problems with trained weights, and with n small enough to store Theta.
        k: numbers of features of a row of J.
        passes: budgets of the estimators.
    """

    USES = (*base.OF_TARGET, "seeds", "calls")

    seeds: int = Field(10, ge=2)
    problems: list[ProblemLabel] = Field(default=["digits_mlp[N=16]", "digits_conv[N=16]"], min_length=1)
    k: list[Annotated[int, Field(ge=16)]] = Field(default=[16, 64, 256, 1024], min_length=2)
    passes: list[Annotated[int, Field(ge=8)]] = Field(default=[8, 32, 128], min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each problem, method and number of features or passes."""
    return base.table(row for label in settings.problems for row in _of_problem(settings, label))


@dataclass(frozen=True)
class Truth:
    """A problem, and its Theta in float64.

    Attributes:
        problem: a problem with trained weights.
        thetas: Theta at theta_0 and at theta_f, ``[n, n]``, rows in the order of those of J.
    """

    problem: Problem
    thetas: tuple[np.ndarray, np.ndarray]

    @functools.cached_property
    def norm(self) -> float:
        """||Theta||_F."""
        return float(np.linalg.norm(self.thetas[0]))

    @functools.cached_property
    def trace(self) -> float:
        """tr Theta."""
        return float(np.trace(self.thetas[0]))

    @property
    def effective_rank(self) -> float:
        """The effective rank of Theta."""
        return (self.trace / self.norm) ** 2

    @functools.cached_property
    def alignment(self) -> float:
        """The alignment of the two kernels."""
        return alignment(*self.thetas)

    @functools.cached_property
    def pntk(self) -> np.ndarray:
        """The pNTK, ``[N, N]``."""
        return thetas.pooled(self.thetas[0], self.problem.O)

    def gram_error(self, theta: np.ndarray) -> float:
        """Relative error of an approximation of Theta."""
        return float(np.linalg.norm(theta - self.thetas[0])) / self.norm

    def pntk_error(self, theta: np.ndarray) -> float:
        """Relative error of the pNTK of an approximation of Theta."""
        found = thetas.pooled(theta, self.problem.O)
        return float(np.linalg.norm(found - self.pntk) / np.linalg.norm(self.pntk))


def alignment(theta: np.ndarray, theta_f: np.ndarray) -> float:
    """tr(Theta Theta_f) / (||Theta||_F ||Theta_f||_F)."""
    return float((theta * theta_f).sum() / (np.linalg.norm(theta) * np.linalg.norm(theta_f)))


def truth(label: str) -> Truth:
    """The exact kernels of a problem."""
    problem = problems.load(label)
    prepared = methods.get("structured_derivatives").prepare(problem, Target("torch", "float64", "cpu"))
    ends = prepared.ends("alignment")
    first, last = (arrays.to_numpy(end.engine.kernel(end.parameters, end.x)) for end in ends)
    return Truth(problem, (first, last))


def _of_problem(settings: Settings, label: str) -> Iterator[base.Row]:
    exact = base.Once(lambda: truth(label))
    for name in ALL:
        prepared = base.Once(functools.partial(_prepared, settings, exact, name))
        case = {"problem": label, "method": name, "title": base.title(name), "kind": _kind(name)}
        case["kernel"] = methods.get(name).computes
        measures: Mapping[str, Any] = {
            **dict.fromkeys(PROJECTIONS, _projection),
            SKETCH: _sketch,
            **dict.fromkeys(ESTIMATORS, _estimator),
        }
        if name not in measures:
            yield base.row(
                {**case, "k": None, "passes": None}, functools.partial(_fixed, settings, exact, prepared, name)
            )
            continue
        for size in settings.passes if name in ESTIMATORS else settings.k:
            numbers = {"k": None, "passes": size} if name in ESTIMATORS else {"k": size, "passes": None}
            first = zlib.crc32(f"{label}, {name}, {size}".encode()) // 2
            measure = functools.partial(measures[name], settings, exact, prepared, name, size, first)
            yield base.row({**case, **numbers}, measure)


def _kind(name: str) -> str:
    if name in PROJECTIONS or name == SKETCH:
        return "projection"
    return "estimator" if name in ESTIMATORS else methods.get(name).kind


def _prepared(settings: Settings, exact: base.Once[Truth], name: str) -> Any:
    return methods.get(name).prepare(exact().problem, settings.target())


def _rms(name: str, values: list[float]) -> dict[str, float]:
    """The root mean square of errors, and its 95 % interval in the logarithm, from the scatter of their squares."""
    squares = np.square(values)
    found = math.sqrt(float(squares.mean()))
    if not found:
        return dict.fromkeys((name, f"{name}_low", f"{name}_high"), 0.0)
    deviation = float(squares.std(ddof=1)) / (2 * float(squares.mean()) * math.sqrt(len(values)))
    reach = math.exp(float(stdtrit(len(values) - 1, 0.975)) * deviation)
    return {name: found, f"{name}_low": found / reach, f"{name}_high": found * reach}


def _errors(exact: Truth, found: list[tuple[np.ndarray, np.ndarray]]) -> dict[str, float]:
    """Columns from the Gram matrices of each seed at both sets of weights."""
    norms = [float(np.linalg.norm(theta)) / exact.norm - 1 for theta, _ in found]
    return {
        **_rms("gram_error", [exact.gram_error(theta) for theta, _ in found]),
        **_rms("pntk_error", [exact.pntk_error(theta) for theta, _ in found]),
        **_rms("norm_plug_in", norms),
        "norm_bias": float(np.mean(norms)),
        **_rms("alignment_plug_in", [alignment(*both) / exact.alignment - 1 for both in found]),
    }


def _check(settings: Settings, problem: Problem, name: str, budget: int | None = None) -> None:
    """Check that a method applies to the alignment, and that its memory at a budget is within the limits.

    Raises:
        Unavailable: it does not apply.
        OverMemory: it needs too much memory.
    """
    method = methods.get(name)
    if why := method.unsupported_reason(problem, "alignment", settings.target()):
        raise Unavailable(why)
    settings.limits.check_memory(method.bytes_needed(problem, "alignment", settings.target(), budget))


def _projection(
    settings: Settings, exact: base.Once[Truth], prepared: base.Once[Any], name: str, k: int, first: int
) -> dict[str, Any]:
    method: Any = methods.get(name)
    replicates, budget = PROJECTIONS[name], method.cost("alignment", k)
    _check(settings, exact().problem, name, budget)

    def features(metric: str, seed: int, published: bool = True) -> list[projections.Features]:
        found, _ = method.features(prepared(), metric, k, seed, replicates=replicates if published else None)
        made: list[projections.Features] = found
        return made

    seeds, found = range(first, first + settings.seeds), list[list[projections.Features]]()
    left = iter(seeds)

    def one() -> float:
        found.append(features("alignment", next(left)))
        return alignment(projections.gram(found[-1][0]), projections.gram(found[-1][1]))

    of_alignment = timed(one, settings.seeds - 1)
    grams = [(projections.gram(both[0]), projections.gram(both[1])) for both in found]
    kept = found[0][0].shape[0] * found[0][0].shape[2]
    unbiased: dict[str, float] = {}
    if not method.unsupported_reason(exact().problem, "alignment", settings.target(), budget):
        if replicates:
            found = [features("alignment", seed, published=False) for seed in seeds]
        norms = [projected.estimated("norm", both[:1])[0].value / exact().norm - 1 for both in found]
        alignments = [projected.estimated("alignment", both)[0].value / exact().alignment - 1 for both in found]
        unbiased = {**_rms("norm_unbiased", norms), **_rms("alignment_unbiased", alignments)}
    call = timed(lambda: float(np.linalg.norm(projections.gram(features("norm", first)[0]))), settings.calls)
    size = {"bytes": exact().problem.n * kept * settings.target().itemsize, "kept": kept}
    columns = _columns(settings, call, of_alignment)
    return {**base.sizes(exact().problem), **_errors(exact(), grams), **unbiased, **size, **columns}


def _sketch(
    settings: Settings, exact: base.Once[Truth], prepared: base.Once[Any], name: str, k: int, first: int
) -> dict[str, Any]:
    probes = count_sketch.CountSketch.probes
    problem, width = exact().problem, k // probes
    _check(settings, problem, name)
    grams: list[tuple[np.ndarray, np.ndarray]] = []
    seeds = iter(range(first, first + settings.seeds))

    def kernels(metric: str, seed: int) -> list[np.ndarray]:
        jacobians = prepared().jacobians(metric)
        return [count_sketch.kernel(count_sketch.probed(j, probes, width, seed)) for j in jacobians]

    def one() -> float:
        found = kernels("alignment", next(seeds))
        theta, theta_f = (np.kron(kernel / problem.O, np.eye(problem.O)) for kernel in found)
        grams.append((theta, theta_f))
        return alignment(*found)

    of_alignment = timed(one, settings.seeds - 1)
    call = timed(lambda: float(np.linalg.norm(kernels("norm", first)[0])), settings.calls)
    size = {"bytes": problem.N * probes * width * settings.target().itemsize, "kept": probes * width}
    return {**base.sizes(problem), **_errors(exact(), grams), **size, **_columns(settings, call, of_alignment)}


def _estimator(
    settings: Settings, exact: base.Once[Truth], prepared: base.Once[Any], name: str, passes: int, first: int
) -> dict[str, Any]:
    method, problem = methods.get(name), exact().problem
    seeds = range(first, first + settings.seeds)
    for metric, budget in (("norm", passes), ("alignment", 2 * passes)):
        if why := method.unsupported_reason(problem, metric, settings.target(), budget):
            raise Unavailable(why)
    settings.limits.check_memory(method.bytes_needed(problem, "alignment", settings.target(), 2 * passes))
    norms = [method.estimate(prepared(), "norm", passes, seed).value / exact().norm - 1 for seed in seeds]
    left, alignments = iter(seeds), list[float]()

    def one() -> None:
        found = method.estimate(prepared(), "alignment", 2 * passes, next(left)).value
        alignments.append(found / exact().alignment - 1)

    of_alignment = timed(one, settings.seeds - 1)
    call = timed(lambda: method.estimate(prepared(), "norm", passes, first), settings.calls)
    found = {**_rms("norm_unbiased", norms), **_rms("alignment_unbiased", alignments)}
    return {**base.sizes(problem), **found, **_columns(settings, call, of_alignment)}


def _fixed(settings: Settings, exact: base.Once[Truth], prepared: base.Once[Any], name: str) -> dict[str, Any]:
    method, problem = methods.get(name), exact().problem
    _check(settings, problem, name)
    call = timed(lambda: method.estimate(prepared(), "norm"), settings.calls)
    of_alignment = timed(lambda: method.estimate(prepared(), "alignment"), settings.calls)
    off = call.first.value / exact().norm - 1
    found = {"norm_plug_in": abs(off), "norm_bias": off}
    found["alignment_plug_in"] = abs(of_alignment.first.value / exact().alignment - 1)
    for metric in ("trace", "effective_rank"):
        found[f"{metric}_bias"] = method.estimate(prepared(), metric).value / getattr(exact(), metric) - 1
    entries = problem.n**2
    if name in KERNELS:
        kernel = _kernel(prepared(), KERNELS[name])
        entries, theta = kernel.size, np.kron(kernel, np.eye(problem.n // len(kernel)))
        found |= {"gram_error": exact().gram_error(theta), "pntk_error": exact().pntk_error(theta)}
    elif method.kind != "exact":
        entries = kronecker.entries(problem.theta_0)
    found["bytes"] = entries * settings.target().itemsize
    return {**base.sizes(problem), **found, **_columns(settings, call, of_alignment), "seeds": 1}


def _kernel(prepared: Any, name: str) -> np.ndarray:
    """A kernel of the layerwise engine, ``[N, N]``, or ``[n, n]`` for Theta."""
    from ntkbench.layerwise import sample_kernels

    (end,) = prepared.ends("norm")
    made = sample_kernels.get(name).compute(end.engine, end.parameters, end.x)
    return arrays.to_numpy(made, np.float64)


def _columns(settings: Settings, call: Timed, of_alignment: Timed) -> dict[str, Any]:
    seconds = quartiles("alignment_seconds", of_alignment.seconds)
    return {**call.columns(), **seconds, "alignment_calls": len(of_alignment.seconds), "seeds": settings.seeds}
