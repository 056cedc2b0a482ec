"""One-sided reverse as in the paper's script: a sixth of the probes made orthonormal, VJPs only."""

from __future__ import annotations

from ntkbench.methods.base.one_sided import OneSidedPaper


class OneSidedPaperReverse(OneSidedPaper):
    """||J^T Q||_F^2 + mean of ||J^T (I - Q Q^T) g||^2 over m probes: 1 pass per probe; unbiased.

    Q is an orthonormal basis of q = m // 6 random sign vectors, and g are the other m - q probes, also random signs. Q
    does not depend on Theta, so it removes a share of only q / n of the trace. The variance is about
    2 ||Theta||_F^2 (1 - 2 q / n) / (m - q): more than that of m plain probes, unless n is small. The standard error is
    that of the residual's mean.
    """

    title = "one-sided reverse (paper's script)"
    use_when = "you compare with the paper"
    variance = "about 2 ||Theta||_F^2 (1 - 2 q / n) / (m - q), q = m // 6"
    side = "reverse"
