"""What a method is: a way of getting at Theta, from a problem to an Estimate."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from ntkbench import metrics
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.jacobian import Jacobian, Rng, linearise
from ntkbench.metrics import Moments
from ntkbench.problems.base import Problem
from ntkbench.target import Target

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
    """

    title: ClassVar[str]
    kind: ClassVar[str]
    source: ClassVar[str]
    backends: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]] = metrics.METRICS
    needs_independent_samples: ClassVar[bool] = False

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
        return None

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float | None:
        """Passes that a deterministic method will spend, known beforehand; ``None`` where passes do not apply."""
        return None

    def bytes_needed(self, problem: Problem, metric: str, target: Target) -> int:
        """Bytes that cannot be done in blocks, known beforehand."""
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
        self._operators: dict[str, Jacobian] = {}

    def jacobians(self, metric: str) -> list[Jacobian]:
        """Fresh operators (no forward pass yet, counters at zero) at theta_0, and at theta_f for alignment."""
        for end in metrics.ends(metric):
            if end not in self._operators:
                self._operators[end] = linearise(self.problem, end, self.target)
                self._operators[end].bytes_per_probe()
        return [self._operators[end].fresh() for end in metrics.ends(metric)]


class Deterministic(Method):
    """A method whose moments of Theta (or of the kernel that stands for it) follow from passes alone."""

    @abstractmethod
    def moments(self, metric: str, jacobians: Sequence[Jacobian]) -> Moments:
        """The moments that ``metric`` is made of."""

    def estimate(self, prepared: Prepared, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        jacobians = prepared.jacobians(metric)
        value = self.moments(metric, jacobians).metric(metric)
        return Estimate(value, None, sum(j.passes for j in jacobians), self.name)


class Stochastic(Method):
    """A method that draws probes, as many as a budget of passes buys."""

    kind = "stochastic"
    fewest_probes: ClassVar[int] = 2

    @abstractmethod
    def passes_per_probe(self, metric: str) -> int:
        """What one more probe of the method's nominal count costs."""

    @abstractmethod
    def draw(self, metric: str, jacobians: Sequence[Jacobian], probes: int, rng: Rng) -> tuple[float, float]:
        """Value and standard error from a number of probes."""

    def cost(self, metric: str, probes: int) -> int:
        """Passes that a nominal number of probes costs, fewer than n of them."""
        return probes * self.passes_per_probe(metric)

    def probes(self, metric: str, passes: int) -> int:
        """The largest nominal number of probes that a budget pays for."""
        return passes // self.passes_per_probe(metric)

    def refusal(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> str | None:
        reason = super().refusal(problem, metric, target, passes)
        return self._too_few(metric, passes) if reason is None and passes is not None else reason

    def estimate(self, prepared: Prepared, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        if passes is None:
            raise BadInput(f"{self.name} is stochastic and needs passes, a positive number; got none")
        if too_few := self._too_few(metric, passes):
            raise BadInput(f"{self.name}: {too_few}; got {passes}")
        jacobians = prepared.jacobians(metric)
        value, error = self.draw(metric, jacobians, self.probes(metric, passes), jacobians[0].rng(seed))
        return Estimate(value, error, sum(j.passes for j in jacobians), self.name)

    def _too_few(self, metric: str, passes: int) -> str | None:
        least = self.cost(metric, self.fewest_probes)
        return f"{metric} takes at least {least} passes" if passes < least else None
