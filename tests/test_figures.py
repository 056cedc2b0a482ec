"""Figures: from a tidy table made up from cost models (no measured number in it) to files."""

from __future__ import annotations

import subprocess
import sys

import numpy as np
import pandas as pd
import pytest

from ntkbench import figures
from ntkbench.errors import BadInput
from ntkbench.figures import _looks, base

BOTH, TORCH, JAX = ("torch", "jax"), ("torch",), ("jax",)
ALL = ("trace", "norm", "effective_rank", "alignment")
METHODS = {
    "naive_jacobian": ("naive Jacobian", "exact", TORCH, ALL),
    "jacobian_contraction": ("Jacobian contraction", "exact", TORCH, ALL),
    "ntk_vector_products": ("NTK-vector products", "exact", TORCH, ALL),
    "direct": ("direct", "exact", BOTH, ALL),
    "nt_jacobian_contraction": ("neural-tangents Jacobian contraction", "exact", JAX, ALL),
    "nt_ntk_vector_products": ("neural-tangents NTK-vector products", "exact", JAX, ALL),
    "nt_structured_derivatives": ("neural-tangents structured derivatives", "exact", JAX, ALL),
    "sum_of_logits": ("pNTK (sum of logits)", "approximate", BOTH, ALL),
    "hutchinson": ("Hutchinson", "stochastic", BOTH, ALL),
    "hutchpp": ("Hutch++", "stochastic", BOTH, ALL),
    "one_sided_reverse": ("one-sided reverse", "stochastic", BOTH, ("trace",)),
    "one_sided_forward": ("one-sided forward", "stochastic", BOTH, ("trace",)),
    "shared_probe_alignment": ("shared-probe alignment", "stochastic", BOTH, ("alignment",)),
}
PROBLEMS = [  # family, sizes, N, O, P, slowness
    ("digits_mlp", "N=64", 64, 10, 85002, 1.0),
    ("digits_mlp", "N=512", 512, 10, 85002, 1.0),
    ("digits_conv", "N=64", 64, 10, 19658, 3.0),
    ("gru_hazelden", "N=15,T=8", 15, 512, 14592, 6.0),
]
BUDGETS = (8, 32, 128, 512, 2048)
# seconds = a * n^p passes each; accuracy in relative error at one pass
EXACT = {
    "naive_jacobian": (1.0, 1.0),
    "direct": (0.30, 1.0),
    "jacobian_contraction": (0.05, 1.0),
    "ntk_vector_products": (0.12, 1.0),
    "nt_jacobian_contraction": (0.04, 1.0),
    "nt_ntk_vector_products": (0.15, 1.0),
    "nt_structured_derivatives": (0.02, 0.95),
    "sum_of_logits": (0.05, 0.7),
}
SPREAD = {"hutchinson": 0.9, "hutchpp": 0.6, "one_sided_reverse": 0.7, "one_sided_forward": 1.1}
METRIC_SPREAD = {"trace": 1.0, "norm": 1.8, "effective_rank": 3.0, "alignment": 1.2}


def synthetic(problems=PROBLEMS, methods=METHODS, metrics=ALL, dtype="float32", seed=0) -> pd.DataFrame:
    """A tidy table that looks like a measured one: times by passes, errors by the Monte Carlo rate, some cells lost."""
    rng = np.random.default_rng(seed)
    rows = []
    for family, sizes, N, O, P, slow in problems:
        for method, (title, kind, backends, gives) in methods.items():
            for backend in BOTH:
                for metric in metrics:
                    for passes in BUDGETS if kind == "stochastic" else (np.nan,):
                        row = {"problem": f"{family}[{sizes}]", "family": family, "N": N, "O": O, "P": P, "n": N * O}
                        row |= {"method": method, "title": title, "kind": kind, "backend": backend, "metric": metric}
                        row |= {"passes": passes, "device": "cpu", "dtype": dtype, "threads": 2, "machine": "laptop"}
                        row |= {"git_sha": "0123456789abcdef", "git_dirty": True, "reference": 123.0}
                        row |= {"first_call_seconds": 1.0, "passes_spent": passes, "value": 123.0}
                        row |= {"standard_error": np.nan, "seeds": 50 if kind == "stochastic" else 1, "reason": ""}
                        row |= _cell(rng, method, kind, backend in backends, metric in gives, row, slow, backend)
                        rows.append(row)
    return pd.DataFrame(rows)


def _cell(rng, method, kind, runs, gives, row, slow, backend):
    if not runs or not gives:
        return {
            "status": "skipped",
            "reason": "runs on another backend only" if not runs else "gives other metrics only",
        }
    n, metric = row["n"], row["metric"]
    a_pass = 2e-4 * slow * (n / 640) ** 0.8 * (0.6 if backend == "jax" else 1.0)
    if kind == "stochastic":
        if method == "hutchpp" and row["passes"] < 12 and metric != "trace":
            return {"status": "skipped", "reason": f"{metric} takes at least 12 passes"}
        seconds = 2e-3 + a_pass * row["passes"]
        error = (
            SPREAD.get(method, 0.8)
            * METRIC_SPREAD[metric]
            / row["passes"] ** (0.62 if method == "hutchpp" else 0.5)
            / 5
        )
        error *= rng.lognormal(0, 0.12)
        quartiles = 0.45 * error, 1.75 * error
    else:
        factor, power = EXACT[method]
        seconds = 1e-3 + factor * a_pass * n**power * (2.0 if metric == "alignment" else 1.0)
        error = float(rng.choice([0.0, 6e-8, 2e-7, 9e-7])) if kind == "exact" else rng.uniform(0.15, 0.8)
        quartiles = error, error
        if method == "nt_structured_derivatives" and "gru" in row["family"]:
            return {"status": "skipped", "reason": "structured derivatives unroll the scan: compiling takes O(T^2)"}
        if method == "nt_ntk_vector_products" and "conv" in row["family"]:
            return {"status": "out_of_memory", "reason": "more than 6 GiB"}
        if seconds > 30:
            return {"status": "timeout", "reason": "more than 30 s"}
    seconds *= rng.lognormal(0, 0.05)
    memory = (
        (8 * n * n if kind == "exact" else 4 * n * 64)
        + rng.normal(0, 2e5)
        + {"naive_jacobian": 4.0 * n * row["P"] / 8}.get(method, 0)
    )
    return {
        "status": "ok",
        "seconds": seconds,
        "seconds_q25": 0.96 * seconds,
        "seconds_q75": 1.07 * seconds,
        "error": error,
        "error_q25": quartiles[0],
        "error_q75": quartiles[1],
        "memory_bytes": memory,
    }
