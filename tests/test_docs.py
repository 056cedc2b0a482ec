"""The documentation: its examples give the output shown, its links resolve, and nothing is left out."""

from __future__ import annotations

import dataclasses
import doctest
import importlib
import importlib.util
import inspect
import re

import pages
import pytest
from conftest import mostly_slow

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


@pytest.mark.parametrize("page", mostly_slow(RUNNABLE, 1), ids=lambda page: page.stem)
def test_the_examples_of_a_page_give_the_output_shown(page):
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
def test_links_resolve(page):
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


@pytest.mark.parametrize("home", sorted(ntkbench._HOMES))
def test_examples_in_docstrings_run(home):
    found = doctest.testmod(importlib.import_module(f"ntkbench.{home}"), optionflags=pages.FLAGS)
    assert found.failed == 0 and (found.attempted > 0 or home == "errors")


PUBLIC = {name: getattr(ntkbench, name) for name in ntkbench.__all__ if name != "__version__"}
DOCUMENTED = [name for name, value in PUBLIC.items() if not (isinstance(value, type) and issubclass(value, Exception))]


@pytest.mark.parametrize("name", DOCUMENTED)
def test_a_public_docstring_has_an_example_and_all_sections(name):
    value = PUBLIC[name]
    text = inspect.getdoc(value)
    assert doctest.DocTestParser().get_examples(text)
    parts = re.split(r"^(Args|Attributes|Returns|Raises):\n", text, flags=re.MULTILINE)[1:]
    sections = dict(zip(parts[::2], parts[1::2], strict=True))
    if dataclasses.is_dataclass(value):
        described, names = sections["Attributes"], [field.name for field in dataclasses.fields(value)]
    else:
        described, names = sections["Args"], list(inspect.signature(value).parameters)
        assert sections["Raises"] and (isinstance(value, type) or sections["Returns"])
        assert re.search(r"^Cost\b", text, re.MULTILINE) and "Use it " in text
        assert value.__module__ != "ntkbench.api" or name == "compare" or "Source: " in text
    assert ", ".join(re.findall(r"^    ([\w, ]+): ", described, re.MULTILINE)).split(", ") == names


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
    assert cells["structured_block_u_statistics"][6] == "unbiased"
    section = text.partition("\n## `xtrace`\n")[2].partition("\n## ")[0]
    assert "\n\nUse it when you compare estimators of the trace;" in section
    assert "\n\n*Variance:* falls with the tail" in section
    assert (
        "\n\n*Source:* Epperly et al. 2024 ([doi 10.1137/23M1548323](https://doi.org/10.1137/23M1548323))," in section
    )
    assert "(https://doi.org/10.1007/3-540-45465-9_59)" in text and "(https://arxiv.org/abs/2512.00860)" in text


WORKSHOP = "Triebel 2021"
"""A paper that has no DOI or arXiv number."""


@pytest.mark.parametrize("name", methods.names())
def test_a_method_states_its_use_its_variance_and_the_identifiers_of_its_papers(name):
    method = methods.get(name)
    assert method.title and method.source and method.use_when
    assert bool(method.variance) == (method.kind == "stochastic")
    numbered = r"\w+ (?:et al\. )?(?:19|20)\d\d\b(?!\.|[^;]*\b(?:doi|arXiv) \d)"
    assert set(re.findall(numbered, method.source)) <= {WORKSHOP}


def test_docstrings_become_markdown(methods_page):
    text = "||A||_F^2 of `x`, ``a_b`` and :func:`ntkbench.trace` * 2"
    assert methods_page.plain(text) == r"\|\|A\|\|\_F\^2 of \`x\`, `a_b` and `ntkbench.trace` \* 2"
