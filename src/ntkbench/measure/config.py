"""The configuration file of a run: its keys, what they may be, and one line for each that cannot be used."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ntkbench import methods, paths, problems, registry
from ntkbench.errors import BadInput, Unavailable
from ntkbench.measure.limits import Limits
from ntkbench.metrics import METRICS
from ntkbench.metrics import check as check_metric
from ntkbench.options import Target


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True)


class Block(_Strict):
    """A rectangle of the grid: every problem x method x metric (x budget, where a method takes one).

    ``backends: plain`` runs each method on the first of its backends, ``all`` on each.
    """

    problems: list[str] = Field(min_length=1)
    methods: list[str] = Field(default_factory=methods.names, min_length=1)
    metrics: list[str] = Field(default=list(METRICS), min_length=1)
    passes: list[PositiveInt] = Field(default=[], description="budgets of the methods that take one")
    seeds: PositiveInt | None = Field(default=None, description="in place of the configuration's")
    calls: PositiveInt | None = Field(default=None, description="in place of the configuration's")
    backends: Literal["plain", "all"] = "plain"

    @field_validator("problems")
    @classmethod
    def _problems_exist(cls, labels: list[str]) -> list[str]:
        for label in labels:
            problems.check(label)
        return labels

    @field_validator("methods", "metrics", mode="before")
    @classmethod
    def _all_means_all(cls, names: Any, field: ValidationInfo) -> Any:
        if names == "all":
            return methods.names() if field.field_name == "methods" else list(METRICS)
        return names

    @field_validator("methods", "metrics")
    @classmethod
    def _names_exist(cls, names: list[str], field: ValidationInfo) -> list[str]:
        for name in names:
            methods.get(name) if field.field_name == "methods" else check_metric(name)
        return names

    @model_validator(mode="after")
    def _budgets_for_those_that_take_one(self) -> Self:
        takers = [name for name in self.methods if methods.get(name).takes_passes]
        if takers and not self.passes:
            raise BadInput(f"passes is empty, but {', '.join(takers)} need a list of positive budgets")
        return self


SHARED = ("device", "dtype", "threads", "limits", "seeds", "calls")
"""Keys of a configuration that hold for its studies as well, unless a study has its own."""


class Config(_Strict):
    """A whole configuration file; see ``config/default.yaml`` for what each key means."""

    profile: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="results go to results/<profile>")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: PositiveInt = 2
    limits: Limits = Limits()
    seeds: PositiveInt = Field(default=20, description="probes' seeds of a stochastic method, each an estimate")
    calls: PositiveInt = Field(default=5, description="timed calls, after one that is not timed")
    shards: PositiveInt = Field(default=1, description="runs of asv that the grid's cells are dealt out to")
    retry: Literal["none", "failed"] = Field(default="none", description="measure again what failed in passing")
    grid: list[Block] = Field(description="may be empty, where there are studies")
    studies: dict[str, dict[str, Any]] = Field(default={}, description="sizes of each study, by its name")
    source: Literal["measured", "reference"] = "measured"

    @model_validator(mode="after")
    def _something_is_measured(self) -> Self:
        if not self.grid and not self.studies:
            raise BadInput("grid and studies are both empty: nothing would be measured")
        return self

    @field_validator("threads")
    @classmethod
    def _threads_exist(cls, threads: int) -> int:
        if threads > len(os.sched_getaffinity(0)):
            raise BadInput(f"this process may use {len(os.sched_getaffinity(0))} cores")
        return threads

    @field_validator("device")
    @classmethod
    def _device_exists(cls, device: str) -> str:
        if device == "cuda":
            from ntkbench import operators

            try:
                operators.device_name(Target(device="cuda"))
            except Unavailable as error:
                raise BadInput(str(error)) from None
        return device

    @field_validator("studies")
    @classmethod
    def _studies_exist(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            registry.room("study").get(name)
        return given

    @classmethod
    def check(cls, raw: Mapping[str, Any], file: str | Path) -> Self:
        """Validate what was read from a file.

        Raises:
            BadInput: one line for each thing that is wrong, naming the file, the key, the value and what is allowed.
        """
        try:
            config = cls.model_validate(dict(raw))
        except ValidationError as error:
            raise BadInput("\n".join(_explain(e, file) for e in error.errors())) from None
        said = []
        for name in config.studies:
            try:
                config.study(name)
            except ValidationError as error:
                said += [_explain(e | {"loc": ("studies", name, *e["loc"])}, file) for e in error.errors()]
        if said:
            raise BadInput("\n".join(said))
        return config

    @classmethod
    def read(cls, file: Path) -> Self:
        """Read and validate a file.

        Raises:
            BadInput: the file is no YAML, or something in it is wrong; names the file and the place in it.
        """
        try:
            raw = yaml.safe_load(file.read_text())
        except yaml.YAMLError as error:
            where = getattr(error, "problem_mark", None)
            place = f" line {where.line + 1}, column {where.column + 1}:" if where else ""
            what = getattr(error, "problem", None) or str(error).splitlines()[0]
            raise BadInput(f"{file}:{place} malformed YAML: {what}") from None
        if not isinstance(raw, dict):
            raise BadInput(f"{file}: keys and values expected ({', '.join(cls.model_fields)}), got {raw!r}")
        return cls.check(raw, file)

    def target(self, backend: str) -> Target:
        """Where this configuration runs a backend."""
        return Target(backend, self.dtype, self.device, self.limits.block_bytes, self.limits.memory_bytes)

    @property
    def folder(self) -> str:
        """The folder below ``results`` that is written to."""
        return self.profile if self.source == "measured" else f"{self.profile}_{self.source}"

    def tables(self, results: Path) -> Path:
        """The folder with the tables that figures are drawn from: the run's own, or the committed ones.

        Raises:
            BadInput: no tables of this profile are committed.
        """
        if self.source == "measured":
            return results
        kept = {file.parent.name for file in paths.REFERENCE.glob("*/table.csv")}
        kept |= {file.parent.parent.name for file in paths.REFERENCE.glob("*/studies/*.csv")}
        if self.profile not in kept:
            raise BadInput(
                f"source: 'reference': no measured tables of the profile {self.profile!r} are kept; "
                f"allowed: measured, or one of the profiles {', '.join(sorted(kept))}"
            )
        return paths.REFERENCE / self.profile

    def study(self, name: str) -> BaseModel:
        """The settings of a study: its own, and this configuration's where it says nothing."""
        own = dict(self.studies[name])
        settings = registry.room("study").get(name).Settings
        common = {key: getattr(self, key) for key in settings.model_fields if key in SHARED}
        if isinstance(given := own.get("limits"), dict):
            own["limits"] = self.limits.model_dump() | given
        return settings.model_validate(common | own)


def _explain(error: Mapping[str, Any], file: str | Path) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        fields = Block.model_fields if "grid" in error["loc"] else Config.model_fields
        if error["loc"][0] == "studies":
            fields = registry.room("study").get(error["loc"][1]).Settings.model_fields
        return f"{file}: {key}: no such key; allowed: {', '.join(fields)}"
    if error["type"] == "missing":
        return f"{file}: {key}: missing, it must be given"
    given = "" if isinstance(error["input"], dict) else f" {error['input']!r}:"
    return f"{file}: {key}:{given} {error['msg'].removeprefix('Value error, ')}"


def write(config: Config, file: Path) -> Path:
    """Write a configuration, defaults filled in, unless the file says just that already; the file."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    if not file.exists() or file.read_text() != text:
        paths.write_atomically(file, text)
    return file
