"""The tidy table: one row per cell, however it ended."""

import pandas as pd
import pytest

from ntkbench import operators
from ntkbench.errors import NtkbenchError
from ntkbench.measure import cells, rows
from ntkbench.measure.config import Config
from ntkbench.measure.outcomes import Outcome

BLOCK = {"problems": ["digits_conv[N=3]"], "methods": ["hutchpp", "direct"], "metrics": ["trace"], "passes": [36, 72]}
CONFIG = Config.check({"profile": "test", "threads": 1, "device": "cpu", "grid": [BLOCK]}, "test.yaml")
CELLS = cells.cells(CONFIG)
OK = Outcome("ok")
SIZES = {"N": 3, "O": 10, "P": 20138, "n": 30}


def table(chosen, outcome=OK, **measured):
    return rows.frame(rows.row(cell, CONFIG, "abc", outcome, SIZES, measured) for cell in chosen)


def test_a_row_has_its_settings_and_provenance():
    made = table(CELLS[:1], seconds=0.5, seeds=20, calls=5)
    assert list(made.columns) == list(rows.COLUMNS)
    row = made.iloc[0]
    assert (row["problem"], row["family"], row["method"]) == ("digits_conv[N=3]", "digits_conv", "direct")
    assert pd.isna(row["passes"])
    assert (row["n"], row["seconds"], row["seeds"], row["calls"], row["fingerprint"]) == (30, 0.5, 20, 5, "abc")
    assert row["git_sha"] and row["machine"] and "torch" in row["versions"] and row["threads"] == 1


def test_a_row_without_a_measurement_has_no_seeds_and_no_calls():
    row = table(CELLS[:1], Outcome("timeout", "not done")).iloc[0]
    assert (row["status"], row["reason"], row["seeds"], row["calls"]) == ("timeout", "not done", 0, 0)
    assert pd.isna(row["seconds"]) and pd.isna(row["error"])


def test_a_cell_whose_backend_lacks_the_device_is_a_row(monkeypatch):
    """It names the device of the others, so that figures do not take it for another setting."""
    monkeypatch.setattr(operators, "device_name", lambda target: "cpu" if target.backend == "jax" else "a GPU")
    config, skipped = CONFIG.model_copy(update={"device": "auto"}), Outcome("skipped", "jax has no GPU here")
    made = [cells.Cell("digits_conv[N=3]", "hutchpp", backend, "trace", 36) for backend in ("torch", "jax")]
    assert [rows.row(cell, config, "abc", skipped, SIZES, {})["device"] for cell in made] == ["a GPU"] * 2


def test_a_table_is_the_same_after_writing_and_reading(tmp_path):
    made = table(CELLS, Outcome("failed", 'ValueError: nul \\x00, comma, "quote" <b>'), notes="a; b")
    made.to_csv(tmp_path / "table.csv", index=False)
    pd.testing.assert_frame_equal(
        rows.read(tmp_path / "table.csv")[["reason", "passes", "notes"]],
        made[["reason", "passes", "notes"]],
        check_dtype=False,
    )


def test_shards_are_combined_in_the_order_of_the_cells():
    made = rows.combine([table(CELLS[2:]), table(CELLS[:2])], CELLS)
    assert list(zip(made["method"], made["passes"].fillna(0), strict=True)) == [
        ("direct", 0),
        ("hutchpp", 36),
        ("hutchpp", 72),
    ]


@pytest.mark.parametrize(
    ("chosen", "said"),
    [
        (CELLS[1:], r"missing \['digits_conv\[N=3\]/direct/torch/trace'\]"),
        ([*CELLS, CELLS[0]], r"duplicate \['digits_conv\[N=3\]/direct/torch/trace'\]"),
        ([*CELLS, cells.Cell("mlp_he", "direct", "torch", "trace", None)], r"unknown \['mlp_he/direct/torch/trace'\]"),
    ],
)
def test_a_table_without_one_row_per_cell_is_refused(chosen, said):
    with pytest.raises(NtkbenchError, match=said):
        rows.combine([table(chosen)], CELLS)


def test_shards_have_every_cell_once():
    for count in (1, 2, 3):
        config = CONFIG.model_copy(update={"shards": count})
        dealt = [cell for number in range(count) for cell in cells.of_shard(config, number)]
        assert sorted(cell.label for cell in dealt) == sorted(cell.label for cell in CELLS)
