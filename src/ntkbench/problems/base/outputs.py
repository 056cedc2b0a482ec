"""Outputs of a problem's network at both sets of weights."""

from __future__ import annotations

import numpy as np

from ntkbench.operators import torch_network
from ntkbench.options import Target
from ntkbench.problem import Problem


def change_by_training(problem: Problem, device: str = "cpu") -> np.ndarray:
    """f(x; theta_f) - f(x; theta_0), ``[N, O]``, in float64, by two forward passes of torch.

    Args:
        problem: one with trained weights and a network in torch.
        device: device of the forward passes.

    Raises:
        BadInput: there are no trained weights.
        Unavailable: the device is not present.
    """
    import torch

    found = []
    for end in ("theta_0", "theta_f"):
        module, weights, x = torch_network(problem, end, Target(dtype="float64", device=device))
        with torch.no_grad():
            outputs = torch.func.functional_call(module, weights, (x,))
        found.append(outputs.reshape(problem.N, problem.O).cpu().numpy())
    return found[1] - found[0]
