"""The factors of the state NTK, Theta = P K P*, and what each is like by itself.

An *injection* is a change of what a step of the network computes with: of the gates before their functions, and of the
outputs where a readout is in theta. They are the entries of ``[B, T, E]``; E = H for the vanilla RNN and for the
continuous-time RNN, 4 H for the GRU (whose third gate is fed apart by the state and by the inputs) and for the LSTM,
and O more with a readout in theta. Then

- S: parameters to injections, a tangent dW to dW v_(bt), v being phi(h_(t-1)), x_t or 1;
- K = S S^T, the one-step parameter operator on ``[B, T, E]``: (V V^T) (x) I, for the GRU a direct sum of such. It knows
  of the representation alone: of inner products between states, and between inputs, of any two trials and steps;
- P: injections to the trajectory, along the linearised recurrence. It knows of the dynamics alone, and no trial from
  another.

Injecting before the gates' functions, and not into the state, is what makes K a Gram matrix for every kind of cell, and
what lets an LSTM's P carry (h, c) while only h is read out.

Source: Hazelden, blog post on recurrent models, P and K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import array_api_compat
import numpy as np

from ntkbench import metrics, operators
from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.estimators import arrays, standard_errors
from ntkbench.metrics import Moments
from ntkbench.operators.base import Array
from ntkbench.operators.recurrent import products
from ntkbench.operators.recurrent.base import Jacobian
from ntkbench.operators.recurrent.injections import Injections, Part
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class Operator:
    """A linear operator that is never written out, on blocks of vectors: ``[k, columns] -> [k, rows]``.

    Attributes:
        shape: ``(rows, columns)``.
        forward: the product with a block of rows.
        backward: that of the adjoint.
        like: some array of the operator's precision and device.
    """

    shape: tuple[int, int]
    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]
    like: Array

    def __call__(self, block: Array) -> Array:
        return self.forward(block)

    @property
    def T(self) -> Operator:
        """The adjoint."""
        return Operator(self.shape[::-1], self.backward, self.forward, self.like)

    def to_scipy(self) -> LinearOperator:
        """The same for SciPy, which takes columns, and for NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        xp = array_api_compat.array_namespace(self.like)
        to = {"dtype": self.like.dtype, "device": array_api_compat.device(self.like)}

        def on_columns(product: Callable[[Array], Array]) -> Callable[[np.ndarray], np.ndarray]:
            def apply(columns: np.ndarray) -> np.ndarray:
                rows = np.ascontiguousarray(columns.reshape(len(columns), -1).T)
                made = arrays.to_numpy(product(xp.asarray(rows, **to))).T
                return made.reshape(made.shape[0], *columns.shape[1:])

            return apply

        forward, backward = on_columns(self.forward), on_columns(self.backward)
        dtype = arrays.to_numpy(self.like[:0]).dtype
        return LinearOperator(
            self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
        )


class StateKernel:
    """Theta = P K P* of a recurrent problem at one set of weights.

    Blocks are ``[k, n]`` on the side of the outputs and ``[k, B T E]`` on that of the injections, trial by trial, step
    by step: gates in torch's order, then a GRU's input side of its third gate, then the outputs of a readout in theta.

    Attributes:
        jacobian: J = P S.
        K: S S^T.
        P: the propagation; ``P.T`` is P*.
        theta: J J^T, which is P K P*.
    """

    def __init__(self, problem: Problem, weights: str, target: Target) -> None:
        """
        Raises:
            BadInput: the problem is no recurrent network, or has no such weights.
        """
        j = operators.linearise(problem, weights, target)
        if not isinstance(j, Jacobian):
            raise BadInput(
                f"{problem.name} has no factors P and K: its module declares no recurrence; allowed: problems whose "
                "module has a `recurrence`, such as ntkbench.problems' Recurrent"
            )
        self.jacobian = j
        m, like = j.N * j.T * j.layout.width, j.linear.weight_hh
        self.K = Operator((m, m), self._k, self._k, like)
        self.P = Operator((j.n, m), self._propagated, self._pulled, like)
        self.theta = Operator((j.n, j.n), j.ntk, j.ntk, like)

    def _k(self, block: Array) -> Array:
        j = self.jacobian
        return self._flat(j.call(products.k, j.linear, self._split(block)))

    def _propagated(self, block: Array) -> Array:
        j = self.jacobian
        return j.call(products.propagate, j.linear, self._split(block)).reshape(-1, j.n)

    def _pulled(self, block: Array) -> Array:
        j = self.jacobian
        return self._flat(j.call(products.pull, j.linear, block.reshape(len(block), j.N, j.T, -1)))

    def _split(self, block: Array) -> Injections:
        """``[k, B T E]`` as injections, in memory of their own, which products may overwrite."""
        j = self.jacobian
        layout, xp = j.layout, array_api_compat.array_namespace(block)
        by_step = xp.permute_dims(block.reshape(len(block), j.N, j.T, -1), (2, 1, 0, 3))
        widths = (layout.gates * layout.hidden, layout.has_side * layout.hidden, layout.width)
        bounds = np.minimum(np.cumsum((0, *widths)), layout.width)
        cut = [by_step[..., a:b] for a, b in itertools.pairwise(bounds)]
        return Injections(*(xp.asarray(part, copy=True) if part.shape[-1] else None for part in cut))

    def _flat(self, e: Injections) -> Array:
        parts = [part for part in e if part is not None]
        xp = array_api_compat.array_namespace(parts[0])
        by_trial = xp.permute_dims(xp.concat(parts, axis=-1), (2, 1, 0, 3))
        return by_trial.reshape(by_trial.shape[0], -1)

    def moments_of_k(self, at_f: StateKernel | None = None) -> Moments:
        """tr K and ||K||_F^2, and with the kernel of another set of weights also its own and tr(K K_f): exact, no pass.

        ||V V^T||_F = ||V^T V||_F, which takes B T V^2 multiplications for the V numbers that a gate is fed.
        """
        sums = dict.fromkeys(("trace", "square", "square_f", "cross"), 0.0)
        own, other = self._parts, (at_f or self)._parts
        for one, two in zip(own, other, strict=True):
            sums["trace"] += one.width * float((one.v**2).sum())
            for name, (a, b) in {"square": (one, one), "square_f": (two, two), "cross": (one, two)}.items():
                sums[name] += one.width * float(((a.v @ b.v.T) ** 2).sum())
        return Moments(**sums) if at_f else Moments(sums["trace"], sums["square"])

    @property
    def _parts(self) -> list[Part]:
        parts = self.jacobian.layout.parts(self.jacobian.linear.factors)
        return [part._replace(v=part.v.reshape(len(part.v), -1)) for part in parts]

    def of_k(self, metric: str, at_f: StateKernel | None = None) -> Estimate:
        """A metric of K, exact; alignment is that with the K of ``at_f``."""
        return Estimate(self.moments_of_k(at_f).metric(metric), None, 0, "gram_of_the_representation")

    def of_p(self, metric: str, probes: int = 32, seed: int = 0, at_f: StateKernel | None = None) -> Estimate:
        """A metric of P P*, from random signs u: one product with P* a probe for the trace, one more with P otherwise.

        The trace is E ||P* u||^2, the square of the norm E ||P P* u||^2, and the cross term of alignment
        E <P P* u, (P P*)_f u>, all over the same u; the standard error is the jackknife's over probes. The same seed
        gives the same probes at all weights, so that differences between checkpoints are paired. Of the estimate's
        ``passes`` each is a product with P or P*: a pass without the matrix product between weights and gates.

        Raises:
            BadInput: no such metric, fewer than two probes, or ``at_f`` given without need or missing.
        """
        metrics.check(metric)
        if probes < 2:
            raise BadInput(f"probes must be at least 2, to have a standard error; got {probes}")
        if (metric == "alignment") != (at_f is not None):
            raise BadInput(f"at_f is the kernel to align with, and for alignment alone; got {at_f} for {metric}")
        j, kernels = self.jacobian, [self] if at_f is None else [self, at_f]
        rng = j.rng(seed)
        blocks = (_sums(metric, [kernel.P for kernel in kernels], rng.sign(k, j.n)) for k in j.blocks(probes))
        columns = [arrays.gather(column) for column in zip(*blocks, strict=True)]

        def statistic(*means: float) -> float:
            return Moments(**dict(zip(SUMS[metric], means, strict=True))).metric(metric)

        value, error, *_ = standard_errors.jackknife(statistic, *columns)
        products_taken = probes * (1 if metric == "trace" else 2) * len(kernels)
        return Estimate(value, error, products_taken, "propagated_probes")


SUMS = {
    "trace": ("trace",),
    "norm": ("square",),
    "effective_rank": ("trace", "square"),
    "alignment": ("square", "square_f", "cross"),
}
"""The moments that each metric is made of."""


def _sums(metric: str, operators: list[Operator], u: Array) -> list[Array]:
    """What each probe says of the moments of P P* that a metric is made of."""
    pulled = [p.T(u) for p in operators]
    if metric == "trace":
        return [(pulled[0] ** 2).sum(1)]
    there = [p(e) for p, e in zip(operators, pulled, strict=True)]
    moments = {
        "trace": (pulled[0] ** 2).sum(1),
        "square": (there[0] ** 2).sum(1),
        "square_f": (there[-1] ** 2).sum(1),
        "cross": (there[0] * there[-1]).sum(1),
    }
    return [moments[name] for name in SUMS[metric]]
