"""Recurrent networks in PyTorch: the loops over time, in place."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntkbench.jacobian import torch as autodiff
from ntkbench.problems import _recurrent
from ntkbench.problems.base import Problem
from ntkbench.recurrent import base
from ntkbench.recurrent.injections import Injections
from ntkbench.recurrent.products import Linear
from ntkbench.target import Target


def linearise(problem: Problem, weights: str, target: Target) -> Jacobian:
    """See :func:`ntkbench.jacobian.linearise`.

    Raises:
        BadInput: theta is not of the recurrence that the problem's module declares.
    """
    module, parameters, x = autodiff.network(problem, weights, target)
    j = Jacobian(module, parameters, x, problem.output_shape, target.memory)
    j.describe(module.recurrence, {key: w for key, w in module.named_parameters() if key not in parameters})
    return j


TURN = 2**24
"""Bytes of gates that a turn of probes fills on the CPU: more would leave the cache, and come from the system anew."""


class Jacobian(base.Jacobian, autodiff.Jacobian):
    """J of a recurrent layer; see :class:`ntkbench.recurrent.base.Jacobian`."""

    def _vjp(self, u: Tensor) -> Tensor:
        return self._in_turns(super()._vjp, u)

    def _jvp(self, w: Tensor) -> Tensor:
        return self._in_turns(super()._jvp, w)

    def _in_turns(self, product: Callable[[Tensor], Tensor], rows: Tensor) -> Tensor:
        of_a_probe = self.N * self.T * self.layout.gates * self.layout.hidden * self.itemsize
        turns = 1 if rows.is_cuda else -(-len(rows) // max(1, round(TURN / of_a_probe)))
        parts = [product(part.contiguous()) for part in rows.tensor_split(turns)]
        return parts[0] if turns == 1 else torch.cat(parts)

    def call(self, product: Callable[..., Any], *arrays: Any) -> Any:
        with torch.no_grad():
            return product(_Loops, self.layout, *arrays)


class _Loops:
    """See :class:`ntkbench.recurrent.products.Loops`."""

    trajectory = staticmethod(_recurrent.trajectory)

    @staticmethod
    def tangent(linear: Linear, e: Injections) -> Tensor:
        step, gates = linear.step, e.gates.contiguous()
        T, B, k, width = gates.shape
        H = linear.weight_hh.shape[1]
        out = gates.new_empty(k, B, T, H)
        s, h = gates.new_empty(B, k, H), None
        for t in range(T):
            z = gates[t]
            if h is not None:
                sent = h if step.slope is None else h.mul_(step.slope[t, :, None])
                z.view(B * k, width).addmm_(sent.view(B * k, H), linear.weight_hh.T)
            if t and step.keep is not None:
                s.mul_(step.keep[t, :, None])
            else:
                s.zero_()
            for gate in range(step.gain.shape[2]):
                s.addcmul_(step.gain[t, :, None, gate], z[..., gate * H : (gate + 1) * H])
            if step.side is not None and e.side is not None:
                s.addcmul_(step.side[t, :, None], e.side[t])
            h = s
            if step.emit is not None:
                h = (step.emit[t, :, None] * s).addcmul_(step.emit_gate[t, :, None], z[..., -H:])
            elif step.slope is not None:
                h = s.clone()  # what is sent on is scaled in place
            out[:, :, t] = h.transpose(0, 1)
        return out

    @staticmethod
    def adjoint(linear: Linear, u: Tensor) -> Injections:
        step = linear.step
        k, B, T, H = u.shape
        width, gates = len(linear.weight_hh), step.gain.shape[2]
        e = u.new_empty(T, B, k, width)
        side = None if step.side is None else u.new_empty(T, B, k, H)
        by_step = u.permute(2, 1, 0, 3)
        on_h, on_s, kept = (u.new_empty(B, k, H) for _ in range(3))
        for t in reversed(range(T)):
            last = t == T - 1
            if last:
                on_h.copy_(by_step[t])
            else:
                torch.mm(e[t + 1].view(B * k, width), linear.weight_hh, out=on_h.view(B * k, H))
                if step.slope is not None:
                    on_h.mul_(step.slope[t + 1, :, None])
                on_h.add_(by_step[t])
            if step.emit is not None:
                torch.mul(step.emit[t, :, None], on_h, out=on_s)
            else:
                on_s = on_h
            if step.keep is not None:
                if not last:
                    on_s.add_(kept)
                torch.mul(step.keep[t, :, None], on_s, out=kept)
            into = e[t].view(B, k, -1, H)
            torch.mul(step.gain[t, :, None], on_s[:, :, None], out=into[:, :, :gates])
            if step.emit_gate is not None:
                torch.mul(step.emit_gate[t, :, None], on_h, out=into[:, :, -1])
            if side is not None:
                torch.mul(step.side[t, :, None], on_s, out=side[t])
        return Injections(e, side, None)
