"""Layers that several families share: a PyTorch module, and a JAX version that takes the module's name.

The JAX versions are plain operations on unmodified weights, which neural-tangents' structured derivatives support.
"""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ntkbench.networks.architecture import CHANNELS, Weights

EPS = 1e-6
"""Epsilon of LayerNorm, as in the code of the papers on Vision Transformers and MLP-Mixers."""


class Patches(nn.Conv2d):
    """Images ``[N, 3, side, side]`` to tokens ``[N, T, width]``: a convolution whose windows tile the image."""

    def __init__(self, patch: int, width: int) -> None:
        super().__init__(CHANNELS, width, patch, patch)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x).flatten(2).transpose(1, 2)


def patches(weights: Weights, name: str, x: Any) -> Any:
    """:class:`Patches` in JAX."""
    import jax

    kernel = weights[f"{name}.weight"]
    x = jax.lax.conv_general_dilated(x, kernel, kernel.shape[-2:], "VALID")
    x = x + weights[f"{name}.bias"][:, None, None]
    return x.reshape(*x.shape[:2], -1).swapaxes(1, 2)


class LayerNorm(nn.LayerNorm):
    """LayerNorm over the last axis."""

    def __init__(self, width: int, eps: float = EPS) -> None:
        super().__init__(width, eps)


def layer_norm(weights: Weights, name: str, x: Any, eps: float = EPS) -> Any:
    """:class:`LayerNorm` in JAX."""
    import jax

    centred = x - x.mean(-1, keepdims=True)
    scale = jax.lax.rsqrt((centred * centred).mean(-1, keepdims=True) + eps)
    return centred * scale * weights[f"{name}.weight"] + weights[f"{name}.bias"]


class Perceptron(nn.Sequential):
    """Two linear layers with a GELU between them, on the last axis, which keeps its size.

    The GELU is exact, or with ``approximate`` the tanh approximation in BERT's and GPT-2's code.
    """

    def __init__(self, width: int, hidden: int, approximate: bool = False) -> None:
        gelu = nn.GELU("tanh" if approximate else "none")
        super().__init__(nn.Linear(width, hidden), gelu, nn.Linear(hidden, width))


def perceptron(weights: Weights, name: str, x: Any, approximate: bool = False) -> Any:
    """:class:`Perceptron` in JAX."""
    import jax

    hidden = jax.nn.gelu(linear(weights, f"{name}.0", x), approximate=approximate)
    return linear(weights, f"{name}.2", hidden)


def linear(weights: Weights, name: str, x: Any) -> Any:
    """``nn.Linear`` in JAX: ``x W^T + b`` on the last axis.

    One contraction and no transpose: neural-tangents' structured derivatives look for a product whose operand is the
    parameter itself, which a transpose would hide. The bias is optional.
    """
    import jax

    contracted = (((x.ndim - 1,), (1,)), ((), ()))
    x = jax.lax.dot_general(x, weights[f"{name}.weight"], contracted)
    bias = weights.get(f"{name}.bias")
    return x if bias is None else x + bias


def convolution(weights: Weights, name: str, x: Any, stride: int = 1) -> Any:
    """``nn.Conv2d`` in JAX, with a padding of half the kernel and an optional bias."""
    import jax

    kernel = weights[f"{name}.weight"]
    pad = kernel.shape[-1] // 2
    x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))
    bias = weights.get(f"{name}.bias")
    return x if bias is None else x + bias[:, None, None]


def batch_norm(weights: Weights, name: str, x: Any) -> Any:
    """``nn.BatchNorm2d`` in JAX, in eval mode: with the statistics in the weights, or else mean 0 and variance 1."""
    mean, variance = weights.get(f"{name}.running_mean"), weights.get(f"{name}.running_var", 1)
    x = x if mean is None else x - mean[:, None, None]
    scale = weights[f"{name}.weight"] / (variance + 1e-5) ** 0.5
    return x * scale[:, None, None] + weights[f"{name}.bias"][:, None, None]


class BatchStatistics(nn.Module):
    """Standardises each feature over the batch, so that samples interact; 1 is added to the variance."""

    def forward(self, h: Tensor) -> Tensor:
        """``[N, features]`` -> ``[N, features]``; zeros for a single sample."""
        return (h - h.mean(0)) / (h.var(0, correction=0) + 1).sqrt()
