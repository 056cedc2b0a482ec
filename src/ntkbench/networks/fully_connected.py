"""Fully connected ReLU networks of any widths."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

from torch import nn

from ntkbench.networks import layers
from ntkbench.networks.architecture import Weights


def network(widths: Sequence[int], *, flatten: bool = False, relu_at_end: bool = False) -> nn.Sequential:
    """Linear layers with ReLUs between them.

    Args:
        widths: number of inputs, hidden units of each layer, number of outputs.
        flatten: take inputs of any shape ``[N, ...]`` with ``widths[0]`` entries per sample.
        relu_at_end: add a ReLU after the last layer too.
    """
    pairs = [(nn.Linear(*sizes), nn.ReLU()) for sizes in itertools.pairwise(widths)]
    stack = [layer for pair in pairs for layer in pair]
    return nn.Sequential(*[nn.Flatten()] * flatten, *(stack if relu_at_end else stack[:-1]))


def forward(weights: Weights, x: Any, *, relu_at_end: bool = False) -> Any:
    """:func:`network` in JAX."""
    import jax

    x = x.reshape(len(x), -1) if x.ndim > 2 else x
    *hidden, last = sorted({int(name.partition(".")[0]) for name in weights})
    for layer in hidden:
        x = jax.nn.relu(layers.linear(weights, f"{layer}", x))
    x = layers.linear(weights, f"{last}", x)
    return jax.nn.relu(x) if relu_at_end else x
