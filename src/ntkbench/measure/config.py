"""The configuration file of a run: its keys, their allowed values, and one line for each invalid value."""

from __future__ import annotations

import difflib
import inspect
import json
import re
import reprlib
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, Self, get_args

import yaml
from pydantic import (
    AfterValidator,
    Field,
    PositiveInt,
    PrivateAttr,
    ValidationError,
    ValidationInfo,
    field_validator,
    model_validator,
)

from ntkbench import factory, methods, paths, registry
from ntkbench.errors import BadInput, unknown
from ntkbench.measure import outcomes, yaml_reader
from ntkbench.measure.schema import MethodName, MetricName, ProblemLabel, Strict
from ntkbench.measure.settings import Settings
from ntkbench.measure.yaml_reader import Place
from ntkbench.metrics import METRICS

COMMAND_LINE = "--config"
"""Replaces file and line in messages about a value from the command line."""
OCCUPIED = ("reference", "cache", "asv", "asv-html", "asv-isolated")
"""Folders below ``results`` that belong to no profile."""


class Block(Strict):
    """A rectangle of the grid: every problem x method x metric (x budget, where a method takes one).

    Attributes:
        problems: labels.
        methods: names, or ``all``.
        metrics: names, or ``all`` that are functions of moments.
        passes: budgets of the methods that take one.
        seeds: overrides the configuration's.
        calls: overrides the configuration's.
        backends: ``plain`` runs each method on the first of its backends, ``all`` on each.
    """

    problems: list[ProblemLabel] = Field(min_length=1)
    methods: list[MethodName] = Field(default_factory=methods.names, min_length=1)
    metrics: list[MetricName] = Field(default=list(METRICS), min_length=1)
    passes: list[PositiveInt] = Field(default=[])
    seeds: PositiveInt | None = None
    calls: PositiveInt | None = None
    backends: Literal["plain", "all"] = "plain"

    @field_validator("methods", "metrics", mode="before", json_schema_input_type=Literal["all"] | list[str])
    @classmethod
    def _all_means_all(cls, names: Any, field: ValidationInfo) -> Any:
        if names == "all":
            return methods.names() if field.field_name == "methods" else list(METRICS)
        return names

    @model_validator(mode="after")
    def _has_cells(self) -> Self:
        chosen = [methods.get(name) for name in self.methods]
        takers = [method.name for method in chosen if method.takes_passes]
        if takers and not self.passes:
            raise BadInput(f"passes: empty, but {', '.join(takers)} need a list of positive budgets")
        if not any(set(method.given) & set(self.metrics) for method in chosen):
            raise BadInput(f"no method of this block gives {' or '.join(self.metrics)}, so it has no cells")
        return self


def _own_folder(profile: str) -> str:
    if not re.fullmatch("[a-z0-9][a-z0-9_-]{0,63}", profile):
        raise BadInput("allowed: up to 64 of a-z, 0-9, _ and -, a letter or a digit first")
    if profile in OCCUPIED or profile.endswith("_reference"):
        raise BadInput(f"taken; allowed: names other than {', '.join(OCCUPIED)} that do not end in _reference")
    return profile


def _settings_of(study: str) -> type[Settings]:
    """The model of a study's settings.

    Raises:
        BadInput: no such study.
    """
    return registry.of("study").get(study).Settings


def _known_study(name: str) -> str:
    _settings_of(name)
    return name


Profile = Annotated[str, AfterValidator(_own_folder)]
StudyName = Annotated[str, AfterValidator(_known_study)]


class Config(Settings):
    """A whole configuration; ``config/default.yaml`` explains each key.

    Attributes:
        profile: results go to ``results/<profile>``.
        shards: number of asv runs among which the grid's cells are divided, by problem and method.
        job_h: maximum number of hours to request from a cluster's scheduler for one job.
        retry: ``failed`` measures cells and rows again that failed, timed out, ran out of memory, or lacked their data.
        factories: problems of the user's own functions, ``module:function`` by name; the grid and the studies may use
            these names. See :func:`ntkbench.factory.as_problems`.
        grid: may be empty if there are studies.
        studies: settings of each study, by name; settings that a study does not give are the configuration's.
        source: ``reference`` draws figures from the committed tables of the profile, and measures nothing.
    """

    profile: Profile
    shards: int = Field(default=1, ge=1, le=1000)
    job_h: float = Field(default=24, gt=0, le=10_000)
    retry: Literal["none", "failed"] = "none"
    factories: dict[str, str] = Field(default={})  # before what uses their names
    grid: list[Block]
    studies: dict[StudyName, dict[str, Any]] = Field(default={})
    source: Literal["measured", "reference"] = "measured"
    _here: bool = PrivateAttr(default=True)

    @field_validator("factories")
    @classmethod
    def _are_problems(cls, factories: dict[str, str]) -> dict[str, str]:
        if factories:
            factory.as_problems(factories)
        return factories

    @model_validator(mode="after")
    def _something_is_measured(self) -> Self:
        if not self.grid and not self.studies:
            raise BadInput("grid and studies are both empty: nothing would be measured")
        return self

    @classmethod
    def read(cls, file: Path, here: bool = True) -> Self:
        """The configuration in one file; see :meth:`of_files`."""
        return cls.of_files([file], here=here)

    @classmethod
    def of_run(
        cls,
        files: Sequence[Path],
        overrides: Mapping[str, Any] | None = None,
        here: bool = True,
        default: Path | None = None,
    ) -> Self:
        """The configuration of a run: :meth:`of_files`, where files without a grid override keys of ``default``.

        Args:
            files, overrides, here: as in :meth:`of_files`.
            default: a whole configuration, by default ``config/default.yaml`` in the checkout.

        Raises:
            BadInput: as :meth:`of_files`.
            Unavailable: there is no grid, and ntkbench is not in a checkout.
        """
        if not is_whole(files, overrides):
            default = default or paths.checkout("a configuration without a grid") / "config" / "default.yaml"
            files = [default, *files]
        return cls.of_files(files, overrides, here)

    @classmethod
    def of_files(cls, files: Sequence[Path], overrides: Mapping[str, Any] | None = None, here: bool = True) -> Self:
        """The configuration from files and the command line.

        Later files override earlier ones, and ``overrides`` overrides all files. Mappings are merged key by key; other
        values are replaced.

        Args:
            files: YAML files.
            overrides: values from the command line, as Snakemake parses them.
            here: whether this machine measures, so that it must have the cores and the device.

        Raises:
            BadInput: one line for each error, which names file and line, key, value and what is allowed.
        """
        raw: dict[str, Any] = {}
        where: dict[Place, str] = {}
        for file in files:
            values, lines = yaml_reader.read(Path(file))
            _merge(raw, values, where)
            where |= {place: f"{file}:{line}" for place, line in lines.items()}
        given = _parsed(overrides or {})
        _merge(raw, given, where)
        where |= dict.fromkeys(_places(given), COMMAND_LINE)
        return cls.check(raw, ", ".join(map(str, files)), where, here)

    @classmethod
    def check(cls, raw: object, source: str, where: Mapping[Place, str] | None = None, here: bool = True) -> Self:
        """Validate keys and values.

        Args:
            raw: the keys and values.
            source: where they come from, for messages.
            where: where single values come from, by their places.
            here: as in :meth:`of_files`.

        Raises:
            BadInput: as :meth:`of_files`.
        """
        where = where or {}
        wrong: list[str] = []
        try:
            config = cls.model_validate(raw, context={"here": here})
            config._here = here
        except ValidationError as error:
            raise BadInput("\n".join(_explained(error, (), source, where))) from None
        for name in config.studies:
            try:
                config.study(name)
            except ValidationError as error:
                wrong += _explained(error, ("studies", name), source, where)
            except Exception as error:  # a study is a plug-in: its checks may fail in any way
                wrong.append(_line(("studies", name), "", outcomes.of_exception(error).reason, source, where))
        if wrong:
            raise BadInput("\n".join(wrong))
        return config

    @property
    def folder(self) -> str:
        """The folder below ``results`` that is written to."""
        return self.profile if self.source == "measured" else f"{self.profile}_{self.source}"

    def tables(self, results: Path) -> Path:
        """The folder with the tables that figures are drawn from: the run's own, or the committed ones.

        Raises:
            BadInput: no tables of this profile are committed.
            Unavailable: committed tables are asked for, and ntkbench is not in a checkout.
        """
        if self.source == "measured":
            return results
        paths.checkout("source: 'reference'")
        kept = {file.parent.name for file in paths.REFERENCE.glob("*/table.csv")}
        kept |= {file.parent.parent.name for file in paths.REFERENCE.glob("*/studies/*.csv")}
        if self.profile not in kept:
            raise BadInput(
                f"source: 'reference': no measured tables of the profile {self.profile!r} are committed; "
                f"allowed: measured, or one of the profiles {', '.join(sorted(kept))}"
            )
        return paths.REFERENCE / self.profile

    def study(self, name: str) -> Settings:
        """The settings of a study: its own, and this configuration's where it gives none."""
        model, own = _settings_of(name), dict(self.studies[name])
        common = model.inherited(self)
        if isinstance(given := own.get("limits"), dict):
            own["limits"] = common["limits"] | given
        return model.model_validate(common | own, context={"here": self._here})


def is_whole(files: Sequence[Path], overrides: Mapping[str, Any] | None = None) -> bool:
    """Whether files or the command line give a grid; otherwise they override keys of another configuration.

    Raises:
        BadInput: a file cannot be read.
    """
    return "grid" in (overrides or {}) or any("grid" in yaml_reader.read(Path(file))[0] for file in files)


def write(config: Config, file: Path) -> Path:
    """Write a configuration with its defaults, unless the file already holds exactly that; returns the file."""
    text = yaml.safe_dump(config.model_dump(), sort_keys=False)
    if not file.exists() or file.read_bytes() != text.encode("utf-8"):
        paths.write_atomically(file, text)
    return file


def schema() -> str:
    """The JSON schema of configurations, with a final newline.

    It covers keys, types and ranges. :meth:`Config.check` checks names of plug-ins and settings of studies.
    """
    made = {"$schema": "https://json-schema.org/draft/2020-12/schema", **Config.model_json_schema()}
    return json.dumps(made, indent=2, ensure_ascii=False) + "\n"


def _merge(into: dict[str, Any], values: Mapping[str, Any], where: dict[Place, str], top: Place = ()) -> None:
    """Merge values into others, and drop the origins of replaced values from ``where``."""
    for key, value in values.items():
        place = (*top, key)
        if isinstance(value, dict) and isinstance(into.get(key), dict):
            _merge(into[key], value, where, place)
        else:
            into[key] = value
            for old in [known for known in where if known[: len(place)] == place]:
                del where[old]


def _parsed(value: Any, place: Place = ()) -> Any:
    """Parse text within lists and mappings; Snakemake parses only single values of the command line."""
    if isinstance(value, Mapping):
        return {key: _parsed(below, (*place, key)) for key, below in value.items()}
    if isinstance(value, list | tuple):
        return [_parsed(below, (*place, i)) for i, below in enumerate(value)]
    if isinstance(value, str) and len(place) > 1:
        try:
            return yaml_reader.scalar(value)
        except ValueError as error:
            raise BadInput(f"{COMMAND_LINE}: {_joined(place)}: {error}") from None
    return value


def _places(value: Any, place: Place = ()) -> Iterator[Place]:
    yield place
    below = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, inner in below:
        yield from _places(inner, (*place, key))


def _explained(error: ValidationError, top: Place, source: str, where: Mapping[Place, str]) -> list[str]:
    """One line for each error."""
    lines: list[str] = []
    for one in error.errors(include_url=False):
        place = (*top, *(part for part in one["loc"] if part != "[key]"))
        lines.append(_line(place, _value(one), _message(one, place), source, where))
    return lines


def _line(place: Place, value: str, message: str, source: str, where: Mapping[Place, str]) -> str:
    """The line for one error, with the closest known line of a file."""
    known = next((where[place[:size]] for size in range(len(place), 0, -1) if place[:size] in where), source)
    return ": ".join(_printable(part) for part in (known, _joined(place), value, message) if part)


def _joined(place: Place) -> str:
    return "".join(f"[{part}]" if isinstance(part, int) else f".{part}" for part in place).removeprefix(".")


def _value(error: Mapping[str, Any]) -> str:
    shown = not isinstance(error["input"], Mapping | Strict) and error["type"] not in ("missing", "extra_forbidden")
    return _REPR.repr(error["input"]) if shown else ""


def _message(error: Mapping[str, Any], place: Place) -> str:
    match error["type"]:
        case "extra_forbidden":
            return str(unknown("key", place[-1], _keys_beside(place)))
        case "missing":
            return "missing; it must be given"
        case "literal_error":
            words = re.findall("'([^']*)'", error["ctx"]["expected"])
            close = difflib.get_close_matches(str(error["input"])[:80], words, n=1)
            return f"allowed: {error['ctx']['expected']}" + (f" (did you mean {close[0]!r}?)" if close else "")
        case "model_type":
            return "keys with values expected"
    return error["msg"].removeprefix("Value error, ")


def _keys_beside(place: Place) -> Collection[str]:
    """Keys of the model that an unknown key was found in."""
    model: type[Strict] = Config
    if place[0] == "studies":
        model, place = _settings_of(str(place[1])), place[2:]
    for part in place[:-1]:
        if part in model.model_fields:
            model = next(_models(model.model_fields[str(part)].annotation))
    return model.model_fields


def _models(annotation: Any) -> Iterator[type[Strict]]:
    """Models in an annotation such as ``list[Block]``."""
    if inspect.isclass(annotation) and issubclass(annotation, Strict):
        yield annotation
    for part in get_args(annotation):
        yield from _models(part)


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode("ascii") for c in text)


_REPR = reprlib.Repr()
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 80
_REPR.maxlist = _REPR.maxdict = 8
