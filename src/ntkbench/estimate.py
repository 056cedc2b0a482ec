"""The result of a method: a value, its standard error and interval, and its cost."""

from __future__ import annotations

import html
import json
import math
import numbers
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import numpy as np
from scipy.special import stdtrit

from ntkbench.errors import BadInput
from ntkbench.metrics import Moments
from ntkbench.options import check_confidence
from ntkbench.units import counted

Scale = tuple[Callable[[float], float], Callable[[float], float], Callable[[float], float]]
"""A monotone map, its derivative and its inverse."""

LOG: Scale = (math.log, lambda value: 1 / value, lambda x: math.exp(min(x, 700.0)))
ATANH: Scale = (math.atanh, lambda value: 1 / (1 - value**2), math.tanh)

SCALES = {
    "trace": LOG,
    "norm": LOG,
    "effective_rank": LOG,
    "entropy_effective_rank": LOG,
    "largest_eigenvalue": LOG,
    "condition_number": LOG,
    "alignment": ATANH,
}
"""Scale on which the errors of each metric are symmetric: log for positive metrics, Fisher's z for a correlation."""

RANGES = {
    "trace": (0.0, math.inf),
    "norm": (0.0, math.inf),
    "effective_rank": (1.0, math.inf),
    "entropy_effective_rank": (1.0, math.inf),
    "largest_eigenvalue": (0.0, math.inf),
    "condition_number": (1.0, math.inf),
    "alignment": (0.0, 1.0),
}
"""Values that each metric can have, as Theta and Theta_f are positive semidefinite."""

THETA = "Theta"
"""The kernel of an estimate that names no other."""

VISIBLE = 1e-4
"""Relative difference of two values that exceeds rounding in any precision."""

ROUNDING = 100
"""An interval covers the exact value if it misses it by at most this many machine epsilons, relative to the value."""

STEPS = 32
"""Assumed rounding error of a network's passes, in machine epsilons, unless the certificate shows more."""

SAFETY = 16
"""Assumed rounding error of a network's passes, as a multiple of the certificate."""

STEEPEST = 2.0
"""Largest half-width on the atanh scale for which both ends of an interval are computed on this scale."""

NEAR_ONE = 0.99
"""Smallest alignment for which 1 - alignment is shown as well."""


def rounding_bound(metric: str, epsilon: float, terms: int, certificate: float | None) -> float:
    """Largest expected rounding error of an exact metric: relative, or for an alignment in the kernels' angle.

    Rounding errors in a sum of positive terms add up like a random walk, to the square root of the number of terms in
    machine epsilons. Those of the network's own passes are unknown, but comparing two computations of a gradient shows
    their size. The bound is 10 to 1000 times the typical error. A network that amplifies rounding in all its passes
    alike may exceed it.

    Args:
        metric: the metric.
        epsilon: machine epsilon of products.
        terms: largest number of terms in one sum, n or P.
        certificate: see :class:`Estimate`.
    """
    moments = 3 if metric == "effective_rank" else 1
    return moments * (epsilon * (STEPS + math.sqrt(terms)) + SAFETY * (certificate or 0.0))


def rounding_note(rtol: float, dtype: str) -> str:
    """A note on an estimate whose rounding in a precision may exceed a tolerance."""
    advice = "no precision is as accurate" if dtype == "float64" else "choose dtype='float64'"
    return f"rounding may exceed rtol={rtol:g}: {advice}"


@dataclass(frozen=True, eq=False, repr=False)
class Estimate:
    """One metric of the NTK, as computed by one method.

    A stochastic estimate outside the metric's range is replaced by the nearest possible value, and so is an alignment
    whose ``complement`` is known. A note says so if they differ by more than rounding.

    Comparisons, formatting and arithmetic use its value; two estimates are equal if all of their attributes are.

    >>> import torch, ntkbench
    >>> estimate = ntkbench.trace(torch.nn.Linear(3, 2), torch.eye(3), method="hutchinson", passes=40)
    >>> low, high = estimate.interval(confidence=0.95)
    >>> low < estimate < high, estimate.passes
    (True, 40.0)

    Attributes:
        value: the metric.
        standard_error: standard error of ``value``; ``None`` for a deterministic method, ``nan`` if the budget of a
            stochastic method was too small to estimate it.
        passes: passes spent, from the operator's counter; one pass is one JVP or one VJP over the whole batch. ``None``
            for a method whose cost is not a number of passes.
        method: the method's name.
        notes: remarks on how the value was computed, such as parameters that had no fast rule.
        metric: the metric's name.
        degrees: degrees of freedom of the standard error.
        certificate: the largest relative difference between a gradient that the method used and that of plain autograd;
            ``None`` if there is no network to compare with.
        complement: 1 - alignment without cancellation, from 0 to 1, if it was computed from the difference of the
            kernels; its standard error is that of the alignment.
        rounding: the largest expected rounding error (see :func:`rounding_bound`): relative to ``value``; for an
            alignment absolute or, with ``complement``, in the angle between the kernels, in radians; ``None`` if it is
            not known.
        logarithmic: whether errors are symmetric in the logarithm for any metric, as those of an alignment with y y^T,
            in which only the norm has a standard error.
        kernel: the matrix whose metric this is: Theta, or an approximation such as pNTK ⊗ I_O.
        confidence: the requested confidence level, that of the printed interval and, by default, of :meth:`interval`.
    """

    value: float
    standard_error: float | None
    passes: float | None
    method: str
    notes: tuple[str, ...] = ()
    metric: str = ""
    degrees: float = math.inf
    certificate: float | None = None
    complement: float | None = None
    rounding: float | None = None
    logarithmic: bool = False
    kernel: str = THETA
    confidence: float = 0.95

    @classmethod
    def of_moments(
        cls,
        metric: str,
        moments: Moments,
        passes: float | None,
        method: str,
        notes: tuple[str, ...] = (),
        certificate: float | None = None,
        rounding: float | None = None,
        *,
        kernel: str = THETA,
    ) -> Self:
        """A metric without a standard error, from moments of Theta."""
        value, complement = moments.metric(metric), math.nan
        if metric == "alignment":
            value, complement = min(value, 1.0), moments.complement
        return cls(
            value,
            None,
            passes,
            method,
            notes,
            metric,
            certificate=certificate,
            complement=None if math.isnan(complement) else complement,
            rounding=rounding,
            kernel=kernel,
        )

    def __post_init__(self) -> None:
        if self.complement is not None:
            object.__setattr__(self, "complement", min(max(self.complement, 0.0), 1.0))
        elif self.standard_error is None:
            return
        if not isinstance(self.value, numbers.Real) or not math.isfinite(self.value):
            return
        value = self._within_range(self.value)
        if value != self.value:
            if not math.isclose(value, self.value, rel_tol=VISIBLE):
                note = f"{self.metric} of {self.value:.4g} replaced by {value:g}, the nearest possible value"
                object.__setattr__(self, "notes", (*self.notes, note))
            object.__setattr__(self, "value", value)

    def interval(self, confidence: float | None = None) -> tuple[float, float]:
        """Confidence interval for the exact value, widened by ``rounding``; a point if no error is known.

        It is value +- t * standard_error, with the quantile t of Student's distribution for the degrees of freedom, on
        the scale on which the metric's errors are symmetric: log for trace, norm and effective rank, atanh for the
        alignment of two kernels. The delta method transforms the standard error to that scale. With few probes on a
        steep spectrum, an interval without this transformation would contain the exact value too rarely. The interval
        contains the value, and is clipped to the metric's range as far as the value is in it. It is unbounded if the
        standard error is unknown.

        Raises:
            BadInput: the confidence level is not between 0 and 1.
        """
        spread = self._reach(confidence)
        if math.isinf(spread):
            return -math.inf, math.inf
        if self.complement is not None:
            low, high = self.complement_interval(confidence)
            return min(1 - high, self.value), max(1 - low, self.value)
        scale = LOG if self.logarithmic else SCALES.get(self.metric)
        in_domain = self.value > 0 if scale is LOG else abs(self.value) < 1
        if spread == 0 or scale is None or not in_domain:
            low, high = self.value - spread, self.value + spread
        else:
            transform, derivative, inverse = scale
            centre, spread = transform(self.value), derivative(self.value) * spread
            low, high = inverse(centre - spread), inverse(centre + spread)
        low, high = self._with_rounding(low, high)
        least, most = RANGES.get(self.metric, (-math.inf, math.inf))
        if self.metric == "alignment" and self.standard_error is None:
            least = -1.0  # that with a matrix that is not positive semidefinite
        return min(max(low, least), self.value), max(min(high, most), self.value)

    def _with_rounding(self, low: float, high: float) -> tuple[float, float]:
        """An interval, widened by ``rounding``.

        Rounding of an inner product is relative to the norms of both kernels, even if the product is much smaller. If
        the difference of the kernels is not computed, rounding near 1 is as large as elsewhere.
        """
        if not self.rounding:
            return low, high
        reach = self.rounding * (1.0 if self.metric == "alignment" else abs(self.value))
        return low - reach, high + reach

    def complement_interval(self, confidence: float | None = None) -> tuple[float, float]:
        """Confidence interval for 1 - alignment: that of :meth:`interval`, without cancellation near 0.

        Near 0 the scale, atanh of the alignment, is that of the logarithm of 1 - alignment. Rounding changes the angle
        between the kernels by a bounded amount, so it widens the interval of that angle.

        Raises:
            BadInput: 1 - alignment was not computed separately, or the confidence level is not between 0 and 1.
        """
        if self.complement is None:
            raise BadInput(f"{self.method} does not compute 1 - alignment separately; use interval()")
        c, spread = self.complement, self._reach(confidence)
        if math.isinf(spread):
            return -math.inf, math.inf
        if 0 < c < 2:
            # 1 - tanh(x) = 2 / (1 + exp(2 x))
            centre, spread = math.log((2 - c) / c) / 2, spread / (c * (2 - c))
            # Where the standard error is much larger than 1 - A, the upper end grows in proportion to it.
            upward = min(spread, STEEPEST) + math.log1p(2 * max(spread - STEEPEST, 0.0)) / 2
            low, high = (2 / (1 + math.exp(min(2 * x, 700.0))) for x in (centre + spread, centre - upward))
        else:
            low, high = c, c + spread
        low, high = _turned(low, -(self.rounding or 0.0)), _turned(high, self.rounding or 0.0)
        return min(low, c), max(min(high, 1.0), c)

    def _reach(self, confidence: float | None) -> float:
        """Half the width of the interval on the scale of the value; infinite if the standard error is unknown."""
        confidence = self.confidence if confidence is None else confidence
        check_confidence(confidence)
        if not self.standard_error:
            return 0.0
        if math.isnan(self.standard_error) or self.degrees <= 0:
            return math.inf
        return float(stdtrit(self.degrees, 0.5 + confidence / 2)) * self.standard_error

    def covers(self, exact: float, dtype: str, confidence: float | None = None) -> bool:
        """Whether the interval covers the exact value, up to rounding in ``dtype``."""
        rounding = ROUNDING * float(np.finfo(dtype).eps) * abs(exact)
        low, high = self.interval(confidence)
        return low - rounding <= exact <= high + rounding

    def relative_width(self, confidence: float | None = None) -> float:
        """The larger distance from the value to an end of the interval, relative to the value."""
        low, high = self.interval(confidence)
        reach = max(self.value - low, high - self.value)
        if reach == 0:
            return 0.0
        return reach / abs(self.value) if self.value else math.inf

    def to_dict(self) -> dict[str, Any]:
        """All attributes, as plain numbers, strings and lists."""
        plain = {name: float(v) if isinstance(v, numbers.Real) else v for name, v in asdict(self).items()}
        return plain | {"notes": list(self.notes)}

    @classmethod
    def from_dict(cls, found: Mapping[str, Any]) -> Self:
        """The estimate from a result of :meth:`to_dict`; numbers may be strings such as ``"inf"``."""
        return cls(**{name: _read(name, v) for name, v in found.items()})

    def to_json(self) -> str:
        """JSON, with the strings ``"nan"``, ``"inf"`` and ``"-inf"`` for numbers that are not finite."""
        finite = lambda v: str(v) if isinstance(v, float) and not math.isfinite(v) else v  # noqa: E731
        return json.dumps({name: finite(v) for name, v in self.to_dict().items()})

    @classmethod
    def from_json(cls, text: str) -> Self:
        """The estimate from a result of :meth:`to_json`."""
        return cls.from_dict(json.loads(text))

    def __float__(self) -> float:
        return float(self.value)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        return np.array(self.value, dtype)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Estimate):
            return asdict(self) == asdict(other)
        number: Any = other
        return self.value == number if isinstance(other, numbers.Number) else NotImplemented

    def __hash__(self) -> int:
        return hash(self.value)

    def __lt__(self, other: Any) -> Any:
        return self.value < _value(other)

    def __le__(self, other: Any) -> Any:
        return self.value <= _value(other)

    def __gt__(self, other: Any) -> Any:
        return self.value > _value(other)

    def __ge__(self, other: Any) -> Any:
        return self.value >= _value(other)

    def __add__(self, other: Any) -> Any:
        return self.value + _value(other)

    def __radd__(self, other: Any) -> Any:
        return other + self.value

    def __sub__(self, other: Any) -> Any:
        return self.value - _value(other)

    def __rsub__(self, other: Any) -> Any:
        return other - self.value

    def __mul__(self, other: Any) -> Any:
        return self.value * _value(other)

    def __rmul__(self, other: Any) -> Any:
        return other * self.value

    def __truediv__(self, other: Any) -> Any:
        return self.value / _value(other)

    def __rtruediv__(self, other: Any) -> Any:
        return other / self.value

    def __pow__(self, other: Any) -> Any:
        return self.value ** _value(other)

    def __rpow__(self, other: Any) -> Any:
        return other**self.value

    def __neg__(self) -> float:
        return -self.value

    def __pos__(self) -> float:
        return +self.value

    def __abs__(self) -> float:
        return abs(self.value)

    def __round__(self, digits: int | None = None) -> float:
        return round(self.value, digits)

    def __format__(self, spec: str) -> str:
        return format(self.value, spec) if spec else str(self)

    def __str__(self) -> str:
        return self._line(self._spread())

    def __repr__(self) -> str:
        certified = "" if self.certificate is None else f", certified to {self.certificate:.1e}"
        notes = "".join(f"\n  {note}" for note in self.notes)
        return f"{self._of()} = {self._line(self._spread() or self._rounding())}{certified}{notes}"

    def _of(self) -> str:
        """The metric, with the kernel unless it is Theta."""
        return (self.metric or "value") + ("" if self.kernel == THETA else f" of {self.kernel}")

    def _repr_html_(self) -> str:
        return _html([self])

    def _within_range(self, value: float) -> float:
        low, high = RANGES.get(self.metric, (-math.inf, math.inf))
        return min(max(value, low), high)

    def _line(self, error: str) -> str:
        """Value, error and cost on one line."""
        cost = "" if self.passes is None else f", {counted(self.passes, 'pass', 'passes')}"
        return f"{', '.join(filter(None, (f'{self.value:.6g}', error, self._distance_to_one())))} ({self.method}{cost})"

    def _spread(self) -> str:
        """The interval in words; empty for a value without a standard error, or with one of 0."""
        return _words(self.value, *self.interval(), self.confidence) if self.standard_error else ""

    def _rounding(self) -> str:
        """The largest expected rounding error in words, absolute; empty if it is not known."""
        if self.rounding is None or not math.isfinite(self.value):
            return ""
        low, high = self._with_rounding(self.value, self.value) if self.complement is None else self.interval()
        rounding = max(self.value - low, high - self.value)
        return f"rounding up to {rounding:.1e}" if rounding else ""

    def _distance_to_one(self) -> str:
        """1 - alignment in words if the alignment is close to 1, else empty."""
        if self.complement is None or self.value < NEAR_ONE:
            return ""
        error = ""
        if self.standard_error:
            error = _words(self.complement, *self.complement_interval(), self.confidence)
        return ", ".join(filter(None, (f"1 - alignment = {self.complement:.3g}", error)))


def _words(value: float, low: float, high: float, confidence: float) -> str:
    """An interval and its level in words, or the larger distance of its ends from the value if both print alike."""
    if math.isinf(low):
        return "error unknown"
    if f"{low:.6g}" == f"{high:.6g}":
        return f"{_level(confidence)} within {max(value - low, high - value):.1e}"
    return f"{_level(confidence)} in [{low:.6g}, {high:.6g}]"


def _level(confidence: float) -> str:
    return f"{100 * confidence:.6g} %"


def _turned(complement: float, angle: float) -> float:
    """1 - cos(a + ``angle``) for 1 - cos(a) = ``complement``, with the sum clipped to [0, pi]."""
    half = math.asin(math.sqrt(min(complement / 2, 1.0)))
    return 2 * math.sin(min(max(half + angle / 2, 0.0), math.pi / 2)) ** 2


class Estimates(dict[str, Estimate]):
    """Estimates by the metric's name, which print as a table."""

    def __repr__(self) -> str:
        rows = [_cells(e) for e in self.values()]
        table = [_header(self.values()), *rows]
        widths = [max(len(row[i]) for row in table) for i in range(len(table[0]))]
        lines = [
            "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip() for row in table
        ]
        return "\n".join([*lines, *_all_notes(self.values())])

    def _repr_html_(self) -> str:
        return _html(self.values())


def _header(estimates: Iterable[Estimate]) -> tuple[str, ...]:
    """Names of a table's columns, with the level of its intervals; estimates of one call share it."""
    level = " / ".join(dict.fromkeys(_level(e.confidence) for e in estimates)) or "95 %"
    return "metric", "value", f"{level} interval", "passes", "method", "certificate"


def _cells(e: Estimate) -> tuple[str, ...]:
    """A row of a table."""
    passes = "" if e.passes is None else f"{e.passes:g}"
    certificate = "" if e.certificate is None else f"{e.certificate:.1e}"
    interval = e._spread().removeprefix(f"{_level(e.confidence)} ").removeprefix("in ") or e._rounding() or "-"
    return e._of(), f"{e.value:.6g}", interval, passes, e.method, certificate


def _all_notes(estimates: Iterable[Estimate]) -> list[str]:
    """What the table has no column for: notes, and 1 - alignment near 1."""
    return list(dict.fromkeys(note for e in estimates for note in (e._distance_to_one(), *e.notes) if note))


def _html(estimates: Collection[Estimate]) -> str:
    row = lambda cells, tag: f"<tr>{''.join(f'<{tag}>{html.escape(c)}</{tag}>' for c in cells)}</tr>"  # noqa: E731
    body = "".join([row(_header(estimates), "th"), *(row(_cells(e), "td") for e in estimates)])
    notes = "".join(f"<li>{html.escape(note)}</li>" for note in _all_notes(estimates))
    return f"<table>{body}</table>" + (f"<ul>{notes}</ul>" if notes else "")


def _value(other: Any) -> Any:
    return other.value if isinstance(other, Estimate) else other


TEXTS = ("method", "metric", "kernel")


def _read(name: str, value: Any) -> Any:
    if name == "notes":
        return tuple(value)
    return value if name in TEXTS or value is None else float(value)
