"""One-sided forward: tr Theta = E ||J w||^2, JVPs only."""

from __future__ import annotations

from ntkbench.methods.base.one_sided import OneSided


class OneSidedForward(OneSided):
    """The mean of ||J w||^2 over random signs w in parameter space: 1 pass per probe, no backward pass; unbiased.

    The variance is 2 (||J^T J||_F^2 - sum_p (J^T J)_pp^2) / k for k probes.
    """

    title = "one-sided forward"
    use_when = "a trace is needed, samples interact, and J^T J is closer to diagonal than Theta"
    variance = "2 (||J^T J||_F^2 - sum_p (J^T J)_pp^2) / k"
    side = "forward"
