"""Group U-statistics: moments of Theta from inner products of the gradients of groups of samples."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from ntkbench import operations
from ntkbench.methods.base.u_statistics import DEAR, StratifiedUStatistics
from ntkbench.operators import Array, JacobianOperator
from ntkbench.problem import Problem


class GroupUStatistics(StratifiedUStatistics):
    """``block_u_statistics`` with groups of adjacent samples instead of single samples.

    With probes of random signs u, group g has the gradient w_g^k = sum_(b in g) J_b^T u_b^k in probe k. Then tr Theta =
    E mean_k sum_g ||w_g^k||^2, and ||Theta||_F^2 = E [mean_(k, l) sum_(g != h) <w_g^k, w_h^l>^2 + mean_(k != l)
    sum_g <w_g^k, w_g^l>^2]; the cross term is analogous, and all are unbiased. With one group this is ``gram_reverse``,
    whose term 4 ||Theta||_F^4 / k^2 falls with the square of the number of groups. With N groups it is
    ``block_u_statistics``, whose k N gradients have (k N)^2 inner products. In between, the gradients are as cheap as
    VJPs, and their inner products cost no more than these. If the gradient of one sample takes a small part of a pass,
    as in recurrent networks, this method reaches a given error in a fraction of the time of either.

    If a few samples have most of the trace, they are treated exactly, and the others in groups
    (:class:`ntkbench.methods.base.u_statistics.OutliersApart`).

    1 pass per probe, 2 for alignment. If only the trace is requested, it is estimated as by ``per_sample_trace``. The
    variance, its estimate and the memory are those of ``block_u_statistics``.

    Attributes:
        max_groups: maximum number of groups. With 24, inner products take about as long as passes, for a few probes on
            networks of about ten thousand parameters.
    """

    title = "group U-statistics"
    use_when = "the gradient of one sample is much cheaper than a pass, as in recurrent networks"
    variance = "trace: that of ``per_sample_trace``; norm^2: terms of order 1/k and 1/k^2 (Hoeffding 1948)"
    first_batch = 4
    max_groups: ClassVar[int] = 24

    def groups(self, N: int) -> int:
        return min(N, self.max_groups)

    def worthwhile_probes(self, problem: Problem) -> float:
        """K at which inner products, (K g)^2 P operations, take :data:`DEAR` times the operations of the passes."""
        return DEAR * operations.of_pass(problem) / (self.groups(problem.N) ** 2 * problem.P)

    def gradients(self, j: JacobianOperator, groups: Sequence[slice], v: Array) -> Array:
        return j.group_gradients(groups, v)
