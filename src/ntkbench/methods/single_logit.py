"""The kernel of one output alone."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class SingleLogit(Layerwise):
    """The kernel A of g(x) = f_1(x), approximating Theta as A ⊗ I_O. 1 pass for each set of weights."""

    title = "single logit"
    kind = "approximate"
    computes = "single-logit kernel ⊗ I_O"
    source = "Mohamadi et al. 2023 (arXiv 2206.12543), the single-logit variant"
    use_when = "you need an N x N kernel in one pass, and outputs are similar to each other"
    kernel = "single_logit"
    passes_formula = "1"
