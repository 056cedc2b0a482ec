"""Decoder-only transformers for language (Radford et al. 2019, GPT-2): pre-norm blocks with causal attention."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ntkbench.errors import BadInput
from ntkbench.networks import layers
from ntkbench.networks.architecture import Weights
from ntkbench.networks.transformer import Attention, attention

Head = Literal["tied", "untied"]
Read = Literal["logits", "last", "states"]
EPS = 1e-5
"""Epsilon of LayerNorm, as in GPT-2."""
DEVIATION = 0.02
"""Standard deviation of initial weights, as in GPT-2."""


@dataclass(frozen=True)
class Size:
    """Size of a transformer.

    Attributes:
        vocabulary: number of distinct tokens V.
        positions: largest number of tokens T of a sequence.
        width: width d of a token, which the heads share.
        layers: number of blocks L.
        heads: number of attention heads.
    """

    vocabulary: int
    positions: int
    width: int
    layers: int
    heads: int

    def __post_init__(self) -> None:
        if self.width % self.heads:
            raise BadInput(f"heads must share the width evenly: d={self.width} is not a multiple of {self.heads}")


class Block(nn.Module):
    """Causal attention and a perceptron of 4 d hidden units, each after a norm and with a shortcut."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.norm1, self.norm2 = (layers.LayerNorm(size.width, EPS) for _ in range(2))
        self.attention = Attention(size.width, size.heads, causal=True)
        self.mlp = layers.Perceptron(size.width, 4 * size.width, approximate=True)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class Transformer(nn.Module):
    """Tokens ``[N, T]``, integers below V, to the outputs that ``read`` selects.

    With a tied head, logits are products with the embedding; with an untied one, with ``head.weight [V, d]``. Neither
    has a bias. Initial weights are those of GPT-2: normal with a standard deviation of 0.02, divided by sqrt(2 L) in
    the layers that add to the residual stream; biases are zero.

    Args:
        size: size of the network.
        head: tied or untied.
        read: ``"logits"`` of all tokens ``[N, T, V]``, those of the ``"last"`` token ``[N, V]``, or the ``"states"``
            after each block ``[N, L, T, d]``, without final norm and head.
    """

    def __init__(self, size: Size, head: Head = "tied", read: Read = "logits") -> None:
        super().__init__()
        self.read = read
        self.embedding = nn.Embedding(size.vocabulary, size.width)
        self.position = nn.Embedding(size.positions, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        if read != "states":
            self.norm = layers.LayerNorm(size.width, EPS)
            if head == "untied":
                self.head = nn.Linear(size.width, size.vocabulary, bias=False)
        for name, w in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(w)
            elif "norm" not in name:
                residual = name.endswith(("attention.out.weight", "mlp.2.weight"))
                nn.init.normal_(w, std=DEVIATION / (2 * size.layers) ** 0.5 if residual else DEVIATION)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedding(tokens) + self.position.weight[: tokens.shape[1]]
        states = []
        for block in self.blocks:
            x = block(x)
            states.append(x)
        if self.read == "states":
            return torch.stack(states, 1)
        x = self.norm(x[:, -1] if self.read == "last" else x)
        return self.head(x) if hasattr(self, "head") else nn.functional.linear(x, self.embedding.weight)


def part(network: Transformer, size: Size, head: Head, read: Read) -> Transformer:
    """A network with another ``read``, and copies of the weights of ``network`` that it needs."""
    with torch.random.fork_rng(devices=[]):
        chosen = Transformer(size, head, read)
    own = network.state_dict()
    chosen.load_state_dict({name: own[name] for name in chosen.state_dict()})
    return chosen


def jax_forward(size: Size, read: Read) -> Callable[[Weights, Any], Any]:
    """:class:`Transformer` in JAX, a function of weights and tokens; tied if there is no ``head.weight``."""
    return functools.partial(_forward, size, read)


def _forward(size: Size, read: Read, weights: Weights, tokens: Any) -> Any:
    import jax.numpy as jnp

    norm = functools.partial(layers.layer_norm, weights, eps=EPS)
    x = weights["embedding.weight"][tokens] + weights["position.weight"][: tokens.shape[1]]
    states = []
    for i in range(size.layers):
        name = f"blocks.{i}"
        x = x + attention(size.heads, weights, f"{name}.attention", norm(f"{name}.norm1", x=x), causal=True)
        x = x + layers.perceptron(weights, f"{name}.mlp", norm(f"{name}.norm2", x=x), approximate=True)
        states.append(x)
    if read == "states":
        return jnp.stack(states, 1)
    x = norm("norm", x=x[:, -1] if read == "last" else x)
    return layers.linear(weights, "head" if "head.weight" in weights else "embedding", x)
