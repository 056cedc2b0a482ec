"""Where and how often to measure: settings that a configuration gives for all, and that a study may override."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any, ClassVar, Literal

from pydantic import Field, PositiveInt, ValidationInfo, field_validator

from ntkbench import ambient
from ntkbench.errors import BadInput, Unavailable
from ntkbench.measure.limits import Limits
from ntkbench.measure.schema import Strict
from ntkbench.options import Target

OF_TARGET = ("device", "dtype", "limits.block_mb")
"""Settings that determine :meth:`Settings.target`."""
OPTIONAL = (
    *OF_TARGET,
    *("seeds", "calls", "limits.passes", "limits.gigaflop", "limits.patience_s", "limits.times_exact"),
)
"""Settings that not every study uses. The others have an effect on every study."""


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

    USES: ClassVar[tuple[str, ...]] = OPTIONAL
    """The settings among :data:`OPTIONAL` that have an effect. The others keep their defaults, and are not accepted."""

    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: PositiveInt = Field(default=2, validate_default=True)
    limits: Limits = Limits()
    seeds: PositiveInt = 20
    calls: PositiveInt = 5

    @field_validator("device", "dtype", "limits", "seeds", "calls", mode="before")
    @classmethod
    def _has_an_effect(cls, given: Any, info: ValidationInfo) -> Any:
        inside: Iterable[str] = given if isinstance(given, dict) else getattr(given, "model_fields_set", ())
        for setting in (info.field_name, *(f"{info.field_name}.{name}" for name in inside)):
            if setting in OPTIONAL and setting not in cls.USES:
                raise BadInput(f"{setting} has no effect on this study")
        return given

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

    @classmethod
    def inherited(cls, common: Settings) -> dict[str, Any]:
        """The settings of a configuration that have an effect here."""
        made = common.model_dump(include=set(Settings.model_fields))
        for setting in set(OPTIONAL) - set(cls.USES):
            outer, _, name = setting.rpartition(".")
            del (made[outer] if outer else made)[name]
        return made

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
