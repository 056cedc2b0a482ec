"""The base class of all methods."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar

from ntkbench import metrics, operations
from ntkbench.estimate import THETA, Estimate, rounding_bound
from ntkbench.operators import JacobianOperator, declares, linearise
from ntkbench.options import Target
from ntkbench.problem import Problem

KINDS = ("exact", "approximate", "stochastic")

OWN = "this suite"
"""How the source of the suite's own methods begins."""


class Method(ABC):
    """A way of computing metrics of the NTK.

    A file in ``methods/`` defines exactly one subclass, and has the name of the method.

    Attributes:
        title: name in figures and tables.
        kind: ``exact``, ``approximate`` (biased, takes no passes) or ``stochastic`` (takes passes and a seed).
        source: paper and equation, or program, that the method comes from. It begins with ``this suite`` if the
            estimator or its algorithm is the suite's own. A paper has its DOI or arXiv number.
        use_when: when to choose it, as the end of the sentence "Use it when ...".
        variance: that of the estimate of a stochastic method, in the notation of its docstring; empty for the others.
        backends: backends that it runs on, the default first.
        metrics: metrics that it computes, of those that are functions of moments.
        kernel_metrics: metrics of the whole kernel that it computes.
        computes: the matrix whose metrics it computes or estimates; part of each estimate and each row.
        needs_independent_samples: whether it requires that each output depends only on its own sample.
        needs_recurrence: whether it requires a module that declares a recurrence over time.
        prepares: name of the result of :meth:`prepare`; methods with the same name share it. Empty if it is not shared.
        needs_one_network: whether an alignment must be of two sets of weights of one network, as for methods that
            compare parameters.
        draws: whether the value depends on the seed although the method takes no passes, as for a kernel of a random
            combination of outputs. Such a value has no standard error.
        by_layers: whether its passes leave out the gradients of weights, and its kernels are sums over layers.
        passes_formula: passes of a deterministic method for one set of weights, in n, N, O, P, the number of steps T,
            and the width d of the last hidden layer, with ``or`` between alternatives; an alignment has two sets. Empty
            if the cost is not a number of passes.
    """

    title: ClassVar[str]
    kind: ClassVar[str]
    source: ClassVar[str]
    use_when: ClassVar[str] = ""
    variance: ClassVar[str] = ""
    backends: ClassVar[tuple[str, ...]]
    metrics: ClassVar[tuple[str, ...]] = metrics.METRICS
    kernel_metrics: ClassVar[tuple[str, ...]] = ()
    computes: ClassVar[str] = THETA
    needs_independent_samples: ClassVar[bool] = False
    needs_recurrence: ClassVar[bool] = False
    prepares: ClassVar[str] = "operators"
    needs_one_network: ClassVar[bool] = False
    draws: ClassVar[bool] = False
    by_layers: ClassVar[bool] = False
    passes_formula: ClassVar[str] = ""

    @property
    def name(self) -> str:
        """Name of the file that defines the method."""
        return type(self).__module__.rpartition(".")[2]

    @property
    def given(self) -> tuple[str, ...]:
        """All metrics that it computes."""
        return (*self.metrics, *self.kernel_metrics)

    @property
    def is_own(self) -> bool:
        """Whether the estimator or its algorithm is the suite's own; all others are published elsewhere."""
        return self.source.startswith(OWN)

    @property
    def takes_passes(self) -> bool:
        """Whether the user chooses a budget of passes."""
        return self.kind == "stochastic"

    @property
    def takes_seed(self) -> bool:
        """Whether the value depends on the seed."""
        return self.takes_passes or self.draws

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        """Why the method does not support a problem, metric, target or budget; ``None`` if it does."""
        if metric not in self.given:
            return f"computes the {metrics.words(*self.given)} only"
        if target.backend not in self.backends:
            return f"runs on {', '.join(self.backends)} only"
        networks = [problem.end(name)[0] for name in metrics.parameter_sets(metric)]
        if target.backend == "torch" and any(each.module is None for each in networks):
            return "the problem has no network in torch"
        if target.backend == "jax" and any(each.jax_forward is None for each in networks):
            return "the problem has no network in JAX"
        if metric == "alignment" and problem.theta_f is None:
            return "the problem has no trained weights to align with"
        if metric == metrics.REGRESSION and (problem.theta_f is None or problem.other is not None):
            return "the problem has no trained weights, so there is no change of the outputs to predict"
        if metric == metrics.REGRESSION and problem.module is None:
            return "the problem has no network in torch, which computes the outputs"
        if self.needs_one_network and networks[-1] is not problem:
            return "aligns two sets of weights of one network, but these belong to two networks"
        if self.needs_independent_samples and problem.samples_interact:
            return "samples interact: it needs samples that do not (model.eval(), if this is due to BatchNorm)"
        if self.needs_recurrence and not all(declares(each.module) for each in networks):
            return "the network declares no recurrence; see docs/recurrent.md"
        return None

    def unscored_reason(self, problem: Problem) -> str | None:
        """Why the method's errors on a problem are not scored; ``None`` if they are."""
        if self.kind == "approximate" and problem.outputs != "logits":
            return "approximates Theta for logits only, and these outputs are states"
        return None

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float | None:
        """Passes that a deterministic method takes; ``None`` if its cost is not a number of passes."""
        return None

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        """Operations besides passes, from sizes alone: inner products of gradients, and kernels; 0 if negligible."""
        return 0.0

    def operations(self, problem: Problem, metric: str, passes: float) -> float:
        """Operations of a number of passes and of the products of their results; see :mod:`ntkbench.operations`."""
        of_pass = operations.of_pass_by_layers if self.by_layers else operations.of_pass
        return passes * of_pass(problem) + self.products(problem, metric, passes)

    def planned_passes(self, prepared: Any, metric: str) -> float:
        """Passes that a deterministic method takes once prepared, with recomputed blocks; 0 if not known."""
        return 0.0

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Bytes that must be in memory at once for any block size; for a stochastic method, at this budget."""
        return 0

    def prepare(self, problem: Problem, target: Target) -> Any:
        """Move a problem to the device, and trace and compile what does not depend on the metric. Not timed."""
        return PreparedProblem(problem, target)

    @abstractmethod
    def estimate(self, prepared: Any, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        """The metric. This is the timed region, which includes the forward pass.

        Args:
            prepared: the result of :meth:`prepare`.
            metric: one of ``self.metrics`` or ``self.kernel_metrics``.
            passes: upper limit on the passes of a stochastic method; ``None`` for the others.
            seed: seed of all random numbers; the same seed gives the same estimate.
        """


class PreparedProblem:
    """A problem with its Jacobian operators on the target's device."""

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem = problem
        self.target = target
        self._operators: dict[str, JacobianOperator] = {}

    def jacobians(self, metric: str) -> list[JacobianOperator]:
        """Operators at theta_0, and at theta_f for alignment, before their forward pass and with counters at zero."""
        names = metrics.parameter_sets(metric)
        for name in names:
            if name not in self._operators:
                self._operators[name] = linearise(self.problem, name, self.target)
                self._operators[name].bytes_per_probe()
        return [self._operators[name].fresh() for name in names]

    def certify_again(self) -> None:
        """Compare all products with plain autograd again when they are next used."""
        for operator in self._operators.values():
            if operator.reference:
                operator.reference.forget()


def notes(jacobians: Sequence[JacobianOperator]) -> tuple[str, ...]:
    """Notes of all operators, each once."""
    return tuple(dict.fromkeys(note for j in jacobians for note in j.notes))


def certificate(jacobians: Sequence[JacobianOperator]) -> float | None:
    """The largest of all operators' certificates; ``None`` if there is none."""
    return max((j.certificate for j in jacobians if j.certificate is not None), default=None)


def rounding(jacobians: Sequence[JacobianOperator], metric: str, certificate: float | None) -> float:
    """A bound on the rounding error of a metric; see :func:`ntkbench.estimate.rounding_bound`."""
    return rounding_bound(metric, jacobians[0].epsilon, max(jacobians[0].n, *(j.P for j in jacobians)), certificate)
