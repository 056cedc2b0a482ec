"""Stored facts of problems: they are read back unchanged, and recomputed if they are missing or damaged."""

import pytest

from ntkbench.measure import facts, fingerprints
from ntkbench.measure.config import Config

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


def test_a_problem_edited_meanwhile_fails(config, made, tmp_path, monkeypatch):
    seen = iter("abc")
    monkeypatch.setattr(fingerprints, "problem", lambda label: next(seen))
    row = facts.make(config, [LABEL], tmp_path / "problems.json")[LABEL]
    assert row["status"] == "failed" and "edited while" in row["reason"]
