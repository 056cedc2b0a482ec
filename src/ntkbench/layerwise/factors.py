"""Per-sample gradients of a layer in factored form.

The gradient of output o of sample b with respect to a layer's weights is a sum over the positions s at which the layer
is applied (pixels, time steps, calls): sum_s g_bos ⊗ a_bs, with a the layer's inputs and g the cotangents of its
outputs. The classes here hold the factors of such sums, for K output directions instead of the O outputs.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from ntkbench.layerwise.computed import Gram


@final
@dataclass(frozen=True)
class Products:
    """Gradients sum_s g_s ⊗ a_s of a linear map, in ``groups`` that share no weights.

    Attributes:
        a: inputs ``[N, groups, D, S]``.
        g: cotangents ``[N, K, groups, C, S]``.
    """

    a: Tensor
    g: Tensor

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """N, K, groups, C, D, S."""
        N, K, groups, C, S = self.g.shape
        return N, K, groups, C, self.a.shape[2], S

    def folded(self) -> Products:
        """The K directions as channels of one direction, so that a contraction sums over them."""
        return Products(self.a, self.g.permute(0, 2, 1, 3, 4).flatten(2, 3)[:, None])

    def samples(self, chosen: slice) -> Products:
        """The factors of a slice of samples."""
        return Products(self.a[chosen], self.g[chosen])

    def positions(self, chosen: slice) -> Products:
        """The terms of a slice of positions."""
        return Products(self.a[..., chosen], self.g[..., chosen])

    def gradient(self, c: Tensor) -> Tensor:
        """sum_(b, k) c_bk (gradient of direction k of sample b), ``[groups, C, D]``, for ``c [N, K]``."""
        mixed = (c[:, None] @ self.g.flatten(2)).view(len(c), *self.g.shape[2:])
        return torch.einsum("ngcs,ngds->gcd", mixed, self.a)

    def explicit(self, groups: slice, channels: slice) -> Tensor:
        """Explicit gradients of the weights of some groups and channels, ``[N, K, groups * channels * D]``."""
        g, a = self.g[:, :, groups, channels], self.a[:, groups]
        if g.shape[-1] == 1:
            rows = g * a[:, None, :, None, :, 0]
        else:
            rows = (g.movedim(2, 1).flatten(2, 3) @ a.mT).unflatten(2, (g.shape[1], -1)).movedim(1, 2)
        return rows.flatten(2)


@final
@dataclass(frozen=True)
class Lookups:
    """Gradients of an embedding table: a_s is the unit vector of the row that position s looks up.

    Attributes:
        rows: row indices ``[N, S]``; -1 for padding.
        g: cotangents ``[N, K, C, S]``.
    """

    rows: Tensor
    g: Tensor

    def gradient(self, c: Tensor, count: int) -> Tensor:
        """See :meth:`Products.gradient`; ``[count, C]`` for a table of ``count`` rows."""
        mixed = (c[:, None] @ self.g.flatten(2)).view(len(c), *self.g.shape[2:]).mT.flatten(0, 1)
        rows = self.rows.reshape(-1)
        return mixed.new_zeros(count, mixed.shape[1]).index_add_(0, rows.clamp(min=0), mixed * (rows >= 0)[:, None])

    def distinct(self) -> Lookups:
        """The same gradients with each row at one position of a sample at most: cotangents of a row are added up."""
        rows, order = self.rows.sort(1)
        new = torch.ones_like(rows, dtype=torch.bool)
        new[:, 1:] = rows[:, 1:] != rows[:, :-1]
        if new.all():
            return self
        place = new.cumsum(1) - 1
        count = int(place.max()) + 1
        made = rows.new_full((len(rows), count), -1).scatter_(1, place, rows)
        places = torch.empty_like(place).scatter_(1, order, place)
        g = self.g.new_zeros(*self.g.shape[:-1], count)
        return Lookups(made, g.scatter_add_(-1, places[:, None, None].expand_as(self.g), self.g))

    def folded(self) -> Lookups:
        """See :meth:`Products.folded`."""
        return Lookups(self.rows, self.g.flatten(1, 2)[:, None])

    def samples(self, chosen: slice) -> Lookups:
        """The factors of a slice of samples."""
        return Lookups(self.rows[chosen], self.g[chosen])

    def positions(self, chosen: slice) -> Lookups:
        """The terms of a slice of positions."""
        return Lookups(self.rows[..., chosen], self.g[..., chosen])


@dataclass(frozen=True)
class Rows:
    """Explicit gradients.

    Attributes:
        rows: ``[N, K, size]``.
    """

    rows: Tensor

    def gradient(self, c: Tensor) -> Tensor:
        """See :meth:`Products.gradient`; ``[size]``."""
        return torch.einsum("nk,nkp->p", c, self.rows)

    def folded(self) -> Rows:
        """See :meth:`Products.folded`."""
        return Rows(self.rows.flatten(1)[:, None])

    def samples(self, chosen: slice) -> Rows:
        """The factors of a slice of samples."""
        return Rows(self.rows[chosen])


@final
@dataclass(frozen=True)
class Tied:
    """Gradients of a matrix W that is used both directly and transposed, such as an embedding that is also the readout.

    They are sum_s g_s ⊗ a_s + (sum_t h_t ⊗ b_t)^T, where a and h have the same size, and so do g and b.

    Attributes:
        one: factors of the first sum, in one group.
        other: factors of the second sum before it is transposed, in one group.
        summed: whether contractions sum over the K directions.
    """

    one: Products | Lookups
    other: Products
    summed: bool = False

    @property
    def sizes(self) -> tuple[int, int, int, int, int, int]:
        """N, K, C, D, S, T: g and b have C entries, a and h have D."""
        N, K, _, D, C, T = self.other.sizes
        return N, K, C, D, self.one.g.shape[-1], T

    def folded(self) -> Tied:
        """See :meth:`Products.folded`."""
        return dataclasses.replace(self, summed=True)

    def parts(self) -> tuple[Products | Lookups, Products]:
        """The two sums separately, folded if ``summed``."""
        return (self.one.folded(), self.other.folded()) if self.summed else (self.one, self.other)

    def samples(self, chosen: slice) -> Tied:
        """The factors of a slice of samples."""
        return dataclasses.replace(self, one=self.one.samples(chosen), other=self.other.samples(chosen))

    def gradient(self, c: Tensor) -> Tensor:
        """See :meth:`Products.gradient`; ``[1, C, D]``, or for a table ``[D, C]``."""
        other = self.other.gradient(c)
        if isinstance(self.one, Lookups):
            return self.one.gradient(c, other.shape[1]) + other[0]
        return self.one.gradient(c) + other.mT

    def explicit(self, channels: slice) -> Tensor:
        """Explicit gradients of some of the C channels, ``[N, K, channels * D]``.

        If ``summed`` they are ``[N, 1, K * channels * D]``.
        """
        every = slice(None)
        other = Products(self.other.a[:, :, channels], self.other.g).explicit(every, every)
        rows = other.unflatten(2, (self.sizes[3], -1)).mT.contiguous()  # [N, K, channels, D]
        if isinstance(self.one, Lookups):
            looked_up = self.one.rows[:, None, None].long()
            g = self.one.g[:, :, channels] * (looked_up >= 0)
            rows.scatter_add_(-1, looked_up.clamp(min=0).expand_as(g), g)
        else:
            rows += self.one.explicit(every, channels).view_as(rows)
        return rows.flatten(1)[:, None] if self.summed else rows.flatten(2)


@final
@dataclass(frozen=True)
class Weighted:
    """Gradients G of a linear map whose weight is computed from parameters, with inner products <G, M G'>.

    M is a multiple c of the identity plus a few directions in each block of entries (see ``computed.py``).

    Attributes:
        own: G.
        c: c of each row ``[groups, C, 1]`` or of each column ``[groups, 1, D]``.
        rows: inner products of G with the directions ``[N, K, size]``.
        b: factors of the directions ``[size]``.
        gram: M.
    """

    own: Products
    c: Tensor
    rows: Tensor
    b: Tensor
    gram: Gram

    @property
    def scaled(self) -> Products:
        """sqrt(c) G."""
        root = self.c.sqrt()
        if root.shape[2] > 1:
            return Products(self.own.a * root.mT, self.own.g)
        return Products(self.own.a, self.own.g * root)

    def folded(self) -> Weighted:
        """See :meth:`Products.folded`."""
        K = self.rows.shape[1]
        c = self.c if self.c.shape[2] > 1 else self.c.repeat(1, K, 1)
        return Weighted(self.own.folded(), c, self.rows.flatten(1)[:, None], self.b.repeat(K), self.gram)

    def samples(self, chosen: slice) -> Weighted:
        """The factors of a slice of samples."""
        return dataclasses.replace(self, own=self.own.samples(chosen), rows=self.rows[chosen])

    def gradient(self, c: Tensor) -> Tensor:
        """See :meth:`Products.gradient`; with respect to the weight itself."""
        return self.own.gradient(c)


GradientFactors = Products | Lookups | Tied | Rows | Weighted


def concatenate(uses: list[Products | Lookups]) -> Products | Lookups:
    """Merge several uses of the same weights into one with the positions of all, since their gradients add up."""
    if len(uses) == 1:
        return uses[0]
    # Positions are the last axis of all factors.
    return type(uses[0])(*(torch.cat(each, -1) for each in zip(*(vars(u).values() for u in uses), strict=True)))


def with_ones(products: Products) -> Products:
    """Append an input that is always one, whose weight is the bias."""
    ones = products.a.new_ones(()).expand(*products.a.shape[:2], 1, products.a.shape[3])
    return Products(torch.cat([products.a, ones], 2), products.g)
