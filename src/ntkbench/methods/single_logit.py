"""The kernel of one output alone."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class SingleLogit(Layerwise):
    """The kernel of g(x) = f_1(x), standing for Theta as itself (x) I_O. 1 pass for each set of weights."""

    title = "single logit"
    kind = "approximate"
    source = "Mohamadi, Bae, Sutherland 2023, the single-logit variant"
    kernel = "single_logit"
