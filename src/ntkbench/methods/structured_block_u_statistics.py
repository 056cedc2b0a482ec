"""Block U-statistics by layers: inner products of per-sample gradients that are never written out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from ntkbench import metrics
from ntkbench.methods.base.structured import StructuredUStatistics
from ntkbench.metrics import Moments
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem


class StructuredBlockUStatistics(StructuredUStatistics):
    """The estimator of ``block_u_statistics`` on the engine of ``structured_derivatives``.

    It is unbiased, with the same variance and passes: 1 pass per probe, 2 for alignment. The gradient of a weight is a
    sum of outer products of inputs and cotangents, so inner products of gradients follow from those of their factors.
    For a linear layer of I inputs and I' outputs they take I + I' multiplications instead of I I'.

    Probes are processed in groups, and only pairs within a group are used. Probes that are added later form new groups.
    If the kernel of a group does not fit in memory, the passes of its columns are repeated, so fewer probes are drawn
    or groups are smaller. The budget is never exceeded.

    If a few samples, such as outliers, have most of ||Theta||_F^2, they are treated exactly, with all O outputs, and
    the others by probes (see :mod:`ntkbench.estimators.strata`). An exact sample h takes O / N of a pass in each group
    of probes. ||Theta_hh||_F^2 is then exact, and ||Theta_hc||_F^2 is estimated by the mean of ||J_h w_c^k||^2. If
    there are at least ``least_with_pilot`` probes, one is spent on the choice of these samples. It is not used for the
    estimate, so the choice causes no bias. If there are exact samples, groups that were drawn before are discarded.
    """

    title = "block U-statistics by layers"
    source = "this suite; structured derivatives of Novak et al. 2022 (arXiv 2206.08720)"
    use_when = "samples do not interact, and O is too large for an exact value"
    variance = "that of ``block_u_statistics``, with pairs of probes of one group"
    prepares = "trace"

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def networks(self, prepared: TracedProblem, metric: str) -> tuple[Sequence[TracedNetwork], Moments]:
        return prepared.ends(metric), metrics.NOTHING
