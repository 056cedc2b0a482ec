"""Building blocks of configurations: strict models, and names of problems, methods and metrics."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, field_validator

from ntkbench import methods, problems
from ntkbench.errors import BadInput
from ntkbench.metrics import check_any


class Strict(BaseModel):
    """A model that neither converts nor drops values.

    It rejects unknown keys, numbers as text, ``true`` for 1, infinity, NaN, and duplicate values in a list.
    """

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*")
    @classmethod
    def _each_once(cls, value: Any) -> Any:
        for one in value.values() if isinstance(value, dict) else [value]:
            seen = set()
            for item in one if isinstance(one, list) else ():
                if isinstance(item, str | int | float):
                    if item in seen:
                        raise ValueError(f"{item!r} is given twice")
                    seen.add(item)
        return value


def _known_method(name: str) -> str:
    methods.get(name)
    return name


def _known_metric(name: str) -> str:
    check_any(name)
    return name


ProblemLabel = Annotated[str, AfterValidator(problems.check)]
"""Label of a problem in its canonical spelling."""
MethodName = Annotated[str, AfterValidator(_known_method)]
MetricName = Annotated[str, AfterValidator(_known_metric)]


def check_probes(numbers: list[int], names: Iterable[str]) -> list[int]:
    """Numbers of probes, checked to be large enough for some stochastic methods.

    Raises:
        BadInput: one of them is too small.
    """
    for name in names:
        if min(numbers) < (fewest := methods.stochastic(name).fewest_probes):
            raise BadInput(f"{min(numbers)} is too small: {name} takes at least {fewest}")
    return numbers
