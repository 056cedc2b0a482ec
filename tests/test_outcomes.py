"""How a measurement ended: one word and one line, whatever ended it."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkbench import errors
from ntkbench.errors import BadInput, OverMemory, Unavailable
from ntkbench.measure import outcomes


class Unreadable(Exception):
    def __str__(self):
        raise RuntimeError("no")


@pytest.mark.parametrize(
    ("error", "status", "reason"),
    [
        (RuntimeError("boom\nsecond line"), "failed", "RuntimeError: boom"),
        (RuntimeError("\n\n  boom"), "failed", "RuntimeError: boom"),
        (BadInput("that is no method"), "failed", "BadInput: that is no method"),
        (SystemExit("bye"), "failed", "SystemExit: bye"),
        (KeyboardInterrupt(), "failed", "KeyboardInterrupt without a message"),
        (Unavailable("no MNIST here"), "skipped", "no MNIST here"),
        (Unavailable(""), "skipped", "Unavailable without a message"),
        (MemoryError("no room"), "out_of_memory", "MemoryError: no room"),
        (OverMemory("would hold 9 GiB"), "out_of_memory", "would hold 9 GiB"),
        (OverMemory(""), "out_of_memory", "OverMemory without a message"),
        (RuntimeError("CUDA out of memory. Tried"), "out_of_memory", "RuntimeError: CUDA out of memory. Tried"),
        (RuntimeError("RESOURCE_EXHAUSTED: x"), "out_of_memory", "RuntimeError: RESOURCE_EXHAUSTED: x"),
        (ValueError("nul \x00, tab\t, \udcff"), "failed", "ValueError: nul \\x00, tab\\t, \\udcff"),
        (Unreadable(), "failed", "Unreadable: its message cannot be read (RuntimeError)"),
        (type("Ü", (Exception,), {})(""), "failed", "Ü without a message"),
    ],
)
def test_an_exception_gives_a_status_and_a_reason(error, status, reason):
    assert outcomes.of_exception(error) == (status, reason)


@given(st.text(alphabet=st.characters(codec=None)))
def test_a_reason_is_one_printable_line_that_can_be_written(text):
    line = errors.one_line(text)
    assert line.isprintable() and line.encode("utf-8").decode() == line and len(line) <= errors.LONGEST
    assert outcomes.of_exception(ValueError(text)).reason


@pytest.mark.parametrize(
    ("code", "said"),
    [(0, "exit status 0"), (7, "exit status 7"), (-11, "SIGSEGV"), (-9, "SIGKILL"), (-250, "signal 250")],
)
def test_an_exit_status_gives_a_reason(code, said):
    status, reason = outcomes.of_exit(code)
    assert status == "failed" and said in reason


@pytest.mark.parametrize("status", [*outcomes.STATUSES, None])
def test_a_step_may_change_if_a_row_of_it_failed(tmp_path, status):
    csv, facts = tmp_path / "table.csv", tmp_path / "problems.json"
    if status:
        csv.write_text(f"problem,status,reason\na,ok,\nb,{status},no\n", encoding="utf-8")
        facts.write_text(f'{{"a": {{"status": "ok"}}, "b": {{"status": "{status}"}}}}', encoding="utf-8")
    expected = status in ("failed", "timeout", "out_of_memory")
    assert outcomes.may_change(csv) == outcomes.may_change(facts) == expected


@pytest.mark.parametrize("text", ["", "a,b\n1,2\n", "[1]", "{", '{"a": 3}'])
def test_a_file_without_outcomes_does_not_say_that_a_step_may_change(tmp_path, text):
    for name in ("table.csv", "problems.json"):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert outcomes.may_change(tmp_path / name) is False
