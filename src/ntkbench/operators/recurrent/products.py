"""Products of a recurrent network's Jacobian with blocks of probes, shared by all backends.

Each product is a pure function of arrays, given ``loops``, a backend's three loops over time (forward pass, tangent
recursion, adjoint recursion), and the sizes in ``layout``. A backend compiles each product as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import array_api_compat

from ntkbench.operators.base import Array
from ntkbench.operators.recurrent import cells
from ntkbench.operators.recurrent.cells import StepDerivatives
from ntkbench.operators.recurrent.injections import InjectionFactors, Injections, ParameterLayout


class LinearisedRecurrence(NamedTuple):
    """The recurrence linearised along its trajectory; all products share it.

    Attributes:
        step: derivatives of each step.
        factors: factors v of the injections.
        weight_hh: ``[G H, H]``.
        readout: ``[O, H]``, ``None`` without a readout.
    """

    step: StepDerivatives
    factors: InjectionFactors
    weight_hh: Array
    readout: Array | None

    def part(self, trials: slice = slice(None), steps: slice = slice(None)) -> LinearisedRecurrence:
        """The same for a slice of trials and a slice of leading steps."""
        step = (None if a is None else a[steps, trials] for a in self.step)
        factors = (None if a is None else a[:, steps, trials] for a in self.factors)
        return LinearisedRecurrence(StepDerivatives(*step), InjectionFactors(*factors), self.weight_hh, self.readout)


class TimeLoops(Protocol):
    """A backend's loops over time."""

    def trajectory(self, kind: str, alpha: float | None, w: Mapping[str, Array], x: Array) -> tuple[Array, ...]:
        """See :func:`ntkbench.operators.recurrent.torch_trajectory.trajectory`."""

    def tangent(self, linear: LinearisedRecurrence, e: Injections) -> Array:
        """Changes of h, ``[k, B, T, H]``, from injections, which it may overwrite."""

    def adjoint(self, linear: LinearisedRecurrence, u: Array) -> Injections:
        """Cotangents of the injections, except the readout's, from those of h, ``[k, B, T, H]``."""


def linearised(loops: TimeLoops, layout: ParameterLayout, w: Mapping[str, Array], x: Array) -> LinearisedRecurrence:
    """Run the network from its parameters by role and ``x [B, T, I]``, and linearise it."""
    xp = array_api_compat.array_namespace(x)
    time_first = lambda array: xp.permute_dims(array, (1, 0, 2))  # noqa: E731
    states = tuple(map(time_first, loops.trajectory(layout.kind, layout.alpha, w, x)))
    x = time_first(x)
    z_x = x @ w["weight_ih"].T + w.get("bias_ih", 0)
    step = cells.linearised(layout.kind, layout.alpha, states, z_x, w["weight_hh"], w.get("bias_hh", 0))
    if not layout.has_side:
        step = step._replace(side=None)
    factors = layout.factors(step.sent, x, states[0])
    return LinearisedRecurrence(step, factors, w["weight_hh"], w.get("readout_weight"))


def pull(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, u: Array) -> Injections:
    """P* u: cotangents of the injections from cotangents of the outputs, ``[k, B, T, H or O]``."""
    e = loops.adjoint(linear, u if linear.readout is None else u @ linear.readout)
    if layout.injects_readout:
        xp = array_api_compat.array_namespace(u)
        e = e._replace(readout=xp.permute_dims(u, (2, 1, 0, 3)))
    return e


def propagate(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, e: Injections) -> Array:
    """P e: changes of the outputs, ``[k, B, T, H or O]``, from injections, which it may overwrite."""
    changes = loops.tangent(linear, e)
    if linear.readout is not None:
        changes = changes @ linear.readout.T
    if layout.injects_readout:
        xp = array_api_compat.array_namespace(changes)
        changes = changes + xp.permute_dims(e.readout, (2, 1, 0, 3))
    return changes


def vjp(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, u: Array) -> Array:
    """J^T u = S^T P* u, ``[k, B, T, H or O]`` to ``[k, P]``."""
    return layout.gradient(linear.factors, pull(loops, layout, linear, u))


def coordinates(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, e: Injections) -> Array:
    """S^T e with its entries permuted, ``[k, P]``; see :meth:`ParameterLayout.coordinates`."""
    return layout.coordinates(linear.factors, e)


def jvp(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, w: Array) -> Array:
    """J w = P S w, ``[k, P]`` to ``[k, B, T, H or O]``."""
    return propagate(loops, layout, linear, layout.inject(linear.factors, w))


def jvp_by_trial(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, w: Array) -> Array:
    """J_b w_b per trial, ``[k, B, P]`` to ``[k, B, T, H or O]``."""
    return propagate(loops, layout, linear, layout.inject_by_trial(linear.factors, w))


def vjp_by_trial(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, u: Array) -> Array:
    """J_b^T u_b per trial, ``[k, B, T, H or O]`` to ``[k, B, P]``."""
    return layout.gradient_by_trial(linear.factors, pull(loops, layout, linear, u))


def squares_by_trial(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, u: Array) -> Array:
    """||J_b^T u_b||^2 per trial, ``[k, B, T, H or O]`` to ``[k, B]``; see :meth:`ParameterLayout.squares`."""
    return layout.squares(linear.factors, pull(loops, layout, linear, u))


def k(loops: TimeLoops, layout: ParameterLayout, linear: LinearisedRecurrence, e: Injections) -> Injections:
    """K e = S S^T e."""
    return layout.inject(linear.factors, layout.gradient(linear.factors, e))
