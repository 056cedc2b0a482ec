"""neural-tangents' NTK-vector products."""

from __future__ import annotations

from ntkbench.methods.base.neural_tangents import NeuralTangents
from ntkbench.options import Target
from ntkbench.problem import Problem


class NtNtkVectorProducts(NeuralTangents):
    """Each O x O block of Theta by a JVP after a VJP for each output, all N^2 pairs of samples and all outputs at once.

    Cost: N^2 O VJPs and as many JVPs of single samples, without a contraction over parameters. The activations of all
    of them are held at once, which takes far more memory than Theta if activations are large.
    """

    title = "neural-tangents NTK-vector products"
    source = (
        "Novak et al. 2022 (arXiv 2206.08720), section 3; neural-tangents 0.6.5 (arXiv 1912.02803), NTK_VECTOR_PRODUCTS"
    )
    use_when = "the network is a JAX function with small activations whose Jacobian does not fit in memory"
    implementation = "NTK_VECTOR_PRODUCTS"

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """Theta, also for the trace, which is read from it."""
        return max(problem.n**2 * target.itemsize, super().bytes_needed(problem, metric, target))
