"""Sparse Johnson-Lindenstrauss projection of the rows of J, as for GraSS."""

from __future__ import annotations

from typing import ClassVar

from ntkbench.methods.base.projected import HashedRows


class SparseJL(HashedRows):
    """Phi = J S, where each parameter has ``nonzeros`` random signs in S, one in each of as many blocks of k features.

    O passes for each parameter set and n P ``nonzeros`` additions for any k. A block is a CountSketch, and blocks are
    independent, so they serve as replicates for the unbiased estimates and their standard errors. The relative error of
    the Gram matrix is that of a dense projection with as many features. ``grass`` also drops random parameters
    first, which saves time and adds variance.

    Attributes:
        nonzeros: nonzeros of each parameter; 8 give the standard error 7 degrees of freedom.
    """

    title = "sparse projection (SJLT)"
    source = "Kane and Nelson 2014 (arXiv 1012.1577), the block construction; Hu et al. 2025 (GraSS, arXiv 2505.18976)"
    use_when = "J has many rows, and multiplications by dense signs take too long"
    variance = "about that of ``dense_jl`` with as many features"
    nonzeros: ClassVar[int] = 8
    fewest_probes = nonzeros
