"""One-sided forward as in the paper's script: a sixth of the probes made orthonormal, JVPs only."""

from __future__ import annotations

from ntkbench.methods.base.one_sided import OneSidedPaper


class OneSidedPaperForward(OneSidedPaper):
    """||J Q||_F^2 + mean of ||J (I - Q Q^T) g||^2 over m probes: 1 pass per probe; unbiased.

    This is ``one_sided_paper_reverse`` with J^T J instead of Theta and P instead of n. The variance is about
    2 ||J^T J||_F^2 (1 - 2 q / P) / (m - q) with q = m // 6.
    """

    title = "one-sided forward (paper's script)"
    use_when = "you compare with the paper"
    variance = "about 2 ||J^T J||_F^2 (1 - 2 q / P) / (m - q), q = m // 6"
    side = "forward"
