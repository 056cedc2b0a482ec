"""GraSS: a sparse projection of a random subset of the parameters."""

from __future__ import annotations

from typing import ClassVar

from ntkbench.methods.base.projected import HashedRows


class GraSS(HashedRows):
    """Features Phi = J M S: M selects random parameters and rescales them, and S is the projection of ``sparse_jl``.

    Each of the ``nonzeros`` blocks of k / ``nonzeros`` features has its own mask, which keeps ``kept`` parameters per
    feature. As for all projections of rows, this takes O passes for each set of weights, but only n k ``kept``
    additions instead of n P ``nonzeros``. Unbiased. The mask adds variance, which is large if a few parameters have
    most of the gradient. Use this method if J has so many rows that their projection takes longer than the passes, and
    ``sparse_jl`` otherwise. The published method may also train the mask, which causes a bias.

    Attributes:
        nonzeros: number of blocks; more than in ``sparse_jl``, as masks make blocks differ more.
        kept: number of parameters kept per feature.
    """

    title = "masked sparse projection (GraSS)"
    source = "Hu et al. 2025 (GraSS, arXiv 2505.18976), SJLT after a random mask"
    use_when = "J has so many rows that their projection takes longer than the passes"
    variance = "that of ``sparse_jl`` and of the mask, which is large if few parameters have most of the gradient"
    kept: ClassVar[int] = 8
    nonzeros: ClassVar[int] = 16
    fewest_probes = nonzeros
