"""The study of kernels in files, whose process is killed and resumed, on a small network."""

from __future__ import annotations

import pytest

from ntkbench import testing
from ntkbench.errors import NtkbenchError
from ntkbench.studies import kernel_in_file as study

SMALL = {"problems": ["digits_mlp[N=300]"], "threads": 1, "device": "cpu", "limits": {"block_mb": 8}}


@pytest.mark.slow
def test_a_killed_computation_resumes_with_the_right_kernel():
    (row,) = testing.check_study("kernel_in_file", SMALL).to_dict("records")
    assert row["status"] == "ok", row["reason"]
    assert 0 < row["kept"] < row["parts"] and row["file_bytes"] >= 4 * row["n"] ** 2 > row["allowed_bytes"]
    assert row["difference"] < 1e-5 and 0 < row["resumed_seconds"] < row["seconds"]


@pytest.mark.slow
def test_a_process_that_exceeds_a_limit_says_so(tmp_path):
    settings = study.Settings.model_validate(SMALL | {"limits": {"memory_mb": 50}})
    with pytest.raises(NtkbenchError, match=r"writing the kernel: .*over the limit of 0\.0488 GiB"):
        study._written(settings, SMALL["problems"][0], tmp_path / "theta.npy")
