"""Where and how a computation runs: backend, precision, device, memory; and the options of an estimate."""

from __future__ import annotations

import math
import numbers
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypedDict

from ntkbench.errors import BadInput, one_line, unknown

BACKENDS = ("torch", "jax")
DTYPES = ("float32", "float64")
DEVICES = ("auto", "cpu", "cuda")


@dataclass(frozen=True)
class Target:
    """Backend, precision, device and memory of one computation.

    Attributes:
        backend: ``"torch"`` or ``"jax"``.
        dtype: ``"float32"`` for speed, ``"float64"`` for accuracy.
        device: ``"cpu"``, ``"cuda"``, or ``"auto"`` (the GPU if the backend sees one).
        memory: bytes that blocks of passes and of rows may use; larger computations are split into more blocks.
        program_memory: bytes that one compiled program may use, if that is known before it runs; ``None`` for 80 % of
            the free memory of the device.
        tf32: whether torch may round the operands of float32 products to TF32 (10 bits of mantissa) on a GPU, which is
            several times as fast. Metrics and certificates are then accurate to about 1e-3.
    """

    backend: str = "torch"
    dtype: str = "float32"
    device: str = "auto"
    memory: int = 2**30
    program_memory: int | None = None
    tf32: bool = False

    def __post_init__(self) -> None:
        for kind, value, allowed in (
            ("backend", self.backend, BACKENDS),
            ("dtype", self.dtype, DTYPES),
            ("device", self.device, DEVICES),
        ):
            if value not in allowed:
                raise unknown(kind, value, allowed)
        if self.tf32 and (self.backend, self.dtype) != ("torch", "float32"):
            raise BadInput(f"tf32 is for torch in float32 only, got {self.backend} in {self.dtype}: omit it")
        if self.memory <= 0:
            raise BadInput(f"memory must be a positive whole number of bytes, got {self.memory}")

    @property
    def itemsize(self) -> int:
        """Bytes of one number."""
        return 4 if self.dtype == "float32" else 8


class OptionKeywords(TypedDict, total=False):
    """The attributes of :class:`Options` as keywords."""

    method: str
    passes: int | None
    rtol: float | None
    confidence: float
    seed: int


@dataclass(frozen=True)
class Options:
    """Options of an estimate.

    Attributes:
        method: name of a method, or ``"auto"``.
        passes: maximum number of Jacobian passes; ``None`` for the defaults.
        rtol: tolerance: probes are added until the interval extends at most this fraction of the value to either side,
            or until ``passes`` are spent.
        confidence: confidence level of that interval.
        seed: seed of the random probes; the same seed gives the same estimate.

    Raises:
        BadInput: a value is not allowed.
    """

    method: str = "auto"
    passes: int | None = None
    rtol: float | None = None
    confidence: float = 0.95
    seed: int = 0

    def __post_init__(self) -> None:
        if not isinstance(self.method, str):
            raise BadInput(f"method must be a name, got {one_line(repr(self.method))}")
        object.__setattr__(self, "seed", seed(self.seed))
        if self.passes is not None:
            object.__setattr__(self, "passes", positive("passes", self.passes))
        check_confidence(self.confidence)
        if self.rtol is not None:
            _check_share("rtol", self.rtol)


def asked(keywords: Mapping[str, Any]) -> Options:
    """Options from keywords.

    Raises:
        BadInput: a keyword does not exist, or as for :class:`Options`.
    """
    allowed = tuple(field.name for field in fields(Options))
    for key in keywords:
        if key not in allowed:
            raise unknown("keyword", key, allowed)
    return Options(**keywords)


def seed(value: object) -> int:
    """A seed, from 0 to 2^63 - 1.

    Raises:
        BadInput: it is not one.
    """
    number = _whole("seed", value)
    if not 0 <= number < 2**63:
        raise BadInput(f"seed must be from 0 to 2^63 - 1, got {number}")
    return number


def positive(what: str, value: object, unit: str = "") -> int:
    """A positive whole number.

    Raises:
        BadInput: it is not one.
    """
    if not isinstance(value, numbers.Integral) or isinstance(value, bool) or value <= 0:
        raise BadInput(f"{what} must be a positive whole number{unit}, got {value!r}")
    return int(value)


LEAST = 1e-6
"""Smallest confidence level, and smallest distance of one from 1, at which the quantile has negligible rounding."""


def check_confidence(confidence: object) -> None:
    """Refuse a confidence level outside of (0, 1), or so close to its ends that the quantile is 0 or infinite.

    Raises:
        BadInput: it is not a number, or not allowed.
    """
    _check_share("confidence", confidence)
    if not LEAST <= float(confidence) <= 1 - LEAST:  # type: ignore[arg-type]
        raise BadInput(f"confidence must be from {LEAST:g} to {1 - LEAST:g}, got {confidence!r}")


def _check_share(what: str, value: object) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < float(value) < 1:
        raise BadInput(f"{what} must be a number between 0 and 1, both excluded, got {value!r}")


def _whole(what: str, value: object) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise BadInput(f"{what} must be a whole number, got {value!r}")
    return int(value)


def not_negative(what: str, value: object) -> float:
    """A finite number that is not negative.

    Raises:
        BadInput: it is not one.
    """
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 <= float(value) < math.inf:
        raise BadInput(f"{what} must be a finite number that is not negative, got {value!r}")
    return float(value)
