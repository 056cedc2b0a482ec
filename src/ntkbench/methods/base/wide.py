"""Base of the methods for networks that end with a wide linear layer, tied to the embedding or not."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

from ntkbench import operations
from ntkbench.errors import Unsupported
from ntkbench.methods.base.method import Method
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from ntkbench.methods.base.head import HeadedProblem
    from ntkbench.methods.base.tied_head import TiedProblem

NO_HEAD = (
    "no linear layer or embedding of the network is wider than its input and has a width that divides the outputs of "
    "a sample"
)


class WideHeadMethod(Method):
    """A method that splits networks in front of their heads, or shortens their vocabulary."""

    backends = ("torch",)
    needs_independent_samples = True
    prepares = "head"
    by_layers = True

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        from ntkbench.methods.base import head, tied_head

        if reason := super().unsupported_reason(problem, metric, target, passes):
            return reason
        return None if head.candidates(problem) or tied_head.tables(problem) else NO_HEAD

    def products(self, problem: Problem, metric: str, passes: float) -> float:
        """Kernels with one direction for each pass instead of the outputs of a sample."""
        outputs = problem.O * operations.ends(metric)
        return operations.by_layers(problem, metric, min(passes, outputs), shorter=True)

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The orthonormal factors of the head's weights, and the copies that their QR factorisation makes."""
        from ntkbench import metrics
        from ntkbench.methods.base import head, tied_head

        ends = len(metrics.parameter_sets(metric))
        sizes: dict[int, float] = {}
        for V, d in head.candidates(problem):
            sizes[V] = V * d
        for name in tied_head.tables(problem):
            assert problem.module is not None
            V, d = problem.module.get_parameter(f"{name}.weight").shape
            sizes[V] = V * d
        held = 2 * target.itemsize * ends * int(for_head(problem, sizes) or 0)
        return held + super().bytes_needed(problem, metric, target, passes)

    def prepare(self, problem: Problem, target: Target) -> HeadedProblem | TiedProblem:
        """Split the networks, and trace the part in front of their heads or with a shorter vocabulary.

        Raises:
            Unsupported: a network does not end with a wide linear layer, or cannot be traced.
            Unavailable: the device is not present.
        """
        from ntkbench.methods.base import head, tied_head

        reasons = []
        if head.candidates(problem):
            try:
                return head.HeadedProblem(problem, target)
            except Unsupported as error:
                reasons.append(str(error))
        if tied_head.tables(problem):
            try:
                return tied_head.TiedProblem(problem, target)
            except Unsupported as error:
                reasons.append(str(error))
        raise Unsupported("; ".join(reasons) or NO_HEAD)


def share(problem: Problem, metric: str) -> float:
    """Ratio of the outputs of a shorter head to those of the head that it replaces; 1 if there is no such head."""
    from ntkbench import metrics
    from ntkbench.methods.base import head, tied_head

    ends = len(metrics.parameter_sets(metric))
    found: dict[int, float] = {V: ends * d for V, d in head.candidates(problem)}
    for V, passes in tied_head.passes(problem, metric).items() if tied_head.tables(problem) else ():
        found[V] = min(found.get(V, math.inf), passes * V / (ends * problem.O))
    return min(1.0, for_head(problem, {V: r / V for V, r in found.items()}) or 1.0)


def for_head(problem: Problem, by_width: Mapping[int, float]) -> float | None:
    """The entry for the head in a mapping by the widths of candidates; ``None`` if it is empty.

    Other layers may have a width that divides the outputs by chance. If the outputs of all positions are flattened, the
    last candidate is taken as the head.
    """
    return by_width.get(problem.output_shape[-1], next(reversed(list(by_width.values())), None))
