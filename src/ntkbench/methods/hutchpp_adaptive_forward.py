"""Adaptive Hutch++ from the forward side: a sketch of J^T J that grows, and residual probes by JVPs."""

from __future__ import annotations

from ntkbench.methods.base.adaptive_sketch import AdaptiveSketch


class HutchPPAdaptiveForward(AdaptiveSketch):
    """``hutchpp_adaptive`` for K = J^T J, which has the trace of Theta: tr Q^T K Q + mean of ||J (I - Q Q^T) g||^2.

    The probes g are random signs in parameter space, and Q is an orthonormal basis of K s for other random signs s. A
    column of Q takes 4 passes, half of them VJPs, and a residual probe 1 JVP; the rule for growing Q is in
    :class:`ntkbench.methods.base.adaptive_sketch.AdaptiveSketch`. Unbiased. K and Theta have the same nonzero
    eigenvalues, so the sketch removes as much of the variance as it does for Theta. Random signs remove the diagonal of
    K, not that of Theta. On a flat spectrum it is ``one_sided_forward`` without the passes that one block of columns
    takes. Holds 2 vectors of length P for each column and 1 for each probe, so it is for networks with fewer parameters
    than outputs.
    """

    title = "Hutch++ (adaptive, forward)"
    source = (
        "this suite, on J^T J, with another rule of stopping; Persson et al. 2022 (doi 10.1137/21M1447623), section 2"
    )
    use_when = "``hutchpp_adaptive`` applies, and there are fewer parameters than outputs"
    variance = "2 (||B||_F^2 - sum_i B_ii^2) / m over m residual probes, B = (I - Q Q^T) J^T J (I - Q Q^T), given Q"
    side = "forward"
