"""Progress that steps report while they run; files that no step wrote are left out."""

import json

import pytest

from ntkbench.measure import progress
from ntkbench.measure.progress import Progress


@pytest.mark.parametrize("text", ["", "[1]", "3", "null", "{}", '{"what": "x"}', "\x00"])
def test_a_file_that_no_step_wrote_is_left_out(tmp_path, text):
    with Progress(tmp_path, "one", 2.0) as one:
        one.begin("a")
    (tmp_path / progress.FOLDER / "two.json").write_text(text)
    assert list(progress.read(tmp_path)) == ["one"]
    assert progress.Line(tmp_path, dict).text().startswith("ntkbench:")


def test_a_step_writes_all_keys_that_are_read(tmp_path):
    with Progress(tmp_path, "one", 2.0):
        said = json.loads((tmp_path / progress.FOLDER / "one.json").read_text())
    assert said.keys() == progress.KEYS


def test_a_step_goes_on_if_its_progress_cannot_be_written(tmp_path):
    (tmp_path / progress.FOLDER).write_text("in the way")
    with Progress(tmp_path, "one", 2.0) as one:
        one.begin("a")
    assert progress.read(tmp_path) == {}
