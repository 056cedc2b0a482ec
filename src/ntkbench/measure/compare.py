"""Compare two commits case by case: whether the second is slower, larger in memory or less accurate than the first.

The cases are those of the history that asv measures. Each commit has its own process (``benchmarks/side.py``).
The two take turns, AB BA AB, with the same seeds, in blocks of calls of at least :data:`BLOCK_SECONDS` on one thread.
The statistic is the median ratio of CPU seconds over pairs of blocks: both blocks of a pair see the same machine load.
A case that looks worse is measured again from scratch, in twice as many pairs, and is reported only if it still does.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ntkbench import paths
from ntkbench.errors import BadInput, NtkbenchError, Unavailable, one_line

SUITE = paths.ROOT / "benchmarks"
CASES = SUITE / "history" / "cases.txt"

PAIRS, PAIRS_AGAIN = 20, 40
"""Pairs of blocks in the first look, and in the second."""

SLOWER, SLOWER_AGAIN = 1.20, 1.25
"""Median ratio of CPU seconds above which a case looks slower in the first look, and is slower in the second."""

BLOCK_SECONDS = 0.1
"""Minimum CPU seconds of a block."""

LARGER, SLACK_BYTES, LOOKS = 1.2, 2**22, 5
"""Ratio of memory above which a case is larger, if the difference also exceeds ``SLACK_BYTES``; and the number of calls
whose smallest peak counts."""

SEEDS, MORE_SEEDS = 5, 40
"""Number of seeds whose values are compared, and number of seeds for errors where the values differ."""

LESS_ACCURATE, ROUNDING = 1.75, 1e-5
"""Ratio of root mean square errors above which a case is less accurate: over 40 seeds, the ratio for equal accuracy
varies by 16 %. And the relative difference that may be rounding."""

LIMIT_SECONDS = 300.0
"""Time limit of one request to a side."""

OK, ABSENT, FAILED = "ok", "absent", "failed"
"""State of a case on a side."""

WIDTHS = 53, 9, 9, 7, 8, 8, 9, 9
"""Widths of the table's columns before the verdict."""


@dataclass(frozen=True)
class Found:
    """Result of one look at a case. Pairs hold values of the first commit and of the second.

    Attributes:
        states: state of the case on each side.
        reasons: why the case is absent, or how it failed.
        seconds: CPU seconds per call, for each pair of blocks.
        bytes: memory that a call takes plus memory that calls leave behind; ``None`` where that is not known.
        same: whether the same seeds give the same values.
        errors: root mean square errors, relative to exact values.
    """

    states: tuple[str, str] = (OK, OK)
    reasons: tuple[str, str] = ("", "")
    seconds: Sequence[tuple[float, float]] = ()
    bytes: tuple[int, int] | None = None
    same: bool = True
    errors: tuple[float, float] = (math.nan, math.nan)

    @property
    def compared(self) -> bool:
        """Whether both were measured."""
        return self.states == (OK, OK)

    @property
    def ratio(self) -> float:
        """The median ratio of CPU seconds; ``nan`` where there is none."""
        if not self.seconds or min(map(min, self.seconds)) <= 0:
            return math.nan
        return statistics.median(second / first for first, second in self.seconds)

    def worse(self, slower: float) -> list[str]:
        """The respects in which the second commit is worse; a missing measurement counts as worse.

        Args:
            slower: ratio of CPU seconds above which it is slower.
        """
        if not self.compared:
            lost = self.states in ((OK, ABSENT), (OK, FAILED), (ABSENT, FAILED))
            return [self.states[1]] if lost else []
        found = []
        if math.isnan(self.ratio):
            found.append("not timed")
        elif self.ratio > slower:
            found.append("slower")
        if self.bytes and self.bytes[1] > max(LARGER * self.bytes[0], self.bytes[0] + SLACK_BYTES):
            found.append("larger")
        if not self.errors[1] <= LESS_ACCURATE * self.errors[0] + ROUNDING:
            found.append("less accurate")
        return found


@dataclass(frozen=True)
class Verdict:
    """The verdict on a case.

    Attributes:
        label: label of the case.
        found: result of the last look.
        worse: respects in which the second commit is worse.
    """

    label: str
    found: Found
    worse: list[str]

    def line(self) -> str:
        """The case's line of the table."""
        found, numbers = self.found, [""] * 7
        if found.compared:
            times = [statistics.median(column) for column in zip(*found.seconds, strict=True)] or [math.nan] * 2
            held = found.bytes or (math.nan, math.nan)
            numbers = [f"{1000 * seconds:.2f}" for seconds in times] + [f"{found.ratio:.2f}"]
            numbers += [f"{size / 2**20:.1f}" for size in held] + [f"{error:.1e}" for error in found.errors]
        return line([self.label, *numbers], self.words())

    def words(self) -> str:
        """The verdict in words."""
        if self.worse:
            reason = self.found.reasons[1]
            return ", ".join(self.worse).upper() + (f": {one_line(reason)}" if reason else "")
        if self.found.compared:
            return "ok" if self.found.same else "ok, with other values"
        return {(ABSENT, OK): "new", (FAILED, OK): "failed before"}.get(self.found.states, "n/a")


def line(columns: Sequence[str], end: str) -> str:
    """A line of the table."""
    name, *numbers = columns
    cells = [f"{number:>{width}}" for number, width in zip(numbers, WIDTHS[1:], strict=True)]
    return f"{name:<{WIDTHS[0]}}{''.join(cells)}  {end}"


Look = Callable[[str, int], Found]
"""Measures a case in a given number of pairs of blocks."""


def judge(label: str, look: Look) -> Verdict:
    """Measure a case; if it looks worse, measure it again before reporting that."""
    found = look(label, PAIRS)
    worse = found.worse(SLOWER)
    if worse:
        found = look(label, PAIRS_AGAIN)
        worse = found.worse(SLOWER_AGAIN)
    return Verdict(label, found, worse)


def summary(verdicts: Sequence[Verdict]) -> tuple[bool, str]:
    """Whether at least one case was compared and none got worse; and a text that says so."""
    compared = sum(verdict.found.compared for verdict in verdicts)
    said = f"{compared} of {len(verdicts)} cases compared"
    if not compared:
        return False, f"{said}: nothing was measured"
    worse = [f"{verdict.label}: {', '.join(verdict.worse)}" for verdict in verdicts if verdict.worse]
    if worse:
        return False, "\n".join([f"{said}, worse in {len(worse)}:", *worse])
    return True, f"{said}: nothing got slower, larger or less accurate"


def run(first: str, second: str, pattern: str = "", repository: Path = paths.ROOT) -> bool:
    """Compare two commits and print a table; returns whether nothing got worse.

    Args:
        first: a commit, by any name that git accepts.
        second: another commit.
        pattern: a regular expression; only cases whose names contain a match are compared.
        repository: repository of the commits.

    Raises:
        BadInput: there is no such commit, or no such case.
        Unavailable: ntkbench is not in a checkout, or the system does not fork processes.
        NtkbenchError: a commit cannot be measured at all.
    """
    paths.checkout("ntkbench compare-commits")
    if not hasattr(os, "fork"):
        raise Unavailable("ntkbench compare-commits forks a process for each case, which this system does not do")
    labels = chosen(pattern)
    commits = [commit(repository, name) for name in (first, second)]
    with contextlib.ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="ntkbench-")))
        sides = []
        for name, sha in zip(("first", "second"), commits, strict=True):
            check_out(repository, sha, folder / name)
            sides.append(stack.enter_context(Side(folder / name)))
            sides[-1].start()
        print(f"{commits[0][:10]} (first) and {commits[1][:10]} (second): {len(labels)} cases\n")
        print(line(["case", *["CPU ms"] * 2, "ratio", *["MiB"] * 2, *["error"] * 2], "second"), flush=True)
        verdicts = []
        for label in labels:
            verdicts.append(judge(label, lambda label, pairs: look(sides, label, pairs)))
            print(verdicts[-1].line(), flush=True)
    good, said = summary(verdicts)
    print(f"\n{said}")
    return good


def chosen(pattern: str) -> list[str]:
    """The cases whose names contain a match of a regular expression.

    Raises:
        BadInput: it is not a regular expression, or no name matches.
    """
    try:
        found = [label for label in CASES.read_text(encoding="utf-8").split() if re.search(pattern, label)]
    except re.error as error:
        raise BadInput(f"{pattern!r} is not a regular expression: {error}") from None
    if not found:
        raise BadInput(f"no case has a name that matches {pattern!r}; the cases are in {CASES.relative_to(paths.ROOT)}")
    return found


def commit(repository: Path, name: str) -> str:
    """The full hash of a commit.

    Raises:
        BadInput: there is no commit of that name.
    """
    done = _git(repository, "rev-parse", "--verify", "--quiet", "--end-of-options", f"{name}^{{commit}}")
    if done.returncode:
        raise BadInput(f"{name!r} is not a commit of {repository}")
    return done.stdout.decode().strip()


def check_out(repository: Path, sha: str, folder: Path) -> None:
    """Write a commit's package to a folder without changing the repository.

    Raises:
        NtkbenchError: the commit has no package.
    """
    done = _git(repository, "archive", "--format=zip", sha, "src/ntkbench")
    if done.returncode:
        raise NtkbenchError(f"{sha[:10]} has no package: {one_line(done.stderr.decode())}")
    with zipfile.ZipFile(io.BytesIO(done.stdout)) as archive:
        archive.extractall(folder)


def _git(repository: Path, *arguments: str) -> subprocess.CompletedProcess[bytes]:
    try:
        return subprocess.run(["git", "-C", str(repository), *arguments], capture_output=True)
    except OSError as error:
        raise NtkbenchError(f"git cannot be run: {error.strerror}") from None


class Lost(Exception):
    """A side cannot answer a request."""

    def __init__(self, side: Side, state: str, reason: str) -> None:
        super().__init__(reason)
        self.side, self.state, self.reason = side, state, reason


class Side:
    """The process that measures a checkout; see ``benchmarks/side.py``.

    Args:
        checkout: folder with a commit's package.
    """

    def __init__(self, checkout: Path) -> None:
        self._checkout, self._log = checkout, checkout / "log"
        self._process: subprocess.Popen[bytes] | None = None
        self._forked = self._asked = False  # whether a process for a case exists, and waits for questions

    def __enter__(self) -> Side:
        return self

    def __exit__(self, *_: object) -> None:
        self._kill()

    def start(self) -> None:
        """Start the process, unless it runs.

        Raises:
            NtkbenchError: the commit cannot be measured.
        """
        if self._process:
            return
        # The caller's own PYTHONPATH comes after the checkout.
        environment = {"PYTHONPATH": paths.python_path(self._checkout), "NTKBENCH_CACHE": str(self._checkout / "cache")}
        with self._log.open("wb") as log:
            self._process = subprocess.Popen(
                [sys.executable, str(SUITE / "side.py")],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                env=os.environ | environment,
                cwd=self._checkout,
                start_new_session=True,
            )
        try:
            package = Path(self._heard())
        except Lost as error:
            raise NtkbenchError(f"a commit cannot be measured: {error.reason}") from None
        if not package.is_relative_to(self._checkout.resolve()):
            raise NtkbenchError(f"a commit cannot be measured: its process imports {package}, which is not part of it")

    def begin(self, label: str) -> None:
        """Prepare a case.

        Raises:
            Lost: the commit does not have the case, or the case failed.
        """
        self.start()
        self._forked = self._asked = True
        self.ask(label)

    def ask(self, question: Any) -> Any:
        """Ask a question about the current case; returns the answer.

        Raises:
            Lost: the case failed.
        """
        self._say(question)
        return self._heard()

    def end(self) -> None:
        """End the current case, whatever its state."""
        if self._asked:
            self._say(["end"])
        while self._forked:
            with contextlib.suppress(Lost):
                self._heard()
        self._asked = False

    def _say(self, question: Any) -> None:
        assert self._process and self._process.stdin
        with contextlib.suppress(BrokenPipeError):  # noticed when no answer comes
            self._process.stdin.write(json.dumps(question).encode() + b"\n")
            self._process.stdin.flush()

    def _heard(self) -> Any:
        assert self._process and self._process.stdout
        limit = threading.Timer(LIMIT_SECONDS, os.killpg, (self._process.pid, signal.SIGKILL))
        limit.start()
        try:
            answer = self._process.stdout.readline()
        finally:
            limit.cancel()
        if not answer:
            self._kill()
            said = self._log.read_text(encoding="utf-8", errors="replace").strip().rpartition("\n")[2]
            raise Lost(self, FAILED, one_line(said) or f"no answer within {LIMIT_SECONDS:g} s")
        said = json.loads(answer)
        if "ended" in said:
            self._forked = self._asked = False
            raise Lost(self, FAILED, f"its process ended with status {said['ended']}")
        for state in (ABSENT, FAILED):
            if state in said:
                self._asked = False
                raise Lost(self, state, said[state])
        return said["found"]

    def _kill(self) -> None:
        if self._process:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self._process.pid, signal.SIGKILL)
            self._process.communicate()
        self._process, self._forked, self._asked = None, False, False


def look(sides: Sequence[Side], label: str, pairs: int) -> Found:
    """Measure a case on both sides in turn."""
    states, reasons = [OK, OK], ["", ""]
    try:
        for number, side in enumerate(sides):
            try:
                side.begin(label)
            except Lost as error:
                states[number], reasons[number] = error.state, error.reason
        if states == [OK, OK]:
            return _measured(sides, pairs)
    except Lost as error:
        number = sides.index(error.side)
        states[number], reasons[number] = error.state, error.reason
    finally:
        for side in sides:
            side.end()
    return Found((states[0], states[1]), (reasons[0], reasons[1]))


def _measured(sides: Sequence[Side], pairs: int) -> Found:
    first, second = sides
    values = [side.ask(["values", SEEDS]) for side in sides]
    one, other = (found for found, _ in values)
    alike = (math.isclose(*pair, rel_tol=ROUNDING) for pair in zip(one, other, strict=False))
    same = len(one) == len(other) and all(alike)  # a case may be random on one side only
    if not same:
        values = [side.ask(["values", MORE_SEEDS]) for side in sides]
    errors = [math.sqrt(statistics.mean(error**2 for error in found)) for _, found in values]
    fastest = min(side.ask(["block", 1, seed]) for seed in range(3) for side in sides)
    calls = math.ceil(BLOCK_SECONDS / max(fastest, 1e-6))
    before = [side.ask(["settle"]) for side in sides]
    seconds = []
    for pair in range(pairs):
        took = {side: side.ask(["block", calls, pair * calls]) / calls for side in sides[:: 1 if pair % 2 == 0 else -1]}
        seconds.append((took[first], took[second]))
    taken = None if None in before else (_bytes(first, before[0]), _bytes(second, before[1]))
    return Found(seconds=seconds, bytes=taken, same=same, errors=(errors[0], errors[1]))


def _bytes(side: Side, before: int) -> int:
    """Bytes that the calls of a side leave behind, plus the smallest of a few peaks of one call.

    Peaks of equal calls vary by up to a factor of two with the time when memory is freed. The smallest hardly varies.
    """
    left, peaks = max(0, side.ask(["settle"]) - before), []
    for seed in range(LOOKS):
        start = side.ask(["settle"])
        side.ask(["block", 1, seed])
        peaks.append(side.ask(["peak"]) - start)
    return left + max(0, min(peaks))
