"""The factors of the state NTK, Theta = P K P*, as linear operators.

An *injection* is a perturbation added at one time step: to the gates before their nonlinearities, and to the outputs if
theta contains a readout. Injections are the entries of ``[B, T, E]``. E = H for the vanilla RNN and the continuous-time
RNN, and E = 4 H for the GRU (whose third gate receives the state and the inputs separately) and the LSTM; a readout in
theta adds O.

- S maps a tangent of the parameters to injections: dW to dW v_(bt), with v = phi(h_(t-1)), x_t or 1.
- K = S S^T is the one-step parameter operator on ``[B, T, E]``: (V V^T) ⊗ I, for the GRU a direct sum of such terms.
  It depends only on the representation: on inner products between states, and between inputs, of any two trials and
  steps.
- P propagates injections along the linearised recurrence. It depends only on the dynamics and does not mix trials.

Injecting before the nonlinearities, rather than into the state, makes K a Gram matrix for every kind of cell, and lets
the P of an LSTM carry (h, c) while only h is read out.

Source: Hazelden, blog post on recurrent models, P and K.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import array_api_compat
import numpy as np

from ntkbench.errors import BadInput
from ntkbench.operators import linearise
from ntkbench.operators.arrays import to_numpy
from ntkbench.operators.base import Array
from ntkbench.operators.recurrent import products
from ntkbench.operators.recurrent.base import RecurrentJacobian
from ntkbench.operators.recurrent.injections import InjectionGroup, Injections
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from scipy.sparse.linalg import LinearOperator


@dataclass(frozen=True)
class BlockOperator:
    """A matrix-free linear operator on blocks of vectors, ``[k, columns] -> [k, rows]``.

    Attributes:
        shape: ``(rows, columns)``.
        forward: the product with each row of a block.
        backward: the same for the adjoint.
        like: an array of the operator's precision, on its device.
    """

    shape: tuple[int, int]
    forward: Callable[[Array], Array]
    backward: Callable[[Array], Array]
    like: Array

    def __call__(self, block: Array) -> Array:
        return self.forward(block)

    @property
    def T(self) -> BlockOperator:
        """The adjoint."""
        return BlockOperator(self.shape[::-1], self.backward, self.forward, self.like)

    def to_scipy(self) -> LinearOperator:
        """The operator as SciPy's, which acts on columns of NumPy arrays."""
        from scipy.sparse.linalg import LinearOperator

        xp = array_api_compat.array_namespace(self.like)
        to = {"dtype": self.like.dtype, "device": array_api_compat.device(self.like)}

        def on_columns(product: Callable[[Array], Array]) -> Callable[[np.ndarray], np.ndarray]:
            def apply(columns: np.ndarray) -> np.ndarray:
                rows = np.ascontiguousarray(columns.reshape(len(columns), -1).T)
                made = to_numpy(product(xp.asarray(rows, **to))).T
                return made.reshape(made.shape[0], *columns.shape[1:])

            return apply

        forward, backward = on_columns(self.forward), on_columns(self.backward)
        dtype = to_numpy(self.like[:0]).dtype
        return LinearOperator(
            self.shape, matvec=forward, rmatvec=backward, matmat=forward, rmatmat=backward, dtype=dtype
        )


class StateKernel:
    """Theta = P K P* of a recurrent problem at one set of weights.

    Vectors of outputs are ``[k, n]``. Vectors of injections are ``[k, B T E]``, by trial, then by step. The E entries
    of a step are the gates in torch's order, the side gate of a GRU and the outputs of a readout in theta.

    Attributes:
        jacobian: J = P S.
        K: S S^T.
        P: the propagation; ``P.T`` is P*.
        theta: J J^T = P K P*.

    Raises:
        BadInput: the problem's module declares no recurrence, or there are no such weights.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, weights: str, target: Target) -> None:
        j = linearise(problem, weights, target)
        if not isinstance(j, RecurrentJacobian):
            raise BadInput(
                f"{problem.name} has no factors P and K: its module declares no recurrence; allowed: problems whose "
                "module has a `recurrence`, such as ntkbench.problems' Recurrent"
            )
        self.jacobian = j
        m, like = j.N * j.T * j.layout.width, j.linear.weight_hh
        self.K = BlockOperator((m, m), self._k, self._k, like)
        self.P = BlockOperator((j.n, m), self._propagated, self._pulled, like)
        self.theta = BlockOperator((j.n, j.n), j.ntk, j.ntk, like)

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
        """``[k, B T E]`` as injections, copied because products may overwrite them."""
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

    def representation(self) -> list[InjectionGroup]:
        """The factors ``V [V, T B]`` of K, which is the direct sum of (V V^T) ⊗ I over the groups of injections."""
        groups = self.jacobian.layout.groups(self.jacobian.linear.factors)
        return [group._replace(v=group.v.reshape(len(group.v), -1)) for group in groups]
