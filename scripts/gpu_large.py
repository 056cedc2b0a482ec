"""Large cases on a device, as fractions of its limit: one row per case, with rivals in turn. Run by ``scripts/gpu.py``.

python scripts/gpu_large.py rows.jsonl                     all cases on CUDA
python scripts/gpu_large.py rows.jsonl --cases GPT-2       those whose names contain this

The limit of a case is its floating-point operations, as torch counts them in a call, over the peak rate of the device.
A case that fails has a row with the reason, and the next one runs. At first, a row is written for each case that says
that it was not measured; of two rows of a case, the later one counts. With ``--profile``, the operations that take
longest are written to a file.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import gc
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import torch
from torch import nn

import ntkbench
from ntkbench import methods, problems
from ntkbench.layerwise import reuse, sample_kernels
from ntkbench.measure import outcomes, timing
from ntkbench.operators import torch_network
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.studies.base import programs
from ntkbench.studies.base.computations import COMPUTATIONS

PEAK = {"float32": 67e12, "tf32": 495e12}
"""Operations per second of an H100 (SXM) outside its tensor cores, and in them in TF32; NVIDIA's data sheet."""
CALLS = 3
"""Timed calls of each computation, in turn, after the first call."""
CUT = outcomes.Outcome(outcomes.TIMEOUT, "not measured: the cases were stopped first, by their time limit or an error")
"""Outcome of a case that the process did not reach or did not finish."""

Call = Callable[[], float]
"""A timed region: from device-ready inputs to a number on the host."""


class Case(NamedTuple):
    """A timed computation and its rivals."""

    name: str
    make: Callable[[], Call]
    rivals: dict[str, Callable[[], Call]]
    dtype: str = "float32"
    error: Callable[[], float] | None = None


class Sizes(NamedTuple):
    """Sizes of all cases."""

    device: str
    samples: int
    recurrent: tuple[int, int, int]
    blog: tuple[int, int, int]
    gpt2: dict[str, int]
    tokens: int
    rivals: tuple[str, ...]
    memory: int


FULL = Sizes(
    "cuda",
    1000,
    (256, 100, 90),
    (128, 100, 10),
    {},
    1024,
    ("fc_relu[N=128]", "resnet18[N=8]", "conv_relu[N=64]"),
    40 * 2**30,
)
TINY = Sizes(
    "cpu",
    4,
    (8, 4, 6),
    (8, 4, 3),
    {"n_layer": 2, "n_embd": 16, "n_head": 2, "vocab_size": 50, "n_positions": 16},
    16,
    ("fc_relu[N=2,width=8]", "resnet18[N=2,width=4]", "conv_relu[N=2,width=4]"),
    2**28,
)


def cases(sizes: Sizes) -> Iterator[Case]:
    """All cases; those whose rivals take long to compile come last."""
    target = Target("torch", "float32", sizes.device, sizes.memory)
    for name, (H, N, T) in (("state", sizes.recurrent), ("blog", sizes.blog)):
        problem = _recurrent(H, N, T)
        ours, recipe = (
            functools.partial(COMPUTATIONS[f"alignment by 50 probes{way}"], problem, target)
            for way in ("", " by torch.func")
        )
        yield Case(f"alignment of an RNN's state [{N}, {T}, {H}] ({name})", ours, {"torch.func": recipe})
    label = f"resnet18[N={sizes.samples}]"
    for tf32 in (False, True):
        each, dtype = dataclasses.replace(target, tf32=tf32), "tf32" if tf32 else "float32"
        error = functools.partial(_error_of_tf32, f"resnet18[N={max(2, sizes.samples // 20)}]", target)
        trace = functools.partial(_method, "structured_derivatives", label, each, "trace")
        yield Case(f"Theta of {label}", functools.partial(_theta, label, each), {}, dtype, error if tf32 else None)
        yield Case(f"trace of {label}", trace, {}, dtype)
        yield Case(f"pNTK of {label}", functools.partial(_theta, label, each, "sum_of_logits"), {}, dtype)
        yield Case(
            f"trace of GPT-2, {sizes.tokens} tokens, 20 passes", functools.partial(_gpt2, sizes, tf32), {}, dtype
        )
    for label in sizes.rivals:
        rivals = {name: functools.partial(_method, name, label, target, "norm") for name in NEURAL_TANGENTS}
        yield Case(f"Theta of {label}", functools.partial(_theta, label, target), rivals)


NEURAL_TANGENTS = ("nt_jacobian_contraction", "nt_structured_derivatives")


def _method(name: str, label: str, target: Target, metric: str) -> Call:
    method = methods.get(name)
    target = target if "torch" in method.backends else Target("jax", target.dtype, target.device, target.memory)
    if reason := method.unsupported_reason(problems.load(label), metric, target):
        raise ntkbench.Unavailable(reason)
    prepared = method.prepare(problems.load(label), target)
    return lambda: float(method.estimate(prepared, metric))


def _theta(label: str, target: Target, kernel: str = "full") -> Call:
    """A whole kernel that stays on the device, and one of its entries on the host."""
    module, weights, x = torch_network(problems.load(label), "theta_0", target)
    engine, chosen = reuse.traced(module, weights, x, target.memory), sample_kernels.get(kernel)
    return lambda: float(chosen.compute(engine, list(weights.values()), x)[-1, -1])


def _error_of_tf32(label: str, target: Target) -> float:
    """||Theta in TF32 - Theta|| / ||Theta||, in the Frobenius norm."""
    found = []
    for tf32 in (False, True):
        module, weights, x = torch_network(problems.load(label), "theta_0", dataclasses.replace(target, tf32=tf32))
        found.append(reuse.traced(module, weights, x, target.memory).kernel(list(weights.values()), x))
    exact, rounded = found
    return float((rounded - exact).norm() / exact.norm())


def _recurrent(H: int, N: int, T: int) -> Problem:
    """States of an RNN before and after its weights have moved."""
    torch.manual_seed(0)
    layer = nn.RNN(3, H, batch_first=True)
    moved = copy.deepcopy(layer)
    with torch.no_grad():
        for w in moved.parameters():
            w.add_(0.1 * w.std() * torch.randn_like(w))
    return ntkbench.from_recurrent(layer, torch.randn(N, T, 3), moved)


def _gpt2(sizes: Sizes, tf32: bool) -> Call:
    """The trace of GPT-2 small with random weights, by 20 passes: to about 1 %."""
    from transformers import GPT2Config, GPT2LMHeadModel

    torch.manual_seed(0)
    model = GPT2LMHeadModel(GPT2Config(**sizes.gpt2)).eval()
    ids = torch.randint(model.config.vocab_size, (1, sizes.tokens))
    logits: Callable[[nn.Module, Any], Any] = lambda model, ids: model(ids, use_cache=False).logits  # noqa: E731
    kernel = ntkbench.Kernel(model, ids, call=logits, device=sizes.device, memory=sizes.memory, tf32=tf32)

    def call() -> float:
        found = kernel.trace(passes=20)
        print(f"  {found!r}", flush=True)
        return float(found)

    return call


def row(case: Case, sizes: Sizes, profiles: Path | None) -> dict[str, Any]:
    """Time a case and its rivals and return the row, also if the case fails."""
    try:
        return {**_about(case, sizes), **_measured(case, sizes, profiles), **outcomes.Outcome(outcomes.OK).columns()}
    except Exception as error:
        return without(case, sizes, outcomes.of_exception(error))


def without(case: Case, sizes: Sizes, outcome: outcomes.Outcome) -> dict[str, Any]:
    """The row of a case and of its rivals without measurements."""
    lost = dict.fromkeys(case.rivals, outcome.reason)
    return {**_about(case, sizes), **outcome.columns(), "rivals_left_out": lost}


def _about(case: Case, sizes: Sizes) -> dict[str, Any]:
    return {"case": case.name, "device": sizes.device, "dtype": case.dtype}


def _measured(case: Case, sizes: Sizes, profiles: Path | None) -> dict[str, Any]:
    on_gpu = sizes.device == "cuda"
    call = case.make()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    first = timing.timed(call, 0)
    peak = torch.cuda.max_memory_allocated() if on_gpu else None
    operations = _operations(call)  # before calls are recorded, since replayed operations are not counted
    calls, reasons, values = {case.name: call}, {}, {}
    for name, make in case.rivals.items():
        try:
            rival = make()
            values[name] = rival()
            calls[name] = rival
        except Exception as error:
            reasons[name] = outcomes.of_exception(error).reason
    taken = dict(zip(calls, timing.in_turn(list(calls.values()), CALLS), strict=True))
    if profiles is not None:
        with profiles.open("a", encoding="utf-8") as file:
            file.write(f"{case.name}, {case.dtype}\n{_profile(call, on_gpu)}\n\n")
    own = timing.quartiles("seconds", taken.pop(case.name))
    rivals = {name: timing.quartiles("seconds", each)["seconds"] for name, each in taken.items()}
    return {
        **own,
        "first_call_seconds": first.first_seconds,
        "calls": CALLS,
        "memory_bytes": peak,
        "operations": operations,
        "limit_seconds": operations / PEAK[case.dtype],
        "times_limit": own["seconds"] * PEAK[case.dtype] / operations if operations else None,
        "rival_seconds": rivals,
        "ratios": {name: own["seconds"] / each for name, each in rivals.items()},
        "value": first.first,
        "error": case.error() if case.error else None,
        "rival_values": values,
        "rivals_left_out": reasons,
    }


def _operations(call: Call) -> float:
    try:
        return programs.torch_flops(call)
    except Exception as error:
        print(f"  operations were not counted: {error}", flush=True)
        return 0.0


def _profile(call: Call, on_gpu: bool) -> str:
    """The operations that take longest, and how long the device is busy."""
    from torch.profiler import ProfilerActivity, profile

    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if on_gpu else [])]
    with profile(activities=activities, acc_events=True) as profiler:
        call()
    by = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    return str(profiler.key_averages().table(sort_by=by, row_limit=25, max_name_column_width=90))


@click.command(help=__doc__)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--tiny", is_flag=True, help="On the CPU, at sizes whose numbers mean nothing.")
@click.option("--profile", "profiles", type=click.Path(path_type=Path, dir_okay=False), help="File of profiles.")
@click.option("--cases", "wanted", default="", help="Part of the names of the cases to run.")
def main(file: Path, tiny: bool, profiles: Path | None, wanted: str) -> None:
    """Time the cases and write their rows, after rows that say that they were not measured."""
    sizes = TINY if tiny else FULL
    chosen = [case for case in cases(sizes) if wanted in case.name]
    with file.open("a", encoding="utf-8") as rows:
        rows.writelines(json.dumps(without(case, sizes, CUT)) + "\n" for case in chosen)
        rows.flush()
        for case in chosen:
            start = time.perf_counter()
            made = row(case, sizes, profiles)
            rows.write(json.dumps(made) + "\n")
            rows.flush()
            said = (
                f"{made['seconds']:.4g} s, {made['times_limit'] or 0:.3g} limits, {made['ratios']}"
                if made["status"] == outcomes.OK
                else f"{made['status']}: {made['reason']}"
            )
            print(f"large: {case.name} {case.dtype}: {said} [{time.perf_counter() - start:.0f} s]", flush=True)
            gc.collect()
            if sizes.device == "cuda":
                torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
