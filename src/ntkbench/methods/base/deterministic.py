"""The base class of methods that take no budget and compute moments from products with J."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence

from ntkbench.estimate import Estimate
from ntkbench.methods.base.method import Method, PreparedProblem, certificate, notes, rounding
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator


class Deterministic(Method):
    """A method that computes moments of Theta, or of a kernel that approximates it, from products with J."""

    @abstractmethod
    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        """The moments that ``metric`` depends on.

        Args:
            metric: one of ``self.metrics``.
            jacobians: J at theta_0 (and at theta_f, for alignment).
        """

    def drawn(self, metric: str, jacobians: Sequence[JacobianOperator], seed: int) -> Moments:
        """The moments for a seed, which a method overrides that draws random numbers."""
        return self.moments(metric, jacobians)

    def estimate(self, prepared: PreparedProblem, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        jacobians = prepared.jacobians(metric)
        moments = self.drawn(metric, jacobians, seed)
        spent, found = sum(j.passes for j in jacobians), certificate(jacobians)
        bound = rounding(jacobians, metric, found) if self.kind == "exact" else None
        said = notes(jacobians)
        return Estimate.of_moments(metric, moments, spent, self.name, said, found, bound, kernel=self.computes)
