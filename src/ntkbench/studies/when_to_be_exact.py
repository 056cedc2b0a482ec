"""When an exact kernel is cheaper than an estimate: errors and seconds on kernels of prescribed structure.

An exact method takes O passes, one per output. An estimate takes as many as its variance requires. The kernels of
:mod:`ntkbench.studies.base.prescribed` set O, the effective rank of a sample's block and the share of ||Theta||_F^2
between samples independently, and the module derives the variances. For the trace and a relative error eps,

    per sample   K = 2 (1 / rank - 1 / O) / (N eps^2)
    pooled       K = 2 (1 / (rank (1 - share)) - 1 / O) / (N eps^2)

passes are needed, so that an exact method takes fewer if N O rank (pooled: N O rank (1 - share)) is below 2 / eps^2:
200 at 10 %, 20,000 at 1 %, 2,000,000 at 0.1 %. Cross-sample terms cost a pooled estimate additional passes, and a
per-sample one none. The norm takes pairs of probes, and follows the same law up to factors of order one.

Exact and per-sample methods run on the same layerwise engine; pooled methods use products with J^T.
XNysTrace represents deflating estimators, whose error depends on the whole spectrum of Theta and has no such law.
"""

from __future__ import annotations

import functools
import math
import zlib
from collections.abc import Iterator
from typing import Annotated, Any

import numpy as np
import pandas as pd
from pydantic import Field, NonNegativeFloat, NonNegativeInt, PositiveInt, model_validator

from ntkbench import methods, metrics
from ntkbench.errors import BadInput, Unavailable
from ntkbench.measure.seeds import Reruns
from ntkbench.measure.timing import timed
from ntkbench.problem import Problem
from ntkbench.studies import base
from ntkbench.studies.base.prescribed import Kernel
from ntkbench.units import counted

TIMED = True
METHODS = {
    "trace": {
        "exact": "structured_derivatives",
        "per-sample": "structured_block_u_statistics",
        "pooled": "one_sided_reverse",
        "deflated": "xnystrace",
    },
    "norm": {
        "exact": "structured_derivatives",
        "per-sample": "structured_block_u_statistics",
        "pooled": "gram_reverse",
    },
}
"""One method of each family for each metric; ``deflated`` ones are pooled too."""
DEFLATED = "deflated"
"""The family without a law of errors."""
PLUGINS = tuple(f"ntkbench.methods.{name}" for name in sorted({n for of in METHODS.values() for n in of.values()}))


class Settings(base.Settings):
    """Kernels and budgets.

    Attributes:
        seeds: number of seeds of an estimator at each budget; all but the first are timed.
        N: samples.
        width, depth: units of each layer, at least N and O; layers between the first one and the readout.
        outputs: O, powers of two.
        ranks: effective ranks of a sample's block; each is used with every O above it.
        shares: parts of ||Theta||_F^2 between samples, up to 1 - 1 / N.
        passes: budgets; those over O are left out, except the first one, since an exact method takes O passes.
        beyond: for families with a law, budgets of up to this many times O are measured too, which small errors need.
            The remaining ones are left out after one whose call took over ``limits.patience_s``.
    """

    USES = (*base.OF_TARGET, "seeds", "calls", "limits.patience_s")

    seeds: int = Field(50, ge=2)
    N: int = Field(32, ge=2)
    width: PositiveInt = 256
    depth: NonNegativeInt = 4
    outputs: list[PositiveInt] = Field(default=[4, 16, 64, 256], min_length=1)
    ranks: list[Annotated[float, Field(ge=1)]] = Field(default=[1.5, 6, 24, 96], min_length=1)
    shares: list[NonNegativeFloat] = Field(default=[0, 0.8], min_length=1)
    passes: list[Annotated[int, Field(ge=2)]] = Field(default=[2, 4, 16, 64, 256], min_length=1)
    beyond: PositiveInt = 1

    @model_validator(mode="after")
    def _kernels_exist(self) -> Settings:
        if not self.kernels():
            raise ValueError(f"ranks: none is less than the largest of outputs ({max(self.outputs)})")
        if self.width < (least := max(self.N, *self.outputs)):
            raise ValueError(f"width: must be at least N and O ({least}); got {self.width}")
        return self

    def kernels(self) -> list[Kernel]:
        """All kernels that are measured.

        Raises:
            ValueError: one of them does not exist.
        """
        try:
            return [
                Kernel(self.N, outputs, rank, share)
                for outputs in self.outputs
                for rank in self.ranks
                if rank < outputs
                for share in self.shares
            ]
        except BadInput as error:
            raise ValueError(str(error)) from None


def run(settings: Settings) -> pd.DataFrame:
    """One row for each kernel, metric, method and budget: its root-mean-square error, as measured and as predicted."""
    return base.table(row for kernel in settings.kernels() for row in _rows(settings, kernel))


def _rows(settings: Settings, kernel: Kernel) -> Iterator[base.Row]:
    problem = base.Once(lambda: kernel.problem(settings.width, settings.depth))
    sizes = {"N": kernel.N, "O": kernel.O, "rank": kernel.rank, "share": kernel.share}
    for metric, families in METHODS.items():
        for family, name in families.items():
            prepared = base.Once(functools.partial(_prepared, settings, problem, name))
            case = {**sizes, "metric": metric, "family": family, "method": name, "title": base.title(name)}
            if family == "exact":
                measure = functools.partial(_exact, settings, kernel, prepared, metric, name)
                yield base.row({**case, "passes": kernel.O}, measure)
                continue
            most, patience, slow = max(kernel.O, settings.passes[0]), settings.limits.patience_s, ""
            if family != DEFLATED:
                most *= settings.beyond
            for passes in (passes for passes in settings.passes if passes <= most):
                if slow:
                    yield base.left_out({**case, "passes": passes}, slow)
                    continue
                measure = functools.partial(_estimated, settings, kernel, prepared, metric, family, name, passes)
                yield (row := base.row({**case, "passes": passes}, measure))
                if row.get("seconds", 0.0) > patience:
                    slow = f"the previous budget took over limits.patience_s ({patience:g})"


def _prepared(settings: Settings, problem: base.Once[Problem], name: str) -> Any:
    return methods.get(name).prepare(problem(), settings.target())


def truth(kernel: Kernel, metric: str) -> float:
    """The exact trace or norm."""
    return kernel.theta.trace if metric == "trace" else math.sqrt(kernel.theta.square)


def _exact(settings: Settings, kernel: Kernel, prepared: base.Once[Any], metric: str, name: str) -> dict[str, Any]:
    found = timed(lambda: methods.get(name).estimate(prepared(), metric), settings.calls)
    reruns = Reruns(truth(kernel, metric), settings.dtype).run(lambda _: found.first, [0])
    return {"rms": reruns.errors[0], "predicted": 0.0, **found.columns()}


def _estimated(
    settings: Settings, kernel: Kernel, prepared: base.Once[Any], metric: str, family: str, name: str, passes: int
) -> dict[str, Any]:
    method = methods.stochastic(name)
    if passes < (least := method.cost(metric, method.fewest_probes)):
        raise Unavailable(f"the {metrics.words(metric)} takes at least {counted(least, 'pass', 'passes')}")
    found = Reruns(truth(kernel, metric), settings.dtype)
    # Each row has its own seeds, so that errors of two rows are independent.
    first = zlib.crc32(f"{kernel}, {metric}, {name}, {passes}".encode())
    found.run(lambda seed: method.estimate(prepared(), metric, passes, first + seed), range(settings.seeds))
    predicted = None if family == DEFLATED else kernel.error(metric, family, passes)
    rms = float(np.sqrt(np.mean(np.square(found.errors))))
    return {"rms": rms, "predicted": predicted, "seeds": settings.seeds, **found.timed.columns()}
