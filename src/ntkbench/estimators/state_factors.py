"""Metrics of the factors of the state NTK, Theta = P K P*: of K exactly, of P P* from random probes."""

from __future__ import annotations

from collections.abc import Sequence

from ntkbench import metrics
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.estimators import standard_errors
from ntkbench.metrics import MOMENTS, Moments
from ntkbench.operators import arrays
from ntkbench.operators.base import Array
from ntkbench.operators.recurrent.state_kernel import BlockOperator, StateKernel


def moments_of_k(kernel: StateKernel, at_f: StateKernel | None = None) -> Moments:
    """tr K and ||K||_F^2, exact and without passes; with ``at_f`` also ||K_f||_F^2 and tr(K K_f).

    Uses ||V V^T||_F = ||V^T V||_F, which takes B T V^2 multiplications for the V numbers that feed a gate.
    """
    sums = dict.fromkeys(("trace", "square", "square_f", "cross"), 0.0)
    for one, two in zip(kernel.representation(), (at_f or kernel).representation(), strict=True):
        sums["trace"] += one.width * float((one.v**2).sum())
        for name, (a, b) in {"square": (one, one), "square_f": (two, two), "cross": (one, two)}.items():
            strips = arrays.strips(len(a.v), len(b.v), kernel.jacobian.memory / (4 * kernel.jacobian.itemsize))
            sums[name] += one.width * sum(float(((a.v[strip] @ b.v.T) ** 2).sum()) for strip in strips)
    return Moments(**sums) if at_f else Moments(sums["trace"], sums["square"])


def metric_of_k(kernel: StateKernel, metric: str, at_f: StateKernel | None = None) -> Estimate:
    """A metric of K, exact; alignment is with the K of ``at_f``.

    Raises:
        BadInput: no such metric, or ``at_f`` is missing or superfluous.
    """
    _check(metric, at_f)
    value = moments_of_k(kernel, at_f).metric(metric)
    return Estimate(value, None, 0, "gram_of_the_representation", metric=metric, kernel="K")


def metric_of_p(
    kernel: StateKernel, metric: str, probes: int = 32, seed: int = 0, at_f: StateKernel | None = None
) -> Estimate:
    """A metric of P P* from random signs u, with the jackknife's standard error over probes.

    If a few probes agree, which may be due to chance, the error is unknown.

    The trace is E ||P* u||^2, the squared norm is E ||P P* u||^2, and the cross term of alignment is E <P P* u,
    (P P*)_f u>, all over the same u. Equal seeds give equal probes at all weights, so differences between checkpoints
    are paired. Each of the estimate's ``passes`` is one product with P or P*: one per probe for the trace, two
    otherwise, and twice that for alignment.

    Raises:
        BadInput: no such metric, fewer than two probes, or ``at_f`` is missing or superfluous.
    """
    _check(metric, at_f)
    if probes < 2:
        raise BadInput(f"probes must be at least 2 for a standard error; got {probes}")
    j, kernels = kernel.jacobian, [kernel] if at_f is None else [kernel, at_f]
    rng, propagations = j.rng(seed), [each.P for each in kernels]
    blocks = (_moments_by_probe(metric, propagations, rng.sign(k, j.n)) for k in j.blocks(probes))
    columns = [arrays.gather(column) for column in zip(*blocks, strict=True)]

    def statistic(*means: float) -> float:
        return Moments(**dict(zip(MOMENTS[metric], means, strict=True))).metric(metric)

    point = standard_errors.jackknife(statistic, *columns)
    if j.n > 1:  # squares do not depend on a single sign
        point = standard_errors.unless_alike(point, probes - 1, j.epsilon)
    value, error, degrees = point
    products = probes * (1 if metric == "trace" else 2) * len(kernels)
    return Estimate(value, error, products, "propagated_probes", metric=metric, degrees=degrees, kernel="P P*")


def _check(metric: str, at_f: StateKernel | None) -> None:
    metrics.check(metric)
    if (metric == "alignment") != (at_f is not None):
        given = "none" if at_f is None else "one"
        raise BadInput(f"at_f, the kernel to align with, is required for alignment only; got {given} for {metric}")


def _moments_by_probe(metric: str, propagations: Sequence[BlockOperator], u: Array) -> list[Array]:
    """Each probe's unbiased estimates of the moments of P P* that a metric depends on, ``[k]`` each."""
    pulled = [p.T(u) for p in propagations]
    if metric == "trace":
        return [(pulled[0] ** 2).sum(1)]
    images = [p(e) for p, e in zip(propagations, pulled, strict=True)]
    moments = {
        "trace": (pulled[0] ** 2).sum(1),
        "square": (images[0] ** 2).sum(1),
        "square_f": (images[-1] ** 2).sum(1),
        "cross": (images[0] * images[-1]).sum(1),
        "difference": ((images[-1] - images[0]) ** 2).sum(1),
        "difference_cross": (images[0] * (images[-1] - images[0])).sum(1),
    }
    return [moments[name] for name in MOMENTS[metric]]
