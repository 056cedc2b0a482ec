"""The order in which ``auto`` tries methods for a metric, and its fallbacks."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import numpy as np
from scipy.special import ndtri

from ntkbench import errors, methods, metrics, operations, operators, progress_bar
from ntkbench.errors import BadInput, Missing, NotFinite, OverMemory, Unavailable, Undefined, Unsupported
from ntkbench.estimate import Estimate, Estimates, rounding_note
from ntkbench.methods import Method
from ntkbench.methods.base import WORTH, ExactIsCheaper, Incremental, OthersAreCheaper, Stochastic, Stopping, wide
from ntkbench.operators import arrays, declares
from ntkbench.operators.certificate import Uncertified, random_weights
from ntkbench.options import Options, Target
from ntkbench.problem import Problem
from ntkbench.units import counted, over_memory

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
"""Exact methods of ``method="auto"``, tried in the order of their operations (see :func:`work`); ties keep this
order."""

HEAD, NARROW = "wide_head", 0.5
"""Used if it takes at most this share of the passes of the whole network: it has its own set-up and certificate."""

DENSE = 2.0
"""Operations per second of products of large matrices, relative to those of passes; passes by layers and of recurrences
are as fast as the products."""

CLEAR = 2.0
"""Largest ratio of operations at which an exact value is preferred to an estimate with at least as many passes; rates
are known only to about this factor."""

CLOSE = 1.25
"""The same with ``rtol``, for any number of passes."""

HOLDS_NO_ROWS = ("recurrent_exact_trace", HEAD, "structured_derivatives", "parameter_gram", "nt_structured_derivatives")
"""Exact methods that do not keep J; the others recompute rows for every pair of blocks that do not fit in memory."""

SURELY = 4.0
"""Ratio of operations at which an abandoned method is resumed. The number of probes that each method needs is predicted
from its first check, to a factor of 2."""

TYPICAL = 2.5
"""Probes that a tolerance takes, relative to the fewest possible; 2 to 3 in the study ``auto_choice``. For an alignment
it is 1, since its errors are often smaller."""

RUN = 2e7
"""Overhead of a run for each layer of the network, in operations; it does not depend on the number of probes."""

TOLERANCE_PASSES = 4096
"""Maximum number of passes with ``rtol`` if no budget is given."""

HEAD_PAIRS = "wide_head_u_statistics"
"""Tried before other estimators if a shorter head has at most the share :data:`NARROW` of the outputs."""

PAIRS = ("structured_block_u_statistics", "block_u_statistics")

WHOLE = ("nystrom_loo", "hutchinson", "gram_reverse")
"""The first is the most accurate where the spectrum decays, and as good elsewhere, but it cannot add probes. The last
takes no JVPs, which some networks do not support."""

OF_RECURRENT = "group_u_statistics"
"""Tried before these if the network declares its recurrence: the gradient of one trial costs more than its pass."""

POOLED, LIGHT = "hutchinson", 2.5
"""With ``rtol``, tried before :data:`OF_RECURRENT` if its first check takes at most this many times the operations, as
with few trials. Gradients of groups are slower by about this factor."""

STOCHASTIC: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "trace": (("structured_block_u_statistics", "per_sample_trace"), ("hutchpp_adaptive", "one_sided_reverse")),
    "norm": (PAIRS, WHOLE),
    "effective_rank": (PAIRS, WHOLE),
    "alignment": (PAIRS, WHOLE),
}
"""Estimators of ``method="auto"``: those for independent samples, then those from products over the whole batch, which
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


class Cost(NamedTuple):
    """Cost of a method by counts alone, so that the choice is always the same.

    Attributes:
        passes: number of passes.
        work: operations; those of passes count :data:`DENSE` times, and each run adds :data:`RUN` per layer.
    """

    passes: float
    work: float


UNLIMITED = Cost(math.inf, math.inf)


class Dearer(errors.NtkbenchError):
    """An exact value costs more than an estimate would, because memory is limited.

    Args:
        passes: passes of the exact value.
        memory: bytes.
    """

    def __init__(self, passes: float, memory: int) -> None:
        super().__init__(f"{passes:g} passes with memory={memory} take longer than an estimate")
        self.passes = passes


class DoesNotApply(BadInput):
    """A method that does not compute a metric of a network.

    Attributes:
        reason: why not.
    """

    def __init__(self, method: str, metric: str, reason: str) -> None:
        """See the attributes."""
        super().__init__(f"{method} cannot compute the {metrics.words(metric)} of this network: {reason}")
        self.reason = reason


class TooFewPasses(BadInput):
    """A budget that is too small for a method.

    Attributes:
        least: the smallest budget.
    """

    def __init__(self, message: str, least: float) -> None:
        """See the attributes."""
        super().__init__(message)
        self.least = least


class Underflow(BadInput):
    """Gradients that are too small for a precision."""


def concerns_all_methods(error: Exception) -> bool:
    """Whether an error comes from the kernel or the machine, so that no other method can work."""
    return isinstance(error, (Undefined, Unavailable, Underflow, errors.NoSecondPass)) and not isinstance(
        error, (Missing, Unsupported)
    )


Prepare = Callable[[Method], Any]
"""Returns the result of :meth:`Method.prepare` for a problem."""


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
    metric = names[-1]  # one method for all: if it is affordable for the most expensive metric, it is for the others
    if options.method != "auto":
        chosen = methods.get(options.method)
        return Estimates(_named(lambda: _by(problem, names, target, options, prepare, chosen), chosen, names))
    search = _Search(problem, names, target, options, prepare)
    for name, limit in _steps(problem, metric, target, options, search.exact):
        if found := search.tried(name, limit):
            return found
    for name in list(search.given_up):  # nothing else worked
        if found := search.tried(name):
            return found
    said = f"no method can compute the {metrics.words(*names)} of this network"
    if not search.least:
        raise BadInput(f"{said}: {_reasons(search.remarks)}")
    least = search.least | _unaffordable(problem, names, target, options)
    others = [remark for remark in search.remarks if not any(f" {name}: " in remark for name in search.least)]
    cheapest = min(least, key=least.__getitem__)
    needed = f"passes={options.passes} is too few, at least {least[cheapest]:g} are needed ({cheapest})"
    raise BadInput(f"{said}: {'; '.join(filter(None, (needed, _reasons(others))))}")


def _unaffordable(problem: Problem, names: Sequence[str], target: Target, options: Options) -> dict[str, float]:
    """Exact methods that apply but take more passes than the budget, with those of all metrics."""
    if options.passes is None:
        return {}
    found = {}
    for name in exact_methods(problem, names[-1], target):
        needed = (methods.get(name).passes_needed(problem, metric, target) for metric in names)
        if (total := sum(passes or 0.0 for passes in needed)) > options.passes:
            found[name] = total
    return found


def _reasons(remarks: Sequence[str]) -> str:
    """Remarks on methods that failed, each reason once: after the names of all methods that it holds for."""
    methods_of: dict[str, list[str]] = {}
    for remark in remarks:
        names, _, reason = remark.removeprefix("passed over ").partition(": ")
        for part in re.sub(r"^\w+ products: ", "", reason).split("; "):
            methods_of.setdefault(part, []).extend(names.split(" and "))
    grouped: dict[str, list[str]] = {}
    for part, each in methods_of.items():
        grouped.setdefault(" and ".join(dict.fromkeys(each)), []).append(part)
    return "; ".join(f"{names}: {'; '.join(parts)}" for names, parts in grouped.items())


class _Search:
    """Costs and remarks of the methods that were tried.

    Attributes:
        exact: remaining exact methods, the cheapest first, with the passes that each takes.
        remarks: why others were not used, and what was tried first.
        given_up: methods that were abandoned because others cost less, with the operations that each needs.
        least: methods for which the budget is too small, with the smallest one.
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
        self.given_up: dict[str, float] = {}
        self.least: dict[str, float] = {}

    def tried(self, name: str, limit: Cost = UNLIMITED) -> Estimates | None:
        """Estimates by a method, or by an exact one if the tolerance would cost more; ``None`` if it fails.

        Args:
            limit: what an exact method may cost.
        """
        needed = self.exact.pop(name, math.inf)
        step, options = methods.get(name), self._options
        if self._spent:
            options = replace(options, passes=int(_most(options) - self._spent))
        if not set(self._names) <= set(step.metrics) or (options.rtol is not None and not _takes_rtol(step)):
            return None
        if not self._is_within_budget(step) or self._is_like_given_up(step):
            return None
        if self._target.backend not in step.backends:
            return None
        left = _most(options)
        try:
            stopping = self._stopping(step, left)
            found = _by(self._problem, self._names, self._target, options, self._prepare, step, limit, stopping)
        except ExactIsCheaper as stopped:
            self._spent += stopped.passes
            why = f"rtol={options.rtol:g} seemed to cost more than exact values"
            self.remarks.append(f"{self._spent:g} passes of {name} came first: {why}")
            left -= stopped.passes
            for other in [other for other, passes in self.exact.items() if passes <= left]:
                if exact := self.tried(other, Cost(left, math.inf)):
                    return exact
            return self.tried(name, limit)
        except OthersAreCheaper as stopped:
            self._spent += stopped.passes
            self.given_up[name] = self._work(methods.stochastic(name), stopped.probes)
            best = min(self.given_up, key=self.given_up.__getitem__)
            cheaper = stopped.cheaper if best == name else best
            self.remarks.append(f"{stopped.passes:g} passes of {name} came first: {cheaper} seemed to be cheaper")
            return self.tried(best) if len(self.given_up) > 1 else None
        except Dearer as error:
            self.remarks.append(f"passed over {name}: {error}")
            self.exact[name] = max(needed, error.passes)
            return None
        except Exception as error:  # whatever the error, the next method may work
            if concerns_all_methods(error):
                raise
            if isinstance(error, TooFewPasses) and options.passes is not None:
                self.least[name] = error.least
            self._refused(name, error.reason if isinstance(error, DoesNotApply) else errors.reason(error))
            return None
        rtol = options.rtol
        if rtol is not None and not isinstance(step, Stochastic) and not _reached(found, rtol, options.confidence):
            self.remarks.append(rounding_note(rtol, self._target.dtype))
        if name in SIDES:
            self.remarks.insert(0, _side(self._problem, name))
        return Estimates({key: self._noted(each) for key, each in found.items()})

    def _is_within_budget(self, method: Method) -> bool:
        """Whether the user's budget covers all metrics, if the method computes each of them separately."""
        if self._options.passes is None or isinstance(method, Stochastic):
            return True
        needed = (method.passes_needed(self._problem, metric, self._target) for metric in self._names)
        return self._spent + sum(passes or 0.0 for passes in needed) <= self._options.passes

    def _stopping(self, method: Method, left: float) -> Stopping:
        """When a method gives up a tolerance.

        The number of probes is limited to what is worthwhile or, once another method was abandoned, to what does not
        cost much more than that method. A budget that the user gives is spent on accurate probes, without this limit.

        Args:
            left: remaining passes of the budget.
        """
        if not isinstance(method, Incremental):
            return Stopping()
        problem, metric = self._problem, self._names[-1]
        of_pass = _work_of_pass(problem, method)
        exact = next(((name, passes) for name, passes in self.exact.items() if passes <= left), None)
        passes = cost = most = math.inf
        if exact is not None:
            passes = exact[1]
            # The remaining probes also take a run.
            share = (1 / WORTH - 1) * _work_of_run(problem, metric)
            cost = max(0.0, work(problem, metric, methods.get(exact[0]), passes) - share) / of_pass
        if self._options.passes is None and method.name not in self.given_up:
            most = method.worthwhile_probes(problem)
            if self.given_up:
                most = SURELY * min(self.given_up.values()) / self._work(method, 1.0)
        return Stopping(passes, cost, most, lambda probes: self._products(method, probes) / of_pass)

    def _is_like_given_up(self, method: Method) -> bool:
        """Whether a method takes inner products of gradients, for whose cost another one was abandoned."""
        if not self.given_up or method.name in self.given_up or not isinstance(method, Incremental):
            return False
        return method.worthwhile_probes(self._problem) < math.inf

    def _products(self, method: Stochastic, probes: float) -> float:
        metric = self._names[-1]
        return method.products(self._problem, metric, probes * method.passes_per_probe(metric))

    def _work(self, method: Stochastic, probes: float) -> float:
        """Operations of a number of probes, without the overhead of a run."""
        of_passes = probes * method.passes_per_probe(self._names[-1]) * _work_of_pass(self._problem, method)
        return of_passes + self._products(method, probes)

    def _refused(self, name: str, reason: str) -> None:
        """Note why a method cannot be used; methods with the same reason share a remark, and each is named once."""
        reason = reason.removeprefix(f"{name}: ").removeprefix(f"{name} ")
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
) -> Iterator[tuple[str, Cost]]:
    """Methods in the order in which they are tried, and the cost that each may have if it is exact.

    Before each estimator come the exact methods that cost no more than it does; the other exact methods come last.

    Args:
        exact: remaining exact methods, with their passes. The consumer of the iterator also removes methods from
            this dict, or puts one back with more passes.
    """
    for name in _estimators(problem, metric, target, options):
        expected = _expected(problem, metric, target, options, methods.stochastic(name))
        within = CLOSE if options.rtol is not None else CLEAR
        limit = Cost(math.inf if options.rtol is not None else expected.passes, within * expected.work)
        while able := [other for other, needed in exact.items() if _is_within(problem, metric, other, needed, limit)]:
            yield able[0], limit
        yield name, UNLIMITED
    most = _most(options)
    while able := [other for other, needed in exact.items() if needed <= most]:
        yield able[0], UNLIMITED
        exact.pop(able[0], None)
    if metric in methods.get(FLOOR).metrics:
        needed = methods.get(FLOOR).passes_needed(problem, metric, target)
        if needed is not None and needed <= most:
            yield FLOOR, UNLIMITED


def _is_within(problem: Problem, metric: str, name: str, passes: float, limit: Cost) -> bool:
    return passes <= limit.passes and work(problem, metric, methods.get(name), passes) <= limit.work


def _expected(problem: Problem, metric: str, target: Target, options: Options, method: Stochastic) -> Cost:
    """Expected cost of a method; exact methods that cost no more are tried first.

    Without a tolerance it is that of the budget. With one it is that of the passes before the error is first checked;
    if that is too early, a further run is included, and for a trace, whose number of probes is not known, always. The
    error of few probes is extrapolated as a square root, so that a further run takes more probes than are needed in the
    end. The cost is 0 if the method does not apply or takes no tolerance.
    """
    if method.unsupported_reason(problem, metric, target) is not None:
        return Cost(0.0, 0.0)
    if options.rtol is None:
        passes = default_passes(problem, metric, method) if options.passes is None else options.passes
        return Cost(passes, work(problem, metric, method, passes))
    if not isinstance(method, Incremental):
        return Cost(0.0, 0.0)
    quantile = float(ndtri(0.5 + options.confidence / 2))
    if metric == "alignment":
        typical = method.probes_to_reach(problem, "norm", options.rtol / quantile)
    else:
        typical = TYPICAL * method.probes_to_reach(problem, metric, options.rtol / quantile)
    first = method.probes_to_decide(problem, metric)
    total: float = first
    if typical > first:
        total = min(typical**2 / first, 2 * typical)
    elif metric == "trace":
        total = first + 1
    total = max(first, min(total, method.worthwhile_probes(problem)))
    runs = [float(method.cost(metric, math.ceil(probes))) for probes in (first, total - first) if probes]
    if options.passes is not None and sum(runs) > options.passes:
        runs = [float(options.passes)]
    return Cost(sum(runs), sum(work(problem, metric, method, passes) for passes in runs))


def work(problem: Problem, metric: str, method: Method, passes: float) -> float:
    """Operations of a method in one run, as in :class:`Cost`."""
    own = passes * _work_of_pass(problem, method) + method.products(problem, metric, passes)
    return own + _work_of_run(problem, metric)


def _work_of_pass(problem: Problem, method: Method) -> float:
    if declares(problem.module):
        return operations.of_pass(problem)
    return operations.of_pass_by_layers(problem) if method.by_layers else DENSE * operations.of_pass(problem)


def _work_of_run(problem: Problem, metric: str) -> float:
    """The overhead of a run; not counted for a recurrence, whose exact trace takes many runs."""
    if declares(problem.module):
        return 0.0
    return RUN * operations.ends(metric) * max(1, len(operations.count(problem).layers))


def _takes_rtol(method: Method) -> bool:
    return not isinstance(method, Stochastic) or isinstance(method, Incremental)


def _most(options: Options) -> float:
    """Maximum number of passes in total."""
    return TOLERANCE_PASSES if options.passes is None else options.passes


def _reached(found: Mapping[str, Estimate], rtol: float, confidence: float) -> bool:
    """Whether all estimates are within a tolerance."""
    return all(estimate.relative_width(confidence) <= rtol for estimate in found.values())


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
        if rtol is None or _takes_rtol(methods.get(name)):
            found.append(name)
    return list(dict.fromkeys(found))


def exact_methods(problem: Problem, metric: str, target: Target) -> dict[str, float]:
    """The exact methods that apply, in the order of their operations, with their passes if everything fits."""
    ends = len(metrics.parameter_sets(metric))
    found = {}
    for name in EXACT[target.backend]:
        method = methods.get(name)
        # The trace uses every row once; other metrics recompute rows for every pair of blocks that does not fit.
        fits = (
            metric == "trace"
            or name in HOLDS_NO_ROWS
            or (ends * problem.n * problem.P * target.itemsize <= target.memory / 2)
        )
        if fits and method.unsupported_reason(problem, metric, target) is None:
            needed = method.passes_needed(problem, metric, target)
            if name == HEAD and needed is not None and needed > NARROW * ends * problem.O:
                continue
            found[name] = ends * problem.O if needed is None else needed  # neural-tangents' programs count none
    return dict(sorted(found.items(), key=lambda item: work(problem, metric, methods.get(item[0]), item[1])))


def _is_short(problem: Problem, metric: str, target: Target) -> bool:
    """Whether a shorter head has far fewer outputs than the original, and no more than there are parameters."""
    if declares(problem.module) or methods.get(HEAD_PAIRS).unsupported_reason(problem, metric, target) is not None:
        return False
    share = wide.share(problem, metric)
    return share <= NARROW and share * problem.O <= problem.P


def _is_pooled_first(problem: Problem, metric: str, options: Options) -> bool:
    """Whether :data:`POOLED` is tried before :data:`OF_RECURRENT`; see :data:`LIGHT`."""

    def first_check(name: str) -> float:
        method = methods.get(name)
        assert isinstance(method, Incremental)
        return work(problem, metric, method, method.cost(metric, method.probes_to_decide(problem, metric)))

    return options.rtol is not None and first_check(POOLED) <= LIGHT * first_check(OF_RECURRENT)


def _estimators(problem: Problem, metric: str, target: Target, options: Options) -> list[str]:
    """Estimators in the order in which they are tried."""
    independent, whole = STOCHASTIC[metric]
    if declares(problem.module):
        # Traced layer by layer, a recurrence is unrolled.
        independent = independent[1:] if metric == "trace" else (OF_RECURRENT, *whole, *independent)
        if metric != "trace" and _is_pooled_first(problem, metric, options):
            independent = (POOLED, *independent)
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
    """The smallest budget for several metrics, which share their probes if the method can add probes."""
    each = [method.least_passes(problem, metric) for metric in names]
    return max(each) if isinstance(method, Incremental) else sum(each)


def _budgets(problem: Problem, names: Sequence[str], method: Method, passes: int | None) -> dict[str, int | None]:
    """The budget of each metric: all if metrics share their probes, else a part in proportion to its smallest budget.

    Raises:
        BadInput: the budget is too small for all metrics together.
    """
    if passes is None or not isinstance(method, Stochastic) or isinstance(method, Incremental) or len(names) == 1:
        return dict.fromkeys(names, passes)
    together = least_passes(problem, names, method)
    if passes < together:
        needed = f"at least {counted(together, 'pass', 'passes')} for the {metrics.words(*names)} together"
        raise TooFewPasses(f"{method.name} takes {needed}; got passes={passes}", together)
    return {metric: passes * method.least_passes(problem, metric) // together for metric in names}


def _together(found: Mapping[str, Estimate], budgets: Mapping[str, int | None], passes: int) -> dict[str, Estimate]:
    """Estimates from separate probes, each with the passes of all of them and a note on its part of the budget."""
    spent = sum(estimate.passes or 0.0 for estimate in found.values())

    def noted(metric: str, estimate: Estimate) -> Estimate:
        note = f"the metrics share no probes: {budgets[metric]} of {passes} passes are for the {metrics.words(metric)}"
        return replace(estimate, passes=spent, notes=(*estimate.notes, note))

    return {metric: noted(metric, estimate) for metric, estimate in found.items()}


def check(names: Sequence[str], options: Options) -> None:
    """Refuse a method that does not exist, and options that it does not take.

    Raises:
        BadInput: says what is allowed.
    """
    if options.method == "auto":
        return
    method = methods.get(options.method)
    if missing := [name for name in names if name not in method.metrics]:
        raise BadInput(
            f"{method.name} computes the {metrics.words(*method.given)} only, not the {metrics.words(*missing)}"
        )
    if options.passes is not None and not method.takes_passes:
        raise BadInput(f"{method.name} is {method.kind} and takes no budget of passes: omit passes")
    if options.rtol is not None and not method.takes_passes:
        raise BadInput(f"{method.name} is {method.kind} and takes no rtol: omit rtol")
    if options.rtol is not None and not isinstance(method, Incremental):
        able = (name for name in methods.names() if isinstance(methods.get(name), Incremental))
        allowed = ", ".join(name for name in able if set(names) <= set(methods.get(name).metrics))
        raise BadInput(f"{method.name} takes no rtol, because it cannot add probes; allowed: {allowed}")


def check_range(problem: Problem, names: Sequence[str], target: Target) -> None:
    """Refuse gradients that are so small that their squares, or those of the kernel, underflow.

    Cost: one plain backward pass for each set of weights of a problem.

    Raises:
        Underflow: the squares underflow; says what helps.
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


def _check_budget(
    problem: Problem, metric: str, target: Target, options: Options, method: Method, budget: int | None
) -> None:
    """Refuse a budget that is too small for a method that applies otherwise.

    Raises:
        TooFewPasses: says which budget is enough.
    """
    if not isinstance(method, Stochastic) or budget is None or method.unsupported_reason(problem, metric, target):
        return
    if budget < (least := method.least_passes(problem, metric)):
        needed = f"at least {counted(least, 'pass', 'passes')} for the {metrics.words(metric)}"
        given = f"got passes={budget}" if options.passes is not None else f"the default is passes={budget}"
        raise TooFewPasses(f"{method.name} takes {needed}; {given}", least)


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
    v = random_weights(problem.n, np.empty(0))
    widest = (target.dtype,) if target.backend == "jax" else dict.fromkeys((target.dtype, "float64"))
    for dtype in widest:
        try:
            gradient = operators.plain_gradient(problem, weights, replace(target, dtype=dtype), list(problem.theta_0))
            found = arrays.to_numpy(gradient(v), np.float64)
        except Exception:  # a network that does not run in this precision; certificates say what else is wrong
            return math.inf
        if largest := float(abs(found).max()):
            return largest * float(np.linalg.norm(found / largest)) / float(np.linalg.norm(v))
    return 0.0


def _named(run: Callable[[], dict[str, Estimate]], method: Method, names: Sequence[str]) -> dict[str, Estimate]:
    """The result of a method requested by name, or one line that says why there is none."""
    refused = f"{method.name} cannot compute the {metrics.words(*names)} of this network"
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
    limit: Cost = UNLIMITED,
    stopping: Stopping | None = None,
) -> dict[str, Estimate]:
    """Metrics by one method.

    Args:
        limit: what a deterministic method may cost in the target's memory.
        stopping: when a tolerance is given up.

    Raises:
        Dearer: the method costs more than ``limit``.
        GivenUp: a tolerance is given up.
        BadInput: it does not apply, or its result is not finite.
        OverMemory: it would need more than the target's memory at once.
    """
    found = _computed(problem, names, target, options, prepare, method, limit, stopping)
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
    limit: Cost,
    stopping: Stopping | None,
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
        if reason := method.unsupported_reason(problem, metric, target, budget):
            _check_budget(problem, metric, target, options, method, budget)
            raise DoesNotApply(method.name, metric, reason)
    budgets = _budgets(problem, names, method, budget)
    for metric in names:
        needed = method.bytes_needed(problem, metric, target, budgets[metric])
        if needed > target.memory:
            remedy = "raise memory" if budget is None else "raise memory, or give fewer passes"
            said = over_memory(needed, target.memory, f"for the {metrics.words(metric)}")
            raise OverMemory(f"{method.name} needs {said}: {remedy}")
    prepared = prepare(method)
    if limit != UNLIMITED:
        planned = max(method.planned_passes(prepared, metric) for metric in names)
        if not _is_within(problem, names[-1], method.name, planned, limit):
            raise Dearer(planned, target.memory)
    total: float | None = budget if options.rtol is None else None
    if not isinstance(method, Stochastic):
        total = _all_passes(problem, names, target, prepared, method)
        if total is not None and options.passes is not None and total > options.passes:
            needs = f"{total:g} passes with memory={target.memory}, more than passes={options.passes}"
            raise BadInput(f"{method.name} takes {needs}: raise passes or memory")
    try:
        with progress_bar.of_passes(f"{', '.join(names)} by {method.name}", problem.N, total):
            if budget is not None and isinstance(method, Incremental):
                wanted = (options.seed, options.rtol, options.confidence)
                found = method.estimates(prepared, names, budget, *wanted, stopping or Stopping())
            else:
                found = {metric: method.estimate(prepared, metric, budgets[metric], options.seed) for metric in names}
                if budget is not None and len(names) > 1:
                    found = _together(found, budgets, budget)
    except Undefined:
        check_range(problem, names, target)
        raise
    for metric, estimate in found.items():
        if not math.isfinite(estimate.value):
            wider = "" if target.dtype == "float64" else f" {target.dtype} (dtype='float64' has a wider range)"
            said = f"the {metrics.words(metric)} by {method.name} is {estimate.value}"
            raise NotFinite(f"{said}: gradients are not finite, or overflow{wider}")
    return {metric: replace(estimate, confidence=options.confidence) for metric, estimate in found.items()}
