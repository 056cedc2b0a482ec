"""Recurrent networks in PyTorch: the loops over time, in place."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkbench.operators.recurrent.base import RecurrentJacobian
from ntkbench.operators.recurrent.cells import Cell
from ntkbench.operators.recurrent.injections import Injections
from ntkbench.operators.recurrent.products import Linear
from ntkbench.operators.torch import TorchJacobian
from ntkbench.options import Target
from ntkbench.problem import Problem


def linearise(problem: Problem, weights: str, target: Target) -> TorchRecurrentJacobian:
    """See :func:`ntkbench.operators.linearise`.

    Raises:
        BadInput: theta is not of the recurrence that the problem's module declares.
    """
    module, parameters, x = autodiff.network(problem, weights, target)
    j = TorchRecurrentJacobian(module, parameters, x, problem.output_shape, target.memory)
    j.describe(module.recurrence, {key: w for key, w in module.named_parameters() if key not in parameters})
    return j


def trajectory(kind: str, alpha: float | None, w: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """All states after each step, ``[N, T, H]``, from parameters by role and ``x [N, T, I]``.

    One array for each part of a state, see :class:`~ntkbench.operators.recurrent.cells.Cell`.
    """
    cell = Cell(kind, alpha)
    from_inputs = nn.functional.linear(x, w["weight_ih"], w.get("bias_ih"))
    state = cell.start(x.new_zeros(x.shape[0], w["weight_hh"].shape[1]))
    states = []
    for t in range(x.shape[1]):
        from_state = nn.functional.linear(cell.sent(state, torch), w["weight_hh"], w.get("bias_hh"))
        state = cell.step(state, from_inputs[:, t], from_state, torch)
        states.append(state)
    return tuple(torch.stack(part, 1) for part in zip(*states, strict=True))


TURN, TURN_BY_TRIAL = 2**24, 2**21
"""Bytes of gates that a turn of probes fills on the CPU: more would leave the cache, and come from the system anew.

Products of each trial by itself work on several arrays of that size.
"""


class TorchRecurrentJacobian(RecurrentJacobian, TorchJacobian):
    """J of a recurrent layer; see :class:`ntkbench.operators.recurrent.base.RecurrentJacobian`."""

    def _vjp(self, u: Tensor) -> Tensor:
        return self._in_turns(super()._vjp, u, self.N, TURN)

    def _jvp(self, w: Tensor) -> Tensor:
        return self._in_turns(super()._jvp, w, self.N, TURN)

    def _sample_jvp(self, samples: slice, w: Tensor) -> Tensor:
        product = super()._sample_jvp
        return self._in_turns(lambda part: product(samples, part), w, w.shape[1], TURN_BY_TRIAL)

    def _sample_squares(self, samples: slice, v: Tensor) -> Tensor:
        product = super()._sample_squares
        return self._in_turns(lambda part: product(samples, part), v, v.shape[1], TURN_BY_TRIAL)

    def _in_turns(self, product: Callable[[Tensor], Tensor], rows: Tensor, trials: int, turn: int) -> Tensor:
        of_a_probe = trials * self.T * self.layout.gates * self.layout.hidden * self.itemsize
        turns = 1 if rows.is_cuda else min(len(rows), -(-len(rows) // max(1, round(turn / of_a_probe))))
        parts = [product(part.contiguous()) for part in rows.tensor_split(turns)]
        return parts[0] if turns == 1 else torch.cat(parts)

    def call(self, product: Callable[..., Any], *arrays: Any) -> Any:
        with torch.no_grad():
            return product(_Loops, self.layout, *arrays)


class _Loops:
    """See :class:`ntkbench.operators.recurrent.products.Loops`."""

    trajectory = staticmethod(trajectory)

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
