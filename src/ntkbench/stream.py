"""The trace over the batches of a loader, read one at a time: it is the sum over Theta's diagonal blocks.

No other metric can be streamed: norm, effective rank, alignment and Theta itself have terms between all pairs.
"""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import numpy as np

from ntkbench import errors, methods
from ntkbench.errors import BadInput, OverMemory, summary
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
    certified on each. With ``rtol`` each part is within the tolerance, and so is their sum. The loader is read once; if
    samples turn out to interact in one of several parts, it is read again, and all batches are joined. Memory: three
    parts, and the memory of an estimate of one part.

    Cost: that of the estimates. If they are not certified sample by sample, two plain passes more over each part, one
    of them sample by sample, check whether samples interact.

    Args:
        model, loader: an ``nn.Module`` and a ``DataLoader`` whose batches are its inputs.
        setup: set-up of a :class:`ntkbench.Kernel`.
        groups: groups of parameters; their traces are a dict by name.
        options: options of the estimate of each part.

    Returns:
        The estimate, or a dict of them.

    Raises:
        BadInput: a batch differs from the first in more than the number of its samples, or there is no batch; samples
            turn out to interact, and the loader gives other samples when it is read again; or as for
            :func:`ntkbench.trace`.
        OverMemory: samples interact, and all batches together do not fit in memory; or as for :func:`ntkbench.trace`.
    """
    from ntkbench.problems.base.calls import NO_BATCH, grouped, reading, unbatched
    from ntkbench.problems.base.module import TOGETHER

    with reading(loader) as batches:
        parts = grouped(batches, TOGETHER)
        with unbatched(loader):
            head = next(parts, None)
            if head is None:
                raise BadInput(NO_BATCH)
            first = Kernel(model, head, **setup)
        if first.problem.samples_interact:
            return _of_one(Kernel(model, _joined(itertools.chain([head], parts)), **setup), groups, options)
        more = next(parts, None)
        if more is None:
            return _of_one(first, groups, options)
        found = _by_part(first, itertools.chain([more], parts), groups, options)
    if not isinstance(found, int):
        return found
    with reading(loader) as batches:
        start = list(itertools.islice(batches, 1))
        inputs = _joined(itertools.chain(start, batches)) if start else None
    if inputs is None or not _begins_with(inputs, head, found):
        raise BadInput(
            f"samples interact, as those before index {found} of the DataLoader show, so all batches are needed at "
            "once, but the DataLoader gives other samples when it is read again: pass all samples as one tensor"
        )
    whole = Kernel(model, inputs, **setup)
    return _of_one(whole._derived(replace(whole.problem, samples_interact=True)), groups, options)


def _of_one(kernel: Kernel, groups: Mapping[str, Any] | None, options: Options) -> Any:
    """The trace of one kernel, or of groups of its parameters."""
    if groups is None:
        return kernel.trace(**_asked(options))
    return errors.by_name("group", kernel.groups(groups), lambda each: each.trace(**_asked(options)))


def _by_part(first: Kernel, parts: Iterator[Any], groups: Mapping[str, Any] | None, options: Options) -> Any:
    """The sum over the first kernel's inputs and other parts; the samples read so far, once some of them interact."""
    from ntkbench.operators import interact, is_split

    kernels = {"": first} if groups is None else first.groups(groups)
    found: dict[str, list[Estimate]] = {name: [] for name in kernels}
    sizes: list[int] = []
    for i, part in enumerate(itertools.chain([None], parts)):
        for name, kernel in kernels.items():
            try:
                own = kernel if part is None else kernel._on(part)
                estimate = own.trace(**_asked(options, i))
            except BadInput as error:
                if part is None:
                    raise
                raise BadInput(f"samples of the DataLoader from index {sum(sizes)} on: {error}") from error
            # A method for independent samples is certified sample by sample, if a plain pass over them fits in memory.
            each = map(methods.get, estimate.method.split(", "))
            with own._settings():
                seen = all(m.needs_independent_samples for m in each) and not is_split(own.problem, own._target)
                if not seen and interact(own.problem, own._target):
                    return sum(sizes) + own.problem.N
            found[name].append(estimate)
        sizes.append(own.problem.N)
    totals = {name: total(estimates, sizes) for name, estimates in found.items()}
    return totals[""] if groups is None else totals


def _joined(batches: Iterable[Any]) -> Any:
    """All batches as one.

    Raises:
        OverMemory: they do not fit in memory.
    """
    from ntkbench.problems.base.calls import concatenated

    try:
        return concatenated(batches)
    except (MemoryError, RuntimeError) as error:
        if "memory" not in summary(error).lower():
            raise
        raise OverMemory(
            "samples interact, so all batches of the DataLoader are needed at once, and they do not fit in memory: "
            f"{summary(error)}"
        ) from error


def _begins_with(inputs: Any, head: Any, least: int) -> bool:
    """Whether inputs have at least this number of samples, the first of which are those of ``head``."""
    import torch
    from torch.utils._pytree import tree_leaves

    rows = [(a, b) for a, b in zip(tree_leaves(inputs), tree_leaves(head), strict=True) if getattr(a, "ndim", 0)]
    same = [len(a) >= least and torch.isclose(a[: len(b)], b, rtol=0, atol=0, equal_nan=True).all() for a, b in rows]
    return all(map(bool, same))


def _asked(options: Options, part: int = 0) -> OptionKeywords:
    """Options of the estimate of a part, with a seed of its own from 0 to 2^63 - 1."""
    seed = options.seed
    if part:
        seed = int(np.random.SeedSequence((seed, part)).generate_state(1, np.uint64)[0] >> np.uint64(1))
    asked: OptionKeywords = {"method": options.method, "passes": options.passes, "rtol": options.rtol}
    return asked | {"confidence": options.confidence, "seed": seed}


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
