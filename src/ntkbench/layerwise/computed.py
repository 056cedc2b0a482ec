"""Weights computed from parameters alone: by weight normalisation, weight standardisation or spectral normalisation.

Let w = phi(theta_l), with Jacobian J_phi, enter operations that have a rule, and let G be a gradient with respect
to w in factored form. The gradient with respect to theta_l is J_phi^T G, and inner products of such gradients are
<G, M G'> with M = J_phi J_phi^T.

Normalisations act on blocks of entries: output channels, input channels or the whole weight. In each block M is a
multiple of the identity except in a few directions, M = c I + Q^T diag(b) Q. For weight normalisation of rows, for
example, w = g v / |v| has c = (g / |v|)^2 and the one direction q = v / |v| with b = 1 - c. The part of the kernel is
then that of a plain weight with its cotangents or inputs times sqrt(c), plus inner products of the few numbers Q G,
weighted by b.

c, b and Q are found from products with M in float64, for any phi. One more product tests that M has this form: at
perturbed parameters when a network is traced, and whenever the form is used.
"""

from __future__ import annotations

import contextlib
import functools
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from ntkbench.layerwise.trace import SampleGraph, upstream
from ntkbench.operators import certificate
from ntkbench.operators.certificate import Uncertified

RANK = 2
"""Largest number of directions of a block in which M may differ from a multiple of the identity."""

EXACT = 1e-9
"""Largest relative difference from M, in float64, for which the form counts as exact."""

PERIOD = 4099
"""Period of the random numbers of a test vector; a prime, unlike sizes of blocks."""

NUDGE = 0.5
"""Noise of perturbed parameters, relative to each parameter's root mean square."""


class Derivative:
    """J_phi at some values of the parameters, in float64, by plain autograd.

    Args:
        graph: the network on one sample.
        node: the weight, in the graph.
        names: the parameters that it is computed from.
        parameters: in the order of ``graph.parameters``.
        constants: in the order of ``graph.constants``.
    """

    def __init__(
        self,
        graph: SampleGraph,
        node: fx.Node,
        names: Sequence[str],
        parameters: Sequence[Tensor],
        constants: Sequence[Tensor],
    ) -> None:
        own = {name: w for name, w in zip(graph.parameters, parameters, strict=True) if name in names}
        leaves = {name: own[name].detach().double().requires_grad_() for name in names}
        used = {each.target for each in upstream(node) if each.op == "get_attr"}
        fixed = {name: _wide(t) for name, t in zip(graph.constants, constants, strict=True) if name in used}
        self._leaves = list(leaves.values())
        with torch.enable_grad():
            self._w = graph.value(node, leaves, fixed)
            self._z = torch.zeros_like(self._w, requires_grad=True)
            self._pulled = self._grad(self._w, self._leaves, self._z, create_graph=True)

    @property
    def shape(self) -> torch.Size:
        """Shape of w."""
        return self._w.shape

    @property
    def device(self) -> torch.device:
        """Device of w."""
        return self._w.device

    def pull(self, z: Tensor) -> list[Tensor]:
        """J_phi^T z for each parameter, for z of the shape of w."""
        return self._grad(self._w, self._leaves, z)

    def product(self, z: Tensor) -> Tensor:
        """M z, for z of the shape of w. J_phi is the derivative of z -> J_phi^T z."""
        (image,) = self._grad(self._pulled, [self._z], self.pull(z))
        return image

    @staticmethod
    def _grad(of: Tensor | list[Tensor], by: list[Tensor], at: Tensor | list[Tensor], **options: bool) -> list[Tensor]:
        options = {"retain_graph": True, "allow_unused": True, "materialize_grads": True} | options
        return list(torch.autograd.grad(of, by, at, **options))


def _wide(t: Tensor) -> Tensor:
    return t.double() if t.is_floating_point() else t


@dataclass(frozen=True)
class Gram:
    """M of a weight at given values of the parameters, in ``B`` blocks and in the parameters' precision.

    Attributes:
        c: the multiple of the identity ``[B]``.
        b: factors of the directions ``[B, r]``.
        q: directions ``[r, entries of w]``, orthonormal in each block.
        pull: z -> J_phi^T z; see :meth:`Derivative.pull`.
    """

    c: Tensor
    b: Tensor
    q: Tensor
    pull: Callable[[Tensor], list[Tensor]]


@dataclass(frozen=True)
class Computed:
    """A weight that is computed from parameters alone, with M in the form of this module's docstring.

    Attributes:
        node: the weight, in the graph of one sample.
        parameters: the parameters that it is computed from.
        axis: axis of the weight along which the blocks lie; ``None`` for one block.
        rank: directions of a block.
        blocks: the block of each row ``[groups, C, 1]`` or of each column ``[groups, 1, D]`` of the weight as its rule
            arranges it.
    """

    node: fx.Node
    parameters: tuple[str, ...]
    axis: int | None
    rank: int
    blocks: Tensor

    def gram(
        self, graph: SampleGraph, parameters: Sequence[Tensor], constants: Sequence[Tensor], *, tested: bool
    ) -> Gram:
        """M at given values of the parameters; 3 ``rank`` + 2 products with M, which involve phi only.

        Args:
            graph: the network on one sample.
            parameters: in the order of ``graph.parameters``.
            constants: in the order of ``graph.constants``.
            tested: whether to test the form against M.

        Raises:
            Uncertified: M has another form.
        """
        make = functools.partial(Derivative, graph, self.node, self.parameters, parameters, constants)
        derivative, dtype = make(), parameters[0].dtype
        found = _gram(derivative, self.axis, self.rank)
        if tested and not _difference(found, derivative, self.axis) <= EXACT:
            raise Uncertified(
                f"gradients with respect to {', '.join(self.parameters)} have other inner products than when traced"
            )
        # The values that a derivative saves take several times the memory of the weight and are needed once.
        return Gram(found.c.to(dtype), found.b.to(dtype), found.q.to(dtype), lambda z: make().pull(z))


def computed(
    graph: SampleGraph,
    node: fx.Node,
    names: tuple[str, ...],
    entries: Tensor,
    parameters: Sequence[Tensor],
    constants: Sequence[Tensor],
) -> Computed | None:
    """A weight of a graph with the form of its M; ``None`` if M has another form.

    Args:
        graph: the network on one sample.
        node: the weight.
        names: the parameters that it is computed from.
        entries: indices of its entries as its rule arranges them, ``[groups, C, D]``.
        parameters: in the order of ``graph.parameters``; perturbed, because normalised weights often start at special
            values.
        constants: in the order of ``graph.constants``.
    """
    with contextlib.suppress(Exception):  # derivatives of phi in float64 may fail in any way
        numbers = _random()
        values = [
            _perturbed(w, numbers) if name in names else w for name, w in zip(graph.parameters, parameters, strict=True)
        ]
        derivative = Derivative(graph, node, names, values, constants)
        for axis, blocks in _partitions(derivative.shape, entries):
            if not _is_separate(derivative, axis):
                continue
            found = _gram(derivative, axis, RANK)
            if _difference(found, derivative, axis) <= EXACT:
                seen = found.b.abs() > EXACT**0.5 * torch.maximum(found.c.abs().max(), found.b.abs().max())
                return Computed(node, names, axis, int(seen.sum(1).max()), blocks)
    return None


def _random() -> torch.Generator:
    return torch.Generator().manual_seed(0)


def _perturbed(w: Tensor, numbers: torch.Generator) -> Tensor:
    w = w.detach().double()
    size = float(w.square().mean().sqrt()) or 1.0
    return w + NUDGE * size * torch.randn(w.shape, generator=numbers, dtype=w.dtype, device="cpu").to(w.device)


def _partitions(shape: torch.Size, entries: Tensor) -> Iterator[tuple[int | None, Tensor]]:
    """Axes along which blocks are unions of rows, or of columns, of a weight as its rule arranges it."""
    for axis in (*(i for i, size in enumerate(shape) if size > 1), None):
        numbers = 0 * entries if axis is None else entries // math.prod(shape[axis + 1 :]) % shape[axis]
        for blocks in (numbers[:, :, :1], numbers[:, :1]):
            if torch.equal(blocks.expand_as(numbers), numbers):
                yield axis, blocks.contiguous()
                break


def _is_separate(derivative: Derivative, axis: int | None) -> bool:
    """Whether M maps the first of the blocks to itself, at the cost of one product."""
    z = _in_blocks(_test_vector(derivative), axis).clone()
    z[1:] = 0
    image = _in_blocks(derivative.product(_out_of_blocks(z, axis, derivative.shape)), axis)
    return bool(image[1:].norm() <= EXACT * image.norm())


def _in_blocks(t: Tensor, axis: int | None) -> Tensor:
    """A tensor of the shape of a weight as ``[B, size]``."""
    return t.reshape(1, -1) if axis is None else t.movedim(axis, 0).flatten(1)


def _out_of_blocks(t: Tensor, axis: int | None, shape: torch.Size) -> Tensor:
    if axis is None:
        return t.reshape(shape)
    return t.reshape(shape[axis], *shape[:axis], *shape[axis + 1 :]).movedim(0, axis)


def _gram(derivative: Derivative, axis: int | None, rank: int) -> Gram:
    """c, b and Q of M, if M has this form with at most ``rank`` directions in each block.

    Restricted to a random subspace, M has 2 ``rank`` + 1 eigenvalues. A change of rank ``rank`` moves at most ``rank``
    of them away from c, so c is their median. M - c I maps the subspace to the span of the directions.
    """
    shape, where = derivative.shape, derivative.device
    B = 1 if axis is None else shape[axis]
    size = shape.numel() // B

    def product(vectors: Tensor) -> Tensor:  # [q, B, size]
        each = (derivative.product(_out_of_blocks(z, axis, shape)) for z in vectors)
        return torch.stack([_in_blocks(image, axis) for image in each])

    count = 2 * rank + 1
    if size <= count:
        basis = torch.eye(size, dtype=torch.float64, device=where)[:, None].expand(-1, B, -1)
        c, rank = basis.new_zeros(B), size
    else:
        drawn = torch.randn(size, count, generator=_random(), dtype=torch.float64, device="cpu")
        subspace = torch.linalg.qr(drawn).Q.T.to(where)[:, None].expand(-1, B, -1)
        image = product(subspace)
        c = torch.linalg.eigvalsh(_symmetric(_products(subspace, image)))[:, rank].clamp(min=0)
        orthogonal, triangular = torch.linalg.qr((image - c[:, None] * subspace).permute(1, 2, 0))
        basis = (orthogonal @ torch.linalg.svd(triangular).U[..., :rank]).permute(2, 0, 1)
    if not rank:
        return Gram(c, c.new_zeros(B, 0), c.new_zeros(0, B * size), derivative.pull)
    b, turn = torch.linalg.eigh(
        _symmetric(_products(basis, product(basis))) - torch.diag_embed(c[:, None].expand(-1, rank))
    )
    q = torch.einsum("qbs,bqr->rbs", basis, turn)
    return Gram(c, b, torch.stack([_out_of_blocks(each, axis, shape).reshape(-1) for each in q]), derivative.pull)


def _products(one: Tensor, other: Tensor) -> Tensor:
    """Inner products in each block, ``[B, q, q]``, of vectors ``[q, B, size]``."""
    return one.movedim(0, 1) @ other.permute(1, 2, 0)


def _symmetric(matrix: Tensor) -> Tensor:
    return (matrix + matrix.mT) / 2


def _test_vector(derivative: Derivative) -> Tensor:
    """A random z of the shape of w."""
    shape = derivative.shape
    numbers = torch.randn(PERIOD, generator=_random().manual_seed(1), dtype=torch.float64, device="cpu")
    return numbers.to(derivative.device).repeat(-(-shape.numel() // PERIOD))[: shape.numel()].view(shape)


def _difference(gram: Gram, derivative: Derivative, axis: int | None) -> float:
    """The relative difference between M z and its form, for a random z."""
    z = _test_vector(derivative)
    expected, own = _in_blocks(derivative.product(z), axis), _in_blocks(z, axis)
    found = gram.c[:, None] * own
    for b, q in zip(gram.b.unbind(1), gram.q, strict=True):
        direction = _in_blocks(q.view(derivative.shape), axis)
        found = found + (b * torch.linalg.vecdot(direction, own))[:, None] * direction
    return certificate.distance(found, expected)
