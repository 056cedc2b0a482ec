"""Exact float64 values of the metrics: the truth that every error is measured against.

Theta is n x n, but its moments are also those of the P x P side, whichever is smaller:
tr Theta = tr J^T J, ||Theta||_F = ||J^T J||_F and tr(Theta Theta_f) = ||J^T J_f||_F^2.

``python -m ntkbench.problems.base.reference LABEL ...`` computes values (and trains weights) anew and writes them to
``results/reference``, where they are committed; weights where the label's are those of the problem at its defaults.
Anything else is computed at its first use and kept in the cache.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from ntkbench import paths, problems
from ntkbench.metrics import METRICS, Moments, from_rows_of_jacobian, squared_norm
from ntkbench.options import Target
from ntkbench.problem import Problem

MEMORY = 2**32


def exact(problem: Problem) -> dict[str, float]:
    """Metric to exact value, from ``results/reference``, the cache, or computed now (and cached).

    A stored value counts only if it was made from the same inputs and weights, to the bit.
    """
    for folder in (paths.REFERENCE, paths.cache()):
        stored = _read(file_of(problem.name, folder))
        if stored.get("digest") == problem.digest():
            return stored["metrics"]
    record = compute(problem)
    paths.write_atomically(file_of(problem.name, paths.cache()), _json(record))
    return record["metrics"]


def file_of(label: str, folder: Path) -> Path:
    """Where the reference of a problem lies in a folder."""
    return folder / "exact" / f"{label}.json"


def compute(problem: Problem) -> dict[str, Any]:
    """The exact metrics of a problem and how they were made, in float64 by torch, streamed in blocks of rows.

    Cost: O per-sample backward passes at theta_0 and theta_f (more on the n x n side where J does not fit in memory),
        and the smaller of n^2 P and 1.5 n P^2 multiplications for each of two Gram matrices. Problems whose samples
        interact take n passes instead of O.
    """
    start = time.perf_counter()
    small_side = "n x n" if problem.n <= problem.P else "P x P"
    moments = _by_outputs(problem) if problem.n <= problem.P else _by_parameters(problem)
    metrics = METRICS if problem.theta_f is not None else METRICS[:-1]
    return {
        "problem": problem.name,
        "metrics": {metric: moments.metric(metric) for metric in metrics},
        "digest": problem.digest(),
        "n": problem.n,
        "P": problem.P,
        "side": small_side,
        "dtype": "float64",
        "seconds": round(time.perf_counter() - start, 1),
        "command": f"python -m ntkbench.problems.base.reference '{problem.name}'",
        "versions": _versions(),
    }


def _jacobians(problem: Problem) -> list[Any]:
    from ntkbench.operators import linearise

    ends = ["theta_0"] + ["theta_f"] * (problem.theta_f is not None)
    return [linearise(problem, end, Target(dtype="float64", memory=MEMORY)) for end in ends]


def _blocks(problem: Problem, jacobian: Any) -> tuple[list[Any], Any]:
    """Blocks of rows and what makes them: per sample where samples are independent, by whole passes otherwise."""
    if not problem.samples_interact:
        return list(jacobian.rectangles(0.25)), lambda j, rectangle: j.sample_rows(*rectangle)
    size = max(1, MEMORY // 4 // (problem.P * jacobian.itemsize))
    ranges = [(i, min(i + size, problem.n)) for i in range(0, problem.n, size)]
    return ranges, lambda j, span: j.vjp(j.basis(*span))


def _by_outputs(problem: Problem) -> Moments:
    jacobians = _jacobians(problem)
    blocks, rows = _blocks(problem, jacobians[0])
    metric = "alignment" if len(jacobians) == 2 else "norm"
    return from_rows_of_jacobian(metric, jacobians, blocks, rows)


def _by_parameters(problem: Problem) -> Moments:
    import torch
    from tqdm import tqdm

    jacobians = _jacobians(problem)
    blocks, rows = _blocks(problem, jacobians[0])
    # J^T J, J_f^T J_f and J^T J_f; float64 accumulators on the operator's device.
    pairs = [(0, 0), (1, 1), (0, 1)][: 3 if len(jacobians) == 2 else 1]
    like = jacobians[0].basis(0, 1)
    grams = [torch.zeros(problem.P, problem.P, dtype=like.dtype, device=like.device) for _ in pairs]
    for block in tqdm(blocks, desc=problem.name, unit="block", disable=None):
        made = [rows(jacobian, block) for jacobian in jacobians]
        for gram, (a, b) in zip(grams, pairs, strict=True):
            gram.addmm_(made[a].T, made[b])
    squares = [float(squared_norm(gram)) for gram in grams]
    return Moments(float(grams[0].trace()), *squares)


def _read(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


def _json(record: dict[str, Any]) -> str:
    return json.dumps(record, indent=1) + "\n"


def _versions() -> dict[str, str]:
    import numpy
    import torch

    return {"torch": torch.__version__, "numpy": numpy.__version__, "python": sys.version.split()[0]}


def _main(labels: list[str]) -> None:
    for label in labels:
        problem = problems.load(label)
        problems.commit_weights(label)
        record = compute(problem)
        paths.write_atomically(file_of(label, paths.REFERENCE), _json(record))
        print(label, json.dumps(record["metrics"]), f"{record['seconds']} s", flush=True)


if __name__ == "__main__":
    _main(sys.argv[1:])
