"""Layers in JAX on PyTorch's weights."""

from __future__ import annotations

from typing import Any


def linear(x: Any, weight: Any, bias: Any) -> Any:
    """``x W^T + b`` for ``x [..., d_in]`` and PyTorch's ``W [d_out, d_in]``.

    One contraction and no transpose: neural-tangents' structured derivatives look for a product whose operand is the
    parameter itself, and a transposed one would hide it from them.
    """
    import jax

    return jax.lax.dot_general(x, weight, (((x.ndim - 1,), (1,)), ((), ()))) + bias
