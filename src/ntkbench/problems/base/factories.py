"""Problems of user functions that a configuration names; see :func:`ntkbench.factory.as_problems`."""

from __future__ import annotations

from ntkbench.factory import make
from ntkbench.problems.base import Definition
from ntkbench.problems.base.calls import as_module


def definition(factory: str, folder: str) -> Definition:
    """The untrained problem of a factory.

    Args:
        factory: ``module:function``.
        folder: where its module is looked for.

    Raises:
        BadInput: there is no such function, or what it returns cannot be used.
    """
    made = make(factory, folder)
    module, x = as_module(made.model, made.inputs, made.call)
    return Definition(module, x.detach().cpu().numpy(), None)
