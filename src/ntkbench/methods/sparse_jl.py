"""Sparse Johnson-Lindenstrauss projection of the rows of J, as in GraSS."""

from __future__ import annotations

from typing import ClassVar

from ntkbench.methods.base.projected import HashedRows


class SparseJL(HashedRows):
    """Features Phi = J S, where S has ``nonzeros`` random signs for each parameter, one in each block of features.

    Takes O passes for each set of weights and n P ``nonzeros`` additions for any k. A block of k / ``nonzeros``
    features is a CountSketch. Blocks are independent, so they serve as replicates for the unbiased estimates and their
    standard errors. The relative error of the Gram matrix is that of a dense projection with as many features.
    ``grass`` first drops random parameters, which saves time and adds variance.

    Attributes:
        nonzeros: number of nonzeros per parameter; 8 give the standard error 7 degrees of freedom.
    """

    title = "sparse projection (SJLT)"
    source = "Kane and Nelson 2014 (arXiv 1012.1577), the block construction; Hu et al. 2025 (GraSS, arXiv 2505.18976)"
    use_when = "J has many rows, and multiplications by dense signs take too long"
    variance = "about that of ``dense_jl`` with as many features"
    nonzeros: ClassVar[int] = 8
    fewest_probes = nonzeros
