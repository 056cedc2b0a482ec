"""pNTK: the N x N kernel of the sum of logits, approximating Theta as pNTK ⊗ I_O."""

from __future__ import annotations

import math
from collections.abc import Sequence

import array_api_compat

from ntkbench import metrics
from ntkbench.estimators.rows import moments_from_rows
from ntkbench.methods.base import Deterministic
from ntkbench.metrics import Moments
from ntkbench.operators import Array, JacobianOperator
from ntkbench.options import Target
from ntkbench.problem import Problem


class SumOfLogits(Deterministic):
    """The kernel <grad g(x), grad g(x')> of g(x) = O^{-1/2} sum_o f_o(x), approximating Theta as pNTK ⊗ I_O.

    1 pass for each set of weights, and N^2 P multiplications. The metrics are those of pNTK ⊗ I_O; its difference from
    Theta counts as error.
    """

    title = "pNTK (sum of logits)"
    kind = "approximate"
    computes = "pNTK ⊗ I_O"
    source = "Mohamadi et al. 2023 (arXiv 2206.12543), the sum-of-logits pNTK"
    use_when = "you need the pNTK of a JAX function, or of a network that cannot be traced"
    passes_formula = "1"
    backends = ("torch", "jax")
    needs_independent_samples = True

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return len(metrics.parameter_sets(metric))

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        j = max(jacobians, key=lambda j: j.P)
        # Two blocks of rows at each set of weights, one that is being computed, and its parts by parameter.
        row = j.bytes_per_probe() // j.N + j.P * j.itemsize
        memory = j.memory - len(jacobians) * j.bytes_of_certificates()
        size = max(1, memory // ((2 + 2 * len(jacobians)) * row))
        blocks = [slice(i, min(i + size, j.N)) for i in range(0, j.N, size)]

        def gradients(jacobian: JacobianOperator, samples: slice) -> Array:
            unit = jacobian.basis(0, 1)
            xp = array_api_compat.array_namespace(unit)
            ones = xp.full_like(unit[:, : jacobian.O], 1 / math.sqrt(jacobian.O))
            count = samples.stop - samples.start
            return jacobian.sample_vjp(samples, xp.broadcast_to(ones[:, None, :], (1, count, jacobian.O)))[0]

        pntk = moments_from_rows(metric, jacobians, blocks, gradients, count=j.N)
        return pntk.times(j.O)
