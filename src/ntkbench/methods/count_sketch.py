"""CountSketch of the gradients of a few random combinations of outputs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import array_api_compat
import numpy as np

from ntkbench import metrics
from ntkbench.estimators.projections import Features
from ntkbench.methods.base import Deterministic
from ntkbench.methods.base.projected import hashed
from ntkbench.metrics import Moments
from ntkbench.operators import JacobianOperator, arrays
from ntkbench.options import Target
from ntkbench.problem import Problem


class CountSketch(Deterministic):
    """The N x N kernel K of CountSketches of J_b^T v_r, which approximates Theta as (K / O) ⊗ I_O.

    K = (1/R) sum_r Phi_r Phi_r^T, where row b of Phi_r is the CountSketch of J_b^T v_r. The R random sign vectors v_r
    over the outputs are the same for all samples, so E K = tr_O Theta, which is O times the trace kernel. The seed
    draws probes and hashes, which are the same at all sets of weights. Like the trace kernel, K omits the cross terms
    between outputs. It also has the noise of the probes, at most about sqrt(2 / R), and of the hash, about
    sqrt(effective rank / width). The trace is unbiased over draws of both. The variance of K makes the squared norm too
    large, and so the effective rank too small.

    Takes ``probes`` passes for each set of weights and N P ``probes`` additions.

    Attributes:
        probes: R.
        width: features of a probe.
    """

    title = "CountSketch, output probes"
    kind = "approximate"
    computes = "sketched trace kernel ⊗ I_O"
    source = (
        "Shukla 2025 (arXiv 2512.00860), output probes and a CountSketch; Charikar et al. 2002 (doi "
        "10.1007/3-540-45465-9_59)"
    )
    use_when = "you need an N x N kernel of a network with many outputs, and a bias is acceptable"
    backends = ("torch",)
    needs_independent_samples = True
    needs_one_network = True
    draws = True
    probes: ClassVar[int] = 8
    width: ClassVar[int] = 1024
    passes_formula = "8"

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return self.probes * len(metrics.parameter_sets(metric))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        sets = len(metrics.parameter_sets(metric))
        return sets * problem.N * (self.probes * self.width * (target.itemsize + 8) + 8 * problem.N)

    def moments(self, metric: str, jacobians: Sequence[JacobianOperator]) -> Moments:
        return self.drawn(metric, jacobians, 0)

    def drawn(self, metric: str, jacobians: Sequence[JacobianOperator], seed: int) -> Moments:
        O = jacobians[0].O  # noqa: E741 - the field's symbol
        kernels = [kernel(probed(j, self.probes, self.width, seed)) / O for j in jacobians]
        return metrics.from_gram(*kernels).times(O)


def probed(j: JacobianOperator, probes: int, width: int, seed: int = 0) -> Features:
    """Features of each output probe, ``[R, N, width]``; R passes.

    Args:
        j: the operator.
        probes: R.
        width: features of a probe.
        seed: of the probes and of the hash, the same at all sets of weights.
    """
    v, sketch = j.rng(seed).sign(probes, j.O), hashed(j, 1, width, seed)
    xp = array_api_compat.array_namespace(v)
    size = max(1, j.memory // (4 * (j.bytes_per_probe() // j.N + 2 * j.P * j.itemsize)))
    found = []
    for one in v:
        starts = range(0, j.N, size)
        chunks = [slice(start, min(start + size, j.N)) for start in starts]
        each = [j.sample_vjp(c, xp.broadcast_to(one, (1, c.stop - c.start, j.O)))[0] for c in chunks]
        found.append(arrays.gather(sketch(rows)[:, 0] for rows in each))
    return np.stack(found)


def kernel(features: Features) -> np.ndarray:
    """K from the features of all probes, ``[N, N]``."""
    found: np.ndarray = np.einsum("rnw,rmw->nm", features, features, optimize=True) / len(features)
    return found
