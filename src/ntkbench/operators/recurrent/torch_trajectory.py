"""The forward pass of a recurrent network in PyTorch."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from ntkbench.operators.recurrent.cells import Cell


def trajectory(kind: str, alpha: float | None, w: Mapping[str, Tensor], x: Tensor) -> tuple[Tensor, ...]:
    """States after each step, ``[N, T, H]``, one array per component of the state (h, and c for an LSTM).

    Args:
        kind: kind of the cell.
        alpha: step of a ``ctrnn``.
        w: parameters by role.
        x: inputs ``[N, T, I]``.
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
