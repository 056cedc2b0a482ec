"""The order in which ``auto`` tries methods for a metric, and how it goes on if one fails."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np
from scipy.special import ndtri

from ntkbench import errors, methods, metrics, operators, progress_bar
from ntkbench.errors import BadInput, Missing, OverMemory, Unavailable, Undefined, Unsupported
from ntkbench.estimate import Estimate, Estimates, rounding_note
from ntkbench.methods import Method
from ntkbench.methods.base import ExactIsCheaper, Incremental, OthersAreCheaper, Stochastic, wide
from ntkbench.operators import arrays, declares
from ntkbench.operators.certificate import Uncertified
from ntkbench.options import Options, Target
from ntkbench.problem import Problem, on_shapes

EXACT = {
    "torch": (
        "recurrent_exact_trace",
        "wide_head",
        "structured_derivatives",
        "jacobian_contraction",
        "parameter_gram",
        "batched_jacobian",
        "naive_jacobian",
    ),
    "jax": (
        "recurrent_exact_trace",
        "nt_structured_derivatives",
        "nt_jacobian_contraction",
        "parameter_gram",
        "batched_jacobian",
    ),
}
"""Exact methods in the order in which ``method="auto"`` tries them: the first that applies is the cheapest, except that
the Gram matrix of parameters comes first where it is the smaller one."""

BY_PARAMETERS = "parameter_gram"

HEAD, NARROW = "wide_head", 0.5
"""Used if it takes at most this share of the passes of the whole network: its set-up and certificate are separate."""

DENSE = 4.0
"""Operations per second of products of large matrices, relative to those of passes of recurrent networks."""

HOLDS_NO_ROWS = ("recurrent_exact_trace", HEAD, "structured_derivatives", BY_PARAMETERS, "nt_structured_derivatives")
"""Exact methods that do not keep J; the others recompute rows for every pair of blocks that do not fit in memory."""

TYPICAL = 2.5
"""Probes that a tolerance takes, relative to the fewest possible; 2 to 3 in the study ``auto_choice``."""

RUN = 1.5e8
"""Operations that take as long as a run of a traced network on few numbers, some 2 ms: the calls of its operations. The
forward pass, about a pass, adds to these."""

TOLERANCE_PASSES = 4096
"""Maximum number of passes to a tolerance if no budget is given."""

HEAD_PAIRS = "wide_head_u_statistics"
"""Tried before other estimators if a shorter head has at most the share :data:`NARROW` of the outputs."""

PAIRS = ("structured_block_u_statistics", "block_u_statistics")

WHOLE = ("nystrom_loo", "hutchinson", "gram_reverse")
"""The first is the most accurate where the spectrum decays, and as good elsewhere, but it cannot add probes. The last
takes no JVPs, which some networks do not support."""

OF_RECURRENT = "group_u_statistics"
"""Tried before these if the network declares its recurrence: the gradient of one trial costs more than its pass."""

STOCHASTIC: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trace": (("structured_block_u_statistics", "per_sample_trace"), ("hutchpp_adaptive", "one_sided_reverse")),
    "norm": (PAIRS, WHOLE),
    "effective_rank": (PAIRS, WHOLE),
    "alignment": (PAIRS, WHOLE),
}
"""Estimators of ``method="auto"``: those for independent samples, then those by products over the whole batch, which
also allow samples to interact."""

OTHER_SIDE = {
    "per_sample_trace": "per_sample_trace_forward",
    "hutchpp_adaptive": "hutchpp_adaptive_forward",
    "one_sided_reverse": "one_sided_forward",
}
"""The forward side of trace estimators, for networks with fewer parameters than outputs (of a sample, or in all)."""

SIDES = (*OTHER_SIDE, *OTHER_SIDE.values())

FLOOR = "naive_jacobian"
"""Tried last: row by row, results are right even if the backward pass is not linear in its cotangent."""


class Dearer(errors.NtkbenchError):
    """An exact value costs more than an estimate would, because memory is limited.

    Args:
        passes: passes of the exact value.
        limit: maximum number of passes of an estimate.
        memory: bytes.
    """

    def __init__(self, passes: float, limit: float, memory: int) -> None:
        super().__init__(f"{passes:g} passes in {memory} bytes of memory, more than the {limit:g} of an estimate")
        self.passes = passes


class Underflow(BadInput):
    """Gradients that are too small for a precision."""


def concerns_all_methods(error: Exception) -> bool:
    """Whether an error comes from the kernel or the machine, so that no other method can work."""
    return isinstance(error, (Undefined, Unavailable, Underflow)) and not isinstance(error, (Missing, Unsupported))


Prepare = Callable[[Method], Any]
"""The result of :meth:`Method.prepare` for a problem."""


def estimates(problem: Problem, names: Sequence[str], target: Target, options: Options, prepare: Prepare) -> Estimates:
    """Metrics of a problem, by the requested method or by the first one that works.

    Args:
        problem: the problem.
        names: metrics; the last one decides which methods are tried.
        target: where to compute.
        options: the requested options.
        prepare: makes a method ready for the problem on the target.

    Raises:
        BadInput: the requested method does not apply, or none does; says why.
        OverMemory: it would need more than the target's memory at once.
        Unavailable: the device is not available.
        Undefined: the kernel has no such metric.
    """
    metric = names[-1]  # one method for all: the cost of the most expensive metric is affordable for the others
    if options.method != "auto":
        chosen = methods.get(options.method)
        return Estimates(_named(lambda: _by(problem, names, target, options, prepare, chosen), chosen, names))
    search = _Search(problem, names, target, options, prepare)
    for name, limit in _steps(problem, metric, target, options, search.exact):
        if found := search.tried(name, limit):
            return found
    for name in list(search.given_up):  # nothing else worked
        if found := search.tried(name, math.inf):
            return found
    reasons = "; ".join(remark.removeprefix("passed over ") for remark in search.remarks)
    raise BadInput(f"no method can compute the {' and '.join(names)} of this network: {reasons}")


class _Search:
    """The costs and the remarks of the methods that were tried.

    Attributes:
        exact: remaining exact methods, the cheapest first, with the passes that each takes.
        remarks: why others were not used, and what was tried first.
        given_up: methods that were given up because other methods cost less.
    """

    def __init__(
        self, problem: Problem, names: Sequence[str], target: Target, options: Options, prepare: Prepare
    ) -> None:
        self._problem, self._names, self._target, self._options = problem, names, target, options
        self._prepare = prepare
        self._spent = 0.0
        exact = exact_methods(problem, names[-1], target)
        self.exact = {name: passes for name, passes in exact.items() if self._is_within_budget(methods.get(name))}
        self.remarks: list[str] = []
        self.given_up: list[str] = []

    def tried(self, name: str, limit: float) -> Estimates | None:
        """Estimates by a method, or by an exact one if that costs less than a tolerance; ``None`` if it fails.

        Args:
            limit: passes that an exact method may take.
        """
        needed = self.exact.pop(name, math.inf)
        step, options = methods.get(name), self._options
        if self._spent:
            options = replace(options, passes=int(_most(options) - self._spent))
        if not set(self._names) <= set(step.metrics) or (options.rtol is not None and not _takes_rtol(step)):
            return None
        if not self._is_within_budget(step):
            return None
        left = _most(options)
        stop = min((passes for passes in self.exact.values() if passes <= left), default=math.inf)
        try:
            most = self._most_probes(step)
            found = _by(self._problem, self._names, self._target, options, self._prepare, step, limit, stop, most)
        except ExactIsCheaper as stopped:
            self._spent += stopped.passes
            why = f"rtol={options.rtol:g} seemed to need more passes than exact values"
            self.remarks.append(f"{self._spent:g} passes of {name} came first: {why}")
            left -= stopped.passes
            for other in [other for other, passes in self.exact.items() if passes <= left]:
                if exact := self.tried(other, left):
                    return exact
            return self.tried(name, limit)
        except OthersAreCheaper as stopped:
            self._spent += stopped.passes
            self.given_up.append(name)
            self.remarks.append(f"{stopped.passes:g} passes of {name} came first: {stopped.cheaper} are cheaper")
            return None
        except Dearer as error:
            self.remarks.append(f"passed over {name}: {error}")
            self.exact[name] = max(needed, error.passes)
            return None
        except Exception as error:  # whatever the error, the next method may work
            if concerns_all_methods(error):
                raise
            self._refused(name, errors.reason(error))
            return None
        if options.rtol is not None and not isinstance(step, Stochastic) and not _reached(found, options):
            self.remarks.append(rounding_note(options.rtol))
        if name in SIDES:
            self.remarks.insert(0, _side(self._problem, name))
        return Estimates({key: self._noted(each) for key, each in found.items()})

    def _is_within_budget(self, method: Method) -> bool:
        """Whether a budget of the user's own pays for all metrics, if the method computes each of them separately."""
        if self._options.passes is None or isinstance(method, Stochastic):
            return True
        needed = (method.passes_needed(self._problem, metric, self._target) for metric in self._names)
        return self._spent + sum(passes or 0.0 for passes in needed) <= self._options.passes

    def _most_probes(self, method: Method) -> float:
        """Probes beyond which a method is given up; a budget of the user's own is better spent on accurate probes."""
        if not isinstance(method, Incremental) or self._options.passes is not None or method.name in self.given_up:
            return math.inf
        return method.worthwhile_probes(self._problem)

    def _refused(self, name: str, reason: str) -> None:
        """Note why a method cannot be used; methods with the same reason share a remark."""
        for i, remark in enumerate(self.remarks):
            if remark.startswith("passed over ") and remark.endswith(f": {reason}"):
                self.remarks[i] = f"{remark.removesuffix(f': {reason}')} and {name}: {reason}"
                return
        self.remarks.append(f"passed over {name}: {reason}")

    def _noted(self, estimate: Estimate) -> Estimate:
        """An estimate with the passes that were spent before it, and the remarks so far."""
        passes = None if estimate.passes is None else estimate.passes + self._spent
        return replace(estimate, passes=passes, notes=(*estimate.notes, *self.remarks))


def _steps(
    problem: Problem, metric: str, target: Target, options: Options, exact: dict[str, float]
) -> Iterator[tuple[str, float]]:
    """Methods in the order in which they are tried, and the passes that each may take if it is exact.

    Before each estimator come the exact methods that cost no more than it does, and at the end the others.

    Args:
        exact: remaining exact methods, with their passes. The consumer of the iterator also removes a method from
            these, or puts it back with more passes.
    """
    for name in _estimators(problem, metric, target):
        limit = _expected_passes(problem, metric, target, options, methods.stochastic(name))
        while able := [other for other, needed in exact.items() if needed <= limit]:
            yield able[0], limit
        yield name, math.inf
    most = _most(options)
    while able := [other for other, needed in exact.items() if needed <= most]:
        yield able[0], math.inf
        exact.pop(able[0], None)
    if target.backend == "torch" and metric in methods.get(FLOOR).metrics:
        needed = methods.get(FLOOR).passes_needed(problem, metric, target)
        if needed is not None and needed <= most:
            yield FLOOR, math.inf


def _expected_passes(problem: Problem, metric: str, target: Target, options: Options, method: Stochastic) -> float:
    """Passes that a method is expected to take; an exact method that takes no more is tried first.

    To a tolerance these are the passes before the error is first checked. If that is too early, a further run of the
    network counts as well (see :data:`RUN`), and for a trace, whose exact value takes no products of kernels, always.
    They are 0 if the method does not apply, and the whole budget if one is given.
    """
    if method.unsupported_reason(problem, metric, target) is not None:
        return 0.0
    if options.rtol is None:
        return default_passes(problem, metric, method) if options.passes is None else options.passes
    if not isinstance(method, Incremental):
        return 0.0
    quantile = float(ndtri(0.5 + options.confidence / 2))
    like = "norm" if metric == "alignment" else metric
    typical = TYPICAL * method.probes_to_reach(problem, like, options.rtol / quantile)
    first = method.probes_to_decide(problem, metric)
    expected = float(method.cost(metric, max(first, math.ceil(typical))))
    if metric == "trace" or typical > first:
        expected += _passes_of_a_run(problem, metric)
    return expected if options.passes is None else min(expected, options.passes)


def _passes_of_a_run(problem: Problem, metric: str) -> float:
    """Passes that take as long as what is independent of their number: see :data:`RUN`."""
    ends = len(metrics.parameter_sets(metric))
    forward = 2 * problem.N * problem.P * reuse(problem)
    return ends * (1 + RUN / (forward if metric == "trace" else 2 * forward))


def reuse(problem: Problem) -> float:
    """Multiplications of a forward pass for each parameter and sample, at least 1; 1 also where they are not known.

    It is 1 for an MLP, and the number of positions in an image or a sequence for layers that share weights.
    """
    if not problem._reuse:
        problem._reuse.append(max(1.0, _multiplications(problem) / (problem.N * problem.P)))
    return problem._reuse[0]


def _multiplications(problem: Problem) -> float:
    """Those of matrix products and convolutions in a forward pass of all samples; 0 if they cannot be counted."""
    if problem.module is None:
        return 0.0
    if declares(problem.module):  # without a count of each of its steps
        return float(problem.N * problem.P * problem.x.shape[1])
    from torch.utils.flop_counter import FlopCounterMode

    try:
        with FlopCounterMode(display=False) as counter:
            on_shapes(problem, problem.module)
    except Exception:  # a network that runs, but not while its operations are counted
        return 0.0
    return counter.get_total_flops() / 2


def _takes_rtol(method: Method) -> bool:
    return not isinstance(method, Stochastic) or isinstance(method, Incremental)


def _most(options: Options) -> float:
    """Maximum number of passes in total."""
    return TOLERANCE_PASSES if options.passes is None else options.passes


def _reached(found: Mapping[str, Estimate], options: Options) -> bool:
    """Whether estimates are within the tolerance, if there is one."""
    if options.rtol is None:
        return True
    return all(estimate.relative_width(options.confidence) <= options.rtol for estimate in found.values())


def _side(problem: Problem, name: str) -> str:
    """Why a trace is estimated on one side."""
    said = f"outputs of a sample ({problem.O})" if name.startswith("per_sample") else f"outputs ({problem.n})"
    if name in OTHER_SIDE:
        return f"reverse side: no more {said} than parameters ({problem.P})"
    return f"forward side: fewer parameters ({problem.P}) than {said}"


def choices(
    problem: Problem, metric: str, target: Target, passes: int | None = None, rtol: float | None = None
) -> list[str]:
    """The methods that ``method="auto"`` tries, in turn; the rule is in :func:`ntkbench.trace`.

    Args:
        passes: maximum number of passes; ``None`` for the defaults.
        rtol: a tolerance, which random probes may reach at a lower cost than exact methods.
    """
    exact, found = exact_methods(problem, metric, target), []
    for name, _ in _steps(problem, metric, target, Options(passes=passes, rtol=rtol), exact):
        exact.pop(name, None)
        found.append(name)
    return list(dict.fromkeys(found))


def exact_methods(problem: Problem, metric: str, target: Target) -> dict[str, float]:
    """The exact methods that apply, the cheapest first, with their passes if everything fits in memory.

    On recurrent networks most of the time goes to inner products of rows of J, or of its columns. These count as the
    number of passes that take the same time.
    """
    ends = len(metrics.parameter_sets(metric))
    names = list(EXACT[target.backend])
    if problem.n > problem.P:
        names.sort(key=lambda name: name != BY_PARAMETERS)
    found = {}
    for name in names:
        method = methods.get(name)
        # The trace uses every row once; other metrics recompute rows for every pair of blocks that does not fit.
        fits = (
            metric == "trace"
            or name in HOLDS_NO_ROWS
            or (ends * problem.n * problem.P * target.itemsize <= target.memory)
        )
        if fits and method.unsupported_reason(problem, metric, target) is None:
            needed = method.passes_needed(problem, metric, target)
            if name == HEAD and needed is not None and needed > NARROW * ends * problem.O:
                continue
            passes = ends * problem.O if needed is None else needed  # neural-tangents' programs count none
            found[name] = passes + _products_in_passes(problem, metric, name)
    return dict(sorted(found.items(), key=lambda item: item[1]))


def _products_in_passes(problem: Problem, metric: str, name: str) -> float:
    """The n^2 P or n P^2 multiplications for a kernel, in passes of 6 N T P each; see :data:`DENSE`."""
    if metric == "trace" or not declares(problem.module):
        return 0.0
    rows, kernels = problem.P if name == BY_PARAMETERS else problem.n, 3 if metric == "alignment" else 1
    return kernels * problem.n * rows / (DENSE * 6 * problem.N * problem.x.shape[1])


def _is_short(problem: Problem, metric: str, target: Target) -> bool:
    """Whether probes in the hidden dimension of a head have far fewer outputs, and no more than parameters."""
    if declares(problem.module) or methods.get(HEAD_PAIRS).unsupported_reason(problem, metric, target) is not None:
        return False
    share = wide.share(problem, metric)
    return share <= NARROW and share * problem.O <= problem.P


def _estimators(problem: Problem, metric: str, target: Target) -> list[str]:
    """The methods with random probes, in the order in which they are tried."""
    independent, whole = STOCHASTIC[metric]
    if declares(problem.module):
        # Traced layer by layer, a recurrence is unrolled.
        independent = independent[1:] if metric == "trace" else (OF_RECURRENT, *whole, *independent)
    if problem.P < problem.O:
        independent = _forward_first(independent)
    if _is_short(problem, metric, target):
        independent = (HEAD_PAIRS, *independent)
    if problem.n > problem.P:
        whole = _forward_first(whole)
    return list(whole if problem.samples_interact else dict.fromkeys((*independent, *whole)))


def _forward_first(names: Sequence[str]) -> tuple[str, ...]:
    return (*(OTHER_SIDE[name] for name in names if name in OTHER_SIDE), *names)


def default_passes(problem: Problem, metric: str, method: Stochastic) -> int:
    """The budget of a stochastic method if the user gives none."""
    return int(min(method.default_passes, _worth(problem, metric, method)))


def _worth(problem: Problem, metric: str, method: Stochastic) -> float:
    """Passes beyond which a method gains little for its time."""
    most = method.default_max_passes(problem)
    return math.inf if most is None else most * len(metrics.parameter_sets(metric))


def least_passes(problem: Problem, names: Sequence[str], method: Stochastic) -> int:
    """The smallest budget for several metrics, which share their probes if the method can add some."""
    each = [method.least_passes(problem, metric) for metric in names]
    return max(each) if isinstance(method, Incremental) else sum(each)


def _budgets(problem: Problem, names: Sequence[str], method: Method, passes: int | None) -> dict[str, int | None]:
    """The passes of each metric: all if metrics share their probes, or else a part in proportion to the fewest.

    Raises:
        BadInput: there are too few for all metrics together.
    """
    if passes is None or not isinstance(method, Stochastic) or isinstance(method, Incremental) or len(names) == 1:
        return dict.fromkeys(names, passes)
    together = least_passes(problem, names, method)
    if passes < together:
        raise BadInput(f"{method.name}: {' and '.join(names)} take at least {together} passes together; got {passes}")
    return {metric: passes * method.least_passes(problem, metric) // together for metric in names}


def _together(found: Mapping[str, Estimate], budgets: Mapping[str, int | None], passes: int) -> dict[str, Estimate]:
    """Estimates from separate probes, each with the passes of all of them and a note on its part of the budget."""
    spent = sum(estimate.passes or 0.0 for estimate in found.values())

    def noted(metric: str, estimate: Estimate) -> Estimate:
        note = f"the metrics share no probes: {budgets[metric]} of {passes} passes are for the {metric}"
        return replace(estimate, passes=spent, notes=(*estimate.notes, note))

    return {metric: noted(metric, estimate) for metric, estimate in found.items()}


def check(names: Sequence[str], options: Options) -> None:
    """Refuse a method that does not exist, and options that it does not have.

    Raises:
        BadInput: says what is allowed.
    """
    if options.method == "auto":
        return
    method = methods.get(options.method)
    if not set(names) <= set(method.metrics):
        given = ", ".join(method.given)
        raise BadInput(f"{method.name} cannot compute the {' and '.join(names)} of this network: gives {given} only")
    if options.passes is not None and not method.takes_passes:
        raise BadInput(f"{method.name} is {method.kind} and takes no budget of passes: omit passes")
    if options.rtol is not None and not isinstance(method, Incremental):
        able = (name for name in methods.names() if isinstance(methods.get(name), Incremental))
        allowed = ", ".join(name for name in able if set(names) <= set(methods.get(name).metrics))
        raise BadInput(f"{method.name} takes no rtol, because it cannot add probes; allowed: {allowed}")


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


def _all_passes(problem: Problem, names: Sequence[str], target: Target, prepared: Any, method: Method) -> float | None:
    """Passes of all metrics by a deterministic method; ``None`` if one has no such number."""
    total = 0.0
    for metric in names:
        needed = method.passes_needed(problem, metric, target)
        if needed is None:
            return None
        total += max(needed, method.planned_passes(prepared, metric))
    return total


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
    """The smallest sum that stays accurate to rounding if terms below the smallest normal number are lost."""
    limits = np.finfo(target.dtype)
    return float(limits.tiny) / float(limits.eps)


def _row_norm(problem: Problem, weights: str, target: Target) -> float:
    """The root mean square norm of a row of J by one random probe; infinite if it cannot be computed."""
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


def _named(run: Callable[[], dict[str, Estimate]], method: Method, names: Sequence[str]) -> dict[str, Estimate]:
    """The result of a method requested by name, or one line that says why there is none."""
    refused = f"{method.name} cannot compute the {' and '.join(names)} of this network"
    try:
        return run()
    except Uncertified as error:
        raise Uncertified(f"{refused}: {error}") from error
    except errors.NtkbenchError:
        raise
    except Exception as error:
        kind = OverMemory if isinstance(error, MemoryError) or "out of memory" in errors.summary(error) else BadInput
        raise kind(f"{refused}: {errors.summary(error)}") from error


def _by(
    problem: Problem,
    names: Sequence[str],
    target: Target,
    options: Options,
    prepare: Prepare,
    method: Method,
    limit: float = math.inf,
    stop: float = math.inf,
    most: float = math.inf,
) -> dict[str, Estimate]:
    """Metrics by one method.

    Args:
        limit: passes that a deterministic method may take in the target's memory.
        stop: passes of an exact value; a tolerance is given up once it takes more.
        most: probes beyond which it is given up.

    Raises:
        Dearer: the method takes more passes than ``limit``.
        GivenUp: a tolerance is given up.
        BadInput: it does not apply, or its result is not finite.
        OverMemory: it would need more than the target's memory at once.
    """
    found = _computed(problem, names, target, options, prepare, method, limit, stop, most)
    if not _is_large(problem, target, found):
        check_range(problem, names, target)
    return found


def _computed(
    problem: Problem,
    names: Sequence[str],
    target: Target,
    options: Options,
    prepare: Prepare,
    method: Method,
    limit: float,
    stop: float,
    most: float,
) -> dict[str, Estimate]:
    budget = None
    if isinstance(method, Stochastic):
        budget = options.passes
        if options.rtol is not None:
            budget = TOLERANCE_PASSES if budget is None else budget
        elif budget is None:
            budget = default_passes(problem, names[-1], method)
        elif options.method == "auto":
            budget = int(min(budget, _worth(problem, names[-1], method)))
    for metric in names:
        reason = method.unsupported_reason(problem, metric, target, budget)
        if reason:
            raise BadInput(f"{method.name} cannot compute the {metric} of this network: {reason}")
    budgets = _budgets(problem, names, method, budget)
    for metric in names:
        needed = method.bytes_needed(problem, metric, target, budgets[metric])
        if needed > target.memory:
            raise OverMemory(f"{method.name} needs {needed} bytes at once for the {metric}; memory is {target.memory}")
    prepared = prepare(method)
    if limit < math.inf:
        planned = max(method.planned_passes(prepared, metric) for metric in names)
        if planned > limit:
            raise Dearer(planned, limit, target.memory)
    total: float | None = budget if options.rtol is None else None
    if not isinstance(method, Stochastic):
        total = _all_passes(problem, names, target, prepared, method)
        if total is not None and options.passes is not None and total > options.passes:
            raise BadInput(f"{total:g} passes in {target.memory} bytes of memory, and {options.passes} are allowed")
    try:
        with progress_bar.of_passes(f"{', '.join(names)} by {method.name}", problem.N, total):
            if budget is not None and isinstance(method, Incremental):
                wanted = (options.seed, options.rtol, options.confidence)
                found = method.estimates(prepared, names, budget, *wanted, exact_passes=stop, most_probes=most)
            else:
                found = {metric: method.estimate(prepared, metric, budgets[metric], options.seed) for metric in names}
                if budget is not None and len(names) > 1:
                    found = _together(found, budgets, budget)
    except Undefined:
        check_range(problem, names, target)
        raise
    for metric, estimate in found.items():
        if not math.isfinite(estimate.value):
            raise BadInput(f"the {metric} by {method.name} is {estimate.value}: gradients are not finite, or overflow")
    return found
