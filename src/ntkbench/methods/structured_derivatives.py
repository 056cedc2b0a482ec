"""Structured derivatives in PyTorch: Theta layer by layer, without a Jacobian."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class StructuredDerivatives(Layerwise):
    """Theta as a sum over layers of products of their inputs and of the cotangents of their outputs.

    O passes for each parameter set (backward passes that leave out the gradients of weights), and for each layer the
    cheaper of two orders of contraction, on one triangle; the trace takes only the diagonal. Memory is that of Theta
    and of one layer, or of blocks of Theta if that exceeds the budget.
    """

    title = "structured derivatives"
    kind = "exact"
    source = "this suite, on ATen graphs; Novak et al. 2022 (arXiv 2206.08720), section 3; ghost norms for the trace"
    use_when = "samples do not interact, and O is small or the error must be below about 1 %"
