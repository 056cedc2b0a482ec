"""Block U-statistics: all moments of Theta from inner products of per-sample gradients of random outputs."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.methods.base.u_statistics import StratifiedUStatistics
from ntkbench.operators import Array, JacobianOperator


class BlockUStatistics(StratifiedUStatistics):
    """U-statistics over pairs of probes and samples, from inner products of per-sample gradients.

    With K probes of random signs u, sample b has the gradients w_b^k = J_b^T u_b^k, and m_bc^kl = <w_b^k, w_c^l>. Then
    tr Theta = E mean_k sum_b m_bb^kk, and ||Theta||_F^2 = E [mean_(k, l) sum_(b != c) (m_bc^kl)^2 + mean_(k != l)
    sum_b (m_bb^kl)^2]; for tr(Theta Theta_f), m m_f replaces m^2. All are unbiased, since u_b^k and u_c^l are
    independent unless b = c and k = l. The square root and the ratios are biased at order 1/K.

    The cost is 1 pass per probe, 2 for alignment, and the inner products of K N vectors of length P, which take longer
    than the passes if K N is in the hundreds. A single probe has N independent vectors, which form N (N - 1) / 2 pairs.
    If Theta_bc is close to a multiple of the identity, as in wide networks, two probes estimate the norm to within
    about 1/N.

    If a few samples have most of the trace, they are treated exactly, and the others by probes
    (:class:`ntkbench.methods.base.u_statistics.OutliersApart`).

    The variance and its estimate are those of :class:`ntkbench.estimators.standard_errors.PairSums`. Memory is bounded
    as in :class:`ntkbench.estimators.accumulators.UStatistics`.
    """

    title = "block U-statistics"
    use_when = "samples do not interact, the network cannot be traced, and k N gradients fit in memory"
    variance = "trace: that of ``per_sample_trace``; norm^2: terms of order 1/k and 1/k^2 (Hoeffding 1948)"
    first_batch = 2

    def groups(self, N: int) -> int:
        return N

    def gradients(self, j: JacobianOperator, groups: Sequence[slice], v: Array) -> Array:
        return j.sample_vjp(slice(groups[0].start, groups[-1].stop), v)
