"""XNysTrace: leave-one-out Nystrom approximations of Theta through a QR of J^T U."""

from __future__ import annotations

from ntkbench.methods.base.xnystrace import FactoredXNysTrace


class XNysTrace(FactoredXNysTrace):
    """Mean over i of tr Theta_i + c_i u_i^T (Theta - Theta_i) u_i, with leave-one-out Nystrom approximations Theta_i.

    Theta_i uses all of the k Gaussian probes U except u_i. With F = J^T U = Q R, k VJPs compute F and k JVPs compute
    ||J Q||_F^2; see :class:`ntkbench.methods.base.xnystrace.FactoredXNysTrace`. Unbiased. Exact once k exceeds the rank
    of Theta. Holds up to 3k gradients.
    """

    title = "XNysTrace"
    source = (
        "Epperly et al. 2024 (doi 10.1137/23M1548323), section 2.3 (XNysTrace with normalisation), through a QR of J^T "
        "U"
    )
    use_when = "a trace is needed, samples interact, the spectrum decays, and 3k gradients fit in memory"
    variance = "falls with the tail of the spectrum; 0 once k exceeds the rank of Theta"
    side = "reverse"
