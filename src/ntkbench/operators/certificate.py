"""Certificates: products with a Jacobian compared with plain automatic differentiation of the unmodified network."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Protocol

import array_api_compat
import numpy as np

from ntkbench.errors import BadInput
from ntkbench.operators import arrays
from ntkbench.operators.arrays import Array


class Uncertified(BadInput):
    """A result is contradicted by plain automatic differentiation of the network, and is therefore not returned."""


def tolerance(epsilon: float) -> float:
    """The largest relative difference that a certificate allows in a precision: the square root of machine epsilon."""
    return math.sqrt(epsilon)


PLAIN = 1 / 32
"""Tolerance for products by plain autograd itself; rounding alone may reach it in a bfloat16 network."""


def check(difference: float, epsilon: float) -> None:
    """Refuse a difference that exceeds rounding.

    Raises:
        Uncertified: it exceeds rounding.
    """
    if not difference <= tolerance(epsilon):
        raise Uncertified(
            f"its gradient differs from that of plain autograd by {difference:.1e} of its norm"
            if math.isfinite(difference)
            else "its gradient is not finite, or its square overflows"
        )


def check_plain(difference: float, reference: Reference, like: Array, n: int) -> None:
    """Refuse products by plain autograd if its backward pass is not a linear function of the cotangent.

    A linear backward pass commutes with linear combinations up to rounding. Multiplying a cotangent by -2 is exact, so
    it must give exactly -2 times the gradient.

    Args:
        difference: relative difference between a combination of products and the gradient of the combination.
        reference: gives the gradients.
        like: an array of the operator.
        n: outputs of the whole batch.

    Raises:
        Uncertified: it is not linear, or a gradient is not finite.
    """
    epsilon = arrays.epsilon(like)
    if difference <= tolerance(epsilon):
        return
    if not math.isfinite(difference):
        check(difference, epsilon)
    v, g = reference.cotangent(like, n)
    if difference > PLAIN or not distance(reference.gradient(-2 * v), -2 * g) <= tolerance(epsilon):
        raise Uncertified(
            "its backward pass is not linear in the cotangent (are gradients clipped or normalised in it?), so a "
            "gradient of combined outputs is not the combination of their gradients"
        )


def check_size(reference: Reference, v: Array, gradient: Array) -> None:
    """Refuse gradients that are rounding errors of zero, as those of a bias before a normalisation; 1 or 2 passes.

    Rounding errors are multiplied by -2 if the cotangent is, which is exact, but not by 3. A backward pass with a rule
    of its own, such as clipping, depends on the scale for both.

    Args:
        reference: gives the gradients.
        v: a random cotangent ``[n]``.
        gradient: its gradient ``[P]``.

    Raises:
        Uncertified: they are.
    """

    def off(factor: int) -> float:
        return distance(reference.gradient(factor * v), factor * gradient)

    if off(3) > PLAIN and off(-2) <= tolerance(arrays.epsilon(v)):
        raise Uncertified("its gradients are zero up to rounding")


def unseen(samples: int) -> str:
    """The note on a comparison with gradients of parts of a batch that could not be compared with the whole batch."""
    return f"{IN_PARTS} of {samples} samples; interactions of more than {samples} samples are not excluded"


IN_PARTS = "compared with plain autograd in parts"


def check_parts(wholes: Sequence[Array], differences: Sequence[float], epsilon: float, samples: int) -> None:
    """Refuse outputs of the whole batch that differ from those of its parts by more than rounding.

    What outputs change with the weights counts: a large constant beside it would hide differences.

    Args:
        wholes: outputs of the whole batch at some weights, and maybe at perturbed ones.
        differences: norms of their differences from outputs of the parts.
        epsilon: machine epsilon of the network.
        samples: number of samples of a part.

    Raises:
        Uncertified: they do.
    """
    change = norm(wholes[-1] - wholes[0]) / NUDGE  # 0 if there are none at perturbed weights
    for whole, difference in zip(wholes, differences, strict=True):
        size = norm(whole)
        if not difference <= tolerance(epsilon) * min(size, change or size) + ROUNDINGS * epsilon * size:
            raise Uncertified(
                f"samples interact: outputs of {samples} samples at a time differ from those of the whole batch by "
                f"{ratio(difference, size):.1e} of their norm"
            )


class PlainGradient(Protocol):
    """The function v ``[n]`` -> J^T v ``[P]`` by plain automatic differentiation.

    Attributes:
        note: what gradients of parts of the batch leave open; empty if nothing.
    """

    @property
    def note(self) -> str: ...

    def __call__(self, v: Any, memory: int | None = None) -> Array:
        """J^T v, an array of any library with the parameters in the operator's order; 1 pass.

        Args:
            v: an array of any library.
            memory: bytes that a pass may take; ``None`` for the whole batch.
        """


class Reference:
    """The gradient of random cotangents over the whole batch, by one plain backward pass each.

    Attributes:
        differences: the relative difference found for each kind of product; shared by all copies of an operator.
        settled: kinds of product whose method, and therefore cost, is known.
        note: see :class:`PlainGradient`; of all gradients so far.

    Args:
        gradient: makes the function; called at the first use.
    """

    def __init__(self, gradient: Callable[[], PlainGradient]) -> None:
        self.differences: dict[str, float] = {}
        self.settled: set[str] = set()
        self.note = ""
        self._gradient = functools.cache(gradient)
        self._fixed: dict[bool, tuple[Array, Array]] = {}

    def forget(self) -> None:
        """Compare all products again when they are next used."""
        self.differences.clear()
        self._fixed.clear()

    def gradient(self, v: Array, memory: int | None = None) -> Array:
        """J^T v for v ``[n]``, as an array like v; 1 pass.

        Args:
            v: cotangent.
            memory: bytes that a pass may take. A batch that takes more is split; its samples must not interact.
        """
        gradient = self._gradient()
        found = gradient(v, memory)
        self.note = gradient.note
        return found if isinstance(found, type(v)) else arrays.asarray_like(arrays.to_numpy(found), v)

    def fixed_gradient(self, v: Array, memory: int | None = None) -> Array:
        """J^T v for v ``[n]`` without zeros, which :meth:`cotangent` returns from now on; 1 pass."""
        self._fixed[memory is None] = v, self.gradient(v, memory)
        return self._fixed[memory is None][1]

    def cotangent(self, like: Array, n: int, memory: int | None = None) -> tuple[Array, Array]:
        """A fixed random cotangent ``[n]`` and its gradient ``[P]``, which is computed once; 1 pass."""
        if (memory is None) not in self._fixed:
            self.fixed_gradient(random_weights(n, like), memory)
        return self._fixed[memory is None]


def random_signs(size: int, like: Array, seed: int = 20260101) -> Array:
    """Random signs, the same in every run."""
    return arrays.asarray_like(np.random.default_rng(seed).choice(np.array([-1.0, 1.0]), size), like)


def random_weights(size: int, like: Array, seed: int = 20260101) -> Array:
    """Random signs times numbers from 1 to 2: sums of signs with these weights do not cancel."""
    numbers = np.random.default_rng(20260102).uniform(1, 2, size)
    return random_signs(size, like, seed) * arrays.asarray_like(numbers, like)


ROUNDINGS = 64
"""Machine epsilons by which outputs may differ between batches of different sizes, relative to their norm."""

NUDGE = 0.1
"""Noise of perturbed weights, relative to each parameter's root mean square."""


def perturbed(w: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A parameter plus noise, relative to its root mean square; if that is zero, to the usual scale for its fan-in."""
    size = float(np.sqrt(np.mean(w * w))) if w.size else 0.0
    size = size or max(1, w.size // w.shape[-1] if w.ndim and w.size else 1) ** -0.5
    return w + np.asarray(NUDGE * size * rng.standard_normal(w.shape), w.dtype)


def distance(found: Array, expected: Array, size: float = 0.0) -> float:
    """||found - expected|| relative to ||expected||; 0 if both are zero, ``inf`` if either is not finite.

    With a ``size`` it is relative to that, if it is larger than ||expected||.
    """
    return ratio(norm(found - expected), max(size, norm(expected)))


def distance_of_parts(pairs: Iterable[tuple[Array, Array]]) -> float:
    """:func:`distance` of vectors in parts, such as gradients by parameter; no larger array is made."""
    return ratio(*difference_of_parts(pairs))


def difference_of_parts(pairs: Iterable[tuple[Array, Array]]) -> tuple[float, float]:
    """||found - expected|| and ||expected|| of vectors in parts."""
    norms = [0.0, 0.0]
    for found, expected in pairs:
        for i, part in enumerate((found - expected, expected)):
            norms[i] = math.hypot(norms[i], norm(part))
    return norms[0], norms[1]


def norm(x: Array) -> float:
    """Euclidean norm, also of numbers whose squares underflow."""
    xp = array_api_compat.array_namespace(x)
    found = float(xp.linalg.vector_norm(x))
    if found == 0 and math.prod(x.shape) and (largest := float(xp.max(xp.abs(x)))):
        found = largest * float(xp.linalg.vector_norm(x / largest))
    return found


def ratio(off: float, size: float) -> float:
    """``off / size``; 0 if both are zero, ``inf`` if either is not finite."""
    if not (math.isfinite(off) and math.isfinite(size)):
        return math.inf
    return 0.0 if off == 0 else off / size if size else math.inf
