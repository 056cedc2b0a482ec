"""The mean of the outputs' kernels, the best N x N kernel in the Frobenius norm."""

from __future__ import annotations

from ntkbench.methods.base.layerwise import Layerwise


class TraceKernel(Layerwise):
    """A = (1/O) tr_O Theta, approximating Theta as A ⊗ I_O. No n x n matrix is formed.

    O passes for each set of weights. The trace of Theta is exact.
    """

    title = "trace kernel"
    kind = "approximate"
    computes = "trace kernel ⊗ I_O"
    source = "folklore; the projection of Theta onto Kronecker products with I_O"
    use_when = "you need the best N x N kernel in the Frobenius norm, and O passes are affordable"
    kernel = "trace"
