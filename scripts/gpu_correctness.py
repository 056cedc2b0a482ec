"""Check every path on a device against float64 on the CPU: one row per case. Run by ``scripts/gpu.py``.

python scripts/gpu_correctness.py rows.jsonl               on CUDA; cases that are already in the file are left out
python scripts/gpu_correctness.py rows.jsonl --device cpu  on the CPU
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import importlib.util
import json
import sys
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import click
import numpy as np
import torch
from torch import Tensor, nn

import ntkbench
from ntkbench import ambient, methods, operators, problems
from ntkbench.errors import Unavailable
from ntkbench.estimate import Estimate
from ntkbench.measure import outcomes
from ntkbench.methods import Method
from ntkbench.options import BACKENDS, Target
from ntkbench.problem import Problem

PROBLEMS = ("digits_conv[N=4]", "digits_mlp[N=8]", "gru_hazelden[N=2,T=3]")
HEADED = "transformer_tiny[N=2,T=3,V=20]"
"""Problem for methods that support none of :data:`PROBLEMS`."""
METRICS = {"alignment", "effective_rank"}
"""Together these use all moments of Theta. A method that gives neither is checked on one that it gives."""
PASSES = 400
"""Budget of a stochastic method."""
STANDARD_ERRORS = 6
"""Number of standard errors by which an estimate may be off."""
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}
"""Tolerance of relative errors of metrics and kernels."""
TOLERANCE_OF_PRODUCTS = {"float32": 1e-5, "float64": 1e-12}
"""The same for products with J, in the Frobenius norm. Errors of TF32, about 3e-4, do not pass."""
CPU = Target("torch", "float64", "cpu")
DEVICE_LOST = 3
"""Exit status after a CUDA error from which only a new process recovers."""


class Finding(NamedTuple):
    """The result of a case: it is correct if ``error``, relative to the reference, is at most ``tolerance``."""

    value: float
    reference: float
    error: float
    tolerance: float


class Case(NamedTuple):
    """One thing to check, and one row."""

    case: str
    backend: str
    device: str
    dtype: str
    check: Callable[[], Finding]

    @property
    def key(self) -> dict[str, str]:
        """Columns that identify the case."""
        return {name: getattr(self, name) for name in self._fields[:4]}


def cases(device: str, labels: Iterable[str] = PROBLEMS) -> Iterator[Case]:
    """All cases on ``"cuda"`` or ``"cpu"``, the basic ones first.

    Args:
        device: where everything but the references is computed.
        labels: problems of the products and methods.
    """
    backends = [backend for backend in BACKENDS if importlib.util.find_spec(backend)]
    for label in labels:
        for target in (Target(backend, dtype, device) for backend in backends for dtype in TOLERANCE):
            yield _case(f"products {label}", target, products, label, target)
    for target in (Target(backend, "float32", device) for backend in backends):
        yield _case("out of memory", target, out_of_memory, target)
        yield _case("allocator's peak", target, peak, target)
        yield _case("memory left to others", target, memory_left, target)
    for index in range(torch.cuda.device_count() if device == "cuda" else 1):
        yield from _cases_of_api(f"cuda:{index}" if device == "cuda" else device)
    for target in (Target(backend, "float32", device) for backend in backends):
        given = set()
        for label in (*labels, HEADED):
            for method in map(methods.get, methods.names()):
                if label == HEADED and method.name in given:
                    continue
                for metric in sorted(METRICS.intersection(method.metrics)) or method.given[:1]:
                    if method.unsupported_reason(problems.load(label), metric, target, PASSES) is None:
                        given.add(method.name)
                        yield _case(f"{method.name} {metric} {label}", target, of_method, method, metric, label, target)


def _case(name: str, target: Target, check: Callable[..., Finding], *arguments: Any) -> Case:
    return Case(name, target.backend, target.device, target.dtype, functools.partial(check, *arguments))


def _cases_of_api(place: str) -> Iterator[Case]:
    calls: dict[str, dict[str, Any]] = {"trace": {}, "norm": {}, "effective_rank": {}, "alignment": {}}
    calls["metrics_of"] = {"method": "hutchinson", "passes": PASSES}
    for name, (model, model_f, x) in networks().items():
        for function, options in calls.items():
            check = functools.partial(of_api, function, model, model_f, x, place, options)
            yield Case(f"ntkbench.{function} {name}", "torch", place, "float32", check)
        if name in WITH_KERNEL:
            yield Case(f"ntkbench.ntk {name}", "torch", place, "float32", functools.partial(of_ntk, model, x, place))


def near(value: float, reference: float, tolerance: float) -> Finding:
    """The finding of a value that may be off by a relative tolerance."""
    return Finding(value, reference, abs(value - reference) / abs(reference), tolerance)


def entrywise(found: Tensor, exact: Tensor, tolerance: float) -> Finding:
    """The finding of an array on the host, by its error in the Frobenius norm."""
    norm = float(exact.norm())
    return Finding(float(found.norm()), norm, float((found - exact).norm()) / norm, tolerance)


def furthest_off(findings: Iterable[Finding]) -> Finding:
    """The worst of several findings."""
    return max(findings, key=lambda finding: finding.error / finding.tolerance)


def trusted(estimate: Estimate, exact: float) -> Finding:
    """The finding of an estimate in float32 that may be off by rounding and, if it is random, some standard errors.

    Raises:
        ArithmeticError: its standard error is so large, or unknown, that any value would pass.
    """
    spread = STANDARD_ERRORS * (estimate.standard_error or 0.0) / abs(exact)
    if not spread < 1:
        raise ArithmeticError(f"the standard error is {estimate.standard_error}, for a value of {exact:g}")
    return near(estimate.value, exact, spread + TOLERANCE["float32"])


def products(label: str, target: Target) -> Finding:
    """J^T u and J w for the same random u and w on both devices, in the Frobenius norm."""
    problem = problems.load(label)
    # JAX sorts parameters by name, so sort them for both.
    problem = dataclasses.replace(problem, theta_0=dict(sorted(problem.theta_0.items())))
    there, here = (operators.linearise(problem, "theta_0", t) for t in (target, CPU))
    findings = []
    for product, size in (("vjp", here.n), ("jvp", here.P)):
        probes = there.rng(0).normal(3, size)
        found, exact = _on_host(getattr(there, product)(probes)), getattr(here, product)(_on_host(probes))
        findings.append(entrywise(found, exact, TOLERANCE_OF_PRODUCTS[target.dtype]))
    return furthest_off(findings)


def _on_host(array: Any) -> Tensor:
    tensor = array if isinstance(array, Tensor) else torch.from_numpy(np.array(array))
    return tensor.cpu().double()


def of_method(method: Method, metric: str, label: str, target: Target) -> Finding:
    """A method on the device: exact, equal to its approximation on the CPU, or within its error; reproducible.

    Raises:
        ArithmeticError: two calls with one seed gave different numbers.
    """
    passes = PASSES if method.takes_passes else None
    prepared = method.prepare(problems.load(label), target)
    first, second = (method.estimate(prepared, metric, passes, seed=0) for _ in range(2))
    if not near(second.value, first.value, TOLERANCE["float32"]).error <= TOLERANCE["float32"]:
        raise ArithmeticError(f"the same seed gave {first.value:.9g} and {second.value:.9g}")
    exact = "naive_jacobian" if metric in METRICS else "structured_derivatives"  # gives metrics of the whole kernel
    return trusted(first, _on_cpu(method.name if method.kind == "approximate" else exact, metric, label))


@functools.cache
def _on_cpu(name: str, metric: str, label: str) -> float:
    method = methods.get(name)
    return method.estimate(method.prepare(problems.load(label), CPU), metric).value


def linear(samples: int, inputs: int) -> Problem:
    """f(x) = <w, x> for inputs that are all ones: each entry of Theta is the number of inputs."""
    x, w = np.ones((samples, inputs), "float32"), {"weight": np.ones((1, inputs), "float32")}
    network = nn.Linear(inputs, 1, bias=False)
    return Problem(f"linear[{samples}]", network, x, w, jax_forward=lambda w, x: x @ w["weight"].T)


def _trace(problem: Problem, target: Target) -> float:
    """The trace by all columns of Theta, at once if the target's memory allows."""
    method = methods.get("direct")
    return method.estimate(method.prepare(problem, target), "trace").value


TOO_MANY = 700_001
"""Outputs whose Theta, 1.8 TiB in float32, no device holds. A power of two makes XLA divide by zero and die."""


def out_of_memory(target: Target) -> Finding:
    """A Theta that no device can hold is reported as out of memory, and the next computation works.

    Raises:
        MemoryError: there was no error.
    """
    try:
        _trace(linear(TOO_MANY, 1), dataclasses.replace(target, memory=2**62))
    except Exception as error:
        if outcomes.of_exception(error).status != outcomes.OUT_OF_MEMORY:
            raise
        return near(_trace(linear(8, 4), target), 32, TOLERANCE["float32"])
    raise MemoryError(f"{TOO_MANY}^2 entries of Theta at once exceeded no limit")


def peak(target: Target) -> Finding:
    """The allocator's peak is at least the memory that was certainly held.

    Raises:
        Unavailable: the device is the CPU, whose allocator does not count.
    """
    operators.reset_device_memory(target)
    _trace(linear(4096, 1), target)
    found, held = operators.device_memory(target), 4096**2 * target.itemsize
    if found is None:
        raise Unavailable("no allocator counts on the CPU")
    return Finding(found, held, max(0.0, 1 - found / held), 0.0)


def memory_left(target: Target) -> Finding:
    """A backend leaves at least half of the device free while it computes next to nothing.

    Raises:
        Unavailable: the device is the CPU.
    """
    if target.device == "cpu":
        raise Unavailable("the CPU's memory is no device's own")
    _trace(linear(8, 4), target)
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    return Finding(free, total, 1 - free / total, 0.5)


WITH_KERNEL = ("convolutions", "transformer")
"""Networks that :func:`ntkbench.ntk` accepts: samples do not interact, and the output is one tensor."""


def networks() -> dict[str, tuple[nn.Module, nn.Module, Tensor]]:
    """Networks like those of users, each at two sets of weights, with inputs."""

    def convolutions() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 6 * 6, 5))

    def normalised() -> nn.Module:
        return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.Tanh(), nn.Linear(16, 3))

    def transformer() -> nn.Module:
        return nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True)

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return {
            "convolutions": (convolutions(), convolutions(), torch.randn(4, 3, 8, 8)),
            "BatchNorm in train mode": (normalised(), normalised(), torch.randn(8, 6)),
            "transformer": (transformer(), transformer(), torch.randn(3, 5, 8)),
            "LSTM": (nn.LSTM(4, 8, batch_first=True), nn.LSTM(4, 8, batch_first=True), torch.randn(3, 6, 4)),
        }


def of_api(
    function: str, model: nn.Module, model_f: nn.Module, x: Tensor, place: str, options: dict[str, Any]
) -> Finding:
    """A public function on a model on the device; of several metrics, the one furthest off."""

    def call(place: str, **options: Any) -> dict[str, Estimate]:
        first, last = (copy.deepcopy(network).to(place) for network in (model, model_f))
        given = {"alignment": (first, last, x.to(place)), "metrics_of": (first, x.to(place), last)}
        found = getattr(ntkbench, function)(*given.get(function, (first, x.to(place))), **options)
        return found if isinstance(found, dict) else {function: found}

    found, exact = call(place, **options), call("cpu", dtype="float64", method="naive_jacobian")
    return furthest_off(trusted(estimate, exact[metric].value) for metric, estimate in found.items())


def of_ntk(model: nn.Module, x: Tensor, place: str) -> Finding:
    """The whole kernel on the model's device, in the Frobenius norm.

    Raises:
        RuntimeError: the kernel is on another device.
    """
    found = ntkbench.ntk(copy.deepcopy(model).to(place), x.to(place))
    if found.device != x.to(place).device:
        raise RuntimeError(f"the kernel lies on {found.device}")
    exact = ntkbench.ntk(model, x, dtype="float64")
    return entrywise(_on_host(found), exact, TOLERANCE["float32"])


def row(case: Case) -> dict[str, Any]:
    """Check a case and return its row, also if it fails: status and reason as in the suite, ``failed`` if wrong."""
    start = time.perf_counter()
    try:
        finding = case.check()
        wrong = not finding.error <= finding.tolerance
        outcome = outcomes.Outcome(outcomes.FAILED, "the value is wrong") if wrong else outcomes.Outcome(outcomes.OK)
        found = finding._asdict()
    except Exception as error:
        outcome, found = outcomes.of_exception(error), {}
    return case.key | found | outcome.columns() | {"seconds": round(time.perf_counter() - start, 3)}


@click.command(help=__doc__)
@click.argument("file", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--device", default="cuda", type=click.Choice(["cuda", "cpu"]))
@click.option("--few", is_flag=True, help="One problem, and every tenth of its methods.")
@click.option("--share", nargs=2, type=int, default=(0, 1), help="Index of this process, and number of processes.")
def main(file: Path, device: str, few: bool, share: tuple[int, int]) -> None:
    """Check the cases of one share and write their rows."""
    torch.set_num_threads(max(1, ambient.cores() // share[1]))
    lines = file.read_text(encoding="utf-8").splitlines() if file.exists() else []
    done = [{name: row[name] for name in Case._fields[:4]} for row in map(json.loads, lines)]
    chosen = list(cases(device, PROBLEMS[:1] if few else PROBLEMS))
    chosen = chosen[:: 10 if few else 1][share[0] :: share[1]]
    with file.open("a", encoding="utf-8") as rows:
        for case in chosen:
            if case.key in done:
                continue
            made = row(case)
            rows.write(json.dumps(made) + "\n")
            rows.flush()
            if made["status"] in outcomes.PASSING:
                print(f"correctness: {' '.join(case.key.values())}: {made['status']}: {made['reason']}", flush=True)
            if "CUDA error" in made["reason"]:
                sys.exit(DEVICE_LOST)


if __name__ == "__main__":
    main()
