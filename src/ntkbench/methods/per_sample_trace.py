"""Per-sample trace: tr Theta = sum_b E ||J_b^T u_b||^2, with all samples' gradients from one backward pass."""

from __future__ import annotations

from ntkbench.methods.base.u_statistics import OneSidedPerSample


class PerSampleTrace(OneSidedPerSample):
    """The mean over k probes of random signs u of sum_b ||J_b^T u_b||^2: 1 pass per probe; unbiased.

    A one-sided probe takes the squared norm of the sum of all samples' gradients, so its cross-sample terms add noise.
    These have zero mean, and are dropped here: the squared norm of each sample's gradient is taken separately. The
    variance is 2 sum_b (||Theta_bb||_F^2 - sum_o Theta_(bo)(bo)^2) / k: that of the diagonal blocks alone, and zero for
    O = 1. For the standard error, the variances of the samples are added up.
    """

    title = "per-sample trace"
    source = (
        "this suite; Hutchinson 1990 (doi 10.1080/03610919008812866) on each block; per-sample gradients of Goodfellow "
        "2015 (arXiv 1510.01799)"
    )
    use_when = "a trace is needed, samples do not interact, and the network cannot be traced"
    variance = "2 sum_b (||Theta_bb||_F^2 - sum_o Theta_(bo)(bo)^2) / k"
    side = "reverse"
