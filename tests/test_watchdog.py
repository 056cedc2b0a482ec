"""The watchdog: what goes over a limit is stopped and said, what does not is left alone."""

import json
import subprocess
import sys

import pytest

GUARDED = """
import sys, time
from pathlib import Path
from ntkbench import watchdog
watchdog.guard(float(sys.argv[1]), float(sys.argv[2]), Path(sys.argv[3]))
held = bytearray(int(sys.argv[4]))
time.sleep(float(sys.argv[5]))
"""


def guarded(tmp_path, seconds, memory, holds, lasts):
    verdict = tmp_path / "verdict"
    arguments = [str(a) for a in (seconds, memory, verdict, holds, lasts)]
    done = subprocess.run([sys.executable, "-c", GUARDED, *arguments], timeout=60)
    return done.returncode, json.loads(verdict.read_text()) if verdict.exists() else None


def test_a_process_within_its_limits_ends_by_itself(tmp_path):
    assert guarded(tmp_path, seconds=30, memory=2**33, holds=1, lasts=0.3) == (0, None)


@pytest.mark.parametrize(
    ("limits", "status", "said"),
    [
        ({"seconds": 0.5, "memory": 2**33, "holds": 1, "lasts": 50}, "timeout", "time limit of 0.5 s"),
        ({"seconds": 50, "memory": 2**28, "holds": 2**30, "lasts": 50}, "out_of_memory", "memory limit of 0.2 GiB"),
    ],
)
def test_a_process_over_a_limit_is_killed_and_the_verdict_says_why(tmp_path, limits, status, said):
    returncode, verdict = guarded(tmp_path, **limits)
    assert returncode < 0
    assert verdict["status"] == status
    assert said in verdict["reason"]
