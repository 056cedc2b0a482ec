"""The list of mutants fits the present source; ``python tests/mutants.py`` runs it."""

from __future__ import annotations

import ast
import functools

import pytest
from mutants import ROOT, Mutant, read

MUTANTS = read()


@functools.cache
def functions(file: str) -> set[str]:
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}


def test_names_are_unique():
    assert len({mutant.name for mutant in MUTANTS}) == len(MUTANTS)


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.name)
def test_a_mutant_changes_text_that_occurs_once_and_names_tests_that_exist(mutant: Mutant):
    text = (ROOT / mutant.file).read_text(encoding="utf-8")
    assert text.count(mutant.source) == 1
    ast.parse(text.replace(mutant.source, mutant.replacement))
    assert mutant.replacement != mutant.source
    assert mutant.why
    for test in mutant.tests:
        file, _, function = test.partition("::")
        assert function.partition("[")[0] in functions(file)
