"""Operations and seconds of NTK programs for image networks (Novak et al. 2022, figures 2 and 4).

ResNets with the stem of ImageNet, Vision Transformers and MLP-Mixers on images of 224x224, and WideResNets-16 on images
of 32x32. Operations are counted without running the kernels: those of neural-tangents' programs after lowering, those
of our layerwise kernel from its shapes. Seconds are measured for cases within the limits; for the limits, operations
are estimated from those of a forward pass. All programs are in float32.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd
from pydantic import Field, PositiveInt, model_validator

from ntkbench import operations
from ntkbench.studies import base

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

    from ntkbench.networks.architecture import Architecture

TIMED = True
OURS = "structured_derivatives"


class Settings(base.Settings):
    """Networks and inputs.

    Attributes:
        depths: depths of ResNets.
        wide_factors: widening factors of WideResNets-16.
        transformers: sizes of Vision Transformers; the number after the slash is the side of a patch in pixels.
        mixers: sizes of MLP-Mixers, in the same notation.
        outputs: numbers of outputs of the readout; the paper has 1, 16, 128, 1000.
        width: channels of a ResNet's first stage.
        side: pixels of an image's side; patches must tile it.
        wide_side: pixels of an image's side for WideResNets.
        samples: N.
    """

    USES = ("device", "calls", "limits.block_mb", "limits.gigaflop")

    depths: list[Literal[18, 34, 50, 101, 152, 200]] = Field(default=[18, 34, 50])
    wide_factors: list[PositiveInt] = Field(default=[4])
    transformers: list[Literal["Ti/16", "S/16", "B/16"]] = Field(default=["S/16"])
    mixers: list[Literal["S/32", "S/16", "B/16"]] = Field(default=["S/16"])
    outputs: list[PositiveInt] = Field(default=[1, 16, 128, 1000], min_length=1)
    width: PositiveInt = 64
    side: PositiveInt = 224
    wide_side: PositiveInt = 32
    samples: PositiveInt = 1

    @model_validator(mode="after")
    def _has_networks(self) -> Settings:
        if not (self.depths or self.wide_factors or self.transformers or self.mixers):
            raise ValueError("depths, wide_factors, transformers and mixers are all empty: nothing would be measured")
        return self

    @model_validator(mode="after")
    def _patches_tile(self) -> Settings:
        for name in (*self.transformers, *self.mixers):
            if self.side % (patch := int(name.partition("/")[2])):
                raise ValueError(f"side {self.side} is not a multiple of {patch}, the side of the patches of {name}")
        return self


def architectures(settings: Settings) -> list[Architecture]:
    """The requested networks."""
    from ntkbench.networks import mixer, residual, transformer

    return [
        *(residual.resnet(depth, settings.width, settings.side) for depth in settings.depths),
        *(residual.wide_resnet(factor, settings.wide_side) for factor in settings.wide_factors),
        *(transformer.vision_transformer(name, settings.side) for name in settings.transformers),
        *(mixer.mlp_mixer(name, settings.side) for name in settings.mixers),
    ]


def run(settings: Settings) -> pd.DataFrame:
    """Rows for each network, O and implementation: its operations and, except for the Jacobian alone, its seconds."""
    return base.table(
        row
        for architecture in architectures(settings)
        for outputs in settings.outputs
        for row in Case(settings, architecture, outputs).rows()
    )


class Case:
    """One network with its readout, in both backends."""

    def __init__(self, settings: Settings, architecture: Architecture, outputs: int) -> None:
        """Does not create anything yet."""
        self._settings, self._architecture, self._outputs = settings, architecture, outputs
        self._lowered: dict[str, base.Once[Any]] = {}

    def rows(self) -> list[base.Row]:
        """One row for each implementation and quantity."""
        from ntkbench.studies.base import programs

        architecture = self._architecture
        sizes = {"width": architecture.width, "side": architecture.side}
        sizes |= {"N": self._settings.samples, "O": self._outputs}
        rows = []
        for name, title in programs.TITLES.items():
            case = {"network": architecture.title, **sizes, "method": name, "title": title}
            columns = functools.partial(self._columns, name)
            rows.append(base.row(case | {"quantity": "flops"}, functools.partial(columns, self._operations)))
            if name != "jacobian":
                rows.append(base.row(case | {"quantity": "seconds"}, functools.partial(columns, self._seconds)))
        return rows

    def _columns(self, name: str, measure: Callable[[str], dict[str, Any]]) -> dict[str, Any]:
        return {"P": sum(map(math.prod, self._shapes.values())), **measure(name)}

    @functools.cached_property
    def _meta(self) -> nn.Module:
        """The network on the meta device, without memory for its weights."""
        import torch

        with torch.device("meta"):
            return self._architecture.make(self._outputs).eval()

    @functools.cached_property
    def _shapes(self) -> dict[str, tuple[int, ...]]:
        return {name: tuple(w.shape) for name, w in self._meta.named_parameters()}

    @functools.cached_property
    def _forward_flops(self) -> float:
        """Operations of a forward pass of one image."""
        import torch

        from ntkbench.studies.base import programs

        image = torch.empty(1, *self._x.shape[1:], device="meta")
        return programs.torch_flops(lambda: self._meta(image))

    @functools.cached_property
    def _x(self) -> np.ndarray:
        import numpy as np

        from ntkbench.networks.architecture import CHANNELS

        shape = (self._settings.samples, CHANNELS, self._architecture.side, self._architecture.side)
        return np.random.default_rng(0).standard_normal(shape, dtype=np.float32)

    def _operations(self, name: str) -> dict[str, float]:
        from ntkbench.studies.base import programs

        flops = programs.engine_flops(self._network, self._x) if name == OURS else programs.flops(self._program(name))
        return {"flops": flops, "flops_per_entry": flops / (len(self._x) * self._outputs) ** 2}

    def _seconds(self, name: str) -> dict[str, Any]:
        from ntkbench.studies.base import programs

        settings = self._settings
        of_both = operations.FORWARD_AND_BACKWARD * self._forward_flops
        settings.limits.check_operations(of_both * settings.samples * self._outputs)
        if name == OURS:
            return programs.timed_engine(self._network, self._x, settings.target(), settings.calls)
        weights = {key: w.detach().numpy() for key, w in self._network.named_parameters()}
        target = settings.target("jax")
        return programs.timed_program(self._program(name), weights, self._x, target, settings.limits, settings.calls)

    def _program(self, name: str) -> Any:
        """neural-tangents' program for these shapes, lowered once."""
        from ntkbench.studies.base import programs

        def lowered() -> Any:
            return programs.lowered(name, self._architecture.forward, self._shapes, self._x.shape)

        return self._lowered.setdefault(name, base.Once(lowered))()

    @functools.cached_property
    def _network(self) -> nn.Module:
        """The network with its weights, which only tracing and running it need."""
        from ntkbench.networks import initialisation

        return initialisation.seeded(lambda: self._architecture.make(self._outputs), 0)
