"""The kernel of one output alone."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class SingleLogit(Layerwise):
    """The kernel A of g(x) = f_1(x), approximating Theta as A ⊗ I_O. 1 pass for each parameter set."""

    title = "single logit"
    kind = "approximate"
    source = "Mohamadi, Bae, Sutherland 2023, the single-logit variant"
    kernel = "single_logit"
    passes_formula = "1"
