"""Base classes of methods: what they share, and what a new one implements."""

from ntkbench.methods.base.deterministic import Deterministic
from ntkbench.methods.base.method import KINDS, Method, PreparedProblem
from ntkbench.methods.base.stochastic import (
    WORTH,
    Accumulating,
    ExactIsCheaper,
    FixedBudget,
    GivenUp,
    Incremental,
    Ledger,
    OthersAreCheaper,
    Stochastic,
    Stopping,
)

__all__ = [
    "KINDS",
    "WORTH",
    "Accumulating",
    "Deterministic",
    "ExactIsCheaper",
    "FixedBudget",
    "GivenUp",
    "Incremental",
    "Ledger",
    "Method",
    "OthersAreCheaper",
    "PreparedProblem",
    "Stochastic",
    "Stopping",
]
