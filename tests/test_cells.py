"""Cells of the grid: what a configuration expands to, and what is left out with its reason."""

import pytest

from ntkbench import methods, problems
from ntkbench.measure import cells
from ntkbench.measure.config import Config

BLOCK = {"problems": ["digits_conv[N=4]"], "methods": ["hutchpp", "direct"], "metrics": ["trace"], "passes": [36, 72]}


def config(**changes):
    return Config.check({"profile": "test", "threads": 1, "grid": [BLOCK]} | changes, "test.yaml")


def test_only_stochastic_methods_take_budgets_and_seeds():
    found = cells.cells(config(seeds=7, calls=3))
    assert [(cell.label, cell.seeds, cell.calls) for cell in found] == [
        ("digits_conv[N=4]/direct/torch/trace", 1, 3),
        ("digits_conv[N=4]/hutchpp/torch/trace/36", 7, 3),
        ("digits_conv[N=4]/hutchpp/torch/trace/72", 7, 3),
    ]


def test_overlapping_blocks_give_each_cell_once_with_the_numbers_of_the_first():
    found = cells.cells(config(grid=[BLOCK | {"seeds": 3, "calls": 2}, BLOCK | {"backends": "all", "seeds": 9}]))
    assert len({cell.label for cell in found}) == len(found) == 6
    numbers = {(cell.backend, cell.seeds, cell.calls) for cell in found if cell.method == "hutchpp"}
    assert numbers == {("torch", 3, 2), ("jax", 9, 5)}


def test_spellings_of_one_problem_are_one_cell():
    spelled = ["digits_conv[N=04]", " digits_conv[ N = 4 ]"]
    blocks = [BLOCK, *(BLOCK | {"problems": [label]} for label in spelled)]
    assert cells.cells(config(grid=blocks)) == cells.cells(config())


def test_all_means_every_method_and_every_metric_that_it_gives():
    found = cells.cells(config(grid=[BLOCK | {"methods": "all", "metrics": "all"}]))
    assert {cell.method for cell in found} == {name for name in methods.names() if methods.get(name).metrics}
    for name in methods.names():
        assert {cell.metric for cell in found if cell.method == name} == set(methods.get(name).metrics)


@pytest.mark.parametrize("shards", [1, 2, 5])
def test_shards_partition_all_cells(shards):
    chosen = config(shards=shards)
    dealt = [cell for number in range(shards) for cell in cells.of_shard(chosen, number)]
    assert sorted(cell.label for cell in dealt) == sorted(cell.label for cell in cells.cells(chosen))


@pytest.mark.parametrize(
    ("method", "limits", "said"),
    [
        ("direct", {}, None),
        ("direct", {"passes": 10}, "limits.passes (10)"),
        ("hutchpp", {"passes": 10}, None),
        ("hutchpp", {"memory_mb": 0.001}, "limits.memory_mb (0.001)"),
    ],
)
def test_a_cell_over_a_limit_is_left_out_with_the_reason(method, limits, said):
    chosen = config(limits=limits, grid=[BLOCK | {"methods": [method]}])
    problem = problems.load("digits_conv[N=4]")
    for cell in cells.cells(chosen):
        reason = cells.unsupported(cell, problem, chosen)
        assert reason is None if said is None else said in reason


def test_the_limit_of_passes_skips_only_deterministic_methods():
    chosen = config(limits={"passes": 1}, grid=[BLOCK | {"methods": "all", "metrics": "all"}])
    problem = problems.load("digits_conv[N=4]")
    over = {
        cell.method
        for cell in cells.cells(chosen)
        if "limits.passes" in (cells.unsupported(cell, problem, chosen) or "")
    }
    assert {name for name in over if methods.get(name).takes_passes} == set()
    assert {"direct", "naive_jacobian", "structured_derivatives"} <= over
