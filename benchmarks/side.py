"""One side of ``ntkbench compare-commits``: measures the history's cases with the ntkbench of one checkout.

It reads requests from standard input and writes answers to standard output, a line of JSON each. The label of a case
forks a process for it, so that cases do not affect each other. That process answers requests ``[question, *arguments]``
about the case until ``["end"]``. When it ends, for whatever reason, its exit status is the last answer.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from typing import Any

from history import cases

requests = os.fdopen(os.dup(0), "rb", buffering=0)  # unbuffered, since forked processes continue reading
answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
os.dup2(2, 1)  # other output goes to stderr


def main() -> None:
    cases.one_thread()
    cases.import_early()
    import ntkbench

    answer(found=os.path.realpath(ntkbench.__file__))
    for request in asked():
        if isinstance(request, str):
            pid = os.fork()
            if not pid:
                serve(request)
            answer(ended=os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]))


def serve(label: str) -> None:
    """Answer questions about a case, and end this process."""
    try:
        case = cases.Case(label)
        answer(found=None)
        for question, *arguments in asked():
            if question == "end":
                break
            answer(found=QUESTIONS[question](case, *arguments))
    except cases.Absent as error:
        answer(absent=str(error))
    except BaseException as error:
        answer(failed=f"{type(error).__name__}: {error}")
    os._exit(0)


def block(case: cases.Case, calls: int, seed: int) -> float:
    """CPU seconds of this many calls, with consecutive seeds from ``seed``."""
    start = time.process_time()
    for number in range(calls):
        case.call(seed + number)
    return time.process_time() - start


QUESTIONS = {
    "block": block,
    "values": lambda case, seeds: case.values(range(seeds if case.random else 1)),
    "settle": lambda case: cases.settled_bytes(),
    "peak": lambda case: cases.peak_bytes(),
}


def asked() -> Iterator[Any]:
    while line := requests.readline():
        yield json.loads(line)


def answer(**said: Any) -> None:
    answers.write(json.dumps(said) + "\n")
    answers.flush()


if __name__ == "__main__":
    main()
