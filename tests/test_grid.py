"""Configurations: what they expand to, what is refused, and which changes make a method run again."""

from pathlib import Path

import pytest
from ntkbench.measure.grid import Cell, Config

from ntkbench import methods, paths, problems
from ntkbench.errors import BadInput
from ntkbench.measure import grid

BLOCK = {"problems": ["digits_conv[N=4]"], "methods": ["hutchpp", "direct"], "metrics": ["trace"], "passes": [36, 72]}
SUITE = paths.ROOT / "benchmarks"


def config(**changes):
    return Config.check({"profile": "test", "threads": 1, "grid": [BLOCK]} | changes, "test.yaml")


@pytest.mark.parametrize("name", ["smoke", "default", "history", "paper"])
def test_committed_configurations_are_valid_and_their_cells_distinct(name):
    file = paths.ROOT / "config" / f"{name}.yaml"
    read = Config.read(file)
    labels = [cell.label for cell in grid.cells(read)]
    assert len(labels) == len(set(labels)) and (labels or read.studies)


def test_only_stochastic_methods_take_budgets():
    labels = [cell.label for cell in grid.cells(config())]
    assert labels == [
        "digits_conv[N=4]/direct/torch/trace",
        "digits_conv[N=4]/hutchpp/torch/trace/36",
        "digits_conv[N=4]/hutchpp/torch/trace/72",
    ]


def test_overlapping_blocks_give_each_cell_once_and_all_backends_on_request():
    cells = grid.cells(config(grid=[BLOCK, BLOCK | {"backends": "all"}]))
    assert len(cells) == len(set(cells)) == 6
    assert {cell.backend for cell in cells} == {"torch", "jax"}


def test_all_means_every_method_and_every_metric_that_it_gives():
    cells = grid.cells(config(grid=[BLOCK | {"methods": "all", "metrics": "all"}]))
    assert {cell.method for cell in cells} == set(methods.names())
    for name in methods.names():
        assert {cell.metric for cell in cells if cell.method == name} == set(methods.get(name).metrics)


def test_labels_can_be_read_back():
    for cell in grid.cells(config()):
        assert Cell.from_label(cell.label) == cell


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        (
            {"grid": [BLOCK | {"problems": ["digit_conv"]}]},
            ["grid[0].problems", "digit_conv", "did you mean", "mlp_he"],
        ),
        ({"grid": [BLOCK | {"problems": ["digits_conv[M=4]"]}]}, ["digits_conv[M=4]", "N=<positive integer"]),
        ({"grid": [BLOCK | {"methods": ["hutch"]}]}, ["grid[0].methods", "'hutch'", "did you mean 'hutch", "direct"]),
        ({"grid": [BLOCK | {"metrics": ["trac"]}]}, ["grid[0].metrics", "'trac'", "effective_rank"]),
        ({"grid": [BLOCK | {"passes": [36, 0]}]}, ["grid[0].passes[1]", "0", "greater than 0"]),
        ({"grid": [BLOCK | {"passes": [-3]}]}, ["grid[0].passes[0]", "-3", "greater than 0"]),
        ({"grid": [BLOCK | {"passes": []}]}, ["grid[0]", "passes is empty", "hutchpp"]),
        ({"grid": [BLOCK | {"passse": [3]}]}, ["grid[0].passse", "no such key", "passes"]),
        ({"grid": []}, ["grid and studies are both empty"]),
        ({"seedz": 3}, ["seedz", "no such key", "seeds"]),
        ({"device": "gpu"}, ["device", "'gpu'", "'auto', 'cpu' or 'cuda'"]),
        ({"dtype": "bfloat16"}, ["dtype", "'bfloat16'", "float64"]),
        ({"seeds": 0}, ["seeds", "greater than 0"]),
        ({"time_limit_s": -1}, ["time_limit_s", "greater than 0"]),
        ({"threads": 4096}, ["threads", "4096", "cores"]),
        ({"profile": "../elsewhere"}, ["profile", "../elsewhere"]),
    ],
)
def test_bad_input_is_named_with_file_key_value_and_what_is_allowed(changes, said):
    with pytest.raises(BadInput) as caught:
        config(**changes)
    assert all(part in str(caught.value) for part in ["test.yaml", *said]), str(caught.value)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("profile: x\n\tgrid: [\n", ["line 2, column 1", "malformed YAML"]),
        ("grid: [1, 2\n", ["line 2", "malformed YAML"]),
        ("- a list\n", ["keys and values expected", "profile"]),
        ("", ["keys and values expected", "None"]),
    ],
)
def test_a_malformed_file_is_named_with_the_place(tmp_path, text, said):
    file = tmp_path / "bad.yaml"
    file.write_text(text)
    with pytest.raises(BadInput) as caught:
        Config.read(file)
    assert all(part in str(caught.value) for part in [str(file), *said]), str(caught.value)
    assert "\n" not in str(caught.value)


def test_cuda_without_a_gpu_is_bad_input(monkeypatch):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    with pytest.raises(BadInput, match=r"test\.yaml: device: 'cuda'.*allowed here: auto, cpu"):
        config(device="cuda")


def test_cells_over_a_limit_are_refused_with_the_reason():
    problem = problems.load("digits_conv[N=4]")
    cell = grid.cells(config())[0]
    assert grid.unsupported_reason(cell, problem, config()) is None
    assert "over max_passes (10)" in grid.unsupported_reason(cell, problem, config(max_passes=10))


def test_a_configuration_is_only_written_when_it_changed(tmp_path):
    file = grid.write(config(), tmp_path / "config.yaml")
    before = file.stat().st_mtime_ns
    grid.write(config(), file)
    assert file.stat().st_mtime_ns == before
    assert Config.read(file) == config()


def test_sources_follow_imports_and_stop_at_other_plug_ins():
    files = {
        file.relative_to(paths.ROOT / "src" / "ntkbench").as_posix()
        for file in grid.sources("ntkbench.methods.hutchpp")
    }
    assert {"methods/hutchpp.py", "methods/base.py", "jacobian/torch.py", "jacobian/jax.py", "statistics.py"} <= files
    assert not {"methods/hutchinson.py", "problems/gru.py", "figures/base.py"} & files


def test_a_method_fingerprint_follows_its_cells_settings_and_files(monkeypatch):
    def fingerprints(study):
        return {name: grid.fingerprint(study, name, SUITE) for name in ("direct", "hutchpp")}

    before = fingerprints(config())
    assert fingerprints(config(profile="other")) == before
    assert fingerprints(config(seeds=3)).items().isdisjoint(before.items())
    more = fingerprints(config(grid=[BLOCK | {"passes": [36]}]))
    assert more["direct"] == before["direct"]
    assert more["hutchpp"] != before["hutchpp"]

    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + b"#" * (file.name == "hutchpp.py"))
    edited = fingerprints(config())
    assert edited["direct"] == before["direct"]
    assert edited["hutchpp"] != before["hutchpp"]


def test_a_problem_file_changes_the_methods_that_run_on_it(monkeypatch):
    other = config(grid=[BLOCK | {"problems": ["mlp_he[N=2]"]}])
    before = grid.fingerprint(config(), "direct", SUITE), grid.fingerprint(other, "direct", SUITE)
    read = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read(file) + b"#" * (file.name == "mlp.py"))
    after = grid.fingerprint(config(), "direct", SUITE), grid.fingerprint(other, "direct", SUITE)
    assert after[0] == before[0]
    assert after[1] != before[1]
