"""One-sided reverse: tr Theta = E ||J^T u||^2, VJPs only."""

from __future__ import annotations

from ntkbench.methods.base.one_sided import OneSided


class OneSidedReverse(OneSided):
    """The mean of ||J^T u||^2 over random signs u: 1 pass per probe, half of the passes for Theta u; unbiased.

    The variance is 2 (||Theta||_F^2 - sum_i Theta_ii^2) / k for k probes.
    """

    title = "one-sided reverse"
    use_when = "a trace is needed, samples interact, and the spectrum is flat"
    variance = "2 (||Theta||_F^2 - sum_i Theta_ii^2) / k"
    side = "reverse"
