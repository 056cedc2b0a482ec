"""GraSS: random parameters alone, projected sparsely."""

from __future__ import annotations

from typing import ClassVar

from ntkbench.methods.base.projected import HashedRows


class GraSS(HashedRows):
    """Phi = J M S, where M keeps some random parameters, rescaled, and S is the projection of ``sparse_jl``.

    Each of the ``nonzeros`` blocks of k / ``nonzeros`` features has its own mask, of ``kept`` parameters per feature:
    O passes for each parameter set as for all projections, and only n k ``kept`` additions in place of n P
    ``nonzeros``. Unbiased. The mask adds variance, which is large if few parameters have most of the gradient: use this
    method for many rows of J whose projection takes longer than the passes, and ``sparse_jl`` otherwise. The published
    method may also train a mask, which would be biased.

    Attributes:
        nonzeros: number of blocks; more than in ``sparse_jl``, as masks make blocks differ more.
        kept: parameters that are kept for each feature.
    """

    title = "masked sparse projection (GraSS)"
    source = "Hu et al. 2025 (GraSS, arXiv 2505.18976), SJLT after a random mask"
    use_when = "J has so many rows that their projection takes longer than the passes"
    variance = "that of ``sparse_jl`` and of the mask, which is large if few parameters have most of the gradient"
    kept: ClassVar[int] = 8
    nonzeros: ClassVar[int] = 16
    fewest_probes = nonzeros
