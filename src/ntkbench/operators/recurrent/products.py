"""The products of a recurrent network's Jacobian with blocks of probes, once for all backends.

Pure functions of arrays but for ``loops``, a backend's three loops over time (the forward pass, the tangent and the
adjoint recursion), and the sizes in ``layout``; what a backend compiles, it compiles as a whole.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple, Protocol

import array_api_compat

from ntkbench.operators.base import Array
from ntkbench.operators.recurrent import cells
from ntkbench.operators.recurrent.cells import Step
from ntkbench.operators.recurrent.injections import Factors, Injections, Layout


class Linear(NamedTuple):
    """The linearised recurrence, which all products share once the network has run.

    Attributes:
        step: derivatives of each step.
        factors: what the parameters in theta are multiplied with.
        weight_hh: ``[G H, H]``.
        readout: ``[O, H]``, ``None`` without a readout.
    """

    step: Step
    factors: Factors
    weight_hh: Array
    readout: Array | None

    def part(self, trials: slice = slice(None), steps: slice = slice(None)) -> Linear:
        """That of some trials over the first steps."""
        step = (None if a is None else a[steps, trials] for a in self.step)
        factors = (None if a is None else a[:, steps, trials] for a in self.factors)
        return Linear(Step(*step), Factors(*factors), self.weight_hh, self.readout)


class Loops(Protocol):
    """A backend's loops over time."""

    def trajectory(self, kind: str, alpha: float | None, w: Mapping[str, Array], x: Array) -> tuple[Array, ...]:
        """See :func:`ntkbench.networks.recurrent.trajectory`."""

    def tangent(self, linear: Linear, e: Injections) -> Array:
        """Changes of h, ``[k, B, T, H]``, from injections, which may be overwritten."""

    def adjoint(self, linear: Linear, u: Array) -> Injections:
        """Cotangents of the injections (but the readout's) from those of h, ``[k, B, T, H]``."""


def linearised(loops: Loops, layout: Layout, w: Mapping[str, Array], x: Array) -> Linear:
    """Run the network from its parameters by role and ``x [B, T, I]``, and write down its derivatives."""
    xp = array_api_compat.array_namespace(x)
    time_first = lambda array: xp.permute_dims(array, (1, 0, 2))  # noqa: E731
    states = tuple(map(time_first, loops.trajectory(layout.kind, layout.alpha, w, x)))
    x = time_first(x)
    z_x = x @ w["weight_ih"].T + w.get("bias_ih", 0)
    step = cells.linearised(layout.kind, layout.alpha, states, z_x, w["weight_hh"], w.get("bias_hh", 0))
    if not layout.has_side:
        step = step._replace(side=None)
    factors = layout.factors(step.sent, x, states[0])
    return Linear(step, factors, w["weight_hh"], w.get("readout_weight"))


def pull(loops: Loops, layout: Layout, linear: Linear, u: Array) -> Injections:
    """P* u: cotangents of the injections from cotangents of the outputs, ``[k, B, T, H or O]``."""
    e = loops.adjoint(linear, u if linear.readout is None else u @ linear.readout)
    if layout.injects_readout:
        xp = array_api_compat.array_namespace(u)
        e = e._replace(readout=xp.permute_dims(u, (2, 1, 0, 3)))
    return e


def propagate(loops: Loops, layout: Layout, linear: Linear, e: Injections) -> Array:
    """P e: changes of the outputs, ``[k, B, T, H or O]``, from injections, which may be overwritten."""
    changes = loops.tangent(linear, e)
    if linear.readout is not None:
        changes = changes @ linear.readout.T
    if layout.injects_readout:
        xp = array_api_compat.array_namespace(changes)
        changes = changes + xp.permute_dims(e.readout, (2, 1, 0, 3))
    return changes


def vjp(loops: Loops, layout: Layout, linear: Linear, u: Array) -> Array:
    """J^T u = S^T P* u, ``[k, B, T, H or O]`` to ``[k, P]``."""
    return layout.gradient(linear.factors, pull(loops, layout, linear, u))


def coordinates(loops: Loops, layout: Layout, linear: Linear, e: Injections) -> Array:
    """S^T e in the order in which it is made, ``[k, P]``; see :meth:`Layout.coordinates`."""
    return layout.coordinates(linear.factors, e)


def jvp(loops: Loops, layout: Layout, linear: Linear, w: Array) -> Array:
    """J w = P S w, ``[k, P]`` to ``[k, B, T, H or O]``."""
    return propagate(loops, layout, linear, layout.inject(linear.factors, w))


def jvp_by_trial(loops: Loops, layout: Layout, linear: Linear, w: Array) -> Array:
    """J_b w_b of each trial by itself, ``[k, B, P]`` to ``[k, B, T, H or O]``."""
    return propagate(loops, layout, linear, layout.inject_by_trial(linear.factors, w))


def vjp_by_trial(loops: Loops, layout: Layout, linear: Linear, u: Array) -> Array:
    """J_b^T u_b of each trial by itself, ``[k, B, T, H or O]`` to ``[k, B, P]``."""
    return layout.gradient_by_trial(linear.factors, pull(loops, layout, linear, u))


def squares_by_trial(loops: Loops, layout: Layout, linear: Linear, u: Array) -> Array:
    """||J_b^T u_b||^2 of each trial by itself, ``[k, B, T, H or O]`` to ``[k, B]``; see :meth:`Layout.squares`."""
    return layout.squares(linear.factors, pull(loops, layout, linear, u))


def k(loops: Loops, layout: Layout, linear: Linear, e: Injections) -> Injections:
    """K e = S S^T e."""
    return layout.inject(linear.factors, layout.gradient(linear.factors, e))
