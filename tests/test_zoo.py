"""ntkbench on many networks: operations, layers, coding styles, and models of other libraries."""

from __future__ import annotations

import pytest
from zoo import TOLERANCE, Case, answer, cases, libraries

pytestmark = pytest.mark.zoo


@pytest.fixture(autouse=True)
def shallow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Further equal blocks show nothing new; the committed table has them."""
    monkeypatch.setattr(libraries, "SHALLOW", True)


def _parameters() -> list:
    return [
        pytest.param(case, id=name, marks=pytest.mark.skipif(not case.installed, reason=f"needs {case.package}"))
        for name, case in cases().items()
    ]


@pytest.mark.parametrize("case", _parameters())
def test_answers_match_plain_autograd(case: Case):
    found = answer(case)
    assert found.error < TOLERANCE, (found.errors, found.estimate)
