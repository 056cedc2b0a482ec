"""Wide linear head: all moments of Theta from the hidden vectors in front of the last layer."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkbench.estimate import Estimate, rounding_bound
from ntkbench.methods.base import Method
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from ntkbench.methods.base.head import HeadedProblem


class WideHead(Method):
    """Theta of a network that ends with a linear layer from d to V > d outputs, at T positions of each sample.

    T d passes in place of T V, and a kernel of N T d rows in place of N T V; see :mod:`ntkbench.methods.base.head`.
    That the layer's results are the outputs is seen by running the network, and certified by plain autograd: a gradient
    of the network is compared with that of what stands for it, in 2 passes at each set of weights. For language models,
    whose vocabulary is far wider than their hidden states, where the head's weight is not tied to the embedding.
    """

    title = "wide head"
    kind = "exact"
    source = "this suite; layer by layer as Novak et al. 2022, section 3"
    backends = ("torch",)
    needs_independent_samples = True
    prepares = "head"

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        from ntkbench.methods.base import head

        if reason := super().unsupported_reason(problem, metric, target, passes):
            return reason
        if not head.candidates(problem):
            return "no linear layer of the network has more outputs than inputs and divides the outputs of a sample"
        return None

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        from ntkbench.methods.base import head

        return head.passes(problem, metric)

    def planned_passes(self, prepared: HeadedProblem, metric: str) -> float:
        if metric == "trace":
            return 0.0
        return sum(each.engine.passes([each.parameters], each.x) for each in prepared.networks(metric))

    def prepare(self, problem: Problem, target: Target) -> HeadedProblem:
        """Take the networks apart, and trace what is in front of their heads.

        Raises:
            BadInput: a network does not end with a wide linear layer, or cannot be traced.
            Unavailable: the device is not present.
        """
        from ntkbench.methods.base.head import HeadedProblem

        return HeadedProblem(problem, target)

    def estimate(self, prepared: HeadedProblem, metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        from ntkbench.methods.base import head
        from ntkbench.methods.base.layerwise import ledger_of

        networks = prepared.networks(metric)
        ledger = ledger_of(networks)
        moments = head.moments(prepared, metric)
        spent, notes, found = ledger()
        largest = max(prepared.certificate(metric), found or 0.0)
        like, P = networks[0].parameters[0], max(sum(w.numel() for w in each.parameters) for each in networks)
        terms = max(len(networks[0].x) * networks[0].engine.O, P)
        rounding = rounding_bound(metric, arrays.epsilon(like), terms, largest)
        return Estimate.of_moments(metric, moments, spent, self.name, notes, largest, rounding)
