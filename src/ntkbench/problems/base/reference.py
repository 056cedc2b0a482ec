"""Exact float64 values of the metrics: the reference that every error is measured against.

Theta is n x n, but the moments of one network can also be computed on the P x P side, if that is smaller:
tr Theta = tr J^T J, ||Theta||_F = ||J^T J||_F and tr(Theta Theta_f) = ||J^T J_f||_F^2.

Values are stored in ``results/reference``, where :func:`commit` writes them, or in the cache, where they are kept when
first computed. A stored value is valid only for exactly the problem that it was computed for; see
:meth:`ntkbench.problem.Problem.digest`.
"""

from __future__ import annotations

import contextlib
import math
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from ntkbench import paths, problems
from ntkbench.errors import NoExactValue, NtkbenchError, OverMemory, Unavailable, Undefined, summary
from ntkbench.estimators.regression import regression_error
from ntkbench.estimators.rows import moments_from_rows
from ntkbench.metrics import METRICS, REGRESSION, SPECTRAL, Moments, of_eigenvalues, squared_norm
from ntkbench.operators.certificate import Uncertified
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems import base
from ntkbench.problems.base import storage, weights
from ntkbench.problems.base.outputs import change_by_training

MEMORY = 2**32
"""Bytes that a block of rows of J may take."""
OPERATIONS = 1e16
"""Floating-point operations that exact values may take: a few days on two cores, a few minutes on a large GPU."""


def exact(problem: Problem) -> dict[str, float]:
    """Exact values by metric, from ``results/reference``, from the cache, or computed now (and cached).

    Raises:
        NoExactValue: it cannot be computed.
        Unavailable: it would take more than :data:`OPERATIONS`.
        OverMemory: it takes more memory than is available.
        Corrupt: the committed file is damaged.
        NtkbenchError: the cache cannot be written.
    """
    _check_operations(problem)
    with _explained(problem):
        digest = problem.digest()
    for folder in (paths.REFERENCE, paths.cache()):
        stored = storage.read(file_of(problem.name, folder))
        if stored is not None and stored.get("digest") == digest:
            return stored["metrics"]
    record = compute(problem)
    storage.write(file_of(problem.name, paths.cache()), record)
    return record["metrics"]


def of_kernel(problem: Problem) -> dict[str, float]:
    """Exact values of the metrics of the whole kernel, from the cache, or computed now (and cached).

    The condition number is missing where the smallest eigenvalue may be zero, the regression error where there are no
    trained weights, or Theta does not fit in :data:`MEMORY`. Cost: a backward pass for each row of J, the decomposition
    of the smaller of Theta and J^T J in float64, and a Cholesky factor of a quarter of Theta.

    Raises:
        Unavailable: J or the smaller matrix takes more than :data:`MEMORY`.
        NoExactValue: it cannot be computed.
        NtkbenchError: the cache cannot be written.
    """
    import torch

    n, P = problem.n, problem.P
    if (needed := 8 * max(2 * n * P, 3 * min(n, P) ** 2)) > MEMORY:
        raise Unavailable(
            f"exact eigenvalues of {problem.name} take {needed / 2**30:.1f} GiB, over {MEMORY / 2**30:.0f} GiB"
        )
    file = paths.cache() / "of_kernel" / f"{problem.name}.json"
    with _explained(problem):
        digest = problem.digest()
        if (stored := storage.read(file)) is not None and stored.get("digest") == digest:
            return stored["metrics"]
        jacobian = _jacobians(problem)[0]
        blocks, rows = _blocks(problem, jacobian)
        J = torch.cat([rows(jacobian, block) for block in blocks])
        gram = (J @ J.T if n <= P else J.T @ J).cpu().numpy()
        values = np.zeros(n)
        values[: len(gram)] = np.linalg.eigvalsh(gram)
        error = float(np.finfo(np.float64).eps) * n * float(abs(values).max())
        found = {}
        for metric in SPECTRAL:
            with contextlib.suppress(Undefined):
                found[metric] = of_eigenvalues(metric, values, error=error)
        if problem.theta_f is not None and problem.other is None and 8 * 3 * n**2 <= MEMORY:
            theta = gram if n <= P else (J @ J.T).cpu().numpy()
            if not problem.samples_interact:  # rows are in the order of the blocks
                order = np.argsort(np.concatenate([jacobian.row_numbers(*block) for block in blocks]))
                theta = theta[np.ix_(order, order)]
            with contextlib.suppress(Undefined):
                found[REGRESSION] = regression_error(theta, change_by_training(problem))
    storage.write(file, {"problem": problem.name, "metrics": found, "digest": digest})
    return found


def commit(labels: Iterable[str]) -> list[dict[str, Any]]:
    """Recompute exact values and write them to ``results/reference``; returns the written records, in order.

    Weights are written too, if they are those of the problem at its default sizes. They are trained only if neither
    ``results/reference`` nor the cache has them.

    Raises:
        BadInput, Unavailable, DidNotTrain, Corrupt: see :func:`ntkbench.problems.load`.
        BadInput: ``results/reference`` cannot be written.
        Unavailable: ntkbench is not in a checkout.
        NoExactValue, OverMemory, NtkbenchError: see :func:`exact`.
    """
    paths.checkout("ntkbench reference")
    paths.check_output(paths.REFERENCE, folder=True)
    records = []
    for label in labels:
        problem, definition = problems.load(label), problems.define(label)
        name, _ = base.parse_label(label)
        if definition.training is not None and definition.training.kept:
            origin = weights.origin(name, definition)
            _, theta_f = weights.initial_and_trained(name, definition)
            if theta_f is not None and origin == weights.origin(name, problems.define(name)):
                storage.write(weights.committed_file(name), weights.packed(definition, origin, theta_f))
        records.append(compute(problem))
        storage.write(file_of(problem.name, paths.REFERENCE), records[-1])
    return records


def file_of(label: str, folder: Path) -> Path:
    """Path of a problem's exact values in a folder."""
    return folder / "exact" / f"{label}.json"


def compute(problem: Problem) -> dict[str, Any]:
    """The exact metrics of a problem and a record of the computation, in float64 by torch, in blocks of rows.

    Cost: O per-sample backward passes at theta_0 and theta_f (more on the n x n side where J does not fit in memory),
        and the smaller of n^2 P and 1.5 n P^2 multiplications for each of two Gram matrices. Problems whose samples
        interact take n passes instead of O.

    Raises:
        NoExactValue: it cannot be computed, or is not finite.
        Unavailable: it would take more than :data:`OPERATIONS`.
        OverMemory: J^T J takes more memory than the machine has.
    """
    _check_operations(problem)
    start = time.perf_counter()
    outputs_side = problem.n <= problem.P or problem.other is not None
    metrics = METRICS if problem.theta_f is not None else METRICS[:-1]
    with _explained(problem):
        moments = by_outputs(problem) if outputs_side else by_parameters(problem)
        values = {metric: moments.metric(metric) for metric in metrics}
        digest = problem.digest()
    if wrong := [f"{metric} is {value}" for metric, value in values.items() if not math.isfinite(value)]:
        raise NoExactValue(f"exact values of {problem.name} are not finite: {', '.join(wrong)}")
    return {
        "problem": problem.name,
        "metrics": values,
        "digest": digest,
        "n": problem.n,
        "P": problem.P,
        "side": "n x n" if outputs_side else "P x P",
        "dtype": "float64",
        "seconds": round(time.perf_counter() - start, 1),
        "command": f"ntkbench reference '{problem.name}'",
        "versions": _versions(),
    }


def _check_operations(problem: Problem) -> None:
    """Check that exact values are feasible, before anything is computed.

    Raises:
        Unavailable: they are not.
    """
    with _explained(problem):
        n, P = problem.n, problem.P
    needed = 2.0 * min(n * n * P, 1.5 * n * P * P) * (2 if problem.theta_f is not None else 1)
    if needed > OPERATIONS:
        raise Unavailable(
            f"exact values of {problem.name} (n = {n:,}, P = {P:,}) would take {needed:.1g} floating-point operations, "
            f"more than the limit of {OPERATIONS:.0g}: without them no error can be measured"
        )


@contextlib.contextmanager
def _explained(problem: Problem) -> Iterator[None]:
    try:
        yield
    except Uncertified as error:
        raise NoExactValue(f"exact values of {problem.name}: {error}") from error
    except NtkbenchError as error:
        raise type(error)(f"exact values of {problem.name}: {error}") from error
    except Exception as error:
        raise NoExactValue(f"exact values of {problem.name} cannot be computed: {summary(error)}") from error


def _jacobians(problem: Problem) -> list[Any]:
    from ntkbench.operators import linearise

    ends = ["theta_0"] + ["theta_f"] * (problem.theta_f is not None)
    return [linearise(problem, end, Target(dtype="float64", memory=MEMORY)) for end in ends]


def _blocks(problem: Problem, jacobian: Any) -> tuple[list[Any], Any]:
    """Blocks of rows and a function that computes one: per sample if samples are independent, else by whole passes."""
    if not problem.samples_interact:
        return list(jacobian.rectangles(0.25)), lambda j, rectangle: j.sample_rows(*rectangle)
    size = max(1, MEMORY // 4 // (max(problem.P, problem.n) * jacobian.itemsize))
    ranges = [(i, min(i + size, problem.n)) for i in range(0, problem.n, size)]
    return ranges, lambda j, span: j.vjp(j.basis(*span))


def by_outputs(problem: Problem) -> Moments:
    """Moments of Theta from its n x n side, in blocks."""
    jacobians = _jacobians(problem)
    blocks, rows = _blocks(problem, max(jacobians, key=lambda j: j.P))
    metric = "alignment" if len(jacobians) == 2 else "norm"
    return moments_from_rows(metric, jacobians, blocks, rows)


def by_parameters(problem: Problem) -> Moments:
    """Moments of Theta from its P x P side.

    Raises:
        OverMemory: the matrices take more memory than the machine has.
    """
    import psutil
    import torch
    from tqdm import tqdm

    jacobians = _jacobians(problem)
    # J^T J, J_f^T J_f and J^T J_f; float64 accumulators on the operator's device.
    pairs = [(0, 0), (1, 1), (0, 1)][: 3 if len(jacobians) == 2 else 1]
    needed, there = len(pairs) * problem.P**2 * 8, psutil.virtual_memory().total
    if needed > there:
        raise OverMemory(
            f"{len(pairs)} matrices of P x P with P = {problem.P} take {needed / 2**30:.1f} GiB, but this machine has "
            f"{there / 2**30:.1f} GiB"
        )
    blocks, rows = _blocks(problem, jacobians[0])
    like = jacobians[0].basis(0, 1)
    grams = [torch.zeros(problem.P, problem.P, dtype=like.dtype, device=like.device) for _ in pairs]
    for block in tqdm(blocks, desc=problem.name, unit="block", disable=None):
        made = [rows(jacobian, block) for jacobian in jacobians]
        for gram, (a, b) in zip(grams, pairs, strict=True):
            gram.addmm_(made[a].T, made[b])
    squares = [float(squared_norm(gram)) for gram in grams]
    return Moments(float(grams[0].trace()), *squares)


def _versions() -> dict[str, str]:
    import numpy
    import torch

    return {"torch": torch.__version__, "numpy": numpy.__version__, "python": sys.version.split()[0]}
