"""Operations and seconds for an NTK of residual networks (Novak et al. 2022, figures 2 and 4).

ResNets with the stem of ImageNet on images of 224x224, and WideResNets-16 on images of 32x32. Operations are counted
without running anything: neural-tangents' programs as they are lowered, our kernel by layers by its shapes. Seconds are
measured of what stays under a stated number of operations and a stated memory.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field, PositiveFloat, PositiveInt

from ntkbench.studies import base

if TYPE_CHECKING:
    from torch import nn

PLUGINS = ("ntkbench.studies._programs", "ntkbench.studies._networks")
OURS = "structured_derivatives"
CHANNELS = 3


class Settings(base.Settings):
    """Networks and inputs.

    Attributes:
        depths: of ResNets.
        wide_factors: of WideResNets-16.
        outputs: of the readout; the paper has 1, 16, 128, 1000.
        width: channels of a ResNet's first stage.
        side: pixels of an image's side for ResNets.
        wide_side: for WideResNets.
        samples: N.
        case_gigaflop: what needs more than that is not timed, by the cost of a forward pass.
        budget_mb: bytes that a timed program may take; at most memory_limit_mb makes sense.
    """

    depths: list[Literal[18, 34, 50, 101, 152, 200]] = Field(default=[18, 34, 50], min_length=1)
    wide_factors: list[PositiveInt] = Field(default=[4])
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1000], min_length=1)
    width: PositiveInt = 64
    side: PositiveInt = 224
    wide_side: PositiveInt = 32
    samples: PositiveInt = 1
    case_gigaflop: PositiveFloat = 1e9
    budget_mb: PositiveFloat = 16384


@dataclass(frozen=True)
class Architecture:
    """A residual network but for its readout.

    Attributes:
        title: its name and size.
        width: channels of its first stage.
        make: number of outputs to the network.
        kind, stages: kind of block and blocks a stage.
        imagenet_stem: 7x7 with max pooling, not 3x3.
        side: pixels of an image's side.
    """

    title: str
    width: int
    make: Callable[[int], nn.Module]
    kind: str
    stages: tuple[int, ...]
    imagenet_stem: bool
    side: int


def architectures(settings: Settings) -> list[Architecture]:
    """The networks that are asked for."""
    from ntkbench.studies import _networks

    def deep(depth: int) -> Architecture:
        make = functools.partial(_networks.resnet, depth, width=settings.width, imagenet_stem=True)
        return Architecture(f"ResNet{depth}", settings.width, make, *_networks.RESNETS[depth], True, settings.side)

    def wide(factor: int) -> Architecture:
        make = functools.partial(_networks.wide_resnet, factor)
        shape = ("basic", _networks.WIDE_STAGES, False, settings.wide_side)
        return Architecture(f"WideResNet-16-{factor}", 16 * factor, make, *shape)

    return [*map(deep, settings.depths), *map(wide, settings.wide_factors)]


def run(settings: Settings) -> pd.DataFrame:
    """Rows for each network, O and implementation: of its operations, and but for the Jacobian alone of its seconds."""
    return pd.DataFrame(
        [
            row
            for architecture in architectures(settings)
            for outputs in settings.outputs
            for row in Case(settings, architecture, outputs).rows()
        ]
    )


class Case:
    """One network with its readout, in both backends."""

    def __init__(self, settings: Settings, architecture: Architecture, outputs: int) -> None:
        import numpy as np
        import torch

        from ntkbench.studies import _programs

        self._settings, self._architecture, self._outputs = settings, architecture, outputs
        shape = (CHANNELS, architecture.side, architecture.side)
        with torch.device("meta"):
            network = architecture.make(outputs).eval()
            self._forward_flops = _programs.torch_flops(lambda: network(torch.empty(1, *shape)))
        self._shapes = {name: tuple(w.shape) for name, w in network.named_parameters()}
        self._x = np.random.default_rng(0).standard_normal((settings.samples, *shape), dtype=np.float32)
        self._lowered: dict[str, Any] = {}

    def rows(self) -> list[dict[str, Any]]:
        """One row for each implementation and quantity."""
        from ntkbench.studies import _programs

        settings = self._settings
        architecture = self._architecture
        sizes = {"width": architecture.width, "side": architecture.side}
        sizes |= {"N": settings.samples, "O": self._outputs, "P": sum(map(math.prod, self._shapes.values()))}
        # A backward pass takes twice a forward pass.
        gigaflop = 3 * self._forward_flops * settings.samples * self._outputs / 1e9
        found = []
        for name, title in _programs.TITLES.items():
            case = {"network": architecture.title, **sizes, "method": name, "title": title}
            found.append(base.row(case | {"quantity": "flops"}, lambda name=name: self._operations(name)))
            if name == "jacobian":
                continue
            timing = case | {"quantity": "seconds"}
            if gigaflop > settings.case_gigaflop:
                reason = f"about {gigaflop:.3g} GFLOP, over case_gigaflop ({settings.case_gigaflop:g})"
                found.append(base.left_out(timing, reason))
            else:
                found.append(base.row(timing, lambda name=name: self._seconds(name)))
        return found

    def _operations(self, name: str) -> dict[str, float]:
        from ntkbench.studies import _programs

        flops = _programs.engine_flops(self._network, self._x) if name == OURS else _programs.flops(self._program(name))
        return {"flops": flops, "flops_per_entry": flops / (len(self._x) * self._outputs) ** 2}

    def _seconds(self, name: str) -> dict[str, Any]:
        from ntkbench.studies import _programs

        settings = self._settings
        if name == OURS:
            return _programs.timed_engine(self._network, self._x, settings.target(), settings.timing_seconds)
        weights = {key: w.detach().numpy() for key, w in self._network.named_parameters()}
        target, seconds = settings.target("jax"), settings.timing_seconds
        return _programs.timed_program(self._program(name), weights, self._x, target, seconds, settings.budget_mb)

    def _program(self, name: str) -> Any:
        """neural-tangents' program for these shapes, lowered once."""
        from ntkbench.studies import _programs

        if name not in self._lowered:
            made = _programs.lowered(name, forward(self._architecture), self._shapes, self._x.shape)
            self._lowered[name] = made
        return self._lowered[name]

    @functools.cached_property
    def _network(self) -> nn.Module:
        """The network with its weights; only what traces or runs it takes them."""
        from ntkbench.studies import _networks

        return _networks.seeded(lambda: self._architecture.make(self._outputs), 0)


def forward(architecture: Architecture) -> Any:
    """The network of an architecture in JAX, on its weights by name."""
    from ntkbench.problems._jax import linear

    kind, stages, imagenet_stem = architecture.kind, architecture.stages, architecture.imagenet_stem
    parts = {"basic": 2, "bottleneck": 3}[kind]

    def apply(weights: Mapping[str, Any], x: Any) -> Any:
        import jax

        def convolved(x: Any, name: str, norm: str, stride: int) -> Any:
            kernel = weights[f"{name}.weight"]
            pad = kernel.shape[-1] // 2
            x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))
            scale = weights[f"{norm}.weight"] / (1 + 1e-5) ** 0.5
            return x * scale[:, None, None] + weights[f"{norm}.bias"][:, None, None]

        x = jax.nn.relu(convolved(x, "0", "1", 2 if imagenet_stem else 1))
        if imagenet_stem:
            window = {"window_dimensions": (1, 1, 3, 3), "window_strides": (1, 1, 2, 2)}
            x = jax.lax.reduce_window(x, -float("inf"), jax.lax.max, padding=((0, 0), (0, 0), (1, 1), (1, 1)), **window)
        block = 4 if imagenet_stem else 3
        for stage, count in enumerate(stages):
            for i in range(count):
                stride = 2 if stage and not i else 1
                inner = x
                for part in range(parts):
                    step = stride if part == _strided(kind) else 1
                    inner = convolved(inner, f"{block}.inner.{3 * part}", f"{block}.inner.{3 * part + 1}", step)
                    inner = inner if part == parts - 1 else jax.nn.relu(inner)
                if f"{block}.shortcut.0.weight" in weights:
                    x = convolved(x, f"{block}.shortcut.0", f"{block}.shortcut.1", stride)
                x = jax.nn.relu(inner + x)
                block += 1
        return linear(x.mean((2, 3)), weights[f"{block + 2}.weight"], weights[f"{block + 2}.bias"])

    return apply


def _strided(kind: str) -> int:
    """Which convolution of a block has its stride."""
    return {"basic": 0, "bottleneck": 1}[kind]
