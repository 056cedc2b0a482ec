"""Structured derivatives in PyTorch: Theta layer by layer, without a Jacobian."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class StructuredDerivatives(Layerwise):
    """Theta as a sum over layers of products of their inputs and of the cotangents at their outputs.

    Takes O backward passes for each set of weights, without the gradients of weights. Each layer is contracted in the
    cheaper of two orders, for one triangle of Theta; the trace takes only the diagonal. Theta and one layer are held in
    memory, or blocks of Theta if these do not fit.
    """

    title = "structured derivatives"
    kind = "exact"
    source = "this suite, on ATen graphs; Novak et al. 2022 (arXiv 2206.08720), section 3; ghost norms for the trace"
    use_when = "samples do not interact, and O is small or the error must be below about 1 %"
