"""The kernel of the last layer's parameters alone."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class LastLayer(Layerwise):
    """A = (1/O) tr_O of the last layer's part of Theta, which approximates Theta as A ⊗ I_O.

    O passes for each set of weights, which go back no further than the last layer.
    """

    title = "last layer"
    kind = "approximate"
    computes = "last-layer trace kernel ⊗ I_O"
    source = "folklore; the conjugate kernel of the readout"
    use_when = "the representation is fixed, or an N x N kernel of the readout alone is meant"
    kernel = "last_layer"
