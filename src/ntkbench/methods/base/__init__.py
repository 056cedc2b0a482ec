"""What a method is: a way of getting at Theta, from a problem to an Estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, ClassVar

from ntkbench import metrics
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.estimators.accumulators import Sample
from ntkbench.estimators.standard_errors import Reading
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator, Rng, linearise
from ntkbench.options import Target
from ntkbench.problem import Problem

KINDS = ("exact", "approximate", "stochastic")


class Method(ABC):
    """A way of computing NTK metrics. One file in ``methods/`` holds one subclass; the file's name is the method's.

    Attributes:
        title: the name in figures and tables.
        kind: ``exact``, ``approximate`` (deterministic, biased) or ``stochastic`` (takes passes and a seed).
        source: paper and equation, or program, that it comes from.
        backends: where it runs, the plain choice first.
        metrics: what it gives.
        needs_independent_samples: whether it relies on each output depending on its own sample only.
        needs_recurrence: whether it relies on the problem's module declaring a recurrence over time.
    """

    title: ClassVar[str]
    kind: ClassVar[str]
    source: ClassVar[str]
    backends: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]] = metrics.METRICS
    needs_independent_samples: ClassVar[bool] = False
    needs_recurrence: ClassVar[bool] = False

    @property
    def name(self) -> str:
        """The name of the file that the method stands in."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def takes_passes(self) -> bool:
        """Whether a budget of passes is the user's to choose."""
        return self.kind == "stochastic"

    def refusal(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> str | None:
        """Why this method cannot serve a problem, a metric, a target or a budget; ``None`` if it can."""
        if metric not in self.metrics:
            return f"gives {', '.join(self.metrics)} only"
        if target.backend not in self.backends:
            return f"runs on {', '.join(self.backends)} only"
        if target.backend == "jax" and problem.jax_forward is None:
            return "the problem has no network in JAX"
        if metric == "alignment" and problem.theta_f is None:
            return "the problem has no trained weights to align with"
        if self.needs_independent_samples and problem.samples_interact:
            return "samples interact, so there are no per-sample Jacobians"
        if self.needs_recurrence and not hasattr(problem.module, "recurrence"):
            return "the problem is no recurrent network (its module declares no recurrence)"
        return None

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float | None:
        """Passes that a deterministic method will spend, known beforehand; ``None`` where passes do not apply."""
        return None

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Bytes that cannot be done in blocks, known beforehand; for a stochastic method those of a budget."""
        return 0

    def prepare(self, problem: Problem, target: Target) -> Any:
        """Bring a problem to the device; trace and compile what does not depend on the metric. Not timed."""
        return Prepared(problem, target)

    @abstractmethod
    def estimate(self, prepared: Any, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        """The metric, from what :meth:`prepare` returned: the timed region, forward pass included.

        Args:
            prepared: what :meth:`prepare` returned.
            metric: one of ``self.metrics``.
            passes: the budget of a stochastic method, which spends at most that many; ``None`` for the others.
            seed: of the probes; the same seed gives the same estimate.
        """


class Prepared:
    """A problem with its Jacobian operators on the target's device, as yet unused."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem = problem
        self.target = target
        self._operators: dict[str, JacobianOperator] = {}

    def jacobians(self, metric: str) -> list[JacobianOperator]:
        """Fresh operators (no forward pass yet, counters at zero) at theta_0, and at theta_f for alignment."""
        for end in metrics.ends(metric):
            if end not in self._operators:
                self._operators[end] = linearise(self.problem, end, self.target)
                self._operators[end].bytes_per_probe()
        return [self._operators[end].fresh() for end in metrics.ends(metric)]


class Deterministic(Method):
    """A method whose moments of Theta (or of the kernel that stands for it) follow from passes alone."""

    @abstractmethod
    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        """The moments that ``metric`` is made of."""

    def estimate(self, prepared: Prepared, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        jacobians = prepared.jacobians(metric)
        value = self.moments(metric, jacobians).metric(metric)
        return Estimate(value, None, sum(j.passes for j in jacobians), self.name, _notes(jacobians), metric)


class Stochastic(Method):
    """A method that draws probes, as many as a budget of passes buys.

    Attributes:
        fewest_probes: the fewest that give a standard error.
        default_passes: the budget where the user gives none.
    """

    kind = "stochastic"
    fewest_probes: ClassVar[int] = 2
    default_passes: ClassVar[int] = 256

    @abstractmethod
    def passes_per_probe(self, metric: str) -> int:
        """What one more probe of the method's nominal count costs."""

    @abstractmethod
    def spend(self, prepared: Any, metric: str, passes: int, seed: int) -> Estimate:
        """:meth:`estimate` with a budget that is known to be enough."""

    def worthwhile_passes(self, problem: Problem) -> int | None:
        """Passes after which more are a poor way to spend time on this problem; ``None`` where there is no such end."""
        return None

    def least_passes(self, problem: Problem, metric: str) -> int:
        """The smallest budget that it takes."""
        return self.cost(metric, self.fewest_probes)

    def cost(self, metric: str, probes: int) -> int:
        """Passes that a nominal number of probes costs, fewer than n of them."""
        return probes * self.passes_per_probe(metric)

    def probes(self, metric: str, passes: int) -> int:
        """The largest nominal number of probes that a budget pays for."""
        return passes // self.passes_per_probe(metric)

    def refusal(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> str | None:
        reason = super().refusal(problem, metric, target, passes)
        if reason is None and passes is not None and passes < (least := self.least_passes(problem, metric)):
            return _takes(metric, least)
        return reason

    def estimate(self, prepared: Any, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        if passes is None:
            raise BadInput(f"{self.name} is stochastic and needs passes, a positive number; got none")
        if passes < (least := self.cost(metric, self.fewest_probes)):
            raise BadInput(f"{self.name}: {_takes(metric, least)}; got {passes}")
        return self.spend(prepared, metric, passes, seed)


def _takes(metric: str, least: int) -> str:
    return f"{metric} takes at least {least} passes"


class FixedBudget(Stochastic):
    """A stochastic method that has to know its budget beforehand, because a part of it makes a sketch.

    Attributes:
        gradients_held: vectors of length P, for each probe, that lie in memory at a time.
    """

    gradients_held: ClassVar[float] = 0

    @abstractmethod
    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        """What a nominal number of probes says."""

    def spend(self, prepared: Prepared, metric: str, passes: int, seed: int) -> Estimate:
        jacobians = prepared.jacobians(metric)
        read = self.draw(metric, jacobians, self.probes(metric, passes), jacobians[0].rng(seed))
        spent, notes = sum(j.passes for j in jacobians), _notes(jacobians)
        return Estimate(read.value, read.error, spent, self.name, notes, metric, read.degrees)

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        probes = self.probes(metric, self.default_passes if passes is None else passes)
        held = self.gradients_held * problem.P + 2 * problem.n  # and probes with their images
        return int(min(probes, problem.n) * held * target.itemsize) * len(metrics.ends(metric))


Ledger = Callable[[], tuple[float, tuple[str, ...]]]
"""Passes spent so far, and what the user should know about how it was computed."""


class Incremental(Stochastic):
    """A stochastic method whose probes can be added to: one sample serves several metrics, and grows to a tolerance.

    Attributes:
        first_batch: probes before the standard error is first looked at on the way to a tolerance.
    """

    first_batch: ClassVar[int] = 16

    @abstractmethod
    def begin(self, prepared: Any, names: Sequence[str], seed: int) -> tuple[Sample, Ledger]:
        """An empty sample for some of the method's metrics, and what it costs."""

    def spend(self, prepared: Any, metric: str, passes: int, seed: int) -> Estimate:
        return self.several(prepared, (metric,), passes, seed)[metric]

    def several(
        self,
        prepared: Any,
        names: Sequence[str],
        passes: int,
        seed: int = 0,
        rtol: float | None = None,
        confidence: float = 0.95,
    ) -> dict[str, Estimate]:
        """Several metrics from the same probes, each with what all of them together cost.

        Args:
            prepared: what :meth:`prepare` returned.
            names: the metrics.
            passes: the most to spend.
            seed: of the probes.
            rtol: stop as soon as every metric's interval reaches no further than its value times this, to either side.
            confidence: of that interval.
        """
        sample, ledger = self.begin(prepared, names, seed)
        most = passes // max(self.passes_per_probe(name) for name in names)
        drawn, batch = 0, most if rtol is None else min(most, max(self.first_batch, self.fewest_probes, sample.least))
        while True:
            sample.extend(batch)
            drawn += batch
            said = {name: sample.read(name) for name in names}
            spent, notes = ledger()
            found = {
                name: Estimate(read.value, read.error, spent, self.name, notes, name, read.degrees)
                for name, read in said.items()
            }
            if rtol is None:
                return found
            widths = {name: estimate.relative_width(confidence) for name, estimate in found.items()}
            excess = max(widths.values()) / rtol
            if excess <= 1 or drawn == most:
                break
            # Errors fall at least as the root of the number of probes. Small steps waste little, and large ones keep
            # few the looks at the error, each of which is a chance to stop too early.
            wanted = drawn * (min(excess, 2.0) ** 2 - 1)
            batch = min(most - drawn, max(self.fewest_probes, sample.least, drawn // 4, min(drawn, round(wanted))))
        for name, width in widths.items():
            if not width <= rtol:
                note = f"{passes} passes did not reach rtol={rtol:g} at confidence {confidence:g}: {width:.2g}"
                found[name] = replace(found[name], notes=(*found[name].notes, note))
        return found


class Sampling(Incremental):
    """An incremental method over Jacobian operators."""

    @abstractmethod
    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Sample:
        """An empty sample for some of the method's metrics."""

    def begin(self, prepared: Prepared, names: Sequence[str], seed: int) -> tuple[Sample, Ledger]:
        jacobians = prepared.jacobians("alignment" if "alignment" in names else names[0])
        sample = self.sample(names, jacobians, jacobians[0].rng(seed))
        return sample, lambda: (sum(j.passes for j in jacobians), _notes(jacobians))


def _notes(jacobians: Sequence[JacobianOperator]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(note for j in jacobians for note in j.notes))
