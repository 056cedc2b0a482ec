"""The Jacobian of a recurrent network as a linear operator."""

from __future__ import annotations

import functools
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import array_api_compat
import numpy as np

from ntkbench.errors import BadInput
from ntkbench.operators import certificate
from ntkbench.operators.base import Array, JacobianOperator
from ntkbench.operators.certificate import Reference
from ntkbench.operators.recurrent import products
from ntkbench.operators.recurrent.cells import GATES, Recurrence
from ntkbench.operators.recurrent.injections import ParameterLayout
from ntkbench.operators.recurrent.products import LinearisedRecurrence


class RecurrentJacobian(JacobianOperator):
    """J = P S of a recurrent layer: one matrix product per time step serves all probes and trials.

    A mixin that precedes a backend's autodiff operator in the bases; the latter provides probes and unit vectors. A VJP
    is an adjoint recursion over time, then one matrix product over all trials and steps; a JVP is the reverse.

    Attributes:
        T: time steps.
        layout: which parameters theta consists of.
        linear: the recurrence linearised along its trajectory, computed on first use.
    """

    COMPUTED: tuple[str, ...] = ("linear",)

    _parameters: dict[str, Array]
    _x: Array

    def describe(self, recurrence: Recurrence, frozen: Mapping[str, Array]) -> None:
        """Assign roles to the parameters; called once, before the first product.

        Args:
            recurrence: as the module declares it.
            frozen: the module's parameters that are not in theta, by name, on the operator's device.

        Raises:
            BadInput: theta has a parameter that plays no role in the recurrence, or shapes do not fit it.
        """
        roles = {name: role for role, name in recurrence.names.items()}
        if strangers := [name for name in self._parameters if name not in roles]:
            raise BadInput(
                f"parameter {strangers[0]!r} is not part of the recurrence that the module declares, so the outputs "
                f"are not those of the recurrence; allowed in theta: {', '.join(roles)}"
            )
        held = {**frozen, **self._parameters}
        self._by_role = {role: held[name] for role, name in recurrence.names.items()}
        readout = self._by_role.get("readout_weight")
        self.layout = ParameterLayout(
            recurrence.kind,
            recurrence.alpha,
            inputs=self._by_role["weight_ih"].shape[1],
            hidden=self._by_role["weight_hh"].shape[1],
            outputs=None if readout is None else readout.shape[0],
            chosen=tuple((roles[name], int(np.prod(w.shape))) for name, w in self._parameters.items()),
        )
        self.T = self._x.shape[1]
        outputs = self.T * (self.layout.outputs or self.layout.hidden)
        if len(self._by_role["weight_hh"]) != GATES[recurrence.kind] * self.layout.hidden or outputs != self.O:
            raise BadInput(
                f"the module declares a {recurrence.kind} whose trajectory has {outputs} entries per trial, but it has "
                f"weight_hh {tuple(self._by_role['weight_hh'].shape)} and gives {self.O} outputs"
            )

    @functools.cached_property
    def linear(self) -> LinearisedRecurrence:
        """The recurrence linearised along its trajectory; the forward pass runs once for all probes."""
        return self.call(products.linearised, self._by_role, self._x)

    def prefix(self, steps: int) -> RecurrentJacobian:
        """The operator of only the first time steps. It shares the forward pass and counts its own passes."""
        short = self.fresh()
        short.reference = None
        short.O, short.T, short._x = self.O // self.T * steps, steps, self._x[:, :steps]
        short.__dict__["linear"] = self.linear.part(steps=slice(steps))
        return short

    def squared_rows(self, step: int) -> Array:
        """sum_b ||J_b^T e_(step, o)||^2 for each output o of a step, ``[O / T]``.

        Each backward pass covers all trials b and runs over the first step + 1 time steps only. Costs
        (O / T) * (step + 1) / T passes.
        """
        self._certify_sample_vjp()
        short = self.prefix(step + 1)
        done, rows = short.O - self.O // self.T, []
        for k in short.blocks(short.O - done):
            units = short._eye(short.O, done, done + k)[:, None, :]
            xp = array_api_compat.array_namespace(units)
            rows.append(short.sample_squares(xp.broadcast_to(units, (k, self.N, short.O))).sum(1))
            done += k
        self._sample_passes += short._sample_passes * (step + 1) / self.T
        return rows[0] if len(rows) == 1 else xp.concat(rows)

    @abstractmethod
    def call(self, product: Callable[..., Any], *arrays: Any) -> Any:
        """A function of :mod:`ntkbench.operators.recurrent.products` with the backend's loops, compiled in JAX."""

    def passes_per_jvp(self, by_sample: bool = False) -> int:
        return 1  # the derivatives are explicit

    def bytes_per_probe(self) -> int:
        H, readout = self.layout.hidden, self.layout.outputs
        # The probe, its pullback to h, the injections, the state of a step, and three gradients.
        per_step = self.O // self.T * 2 + (H if readout else 0) + self.layout.width
        return self.itemsize * (self.N * (self.T * per_step + 6 * H) + 3 * self.P)

    def _certify_sample_vjp(self) -> None:
        super()._certify_sample_vjp()
        if self._by_inner_products:
            v = certificate.random_weights(self.O, self.basis(0, 1)).reshape(1, 1, self.O)
            first = slice(0, 1)

            def difference(found: Array, _: Reference) -> float:
                return certificate.distance(found, (self._sample_vjp(first, v) ** 2).sum(-1))

            self._certified_alone("sample_squares", lambda: self._sample_squares(first, v), difference)

    def _bytes_per_square(self) -> int:
        if not self._by_inner_products:
            return super()._bytes_per_square()
        gradients = 3 * self.P * self.itemsize
        steps = self.T * (self.layout.width + 3 * self.T) * self.itemsize
        return (self.bytes_per_probe() - gradients) // self.N + steps

    @property
    def _by_inner_products(self) -> bool:
        """Whether squared norms of gradients take fewer multiplications from inner products between steps."""
        return self.T * (self.layout.width + self.layout.inputs + self.layout.hidden) < self.P

    def _by_step(self, u: Array) -> Array:
        """Cotangents ``[k, B, O]`` by time step, ``[k, B, T, O / T]``."""
        return u.reshape(u.shape[0], -1, self.T, self.O // self.T)

    def _vjp(self, u: Array) -> Array:
        return self.call(products.vjp, self.linear, self._by_step(u.reshape(-1, self.N, self.O)))

    def _jvp(self, w: Array) -> Array:
        return self.call(products.jvp, self.linear, w).reshape(-1, self.n)

    def _row(self, i: int) -> Array:
        return self._vjp(self._eye(self.n, i, i + 1))[0]

    def _sample_vjp(self, samples: slice, v: Array) -> Array:
        return self.call(products.vjp_by_trial, self.linear.part(samples), self._by_step(v))

    def _group_gradients(self, groups: Sequence[slice], v: Array) -> Array:
        xp, first = array_api_compat.array_namespace(v), groups[0].start
        linear = self.linear.part(slice(first, groups[-1].stop))
        e, made = self.call(products.pull, linear, self._by_step(v)), []
        for group in groups:
            own = slice(group.start - first, group.stop - first)
            made.append(self.call(products.coordinates, linear.part(own), e.part(own)))
        return xp.stack(made, axis=1)

    def _sample_jvp(self, samples: slice, w: Array) -> Array:
        return self.call(products.jvp_by_trial, self.linear.part(samples), w).reshape(*w.shape[:2], self.O)

    def _next_way(self, kind: str, reason: str) -> bool:
        return False  # the derivatives are explicit

    def _is_plain(self, kind: str) -> bool:
        return False

    def _sample_squares(self, samples: slice, v: Array) -> Array:
        if not self._by_inner_products:
            return (self._sample_vjp(samples, v) ** 2).sum(-1)
        return self.call(products.squares_by_trial, self.linear.part(samples), self._by_step(v))
