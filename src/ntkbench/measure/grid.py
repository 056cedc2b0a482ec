"""From a configuration to cells: what is measured, and what is left out and why."""

from __future__ import annotations

import functools
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Self

import yaml
from pydantic import (
    BaseModel,
    ConfigDict,
    Field,
    PositiveFloat,
    PositiveInt,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ntkbench import methods, paths, problems, studies
from ntkbench.errors import BadInput, Unavailable
from ntkbench.metrics import METRICS
from ntkbench.metrics import check as check_metric
from ntkbench.options import Target
from ntkbench.problem import Problem


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


class Config(_Strict):
    """A whole configuration file; see ``config/default.yaml`` for what each key means."""

    profile: str = Field(pattern=r"^[A-Za-z0-9_-]+$", description="results go to results/<profile>")
    device: Literal["auto", "cpu", "cuda"] = "auto"
    dtype: Literal["float32", "float64"] = "float32"
    threads: PositiveInt = 2
    block_memory_mb: PositiveFloat = 1024
    memory_limit_mb: PositiveFloat = 6144
    time_limit_s: PositiveFloat = 60
    max_passes: PositiveInt = 20_000
    seeds: PositiveInt = 20
    error_seconds: PositiveFloat = 5
    timing_seconds: PositiveFloat = 1
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
            from ntkbench.operators import torch as torch_backend

            try:
                torch_backend.device(Target(device="cuda"))
            except Unavailable as error:
                raise BadInput(str(error)) from None
        return device

    @field_validator("studies")
    @classmethod
    def _studies_exist(cls, given: dict[str, Any]) -> dict[str, Any]:
        for name in given:
            studies.plugins_of(name)
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
        return Target(backend, self.dtype, self.device, int(self.block_memory_mb * 2**20))

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

    def study(self, name: str) -> studies.base.Settings:
        """The settings of a study: its own, and this configuration's where it says nothing."""
        common = {key: getattr(self, key) for key in studies.base.Settings.model_fields}
        return studies.settings(name, common | self.studies[name])


def _explain(error: Mapping[str, Any], file: str | Path) -> str:
    key = "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in error["loc"]).lstrip(".")
    if error["type"] == "extra_forbidden":
        fields = Block.model_fields if "grid" in error["loc"] else Config.model_fields
        if error["loc"][0] == "studies":
            fields = studies.fields(error["loc"][1])
        return f"{file}: {key}: no such key; allowed: {', '.join(fields)}"
    if error["type"] == "missing":
        return f"{file}: {key}: missing, it must be given"
    given = "" if isinstance(error["input"], dict) else f" {error['input']!r}:"
    return f"{file}: {key}:{given} {error['msg'].removeprefix('Value error, ')}"


@dataclass(frozen=True)
class Cell:
    """One thing to measure, and one row of the table."""

    problem: str
    method: str
    backend: str
    metric: str
    passes: int | None

    @property
    def label(self) -> str:
        """``problem/method/backend/metric[/passes]``, by which asv and the records know the cell."""
        return "/".join(
            str(part) for part in (self.problem, self.method, self.backend, self.metric, self.passes) if part
        )

    @classmethod
    def from_label(cls, label: str) -> Self:
        """The cell of a label."""
        problem, method, backend, metric, *passes = label.split("/")
        return cls(problem, method, backend, metric, int(passes[0]) if passes else None)


def cells(config: Config) -> list[Cell]:
    """All cells of a configuration, each once, sorted by method, problem, metric and budget."""
    found = {
        Cell(problem, name, backend, metric, passes)
        for block in config.grid
        for problem in block.problems
        for name in block.methods
        for metric in block.metrics
        for backend in methods.get(name).backends[: 1 if block.backends == "plain" else None]
        for passes in (block.passes if methods.get(name).takes_passes else [None])
        # A metric that a method never gives is no cell; one that it cannot give *here* is a row with its reason.
        if metric in methods.get(name).metrics
    }
    order = {metric: i for i, metric in enumerate(METRICS)}
    return sorted(found, key=lambda c: (c.method, c.backend, c.problem, order[c.metric], c.passes or 0))


def refusal(cell: Cell, problem: Problem, config: Config) -> str | None:
    """Why a cell is left out, known before anything is run; ``None`` if it is to be measured."""
    method, target = methods.get(cell.method), config.target(cell.backend)
    reason = method.refusal(problem, cell.metric, target, cell.passes)
    if reason:
        return reason
    passes = cell.passes or method.passes_needed(problem, cell.metric, target)
    if passes and passes > config.max_passes:
        return f"would take {passes:,.0f} passes, over max_passes ({config.max_passes:,})"
    needed, limit = method.bytes_needed(problem, cell.metric, target, cell.passes), config.memory_limit_mb * 2**20
    if needed > limit:
        return f"would hold {needed / 2**30:.1f} GiB at once, over memory_limit_mb ({limit / 2**30:.1f} GiB)"
    return None


def write(config: Config, file: Path) -> Path:
    """Write a configuration, defaults filled in, unless the file says just that already; the file."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    if not file.exists() or file.read_text() != text:
        paths.write_atomically(file, text)
    return file


def fingerprint(config: Config, method: str, suite: Path) -> str:
    """Hash of all that a method's measurements depend on: its cells, the settings, and every source file it can reach.

    A changed or new method changes its own fingerprint only; a changed problem or operator changes those that use it.

    Args:
        config: the configuration.
        method: name of the method.
        suite: the folder of the measuring code.
    """
    chosen = [cell for cell in cells(config) if cell.method == method]
    settings = json.dumps(
        [config.model_dump(exclude={"grid", "profile", "studies", "source"}), [cell.label for cell in chosen]]
    )
    files = {Path(problems.source_file(cell.problem)) for cell in chosen} | set(suite.glob("*.py"))
    files |= sources(f"ntkbench.methods.{method}", "ntkbench.problems.base.reference", "ntkbench.measure.execution")
    return _hash(files, settings)


def problem_fingerprint(label: str) -> str:
    """Hash of all that a problem's weights and exact values depend on."""
    return _hash({Path(problems.source_file(label))} | sources("ntkbench.problems.base.reference"), label)


def study_fingerprint(config: Config, name: str) -> str:
    """Hash of all that a study's numbers depend on: its settings and every source file it can reach."""
    return _hash(sources(*studies.plugins_of(name)), config.study(name).model_dump_json())


def figure_fingerprint(name: str) -> str:
    """Hash of all that a figure's looks depend on, published values among it."""
    files = sources(f"ntkbench.figures.{name}", "ntkbench.figures.plotting.base")
    files |= {*Path(__file__).parent.glob("../figures/plotting/*.mplstyle"), *paths.PUBLISHED.glob("*.csv")}
    return _hash(files, name)


def sources_fingerprint(*modules: str) -> str:
    """Hash of modules and all that they import."""
    return _hash(sources(*modules), "")


def _hash(files: Iterable[Path], settings: str) -> str:
    digest = hashlib.sha256(settings.encode())
    for file in sorted(files):
        digest.update(file.name.encode() + file.read_bytes())
    return digest.hexdigest()[:16]


def sources(*modules: str) -> set[Path]:
    """Files of this package that modules import, at the top or in a function, directly or not; their own among them.

    The plug-in rooms load their files by name, which no import statement shows; the backends' operators are among what
    every method reaches, and the other problems and methods are not.
    """
    graph = _imports()
    roots = {*modules, *graph.find_children("ntkbench.operators")}
    reached = roots.union(*(graph.find_upstream_modules(root) for root in roots))
    folder = Path(__file__).parents[1]
    paths = (folder.joinpath(*name.split(".")[1:]) for name in reached)
    return {path / "__init__.py" if path.is_dir() else path.with_suffix(".py") for path in paths}


@functools.cache
def _imports() -> Any:
    import grimp

    return grimp.build_graph("ntkbench", cache_dir=None)
