"""The examples of the documentation run, and their results are as described."""

from __future__ import annotations

import runpy

import pytest

from ntkbench.paths import ROOT

EXAMPLES = ROOT / "docs" / "examples"


def result(name: str):
    return runpy.run_path(str(EXAMPLES / f"{name}.py"))["main"]()


def test_every_example_is_on_the_page_and_has_a_test():
    names = {path.stem for path in EXAMPLES.glob("*.py")}
    assert names == {"own_model", "lazy_or_rich", "pntk_against_ntk"}
    page = (ROOT / "docs" / "examples.md").read_text(encoding="utf-8")
    assert all(f"examples/{name}.py" in page for name in names)


@pytest.mark.slow
def test_own_model_gives_metrics_and_shares_of_the_trace(capsys):
    metrics = result("own_model")
    assert set(metrics) == {"trace", "norm", "effective_rank"} and all(m.certificate < 1e-3 for m in metrics.values())
    said = capsys.readouterr().out
    shares = [int(line.split(": ")[1].split("%")[0]) for line in said.splitlines() if "of the trace" in line]
    assert len(shares) == 3 and sum(shares) == pytest.approx(100, abs=2)


@pytest.mark.slow
def test_small_initial_weights_learn_features(capsys):
    found = result("lazy_or_rich")
    assert float(found[0.5]) < float(found[1.0]) < float(found[1.5]) < 1
    assert all("loss 0.0" in line for line in capsys.readouterr().out.splitlines())


@pytest.mark.slow
def test_the_pntk_comes_closer_with_width():
    pntk, floor = zip(*result("pntk_against_ntk").values(), strict=True)
    assert list(pntk) == sorted(pntk, reverse=True) and all(a > b for a, b in zip(pntk, floor, strict=True))
