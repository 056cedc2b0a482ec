"""XNysTrace from the forward side: leave-one-out Nystrom approximations of J^T J through a QR of J W."""

from __future__ import annotations

from ntkbench.methods.base.xnystrace import FactoredXNysTrace


class XNysTraceForward(FactoredXNysTrace):
    """``xnystrace`` for J^T J, which has the trace of Theta: F = J W = Q R for k Gaussian w in parameter space.

    k JVPs for F, then k VJPs for ||J^T Q||_F^2. J J^T and J^T J have the same nonzero eigenvalues, so ``xnystrace``
    differs in cost and memory only: here the sketch has vectors of length n and the probes have length P, there it is
    the reverse. Unbiased. Exact once k exceeds the rank of Theta. Holds up to 3k vectors of length P.
    """

    title = "XNysTrace (forward)"
    source = (
        "Epperly et al. 2024 (doi 10.1137/23M1548323), section 2.3 (XNysTrace with normalisation), through a QR of J W"
    )
    use_when = "``xnystrace`` applies, and there are fewer parameters than outputs"
    variance = "falls with the tail of the spectrum; 0 once k exceeds the rank of Theta"
    side = "forward"
