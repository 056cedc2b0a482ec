"""A run as a scheduler sees it: the resources of each step, and the distribution of the grid over shards."""

import math

import pandas as pd
import pytest

from ntkbench import paths
from ntkbench.measure import cells, provenance
from ntkbench.measure.config import Config
from ntkbench.run import BEGIN_S, BESIDE_MB, Run

BLOCK = {
    "problems": ["digits_conv[N=4]", "mlp_hazelden[N=2]"],
    "methods": ["hutchpp", "direct"],
    "metrics": ["trace"],
    "passes": [36, 72],
}
GOAL = {"problem": "mnist_mlp", "metric": "trace", "error": 0.1}


def run(here=True, **changes):
    given = {"profile": "test", "threads": 1, "grid": [BLOCK]} | changes
    return Run(Config.check(given, "test.yaml", here=here))


def test_memory_and_time_are_those_of_the_limits():
    made = run(shards=4, limits={"time_s": 90, "memory_mb": 3000.5, "problem_s": 600})
    assert made.shards == [0, 1, 2, 3]
    for number in made.shards:
        count = len(cells.of_shard(made.config, number))
        needs = made.needs(number=number)
        assert needs == made.needs(number=str(number))
        assert (needs.mem_mb, needs.runtime) == (3001 + BESIDE_MB, math.ceil((BEGIN_S + count * 2 * 90) / 60))
    assert made.needs().runtime == (BEGIN_S + 2 * 600) // 60


def test_no_job_requests_more_hours_than_job_h():
    made = run(job_h=0.5, limits={"time_s": 3600}, studies={"training": {}})
    assert made.needs(number=0).runtime == made.needs(study="training").runtime == made.needs().runtime == 30


def test_a_study_has_its_own_limits_and_device():
    chosen = {"novak_time": {"device": "cuda", "limits": {"memory_mb": 100}}, "training": {}}
    made = run(here=False, studies=chosen, limits={"memory_mb": 200})
    assert (made.needs(study="novak_time").mem_mb, made.needs(study="novak_time").gpu) == (100 + BESIDE_MB, 1)
    assert (made.needs(study="training").mem_mb, made.needs(study="training").gpu) == (200 + BESIDE_MB, 0)
    assert made.needs(number=0).gpu == 0 and run(here=False, device="cuda").needs(number=0).gpu == 1


def test_a_step_may_change_if_a_row_failed_or_data_were_missing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("NTKBENCH_DATA", raising=False)
    made = run(studies={"training": {}})
    steps = {"problems.json": {}, "shards/shard-0.csv": {"number": 0}, "studies/training.csv": {"study": "training"}}
    for name, step in steps.items():
        file = made.results / name
        file.parent.mkdir(parents=True, exist_ok=True)
        for status in ("ok", "timeout"):
            json = file.suffix == ".json"
            file.write_text(f'{{"a": {{"status": "{status}"}}}}' if json else f"status\n{status}\n", encoding="utf-8")
            assert made.may_change(**step) == (status == "timeout"), name
        file.unlink()
        assert not made.may_change(**step), name
    assert run(grid=[BLOCK | {"problems": ["mnist_mlp"]}]).may_change()
    assert run(studies={"time_to_error": {"goals": [GOAL]}}).may_change(study="time_to_error")


def test_timed_steps_have_their_machine_and_all_threads():
    made = run(here=False, threads=64, studies={"novak_time": {}, "training": {}})
    assert [made.needs(study=name)[::4] for name in ("novak_time", "training")] == [(64, 2), (1, 1)]
    assert made.needs(number=0)[::4] == (64, 2) and made.needs()[::4] == (64, 1)


def test_cores_and_device_are_of_the_machine_that_measures(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    made = run(here=False, threads=4096, device="cuda", studies={"training": {}})
    assert made.config.study("training").threads == 4096
    assert Run(made.config).made_for.table("training") == made.made_for.table("training") != ""


def test_shards_split_the_papers_grid_evenly(monkeypatch):
    """Each pair of a problem and a method is in one shard, and shards differ by at most one pair."""
    config = Config.of_files([paths.ROOT / "config" / "paper.yaml"], {"shards": 64, "threads": 1})
    every = cells.cells(config)
    monkeypatch.setattr(cells, "cells", lambda _: every)  # the same for each shard
    dealt = [cells.of_shard(config, number) for number in range(64)]
    pairs = [{(cell.problem, cell.method) for cell in shard} for shard in dealt]
    assert sum(map(len, pairs)) == len(set.union(*pairs)) > 64
    assert max(map(len, pairs)) - min(map(len, pairs)) <= 1
    assert len({cell.method for cell in cells.cells(config)}) < 64, "methods alone would do"


def test_rows_from_several_kinds_of_machines_are_marked():
    table = pd.DataFrame({"status": "ok", "machine": ["A (2 cores)"] * 3, "device": "cpu"})
    assert provenance.several_machines(table) == ""
    mixed = table.assign(device=["cpu", "cpu", "H200"], seconds=[1.0, 2.0, 3.0])
    assert "A (2 cores), cpu: 2" in provenance.several_machines(mixed), "resumed on a machine with a GPU"
    assert provenance.several_machines(mixed.assign(seconds=[None, None, 3.0])) == "", "counts have no device"
    assert provenance.several_machines(table.assign(machine=["A", "A", "B"], status=["ok", "ok", "failed"])) == ""
    said = provenance.several_machines(table.assign(machine=["A", "B", "A"]))
    assert "not comparable" in said and "A, cpu: 2" in said and "B, cpu: 1" in said
    assert "H100: 1" in provenance.several_machines(table.assign(device=["H200", "H100", "cpu"]))


@pytest.mark.parametrize("study", ["training", "novak_time"])
def test_whether_a_study_is_timed_is_read_without_importing_it(study):
    assert (run(here=False, studies={study: {}}).needs(study=study).timer == 2) == (study == "novak_time")
