"""Sizes and costs that determine how kernels are computed, but not their values."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Tuning:
    """Sizes and costs that choose blocks and orders of summation. They change results by rounding only.

    Attributes:
        triangle_blocks: largest number of row blocks into which a symmetric kernel is split. Only blocks on and below
            the diagonal are computed: 9/16 of all for 8 row blocks.
        block_rows: smallest number of rows of such a block; smaller matrix products lose more than the triangle saves.
        columns: number of columns of a product of carried cotangents, if memory allows; with fewer it is limited by
            memory traffic, and more do not stay in the cache.
        cache_bytes: bytes of intermediate results that a processor's cache holds.
        entry_cost: cost of moving one entry through memory, in multiplications of a matrix product.
        group_cost: overhead of one group of a grouped layer, in the same unit.
        tile: rows and columns of the tiles in which a triangle is mirrored.
        certified: whether kernels are certified; ``False`` only where operations are counted without being run.
    """

    triangle_blocks: int = 8
    block_rows: int = 96
    columns: int = 16
    cache_bytes: int = 2**22
    entry_cost: float = 8
    group_cost: float = 1e5
    tile: int = 256
    certified: bool = True

    @staticmethod
    def on(device: torch.device) -> Tuning:
        """The defaults for a device.

        On a GPU arithmetic is cheaper relative to memory (an H100 does 40 float32 multiplications in the time in which
        one entry moves), launches are more expensive, and the cache is larger.
        """
        if device.type == "cuda":
            return Tuning(block_rows=1024, columns=256, cache_bytes=2**25, entry_cost=40, group_cost=1e9, tile=4096)
        return Tuning()
