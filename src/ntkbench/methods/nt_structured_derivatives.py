"""neural-tangents' structured derivatives."""

from __future__ import annotations

from ntkbench.methods.base.neural_tangents import NeuralTangents
from ntkbench.operators import programs
from ntkbench.options import Target
from ntkbench.problem import Problem


class NtStructuredDerivatives(NeuralTangents):
    """Theta from the traced network's equations, with rules that exploit the structure of each equation's Jacobian.

    Cost: O backward passes to the outputs of the equations that have a parameter as input, and one contraction for each
    pair of equations with the same parameter. Loops are unrolled, so a recurrence of T steps compiles O(T^2)
    contractions. If a parameter is transposed before it is multiplied, the equation that has it as input is the
    transpose, which has no structure to exploit.
    """

    title = "neural-tangents structured derivatives"
    source = (
        "Novak et al. 2022 (arXiv 2206.08720), section 3; neural-tangents 0.6.5 (arXiv 1912.02803), "
        "STRUCTURED_DERIVATIVES"
    )
    use_when = "the network is a JAX function without long loops, and O is small"
    implementation = "STRUCTURED_DERIVATIVES"

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        return super().unsupported_reason(problem, metric, target, passes) or programs.scan_too_long(problem)
