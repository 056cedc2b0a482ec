"""Fingerprints cover exactly the files that a process imports, so an edit only affects what uses the file."""

from __future__ import annotations

import contextlib
import functools
import json
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pandas as pd
import pytest

from ntkbench import outside, paths, problems
from ntkbench.measure import fingerprints
from ntkbench.measure.cells import cells
from ntkbench.measure.config import Config
from ntkbench.measure.plan import Plan
from ntkbench.problems.base import reference

PACKAGE = paths.ROOT / "src" / "ntkbench"
DRAWN_FROM = paths.REFERENCE / "default"

# One process imports slow packages and is forked for each job, so ntkbench's modules are as in a fresh process.
# None of these imports starts a thread, which would not survive a fork.
PROCESS = """
import json, os, sys, traceback
import torch, torch._dynamo, torch.func, jax, pandas, psutil, scipy.linalg, scipy.special, scipy.stats
import sklearn.datasets, matplotlib.figure, threadpoolctl
from pydantic import BaseModel, model_validator

def cell(plan, label):
    os.environ["NTKBENCH_PLAN"] = plan
    from benchmarks.pipeline import ntk
    case = ntk.Seconds()
    case.setup(label)
    case.time_estimate(label)
    from ntkbench import operators
    from ntkbench.measure import rows
    operators.device_name(ntk.PLAN.config.target(ntk.PLAN.cells[0].backend))

def problem(label):
    from ntkbench import problems
    from ntkbench.problems.base import reference
    reference.exact(problems.load(label))

def study(name, given):
    from ntkbench import studies
    made = studies.run(name, studies.settings(name, given))
    assert set(made["status"]) <= {"ok", "skipped"}, list(made["reason"])

def figure(name, table, folder):
    from pathlib import Path
    from ntkbench import figures
    figures.draw(name, pandas.read_csv(table, low_memory=False), Path(folder))

assert not [name for name in sys.modules if name.startswith("ntkbench")]
for line in sys.stdin:
    cache, kind, *given = json.loads(line)
    sys.stdout.flush()
    if pid := os.fork():
        if os.waitpid(pid, 0)[1]:
            print("null", flush=True)
        continue
    printed, sys.stdout = sys.stdout, sys.stderr
    try:
        os.environ["NTKBENCH_CACHE"] = cache
        globals()[kind](*given)
        names = (name for name in sys.modules if name.split(".")[0] == "ntkbench")
        print(json.dumps([sys.modules[name].__file__ for name in names]), file=printed, flush=True)
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)
"""

CELLS = {
    # problem, method, metric, passes, backend
    "stochastic in torch": ("digits_conv[N=4]", "hutchpp", "trace", 36, "torch"),
    "stochastic in jax": ("digits_conv[N=4]", "hutchpp", "trace", 36, "jax"),
    "recurrent in torch": ("gru_hazelden[N=2,T=2]", "one_sided_reverse", "trace", 8, "torch"),
    "recurrent in jax": ("gru_hazelden[N=2,T=2]", "one_sided_reverse", "trace", 8, "jax"),
    "neural-tangents": ("digits_conv[N=4]", "nt_jacobian_contraction", "norm", None, "jax"),
    "layer by layer": ("digits_conv[N=4]", "structured_derivatives", "norm", None, "torch"),
    "exact": ("mlp_he[N=2]", "direct", "norm", None, "torch"),
    "of a task": ("rnn_flipflop[N=2,T=10,H=4]", "recurrent_exact_trace", "trace", None, "torch"),
}
PROBLEMS = ("digits_conv[N=4]", "gru_hazelden[N=2,T=2]", "rnn_flipflop[N=2,T=10,H=4]")
FIGURES = {"error_against_passes": "table.csv", "hazelden_trace": "studies/hazelden_trace.csv"}
ONE = {"threads": 1}
STUDIES = {
    "training": {"N": 4, "H": 4, "gains": [1.0], "ranks": [4], "networks": 1, "probes": 2, "loss": 0.99, "steps": 300},
    "mohamadi_drift": {"width": 8, "steps": 20, "looks": 2, "inits": 1, "images": 2, "rate": 0.01, "decay": 0.1},
}
PARTLY = {
    "estimators_on_spectra": {"n": 20, "outputs_per_parameter": [1], "spectra": ["1/i"], "passes": [18], "seeds": 2},
    "hazelden_blog": {"problem": "gru_hazelden[N=2,T=2]", "samples": [2], "seeds": 2},
}
"""Studies that load only part of what they name, depending on their settings, or import methods without using them."""


def config(**changes):
    block = {"problems": ["digits_conv[N=4]"], "methods": ["direct"], "metrics": ["trace"], "passes": [36]}
    return Config.check({"profile": "test", "threads": 1, "grid": [block]} | changes, "test.yaml")


@functools.cache
def cell_of(problem, method, metric, passes, backend):
    block = {"problems": [problem], "methods": [method], "metrics": [metric], "backends": "all"}
    made = cells(config(grid=[block | ({"passes": [passes]} if passes else {})]))
    return next(cell for cell in made if cell.backend == backend)


def files_of_cell(*cell):
    return fingerprints.sources(*fingerprints.cell_roots(cell_of(*cell)), backend=cell[-1])


def files_of_problem(label):
    return fingerprints.sources(problems.module_of(label), fingerprints.REFERENCE, backend="torch")


def files_of_study(name):
    given = config(studies={name: ONE | (STUDIES | PARTLY)[name]}).study(name).model_dump(mode="json")
    return fingerprints.sources(*fingerprints.study_roots(name, given), backend="torch")


MORE = {"digits_conv[N=4]": {"networks/fully_connected.py"}}
"""Files imported only by another problem of the same file."""


def named(files):
    return {Path(file).relative_to(PACKAGE).as_posix() for file in files}


@pytest.fixture(scope="module")
def imported(tmp_path_factory):
    """Files of ntkbench that the process of each job imported."""
    for label, *_ in CELLS.values():
        reference.exact(problems.load(label))  # as an earlier rule of the pipeline does
    fresh, cache = tmp_path_factory.mktemp("fresh"), str(paths.cache())
    jobs = {}
    for key, cell in CELLS.items():
        jobs["cell", key] = ["cell", str(fresh / f"{key}.json"), cell_of(*cell).label]
        Plan(config(), [cell_of(*cell)], {}, fresh).write(fresh / f"{key}.json")
    jobs |= {("study", name): ["study", name, ONE | given] for name, given in (STUDIES | PARTLY).items()}
    jobs |= {("figure", name): ["figure", name, str(DRAWN_FROM / file), str(fresh)] for name, file in FIGURES.items()}
    jobs = {key: [cache, *job] for key, job in jobs.items()}
    # An empty cache, since recreating weights and exact values imports most.
    jobs |= {("problem", label): [str(fresh), "problem", label] for label in PROBLEMS}
    lines = "".join(json.dumps(job) + "\n" for job in jobs.values())
    done = subprocess.run([sys.executable, "-c", PROCESS], input=lines, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    made = [json.loads(line) for line in done.stdout.splitlines()]
    print(done.stderr)  # why a job that is None failed
    return {key: made and named(made) for key, made in zip(jobs, made, strict=True)}


@pytest.mark.parametrize("key", CELLS)
@pytest.mark.slow
def test_a_cell_covers_what_its_process_imports_and_nothing_else(imported, key):
    more = named(files_of_cell(*CELLS[key])) - imported["cell", key]
    assert more == MORE.get(CELLS[key][0], set())
    assert imported["cell", key] <= named(files_of_cell(*CELLS[key]))


@pytest.mark.parametrize("label", PROBLEMS)
@pytest.mark.slow
def test_a_problem_covers_what_its_process_imports_and_nothing_else(imported, label):
    more = named(files_of_problem(label)) - imported["problem", label]
    assert more == MORE.get(label, set())
    assert imported["problem", label] <= named(files_of_problem(label))


@pytest.mark.parametrize("name", STUDIES)
@pytest.mark.slow
def test_a_study_covers_what_its_process_imports_and_nothing_else(imported, name):
    assert named(files_of_study(name)) == imported["study", name]


@pytest.mark.parametrize("name", PARTLY)
@pytest.mark.slow
def test_a_study_names_all_plug_ins_that_it_may_load(imported, name):
    assert named(files_of_study(name)) >= imported["study", name]


@pytest.mark.parametrize("name", FIGURES)
@pytest.mark.slow
def test_a_figure_covers_what_its_process_imports_and_nothing_else(imported, name):
    assert named(fingerprints.sources(f"ntkbench.figures.{name}")) == imported["figure", name]


EDITS = {
    # file: what changes, and what does not, by the beginning of its name
    "methods/hutchpp.py": (["cell stochastic", "study hazelden_blog"], ["cell exact", "cell rec", "problem", "figure"]),
    "methods/hutchinson.py": (["study estimators_on_spectra"], ["cell", "problem", "figure", "study training"]),
    "methods/base/__init__.py": (["cell", "study hazelden_blog"], ["problem", "figure"]),
    "methods/base/neural_tangents.py": (["cell neural"], ["cell stochastic", "cell exact", "problem", "figure"]),
    "problems/classifiers.py": (
        ["cell stoch", "cell layer", "problem digits"],
        ["cell exact", "cell rec", "problem gru"],
    ),
    "problems/gru.py": (
        ["cell recurrent", "problem gru"],
        ["cell stoch", "cell of a task", "problem rnn"],
    ),
    "problems/base/training.py": (["cell", "problem", "study training"], ["figure"]),
    "problems/base/reference.py": (["cell", "problem"], ["figure", "study training"]),
    "data/images.py": (
        ["cell stoch", "problem digits", "study mohamadi_drift"],
        ["cell exact", "cell rec", "problem gru"],
    ),
    "data/tasks.py": (["cell", "problem", "study training"], ["figure"]),  # recipes know them
    "networks/convolutional.py": (["cell stoch", "cell layer", "problem digits"], ["cell exact", "cell rec"]),
    "networks/fully_connected.py": (["cell exact"], ["cell rec", "problem gru", "problem rnn"]),
    "networks/recurrent.py": (["cell recurrent", "cell of a task", "problem rnn"], ["cell stoch", "problem digits"]),
    "operators/torch.py": (["cell", "problem"], ["figure"]),  # certifies every product
    "operators/jax.py": (["cell stochastic in jax", "cell recurrent in jax", "cell neural"], ["cell exact", "problem"]),
    "operators/recurrent/jax.py": (["cell recurrent in jax"], ["cell recurrent in torch", "cell stoch", "problem"]),
    "layerwise/contraction.py": (["cell layer"], ["cell stochastic", "cell neural", "problem", "study training"]),
    "measure/seeds.py": (["cell"], ["problem", "figure"]),
    "measure/rows.py": (["cell"], ["problem", "study", "figure"]),
    "measure/shard.py": (["cell"], ["problem", "study", "figure"]),
    "studies/base/runner.py": (["study"], ["cell", "problem", "figure"]),
    "measure/execution.py": (["cell"], ["problem", "study", "figure"]),
    "measure/timing.py": (["cell", "study"], ["problem", "figure"]),
    "measure/outcomes.py": (["cell", "study", "figure"], ["problem"]),
    "measure/journal.py": (["study"], ["cell", "problem", "figure"]),
    "studies/training.py": (["study training"], ["cell", "problem", "figure", "study mohamadi", "study hazelden"]),
    "studies/base/estimates.py": (["study hazelden_blog"], ["cell", "problem", "figure", "study training"]),
    "figures/plotting/base.py": (["figure"], ["cell", "problem", "study"]),
    "figures/plotting/report.py": (["figure"], ["cell", "problem", "study"]),
    "figures/plotting/report.html": (["figure"], ["cell", "problem", "study"]),
    "figures/hazelden_trace.py": (["figure hazelden_trace"], ["figure error", "cell", "problem", "study"]),
    "paths.py": (["cell", "problem", "study", "figure"], []),
    "cli.py": ([], ["cell", "problem", "study", "figure"]),
    "measure/fingerprints.py": ([], ["cell", "problem", "study", "figure"]),
    "api.py": ([], ["cell", "problem", "study", "figure"]),
}


@pytest.fixture(scope="module")
def copy(tmp_path_factory):
    """A copy of the sources, which fingerprints are computed from; tests leave it as it is."""
    folder = tmp_path_factory.mktemp("copy") / "ntkbench"
    shutil.copytree(PACKAGE, folder, ignore=shutil.ignore_patterns("__pycache__"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "PACKAGE", folder)
        yield folder


def all_fingerprints():
    chosen = config(studies={name: ONE | given for name, given in (STUDIES | PARTLY).items()})
    found = {f"cell {key}": fingerprints.cell(chosen, cell_of(*cell)) for key, cell in CELLS.items()}
    found |= {f"problem {label}": fingerprints.problem(label) for label in PROBLEMS}
    found |= {f"study {name}": fingerprints.study(chosen, name) for name in chosen.studies}
    return found | {f"figure {name}": fingerprints.figure(name) for name in FIGURES}


@pytest.fixture(scope="module")
def before(copy):
    """All fingerprints of the copy as it is."""
    return all_fingerprints()


@pytest.fixture(scope="module")
def covered(copy):
    """The files that each fingerprint covers."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fingerprints, "_hash", lambda files, *settings: frozenset(files))
        return all_fingerprints()


@contextlib.contextmanager
def edited(file, contents=None):
    """A file with other contents, by default with a line more, for the duration of the context."""
    whole = file.read_bytes()
    try:
        file.write_bytes(whole + b"# edited\n" if contents is None else contents)
        yield
    finally:
        file.write_bytes(whole)


@pytest.mark.parametrize("name", EDITS)
def test_an_edit_changes_what_uses_the_file_and_nothing_else(copy, covered, name):
    """By the files that fingerprints cover; the next two tests edit files."""
    assert (copy / name).is_file()
    changes, stays = EDITS[name]
    changed = {key for key, files in covered.items() if copy / name in files}
    for beginning in changes + stays:
        keys = {key for key in covered if key.startswith(beginning)}
        assert keys, beginning
        assert keys & changed == (keys if beginning in changes else set())


@pytest.mark.parametrize("name", ["measure/seeds.py", "figures/plotting/report.html", "cli.py"])
def test_fingerprints_change_with_the_files_that_they_cover(copy, before, covered, name):
    with edited(copy / name):
        changed = {key for key, value in all_fingerprints().items() if value != before[key]}
    assert changed == {key for key, files in covered.items() if copy / name in files}


def test_every_file_is_in_the_hash_of_those_that_cover_it_and_of_no_other(copy, covered):
    package = {file for file in copy.rglob("*") if file.is_file()}
    for key, files in covered.items():
        before = fingerprints._hash(files)
        for file in files & package:
            with edited(file):
                assert fingerprints._hash(files) != before, (key, file)
        with contextlib.ExitStack() as others:
            for file in package - files:
                others.enter_context(edited(file))
            assert fingerprints._hash(files) == before, key


def test_only_settings_that_concern_a_cell_count():
    cell, *_ = cells(config())
    before = fingerprints.cell(config(), cell)
    assert fingerprints.cell(config(profile="other", shards=3, studies={"training": {}}), cell) == before
    for limit in ("problem_s", "gigaflop", "patience_s"):
        assert fingerprints.cell(config(limits={limit: 7}), cell) == before
    for change in ({"dtype": "float64"}, *({"limits": {limit: 7}} for limit in ("time_s", "memory_mb", "passes"))):
        assert fingerprints.cell(config(**change), cell) != before
    for change in ({"seeds": 9}, {"calls": 9}, {"metric": "norm"}):
        assert fingerprints.cell(config(), replace(cell, **change)) != before
    small, large = (config(studies={"training": {"N": N}}) for N in (8, 9))
    assert fingerprints.study(small, "training") != fingerprints.study(large, "training")


def test_settings_without_effect_on_a_study_do_not_count(monkeypatch):
    monkeypatch.setattr("ntkbench.ambient.cores", lambda: 8)

    def of(name, **changes):
        return fingerprints.study(config(studies={name: {}}, **changes), name)

    for change in ({"calls": 9}, {"threads": 4}, {"limits": {"problem_s": 7}}):
        assert of("training", **change) == of("training"), change
    assert of("training", limits={"memory_mb": 99}) != of("training")
    assert of("novak_time", threads=4) != of("novak_time"), "it has seconds"


@pytest.mark.parametrize("key", ["stochastic in torch", "stochastic in jax"])
def test_the_devices_that_a_setting_means_here_count_for_a_cell(monkeypatch, key):
    chosen, cell = config(), cell_of(*CELLS[key])

    def of(torch, jax):
        names = {"torch": torch, "jax": jax}
        monkeypatch.setattr(fingerprints.provenance, "device", lambda backend, asked: names[backend])
        return fingerprints.cell(chosen, cell)

    assert len({of("cpu", "cpu"), of("a GPU", "cpu"), of("another GPU", "cpu")}) == 3
    # A cell in JAX is skipped unless JAX has a GPU, too.
    assert (of("a GPU", "a GPU") == of("a GPU", "cpu")) == (cell.backend == "torch")
    chosen._here = False  # other machines measure
    assert of("a GPU", "a GPU") == of("cpu", "cpu")


NEIGHBOURS = {
    "package_of_fingerprints/__init__.py": "",
    "package_of_fingerprints/layers.py": "from . import parts\n",
    "package_of_fingerprints/parts.py": "import module_of_fingerprints as other\n",
    "module_of_fingerprints.py": "import numpy\n",
}
WITH_NEIGHBOURS = '''
"""A problem whose network is elsewhere."""

from ntkbench.problems.base import Definition, problem

@problem
def with_neighbours(N: int = 2) -> Definition:
    """It imports only when it is made."""
    import package_of_fingerprints.layers
'''


@pytest.fixture
def neighbours(tmp_path, monkeypatch):
    """A folder on Python's path, with :data:`NEIGHBOURS` and a file that they do not import."""
    folder = tmp_path / "neighbours"
    for name, source in {**NEIGHBOURS, "unused_by_fingerprints.py": ""}.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    outside._local.cache_clear()
    yield folder
    outside._local.cache_clear()


def test_files_that_a_plug_in_imports_from_elsewhere_count_unless_they_are_installed(neighbours, outer):
    outer("with_neighbours", WITH_NEIGHBOURS)
    before = fingerprints.problem("with_neighbours")
    for name in NEIGHBOURS:
        with edited(neighbours / name):
            assert fingerprints.problem("with_neighbours") != before, name
    with edited(neighbours / "unused_by_fingerprints.py"):
        assert fingerprints.problem("with_neighbours") == before
    files = fingerprints.sources(problems.module_of("with_neighbours"))
    beside = {file for file in files if not file.is_relative_to(fingerprints.PACKAGE)}
    assert {file.name for file in beside} == {"with_neighbours.py", *(Path(name).name for name in NEIGHBOURS)}


def test_files_that_a_file_of_ntkbench_imports_from_elsewhere_count(copy, neighbours):
    with edited(copy / "methods" / "direct.py", b"import module_of_fingerprints\n"):
        found = fingerprints.sources("ntkbench.methods.direct")
    assert neighbours / "module_of_fingerprints.py" in found


def test_problems_and_methods_in_a_studys_settings_count(copy):
    def of(label):
        return fingerprints.study(config(studies={"hazelden_blog": {"problem": label}}), "hazelden_blog")

    labels = ("fc_relu[N=2,O=2,depth=1,width=4]", "gru_hazelden[N=2]")
    before = [of(label) for label in labels]
    with edited(copy / "problems" / "novak.py"):
        after = [of(label) for label in labels]
    assert after[0] != before[0] and after[1] == before[1]


def test_a_problems_size_counts():
    assert fingerprints.problem("gru_hazelden[N=2]") != fingerprints.problem("gru_hazelden[N=3]")


def test_committed_weights_count(monkeypatch, tmp_path):
    shutil.copytree(paths.REFERENCE / "weights", tmp_path / "weights")
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)

    def found():
        goals = [{"problem": label, "metric": "trace", "error": 0.1} for label in PROBLEMS[:2]]
        chosen = [config(studies={"time_to_error": {"goals": [goal]}}) for goal in goals]
        studies = [fingerprints.study(each, "time_to_error") for each in chosen]
        return [*map(fingerprints.problem, PROBLEMS[:2]), *studies]

    before = found()
    with (tmp_path / "weights" / "digits_conv.npz").open("ab") as file:
        file.write(b"x")
    changed = [one != other for one, other in zip(found(), before, strict=True)]
    assert changed == [True, False, True, False]


def test_the_versions_of_packages_count_for_what_is_measured(before, monkeypatch):
    monkeypatch.setattr(fingerprints, "packages", lambda: ("torch 99",))
    changed = {key for key, value in all_fingerprints().items() if value != before[key]}
    assert changed == {key for key in before if key.startswith(("cell", "study"))}


def test_studies_that_run_methods_in_jax_cover_the_operators_of_jax():
    """The backends of a study's rows are in its committed table."""
    tables = {table.stem: pd.read_csv(table) for table in paths.REFERENCE.glob("*/studies/*.csv")}
    found = {name for name, table in tables.items() if "jax" in set(table.get("backend", ()))}
    for name in {*found, "side_by_side"}:
        given = config(studies={name: {}}).study(name).model_dump(mode="json")
        found_there = fingerprints.sources(*fingerprints.study_roots(name, given), backend="torch")
        files = {file.relative_to(fingerprints.PACKAGE).as_posix() for file in found_there}
        assert {"operators/jax.py", "operators/recurrent/jax.py"} <= files, name
    assert "time_to_error" in found


def test_a_broken_file_affects_only_its_users(copy, before):
    torn = copy / "methods" / "torn.py"
    torn.write_text("def f(:")
    with edited(copy / "problems" / "mlp.py", b"\xff"):
        changed = {key for key, value in all_fingerprints().items() if value != before[key]}
    torn.unlink()
    assert changed == {"cell exact"} | {key for key in before if key.startswith("study hazelden_blog")}
