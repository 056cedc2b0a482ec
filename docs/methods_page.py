"""The page of all methods, written from the attributes and docstrings of their classes."""

from __future__ import annotations

import inspect
import re

from ntkbench import methods
from ntkbench.methods.base import Method, Stochastic

HEAD = """# All methods

This page is written from the classes in `src/ntkbench/methods/` when the documentation is built.
[Estimators](estimators.md) explains the families. The name is what `method=` takes. *Passes* of a stochastic method
are those by which it divides a budget into probes: one number, or one for each metric if they differ. Those of an
exact or approximate method are for one set of weights, with T steps and a last hidden layer of width d. An alignment
takes twice as many; with `wide_head` it takes 3 T d, or 2 T (m + 2 d) with a tied head and m distinct tokens. More
about the cost is in the method's text.
Variances are those of the trace unless they say otherwise, in the notation of the text above them. *Bias* is that of
the trace and of the squared norm; for a stochastic method the cell is empty if its text does not state it. Square
roots and ratios of unbiased estimates have a bias that vanishes with the number of probes.

"""


def page() -> str:
    """All methods in MyST Markdown: a table, and a section for each."""
    found = [methods.get(name) for name in methods.names()]
    columns = ("Method", "Title", "Kind", "Metrics", "Backends", "Passes", "Bias", "Needs")
    rows = [columns, ("---",) * len(columns), *map(_row, found)]
    table = "\n".join(f"| {' | '.join(row)} |" for row in rows)
    return f"{HEAD}{table}\n\n" + "\n".join(map(_section, found))


def _row(method: Method) -> tuple[str, ...]:
    needs = {
        "independent samples": method.needs_independent_samples,
        "a declared recurrence": method.needs_recurrence,
        "one network": method.needs_one_network,
    }
    return (
        f"[`{method.name}`](#{method.name})",
        plain(method.title),
        method.kind,
        ", ".join(method.given if isinstance(method, Stochastic) else method.metrics).replace("_", " "),
        ", ".join(method.backends),
        _passes(method),
        _bias(method),
        ", ".join(what for what, needed in needs.items() if needed),
    )


def _passes(method: Method) -> str:
    if not isinstance(method, Stochastic):
        return method.passes_formula.replace(" * ", " ")
    passes = {metric.replace("_", " "): method.passes_per_probe(metric) for metric in method.given}
    if len(set(passes.values())) == 1:
        return str(next(iter(passes.values())))
    return ", ".join(f"{metric} {count}" for metric, count in passes.items())


def _bias(method: Method) -> str:
    if method.kind == "exact":
        return "none"
    if method.kind == "approximate":
        return "biased"
    said = " ".join(inspect.getdoc(cls) or "" for cls in type(method).__mro__ if issubclass(cls, Stochastic))
    return "unbiased" if re.search(r"\bunbiased\b", said, re.IGNORECASE) else ""


def _section(method: Method) -> str:
    text = inspect.cleandoc(type(method).__doc__ or inspect.getmodule(method).__doc__ or "")
    text = text.partition("\nAttributes:\n")[0].strip()
    paragraphs = [" ".join(map(str.strip, part.splitlines())) for part in text.split("\n\n")]
    body = "\n\n".join(map(plain, paragraphs))
    head = f"({method.name})=\n## `{method.name}`\n\n**{plain(method.title)}**, {method.kind}."
    facts = [f"Use it when {plain(method.use_when)}."]
    if method.kind == "stochastic":
        facts.append(f"*Variance:* {plain(method.variance)}.")
    facts.append(f"*Source:* {linked(plain(method.source))}.")
    return "\n\n".join((head, body, *facts)) + "\n"


def linked(text: str) -> str:
    """Markdown in which DOIs and arXiv numbers are links."""

    def doi(found: re.Match[str]) -> str:
        address = found[1].replace("\\", "")
        return f"[doi {found[1]}](https://doi.org/{address})"

    text = re.sub(r"\bdoi ([^\s()]+)", doi, text)
    return re.sub(r"\barXiv (\d+\.\d+)", r"[arXiv \1](https://arxiv.org/abs/\1)", text)


def plain(text: str) -> str:
    """A docstring's text in Markdown, in which only text between double backticks is markup."""
    text = re.sub(r":\w+:`~?([^`]*)`", r"``\1``", text)
    parts = re.split(r"``(.*?)``", text, flags=re.DOTALL)
    return "".join(
        f"`{part}`" if i % 2 else re.sub(r"([\\`*_{}\[\]<>#|$~^])", r"\\\1", part) for i, part in enumerate(parts)
    )
