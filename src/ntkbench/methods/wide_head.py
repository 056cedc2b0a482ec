"""Wide linear head, tied to the embedding or not: all moments of Theta in fewer passes than there are outputs."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkbench.estimate import Estimate, rounding_bound
from ntkbench.methods.base.wide import WideHeadMethod, for_head
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from ntkbench.methods.base.head import HeadedProblem
    from ntkbench.methods.base.tied_head import TiedProblem


class WideHead(WideHeadMethod):
    """Theta of a network that ends with a linear layer from d inputs to V > d outputs, at T positions of each sample.

    This takes T d passes instead of T V, and a kernel of N T d rows instead of N T V; see
    :mod:`ntkbench.methods.base.head`. If the head shares its weight with the embedding, and m distinct tokens occur, it
    takes T (m + d) passes and N T (m + d) rows, with m + 2 d instead of m + d for alignment; see
    :mod:`ntkbench.methods.base.tied_head`. Such a weight must be used exactly twice, as embedding and as head.

    The last operations of the network's graph show that the results of the layer are the outputs. Plain autograd
    certifies this: a gradient of the network is compared with that of its replacement, in 2 passes at each set
    of weights. The method is for language models, whose vocabulary is far wider than their hidden states.
    """

    title = "wide head"
    kind = "exact"
    source = "this suite; layer by layer as Novak et al. 2022 (arXiv 2206.08720), section 3"
    use_when = "the network ends with a linear layer that is much wider than its inputs, as language models do"
    passes_formula = "T * d"

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        from ntkbench.methods.base import head, tied_head

        by_width = tied_head.passes(problem, metric) | head.passes(problem, metric)
        needed = for_head(problem, by_width)
        assert needed is not None  # the method supports the problem
        return needed

    def planned_passes(self, prepared: HeadedProblem | TiedProblem, metric: str) -> float:
        if metric == "trace":
            return 0.0
        return sum(each.engine.passes([each.parameters], each.x, kept=False) for each in prepared.networks(metric))

    def estimate(
        self, prepared: HeadedProblem | TiedProblem, metric: str, passes: int | None = None, seed: int = 0
    ) -> Estimate:
        from ntkbench.methods.base.layerwise import ledger_of

        networks = prepared.networks(metric)
        ledger = ledger_of(networks)
        moments = prepared.moments(metric)
        spent, notes, found = ledger()
        largest = max(prepared.certificate(metric), found or 0.0)
        like, P = networks[0].parameters[0], max(sum(w.numel() for w in each.parameters) for each in networks)
        terms = max(len(networks[0].x) * networks[0].engine.O, P)
        notes = tuple(dict.fromkeys((*notes, *prepared.notes(metric))))
        rounding = rounding_bound(metric, arrays.epsilon(like), terms, largest)
        return Estimate.of_moments(metric, moments, spent, self.name, notes, largest, rounding)
