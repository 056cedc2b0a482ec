"""The networks of the history's cases, small and with fixed weights; changing one of them cuts its history.

Weights and inputs are drawn by NumPy, whose streams stay the same from version to version. Exact values come from the
Jacobian by plain autograd in float64, independent of ntkbench.
"""

from __future__ import annotations

import copy
import functools
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

AFTER_TRAINING = 0.5
"""Distance of the second set of weights from the first, relative to each weight's scale."""


class Network(NamedTuple):
    """A network at two sets of weights.

    Attributes:
        model: at the first set.
        model_f: at the second set.
        x: inputs.
    """

    model: nn.Module
    model_f: nn.Module
    x: Tensor


def mlp() -> Network:
    """n = 160, P = 6,922."""
    layers = nn.Linear(32, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 10)
    return _drawn(nn.Sequential(*layers), (16, 32))


def conv() -> Network:
    """n = 160, P = 2,674."""
    layers = nn.Conv2d(1, 8, 3, padding=1), nn.Tanh(), nn.Conv2d(8, 8, 3, stride=2, padding=1), nn.Tanh()
    return _drawn(nn.Sequential(*layers, nn.Flatten(), nn.Linear(8 * 5 * 5, 10)), (16, 1, 10, 10))


def gru() -> Network:
    """All hidden states of 6 trials of 8 steps: n = 576, P = 648."""
    return _drawn(nn.GRU(4, 12, batch_first=True), (6, 8, 4))


def wide() -> Network:
    """More outputs than inputs of the last layer: n = 768, P = 2,160."""
    return _drawn(nn.Sequential(nn.Linear(32, 16), nn.Tanh(), nn.Linear(16, 96)), (8, 32))


NETWORKS = {"mlp": mlp, "conv": conv, "gru": gru, "wide": wide}


def _drawn(model: nn.Module, shape: tuple[int, ...]) -> Network:
    rng = np.random.default_rng(0)
    model_f = copy.deepcopy(model)
    with torch.no_grad():
        for first, second in zip(model.parameters(), model_f.parameters(), strict=True):
            scale = first[0].numel() ** -0.5 if first.ndim > 1 else 0.1
            values, change = (scale * rng.standard_normal((2, *first.shape))).astype(np.float32)
            first.copy_(torch.from_numpy(values))
            second.copy_(torch.from_numpy(values + AFTER_TRAINING * change))
    return Network(model, model_f, torch.from_numpy(rng.standard_normal(shape).astype(np.float32)))


def in_jax(model: nn.Module) -> tuple[Any, list[tuple[Any, Any]]]:
    """An MLP as a JAX function, and its parameters."""
    import jax.numpy as jnp

    weights = [(jnp.asarray(w.detach().numpy()), jnp.asarray(b.detach().numpy())) for w, b in _linear(model)]
    return _mlp_in_jax, weights


def _linear(model: nn.Module) -> list[tuple[Tensor, Tensor]]:
    return [(layer.weight, layer.bias) for layer in model.modules() if isinstance(layer, nn.Linear)]


def _mlp_in_jax(params: list[tuple[Any, Any]], x: Any) -> Any:
    import jax.numpy as jnp

    for w, b in params[:-1]:
        x = jnp.tanh(x @ w.T + b)
    w, b = params[-1]
    return x @ w.T + b


def jacobian(model: nn.Module, x: Tensor) -> np.ndarray:
    """J ``[n, P]`` in float64: one backward pass per output."""
    model = copy.deepcopy(model).double()
    parameters = list(model.parameters())
    outputs = model(x.double())
    outputs = (outputs[0] if isinstance(outputs, tuple) else outputs).reshape(-1)
    rows = (torch.autograd.grad(output, parameters, retain_graph=True) for output in outputs)
    return torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows]).numpy()


@functools.cache
def theta(name: str, weights: str = "model") -> np.ndarray:
    """Theta in float64 of a network at one set of weights, named by the attribute of :class:`Network`."""
    network = NETWORKS[name]()
    j = jacobian(getattr(network, weights), network.x)
    return j @ j.T
