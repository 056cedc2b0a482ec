"""The kernel of a fixed random combination of outputs."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class RandomVector(Layerwise):
    """The kernel A of g(x) = u . f(x) with a random unit vector u, approximating Theta as A ⊗ I_O.

    The seed draws u, which is the same for all samples and sets of weights. 1 pass for each set of weights.
    """

    title = "random unit vector"
    kind = "approximate"
    computes = "kernel of a random combination ⊗ I_O"
    source = "Mohamadi et al. 2023 (arXiv 2206.12543), a fixed random vector instead of the sum"
    use_when = "you need an N x N kernel in one pass, and no output may be preferred to another"
    passes_formula = "1"
    draws = True
    kernel = "random_vector"
