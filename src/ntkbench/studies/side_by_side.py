"""Two computations of the same quantity, timed in turn: a ratio of seconds robust to slowdowns of the machine.

A ratio of seconds measured minutes apart depends on the machine as much as on the methods. Here subject and rival take
turns, and the ratio is the median over pairs of neighbouring calls. Peak memory is that of a later call in a process of
its own.
"""

from __future__ import annotations

import functools
import multiprocessing
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from typing import Any

import pandas as pd
import psutil
from pydantic import Field, PositiveFloat, PositiveInt, model_validator

from ntkbench import methods, operators, problems
from ntkbench.errors import BadInput, NtkbenchError, Unavailable
from ntkbench.measure import outcomes, timing, watchdog
from ntkbench.measure.schema import MetricName, ProblemLabel, Strict
from ntkbench.measure.seeds import relative_error
from ntkbench.metrics import squared_norm
from ntkbench.studies import base
from ntkbench.studies.base.computations import COMPUTATIONS

TIMED = True
PLUGINS = (*base.methods_and_problems(), *base.JAX)
NEURAL_TANGENTS = ["nt_structured_derivatives", "nt_jacobian_contraction", "nt_ntk_vector_products"]
BARE = "bare matrix products"


class Comparison(Strict):
    """A subject and its rivals on one problem.

    Attributes:
        problem: label of the problem.
        rivals: methods, or keys of :data:`ntkbench.studies.base.computations.COMPUTATIONS`; :data:`BARE` stands for the
            matrix products and convolutions in the subject, by themselves.
        subject: a method or computation.
        calls: calls of each, instead of the study's.
        metric: the metric that methods compute; the norm uses all of Theta.
        share: share of the rows of J that ``naive_jacobian`` is timed for, as the rival in a trace: at least one row,
            and a whole number of them. Its seconds are divided by the share of the rows that are timed.
    """

    problem: ProblemLabel
    rivals: list[str] = Field(default=NEURAL_TANGENTS, min_length=1)
    subject: str = "structured_derivatives"
    calls: PositiveInt | None = None
    metric: MetricName = "norm"
    share: PositiveFloat = Field(default=1.0, le=1)

    @model_validator(mode="after")
    def _computations_exist(self) -> Comparison:
        kinds = [name in COMPUTATIONS for name in (self.subject, *self.rivals) if name != BARE]
        if self.subject == BARE or len(set(kinds)) > 1:
            raise BadInput("methods are compared with methods, and computations with computations")
        if self.share < 1 and (self.rivals, self.metric) != (["naive_jacobian"], "trace"):
            raise BadInput("a share of the rows of J is only timed for naive_jacobian and the trace")
        if not kinds[0]:
            for name in (self.subject, *self.rivals):
                name == BARE or methods.get(name)
        return self


def _recurrent(problem: str) -> list[Comparison]:
    alignment = "alignment by 50 probes"
    return [
        Comparison.model_construct(problem=problem, subject=subject, rivals=rivals)
        for subject, rivals in {
            "64 VJPs": [BARE, "64 VJPs by torch.func"],
            "64 JVPs": [BARE, "64 JVPs by torch.func"],
            alignment: [f"{alignment} by torch.func"],
        }.items()
    ]


def _blocks(problem: str) -> list[Comparison]:
    return [Comparison.model_construct(problem=problem, subject=s, rivals=[BARE]) for s in ("64 VJPs", "64 JVPs")]


def _methods(problem: str, rivals: list[str] = NEURAL_TANGENTS, **more: Any) -> Comparison:
    # Not validated while this file is imported: that would import all problems and methods.
    return Comparison.model_construct(problem=problem, rivals=rivals, **more)


COMPARISONS = [
    _methods("fc_relu[N=16,width=256]", [*NEURAL_TANGENTS, "jacobian_contraction"]),
    _methods("fc_relu[N=64,width=512]", [NEURAL_TANGENTS[0]]),
    _methods("fc_relu[N=64,width=512]", ["jacobian_contraction"], calls=2),
    # The other two take far longer than neural-tangents' best here.
    _methods("fc_relu", NEURAL_TANGENTS[:1]),
    _methods("fc_relu[N=512,depth=2,width=256]", [BARE, NEURAL_TANGENTS[0]]),
    _methods("conv_relu", NEURAL_TANGENTS[:1], calls=5),
    _methods("conv_relu", NEURAL_TANGENTS[1:], calls=1),
    _methods("resnet18", NEURAL_TANGENTS[:1], calls=5),
    _methods("resnet18", NEURAL_TANGENTS[1:], calls=1),
    _methods("resnet18[N=32]", NEURAL_TANGENTS[:1], calls=3),
    _methods("digits_conv[N=8]", [NEURAL_TANGENTS[0], "jacobian_contraction"], calls=100),
    _methods("digits_conv[N=64]", [NEURAL_TANGENTS[0], "jacobian_contraction"]),
    _methods("mlp_hazelden[N=2]", [NEURAL_TANGENTS[0]], calls=100),
    _methods("mlp_hazelden[N=2]", ["jacobian_contraction"]),
    # A vocabulary of 2,048 at 8 positions: 16,384 backward passes instead of 512.
    _methods("transformer_tiny[N=1,T=8,V=2048,d=64]", ["naive_jacobian"], subject="wide_head", calls=1, metric="trace"),
    # A vocabulary of 4,096 at 32 positions: 131,072 backward passes, of which 262 are timed.
    _methods(
        "transformer_tiny[N=1,T=32,V=4096,d=64]",
        ["naive_jacobian"],
        subject="wide_head",
        calls=3,
        metric="trace",
        share=0.002,
    ),
    _methods("resnet18[N=64]", ["sum_of_logits"], subject="structured_sum_of_logits", calls=3),
    _methods("resnet18[N=4,depth=152]", ["sum_of_logits"], subject="structured_sum_of_logits", calls=3),
    _methods("resnet18[N=16,depth=101]", ["sum_of_logits"], subject="structured_sum_of_logits", calls=1),
    Comparison.model_construct(
        problem="gru_hazelden", subject="64 JVPs, a tangent for each trial", rivals=["64 JVPs"], calls=5
    ),
    *(c for problem in ("mlp_hazelden", "digits_mlp", "digits_conv[N=64]", "gru_hazelden") for c in _blocks(problem)),
    *(c for kind in ("rnn", "gru") for c in _recurrent(f"{kind}_flipflop[H=128,N=100]")),
]


class Settings(base.Settings):
    """The comparisons.

    Attributes:
        comparisons: subjects and rivals.
        calls: calls of subject and rival each, made in turn.
    """

    USES = (*base.OF_TARGET, "calls")

    calls: PositiveInt = 20
    comparisons: list[Comparison] = Field(default=COMPARISONS, min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each subject and rival: seconds, the ratio with its quartiles, memory, and how much values differ."""
    return base.table(row for comparison in settings.comparisons for row in _rows(settings, comparison))


def _rows(settings: Settings, comparison: Comparison) -> Iterator[base.Row]:
    c = comparison
    call_of = functools.partial(_call, settings, label=c.problem, metric=c.metric)
    subject = base.Once(lambda: call_of(c.subject))
    first = base.Once(lambda: timing.timed(subject(), 0))
    memory = base.Once(lambda: _peak_memory(settings, c.subject, c.problem, c.metric))

    def measure(rival: str) -> dict[str, Any]:
        from ntkbench.studies.base.bare_products import bare_products

        sizes = base.sizes(problems.load(c.problem))
        value, call = first().first, subject()
        share = 1.0
        rival_call: Callable[[], Any]
        if c.share < 1:
            share, rival_call = _some_rows(settings, c.problem, c.share)
        else:
            rival_call = bare_products(call) if rival == BARE else call_of(rival)
        rival_first = timing.timed(rival_call, 0)
        times, rival_times = timing.in_turn([call, rival_call], c.calls or settings.calls)
        rival_times = [seconds / share for seconds in rival_times]
        alike = rival != BARE and c.share == 1
        peak, rival_peak = memory(), _peak_memory(settings, rival, c.problem, c.metric) if alike else None
        return {
            **sizes,
            **timing.quartiles("seconds", times),
            **timing.quartiles("rival_seconds", rival_times),
            **timing.quartiles("ratio", [a / b for a, b in zip(times, rival_times, strict=True)]),
            "calls": len(times),
            "first_call_seconds": first().first_seconds,
            "rival_first_call_seconds": rival_first.first_seconds,
            "memory_bytes": peak,
            "rival_memory_bytes": rival_peak,
            "memory_ratio": peak / rival_peak if peak and rival_peak else None,
            "share": share,
            "difference": relative_error(value, rival_first.first) if alike else None,
        }

    for rival in c.rivals:
        case = {"problem": c.problem, "metric": "" if c.subject in COMPUTATIONS else c.metric}
        yield base.row({**case, "subject": c.subject, "rival": rival}, functools.partial(measure, rival))


def _call(settings: Settings, name: str, label: str, metric: str) -> Callable[[], float]:
    """The timed region of a method or computation: from device-ready inputs to a number on the host."""
    problem = problems.load(label)
    if name in COMPUTATIONS:
        return COMPUTATIONS[name](problem, settings.target())
    method = methods.get(name)
    target = settings.target(method.backends[0])
    if reason := method.unsupported_reason(problem, metric, target):
        raise Unavailable(reason)
    prepared = method.prepare(problem, target)
    return lambda: float(method.estimate(prepared, metric))


def _some_rows(settings: Settings, label: str, share: float) -> tuple[float, Callable[[], float]]:
    """Some of the backward passes of a trace by rows of J, evenly spaced among the outputs, after their share of all.

    Args:
        settings, label: where it is computed, and the problem.
        share: the share to come close to.
    """
    j = operators.linearise(problems.load(label), "theta_0", settings.target())
    count = max(1, round(share * j.n))
    rows = [j.n * i // count for i in range(count)]
    return count / j.n, lambda: sum(float(squared_norm(j.row(i))) for i in rows)


def _peak_memory(settings: Settings, name: str, label: str, metric: str) -> int | None:
    """Bytes by which an estimate raises the peak memory of a process of its own, after a first one that compiles.

    On a GPU, the peak of all allocations; ``None`` if it is not known for that estimate.

    Raises:
        NtkbenchError: the estimate failed there, or exceeded the limits.
    """
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe(duplex=False)
    child = context.Process(target=_send_peak_memory, args=(there, settings, name, label, metric))
    child.start()
    there.close()
    limits = settings.limits
    watched = watchdog.Watched(psutil.Process(child.pid), time.monotonic(), limits.time_s)
    with watchdog.Watch(lambda: [watched], limits.memory_bytes) as watch:
        try:
            found = here.recv()
        except EOFError:  # it was killed
            found = ()
        child.join()
    if not isinstance(found, tuple):
        return found
    _, reason = found or watch.verdict or outcomes.of_exit(child.exitcode or 0)
    raise NtkbenchError(f"memory of {name}: {reason}")


def _send_peak_memory(there: Connection, settings: Settings, name: str, label: str, metric: str) -> None:
    watchdog.end_with_parent()
    try:
        timing.use_threads(settings.threads)
        call = _call(settings, name, label, metric)
        call()
        target = settings.target("torch" if name in COMPUTATIONS else methods.get(name).backends[0])
        there.send(timing.peak_bytes_on(target, call))
    except Exception as error:
        there.send(tuple(outcomes.of_exception(error)))
