"""Where and how often to measure: settings that a configuration gives for all, and that a study may override."""

from __future__ import annotations

from dataclasses import replace
from typing import Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from ntkbench import ambient
from ntkbench.errors import BadInput, Unavailable
from ntkbench.measure.limits import Limits
from ntkbench.measure.schema import Strict
from ntkbench.options import Target


class Settings(Strict):
    """Settings of a run; a study inherits from the configuration the settings that it does not give.

    This machine must have the cores and the device, unless the validation context says ``{"here": False}``.

    Attributes:
        device: auto, cpu or cuda.
        dtype: precision of timed computations.
        threads: threads of every backend; at most the cores that this process may use.
        limits: limits of one measurement.
        seeds: number of estimates of a stochastic method, each with another seed.
        calls: number of timed calls, after a first one that is timed separately.
    """

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: PositiveInt = Field(default=2, validate_default=True)
    limits: Limits = Limits()
    seeds: PositiveInt = 20
    calls: PositiveInt = 5

    @field_validator("threads")
    @classmethod
    def _threads_exist(cls, threads: int, info: ValidationInfo) -> int:
        if _here(info) and threads > (cores := ambient.cores()):
            raise BadInput(f"more threads than cores; allowed: 1 to {cores}")
        return threads

    @field_validator("device")
    @classmethod
    def _device_exists(cls, device: str, info: ValidationInfo) -> str:
        if device == "cuda" and _here(info):
            from ntkbench import operators

            try:
                operators.check_device(Target(device=device))
            except Unavailable as error:
                raise BadInput(str(error)) from None
        return device

    def target(self, backend: str = "torch", dtype: str | None = None) -> Target:
        """Where these settings run a backend.

        Raises:
            Unavailable: ``device: auto`` is a GPU for PyTorch, and the CPU for the other backend.
        """
        made = Target(backend, dtype or self.dtype, self.device, self.limits.block_bytes, self.limits.memory_bytes)
        if backend != "torch" and self.device == "auto":
            from ntkbench import operators

            if operators.device_name(made) == "cpu" != operators.device_name(replace(made, backend="torch")):
                raise Unavailable(
                    f"{backend} has no GPU here, and PyTorch has one: install it there, or set device: cpu"
                )
        return made


def _here(info: ValidationInfo) -> bool:
    """Whether this machine is the one that measures."""
    return bool((info.context or {}).get("here", True))
