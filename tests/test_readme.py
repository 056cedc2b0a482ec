"""The README: its measured numbers are those of the committed tables, and its code exists."""

from __future__ import annotations

import ast
import importlib
import re
import shutil
import types

import pages
import pandas as pd
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ntkbench
from ntkbench import problems, readme
from ntkbench.errors import BadInput
from ntkbench.options import Target
from ntkbench.paths import ROOT
from ntkbench.problems.base import reference

README = ROOT / "README.md"


def test_the_readme_has_the_numbers_of_the_committed_tables():
    assert readme.update(README, ROOT, check=True) == [], "out of date; `ntkbench readme` writes these blocks anew"


@pytest.fixture
def checkout(tmp_path):
    """A copy of the README and of the tables behind it."""
    shutil.copy(README, tmp_path)
    for name in (*readme.HEAD_TO_HEAD.values(), "default/table", "gpu/large"):
        there = tmp_path / "results" / "reference" / f"{name}.csv"
        there.parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / "results" / "reference" / f"{name}.csv", there)
    return tmp_path


def change(checkout, name, edit):
    path = checkout / "results" / "reference" / f"{name}.csv"
    edit(pd.read_csv(path)).to_csv(path, index=False)


def test_a_changed_number_is_noticed_and_then_written(checkout):
    file = checkout / "README.md"
    change(checkout, readme.HEAD_TO_HEAD["side_by_side"], lambda t: t.assign(rival_seconds=12.345))
    change(checkout, "default/table", lambda t: t.iloc[:17])
    before = file.read_text(encoding="utf-8")
    assert readme.update(file, checkout, check=True) == ["default cells", "products", "kernels"]
    assert file.read_text(encoding="utf-8") == before, "a check wrote"
    assert readme.update(file, checkout) == ["default cells", "products", "kernels"]
    after = file.read_text(encoding="utf-8")
    assert after.count("12.3 s") >= 30 and "-->17<!-- end --> cells" in after
    assert readme.update(file, checkout) == []
    blocks = re.compile(r"<!-- (?:table|value).*?<!-- end -->", re.DOTALL)
    assert blocks.split(after) == blocks.split(before), "text outside of the blocks was changed"


def test_the_fastest_of_either_kind_is_named(checkout):
    numbers = {
        ("mlp_he", "gram_forward"): {"passes": 660, "seconds": 0.5, "ratio": 0.25, "published": False},
        ("mlp_he", "nystrom_loo"): {"passes": 30, "seconds": 0.6, "ratio": 0.3, "published": False},
        ("mlp_he", "hutchpp_paper"): {"passes": 411, "seconds": 2.0, "ratio": 1.0, "published": True},
        ("mlp_he", "sum_of_logits"): {"seconds": 0.4, "ratio": 0.2, "published": False, "kind": "approximate"},
        ("digits_mlp", "sample_subset"): {"passes": 1, "seconds": 0.00542, "published": False},
        ("digits_mlp", "sum_of_logits"): {"seconds": 0.1, "published": False, "kind": "approximate"},
        ("gru_hazelden", "direct"): {"seconds": 0.3, "ratio": 3.0, "published": False, "kind": "exact"},
        ("gru_hazelden", "hutchpp"): {"seconds": 0.1, "ratio": 1.0, "published": True, "backend": "jax"},
    }
    for row in numbers.values():
        row.update({"seeds": 51, "calls": 15})
    numbers["gru_hazelden", "direct"] |= {"ratio_low": 2.5, "ratio_high": float("nan")}
    numbers["gru_hazelden", "hutchpp"] |= {"passes": 40, "passes_low": 31.7, "passes_high": 52.1}

    def edit(table):
        table[["seconds", "ratio_low", "ratio_high", "passes_low", "passes_high"]] = float("nan")
        table["backend"] = "torch"
        for (problem, method), row in numbers.items():
            table.loc[(table["problem"] == problem) & (table["method"] == method), list(row)] = list(row.values())
        return table

    change(checkout, readme.HEAD_TO_HEAD["time_to_error"], edit)
    readme.update(checkout / "README.md", checkout)
    text = (checkout / "README.md").read_text(encoding="utf-8")
    ours, theirs = "`gram_forward`, 660 passes, 51 seeds, 500 ms", "`hutchpp_paper`, 411 passes, 51 seeds, 2 s"
    assert f"| {ours} | {theirs} | **0.25** | `sum_of_logits`, approximate, 400 ms |" in text
    assert "| `sample_subset`, 1 pass, 51 seeds, 5.42 ms | none reaches it |  |  |" in text
    theirs = "`hutchpp` in JAX, 40 passes (32 to 52), 51 seeds, 100 ms"
    assert f"| `direct`, exact, 300 ms | {theirs} | **3** (2.5 to ?) |  |" in text, "theirs may be the faster one"


def test_a_row_without_numbers_has_its_reason_in_one_cell(checkout):
    reason = "OverMemory: would need\n40 GiB | or so"

    def edit(table):
        table.loc[table["subject"] == "structured_derivatives", ["seconds", "rival_seconds", "ratio"]] = float("nan")
        return table.assign(reason=reason)

    change(checkout, readme.HEAD_TO_HEAD["side_by_side"], edit)
    readme.update(checkout / "README.md", checkout)
    rows = [line for line in (checkout / "README.md").read_text(encoding="utf-8").splitlines() if "40 GiB" in line]
    assert len(rows) > 10 and all(re.split(r"(?<!\\)\|", row)[4] == r" would need 40 GiB \| or so " for row in rows)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("<!-- table: kernles --><!-- end -->", "unknown table of the README 'kernles' .did you mean 'kernels'"),
        ("<!-- value: kernels --><!-- end -->", "unknown value of the README 'kernels'"),
        ("<!-- table: kernels -->", "no <!-- end -->"),
        ("<!-- table: kernels --> <!-- value: default cells --><!-- end -->", "no <!-- end -->"),
    ],
)
def test_a_block_that_cannot_be_written_is_refused(checkout, text, said):
    file = checkout / "README.md"
    file.write_text(text)
    with pytest.raises(BadInput, match=said):
        readme.update(file, checkout)
    assert file.read_text() == text


def test_a_missing_table_is_named(checkout):
    (checkout / "results" / "reference" / "default" / "table.csv").unlink()
    with pytest.raises(BadInput, match=r"default.table\.csv"):
        readme.update(checkout / "README.md", checkout)


def test_values_do_not_begin_a_line():
    """Markdown takes a line that begins with a comment for HTML, which ends the paragraph."""
    assert not re.search("^<!-- value", README.read_text(encoding="utf-8"), re.MULTILINE)


def test_the_method_of_the_readme_is_one():
    """The example as it stands estimates a trace."""
    (code,) = (block for block in pages.blocks(README) if "class " in block)
    namespace = {}
    exec(code, namespace)
    method = namespace["OneSidedReverse"]()
    problem = problems.load("mlp_hazelden[N=2]")
    found = method.estimate(method.prepare(problem, Target("torch")), "trace", passes=2000)
    low, high = found.interval(0.9999)
    assert low < reference.exact(problem)["trace"] < high < 1.5 * low and found.passes == 2000


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(5, 2)

    def forward(self, x, sizes):
        return self.layer(torch.cat([x, sizes], 1))


class LanguageModel(nn.Module):
    def __init__(self):
        super().__init__()
        self.embedding, self.head = nn.Embedding(7, 3), nn.Linear(3, 7)

    def forward(self, input_ids, attention_mask):
        hidden = self.embedding(input_ids) * attention_mask[..., None]
        return types.SimpleNamespace(logits=self.head(hidden.cumsum(1)))


@pytest.mark.slow
def test_the_recipes_of_the_readme_run():
    """Each block and each line of it, on small networks."""
    import jax.numpy as jnp

    recipes = [block for block in pages.blocks(README) if "class " not in block and "ntkbench." in block]
    assert len(recipes) == 5
    torch.manual_seed(0)
    model, trained = (nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 5)) for _ in range(2))
    x = torch.randn(6, 4)
    given = {
        "ntkbench": ntkbench,
        "model": model,
        "model_0": model,
        "model_f": trained,
        "trained": trained,
        "x": x,
        "x1": x,
        "x2": x[:2],
        "y": torch.randn(6, 5),
        "language_model": LanguageModel(),
        "batch": {"input_ids": torch.arange(8).reshape(2, 4) % 7, "attention_mask": torch.ones(2, 4)},
        "two_inputs": TwoInputs(),
        "sizes": torch.rand(6, 1),
        "loader": DataLoader(TensorDataset(x, torch.arange(6)), batch_size=4),
        "one_hot_labels": torch.eye(5)[torch.arange(6) % 5],
        "function": lambda params, x: jnp.tanh(x @ params["w"]) @ params["v"],
        "inputs": jnp.ones((3, 4)),
        "parameters": {"w": jnp.ones((4, 5)), "v": jnp.ones((5, 2))},
        "steps": 3,
        "train": lambda model, step: None,
    }
    for recipe in recipes:
        exec(recipe, given)


def test_what_the_readme_names_exists():
    text = README.read_text(encoding="utf-8")
    code = "\n".join(pages.blocks(README))
    imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    assert imported
    for node in imported:
        module = importlib.import_module(node.module)
        assert all(hasattr(module, alias.name) or importlib.import_module(f"{node.module}.{alias.name}")
                   for alias in node.names)  # fmt: skip
    for name in set(re.findall(r"ntkbench\.([\w.]+)\(?", text)):
        *modules, attribute = name.split(".")
        assert hasattr(importlib.import_module(".".join(["ntkbench", *modules])), attribute), name
    files = re.findall(r"`((?:src|config|results/reference)/[\w./]+)`", text)
    assert files and all((ROOT / file).exists() for file in files)
