"""Block U-statistics: all moments of Theta from inner products of per-sample gradients of random outputs."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators.accumulators import Pairs, Sample, SampleTraces, moments_of
from ntkbench.methods.base import Sampling
from ntkbench.operators import Array, JacobianOperator, Rng
from ntkbench.problem import Problem


class BlockUStatistics(Sampling):
    """K fields of random signs u, gradients w_b^k = J_b^T u_b^k of each sample b, and m_bc^kl = <w_b^k, w_c^l>.

    tr Theta = E mean_k sum_b m_bb^kk, and ||Theta||_F^2 = E [mean_(k, l) sum_(b != c) (m_bc^kl)^2
    + mean_(k != l) sum_b (m_bb^kl)^2]; m^2 becomes m m_f for tr(Theta Theta_f). All are unbiased, since u_b^k and u_c^l
    are independent but for b = c and k = l; the square root and the ratios are biased at order 1/K. 1 pass a field, 2
    for alignment, and inner products of K N vectors of length P, which for K N in the hundreds cost more than the
    passes. One field is N independent probes that meet in N (N - 1) / 2 pairs: where Theta_bc is near a multiple of the
    identity, as in wide networks, two fields tell the norm to some 1/N.

    The variance and its estimate are those of :class:`ntkbench.estimators.standard_errors.PairSums`; memory is bounded
    as in :class:`ntkbench.estimators.accumulators.Pairs`.
    """

    title = "block U-statistics"
    source = "this suite; U-statistics of Hoeffding 1948"
    backends = ("torch", "jax")
    needs_independent_samples = True
    first_batch = 2

    def worthwhile_passes(self, problem: Problem) -> int:
        # Beyond a thousand gradients their inner products take most of the time, and its square.
        return max(8, 1024 // problem.N)

    def passes_per_probe(self, metric: str) -> int:
        return 2 if metric == "alignment" else 1

    def sample(self, names: Sequence[str], jacobians: Sequence[JacobianOperator], rng: Rng) -> Sample:
        j = jacobians[0]

        def sign(k: int) -> Array:
            return rng.sign(k, j.n)

        if tuple(names) == ("trace",):
            return SampleTraces(lambda k: j.sample_squares(sign(k).reshape(k, j.N, j.O)), j.blocks)

        def gradients(u: Array, samples: slice) -> list[Array]:
            v = u.reshape(-1, j.N, j.O)[:, samples]
            return [jacobian.sample_vjp(samples, v) for jacobian in jacobians]

        return Pairs(moments_of(names), j.N, j.P, jacobians, sign, gradients)
