"""The NTK by neural-tangents 0.6.5, which three methods share.

Importing this imports neither jax nor neural-tangents; that happens when a problem is prepared.
"""

from __future__ import annotations

from ntkbench.neural_tangents.compat import load
from ntkbench.neural_tangents.method import NeuralTangents, Prepared, memory_limit

__all__ = ["NeuralTangents", "Prepared", "load", "memory_limit"]
