"""The Jacobian as a linear operator that counts the passes it spends."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Self

import array_api_compat
import numpy as np

from ntkbench import errors, progress_bar
from ntkbench.errors import BadInput
from ntkbench.operators import arrays, certificate
from ntkbench.operators.arrays import Array
from ntkbench.operators.certificate import Reference, Uncertified


@dataclass(frozen=True)
class ChunkBytes:
    """Bytes per chunk of the products that are computed in chunks to stay in a processor's cache.

    Chunks change speed and rounding only. They are never larger than the operator's ``memory``.

    Attributes:
        sample_squares: gradients per chunk in :meth:`JacobianOperator.sample_squares`.
        gates: gates of a recurrent layer per chunk of probes, in products over the whole batch on the CPU.
        gates_by_trial: the same in separate products of each trial, which hold several arrays of that size.
    """

    sample_squares: int = 2**25
    gates: int = 2**24
    gates_by_trial: int = 2**21


NOTHING = 0.01
"""Largest share of its typical size at which an inner product shows nothing: any multiple of it would agree."""


class JacobianOperator(ABC):
    """J = df/dtheta at one set of weights, an n x P matrix that is never formed.

    Rows are sample-major, output-minor: row ``b * O + o`` is output ``o`` of sample ``b``. Probes are rows: k vectors
    of length n are an array ``[k, n]``. Cost is counted in passes. One pass is one JVP or one VJP over the whole batch
    of N samples; a VJP of a single sample is 1/N of a pass.

    Each kind of product is certified when it is first used: it is compared with plain automatic differentiation of the
    unmodified network over the whole batch (see :mod:`ntkbench.operators.certificate`). If a kind differs by more than
    rounding, or raises, the backend's next method computes it, and ``notes`` say why. Certificates are not counted as
    passes. They take one plain backward pass for each kind and set of weights, and two more products if the products
    themselves do not cover the whole batch, such as products with unit vectors or by sample. If the first comparison
    shows nothing, as for vectors that are mapped to zero or to rounding, a random vector is compared as well: two more
    products, and for VJPs another backward pass. Where a budget depends on the cost of JVPs, settling that cost takes
    two more as well.

    All products refuse vectors of other shapes with ``BadInput``, including other orders of the axes.

    Attributes:
        N: samples.
        O: outputs per sample.
        P: parameters.
        memory: bytes that one block of probes may use; larger inputs are split into blocks.
        itemsize: bytes of one number.
        chunk_bytes: sizes of cache-friendly chunks within a block.
        reference: what products are compared with; ``None`` if there is no network, or nothing is checked.
    """

    COMPUTED: tuple[str, ...] = ()
    """Names of the cached properties that hold results of the forward pass."""

    N: int
    O: int  # noqa: E741 - the field's symbol
    P: int
    memory: int
    itemsize: int
    chunk_bytes: ChunkBytes = ChunkBytes()
    reference: Reference | None = None
    _spent: float = 0

    @property
    def n(self) -> int:
        """Outputs of the whole batch, N O."""
        return self.N * self.O

    @property
    def passes(self) -> float:
        """Passes spent so far."""
        return self._sample_passes / self.N

    @property
    def _sample_passes(self) -> float:
        """Passes spent so far, each counted once per sample."""
        return self._spent

    @_sample_passes.setter
    def _sample_passes(self, spent: float) -> None:
        progress_bar.advance(spent - self._spent)
        self._spent = spent

    @property
    def epsilon(self) -> float:
        """Machine epsilon of products."""
        return float(np.finfo(f"f{self.itemsize}").eps)

    @property
    def names(self) -> list[str]:
        """Names of the parameters, in the order of their entries; empty if they have none."""
        return []

    @property
    def notes(self) -> tuple[str, ...]:
        """Remarks for the user on how products are computed and certified, such as a JVP of two passes."""
        note = self.reference.note if self.reference else ""
        return (*self._remarks, note) if note else self._remarks

    @property
    def _remarks(self) -> tuple[str, ...]:
        """Remarks of the backend on how products are computed."""
        return ()

    @property
    def certificate(self) -> float | None:
        """The largest relative difference from plain autograd over all certified products; ``None`` without any."""
        found = self.reference.differences if self.reference else {}
        return max(found.values(), default=None)

    def vjp(self, u: Array) -> Array:
        """J^T u for each row of ``u``: ``[k, n] -> [k, P]``; k passes."""

        def difference(found: Array, reference: Reference) -> float:
            mix = certificate.random_weights(len(u), u)
            v, image, expected = mix @ u, mix @ found, None
            if not bool((v == 0).any()):  # as for unit vectors, which cover only some outputs
                expected = reference.fixed_gradient(v)
                off = certificate.distance(image, expected)
                if off <= certificate.tolerance(arrays.epsilon(u)) and certificate.norm(expected):  # zeros show nothing
                    return off
            size, w, g = self._uncancelled(v, reference)
            off = certificate.distance(self._vjp(_halves(w)).sum(0), g)
            return off if expected is None else max(off, certificate.distance(image, expected, size))

        _check_shape(u, self.n)
        return self._certified("vjp", lambda: self._in_blocks(self._vjp, u, self.N), difference, len(u))

    def jvp(self, w: Array) -> Array:
        """J w for each row of ``w``: ``[k, P] -> [k, n]``; k passes, or 2k without forward mode."""

        def difference(found: Array, reference: Reference) -> float:
            mix = certificate.random_weights(len(w), w)
            tangent = mix @ w
            off = self._adjoint_difference(tangent, mix @ found, reference)
            _, g = reference.cotangent(tangent, self.n)
            if abs(float(g @ tangent)) > NOTHING * self._typical(g, tangent):
                return off
            tangent = certificate.random_weights(self.P, w)
            return max(off, self._adjoint_difference(tangent, self._jvp(_halves(tangent)).sum(0), reference))

        _check_shape(w, self.P)
        return self._certified("jvp", lambda: self._in_blocks(self._jvp, w, self.N), difference, len(w))

    def ntk(self, u: Array) -> Array:
        """Theta u = J J^T u for each row of ``u``: ``[k, n] -> [k, n]``; 2k passes."""
        xp = array_api_compat.array_namespace(u)
        blocks = [self.jvp(self.vjp(block)) for block in self._split(u)]
        return blocks[0] if len(blocks) == 1 else xp.concat(blocks)

    def row(self, i: int) -> Array:
        """Row i of J by one backward pass, ``[P]``; 1 pass."""

        def product() -> Array:
            self._sample_passes += self.N
            return self._row(i)

        def difference(found: Array, reference: Reference) -> float:
            off = certificate.distance(found, reference.gradient(self.basis(i, i + 1)[0]))
            v, gradient = reference.cotangent(found, self.n)  # one row says little about the others
            if self._is_plain("row"):
                certificate.check_size(reference, v, gradient)
                return off
            return max(off, certificate.distance(self._vjp(_halves(v)).sum(0), gradient))

        return self._certified("row", product, difference)

    def sample_vjp(self, samples: slice, v: Array) -> Array:
        """Per-sample gradients J_b^T v_b: ``v [k, samples, O] -> [k, samples, P]``.

        Valid only if samples do not interact. Costs k * (number of samples) / N passes.
        """
        _check_shape(v, samples.stop - samples.start, self.O)
        k, count = v.shape[:2]
        found = self._certified_sample_vjp(v) if count == self.N else None
        if found is None:
            self._certify_sample_vjp()
            found = self._sample_vjp(samples, v)
        self._sample_passes += k * count
        return found

    def group_gradients(self, groups: Sequence[slice], v: Array) -> Array:
        """sum_(b in group) J_b^T v_b for each group of samples: ``v [k, samples, O] -> [k, groups, P]``.

        The entries of a gradient may be permuted. The permutation is the same for all operators of one network, so that
        inner products between the results are those of the gradients. Valid only if samples do not interact. Costs
        k * (number of samples) / N passes.

        Args:
            groups: consecutive slices of samples.
            v: cotangents of all samples in the groups.
        """
        _check_shape(v, groups[-1].stop - groups[0].start, self.O)
        self._certify_sample_vjp()
        xp = array_api_compat.array_namespace(v)
        self._sample_passes += v.shape[0] * v.shape[1]
        most = max(group.stop - group.start for group in groups)
        size = max(1, self.memory // (self.bytes_per_probe() + most * self._bytes_per_sample_row()))
        blocks = [self._group_gradients(groups, v[start : start + size]) for start in range(0, v.shape[0], size)]
        return blocks[0] if len(blocks) == 1 else xp.concat(blocks)

    def sample_jvp(self, samples: slice, w: Array) -> Array:
        """Per-sample J_b w_b, each sample with its own tangent: ``w [k, samples, P] -> [k, samples, O]``.

        Valid only if samples do not interact. Costs k * (number of samples) / N passes, twice that without forward
        mode.
        """
        _check_shape(w, samples.stop - samples.start, self.P)
        self._certify_sample_jvp()
        self._sample_passes += w.shape[0] * w.shape[1]
        return self._sample_jvp(samples, w)

    def sample_squares(self, v: Array) -> Array:
        """Squared norms of per-sample gradients, ||J_b^T v_b||^2: ``v [k, N, O] -> [k, N]``; k passes.

        Gradients are reduced in chunks of ``chunk_bytes.sample_squares`` and never held all at once. Valid only if
        samples do not interact.
        """
        _check_shape(v, self.N, self.O)
        self._certify_sample_vjp()
        xp = array_api_compat.array_namespace(v)
        self._sample_passes += v.shape[0] * v.shape[1]
        budget = min(self.memory, self.chunk_bytes.sample_squares)
        samples = min(self.N, max(1, budget // self._bytes_per_square()))
        probes = max(1, budget // (samples * self._bytes_per_square()))
        chunks = [slice(start, min(start + samples, self.N)) for start in range(0, self.N, samples)]
        rows = [
            xp.concat([self._sample_squares(chunk, v[k : k + probes, chunk]) for chunk in chunks], axis=1)
            for k in range(0, v.shape[0], probes)
        ]
        return rows[0] if len(rows) == 1 else xp.concat(rows)

    def sample_rows(self, samples: slice, outputs: slice) -> Array:
        """Rows of J for a rectangle of samples and outputs, ``[outputs * samples, P]``, samples varying fastest.

        Valid only if samples do not interact. Costs (number of outputs) * (number of samples) / N passes.
        """
        count = samples.stop - samples.start
        units = self._eye(self.O, outputs.start, outputs.stop)[:, None, :]
        xp = array_api_compat.array_namespace(units)
        rows = self.sample_vjp(samples, xp.broadcast_to(units, (units.shape[0], count, self.O)))
        return rows.reshape(-1, self.P)

    def rectangles(self, held: float = 1.0) -> Iterator[tuple[slice, slice]]:
        """Partition the rows of J into rectangles for :meth:`sample_rows`, each within ``held`` of the memory budget.

        The partition depends only on sizes, so that two operators of one problem give matching blocks.

        Args:
            held: fraction of ``memory``. A rectangle has at least one row, whatever its size.
        """
        rows = max(1, int(held * self.memory / self._bytes_per_sample_row()))
        samples = min(self.N, max(1, rows // self.O))
        outputs = min(self.O, rows)
        for start in range(0, self.N, samples):
            for first in range(0, self.O, outputs):
                yield slice(start, min(start + samples, self.N)), slice(first, min(first + outputs, self.O))

    def row_numbers(self, samples: slice, outputs: slice) -> np.ndarray:
        """Indices in J of the rows that :meth:`sample_rows` returns, ``[outputs * samples]``."""
        first, second = np.mgrid[outputs, samples]
        return (second * self.O + first).reshape(-1)

    def basis(self, start: int, stop: int) -> Array:
        """Unit vectors ``start`` to ``stop - 1`` of output space, ``[stop - start, n]``."""
        return self._eye(self.n, start, stop)

    def parameter_basis(self, start: int, stop: int) -> Array:
        """Unit vectors ``start`` to ``stop - 1`` of parameter space, ``[stop - start, P]``."""
        return self._eye(self.P, start, stop)

    def passes_per_jvp(self, by_sample: bool = False) -> int:
        """Passes of a JVP: 1, or 2 for a network without forward mode.

        The first call determines this from products that are compared with the reference and not counted.

        Args:
            by_sample: whether to return the passes of :meth:`sample_jvp`.
        """
        return 1

    def _settle(self, kind: str) -> None:
        """Find the backend's first method that works for JVPs, before a budget depends on their cost."""
        if self.reference is None or kind in self.reference.settled:
            return
        if kind == "sample_jvp":
            self._certify_sample_jvp()
        elif kind not in self.reference.differences:
            spent = self._sample_passes
            self.jvp(_halves(certificate.random_weights(self.P, self.basis(0, 1))))
            self._sample_passes = spent
            del self.reference.differences[kind]  # the requested products are compared as well
        self.reference.settled.add(kind)

    def _certified(
        self,
        kind: str,
        product: Callable[[], Array],
        difference: Callable[[Array, Reference], float],
        probes: int = 2,
    ) -> Array:
        """A product by the backend's first method that agrees with the reference, compared at the first use.

        Batched rules may be right for one probe and wrong for several, so both are certified separately.

        Raises:
            Uncertified: no method agrees; the message gives the reason for each.
            NoSecondPass: plain autograd allows only one backward pass.
        """
        checked = kind if probes > 1 else f"{kind} of one probe"
        if self.reference is None or checked in self.reference.differences:
            return product()
        reasons = []
        while True:
            spent = self._sample_passes
            try:
                found = product()
                off = difference(found, self.reference)
                if self._is_plain(kind):
                    certificate.check_plain(off, self.reference, self.basis(0, 1), self.n)
                else:
                    certificate.check(off, arrays.epsilon(found))
            except Exception as error:  # a method may fail on a network in any way
                self._sample_passes = spent
                if isinstance(error, errors.NoSecondPass):  # so does plain autograd
                    raise
                reasons.append(errors.reason(error))
                if not self._next_way(kind, reasons[-1]):
                    raise Uncertified(f"{kind} products: {'; '.join(dict.fromkeys(reasons))}") from error
                for other in (kind, f"{kind} of one probe"):  # certified by the abandoned method
                    self.reference.differences.pop(other, None)
            else:
                self.reference.differences[checked] = off
                return found

    def _is_plain(self, kind: str) -> bool:
        """Whether a product comes from plain autograd; see :func:`ntkbench.operators.certificate.check_plain`."""
        return False

    def _next_way(self, kind: str, reason: str) -> bool:
        """Use the next method for a kind of product from now on; returns whether there is one."""
        return False

    def _adjoint_difference(self, w: Array, image: Array, reference: Reference) -> float:
        """|<v, J w> - <J^T v, w>| relative to the size of either for a fixed random v."""

        def off(v: Array, g: Array, size: float = 0.0) -> float:
            found, expected = float(v @ image), float(g @ w)
            size = max(size * certificate.norm(w) / self.P**0.5, self._typical(g, w))
            return certificate.ratio(abs(found - expected), max(size, abs(expected)))

        v, g = reference.cotangent(image, self.n)
        if (first := off(v, g)) <= certificate.tolerance(arrays.epsilon(image)) and certificate.norm(g):
            return first
        size, *other = self._uncancelled(v, reference)
        return max(off(*other), off(v, g, size))

    def _typical(self, g: Array, w: Array) -> float:
        """The size of <g, w> for vectors of these lengths with random directions."""
        return certificate.norm(g) * certificate.norm(w) / self.P**0.5

    def _uncancelled(self, v: Array, reference: Reference) -> tuple[float, Array, Array]:
        """The size of J^T v for a typical v of this length, and a random w with J^T w, from which it follows.

        J^T v is zero or only rounding if v is orthogonal to the range of J, as many vectors of a Krylov space are. A
        product that is wrong by a factor would then agree, so the product of w is compared as well.
        """
        w = certificate.random_weights(self.n, v)
        g = reference.fixed_gradient(w)
        return certificate.ratio(certificate.norm(g) * certificate.norm(v), certificate.norm(w)), w, g

    def _certified_sample_vjp(self, v: Array) -> Array | None:
        """Gradients of all samples ``[k, N, P]``, compared directly; ``None`` if that comparison is too weak.

        A random combination of them is compared with one gradient over the whole batch, unless its cotangent has zeros.
        """
        if self.reference is None or "sample_vjp" in self.reference.differences:
            return None
        k = len(v)
        mix = certificate.random_weights(k * self.N, v).reshape(k, self.N, 1)
        combined = (mix * v).sum(0).reshape(-1)
        if bool((combined == 0).any()):
            return None

        def difference(found: Array, reference: Reference) -> float:
            image = mix.reshape(-1) @ found.reshape(k * self.N, -1)
            return certificate.distance(image, reference.fixed_gradient(combined, self.memory))

        spent = self._sample_passes
        found = self._certified("sample_vjp", lambda: self._sample_vjp(slice(0, self.N), v), difference, k)
        self._sample_passes = spent
        return found

    def _certify_sample_vjp(self) -> None:
        """Compare the sum of all samples' gradients with the gradient over the whole batch."""

        def product() -> Array:
            assert self.reference is not None  # _certified_alone asks for it
            v = self.reference.cotangent(self.basis(0, 1), self.n, self.memory)[0]
            v = _halves(v).reshape(2, self.N, self.O)
            memory = min(self.memory - self.bytes_of_certificates(), self.chunk_bytes.sample_squares)
            size = max(1, memory // (2 * self._bytes_per_sample_row()))
            parts = (slice(start, min(start + size, self.N)) for start in range(0, self.N, size))
            return sum(self._sample_vjp(part, v[:, part]).sum((0, 1)) for part in parts)

        def difference(found: Array, reference: Reference) -> float:
            return certificate.distance(found, reference.cotangent(found, self.n, self.memory)[1])

        self._certified_alone("sample_vjp", product, difference)

    def _certify_sample_jvp(self) -> None:
        """Compare the products of all samples with one tangent with the gradient over the whole batch."""

        def product() -> Array:
            w = _halves(certificate.random_weights(self.P, self.basis(0, 1)))
            xp = array_api_compat.array_namespace(w)
            tangents = xp.broadcast_to(w[:, None], (2, self.N, self.P))
            return self._sample_jvp(slice(0, self.N), tangents).sum(0).reshape(-1)

        def difference(found: Array, reference: Reference) -> float:
            return self._adjoint_difference(certificate.random_weights(self.P, found), found, reference)

        self._certified_alone("sample_jvp", product, difference)

    def _certified_alone(
        self, kind: str, product: Callable[[], Array], difference: Callable[[Array, Reference], float]
    ) -> None:
        if self.reference is not None and kind not in self.reference.differences:
            spent = self._sample_passes
            self._certified(kind, product, difference)
            self._sample_passes = spent

    def fresh(self) -> Self:
        """A copy on the same device arrays, without the results of the forward pass and with the counter at zero."""
        twin = copy.copy(self)
        twin._spent = 0
        for name in self.COMPUTED:
            twin.__dict__.pop(name, None)
        return twin

    def blocks(self, probes: int) -> list[int]:
        """Sizes of blocks that add up to ``probes``; each fits in the memory budget, or is a single probe."""
        count = -(-probes // max(1, self.memory // self.bytes_per_probe()))
        return [probes // count + (i < probes % count) for i in range(count)]

    @abstractmethod
    def rng(self, seed: int) -> Rng:
        """A generator of probes on this operator's device; equal seeds give equal streams."""

    @abstractmethod
    def bytes_per_probe(self) -> int:
        """Bytes held for one probe during a product: activations, cotangents and gradients."""

    def _bytes_per_sample_row(self) -> int:
        """Bytes held to compute one row of J: its sample's share of the activations, and its gradient."""
        return self.bytes_per_probe() // self.N + 2 * self.P * self.itemsize

    def _bytes_per_square(self) -> int:
        """Bytes held to compute the squared norm of one sample's gradient."""
        return self._bytes_per_sample_row()

    def bytes_of_certificates(self) -> int:
        """Generous estimate of the bytes of parameters and gradients that certificates hold besides products."""
        return 8 * self.P * self.itemsize

    def _split(self, rows: Array) -> Iterator[Array]:
        start = 0
        for size in self.blocks(rows.shape[0]):
            yield rows[start : start + size]
            start += size

    def _in_blocks(self, product: Callable[[Array], Array], rows: Array, cost: int) -> Array:
        xp = array_api_compat.array_namespace(rows)
        blocks = []
        for block in self._split(rows):
            blocks.append(product(block))
            self._sample_passes += cost * block.shape[0]
        return blocks[0] if len(blocks) == 1 else xp.concat(blocks)

    @abstractmethod
    def _vjp(self, u: Array) -> Array: ...

    @abstractmethod
    def _jvp(self, w: Array) -> Array: ...

    @abstractmethod
    def _row(self, i: int) -> Array: ...

    @abstractmethod
    def _sample_vjp(self, samples: slice, v: Array) -> Array: ...

    @abstractmethod
    def _sample_jvp(self, samples: slice, w: Array) -> Array: ...

    def _group_gradients(self, groups: Sequence[slice], v: Array) -> Array:
        xp, first = array_api_compat.array_namespace(v), groups[0].start
        own = (v[:, group.start - first : group.stop - first] for group in groups)
        return xp.stack([self._sample_vjp(*each).sum(1) for each in zip(groups, own, strict=True)], axis=1)

    def _sample_squares(self, samples: slice, v: Array) -> Array:
        return (self._sample_vjp(samples, v) ** 2).sum(-1)

    @abstractmethod
    def _eye(self, size: int, start: int, stop: int) -> Array:
        """Rows ``start`` to ``stop - 1`` of the identity matrix of order ``size``."""


def _check_shape(vectors: Array, *shape: int) -> None:
    """Refuse vectors other than ``[k, *shape]``: products reshape them, and would accept other orders of the axes."""
    if tuple(vectors.shape[1:]) != shape:
        allowed, given = ", ".join(map(str, ("k", *shape))), tuple(vectors.shape)
        raise BadInput(f"vectors of a product must be [{allowed}], one for each probe, got shape {given}")


def _halves(signs: Array) -> Array:
    """Two different probes ``[2, size]`` that add up to ``signs``."""
    xp = array_api_compat.array_namespace(signs)
    some = (certificate.random_signs(signs.shape[0], signs, seed=1) + 1) / 2
    return xp.stack([signs * some, signs * (1 - some)])


class Rng(ABC):
    """A seeded stream of random probes, ``[k, dim]``, in the operator's precision and on its device."""

    @abstractmethod
    def normal(self, k: int, dim: int) -> Array:
        """Independent standard normal entries."""

    @abstractmethod
    def sign(self, k: int, dim: int) -> Array:
        """Independent entries +1 or -1 with equal probability (Rademacher)."""
