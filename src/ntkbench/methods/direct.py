"""Direct: Theta applied to all n basis vectors, the baseline of the trace-estimation paper."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench import metrics
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class Direct(Deterministic):
    """Theta column by column from a black box: n Theta-vector products, 2n passes, for each set of weights."""

    title = "direct"
    kind = "exact"
    source = "Hazelden 2025 (arXiv 2511.10796), the exact baseline of its figures"
    use_when = "Theta is a black box, or as a baseline"
    passes_formula = "2 * n"
    backends = ("torch", "jax")

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return 2 * problem.n * len(metrics.parameter_sets(metric))

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        j = jacobians[0]
        return metrics.from_rows_of_theta(
            (range(block.start, block.stop), [each.ntk(each.basis(block.start, block.stop)) for each in jacobians])
            for block in arrays.slices(j.blocks(j.n))
        )
