"""Vision Transformers (Dosovitskiy et al. 2021, arXiv 2010.11929): pre-norm blocks on patches and a class token."""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ntkbench.networks import layers
from ntkbench.networks.architecture import Architecture, Weights
from ntkbench.networks.initialisation import scaled_normal


@dataclass(frozen=True)
class Size:
    """Size of a Vision Transformer.

    Attributes:
        patch: side length of a patch in pixels.
        width: width of a token.
        layers: number of blocks.
        heads: number of attention heads, which share the width.
        hidden: hidden units of a block's perceptron.
    """

    patch: int
    width: int
    layers: int
    heads: int
    hidden: int


SIZES = {
    "Ti/16": Size(16, 192, 12, 3, 768),
    "S/16": Size(16, 384, 12, 6, 1536),
    "B/16": Size(16, 768, 12, 12, 3072),
}
"""Sizes by the standard names (B of the paper; Ti and S of Touvron et al. 2021, arXiv 2012.12877)."""


def vision_transformer(name: str, side: int) -> Architecture:
    """A Vision Transformer of a standard size."""
    return of_size(f"ViT-{name}", SIZES[name], side)


def of_size(title: str, size: Size, side: int) -> Architecture:
    """A Vision Transformer of any size; patches must tile the image."""
    make = functools.partial(VisionTransformer, size, side)
    return Architecture(title, size.width, side, make, functools.partial(_forward, size))


class Attention(nn.Module):
    """Self-attention by plain matrix products; if causal, no token attends to later ones."""

    def __init__(self, width: int, heads: int, causal: bool = False) -> None:
        super().__init__()
        self.heads, self.causal = heads, causal
        self.query, self.key, self.value, self.out = (nn.Linear(width, width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (self.heads, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
        if self.causal:
            later = torch.ones(scores.shape[2:], dtype=torch.bool, device=x.device).triu(1)
            scores = scores.masked_fill(later, -float("inf"))
        return self.out((scores.softmax(-1) @ v).transpose(1, 2).flatten(2))


class Block(nn.Module):
    """Attention and a perceptron, each after a norm and with a shortcut."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = (layers.LayerNorm(size.width) for _ in range(2))
        self.attention = Attention(size.width, size.heads)
        self.mlp = layers.Perceptron(size.width, size.hidden)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class VisionTransformer(nn.Module):
    """Images ``[N, 3, side, side]`` to ``[N, O]``, read out from the class token."""

    def __init__(self, size: Size, side: int, outputs: int) -> None:
        super().__init__()
        self.patches = layers.Patches(size.patch, size.width)
        self.token = nn.Parameter(torch.empty(size.width))
        self.position = nn.Parameter(torch.empty(1 + (side // size.patch) ** 2, size.width))
        self.blocks = nn.Sequential(*(Block(size) for _ in range(size.layers)))
        self.norm = layers.LayerNorm(size.width)
        self.head = nn.Linear(size.width, outputs)
        scaled_normal(self, "linear")
        for embedding in (self.token, self.position):
            nn.init.normal_(embedding, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x)
        x = torch.cat([self.token.expand(len(x), 1, -1), x], 1) + self.position
        return self.head(self.norm(self.blocks(x)[:, 0]))


def _forward(size: Size, weights: Weights, x: Any) -> Any:
    import jax
    import jax.numpy as jnp

    x = layers.patches(weights, "patches", x)
    token = jnp.broadcast_to(weights["token"], (len(x), 1, size.width))
    x = jax.lax.concatenate([token, x], 1) + weights["position"]
    for i in range(size.layers):
        normed = layers.layer_norm(weights, f"blocks.{i}.norm1", x)
        x = x + attention(size.heads, weights, f"blocks.{i}.attention", normed)
        x = x + layers.perceptron(weights, f"blocks.{i}.mlp", layers.layer_norm(weights, f"blocks.{i}.norm2", x))
    return layers.linear(weights, "head", layers.layer_norm(weights, "norm", x[:, 0]))


def attention(heads: int, weights: Weights, name: str, x: Any, causal: bool = False) -> Any:
    """:class:`Attention` in JAX."""
    import jax
    import jax.numpy as jnp

    q, k, v = (
        layers.linear(weights, f"{name}.{part}", x).reshape(*x.shape[:2], heads, -1).swapaxes(1, 2)
        for part in ("query", "key", "value")
    )
    batch = ((0, 1), (0, 1))  # samples and heads
    scores = jax.lax.dot_general(q, k, (((3,), (3,)), batch)) / q.shape[-1] ** 0.5
    if causal:
        scores = jnp.where(jnp.tril(jnp.ones(scores.shape[2:], bool)), scores, -jnp.inf)
    mixed = jax.lax.dot_general(jax.nn.softmax(scores, -1), v, (((3,), (2,)), batch))
    return layers.linear(weights, f"{name}.out", mixed.swapaxes(1, 2).reshape(x.shape))
