"""Operations for an NTK entry of ResNets on images of 224x224 (Novak et al. 2022, figures 2 and 4).

From lowered programs alone, which nothing runs; our kernel by layers is not counted, since it would have to be run.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench.studies import base

PLUGINS = ("ntkbench.studies._programs", "ntkbench.studies._networks")
METHODS = ("nt_jacobian_contraction", "nt_ntk_vector_products", "nt_structured_derivatives", "jacobian")


class Settings(base.Settings):
    """Networks and inputs.

    Attributes:
        depths: 18, 34, 50, 101, 152, 200.
        outputs: of the readout; the paper has 1, 16, 128, 1000.
        width: channels of the first stage.
        side: pixels of an image's side.
        samples: N.
    """

    depths: list[int] = Field(default=[18, 34, 50], min_length=1)
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1000], min_length=1)
    width: PositiveInt = 64
    side: PositiveInt = 224
    samples: PositiveInt = 1


def run(settings: Settings) -> pd.DataFrame:
    """One row for each depth, O and implementation."""
    import torch

    from ntkbench.studies import _networks, _programs

    rows = []
    for depth in settings.depths:
        for outputs in settings.outputs:
            with torch.device("meta"):
                network = _networks.resnet(depth, outputs, settings.width, imagenet_stem=True)
            shapes = {name: tuple(w.shape) for name, w in network.named_parameters()}
            sizes = {"N": settings.samples, "O": outputs, "P": sum(w.numel() for w in network.parameters())}
            for name in METHODS:
                case = {"depth": depth, **sizes, "method": name, "title": _programs.TITLES[name]}
                rows.append(base.row(case, lambda c=case, shapes=shapes: measure(settings, c, shapes)))
    return pd.DataFrame(rows)


def measure(settings: Settings, case: Mapping[str, Any], shapes: Mapping[str, tuple[int, ...]]) -> dict[str, float]:
    """Operations of one program."""
    from ntkbench.studies import _programs

    x = (case["N"], 3, settings.side, settings.side)
    flops = _programs.flops(_programs.lowered(case["method"], forward(case["depth"]), shapes, x))
    return {"flops": flops, "flops_per_entry": flops / (case["N"] * case["O"]) ** 2}


def forward(depth: int) -> Any:
    """The network of :func:`_networks.resnet` with the stem of ImageNet in JAX, on its weights by name."""
    from ntkbench.problems._jax import linear
    from ntkbench.studies import _networks

    kind, stages = _networks.RESNETS[depth]
    parts = {"basic": 2, "bottleneck": 3}[kind]

    def apply(weights: Mapping[str, Any], x: Any) -> Any:
        import jax

        def convolved(x: Any, name: str, norm: str, stride: int) -> Any:
            kernel = weights[f"{name}.weight"]
            pad = kernel.shape[-1] // 2
            x = jax.lax.conv_general_dilated(x, kernel, (stride, stride), ((pad, pad), (pad, pad)))
            scale = weights[f"{norm}.weight"] / (1 + 1e-5) ** 0.5
            return x * scale[:, None, None] + weights[f"{norm}.bias"][:, None, None]

        x = jax.nn.relu(convolved(x, "0", "1", 2))
        window = {"window_dimensions": (1, 1, 3, 3), "window_strides": (1, 1, 2, 2)}
        x = jax.lax.reduce_window(x, -float("inf"), jax.lax.max, padding=((0, 0), (0, 0), (1, 1), (1, 1)), **window)
        block = 4
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
