"""The trace over the batches of a loader, read one at a time: it is the sum over Theta's diagonal blocks.

No other metric can be streamed: norm, effective rank, alignment and Theta itself have terms between all pairs.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ntkbench.errors import BadInput
from ntkbench.estimate import Estimate
from ntkbench.estimators.standard_errors import satterthwaite
from ntkbench.kernel import Kernel, Setup
from ntkbench.options import OptionKeywords, Options


def applies(model: Any, inputs: Any) -> bool:
    """Whether the model is a module and the inputs are a loader whose batches have samples along the first axis."""
    if "torch" not in sys.modules:
        return False
    from torch import nn
    from torch.utils.data import DataLoader

    layers_of_time = isinstance(model, nn.RNNBase) and not model.batch_first
    return isinstance(model, nn.Module) and isinstance(inputs, DataLoader) and not layers_of_time


def trace(model: Any, loader: Any, setup: Setup, groups: Mapping[str, Any] | None, options: Options) -> Any:
    """tr Theta as the sum over parts, each with its own probes; if samples interact, all batches are one part.

    A part is a batch, or the fewest batches that have 64 samples. The network is checked on the first part, and
    certified on each. With ``rtol`` each part is within the tolerance, and so is their sum. The loader is read once.
    Memory: two parts, and the memory of an estimate of one part.

    Args:
        model, loader: an ``nn.Module`` and a ``DataLoader`` whose batches are its inputs.
        setup: set-up of a :class:`ntkbench.Kernel`.
        groups: groups of parameters; their traces are a dict by name.
        options: options of the estimate of each part.

    Returns:
        The estimate, or a dict of them.

    Raises:
        BadInput: a batch differs from the first in more than the number of its samples, or there is no batch; or as for
            :func:`ntkbench.trace`.
    """
    from ntkbench.problems.base.calls import NO_BATCH, concatenated, grouped, reading
    from ntkbench.problems.base.module import TOGETHER

    with reading(loader) as batches:
        joined = grouped(batches, TOGETHER)
        head = next(joined, None)
        if head is None:
            raise BadInput(NO_BATCH)
        first = Kernel(model, head, **setup)
        if first.problem.samples_interact:
            first = Kernel(model, concatenated(itertools.chain([head], joined)), **setup)
        kernels = {"": first} if groups is None else first.groups(groups)
        asked: OptionKeywords = {"method": options.method, "passes": options.passes, "rtol": options.rtol}
        asked |= {"confidence": options.confidence, "seed": options.seed}
        parts = {name: [kernel.trace(**asked)] for name, kernel in kernels.items()}
        sizes = [first.problem.N]
        for i, batch in enumerate(joined, 1):
            asked["seed"] = _seed(options.seed, i)
            for name, kernel in kernels.items():
                try:
                    own = kernel._on(batch)
                    parts[name].append(own.trace(**asked))
                except BadInput as error:
                    raise BadInput(f"samples of the DataLoader from index {sum(sizes)} on: {error}") from error
            sizes.append(own.problem.N)
    totals = {name: total(found, sizes) for name, found in parts.items()}
    return totals[""] if groups is None else totals


def _seed(seed: int, part: int) -> int:
    """The seed of a part, from 0 to 2^63 - 1."""
    return int(np.random.SeedSequence((seed, part)).generate_state(1, np.uint64)[0] >> np.uint64(1))


def total(parts: Sequence[Estimate], sizes: Sequence[int]) -> Estimate:
    """The sum of independent estimates of parts with these numbers of samples.

    Degrees of freedom follow Welch and Satterthwaite. The error is unknown if that of a part is. A pass is over
    the samples of all parts.
    """
    if len(parts) == 1:
        return parts[0]
    squares = [(e.standard_error or 0.0) ** 2 for e in parts]
    passes = [e.passes for e in parts]
    known = [p for p in passes if p is not None]
    weighted = math.fsum(p * size for p, size in zip(known, sizes, strict=False)) / sum(sizes)
    return replace(
        parts[0],
        value=math.fsum(e.value for e in parts),
        standard_error=None if all(e.standard_error is None for e in parts) else math.sqrt(math.fsum(squares)),
        passes=weighted if len(known) == len(parts) else None,
        method=", ".join(dict.fromkeys(e.method for e in parts)),
        notes=(*dict.fromkeys(note for e in parts for note in e.notes), f"the sum over {len(parts)} parts"),
        degrees=satterthwaite(squares, [e.degrees for e in parts]),
        certificate=max((e.certificate for e in parts if e.certificate is not None), default=None),
        rounding=max((e.rounding for e in parts if e.rounding is not None), default=None),
    )
