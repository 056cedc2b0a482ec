"""Block U-statistics of a network with a wide linear head, in the dimension of its hidden vectors."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ntkbench.estimators.accumulators import Accumulator
from ntkbench.methods.base import Ledger
from ntkbench.methods.base.structured import StructuredUStatistics, widest
from ntkbench.methods.base.wide import WideHeadMethod, share
from ntkbench.metrics import Moments

if TYPE_CHECKING:
    from ntkbench.methods.base.head import HeadedProblem
    from ntkbench.methods.base.layerwise import TracedNetwork
    from ntkbench.methods.base.tied_head import TiedProblem
    from ntkbench.problem import Problem


class WideHeadUStatistics(WideHeadMethod, StructuredUStatistics):
    """The estimator of ``structured_block_u_statistics`` on a network whose head has r outputs instead of V.

    Theta = (I ⊗ Q) Theta' (I ⊗ Q^T) + G ⊗ (I - Q Q^T), where Theta' is the kernel of the network with the head Q^T W.
    The moments of both terms add up. Those of the second term, which has V - r of V dimensions, are exact. Probes
    estimate only Theta', with T r outputs instead of T V. For an untied head r = d, or 2 d for alignment; for a head
    that is tied to the embedding, r is larger by the number of distinct tokens. See :mod:`ntkbench.methods.base.head`
    and :mod:`ntkbench.methods.base.tied_head`.

    1 pass of the network with the shorter head per probe, 2 for alignment. The moments are unbiased; the square root
    and the ratios are biased at order 1/K. Plain autograd certifies that the network with the shorter head represents
    the original one, in 2 passes at each set of weights. The method is for language models, whose trace and norm at
    initialisation are mostly those of the head.
    """

    title = "wide head, block U-statistics"
    source = "this suite; layer by layer as Novak et al. 2022 (arXiv 2206.08720), section 3"
    use_when = "``wide_head`` applies, but takes too many passes"
    variance = "that of ``structured_block_u_statistics`` for Theta' alone"

    def strata(self, problem: Problem, metric: str) -> int:
        """0, as with the exact moments of the head even a few probes often have a small error."""
        return 0

    def signs(self, problem: Problem, metric: str) -> int:
        """Outputs of a sample with the shorter head, T r."""
        return round(problem.O * share(problem, metric))

    def networks(self, prepared: HeadedProblem | TiedProblem, metric: str) -> tuple[Sequence[TracedNetwork], Moments]:
        return prepared.short.networks(metric), prepared.short.known(metric)

    def rounding(
        self, prepared: HeadedProblem | TiedProblem, names: Sequence[str], metric: str, certified: float | None
    ) -> float:
        """A bound on the rounding error; the standard error may be as small if the head has most of Theta."""
        from ntkbench.methods.base.layerwise import rounding_of

        return rounding_of(prepared.short.networks(widest(names)), metric, certified)

    def begin(
        self, prepared: HeadedProblem | TiedProblem, names: Sequence[str], seed: int
    ) -> tuple[Accumulator, Ledger]:
        accumulator, ledger = super().begin(prepared, names, seed)
        off = prepared.short.certificate(widest(names))
        open_ = prepared.short.notes(widest(names))

        def certified() -> tuple[float, tuple[str, ...], float | None]:
            spent, notes, found = ledger()
            return spent, tuple(dict.fromkeys((*notes, *open_))), max(off, found or 0.0)

        return accumulator, certified
