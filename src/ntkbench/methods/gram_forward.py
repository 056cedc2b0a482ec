"""Forward Gram matrix: all moments of Theta from inner products of JVPs."""

from __future__ import annotations

from ntkbench.methods.base.u_statistics import GramMatrix


class GramForward(GramMatrix):
    """The Gram matrix of J w over k random signs w in parameter space: JVPs only, 1 pass per probe, 2 for alignment.

    With y_i = J w_i, tr Theta = E mean_i ||y_i||^2 and ||Theta||_F^2 = ||J^T J||_F^2 = E sum_(i != j) <y_i, y_j>^2 /
    (k (k - 1)). The cross term takes inner products between the two networks: tr(Theta Theta_f) = ||J^T J_f||_F^2 = E
    sum_(i != j) <y_i, y^f_j>^2 / (k (k - 1)). All are unbiased. Unlike with reverse probes, the estimate of the
    alignment may exceed 1. The variances are those of ``gram_reverse`` with J^T J instead of Theta.
    """

    title = "forward Gram matrix"
    use_when = "samples interact, memory is small, and J^T J is closer to diagonal than Theta"
    variance = "that of ``gram_reverse`` with J^T J for Theta"
    side = "forward"
    needs_one_network = True
