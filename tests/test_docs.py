"""The documentation: its examples give what it shows, its links lead somewhere, and nothing is left out."""

from __future__ import annotations

import importlib.util
import re

import pages
import pytest

import ntkbench
from ntkbench import methods
from ntkbench.paths import ROOT

DOCS = ROOT / "docs"
GENERATED = DOCS / "methods.md"
WRITTEN = sorted(page for page in DOCS.glob("*.md") if page != GENERATED)
README = ROOT / "README.md"
RUNNABLE = [page for page in (README, *WRITTEN) if pages.blocks(page)]
LINKED = [README, *WRITTEN, *(ROOT / name for name in ("CONTRIBUTING.md", "config/README.md"))]


@pytest.fixture(scope="module")
def methods_page():
    spec = importlib.util.spec_from_file_location("methods_page", DOCS / "methods_page.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_the_examples_of_a_page_give_what_it_shows(page):
    assert not (said := pages.run(page, {"__name__": page.stem})), said


def test_a_wrong_example_is_noticed(tmp_path):
    page = tmp_path / "page.md"
    page.write_text("```python\n>>> x = 1\n```\n```\n>>> undefined\n```\n```python\n>>> x + 1\n3\n```\n")
    said = pages.run(page, {})
    assert "Expected:\n    3\nGot:\n    2\n" in said and "undefined" not in said


def test_most_pages_have_examples():
    assert {
        "README",
        "quickstart",
        "choosing",
        "exact",
        "recurrent",
        "large",
        "training",
        "extending",
        "faq",
        "api",
    } <= {page.stem for page in RUNNABLE}
    for page in RUNNABLE:
        bare = [block for block in pages.blocks(page) if ">>>" not in block]
        assert not bare, f"{page.name}: a block that nothing runs is marked py, not python"


def slug(heading):
    """The anchor of a heading, as GitHub and MyST make it."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.stem)
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    links = re.findall(r"\]\(([^)\s]+)\)", text)
    for link in links:
        file, _, anchor = link.partition("#")
        if ":" in file:
            continue
        target = page.parent / file if file else page
        if target == GENERATED:
            continue
        if not file and anchor.startswith("ntkbench."):  # of the reference
            assert anchor.removeprefix("ntkbench.") in ntkbench.__all__
            continue
        assert target.exists(), f"{page.name}: {link}"
        headings = re.findall(r"^#+ (.*)$", target.read_text(encoding="utf-8"), re.MULTILINE) if anchor else ()
        assert not anchor or anchor in map(slug, headings), f"{page.name}: {link}"


def test_every_page_is_in_the_contents():
    contents = re.findall(r"^```{toctree}(.*?)^```", (DOCS / "index.md").read_text(), re.DOTALL | re.MULTILINE)
    named = [line for block in contents for line in block.splitlines() if line and not line.startswith(":")]
    assert sorted(named) == sorted({page.stem for page in WRITTEN} - {"index"} | {"methods"})


def test_the_reference_has_every_public_name():
    text = (DOCS / "api.md").read_text(encoding="utf-8")
    documented = re.findall(r"^\.\. auto(?:function|class|exception):: ntkbench\.(\w+)$", text, re.MULTILINE)
    assert {*documented, "__version__"} == set(ntkbench.__all__) and "`ntkbench.__version__`" in text


def test_the_page_of_methods_has_every_method(methods_page):
    text = methods_page.page()
    rows = {name: line for line in text.splitlines() for name in re.findall(r"^\| \[`(\w+)`\]", line)}
    assert list(rows) == re.findall(r"^## `(\w+)`$", text, re.MULTILINE) == methods.names()
    cells = {name: [cell.strip() for cell in row.strip("|").split(" | ")] for name, row in rows.items()}
    passes = "trace 2, norm 2, effective rank 2, alignment 4"
    assert cells["hutchinson"][2:] == ["stochastic", *cells["direct"][3:5], passes, "unbiased", ""]
    assert cells["direct"][2] == "exact" and cells["direct"][5:] == ["2 n", "none", ""]
    assert cells["sum_of_logits"][6:] == ["biased", "independent samples"]
    assert cells["shared_probe_alignment"][6] == "", "its text says that it is biased"
    source = methods_page.plain(methods.get("xtrace").source)
    assert f"*Source:* {source}." in text


def test_docstrings_become_markdown(methods_page):
    text = "||A||_F^2 of `x`, ``a_b`` and :func:`ntkbench.trace` * 2"
    assert methods_page.plain(text) == r"\|\|A\|\|\_F\^2 of \`x\`, `a_b` and `ntkbench.trace` \* 2"
