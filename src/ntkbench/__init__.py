"""Metrics of the finite-width Neural Tangent Kernel: published ways of computing them and its own, and what each costs.

``import ntkbench`` loads only this file. Names, and torch with them, are imported when they are first used.
"""

from __future__ import annotations

import importlib
import importlib.metadata
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    __version__: str

    from ntkbench.api import (
        alignment,
        compare,
        effective_rank,
        metrics_of,
        norm,
        ntk,
        recommend,
        solve,
        spectrum,
        trace,
    )
    from ntkbench.errors import BadInput, NtkbenchError, OverMemory, Unavailable
    from ntkbench.estimate import Estimate
    from ntkbench.estimators.solve import Regression, Solution
    from ntkbench.estimators.spectrum import Spectrum
    from ntkbench.kernel import Kernel
    from ntkbench.problems.base.function import from_function
    from ntkbench.problems.base.module import from_module
    from ntkbench.problems.base.sequences import from_recurrent
    from ntkbench.tracking import Tracker

__all__ = [
    "BadInput",
    "Estimate",
    "Kernel",
    "NtkbenchError",
    "OverMemory",
    "Regression",
    "Solution",
    "Spectrum",
    "Tracker",
    "Unavailable",
    "__version__",
    "alignment",
    "compare",
    "effective_rank",
    "from_function",
    "from_module",
    "from_recurrent",
    "metrics_of",
    "norm",
    "ntk",
    "recommend",
    "solve",
    "spectrum",
    "trace",
]

_HOMES = {
    "api": (
        "alignment",
        "compare",
        "effective_rank",
        "metrics_of",
        "norm",
        "ntk",
        "recommend",
        "solve",
        "spectrum",
        "trace",
    ),
    "errors": ("BadInput", "NtkbenchError", "OverMemory", "Unavailable"),
    "estimate": ("Estimate",),
    "estimators.solve": ("Regression", "Solution"),
    "estimators.spectrum": ("Spectrum",),
    "kernel": ("Kernel",),
    "problems.base.function": ("from_function",),
    "problems.base.module": ("from_module",),
    "problems.base.sequences": ("from_recurrent",),
    "tracking": ("Tracker",),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.metadata.version(__name__)
    for home, names in _HOMES.items():
        if name in names:
            value = getattr(importlib.import_module(f"{__name__}.{home}"), name)
            globals()[name] = value  # looked up only once
            return value
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
