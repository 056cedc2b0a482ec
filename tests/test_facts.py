"""Stored facts of problems: they are read back unchanged, and found again if they are missing, damaged or outdated."""

import pytest

from ntkbench import problems
from ntkbench.measure import facts, fingerprints, journal
from ntkbench.measure.config import Config
from ntkbench.measure.limits import Limits
from ntkbench.problems.base import weights

LABEL = "fc_relu[N=2,O=1,width=4,depth=1]"


@pytest.fixture
def config():
    return Config.model_validate({"profile": "facts", "threads": 1, "grid": [], "studies": {"training": {}}})


@pytest.fixture
def made(monkeypatch):
    """Labels of the problems made so far, with a stand-in for their exact values."""
    calls = []

    def make(label, config, part):
        calls.append(label)
        return {"status": "ok", "reason": "", "exact": {"trace": 92.5}}

    monkeypatch.setattr(facts, "_made", make)
    return calls


@pytest.mark.parametrize("name", ["problems.json", "problems.journal"])
@pytest.mark.parametrize("text", ["", "[1]", '{"fc', "\x00\xff"])
def test_facts_survive_unreadable_files(config, made, tmp_path, name, text):
    output = tmp_path / "problems.json"
    first = facts.make(config, [LABEL], output)
    (tmp_path / name).write_text(text)
    assert facts.read(config, [LABEL], output) == first
    assert len(made) == (1 if name == "problems.json" else 2)


def test_a_changed_digit_is_detected(config, made, tmp_path):
    output = tmp_path / "problems.json"
    first = facts.make(config, [LABEL], output)
    for file in (output, output.with_suffix(".journal")):
        file.write_text(file.read_text().replace("92.5", "72.5"))
    assert facts.read(config, [LABEL], output) == first and len(made) == 2


def test_an_edit_of_a_problem_ends_the_step_and_its_facts_are_not_kept(config, made, tmp_path, monkeypatch):
    seen = iter("ab")
    monkeypatch.setattr(fingerprints, "problem", lambda label: next(seen))
    with pytest.raises(fingerprints.Edited, match=r"on was edited during the run; start the run again$"):
        facts.make(config, [LABEL], tmp_path / "problems.json")
    assert made == [LABEL] and journal.rows_of([tmp_path / "problems.journal"]) == {}


@pytest.mark.parametrize("status", ["failed", "timeout", "out_of_memory"])
def test_a_failed_problem_is_prepared_again_on_request_or_under_other_limits(config, monkeypatch, tmp_path, status):
    made = []
    monkeypatch.setattr(facts, "_made", lambda *given: made.append(given) or {"status": status, "reason": "no"})

    def count(**changes):
        facts.make(config.model_copy(update=changes), [LABEL], tmp_path / "problems.json")
        return len(made)

    assert [count(), count(), count(retry="failed")] == [1, 1, 2]
    assert [count(limits=Limits(problem_s=7)), count(limits=Limits(problem_s=7))] == [3, 3]


NAME = "fetched_and_trained"
PROBLEM = '''
"""A problem with data to fetch, and with weights that differ in each training."""

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from ntkbench.data.files import DataFile
from ntkbench.problems.base import Definition, problem
from ntkbench.problems.base.training import Training

def fetch(folder):
    Path({online!r}).read_text()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / FILE.name).write_text("data")

FILE = DataFile("of_a_test.txt", "A text", "nowhere", fetch)

@dataclass(frozen=True)
class Drawn(Training):
    """Draws the weights."""
    def train(self, module):
        rng = torch.Generator().manual_seed(int.from_bytes(os.urandom(4)))
        with torch.no_grad():
            module.weight.normal_(generator=rng)

    def arrays(self):
        return {{}}

    def objective(self, module):
        return module.weight.double().square().sum()

@problem(data=(FILE,))
def fetched_and_trained(N: int = 2) -> Definition:
    """One layer."""
    FILE.read(Path.read_text)
    module = nn.Linear(3, 2)
    nn.init.ones_(module.weight)
    nn.init.zeros_(module.bias)
    return Definition(module, np.ones((2, 3), np.float32)[:N], Drawn())
'''


@pytest.fixture
def online(outer, monkeypatch, tmp_path):
    """The file without which the problem's data cannot be fetched."""
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    outer(NAME, PROBLEM.format(online=str(tmp_path / "online")))
    return tmp_path / "online"


def test_a_problem_whose_data_were_missing_is_prepared_once_they_can_be_fetched(online, config, tmp_path):
    output = tmp_path / "problems.json"
    first = facts.make(config, [NAME], output)
    assert first[NAME]["status"] == "skipped" and "could not be fetched" in first[NAME]["reason"]
    assert facts.read(config, [NAME], output) == first
    online.touch()
    second = facts.make(config, [NAME], output)
    assert second[NAME]["status"] == "ok", second[NAME]["reason"]
    assert facts.make(config, [NAME], output) == facts.read(config, [NAME], output) == second


@pytest.mark.parametrize("lost", ["removed", "replaced"])
def test_a_problem_is_prepared_again_if_the_cache_has_lost_its_weights(online, config, tmp_path, lost):
    """They would be trained again in the cells, within the time of these, to other values."""
    online.touch()
    output = tmp_path / "problems.json"
    first = facts.make(config, [NAME], output)[NAME]
    (file,) = weights.cached(NAME)
    file.unlink()
    if lost == "replaced":
        problems.load(NAME)
    again = facts.read(config, [NAME], output)[NAME]
    problems.load.cache_clear()
    assert again["contents"] == problems.load(NAME).contents() != first["contents"]
    assert facts.read(config, [NAME], output)[NAME] == again
