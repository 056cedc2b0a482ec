"""Direct: Theta applied to all n basis vectors, the baseline of the trace-estimation paper."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from ntkbench import metrics
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem


class Direct(Deterministic):
    """Theta column by column from a black box: n Theta-vector products, 2n passes, for each set of weights."""

    title = "direct"
    kind = "exact"
    source = "Hazelden 2025, the exact baseline of its figures"
    backends = ("torch", "jax")

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return 2 * problem.n * len(metrics.ends(metric))

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        j = jacobians[0]
        ends = [*itertools.accumulate(j.blocks(j.n))]
        return metrics.from_rows_of_theta(
            (range(start, stop), [jacobian.ntk(jacobian.basis(start, stop)) for jacobian in jacobians])
            for start, stop in zip([0, *ends], ends, strict=False)
        )
