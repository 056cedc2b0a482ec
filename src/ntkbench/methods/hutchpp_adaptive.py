"""Adaptive Hutch++: the sketch grows as long as this lowers the variance; all other passes go to the residual."""

from __future__ import annotations

from ntkbench.methods.base.adaptive_sketch import AdaptiveSketch


class HutchPPAdaptive(AdaptiveSketch):
    """tr Q^T Theta Q + mean of ||J^T (I - Q Q^T) g||^2, where Q grows as long as this lowers the variance.

    The probes g are random signs in output space, and Q is an orthonormal basis of Theta s for other random signs s. A
    column of Q takes 4 passes and a residual probe 1 VJP; the rule for growing Q is in
    :class:`ntkbench.methods.base.adaptive_sketch.AdaptiveSketch`. Unbiased. On a flat spectrum it is
    ``one_sided_reverse`` without the passes that one block of columns takes. Holds 2 vectors of length n for each
    column and 1 for each probe.
    """

    title = "Hutch++ (adaptive)"
    source = (
        "this suite, one-sided, with another rule of stopping; Persson et al. 2022 (doi 10.1137/21M1447623), section 2"
    )
    use_when = "a trace is needed, samples interact, and the decay of the spectrum is unknown"
    variance = "2 (||B||_F^2 - sum_i B_ii^2) / m over m residual probes, B = (I - Q Q^T) Theta (I - Q Q^T), given Q"
    side = "reverse"
