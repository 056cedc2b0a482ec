"""Recorded products, with a recorder that works on the CPU: what is recorded, replayed and dropped."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from ntkbench.operators.recurrent import graphs


class Pair(NamedTuple):
    one: Tensor
    other: Tensor | None


class Recorder:
    """Runs a call again on a replay, and writes its results into those of the recording, as a graph does."""

    def __init__(self) -> None:
        self.recorded = self.replayed = 0

    def __call__(self, run: Any) -> tuple[Any, Any, int]:
        self.recorded += 1
        results = run()

        def replay() -> None:
            self.replayed += 1
            new = run()
            for mine, made in zip(results, new, strict=True):
                mine.copy_(made)

        return results, replay, 100


@pytest.fixture
def recorder(monkeypatch):
    found = Recorder()
    monkeypatch.setattr(graphs, "_record", found)
    graphs.forget()
    yield found
    graphs.forget()


def function(pair: Pair, named: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
    product = pair.one @ named["w"]
    return product.mul_(2), pair.one.add_(1)  # the argument is overwritten


def arguments(seed: int, size: int = 3) -> tuple[Pair, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return Pair(torch.randn(2, size, generator=generator), None), {"w": torch.randn(size, 4, generator=generator)}


def test_calls_are_recorded_after_some_plain_ones_with_equal_results(recorder):
    kept = []
    for seed in range(graphs.PLAIN + 4):
        kept.append((graphs.call("f", function, *arguments(seed)), function(*arguments(seed))))
        assert (recorder.recorded, recorder.replayed) == (seed >= graphs.PLAIN, max(0, seed - graphs.PLAIN + 1))
    for found, expected in kept:  # earlier results are not overwritten by later replays
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_other_functions_shapes_and_structures_are_recorded_separately(recorder):
    calls = {
        "f": lambda: graphs.call("f", function, *arguments(0)),
        "g": lambda: graphs.call("g", lambda pair, named: (pair.one + 1,), *arguments(0)),
        "size": lambda: graphs.call("f", function, *arguments(0, size=5)),
        "present": lambda: graphs.call("h", lambda pair: (pair.one + pair.other,), Pair(torch.ones(2), torch.ones(2))),
        "absent": lambda: graphs.call("h", lambda pair: (pair.one,), Pair(torch.ones(2), None)),
    }
    for _ in range(graphs.PLAIN + 1):
        results = {name: call() for name, call in calls.items()}
    assert recorder.recorded == len(calls)
    torch.testing.assert_close(results["present"][0], 2 * torch.ones(2))
    torch.testing.assert_close(results["absent"][0], torch.ones(2))


def test_least_recently_used_recordings_are_dropped_over_the_memory_limit(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "HELD", 300)
    for size in (3, 4, 5):
        for _ in range(graphs.PLAIN + 1):
            graphs.call("f", function, *arguments(0, size))
    assert recorder.recorded == 3
    graphs.call("f", function, *arguments(0, 5))
    assert recorder.recorded == 3
    for _ in range(graphs.PLAIN + 1):
        graphs.call("f", function, *arguments(0, 3))
    assert recorder.recorded == 4


def test_large_arguments_are_never_recorded(recorder, monkeypatch):
    monkeypatch.setattr(graphs, "LARGEST", 8)
    for _ in range(graphs.PLAIN + 2):
        graphs.call("f", function, *arguments(0))
    assert recorder.recorded == 0


def test_calls_in_tf32_and_in_float32_are_recorded_separately(recorder):
    flags = torch.backends.cuda.matmul
    before = flags.allow_tf32
    try:
        for tf32 in (True, False):
            flags.allow_tf32 = tf32
            for _ in range(graphs.PLAIN + 1):
                graphs.call("f", function, *arguments(0))
    finally:
        flags.allow_tf32 = before
    assert recorder.recorded == 2


def test_a_call_that_cannot_be_recorded_runs_plainly(recorder, monkeypatch):
    tried = []

    def refuse(run):
        tried.append(run)
        raise RuntimeError("out of memory")

    monkeypatch.setattr(graphs, "_record", refuse)
    for seed in range(graphs.PLAIN + 3):
        found = graphs.call("f", function, *arguments(seed))
        torch.testing.assert_close(found, function(*arguments(seed)), rtol=0, atol=0)
    assert len(tried) == 1
