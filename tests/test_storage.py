"""Stored weights and exact values: damage is detected, and damaged cache files are recreated."""

from __future__ import annotations

import errno
import json
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkbench import paths
from ntkbench.errors import Corrupt, NtkbenchError
from ntkbench.problems.base import storage

RECORD = {"metrics": {"trace": 3168762.4290196053, "norm": 0.1}, "digest": "6469dced3fa93ed2", "n": 3200}
ARRAYS = {"theta_0/0.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "origin": np.array("6469dced3fa93ed2")}
CONTENT = {".json": RECORD, ".npz": ARRAYS}

DAMAGES = {
    "empty": lambda path: path.write_bytes(b""),
    "truncated": lambda path: path.write_bytes(path.read_bytes()[: path.stat().st_size // 2]),
    "a byte short": lambda path: path.write_bytes(path.read_bytes()[:-2]),
    "noise": lambda path: path.write_bytes(bytes(range(256))),
    "a directory": lambda path: (path.unlink(), path.mkdir()),
    "JSON null": lambda path: path.write_text("null"),
    "a JSON list": lambda path: path.write_text("[1, 2]"),
    "JSON without a checksum": lambda path: path.write_text(json.dumps(RECORD)),
    "nested too deeply": lambda path: path.write_text("[" * 100_000),
    "an array alone": lambda path: np.save(path.open("wb"), np.ones(3)),
    "arrays without a checksum": lambda path: np.savez(path.open("wb"), **ARRAYS),
    "pickled objects": lambda path: np.savez(path.open("wb"), checksum=np.array([{}], dtype=object)),
    "the other format": lambda path: (
        storage.write(other := path.with_suffix({".json": ".npz", ".npz": ".json"}[path.suffix]), CONTENT[other.suffix])
        or other.replace(path)
    ),
}


def same(found, expected) -> bool:
    return found.keys() == expected.keys() and all(np.array_equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("suffix", CONTENT)
def test_what_is_written_is_read(tmp_path, suffix):
    path = tmp_path / "new" / f"file{suffix}"
    assert storage.read(path) is None
    storage.write(path, CONTENT[suffix])
    assert same(storage.read(path), CONTENT[suffix])
    assert [file.name for file in path.parent.iterdir()] == [path.name]


@pytest.mark.parametrize("suffix", CONTENT)
@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_cache_file_counts_as_none_and_a_committed_one_is_an_error(
    tmp_path, monkeypatch, caplog, suffix, damage
):
    path = tmp_path / f"file{suffix}"
    storage.write(path, CONTENT[suffix])
    DAMAGES[damage](path)
    assert storage.read(path) is None
    (record,) = caplog.records
    assert record.getMessage().startswith(f"{path} is damaged: ")
    assert record.getMessage().endswith("; it is recreated")
    assert "\n" not in record.getMessage()
    monkeypatch.setattr(paths, "REFERENCE", tmp_path)
    with pytest.raises(Corrupt, match=r"/file\.\w+ is damaged: .*; restore the committed file, or") as error:
        storage.read(path)
    assert "\n" not in str(error.value)
    assert len(caplog.records) == 1


@given(data=st.data())
def test_a_changed_digit_is_noticed(tmp_path_factory, data):
    path = tmp_path_factory.mktemp("digits") / "file.json"
    storage.write(path, RECORD)
    text = path.read_text()
    at = data.draw(st.sampled_from([i for i, c in enumerate(text) if c.isdigit()]))
    digit = data.draw(st.sampled_from([d for d in "0123456789" if d != text[at]]))
    path.write_text(text[:at] + digit + text[at + 1 :])
    assert storage.read(path) in (None, RECORD), "a digit beyond float64 changes no number, any other is noticed"


@given(at=st.integers(0, 10**6), bit=st.integers(0, 7))
def test_a_flipped_bit_of_a_weight_is_noticed(tmp_path_factory, at, bit):
    path = tmp_path_factory.mktemp("bits") / "file.npz"
    storage.write(path, ARRAYS)
    with np.load(path) as arrays:
        members = {name: arrays[name] for name in arrays.files}
    flat = members["theta_0/0.weight"].view(np.uint8).reshape(-1)
    flat[at % flat.size] ^= 1 << bit
    np.savez_compressed(path, **members)
    assert storage.read(path) is None


@pytest.mark.parametrize(
    "renamed", [{"theta_0/1.weight": ARRAYS["theta_0/0.weight"]}, {"theta_0/0.weight": np.arange(6.0)}]
)
def test_a_renamed_or_reshaped_array_is_noticed(tmp_path, renamed):
    path = tmp_path / "file.npz"
    storage.write(path, ARRAYS)
    with np.load(path) as arrays:
        checksum = arrays["checksum"]
    np.savez_compressed(path, **renamed, origin=ARRAYS["origin"], checksum=checksum)
    assert storage.read(path) is None


@pytest.mark.parametrize("suffix", CONTENT)
@pytest.mark.parametrize("step", ["pathlib.Path.mkdir", "pathlib.Path.write_bytes", "os.replace"])
def test_a_full_disk_is_reported_in_one_line_and_leaves_the_old_file(tmp_path, monkeypatch, suffix, step):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    path = tmp_path / f"file{suffix}"
    storage.write(path, CONTENT[suffix])
    with monkeypatch.context() as patch:
        patch.setattr(step, full)
        with pytest.raises(NtkbenchError) as error:
            storage.write(path, {})
    assert str(error.value) == f"{path} cannot be written: No space left on device"
    assert same(storage.read(path), CONTENT[suffix])
    assert list(tmp_path.iterdir()) == [path]


def test_a_writer_that_is_killed_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    storage.write(path, RECORD)
    whole = Path.write_bytes

    def interrupted(self, data):
        whole(self, data[: len(data) // 2])
        raise KeyboardInterrupt

    monkeypatch.setattr(Path, "write_bytes", interrupted)
    with pytest.raises(KeyboardInterrupt):
        storage.write(path, {"metrics": {}})
    monkeypatch.undo()
    assert same(storage.read(path), RECORD)
    assert list(tmp_path.iterdir()) == [path]
