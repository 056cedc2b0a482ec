"""What a researcher types: the NTK of any ``nn.Module``, or a metric of it with its error and its cost.

>>> ntkbench.ntk(model, x)                                      # doctest: +SKIP
>>> ntkbench.trace(model, x)                                    # doctest: +SKIP
>>> ntkbench.alignment(model_0, model_f, x, passes=1024)        # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
import functools
import logging
import math
import numbers
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from ntkbench import ambient, errors, methods, metrics
from ntkbench.errors import BadInput, OverMemory, Unavailable, Undefined
from ntkbench.estimate import Estimate, Estimates
from ntkbench.methods import Method
from ntkbench.methods.base import Incremental, Stochastic
from ntkbench.operators import declares
from ntkbench.operators.certificate import Uncertified
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ntkbench.layerwise.sample_kernels import Kernel

__all__ = ["alignment", "effective_rank", "metrics_of", "norm", "ntk", "trace"]

EXACT_PASSES = 64
"""Passes for each set of weights that ``method="auto"`` spends on an exact value when no budget is given."""

EXACT = ("structured_derivatives", "jacobian_contraction", "naive_jacobian")
"""What ``method="auto"`` tries first, the cheapest first; Theta must fit in memory for the one, J for the others."""

TOLERANCE_PASSES = 4096
"""The most passes on the way to a tolerance when no budget is given."""

PAIRS = ("structured_block_u_statistics", "block_u_statistics")

WHOLE = ("hutchinson", "gram_reverse")
"""The second takes no JVPs, which not every network has."""

OF_RECURRENT = "group_u_statistics"
"""Tried before these where the network declares its recurrence: a trial's gradient would take more than its pass."""

STOCHASTIC = {
    "trace": (("per_sample_trace",), ("one_sided_reverse",)),
    "norm": (PAIRS, WHOLE),
    "effective_rank": (PAIRS, WHOLE),
    "alignment": (PAIRS, WHOLE),
}
"""What ``method="auto"`` falls back on where samples are independent, and then or where not, on products over the whole
batch."""


def ntk(
    model: nn.Module,
    x1: torch.Tensor,
    x2: torch.Tensor | None = None,
    *,
    kernel: str = "full",
    memory: int = 2**30,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
) -> torch.Tensor:
    """The NTK between two sets of inputs, exact and without a Jacobian, or a kernel between samples that stands for it.

    ``kernel="full"`` is Theta itself, ``[N1 * O, N2 * O]`` with rows sample-major. The others are ``[N1, N2]`` matrices
    A, standing for Theta as A (x) I_O: ``sum_of_logits`` (the pNTK of Mohamadi et al. 2023), ``single_logit`` (the
    first output), ``random_vector`` (one random combination of outputs, drawn from ``seed``), ``trace``
    ((1/O) tr_O Theta, the best of them in the Frobenius norm) and ``last_layer`` (the trace kernel of the last layer's
    parameters).

    Cost: O backward passes over the inputs for ``full``, ``trace`` and ``last_layer``, one for the others, and for each
    layer a contraction; without ``x2`` half of that (see :mod:`ntkbench.layerwise`). The network is traced first, which
    takes from a tenth of a second to some seconds. Parameters without a fast rule are named on the ``ntkbench`` logger.

    Where the network cannot be traced, or plain autograd contradicts its trace, rows of its Jacobian are written out in
    blocks: sample by sample, or else by products over the whole batch. Networks whose samples interact take the last
    way, and then there is no ``x2``.

    Args:
        model: ``x -> [N, ...outputs]``, in the mode it is meant in.
        x1: inputs of the rows, ``[N1, ...]``.
        x2: inputs of the columns, ``[N2, ...]``; those of the rows if not given.
        kernel: one of the names above.
        memory: bytes that everything but the result may take.
        seed: of ``random_vector``.
        dtype, device: as for :func:`trace`; the result is there and in that precision.

    Raises:
        BadInput: an argument cannot be used, says what is allowed; or no way of computing the kernel works, says why.
        OverMemory: the result itself would not fit in memory.
        Unavailable: the device is not there.
    """
    from ntkbench import operators
    from ntkbench.layerwise import sample_kernels
    from ntkbench.problems.base.sequences import same_inputs, wrapped

    chosen = sample_kernels.get(kernel)
    seed, memory = _seed(seed), _positive("memory", memory, " of bytes")
    with ambient.own_settings():
        problem = wrapped(model, x1, dtype=_dtype_name(dtype))
        if problem.samples_interact and x2 is not None:
            raise BadInput(
                "samples interact in this network, so a kernel between two batches is not defined: leave x2 out, or "
                "call model.eval() where it has BatchNorm in train mode"
            )
        columns = None if x2 is None else same_inputs(model, x1, x2)
        target, index = _target(problem, model, dtype, device, memory)
        rows = 1 if chosen.between_samples else problem.O
        operators.check_result(problem.N * rows, (problem.N if columns is None else len(columns)) * rows, target)
        ways = [_layer_by_layer, _sample_by_sample] if not problem.samples_interact else []
        ways += [_row_by_row] if x2 is None else []
        reasons = []
        with _on_device(index), ambient.own_settings(target.dtype, _made_on(target, index)):
            for way in ways:
                try:
                    return _finite(way(problem, columns, chosen, target, seed))
                except Exception as error:  # whatever a way does to a network, the next one may work
                    reasons.append(f"{way.__name__[1:].replace('_', ' ')}: {errors.reason(error)}")
        raise BadInput(f"no way of computing this kernel works: {'; '.join(reasons)}")


def _finite(kernel: torch.Tensor) -> torch.Tensor:
    if not bool(kernel.isfinite().all()):
        raise BadInput("the kernel has entries that are nan or infinite: gradients are not finite, or overflow")
    return kernel


def _layer_by_layer(
    problem: Problem, x2: torch.Tensor | None, kernel: Kernel, target: Target, seed: int
) -> torch.Tensor:
    from ntkbench import operators
    from ntkbench.layerwise.kernel import LayerwiseKernel

    module, parameters, x1 = operators.torch_network(problem, "theta_0", target)
    engine = LayerwiseKernel(module, parameters, x1, target.memory)
    for name, why in engine.fallbacks().items():
        logging.getLogger("ntkbench").warning("gradients of %s are written out: %s", name, why)
    return kernel.compute(engine, list(parameters.values()), x1, None if x2 is None else x2.to(x1), seed)


def _sample_by_sample(
    problem: Problem, x2: torch.Tensor | None, kernel: Kernel, target: Target, seed: int, *, independent: bool = True
) -> torch.Tensor:
    from ntkbench.operators import linearise
    from ntkbench.operators.explicit_kernel import explicit_kernel
    from ntkbench.problems.base.module import last_layer, on_inputs

    problem = last_layer(problem) if kernel.last_layer else problem
    left = linearise(problem, "theta_0", target)
    right = None if x2 is None else linearise(on_inputs(problem, x2), "theta_0", target)
    directions = kernel.drawn(problem.O, seed, left.basis(0, 1))
    return explicit_kernel(left, right, directions, averaged=kernel.averaged, independent=independent)


def _row_by_row(problem: Problem, x2: torch.Tensor | None, kernel: Kernel, target: Target, seed: int) -> torch.Tensor:
    """By products over the whole batch, whatever its samples do to each other."""
    return _sample_by_sample(problem, x2, kernel, target, seed, independent=False)


def trace(
    model: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """tr Theta of a network at its present weights, Theta = J J^T with J the Jacobian of all outputs.

    theta is every parameter with ``requires_grad=True``: freeze parameters to leave them out; a tensor tied under
    several names counts once. The model is copied, never changed, and taken in the mode it is in; train-mode BatchNorm
    is fine (its samples interact, which rules some methods out), train-mode Dropout is not.

    ``method="auto"`` takes an exact method if that needs at most ``passes`` (64 when no ``passes`` are given; twice
    that for alignment) and, for all metrics but the trace, Theta fits in ``memory``. That is ``structured_derivatives``
    for independent samples with at most 64 outputs each; ``jacobian_contraction`` where such a network cannot be traced
    and J fits; the naive Jacobian for interacting samples with at most 64 outputs in all and a J that fits. Otherwise
    it estimates: where samples are independent by ``per_sample_trace`` or, for the other metrics, by block U-statistics
    (``group_u_statistics`` where the network declares its recurrence, else ``structured_block_u_statistics`` where it
    can be traced and ``block_u_statistics`` where not, if what they hold fits in ``memory``); by ``one_sided_reverse``
    or, for the other metrics, ``hutchinson`` and ``gram_reverse`` otherwise. These are tried in turn: a method that
    fails on the network for whatever reason is passed over. ``Estimate.method`` says which it was, ``Estimate.notes``
    why not by another.

    Every method is certified by plain ``backward`` of the network as it is, over the whole batch: a method whose
    gradients differ by more than the root of the machine epsilon is passed over. ``Estimate.certificate`` is the
    relative difference.

    Cost: that of the method, after a few forward passes of checks, and one backward pass for the certificate of each
    parameter set.

    Args:
        model: ``x -> [N, ...outputs]``; everything after the first axis counts as the O outputs of a sample.
        x: inputs ``[N, ...]``, real or integer.
        method: a file name in ``ntkbench/methods``, or ``"auto"``.
        passes: the most Jacobian passes to spend; 256 if not given, or 4096 with ``rtol``. Block U-statistics do
            not spend more than max(8, 1024 / N), those of groups not more than 1024 / min(N, 24), unless asked for by
            name with ``passes``, or with ``rtol``. Exact and approximate methods asked for by name take none.
        rtol: a tolerance: probes are added in growing batches until the interval reaches no further than this share of
            the value to either side, or ``passes`` are spent; ``Estimate.notes`` says so if the tolerance was not met.
            An exact method is then taken only where it costs no more than by default.
        confidence: of that interval.
        seed: of the random probes; the same seed gives the same estimate.
        dtype: ``"float32"`` or ``"float64"``; that of the parameters if not given.
        device: ``"cpu"``, ``"cuda"`` or ``"auto"``; that of the parameters if not given.
        memory: bytes that blocks of passes and of rows may fill.

    Raises:
        BadInput: something about the arguments, says what is allowed; or no method serves this network, or not the one
            that was asked for, says why.
        OverMemory: the method would need more than ``memory`` at once.
        Unavailable: the device is not there.
    """
    return _estimates(("trace",), model, None, x, method, passes, rtol, confidence, seed, dtype, device, memory)[
        "trace"
    ]


def norm(
    model: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """||Theta||_F (not its square) of a network at its present weights. Arguments and errors as for :func:`trace`."""
    return _estimates(("norm",), model, None, x, method, passes, rtol, confidence, seed, dtype, device, memory)["norm"]


def effective_rank(
    model: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """(tr Theta)^2 / ||Theta||_F^2 of a network at its present weights. Arguments and errors as for :func:`trace`."""
    return _estimates(
        ("effective_rank",), model, None, x, method, passes, rtol, confidence, seed, dtype, device, memory
    )["effective_rank"]


def alignment(
    model_0: nn.Module,
    model_f: nn.Module,
    x: torch.Tensor,
    *,
    method: str = "auto",
    passes: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimate:
    """tr(Theta_0 Theta_f) / (||Theta_0||_F ||Theta_f||_F) of one network with two sets of weights, on the same inputs.

    ``model_0`` and ``model_f`` are one network, in one mode, with other values of its parameters. Buffers (BatchNorm's
    running statistics) and frozen parameters may differ as well; each set of weights goes with its own. Precision and
    device default to those of ``model_0``. Other arguments and errors as for :func:`trace`.
    """
    if model_f is None:
        raise BadInput("model_f must be a torch.nn.Module, got None")
    names = ("alignment",)
    return _estimates(names, model_0, model_f, x, method, passes, rtol, confidence, seed, dtype, device, memory)[
        "alignment"
    ]


def metrics_of(
    model: nn.Module,
    x: torch.Tensor,
    model_f: nn.Module | None = None,
    *,
    method: str = "auto",
    passes: int | None = None,
    rtol: float | None = None,
    confidence: float = 0.95,
    seed: int = 0,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    memory: int = 2**30,
) -> Estimates:
    """Trace, norm and effective rank, and with ``model_f`` the alignment, by name, from one block of probes.

    Each has a standard error of its own; they are of the same probes and so not independent. With ``rtol`` probes are
    added until all of them are within it. ``Estimate.passes`` is what all together cost, except where an exact method
    gave each by itself. Arguments and errors as for :func:`trace` and :func:`alignment`.
    """
    names = metrics.METRICS if model_f is not None else tuple(m for m in metrics.METRICS if m != "alignment")
    return _estimates(names, model, model_f, x, method, passes, rtol, confidence, seed, dtype, device, memory)


def _estimates(
    names: tuple[str, ...],
    model: nn.Module,
    model_f: nn.Module | None,
    x: torch.Tensor,
    method: str,
    passes: int | None,
    rtol: float | None,
    confidence: float,
    seed: int,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    memory: int,
) -> Estimates:
    from ntkbench.problems.base.sequences import wrapped

    chosen = None if method == "auto" else methods.get(method)
    seed, memory = _seed(seed), _positive("memory", memory, " of bytes")
    if passes is not None:
        passes = _positive("passes", passes)
        if chosen is not None and not chosen.takes_passes:
            raise BadInput(f"{method} is {chosen.kind} and takes no passes: it spends what it needs; leave passes out")
    _check_share("confidence", confidence)
    if rtol is not None:
        _check_share("rtol", rtol)
        if chosen is not None and not isinstance(chosen, Incremental):
            raise BadInput(f"{method} takes no rtol: its probes cannot be added to; allowed: {_incremental(names)}")
    with ambient.own_settings():
        problem = wrapped(model, x, model_f, dtype=_dtype_name(dtype))
        target, index = _target(problem, model, dtype, device, memory)
        with _on_device(index), ambient.own_settings(target.dtype, _made_on(target, index)):
            run = functools.partial(
                _by,
                problem=problem,
                names=names,
                target=target,
                passes=passes,
                rtol=rtol,
                confidence=confidence,
                seed=seed,
                auto=chosen is None,
            )
            if chosen is not None:
                return Estimates(_named(run, chosen, names))
            # One method for all: what the dearest takes is affordable for the others.
            ladder = [methods.get(name) for name in choices(problem, names[-1], target, passes, rtol)]
            reasons: list[str] = []
            for step in ladder:
                if set(names) <= set(step.metrics):
                    try:
                        found = run(step)
                    except (Undefined, Unavailable):
                        raise  # of the kernel or of the machine, and so of every method
                    except Exception as error:  # whatever a method does to a network, the next one may work
                        reasons.append(f"{step.name}: {errors.reason(error)}")
                    else:
                        said = tuple(f"not by {reason}" for reason in reasons)
                        return Estimates({name: replace(e, notes=(*e.notes, *said)) for name, e in found.items()})
            raise BadInput(f"no method gives the {' and '.join(names)} of this network: {'; '.join(reasons)}")


def _named(run: Callable[[Method], dict[str, Estimate]], method: Method, names: Sequence[str]) -> dict[str, Estimate]:
    """What a method that was asked for by name gives, or one line that says why it does not."""
    refused = f"{method.name} cannot give the {' and '.join(names)} of this network"
    try:
        return run(method)
    except Uncertified as error:
        raise Uncertified(f"{refused}: {error}") from error
    except errors.NtkbenchError:
        raise
    except Exception as error:
        kind = OverMemory if isinstance(error, MemoryError) or "out of memory" in str(error) else BadInput
        raise kind(f"{refused}: {errors.summary(error)}") from error


def _by(
    method: Method,
    problem: Problem,
    names: tuple[str, ...],
    target: Target,
    passes: int | None,
    rtol: float | None,
    confidence: float,
    seed: int,
    auto: bool,
) -> dict[str, Estimate]:
    budget = None
    if isinstance(method, Stochastic):
        default = method.default_passes if rtol is None else TOLERANCE_PASSES
        budget = default if passes is None else passes
        worth = method.default_max_passes(problem)
        if worth is not None and rtol is None and (auto or passes is None):
            budget = min(budget, worth)
    for metric in names:
        reason = method.unsupported_reason(problem, metric, target, budget)
        if reason:
            raise BadInput(f"{method.name} cannot give the {metric} of this network: {reason}")
        needed = method.bytes_needed(problem, metric, target, budget)
        if needed > target.memory:
            raise OverMemory(f"{method.name} needs {needed} bytes at once for the {metric}; memory is {target.memory}")
    prepared = method.prepare(problem, target)
    if budget is not None and isinstance(method, Incremental):
        found = method.estimates(prepared, names, budget, seed, rtol, confidence)
    else:
        found = {metric: method.estimate(prepared, metric, budget, seed) for metric in names}
    for metric, estimate in found.items():
        if not math.isfinite(estimate.value):
            raise BadInput(f"the {metric} by {method.name} is {estimate.value}: gradients are not finite, or overflow")
    return found


def choices(
    problem: Problem, metric: str, target: Target, passes: int | None = None, rtol: float | None = None
) -> list[str]:
    """The methods that ``method="auto"`` stands for, the first one that works; the rule is in :func:`trace`.

    Args:
        passes: the most passes to spend; ``None`` for the defaults.
        rtol: a tolerance, which random probes may reach for less than what exact methods cost.
    """
    ends = len(metrics.parameter_sets(metric))
    limit = EXACT_PASSES * ends if passes is None else passes
    if rtol is not None:
        limit = min(limit, EXACT_PASSES * ends)
    found = []
    for name in EXACT:
        method = methods.get(name)
        width = problem.n if name == "structured_derivatives" else problem.P
        # The trace takes every row once; the others would make rows anew for every pair of blocks that do not fit.
        fits = metric == "trace" or ends * problem.n * width * target.itemsize <= target.memory
        if (
            fits
            and method.unsupported_reason(problem, metric, target) is None
            and (needed := method.passes_needed(problem, metric, target)) is not None
            and needed <= limit
        ):
            found.append(name)
    independent, whole = STOCHASTIC[metric]
    if metric != "trace" and declares(problem.module):
        independent = (OF_RECURRENT, *independent)
    return [*found, *whole] if problem.samples_interact else [*found, *independent, *whole]


def _incremental(names: tuple[str, ...]) -> str:
    able = (name for name in methods.names() if isinstance(methods.get(name), Incremental))
    return ", ".join(name for name in able if set(names) <= set(methods.get(name).metrics))


def _check_share(what: str, value: object) -> None:
    if not isinstance(value, numbers.Real) or isinstance(value, bool) or not 0 < float(value) < 1:
        raise BadInput(f"{what} must be a number between 0 and 1, both excluded, got {value!r}")


def _whole(what: str, value: object) -> int:
    if not isinstance(value, numbers.Integral) or isinstance(value, bool):
        raise BadInput(f"{what} must be a whole number, got {value!r}")
    return int(value)


def _seed(value: object) -> int:
    seed = _whole("seed", value)
    if not 0 <= seed < 2**63:
        raise BadInput(f"seed must be from 0 to 2^63 - 1, got {seed}")
    return seed


def _positive(what: str, value: object, unit: str = "") -> int:
    number = _whole(what, value)
    if number <= 0:
        raise BadInput(f"{what} must be a positive number{unit}, got {value!r}")
    return number


def _dtype_name(dtype: str | torch.dtype | None) -> str | None:
    return None if dtype is None else str(dtype).removeprefix("torch.")


def _target(
    problem: Problem,
    model: nn.Module,
    dtype: str | torch.dtype | None,
    device: str | torch.device | None,
    memory: int,
) -> tuple[Target, int | None]:
    """Where and how to compute, and which of several GPUs."""
    kind, index = _device(model, device)
    own = str(problem.theta_0[next(iter(problem.theta_0))].dtype)
    return Target("torch", _dtype_name(dtype) or own, kind, memory), index


def _device(model: nn.Module, device: str | torch.device | None) -> tuple[str, int | None]:
    """Kind of device, as a target names it, and which of several GPUs."""
    name = str(next(model.parameters()).device if device is None else device)
    match = re.fullmatch(r"(cpu|cuda):([0-9]+)", name)
    if not match:
        return name, None
    if match[1] == "cpu":
        return "cpu", None
    import torch

    if int(match[2]) >= torch.cuda.device_count():
        raise Unavailable(f"device {name!r} was asked for, but torch sees {torch.cuda.device_count()} CUDA devices")
    return "cuda", int(match[2])


def _made_on(target: Target, index: int | None) -> str | None:
    """Where tensors belong that a network makes without a device."""
    from ntkbench.operators import torch as backend

    return None if backend.device(target).type == "cpu" else f"cuda:{index or 0}"


def _on_device(index: int | None) -> contextlib.AbstractContextManager[object]:
    import torch

    return contextlib.nullcontext() if index is None else torch.cuda.device(index)
