"""neural-tangents' Jacobian contraction, its default."""

from __future__ import annotations

from ntkbench.methods.base.neural_tangents import NeuralTangents


class NtJacobianContraction(NeuralTangents):
    """Per-sample Jacobians by reverse mode, contracted parameter by parameter.

    Cost: O backward passes and n^2 P multiplications. Holds the n x P Jacobian, or the part of it that XLA needs at
    once.
    """

    title = "neural-tangents Jacobian contraction"
    source = (
        "Novak et al. 2022 (arXiv 2206.08720), section 3; neural-tangents 0.6.5 (arXiv 1912.02803), "
        "JACOBIAN_CONTRACTION"
    )
    use_when = "the network is a JAX function whose Jacobian fits in memory"
    implementation = "JACOBIAN_CONTRACTION"
