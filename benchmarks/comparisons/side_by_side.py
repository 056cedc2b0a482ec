"""Two computations of one thing in turn: ``python -m benchmarks.comparisons.side_by_side --output FILE``.

A ratio of times taken minutes apart says as much about the machine as about the methods. Here subject and rival take
turns, and what is reported is the median of the ratios of neighbouring calls. Peak memory is measured in processes of
their own. A rival that cannot run is a row with its reason.
"""

from __future__ import annotations

import concurrent.futures
import multiprocessing
import os
import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import click
import numpy as np
import pandas as pd
from tqdm import tqdm

from benchmarks.comparisons.bare_products import bare_products
from benchmarks.comparisons.computations import COMPUTATIONS
from ntkbench import errors, methods, paths, problems
from ntkbench.errors import BadInput, NtkbenchError
from ntkbench.measure import timing
from ntkbench.measure.provenance import provenance
from ntkbench.options import Target

NEURAL_TANGENTS = ("nt_structured_derivatives", "nt_jacobian_contraction", "nt_ntk_vector_products")
BARE = "bare matrix products"
MEMORY = 2**32
"""Bytes for blocks, as a user with a few gigabytes would allow."""


@dataclass(frozen=True)
class Comparison:
    """One subject and its rivals on one problem.

    Methods compute the norm, so the whole kernel; for what else there is to compare see
    :mod:`benchmarks.comparisons.computations`.
    """

    problem: str
    rivals: tuple[str, ...] = NEURAL_TANGENTS
    subject: str = "structured_derivatives"


COMPARISONS = (
    Comparison("fc_relu[N=16,width=256]", (*NEURAL_TANGENTS, "jacobian_contraction")),
    Comparison("fc_relu[N=64,width=512]", (NEURAL_TANGENTS[0], "jacobian_contraction")),
    # The other two take 80 and 350 times as long as neural-tangents' best here.
    Comparison("fc_relu[N=128,width=1024]", NEURAL_TANGENTS[:1]),
    Comparison("fc_relu[N=512,width=256,depth=2]", (BARE, NEURAL_TANGENTS[0])),
    Comparison("conv_relu[N=64]"),
    Comparison("resnet18[N=8]"),
    Comparison("digits_conv[N=8]", (NEURAL_TANGENTS[0], "jacobian_contraction")),
    Comparison("digits_conv[N=64]", (NEURAL_TANGENTS[0], "jacobian_contraction")),
    Comparison("mlp_hazelden[N=2]", (NEURAL_TANGENTS[0], "jacobian_contraction")),
    Comparison("resnet18[N=64]", ("sum_of_logits",), "structured_sum_of_logits"),
    *(
        Comparison(problem, (BARE,), block)
        for problem in ("mlp_hazelden", "digits_mlp", "digits_conv[N=64]", "gru_hazelden")
        for block in ("64 VJPs", "64 JVPs")
    ),
    *(
        Comparison(problem, rivals, subject)
        for problem in ("rnn_flipflop[H=128,N=100]", "gru_flipflop[H=128,N=100]")
        for subject, rivals in {
            "64 VJPs": (BARE, "64 VJPs by torch.func"),
            "64 JVPs": (BARE, "64 JVPs by torch.func"),
            "alignment by 50 probes": ("alignment by 50 probes by torch.func",),
        }.items()
    ),
)


@click.command()
@click.option("--output", type=click.Path(path_type=Path), required=True)
@click.option("--threads", type=click.IntRange(min=1), default=2, show_default=True)
@click.option("--seconds", type=float, default=8.0, show_default=True, help="after which no further round is begun")
@click.option("--problem", "only", multiple=True, help="these problems only")
def main(output: Path, threads: int, seconds: float, only: Sequence[str]) -> None:
    """Measure every comparison and write a row for each rival."""
    with errors.as_one_line():
        if strangers := set(only) - {c.problem for c in COMPARISONS}:
            raise errors.unknown("problem", sorted(strangers)[0], [c.problem for c in COMPARISONS])
        use_threads(threads)
    chosen = [(c, rival) for c in COMPARISONS if not only or c.problem in only for rival in c.rivals]
    rows = []
    for comparison, rival in tqdm(chosen, unit="pair"):
        rows.append(measure(comparison, rival, threads, seconds))
        paths.write_atomically(output, pd.DataFrame(rows).to_csv(index=False))  # what is measured is not lost
    table = pd.DataFrame(rows)
    click.echo(table[["problem", "subject", "rival", "ratio", "memory_ratio", "difference", "reason"]].to_string())


def measure(comparison: Comparison, rival: str, threads: int, seconds: float) -> dict[str, Any]:
    """One row: medians of seconds, the median ratio with its quartiles, memory, and how far the values differ."""
    problem = problems.load(comparison.problem)
    row = {"problem": comparison.problem, "N": problem.N, "O": problem.O, "P": problem.P, "n": problem.n}
    row |= {
        "metric": "" if comparison.subject in COMPUTATIONS else "norm",
        "subject": comparison.subject,
        "rival": rival,
        "reason": "",
    }
    row |= {"threads": threads, **provenance().columns()}
    try:
        call = _call(comparison.subject, comparison.problem)
        value = call()  # compiles, warms up
        calls = [call, bare_products(call) if rival == BARE else _call(rival, comparison.problem)]
        rival_value = calls[1]()
    except (NtkbenchError, MemoryError, RuntimeError) as error:
        return row | {"reason": f"{type(error).__name__}: {str(error).splitlines()[0]}"}
    times = timing.in_turn(calls, seconds)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    memory = [_peak_memory(name, comparison.problem, threads) for name in (comparison.subject, rival)]
    return row | {
        "rounds": len(ratios),
        "seconds": statistics.median(times[0]),
        "rival_seconds": statistics.median(times[1]),
        **dict(zip(("ratio_q25", "ratio", "ratio_q75"), np.quantile(ratios, (0.25, 0.5, 0.75)), strict=True)),
        "memory_bytes": memory[0],
        "rival_memory_bytes": memory[1],
        "memory_ratio": memory[0] / memory[1] if all(memory) else None,
        "difference": None if rival == BARE else abs(value - rival_value) / abs(rival_value),
    }


def use_threads(threads: int) -> None:
    """Keep this process to a number of threads in every backend.

    Raises:
        BadInput: there are not so many cores.
    """
    if threads > len(os.sched_getaffinity(0)):
        raise BadInput(f"--threads {threads}: this process may use {len(os.sched_getaffinity(0))} cores")
    timing.use_threads(threads)


def _call(name: str, label: str) -> Callable[[], float]:
    """The timed region of a method: from device-ready inputs to a number on the host."""
    if name in COMPUTATIONS:
        return COMPUTATIONS[name](problems.load(label), Target("torch", "float32", "auto", MEMORY))
    method = methods.get(name)
    target = Target(method.backends[0], "float32", "auto", MEMORY)
    if reason := method.unsupported_reason(problems.load(label), "norm", target):
        raise BadInput(reason)
    prepared = method.prepare(problems.load(label), target)
    return lambda: float(method.estimate(prepared, "norm"))


def _peak_memory(name: str, label: str, threads: int) -> int | None:
    """Bytes by which one estimate raises the peak of a fresh process, after everything is prepared."""
    if name == BARE:
        return None
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, max_tasks_per_child=1) as pool:
        return pool.submit(_measure_memory, name, label, threads).result()


def _measure_memory(name: str, label: str, threads: int) -> int | None:
    import torch

    torch.set_num_threads(threads)
    peak = timing.peak_bytes(_call(name, label))
    if torch.cuda.is_available() and torch.cuda.max_memory_allocated():
        return torch.cuda.max_memory_allocated()
    return peak


if __name__ == "__main__":
    main()
