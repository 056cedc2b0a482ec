"""Which methods a metric is tried by, in which order, and what becomes of those that fail."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ntkbench import errors, methods, metrics, operators
from ntkbench.errors import BadInput, OverMemory, Unavailable, Undefined
from ntkbench.estimate import Estimate, Estimates
from ntkbench.methods import Method
from ntkbench.methods.base import Incremental, Stochastic
from ntkbench.operators import arrays, declares
from ntkbench.operators.certificate import Uncertified
from ntkbench.options import Options, Target
from ntkbench.problem import Problem

EXACT_PASSES = 64
"""Passes for each set of weights that ``method="auto"`` spends on an exact value when no budget is given."""

EXACT = {
    "torch": ("structured_derivatives", "jacobian_contraction", "naive_jacobian"),
    "jax": ("nt_structured_derivatives", "nt_jacobian_contraction"),
}
"""What ``method="auto"`` tries first, the cheapest first; Theta must fit in memory for the first, J for the others."""

TOLERANCE_PASSES = 4096
"""The most passes on the way to a tolerance when no budget is given."""

PAIRS = ("structured_block_u_statistics", "block_u_statistics")

WHOLE = ("hutchinson", "gram_reverse")
"""The second takes no JVPs, which not every network has."""

OF_RECURRENT = "group_u_statistics"
"""Tried before these where the network declares its recurrence: a trial's gradient would take more than its pass."""

STOCHASTIC = {
    "trace": (("per_sample_trace",), ("one_sided_reverse",)),
    "norm": (PAIRS, WHOLE),
    "effective_rank": (PAIRS, WHOLE),
    "alignment": (PAIRS, WHOLE),
}
"""What ``method="auto"`` falls back on where samples are independent, and then or where not, on products over the whole
batch."""

FLOOR = "naive_jacobian"
"""Tried last: row by row, a backward pass that is not linear in its cotangent is right as well."""


class Underflow(BadInput):
    """Gradients that are too small for a precision."""


Prepare = Callable[[Method], Any]
"""What :meth:`Method.prepare` makes of a problem."""


def estimates(problem: Problem, names: Sequence[str], target: Target, options: Options, prepare: Prepare) -> Estimates:
    """Metrics of a problem, by the method that was asked for or by the first one that works.

    Args:
        problem: what they are of.
        names: metrics; the last one decides which methods are tried.
        target: where to compute.
        options: what is asked for.
        prepare: makes a method ready for the problem on the target.

    Raises:
        BadInput: the method that was asked for does not serve, or none does; says why.
        OverMemory: it would need more than the target's memory at once.
        Unavailable: the device is not there.
        Undefined: the kernel has no such metric.
    """
    chosen = None if options.method == "auto" else methods.get(options.method)

    def run(method: Method) -> dict[str, Estimate]:
        try:
            found = _by(problem, tuple(names), target, options, prepare, method)
        except Undefined:
            check_range(problem, names, target)
            raise
        if not _is_large(problem, target, found):
            check_range(problem, names, target)
        return found

    if chosen is not None:
        return Estimates(_named(run, chosen, names))
    reasons: list[str] = []
    # One method for all: what the dearest takes is affordable for the others.
    for name in choices(problem, names[-1], target, options.passes, options.rtol):
        step = methods.get(name)
        if set(names) <= set(step.metrics):
            try:
                found = run(step)
            except (Undefined, Unavailable, Underflow):
                raise  # of the kernel or of the machine, and so of every method
            except Exception as error:  # whatever a method does to a network, the next one may work
                reasons.append(f"{step.name}: {errors.reason(error)}")
            else:
                said = tuple(f"not by {reason}" for reason in reasons)
                return Estimates({key: replace(e, notes=(*e.notes, *said)) for key, e in found.items()})
    raise BadInput(f"no method gives the {' and '.join(names)} of this network: {'; '.join(reasons)}")


def choices(
    problem: Problem, metric: str, target: Target, passes: int | None = None, rtol: float | None = None
) -> list[str]:
    """The methods that ``method="auto"`` stands for, the first one that works; the rule is in :func:`ntkbench.trace`.

    Args:
        passes: the most passes to spend; ``None`` for the defaults.
        rtol: a tolerance, which random probes may reach for less than what exact methods cost.
    """
    ends = len(metrics.parameter_sets(metric))
    limit = EXACT_PASSES * ends if passes is None else passes
    if rtol is not None:
        limit = min(limit, EXACT_PASSES * ends)
    found = []
    for name in EXACT[target.backend]:
        method = methods.get(name)
        width = problem.n if name.endswith("structured_derivatives") else problem.P
        # The trace takes every row once; the others would make rows anew for every pair of blocks that do not fit.
        fits = metric == "trace" or ends * problem.n * width * target.itemsize <= target.memory
        needed = method.passes_needed(problem, metric, target)
        passes_taken = ends * problem.O if needed is None else needed  # neural-tangents' programs count none
        if fits and passes_taken <= limit and method.unsupported_reason(problem, metric, target) is None:
            found.append(name)
    independent, whole = STOCHASTIC[metric]
    if metric != "trace" and declares(problem.module):
        independent = (OF_RECURRENT, *independent)
    found += whole if problem.samples_interact else (*independent, *whole)
    if target.backend == "torch" and FLOOR not in found:
        needed = methods.get(FLOOR).passes_needed(problem, metric, target)
        if needed is not None and needed <= (TOLERANCE_PASSES if passes is None else passes):
            found.append(FLOOR)
    return found


def check(names: Sequence[str], options: Options) -> None:
    """Refuse a method that does not exist, and options that it does not have.

    Raises:
        BadInput: says what is allowed.
    """
    if options.method == "auto":
        return
    method = methods.get(options.method)
    if not set(names) <= set(method.metrics):
        given = ", ".join(method.metrics)
        raise BadInput(f"{method.name} cannot give the {' and '.join(names)} of this network: gives {given} only")
    if options.passes is not None and not method.takes_passes:
        raise BadInput(f"{method.name} is {method.kind} and takes no passes: it spends what it needs; leave passes out")
    if options.rtol is not None and not isinstance(method, Incremental):
        able = (name for name in methods.names() if isinstance(methods.get(name), Incremental))
        allowed = ", ".join(name for name in able if set(names) <= set(methods.get(name).metrics))
        raise BadInput(f"{method.name} takes no rtol: its probes cannot be added to; allowed: {allowed}")


def check_range(problem: Problem, names: Sequence[str], target: Target) -> None:
    """Refuse gradients that are so small that their squares, or those of the kernel, underflow.

    Cost: one plain backward pass for each parameter set of a problem.

    Raises:
        Underflow: they do; says what helps.
    """
    smallest = _smallest(target)
    limit = problem.P * smallest
    if set(names) != {"trace"}:
        limit = max(limit, math.sqrt(problem.n * smallest))
    for weights in metrics.parameter_sets(names[-1]):
        if weights not in problem._row_norms:
            problem._row_norms[weights] = _row_norm(problem, weights, target)
        norm = problem._row_norms[weights]
        if 0 < norm < math.sqrt(limit):
            remedy = "choose dtype='float64'" if target.dtype == "float32" else "scale the outputs"
            raise Underflow(
                f"gradients are so small, about {norm:.0e} for an output, that squares underflow in {target.dtype}: "
                f"{remedy}"
            )


def _is_large(problem: Problem, target: Target, found: Mapping[str, Estimate]) -> bool:
    """Whether the metrics are so large that no underflow can matter; ratios alone do not tell."""
    smallest = _smallest(target)
    if "alignment" not in found and "norm" in found:
        return abs(found["norm"].value) > problem.n * math.sqrt(smallest)
    return set(found) == {"trace"} and is_large(problem, target, abs(found["trace"].value) / problem.n)


def is_large(problem: Problem, target: Target, square: float) -> bool:
    """Whether the squared norm of a row of J is too large for an underflow in it to matter."""
    return square > problem.P * _smallest(target)


def _smallest(target: Target) -> float:
    """The smallest sum that stays right to rounding when terms below the smallest normal number are lost."""
    limits = np.finfo(target.dtype)
    return float(limits.tiny) / float(limits.eps)


def _row_norm(problem: Problem, weights: str, target: Target) -> float:
    """The root mean square norm of a row of J by one random probe; infinite where it cannot be had."""
    problem, weights = problem.end(weights)
    signs = np.random.default_rng(0).choice(np.array([-1.0, 1.0]), problem.n)
    widest = (target.dtype,) if target.backend == "jax" else dict.fromkeys((target.dtype, "float64"))
    for dtype in widest:
        try:
            gradient = operators.plain_gradient(problem, weights, replace(target, dtype=dtype), list(problem.theta_0))
            found = arrays.to_numpy(gradient(signs), np.float64)
        except Exception:  # a network that does not run in this precision; certificates say what else is wrong
            return math.inf
        if largest := float(abs(found).max()):
            return largest * float(np.linalg.norm(found / largest)) / problem.n**0.5
    return 0.0


def _named(run: Callable[[Method], dict[str, Estimate]], method: Method, names: Sequence[str]) -> dict[str, Estimate]:
    """What a method that was asked for by name gives, or one line that says why it does not."""
    refused = f"{method.name} cannot give the {' and '.join(names)} of this network"
    try:
        return run(method)
    except Uncertified as error:
        raise Uncertified(f"{refused}: {error}") from error
    except errors.NtkbenchError:
        raise
    except Exception as error:
        kind = OverMemory if isinstance(error, MemoryError) or "out of memory" in errors.summary(error) else BadInput
        raise kind(f"{refused}: {errors.summary(error)}") from error


def _by(
    problem: Problem, names: tuple[str, ...], target: Target, options: Options, prepare: Prepare, method: Method
) -> dict[str, Estimate]:
    budget = None
    if isinstance(method, Stochastic):
        default = method.default_passes if options.rtol is None else TOLERANCE_PASSES
        budget = default if options.passes is None else options.passes
        worth = method.default_max_passes(problem)
        if worth is not None and options.rtol is None and (options.method == "auto" or options.passes is None):
            budget = min(budget, worth)
    for metric in names:
        reason = method.unsupported_reason(problem, metric, target, budget)
        if reason:
            raise BadInput(f"{method.name} cannot give the {metric} of this network: {reason}")
        needed = method.bytes_needed(problem, metric, target, budget)
        if needed > target.memory:
            raise OverMemory(f"{method.name} needs {needed} bytes at once for the {metric}; memory is {target.memory}")
    prepared = prepare(method)
    if budget is not None and isinstance(method, Incremental):
        found = method.estimates(prepared, names, budget, options.seed, options.rtol, options.confidence)
    else:
        found = {metric: method.estimate(prepared, metric, budget, options.seed) for metric in names}
    for metric, estimate in found.items():
        if not math.isfinite(estimate.value):
            raise BadInput(f"the {metric} by {method.name} is {estimate.value}: gradients are not finite, or overflow")
    return found
