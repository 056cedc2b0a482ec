"""One-sided forward as the paper's script has it: a sixth of the probes made orthonormal, JVPs only."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench.estimators import deflation
from ntkbench.estimators.standard_errors import Reading
from ntkbench.methods.base import FixedBudget
from ntkbench.operators import JacobianOperator, Rng


class OneSidedPaperForward(FixedBudget):
    """||J Q||_F^2 + mean of ||J (I - Q Q^T) g||^2 over m probes, 1 pass each.

    Q is an orthonormal basis of m // 6 random sign vectors and g are the other m - m // 6 probes, random signs too. Q
    looks at nothing of J^T J, so it takes a share q / P of the trace away and no more: a variance of about
    2 ||J^T J||_F^2 (1 - 2q / P) / (m - q), which is more than that of m plain probes unless J^T J is small. Unbiased;
    the standard error is that of the residual's mean.
    """

    title = "one-sided forward (paper's script)"
    source = "Hazelden 2025, the paper's script (trace_one_sided)"
    backends = ("torch", "jax")
    metrics = ("trace",)
    fewest_probes = 6
    gradients_held = 0.5

    def passes_per_probe(self, metric: str) -> int:
        return 1

    def draw(self, metric: str, jacobians: Sequence[JacobianOperator], probes: int, rng: Rng) -> Reading:
        (j,) = jacobians
        return deflation.random_directions(j, j.jvp, probes, j.P, rng)
