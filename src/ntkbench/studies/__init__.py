"""Studies: measurements for figures that the grid's single table cannot hold.

Each study is one file. A file in this folder can be named under ``studies`` in a configuration. Its table is then
measured into ``results/<profile>/studies/<name>.csv``, from which figures with ``TABLE = "<name>"`` are drawn. The file
holds

- ``Settings``: a :class:`ntkbench.studies.base.Settings` with the study's sizes, by default those of the paper.
  ``USES`` names the shared settings that have an effect, such as ``seeds``. The others are refused, and their defaults
  say what the study does, such as ``dtype: Literal["float64"] = "float64"``;
- ``run(settings) -> pandas.DataFrame``: a tidy table with one row per measurement and no provenance columns, built by
  :func:`ntkbench.studies.base.table` from :func:`ntkbench.studies.base.row`;
- ``TIMED`` (optional): ``False`` if no column holds seconds, so that the study may run beside others, and resume on
  another machine;
- ``PLUGINS`` (optional): modules that it loads by name, such as ``"ntkbench.methods.hutchpp"``; the study runs again if
  their sources change;
- ``DATA`` (optional): data files, by the value of a setting that selects them; the study runs again if they change.

Importing a study does not start a backend.
"""

from __future__ import annotations

import importlib.util
import inspect
from collections.abc import Mapping
from types import ModuleType
from typing import TYPE_CHECKING, Any

from ntkbench import registry
from ntkbench.measure.settings import OPTIONAL
from ntkbench.registry import Fault, Source
from ntkbench.studies import base

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["REGISTRY", "base", "describe", "fields", "is_timed", "names", "plugins_of", "run", "settings"]


def names() -> list[str]:
    """Names of all studies that work; imports all of them."""
    return REGISTRY.names()


def settings(name: str, given: Mapping[str, Any]) -> base.Settings:
    """A study's settings, checked.

    Args:
        name: name of the study.
        given: values of its settings: its sizes, and where it runs.

    Raises:
        BadInput: there is no such study, or it is broken.
        pydantic.ValidationError: a setting cannot be used.
    """
    return REGISTRY.get(name).Settings.model_validate(dict(given))


def describe(name: str) -> str:
    """First line of a study's docstring."""
    return registry.first_line(REGISTRY.get(name))


def fields(name: str) -> list[str]:
    """Names of a study's settings."""
    return list(REGISTRY.get(name).Settings.model_fields)


def plugins_of(name: str) -> tuple[str, ...]:
    """Modules whose sources a study depends on, its own first."""
    return (f"{__name__}.{name}", *getattr(REGISTRY.get(name), "PLUGINS", ()))


def is_timed(name: str) -> bool:
    """Whether any column of a study's table holds seconds, so that nothing else should run at the same time.

    The study is not imported.

    Raises:
        BadInput: there is no such study, or it is broken.
    """
    return Source.read(REGISTRY.file(name)).literal("TIMED") is not False


def run(name: str, chosen: base.Settings) -> pd.DataFrame:
    """Measure a study in this process; returns its table, without the columns of provenance.

    Args:
        name: name of the study.
        chosen: its settings.
    """
    return REGISTRY.get(name).run(chosen)


def _find(source: Source) -> Mapping[str, int]:
    """The study, if its source shows no fault; does not import it."""
    source.literal("TIMED")
    return registry.one_a_file(source)


def _checked(source: Source, module: ModuleType, name: str) -> ModuleType:
    if not (module.__doc__ or "").strip():
        raise Fault("has no docstring")
    settings = getattr(module, "Settings", None)
    if not (inspect.isclass(settings) and issubclass(settings, base.Settings)):
        raise Fault("Settings must be a subclass of ntkbench.studies.base.Settings", source.line("Settings"))
    if wrong := sorted(set(settings.USES) - set(OPTIONAL)):
        raise Fault(f"Settings.USES: unknown {wrong[0]!r}; allowed: {', '.join(OPTIONAL)}", source.line("Settings"))
    run = getattr(module, "run", None)
    if not callable(run):
        raise Fault("defines no run(settings)", source.line("run"))
    try:
        inspect.signature(run).bind(settings)
    except TypeError as error:
        raise Fault(f"run must take the settings alone: {error}", source.line("run")) from None
    if not isinstance(getattr(module, "TIMED", True), bool):
        raise Fault(f"TIMED must be True or False; got {module.TIMED!r}", source.line("TIMED"))
    plugins = getattr(module, "PLUGINS", ())
    if not isinstance(plugins, tuple | list) or not all(isinstance(plugin, str) for plugin in plugins):
        raise Fault(f"PLUGINS must be a tuple of names of modules; got {plugins!r}", source.line("PLUGINS"))
    for plugin in plugins:
        if not plugin.startswith("ntkbench.") or importlib.util.find_spec(plugin) is None:
            raise Fault(f"PLUGINS: there is no module {plugin!r}", source.line("PLUGINS"))
    return module


REGISTRY: registry.Registry[ModuleType] = registry.Registry("study", _checked, _find)
