"""Per-sample trace, forward: tr Theta = sum_b E ||J_b w_b||^2, with a tangent for each sample."""

from __future__ import annotations

from ntkbench.methods.base.u_statistics import OneSidedPerSample
from ntkbench.options import Target
from ntkbench.problem import Problem


class PerSampleTraceForward(OneSidedPerSample):
    """The mean over k probes of random signs w of sum_b ||J_b w_b||^2: 1 pass per probe, JVPs only; unbiased.

    As in ``per_sample_trace``, the cross-sample terms, which have zero mean, are dropped. The variance is 2
    sum_b (||A_b||_F^2 - sum_p (A_b)_pp^2) / k with A_b = J_b^T J_b, where ||A_b||_F = ||Theta_bb||_F. Random signs
    remove the diagonal of A_b, not that of Theta_bb. The variance is large if the outputs of a sample share parameters,
    as the steps of a recurrent network do, and small in wide layers. Each sample takes P random signs, so with many
    parameters and few outputs drawing the probes takes longer than the products.
    """

    title = "per-sample trace (forward)"
    source = "this suite; Hutchinson 1990 (doi 10.1080/03610919008812866) on J_b^T J_b of each sample"
    use_when = "``per_sample_trace`` applies, and the outputs of a sample share few parameters"
    variance = "2 sum_b (||A_b||_F^2 - sum_p (A_b)_pp^2) / k, A_b = J_b^T J_b"
    side = "forward"

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        return 3 * problem.N * problem.P * target.itemsize
