"""The comparison of two commits: regressions are reported, and only those; measuring nothing is a failure."""

from __future__ import annotations

import math
import os
import shutil
import subprocess

import numpy as np
import pytest

from ntkbench import paths
from ntkbench.errors import NtkbenchError, Unavailable
from ntkbench.measure import compare
from ntkbench.measure.compare import ABSENT, FAILED, OK, PAIRS, PAIRS_AGAIN, Found, Side, Verdict, judge, summary

LABEL = "network/method/torch/trace"
ERRORS = (0.1, 0.1)


def timed(ratio, pairs, seed, noise=0.15):
    """Pairs of times on a machine whose speed drifts by a factor of two, with independent noise."""
    rng = np.random.default_rng(seed)
    machine = np.exp(0.35 * np.sin(np.arange(pairs) / 3) + rng.normal(0, 0.05, pairs)) * 1e-3
    both = machine[:, None] * np.exp(rng.normal(0, noise, (pairs, 2))) * [1, ratio]
    return [(float(first), float(second)) for first, second in both]


def looks(*found):
    """A look that returns the given findings in order, and the numbers of pairs that it is asked for."""
    asked, left = [], list(found)

    def look(label, pairs):
        asked.append(pairs)
        return left.pop(0)

    return look, asked


def test_equal_code_raises_no_alarm():
    verdicts = [
        judge(LABEL, lambda label, pairs, s=s: Found(seconds=timed(1, pairs, s), errors=ERRORS)) for s in range(500)
    ]
    assert summary(verdicts) == (True, "500 of 500 cases compared: nothing got slower, larger or less accurate")


def test_a_slowdown_is_found():
    verdicts = [
        judge(LABEL, lambda label, pairs, s=s: Found(seconds=timed(1.5, pairs, s), errors=ERRORS)) for s in range(500)
    ]
    assert all(verdict.worse == ["slower"] for verdict in verdicts)
    passed, said = summary(verdicts[:1])
    assert not passed and f"{LABEL}: slower" in said and "SLOWER" in verdicts[0].line()


def test_apparent_slowdowns_are_measured_again():
    slow, fine = (Found(seconds=[(1.0, ratio)] * 3, errors=ERRORS) for ratio in (1.3, 1.24))
    look, asked = looks(slow, fine)
    assert judge(LABEL, look).worse == [] and asked == [PAIRS, PAIRS_AGAIN]
    look, asked = looks(slow, slow)
    assert judge(LABEL, look).worse == ["slower"] and asked == [PAIRS, PAIRS_AGAIN]
    look, asked = looks(Found(seconds=[(1.0, 1.19)], errors=ERRORS))
    assert judge(LABEL, look).worse == [] and asked == [PAIRS]


@pytest.mark.parametrize(
    ("held", "larger"),
    [
        ((2**26, 2**27), True),
        ((2**26, int(1.19 * 2**26)), False),
        ((2**10, 2**21), False),  # a difference of less than the slack
        ((2**10, 2**23), True),
        ((2**27, 2**26), False),
        (None, False),
    ],
)
def test_more_memory_is_worse(held, larger):
    assert Found(seconds=[(1.0, 1.0)], bytes=held, errors=ERRORS).worse(1.2) == ["larger"] * larger


@pytest.mark.parametrize(
    ("errors", "worse"),
    [
        ((1e-7, 5e-7), False),  # rounding
        ((1e-7, 1e-3), True),
        ((0.1, 0.15), False),
        ((0.1, 0.2), True),
        ((0.2, 0.1), False),
        ((0.1, math.nan), True),
        ((0.1, math.inf), True),
    ],
)
def test_larger_errors_are_worse(errors, worse):
    assert Found(seconds=[(1.0, 1.0)], errors=errors).worse(1.2) == ["less accurate"] * worse


@pytest.mark.parametrize(
    ("states", "worse", "words"),
    [
        ((OK, ABSENT), ["absent"], "ABSENT: why"),
        ((OK, FAILED), ["failed"], "FAILED: why"),
        ((ABSENT, FAILED), ["failed"], "FAILED: why"),
        ((ABSENT, OK), [], "new"),
        ((FAILED, OK), [], "failed before"),
        ((ABSENT, ABSENT), [], "n/a"),
        ((FAILED, FAILED), [], "n/a"),
    ],
)
def test_a_case_that_one_side_lacks(states, worse, words):
    found = Found(states, ("", "why"))
    verdict = judge(LABEL, lambda label, pairs: found)
    assert verdict.worse == worse and verdict.words() == words and verdict.line().endswith(words)
    assert summary([verdict, measured()])[0] != bool(worse)


def measured(**changes):
    return Verdict(LABEL, Found(**{"seconds": [(0.001, 0.001)], "errors": ERRORS} | changes), [])


@pytest.mark.parametrize("verdicts", [[], [Verdict(LABEL, Found((ABSENT, ABSENT)), [])] * 3])
def test_a_comparison_that_measures_nothing_fails(verdicts):
    assert summary(verdicts) == (False, f"0 of {len(verdicts)} cases compared: nothing was measured")


@pytest.mark.parametrize("seconds", [[], [(0.0, 0.0)], [(1.0, 0.0)]])
def test_a_case_with_times_of_zero_fails(seconds):
    found = Found(seconds=seconds, errors=ERRORS)
    assert judge(LABEL, lambda label, pairs: found).worse == ["not timed"]


def test_a_line_has_the_numbers():
    found = Found(seconds=[(0.01, 0.02), (0.03, 0.06), (0.02, 0.04)], bytes=(2**20, 2**21), errors=(0.1, 0.0))
    words = Verdict(LABEL, found, ["slower"]).line().split()
    assert words == [LABEL, "20.00", "40.00", "2.00", "1.0", "2.0", "1.0e-01", "0.0e+00", "SLOWER"]


class Answers:
    """A side of a comparison that answers from a list of errors, with one value for each."""

    def __init__(self, values, errors):
        self._values, self._errors, self.asked = values, errors, []

    def ask(self, question):
        name, *given = question
        if name == "values":
            self.asked.append(*given)
            return self._values[: given[0]], self._errors[: given[0]]
        return 1.0 if name == "block" else None


@pytest.mark.parametrize(
    ("values", "same"),
    [
        (([1.0], [1.0]), True),
        (([1.0], [1.1]), False),
        (([1.0] * 40, [1.0] * 40), True),
        (([1.0, 2.0] * 20, [1.0] * 40), False),
        (([1.0], [1.0] * 40), False),  # a case whose value depends on the seed at the second commit only
    ],
)
def test_values_are_compared_over_the_seeds_that_change_them(values, same):
    sides = [Answers(each, [0.1] * len(each)) for each in values]
    found = compare._measured(sides, 1)
    assert found.same == same and found.errors == pytest.approx((0.1, 0.1))
    assert [side.asked for side in sides] == [[compare.SEEDS] + [compare.MORE_SEEDS] * (not same)] * 2


CHANGED = """

_trace, _kept = trace, []


def trace(model, x, **keywords):
    import dataclasses

    method, found = keywords["method"], _trace(model, x, **keywords)
    if method == "direct":
        [_trace(model, x, **keywords) for _ in range(9)]
    if method == "single_logit":
        _kept.append(b"x" * 2**24)
    if method == "last_layer":
        b"x" * int(2**26 + keywords["seed"])
        return dataclasses.replace(found, value=30 * found.value)
    if method == "trace_kernel":
        raise BadInput("taken away")
    return found
"""
WORSE = {
    "direct": ["slower"],
    "last_layer": ["larger", "less accurate"],
    "single_logit": ["larger"],
    "trace_kernel": ["absent"],
}


@pytest.fixture(scope="module")
def repository(tmp_path_factory):
    """Two commits: the package as it is, and with :data:`CHANGED` added to it."""
    folder = tmp_path_factory.mktemp("repository")

    def git(*arguments):
        who = ["-c", "user.name=nobody", "-c", "user.email=nobody@nowhere", "-c", "commit.gpgsign=false"]
        subprocess.run(["git", "-C", str(folder), *who, *arguments], check=True, capture_output=True)

    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    shutil.copytree(paths.ROOT / "src", folder / "src", ignore=ignored)
    git("init", "--initial-branch=main")
    git("add", "--all")
    git("commit", "--message=base")
    with (folder / "src" / "ntkbench" / "api.py").open("a", encoding="utf-8") as file:
        file.write(CHANGED)
    git("commit", "--all", "--message=head")
    return folder


@pytest.fixture
def short(monkeypatch):
    for name in ("PAIRS", "PAIRS_AGAIN", "SEEDS", "MORE_SEEDS", "LOOKS"):
        monkeypatch.setattr(compare, name, 2)
    monkeypatch.setattr(compare, "BLOCK_SECONDS", 0.01)


@pytest.mark.slow
def test_commits_are_compared(repository, short, capsys):
    """Ten times the time, more memory, a wrong value and a missing method show even on a busy machine."""
    before = sorted(file for file in (repository / ".git").rglob("*") if file.is_file())
    pattern = f"mlp/({'|'.join(WORSE)})/torch/trace"
    assert not compare.run("HEAD~1", "HEAD", pattern, repository)
    said = capsys.readouterr().out
    for method, worse in WORSE.items():
        (line,) = (line for line in said.splitlines() if line.startswith(f"mlp/{method}/torch/trace "))
        assert all(word.upper() in line for word in worse), line
        if method != "direct":
            assert "accurate" not in line.lower() or method == "last_layer", line
    assert "3 of 4 cases compared, worse in 4" in said
    assert sorted(file for file in (repository / ".git").rglob("*") if file.is_file()) == before


def test_a_system_without_fork_is_refused(monkeypatch):
    monkeypatch.delattr(os, "fork")
    with pytest.raises(Unavailable, match="forks a process for each case, which this system does not do"):
        compare.run("HEAD", "HEAD")


def test_a_commit_without_a_package_is_refused(repository, tmp_path):
    empty = subprocess.run(
        ["git", "-C", str(repository), "hash-object", "-t", "tree", "--stdin"], input=b"", capture_output=True
    )
    with pytest.raises(NtkbenchError, match="has no package"):
        compare.check_out(repository, empty.stdout.decode().strip(), tmp_path)


@pytest.mark.slow
def test_code_of_another_checkout_is_not_measured(tmp_path):
    with Side(tmp_path) as side, pytest.raises(NtkbenchError, match="which is not part of it"):
        side.start()
