"""The kernel of a fixed random combination of outputs."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class RandomVector(Layerwise):
    """The kernel A of g(x) = u . f(x) with a fixed random unit vector u, approximating Theta as A ⊗ I_O.

    1 pass for each parameter set.
    """

    title = "random unit vector"
    kind = "approximate"
    source = "Mohamadi, Bae, Sutherland 2023, a fixed random vector in place of the sum"
    passes_formula = "1"
    kernel = "random_vector"
