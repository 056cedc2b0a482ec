"""pNTK without Jacobians: one backward pass for all samples, contracted layer by layer."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class StructuredSumOfLogits(Layerwise):
    """The kernel of g(x) = O^{-1/2} sum_o f_o(x), approximating Theta as pNTK ⊗ I_O.

    1 pass for each set of weights. Per-sample gradients are written out only if that is cheaper.
    """

    title = "pNTK by layers"
    kind = "approximate"
    computes = "pNTK ⊗ I_O"
    source = "this suite; the sum-of-logits pNTK of Mohamadi et al. 2023 (arXiv 2206.12543)"
    use_when = "you need the pNTK of a network that can be traced, and a bias is acceptable"
    passes_formula = "1"
    kernel = "sum_of_logits"
