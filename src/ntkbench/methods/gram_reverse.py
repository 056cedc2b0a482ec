"""Reverse Gram matrix: all moments of Theta from inner products of VJPs."""

from __future__ import annotations

from ntkbench.methods.base.u_statistics import GramMatrix


class GramReverse(GramMatrix):
    """G = U^T Theta U, the Gram matrix of J^T u over k random signs u: VJPs only, 1 pass per probe, 2 for alignment.

    tr Theta = E mean_i G_ii, ||Theta||_F^2 = E sum_(i != j) G_ij^2 / (k (k - 1)) and, with the same probes at theta_f,
    tr(Theta Theta_f) = E sum_(i != j) G_ij G^f_ij / (k (k - 1)). These are unbiased; the square root and the ratios are
    biased at order 1/k. The variance of the squared norm is about 8 ||Theta^2||_F^2 / k + 4 ||Theta||_F^4 / k^2; that
    of Hutchinson's estimate at equal passes is 4 ||Theta^2||_F^2 / k. So this method needs no forward mode and half as
    many passes per probe, but its error at equal passes is no smaller. The standard error is that of
    :class:`ntkbench.estimators.standard_errors.PairSums`, or, for the effective rank, that of a jackknife over probes.
    Memory is bounded as in :class:`ntkbench.estimators.accumulators.UStatistics`.
    """

    title = "reverse Gram matrix"
    use_when = "samples interact, and memory is small or there is no forward mode"
    variance = "norm^2: about 8 ||Theta^2||_F^2 / k + 4 ||Theta||_F^4 / k^2; trace: that of ``one_sided_reverse``"
    side = "reverse"
