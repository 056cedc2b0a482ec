"""Dense Johnson-Lindenstrauss projection of the rows of J, as in TRAK."""

from __future__ import annotations

from ntkbench.methods.base.projected import ProjectedRows, Sketch, signs
from ntkbench.operators import JacobianOperator
from ntkbench.problem import Problem


class DenseJL(ProjectedRows):
    """Features Phi = J S with k columns of random signs in S; (1/k) Phi Phi^T estimates Theta.

    Every row of J is multiplied by S, which is never held as a whole: O passes for each set of weights and n P k
    multiplications. ``gram_forward`` computes the same features by k JVPs, which is less work for O > 2. Use this
    method if O is small, as for one scalar output, and k is much larger than the affordable number of passes. The
    relative error of the Gram matrix is about sqrt((1 + effective rank) / k).
    """

    title = "dense projection (JL)"
    source = "Johnson and Lindenstrauss 1984 (doi 10.1090/conm/026/737400); Park et al. 2023 (TRAK, arXiv 2303.14186)"
    use_when = "O is small, and k is much larger than the affordable number of passes"
    variance = "that of ``gram_forward`` with k probes"
    backends = ("torch", "jax")

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        """Operations of the products of all rows with the signs, at each set of weights."""
        return 2.0 * problem.n * problem.P * passes

    def parts(self, k: int) -> int:
        return k

    def sketch(self, j: JacobianOperator, k: int, seed: int, replicates: int | None) -> Sketch:
        return signs(j, k, seed)
