"""Plug-ins: found without being imported, imported one by one, and unaffected by broken ones."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
from conftest import mostly_slow

from ntkbench import figures, methods, outside, paths, problems, registry, studies
from ntkbench.errors import BadInput, NtkbenchError
from ntkbench.layerwise import rules
from ntkbench.measure.cells import cells
from ntkbench.measure.config import Config
from ntkbench.problems import base
from ntkbench.registry import BrokenPlugin

PACKAGES = {"method": methods, "problem": problems, "study": studies, "figure": figures, "rule": rules}

METHOD = '''
"""A method."""
from ntkbench.methods.base import Deterministic

class Mine(Deterministic):
    title = "mine"
    kind = "exact"
    source = "me"
    backends = ("torch",)
    metrics = ("trace", "norm")

    def moments(self, metric, jacobians):
        return None
'''
PROBLEM = '''
"""Problems."""
from typing import Literal
from ntkbench.problems.base import problem

@problem
def mine(N: int = 4, read: Literal["state", "outputs"] = "state"):
    """Mine."""
    return None
'''
STUDY = '''
"""A study."""
from ntkbench.studies import base

PLUGINS = ("ntkbench.methods.hutchpp",)

class Settings(base.Settings):
    """Sizes."""

def run(settings):
    return None
'''
FIGURE = """
TABLE = "training"
COLUMNS = ("loss",)

def draw(table):
    return None
"""
RULE = '''
"""A weight that multiplies a sample entry by entry."""
import functools
import torch
from ntkbench.layerwise.factors import Products
from ntkbench.layerwise.rules import Use

def scale(node, position, entries):
    other = node.args[1 - position]
    if not isinstance(other, torch.fx.Node) or other.meta["val"].shape[1:] != entries.shape:
        return None
    return Use(node, other, entries.reshape(-1, 1, 1), functools.partial(factors))

def factors(x, g):
    return Products(x.reshape(len(x), -1, 1, 1), g.reshape(*g.shape[:2], -1, 1, 1))

RULES = {torch.ops.aten.mul.Tensor: scale}
'''
GOOD = {"method": METHOD, "problem": PROBLEM, "study": STUDY, "figure": FIGURE, "rule": RULE}

EVERYWHERE = [
    # source, line and reason
    ("", 1, "is empty"),
    ("# only a comment\n", 1, "is empty"),
    ("x = 1\ndef f(:\n", 2, "SyntaxError: invalid syntax"),
    ("x = 1\n  y = 2\n", 2, "IndentationError: unexpected indent"),
    (b"x = 1\ny = '\xff'\n", 2, "is not UTF-8"),
    (b"x = 1\x00\n", 1, "null byte"),
    ("(" * 5000, 1, "cannot be parsed|SyntaxError"),
]
AT_IMPORT = [
    ("import numpy\nimport no_such_module\n", 2, "cannot be imported: ModuleNotFoundError: No module named 'no_such"),
    ("from ntkbench import no_such_name\n", 1, "cannot be imported: ImportError: cannot import name 'no_such_name'"),
    ("import sys\n\nsys.exit('bye')\n", 3, "cannot be imported: SystemExit: bye"),
    ("raise SystemExit\n", 1, "cannot be imported: SystemExit without a message"),
    ("x = 1\nraise KeyboardInterrupt\n", 2, "cannot be imported: KeyboardInterrupt"),
    ("raise BaseException('a\\nb')\n", 1, "cannot be imported: BaseException: a$"),
    ("def f():\n    return 1 / 0\n\nf()\n", 2, "cannot be imported: ZeroDivisionError: division by zero"),
    (
        "class E(Exception):\n    def __str__(self):\n        raise ValueError\n\nraise E\n",
        5,
        "its message cannot be read",
    ),
    ("def f():\n    f()\n\nf()\n", 2, "RecursionError"),
    ("exec('(')\n", 1, "SyntaxError"),
]


def but(kind, old, new):
    """A good plug-in with one defect."""
    assert old in GOOD[kind]
    return GOOD[kind].replace(old, new)


INCREMENTAL = """from ntkbench.methods.hutchinson import Hutchinson
class Mine(Hutchinson):
    'A method.'
    title = "mine"
    def {attribute}(self, *args):
        return super().{attribute}(*args)
"""

BROKEN = [
    *(
        ("method", INCREMENTAL.format(attribute=name), 5, f"Mine overrides {name}, .*: override estimates instead")
        for name in ("spend", "estimate")
    ),
    *(("method", *case) for case in [*EVERYWHERE, *AT_IMPORT]),
    ("method", "x = 1\n", 1, "defines no method"),
    ("method", "from ntkbench.methods.direct import Direct\n", 1, "defines no method"),
    ("method", METHOD + METHOD.replace("Mine", "Yours"), 18, "defines 2 methods, Mine and Yours"),
    ("method", but("method", "def moments", "def momenst"), 5, "Mine leaves abstract: moments"),
    ("method", but("method", '"""A method."""', ""), 5, "Mine has no docstring"),
    ("method", but("method", 'title = "mine"', 'titel = "mine"'), 5, "title must be a string .*; got None"),
    ("method", but("method", 'title = "mine"', 'title = ""'), 6, "title must be a string"),
    ("method", but("method", 'title = "mine"', "title = 3"), 6, "title must be a string .*; got 3"),
    ("method", but("method", 'source = "me"', "source = None"), 8, "source must be a string"),
    ("method", but("method", '"exact"', '"exakt"'), 7, r"unknown kind 'exakt' \(did you mean 'exact'\?\)"),
    ("method", but("method", '"exact"', '"stochastic"'), 7, "kind is 'stochastic'"),
    ("method", but("method", '("torch",)', '("troch",)'), 9, r"unknown backend 'troch' \(did you mean 'torch'\?\)"),
    ("method", but("method", '("torch",)', '"torch"'), 9, "backends must be a tuple"),
    ("method", but("method", '("torch",)', "()"), 9, "backends must be a tuple"),
    ("method", but("method", '("torch",)', '("torch", "torch")'), 9, "backends must be a tuple"),
    ("method", but("method", '"norm")', '"nrom")'), 10, r"unknown metric 'nrom' \(did you mean 'norm'\?\)"),
    ("method", but("method", '"norm")', "[])"), 10, r"unknown metric \[\]"),
    ("method", METHOD + "    needs_recurrence = 1\n", 14, "needs_recurrence must be True or False"),
    ("method", METHOD + "    def __init__(self):\n        self.x = 1 / 0\n", 15, "cannot be used: ZeroDivisionError"),
    ("method", METHOD.replace("Deterministic", "Stochastic").replace('    kind = "exact"\n', ""), 5, "leaves abstract"),
    *(("problem", *case) for case in [*EVERYWHERE, ("import os\n", 1, "defines no problem")]),
    ("problem", PROBLEM + "import no_such_module\n", 10, "cannot be imported"),
    ("problem", PROBLEM + "raise SystemExit('bye')\n", 10, "cannot be imported: SystemExit: bye"),
    ("problem", but("problem", "N: int = 4", "N: int = 0"), 7, "keyword 'N' of mine: a size needs a positive whole"),
    ("problem", but("problem", "N: int = 4", "N: int"), 7, "keyword 'N' of mine: a size needs"),
    ("problem", but("problem", "N: int = 4", "N: int = True"), 7, "keyword 'N' of mine: a size needs"),
    ("problem", but("problem", "N: int = 4", "N: str = 4"), 7, "keyword 'N' of mine: a size needs"),
    ("problem", but("problem", "N: int = 4", "*N"), 7, "keyword 'N' of mine: sizes and choices must be keywords"),
    ("problem", but("problem", "N: int = 4", "N: Nat = 4"), 7, "cannot be imported: NameError"),
    ("problem", but("problem", 'Literal["state", "outputs"]', "str"), 7, "keyword 'read' of mine: a choice needs"),
    ("problem", but("problem", '"state", "outputs"', '"outputs"'), 7, "keyword 'read' of mine: a choice needs"),
    ("problem", but("problem", '    """Mine."""\n', ""), 7, "mine has no docstring"),
    ("problem", PROBLEM + PROBLEM, 16, "mine is defined twice"),
    ("problem", PROBLEM + "NAMES = tuple('ab')\n", 10, "NAMES must be written out as a literal"),
    ("problem", PROBLEM + "NAMES = ('a b',)\n", 10, "'a b' is not a valid problem name"),
    (
        "problem",
        PROBLEM + "def f(N: int = 2): 'F.'\nother = problem(f)\n",
        1,
        "f is a problem that NAMES does not list",
    ),
    *(("study", *case) for case in [*EVERYWHERE, *AT_IMPORT[:3]]),
    ("study", but("study", '"""A study."""', ""), 1, "has no docstring"),
    ("study", but("study", "(base.Settings)", ""), 7, "Settings must be a subclass"),
    ("study", but("study", '"""Sizes."""', 'USES = ("seed",)'), 7, "Settings.USES: unknown 'seed'"),
    ("study", but("study", "def run(settings)", "def ran(settings)"), 1, r"defines no run\(settings\)"),
    ("study", but("study", "def run(settings)", "def run()"), 10, "run must take the settings alone"),
    ("study", but("study", "hutchpp", "hutch"), 5, "PLUGINS: there is no module 'ntkbench.methods.hutch'"),
    (
        "study",
        but("study", '("ntkbench.methods.hutchpp",)', '"ntkbench.methods.hutchpp"'),
        5,
        "PLUGINS must be a tuple",
    ),
    ("study", STUDY + "TIMED = 'no'\n", 12, "TIMED must be True or False; got 'no'"),
    *(("figure", *case) for case in [*EVERYWHERE, ("x = 1\n", 1, r"defines no draw\(table\)")]),
    (
        "figure",
        but("figure", "training", "trainin"),
        2,
        r"TABLE: unknown study 'trainin' \(did you mean 'training'\?\)",
    ),
    ("figure", but("figure", '"training"', "'train' + 'ing'"), 2, "TABLE must be written out as a literal"),
    ("figure", but("figure", 'COLUMNS = ("loss",)', ""), 2, "must name the COLUMNS"),
    ("figure", but("figure", '("loss",)', '"loss"'), 3, "COLUMNS must be a tuple of names"),
    ("figure", but("figure", "draw(table)", "draw()"), 5, "draw must take a table alone"),
    ("figure", FIGURE + "draw = 3\n", 7, "draw must be a function"),
    ("figure", FIGURE + "import no_such_module\n", 7, "cannot be imported"),
    *(("rule", *case) for case in [*EVERYWHERE, ("x = 1\n", 1, "defines no RULES, a mapping from operations")]),
    ("rule", RULE + "RULES = {}\n", 18, "defines no RULES"),
    ("rule", but("rule", "torch.ops.aten.mul.Tensor", "'mul'"), 17, "'mul' is not an operation such as torch.ops"),
    ("rule", but("rule", "mul.Tensor: scale", "mul.Tensor: 3"), 17, "the rule for aten.mul.Tensor is not a function"),
    ("rule", but("rule", "aten.mul.Tensor", "aten.mm.default"), 17, "aten.mm.default has a rule of ntkbench"),
]


@pytest.fixture
def drop(tmp_path, monkeypatch):
    """Puts a plug-in file into the folder of its kind for the duration of the test."""
    registries = {kind: registry.of(kind) for kind in PACKAGES}
    loaded = {kind: dict(kept._loaded) for kind, kept in registries.items()}
    before, names = dict(base.REGISTRY), set(sys.modules)

    def put(kind, name, source, first=False):
        folder = tmp_path / kind
        folder.mkdir(exist_ok=True)
        file = folder / name
        file.write_bytes(source) if isinstance(source, bytes) else file.write_text(source, encoding="utf-8")
        package = PACKAGES[kind]
        kept = [folder for folder in package.__path__ if folder != str(file.parent)]
        monkeypatch.setattr(package, "__path__", [str(folder), *kept] if first else [*kept, str(folder)])
        return file

    yield put
    for kind, kept in registries.items():
        kept._loaded.clear()
        kept._loaded.update(loaded[kind])
    base.REGISTRY.clear()
    base.REGISTRY.update(before)
    for name in set(sys.modules) - names:
        file = getattr(sys.modules[name], "__file__", None)
        if file and file.startswith(str(tmp_path)):
            package, _, attribute = name.rpartition(".")
            del sys.modules[name]
            vars(sys.modules[package]).pop(attribute, None)


@pytest.mark.parametrize("kind", GOOD)
def test_a_dropped_in_plug_in_is_found_and_works(drop, kind):
    file, kept = drop(kind, "mine.py", GOOD[kind]), registry.of(kind)
    assert "mine" in kept.found() and f"{kept.package}.mine" not in sys.modules
    assert kept.file("mine") == file and kept.module("mine") == f"{kept.package}.mine"
    assert f"{kept.package}.mine" not in sys.modules
    plugin = kept.get("mine")
    assert kept.get("mine") is plugin
    assert "mine" in kept.names() and kept.broken() == []


@pytest.mark.parametrize(("kind", "source", "line", "says"), BROKEN)
def test_a_broken_plug_in_gives_the_reason_and_affects_no_other(drop, kind, source, line, says):
    kept = registry.of(kind)
    before = kept.names()
    file = drop(kind, "mine.py", source)
    (broken,) = kept.broken()
    assert (broken.kind, broken.name, broken.file, broken.line) == (kind, "mine", file, line), broken
    with pytest.raises(BrokenPlugin, match=says) as caught:
        kept.get("mine")
    message = str(caught.value)
    assert len(message.splitlines()) == 1 and f"{file}:{line}: " in message
    assert isinstance(caught.value, NtkbenchError) and caught.value.broken == broken
    assert kept.names() == before
    assert all(kept.get(name) for name in before[:3])


@pytest.mark.parametrize("kind", GOOD)
@pytest.mark.parametrize("name", ["_mine.py", "my-method.py", "3d.py", "größe.py", "my method.py"])
def test_a_file_name_must_be_a_valid_name(drop, kind, name):
    drop(kind, name, GOOD[kind])
    (broken,) = registry.of(kind).broken()
    assert "is not a valid plug-in name" in broken.reason and broken.file.name == name


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("method", "get"),
        ("method", "base"),
        ("problem", "load"),
        ("study", "run"),
        ("figure", "plotting"),
        ("rule", "rule_for"),
    ],
)
def test_a_plug_in_hides_nothing_of_its_package(drop, kind, name):
    there = getattr(PACKAGES[kind], name, None)
    drop(kind, f"{name}.py", GOOD[kind])
    (broken,) = registry.of(kind).broken()
    assert broken.reason == f"the name {name!r} is taken by {PACKAGES[kind].__name__}.{name}"
    assert getattr(PACKAGES[kind], name, None) is there


def test_one_file_may_hold_a_problem_that_works_and_one_that_does_not(drop):
    drop("problem", "several.py", PROBLEM + "NAMES = ('other',)\n")
    (broken,) = problems.REGISTRY.broken()
    assert (broken.name, broken.line) == ("other", 10)
    assert broken.reason == "other is not a function declared by @problem"
    assert "mine" in problems.names() and "other" not in problems.names()


def test_files_that_are_not_plug_ins_are_left_alone(drop):
    drop("method", ".#mine.py", "(").with_name("mine.txt").write_text("(")
    folder = drop("method", "__main__.py", "(").parent
    (folder / "folder.py").mkdir()
    (folder / "inner").mkdir()
    (folder / "inner" / "__init__.py").write_text("(")
    assert methods.REGISTRY.broken() == []


def test_an_unreadable_file_is_broken(drop):
    drop("method", "gone.py", METHOD).unlink()
    folder = drop("method", "dangling.py", METHOD)
    folder.unlink()
    folder.symlink_to(folder.with_name("nowhere"))
    (broken,) = methods.REGISTRY.broken()
    assert broken.name == "dangling" and "cannot be read" in broken.reason


@pytest.mark.parametrize("source", ["def f(:\n", "import sys\nsys.exit(3)\n", "x = 1\n"])
def test_a_configuration_of_all_methods_uses_those_that_work(drop, source):
    block = {"problems": ["digits_conv[N=4]"], "methods": "all", "metrics": ["trace"], "passes": [36]}
    given = {"profile": "test", "threads": 1, "grid": [block]}
    before = {cell.label for cell in cells(Config.check(given, "test.yaml"))}
    drop("method", "mine.py", source)
    assert {cell.label for cell in cells(Config.check(given, "test.yaml"))} == before
    named = given | {"grid": [block | {"methods": ["direct", "mine"]}]}
    with pytest.raises(BadInput, match=r"test\.yaml: .*method 'mine' is broken: .*mine\.py:\d: ") as caught:
        Config.check(named, "test.yaml")
    assert len(str(caught.value).splitlines()) == 1


def test_a_repaired_file_works(drop):
    drop("method", "mine.py", "raise ValueError\n")
    assert [one.name for one in methods.REGISTRY.broken()] == ["mine"]
    drop("method", "mine.py", METHOD + "# and so it is longer\n")
    assert methods.REGISTRY.broken() == [] and methods.get("mine").title == "mine"


def test_a_broken_file_runs_once(drop, tmp_path):
    count = tmp_path / "count"
    drop("method", "mine.py", f"open({str(count)!r}, 'a').write('x')\nraise ValueError\n")
    for _ in range(3):
        methods.names()
    assert count.read_text() == "x"


def test_the_users_interrupt_is_not_a_fault_of_the_plug_in(drop):
    drop("method", "mine.py", "import signal\nsignal.raise_signal(signal.SIGINT)\n" + METHOD)
    with pytest.raises(KeyboardInterrupt):
        methods.get("mine")


TAKEN = PROBLEM.replace("def mine", "def other") + textwrap.dedent('''
    @problem(any_size=True)
    def mlp_he(N: int = 50):
        """Not the one that comes with ntkbench."""
''')


@pytest.mark.parametrize("first", [False, True])
@pytest.mark.parametrize("order", [("other", "mlp_he"), ("mlp_he", "other")])
def test_a_name_that_is_taken_is_refused_whatever_is_imported_first(drop, first, order):
    base.REGISTRY.pop("mlp_he", None)
    problems.REGISTRY._loaded.pop("mlp_he", None)
    file = drop("problem", "aaa.py", TAKEN, first=first)
    for name in order:
        problems.get(name)
    assert problems.describe("mlp_he").startswith("The same 15 ReLU layers")
    assert problems.get("mlp_he").__module__ == "ntkbench.problems.mlp" and "other" in problems.names()
    (broken,) = problems.REGISTRY.broken()
    assert (broken.name, broken.file, broken.line) == ("mlp_he", file, 12)
    assert f"the name 'mlp_he' is taken by {paths.ROOT}" in broken.reason and "mlp.py" in broken.reason
    with pytest.raises(BadInput, match="N can be at most 50"):  # nor may it change the sizes
        problems.check("mlp_he[N=51]")


def test_unknown_names_are_refused_with_the_allowed_ones():
    with pytest.raises(BadInput, match=r"unknown method 'hutch\+\+' \(did you mean 'hutchpp'\?\); allowed: .*direct"):
        methods.get("hutch++")
    with pytest.raises(BadInput, match="unknown figure 'coverages'"):
        figures.study_of("coverages")


def test_an_unknown_name_is_reported_with_the_broken_files(drop):
    drop("problem", "torn.py", "x = 1\ndef f(:\n")
    with pytest.raises(BadInput, match=r"unknown problem 'my_problem'; allowed: .*; broken: torn\.py:2$"):
        problems.check("my_problem[N=3]")


# One process imports torch and is forked for each case, so ntkbench's modules are as in a fresh process.
FRESH = """
import json, os, sys, traceback
import pandas, scipy.special, torch.func

assert not [name for name in sys.modules if name.startswith("ntkbench")]
for line in sys.stdin:
    kind, work = json.loads(line)
    if pid := os.fork():
        if os.waitpid(pid, 0)[1]:
            print("null", flush=True)
        continue
    try:
        exec(f"from ntkbench import {kind}\\n{work}", {})
        assert not {"jax", "neural_tangents"} & set(sys.modules)
        package = f"ntkbench.{kind}."
        names = (name for name in sys.modules if name.startswith(package) and ".base" not in name)
        print(json.dumps(sorted(name.removeprefix(package) for name in names)), flush=True)
        os._exit(0)
    finally:
        traceback.print_exc()
        os._exit(1)
"""
USES = [
    # kind, what a process does, and the plug-ins that it imports
    ("methods", "methods.get('hutchpp')", ["hutchpp"]),
    ("methods", "methods.REGISTRY.found(), methods.REGISTRY.file('hutchpp')", []),
    ("problems", "problems.check('digits_conv[N=4]')", ["classifiers"]),
    ("problems", "problems.REGISTRY.found(), problems.module_of('rnn_flipflop[N=3]')", []),
    ("problems", "problems.describe('rnn_flipflop')", ["recurrent"]),
    ("studies", "studies.fields('mohamadi_cost')", ["mohamadi_cost"]),
    ("figures", "figures.names(), figures.study_of('hazelden_trace')", []),
]


@pytest.fixture(scope="module")
def imported():
    """Names of the plug-ins that the process of each case of :data:`USES` imported."""
    lines = "".join(json.dumps([kind, work]) + "\n" for kind, work, _ in USES)
    done = subprocess.run([sys.executable, "-c", FRESH], input=lines, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    print(done.stderr)  # why a case that is None failed
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("case", range(len(USES)), ids=[f"{kind}-{work}" for kind, work, _ in USES])
def test_a_process_imports_only_the_plug_ins_that_it_uses(imported, case):
    assert len(imported) == len(USES) and imported[case] is not None
    assert [name for name in imported[case] if not name.startswith("plotting")] == USES[case][2]


def test_all_plug_ins_that_come_with_ntkbench_work():
    assert registry.broken() == []
    assert len(methods.names()) >= 40 and len(problems.names()) >= 21
    assert len(studies.names()) >= 12 and len(figures.names()) >= 23


# --- outside of the checkout

OUTSIDE_PROBLEM = '''
"""A problem of somebody else."""
from ntkbench import testing
from ntkbench.problems.base import Definition, problem

@problem
def theirs(N: int = 3):
    """Theirs."""
    return testing.smooth_problem("theirs", N, 3, 4, 2)
'''


def written(folder):
    """Write plug-ins: a method, a problem, a rule, a method whose name is taken, and files that they may import."""
    for name, source in {
        "methods/mine.py": METHOD,
        "methods/hutchpp.py": METHOD,
        "methods/lib/__init__.py": "from ntkbench.estimators import lanczos\n",
        "problems/others.py": OUTSIDE_PROBLEM,
        "rules/scales.py": RULE,
        "shared.py": "X = 1\n",
    }.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(source, encoding="utf-8")
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder of plug-ins, see :func:`written`."""
    return written(tmp_path / "of_mine")


def in_a_process(code, *arguments, **environment):
    return subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        env=os.environ | environment,
        cwd=Path(environment.get("FROM", ".")),
        capture_output=True,
        text=True,
    )


LOOK = """
from ntkbench import methods, problems, registry
from ntkbench.measure import fingerprints
print("mine" in methods.names(), "theirs" in problems.names(), methods.get("hutchpp").kind)
print(*(f"{one.file} {one.reason}" for one in registry.broken()))
modules = methods.REGISTRY.module("mine"), problems.module_of("theirs")
print(*sorted(file.name for file in fingerprints.sources(*modules)))
"""


def looks_right(done, folder):
    assert done.returncode == 0, done.stderr[-2000:]
    found, broken, files = done.stdout.splitlines()
    assert found == "True True stochastic", "what comes with ntkbench keeps its name"
    assert f"{folder / 'methods' / 'hutchpp.py'} the file name is taken by" in broken
    # lanczos.py is a file of ntkbench that a helper in the folder imports.
    assert {"mine.py", "others.py", "testing.py", "shared.py", "lanczos.py"} <= set(files.split())


@pytest.mark.slow
def test_plug_ins_are_found_outside_of_the_checkout(folder):
    # The folder is relative, and cells run in folders of their own.
    moved = in_a_process(
        f"import os; import ntkbench.methods; os.chdir('/')\n{LOOK}",
        NTKBENCH_PLUGINS="of_mine",
        FROM=str(folder.parent),
    )
    looks_right(moved, folder)
    done = in_a_process("import sys; from ntkbench.cli import main; main(sys.argv[1:])", "--plugins", folder, "list")
    assert "method   mine " in done.stdout and "problem  theirs " in done.stdout


HASHES = """
import json
from ntkbench.measure import fingerprints, provenance
from ntkbench.measure.cells import cells
from ntkbench.measure.config import Config
grid = [{"problems": ["theirs", "digits_conv[N=4]"], "methods": ["mine", "direct"], "metrics": ["trace"]}]
config = Config.check({"profile": "test", "threads": 1, "grid": grid}, "test.yaml")
made = {f"{cell.problem} {cell.method}": fingerprints.cell(config, cell) for cell in cells(config)}
print(json.dumps({**made, "versions": provenance.provenance().versions.rpartition(", ")[2]}))
"""


def hashes(folder):
    done = in_a_process(HASHES, NTKBENCH_PLUGINS=str(folder))
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def usual(tmp_path_factory):
    """Fingerprints with the plug-ins of :func:`written`; they do not depend on where the folder is."""
    return hashes(written(tmp_path_factory.mktemp("usual") / "of_mine"))


@pytest.mark.slow
def test_an_edit_of_an_import_changes_only_the_fingerprints_of_its_users(folder, usual):
    assert len(usual) == 5 and usual["versions"].startswith("plug-ins ")
    (folder / "shared.py").write_text("X = 2\n", encoding="utf-8")
    after = hashes(folder)
    assert {name for name in usual if usual[name] == after[name]} == {"digits_conv[N=4] direct"}


@pytest.mark.slow
def test_odd_files_in_a_folder_of_plug_ins_are_ignored(folder, usual, tmp_path):
    (folder / "methods" / ".#mine.py").symlink_to(folder / "nowhere")
    (folder / "a_folder.py").mkdir()
    environment = folder / "env"
    environment.mkdir()
    environment.joinpath("pyvenv.cfg").touch()
    environment.joinpath("huge.py").write_text("X = 1\n", encoding="utf-8")
    assert hashes(folder) == usual
    link = tmp_path / "link"
    link.symlink_to(folder)
    looks_right(in_a_process(LOOK, NTKBENCH_PLUGINS=os.pathsep.join(map(str, (folder, link)))), folder)


def test_a_folder_of_too_many_files_is_refused(folder, monkeypatch):
    monkeypatch.setenv(outside.VARIABLE, str(folder))
    monkeypatch.setattr(outside, "MOST_FILES", 3)
    with pytest.raises(BadInput, match="more than 3 Python files"):
        outside.files()
    with pytest.raises(BadInput, match="there is no folder"):
        registry.use([str(folder / "missing")])
    assert os.environ[outside.VARIABLE] == str(folder)


@pytest.mark.slow
def test_plug_ins_of_installed_packages_are_found(folder):
    folder.joinpath("__init__.py").write_text("raise SystemExit('it is not imported')", encoding="utf-8")
    info = folder.parent / "of_mine-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: of-mine\nVersion: 1.0\n", encoding="utf-8")
    info.joinpath("entry_points.txt").write_text("[ntkbench.plugins]\nmine = of_mine\n", encoding="utf-8")
    path = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
    looks_right(in_a_process(LOOK, PYTHONPATH=path), folder)


def test_an_entry_point_without_a_package_is_reported_and_breaks_nothing(folder):
    info = folder.parent / "of_mine-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: of-mine\nVersion: 1.0\n", encoding="utf-8")
    values = ("missing", "of_mine.methods", "json:loads", "antigravity")
    lines = "\n".join(f"{i} = {value}" for i, value in enumerate(values))
    info.joinpath("entry_points.txt").write_text(f"[ntkbench.plugins]\n{lines}\n", encoding="utf-8")
    path = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
    code = "from ntkbench import methods, registry; print(len(methods.names()), *registry.entry_points(), sep='\\n')"
    done = in_a_process(code, PYTHONPATH=path)
    assert done.returncode == 0, done.stderr[-2000:]
    count, *said = done.stdout.splitlines()
    assert int(count) > 40 and len(said) == len(values)
    assert all(any(repr(value) in line and "must be an installed package" in line for line in said) for value in values)


def test_a_missing_folder_of_plug_ins_is_refused_in_one_line(tmp_path):
    for command in (["-c", "import ntkbench.methods"], ["-m", "ntkbench", "list"]):
        missing = {"NTKBENCH_PLUGINS": str(tmp_path / "missing")}
        done = subprocess.run([sys.executable, *command], env=os.environ | missing, capture_output=True, text=True)
        assert done.returncode != 0 and f"there is no folder {tmp_path / 'missing'}" in done.stderr.splitlines()[-1]
    assert len(done.stderr.splitlines()) == 1
    empty = in_a_process("import ntkbench.methods", NTKBENCH_PLUGINS=str(tmp_path))
    assert "has none of the folders methods, problems, studies, figures, rules" in empty.stderr.splitlines()[-1]


SCALED = """
import torch
from torch import nn

class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.w, self.out = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(torch.tanh(x * self.w)).sum(1)

def make():
    return Scaled().double(), torch.linspace(-1, 1, 60, dtype=torch.float64).reshape(3, 4, 5)
"""
TRACE = """
import sys
import ntkbench
from ntkbench import registry
sys.path.insert(0, sys.argv[1])
import of_rules
registry.use(sys.argv[2:])
model, x = of_rules.make()
print(repr(ntkbench.trace(model, x)))
"""
LAYERS = f"""{TRACE}
engine = ntkbench.Kernel(model, x)._traced().engine
print(*(layer.parameters[0] for layer in engine.layers if layer.uses))
"""


@pytest.fixture
def scaled(folder):
    """A folder with a network whose weight has no rule of ntkbench."""
    (folder.parent / "of_rules.py").write_text(SCALED, encoding="utf-8")
    return folder.parent


@pytest.fixture(scope="module")
def without(tmp_path_factory):
    """A process that uses the network of :data:`SCALED` without the plug-in."""
    here = tmp_path_factory.mktemp("without")
    (here / "of_rules.py").write_text(SCALED, encoding="utf-8")
    done = in_a_process(LAYERS, here)
    assert done.returncode == 0, done.stderr[-2000:]
    return done


@pytest.mark.slow
def test_rules_outside_of_the_checkout_are_applied(folder, scaled, without):
    with_rule = in_a_process(LAYERS, scaled, folder)
    assert with_rule.returncode == 0, with_rule.stderr[-2000:]
    assert without.stdout.splitlines()[-1] == "out.weight"
    assert with_rule.stdout.splitlines()[-1].split() == ["w", "out.weight"]
    measure = "import sys; from ntkbench.cli import main; main(sys.argv[1:])"
    given = ("measure", "of_rules:make", "--method", "structured_derivatives")
    usual = in_a_process(measure, *given, FROM=str(scaled), PYTHONPATH=os.environ.get("PYTHONPATH", ""))
    other = in_a_process(measure, "--plugins", folder, *given, FROM=str(scaled))
    value = usual.stdout.partition(",")[0]
    assert value.startswith("trace = ") and other.stdout.startswith(value), other.stderr[-2000:]
    assert "certified to" in other.stdout


WRONG_RULES = [
    # a part of the rule, what replaces it, and part of the reason
    ("reshape(len(x)", "mul(2).reshape(len(x)", "its gradient differs from that of plain autograd"),
    ("other = node", "1 / 0; other = node", "rule for aten.mul.Tensor of the plug-in 'scales' failed: ZeroDivision"),
    ("x.reshape(len(x), -1, 1, 1)", "x", "passed over structured_derivatives: RuntimeError"),
    ("    return Use(", "    return 3 or Use(", "returned a int, not a Use"),
    ("def scale(", "def scale((", "scales.py:8: SyntaxError"),
]


@pytest.mark.parametrize(("old", "new", "says"), mostly_slow(WRONG_RULES, 1))
def test_a_wrong_rule_gives_no_wrong_value(folder, scaled, without, old, new, says):
    assert old in RULE
    (folder / "rules" / "scales.py").write_text(RULE.replace(old, new), encoding="utf-8")
    done = in_a_process(TRACE, scaled, folder)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.partition(",")[0] == without.stdout.partition(",")[0] and says in done.stdout + done.stderr


@pytest.mark.slow
def test_rules_of_installed_packages_are_applied(folder, scaled):
    info = folder.parent / "of_mine-1.0.dist-info"
    info.mkdir()
    info.joinpath("METADATA").write_text("Metadata-Version: 2.1\nName: of-mine\nVersion: 1.0\n", encoding="utf-8")
    info.joinpath("entry_points.txt").write_text("[ntkbench.plugins]\nmine = of_mine\n", encoding="utf-8")
    path = os.pathsep.join([str(folder.parent), os.environ.get("PYTHONPATH", "")])
    done = in_a_process(LAYERS, scaled, PYTHONPATH=path)
    assert done.stdout.splitlines()[-1].split() == ["w", "out.weight"], done.stderr[-2000:]


def test_rules_are_sources_of_what_is_measured_with_them(folder):
    code = """
    from ntkbench import methods
    from ntkbench.measure import fingerprints
    for name in ("structured_derivatives", "hutchinson"):
        print(*sorted(file.name for file in fingerprints.sources(methods.REGISTRY.module(name), backend="torch")))
    """
    with_rules, without = in_a_process(code, NTKBENCH_PLUGINS=str(folder)).stdout.splitlines()
    assert "scales.py" in with_rules.split() and "scales.py" not in without.split()
