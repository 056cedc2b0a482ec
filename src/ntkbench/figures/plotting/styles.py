"""One colour and one marker for each method, the same in all figures."""

from __future__ import annotations

import itertools
import zlib
from dataclasses import dataclass
from typing import Any

import pandas as pd

from ntkbench.figures.plotting import labels
from ntkbench.figures.plotting.base import KINDS

# Okabe and Ito's colour-blind safe colours without yellow, and three of Paul Tol's "muted". Pale ones are darkened to a
# contrast of 3:1 with white, and their neighbours with them, so that they stay apart under deuteranopia.
BLACK, ORANGE, SKY, GREEN, BLUE = "#000000", "#CC8400", "#3A9BDC", "#009E73", "#005A93"
VERMILION, PINK, WINE, INDIGO, OLIVE = "#B83F00", "#CC79A7", "#882255", "#332288", "#8A9A5B"
GREY = "#6B6B6B"
"""Colour of text beside the data."""
COLOURS = (ORANGE, BLUE, VERMILION, GREEN, PINK, SKY, WINE, INDIGO, BLACK, OLIVE)
MARKERS = {"exact": "s^vdPX", "approximate": "*H", "stochastic": "oD<>p"}
"""Shapes that can be filled or left open; no two kinds share one."""

KNOWN = {
    "naive_jacobian": (BLACK, "s"),
    "direct": (WINE, "d"),
    "direct_one_by_one": (INDIGO, "d"),
    "jacobian": (BLACK, "X"),
    "jacobian_contraction": (BLUE, "^"),
    "ntk_vector_products": (GREEN, "v"),
    "nt_jacobian_contraction": (SKY, "^"),
    "nt_ntk_vector_products": (ORANGE, "v"),
    "nt_structured_derivatives": (VERMILION, "P"),
    "structured_derivatives": (PINK, "P"),
    "parameter_gram": (OLIVE, "s"),
    "recurrent_exact_trace": (OLIVE, "X"),
    "sum_of_logits": (INDIGO, "*"),
    "structured_sum_of_logits": (GREEN, "*"),
    "single_logit": (ORANGE, "*"),
    "random_vector": (SKY, "*"),
    "trace_kernel": (BLACK, "H"),
    "last_layer": (WINE, "H"),
    "count_sketch": (VERMILION, "H"),
    "kfac": (BLUE, "*"),
    "kfoc": (PINK, "*"),
    # Estimators: a family shares a hue, "<" is by VJPs and ">" by JVPs, and the paper's variants are pale.
    "hutchinson": (ORANGE, "o"),
    "shared_probe_alignment": (PINK, "p"),
    "hutchpp": (BLUE, "D"),
    "hutchpp_paper": (SKY, "D"),
    "hutchpp_one_sided": (BLUE, "<"),
    "hutchpp_adaptive": (BLUE, "o"),
    "hutchpp_adaptive_forward": (BLUE, ">"),
    "nystrompp": (BLUE, "p"),
    "one_sided_paper_reverse": (ORANGE, "<"),
    "one_sided_reverse": (VERMILION, "<"),
    "one_sided_orthonormal": (VERMILION, "o"),
    "one_sided_paper_forward": (OLIVE, ">"),
    "one_sided_forward": (GREEN, ">"),
    "xtrace": (WINE, "D"),
    "xnystrace": (WINE, "<"),
    "xnystrace_forward": (WINE, ">"),
    "nystrom_loo": (WINE, "o"),
    "gram_reverse": (INDIGO, "<"),
    "gram_forward": (INDIGO, ">"),
    "per_sample_trace": (BLACK, "o"),
    "per_sample_trace_forward": (BLACK, ">"),
    "block_u_statistics": (BLACK, "D"),
    "group_u_statistics": (BLACK, "<"),
    "sample_subset": (GREEN, "p"),
    "structured_block_u_statistics": (BLACK, "p"),
    "wide_head_u_statistics": (INDIGO, "p"),
    "dense_jl": (SKY, "o"),
    "sparse_jl": (PINK, "D"),
    "grass": (OLIVE, "D"),
    "kronecker_projection": (GREEN, "o"),
    "block_lanczos": (INDIGO, "D"),
}
"""Chosen by hand, in the order of legends. A method that is not listed gets its look from its name."""

BACKENDS = {"torch": "-", "jax": (0, (3.2, 1.6))}
TITLES = {"torch": "PyTorch", "jax": "JAX"}


@dataclass(frozen=True)
class Look:
    """How a method is drawn."""

    method: str
    title: str
    kind: str
    colour: str
    marker: str

    def line(self, backend: str) -> dict[str, Any]:
        """Keywords for a line with markers: filled and solid for PyTorch, open and dashed for JAX."""
        size = {"*": 9.0, "D": 4.8, "P": 6.5, "X": 6.5, "d": 7.0}.get(self.marker, 5.5)
        return {
            "color": self.colour,
            "marker": self.marker,
            "markersize": size,
            "markerfacecolor": self.colour if backend == "torch" else "white",
            "markeredgecolor": self.colour,
            "linestyle": BACKENDS.get(backend, ":"),
        }


def looks(table: pd.DataFrame) -> dict[str, Look]:
    """The look of every method in the table, in the order of legends: by kind, listed ones first.

    A method that is not listed takes the colour and marker that its name hashes to, or the next free pair if that one
    is taken. Unlisted methods choose in alphabetical order.
    """
    methods = table.drop_duplicates("method").set_index("method")
    taken, chosen = set(KNOWN.values()), dict(KNOWN)
    for method in sorted(set(methods.index) - set(KNOWN)):
        markers = MARKERS.get(methods["kind"][method], "".join(MARKERS.values()))
        pairs = list(itertools.product(COLOURS, markers))
        start = zlib.crc32(method.encode())
        tries = [pairs[(start + i) % len(pairs)] for i in range(len(pairs))]
        chosen[method] = next((pair for pair in tries if pair not in taken), tries[0])
        taken.add(chosen[method])
    listed = list(chosen)
    kinds = [*KINDS, *sorted(set(methods["kind"]) - set(KINDS))]
    order = sorted(methods.index, key=lambda m: (kinds.index(methods["kind"][m]), listed.index(m)))
    return {
        m: Look(m, labels.short(methods["title"][m] or m.replace("_", " ")), methods["kind"][m], *chosen[m])
        for m in order
    }


def backends_in(table: pd.DataFrame) -> list[str]:
    """The table's backends, the usual ones first."""
    there = set(table["backend"])
    return [b for b in BACKENDS if b in there] + sorted(there - set(BACKENDS))
