"""The Jacobian of recurrent networks in PyTorch: the loops over time, in place."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from ntkbench.operators.recurrent import graphs
from ntkbench.operators.recurrent.base import RecurrentJacobian
from ntkbench.operators.recurrent.cells import declared
from ntkbench.operators.recurrent.injections import Injections
from ntkbench.operators.recurrent.products import LinearisedRecurrence
from ntkbench.operators.recurrent.torch_trajectory import trajectory
from ntkbench.operators.torch import TorchJacobian, network
from ntkbench.options import Target
from ntkbench.problem import Problem


def linearise(problem: Problem, weights: str, target: Target) -> TorchRecurrentJacobian:
    """See :func:`ntkbench.operators.linearise`.

    Raises:
        BadInput: theta has parameters outside the recurrence that the module declares, or shapes do not fit it.
    """
    module, parameters, x = network(problem, weights, target)
    j = TorchRecurrentJacobian(module, parameters, x, problem.output_shape, target.memory)
    j.describe(declared(module), {key: w for key, w in module.named_parameters() if key not in parameters})
    return j


class TorchRecurrentJacobian(RecurrentJacobian, TorchJacobian):
    """J of a recurrent layer; see :class:`ntkbench.operators.recurrent.base.RecurrentJacobian`."""

    def _vjp(self, u: Tensor) -> Tensor:
        return self._in_chunks(super()._vjp, u, self.N, self.chunk_bytes.gates)

    def _jvp(self, w: Tensor) -> Tensor:
        return self._in_chunks(super()._jvp, w, self.N, self.chunk_bytes.gates)

    def _sample_jvp(self, samples: slice, w: Tensor) -> Tensor:
        product = functools.partial(super()._sample_jvp, samples)
        return self._in_chunks(product, w, w.shape[1], self.chunk_bytes.gates_by_trial)

    def _sample_squares(self, samples: slice, v: Tensor) -> Tensor:
        product = functools.partial(super()._sample_squares, samples)
        return self._in_chunks(product, v, v.shape[1], self.chunk_bytes.gates_by_trial)

    def _in_chunks(self, product: Callable[[Tensor], Tensor], rows: Tensor, trials: int, chunk_bytes: int) -> Tensor:
        """A product in chunks of probes whose gates fill about ``chunk_bytes``; in one chunk on a GPU."""
        bytes_per_probe = trials * self.T * self.layout.gates * self.layout.hidden * self.itemsize
        chunks = 1 if rows.is_cuda else min(len(rows), -(-len(rows) // max(1, round(chunk_bytes / bytes_per_probe))))
        parts = [product(part.contiguous()) for part in rows.tensor_split(chunks)]
        return parts[0] if chunks == 1 else torch.cat(parts)

    def call(self, product: Callable[..., Any], *arrays: Any) -> Any:
        run = functools.partial(product, TorchLoops, self.layout)
        with torch.no_grad():
            return graphs.call((product, self.layout), run, *arrays) if self._x.is_cuda else run(*arrays)


class TorchLoops:
    """See :class:`ntkbench.operators.recurrent.products.TimeLoops`."""

    trajectory = staticmethod(trajectory)

    @staticmethod
    def tangent(linear: LinearisedRecurrence, e: Injections) -> Tensor:
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
            if step.emit is not None and step.emit_gate is not None:
                h = (step.emit[t, :, None] * s).addcmul_(step.emit_gate[t, :, None], z[..., -H:])
            elif step.slope is not None:
                h = s.clone()  # the vector sent on is scaled in place
            out[:, :, t] = h.transpose(0, 1)
        return out

    @staticmethod
    def adjoint(linear: LinearisedRecurrence, u: Tensor) -> Injections:
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
            if side is not None and step.side is not None:
                torch.mul(step.side[t, :, None], on_s, out=side[t])
        return Injections(e, side, None)
