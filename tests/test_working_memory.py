"""No method holds an array that is larger than its memory, however many samples or parameters a network has."""

from __future__ import annotations

import tracemalloc

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from live_bytes import LiveBytes
from torch import nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

import ntkbench
from ntkbench import methods, operators, testing
from ntkbench.errors import BadInput, OverMemory
from ntkbench.estimators import projections
from ntkbench.methods.base import Method, projected
from ntkbench.networks import residual
from ntkbench.networks.initialisation import seeded
from ntkbench.operators import arrays
from ntkbench.operators.explicit_kernel import explicit_kernel
from ntkbench.options import Target
from ntkbench.problem import Problem

ALL = [methods.get(name) for name in methods.names()]
OVERHEAD = 2**21
"""Bytes that Python's own objects may take."""


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, and the operation that made it."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes, self.operation = 0, ""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        for t in tree_leaves(made):
            if isinstance(t, torch.Tensor) and not isinstance(t, FakeTensor) and t.layout == torch.strided:
                nbytes = t.untyped_storage().nbytes()
                if nbytes > self.nbytes and t.device.type != "meta":
                    self.nbytes, self.operation = nbytes, str(function)
        return made


def many_samples(method: Method) -> tuple[Problem, int]:
    """2100 x 17: a Gram matrix of the rows, or of the samples, is larger than the memory."""
    if method.needs_recurrence:
        return testing.recurrent_problem(300, 7, 1, 1), 2**20
    return testing.smooth_problem("many_samples", 700, 3, 2, 3), 2**20


def many_parameters(method: Method) -> tuple[Problem, int]:
    """12 x 10^6: the memory holds eight rows."""
    if method.needs_recurrence:
        return testing.recurrent_problem(2, 3, 2, 570), 2**25
    headed = method.prepares == "head"
    return testing.smooth_problem("many_parameters", 4, *((20, 10, 99_000) if headed else (998, 998, 3))), 2**25


@pytest.mark.parametrize("sizes", [many_samples, many_parameters], ids=["many samples", "many parameters"])
@pytest.mark.parametrize("method", [m for m in ALL if "torch" in m.backends], ids=lambda m: m.name)
@pytest.mark.slow
def test_no_array_of_a_method_is_larger_than_the_memory(method, sizes):
    """Methods refuse in one line whatever takes more."""
    problem, memory = sizes(method)
    target = Target("torch", "float32", "cpu", memory)
    done: set[str] = set()
    for metric in (each for each in ("norm", "alignment", "trace") if each in method.metrics):
        if metric == "trace" and sizes is many_parameters and "norm" in done:
            continue  # its vectors are those of the norm
        passes = method.least_passes(problem, metric) if method.takes_passes else None
        reason = method.unsupported_reason(problem, metric, target, passes)
        if reason or method.bytes_needed(problem, metric, target, passes) > memory:
            continue
        try:
            ready = method.prepare(problem, target)
            method.estimate(ready, metric, passes)  # traces the programs
            tracemalloc.start()
            try:
                with Largest() as largest:
                    method.estimate(ready, metric, passes)
                held = tracemalloc.get_traced_memory()[1]
            finally:
                tracemalloc.stop()
        except OverMemory as error:
            assert len(str(error).splitlines()) == 1
            continue
        assert largest.nbytes <= memory, f"{metric}: {largest.operation} makes {largest.nbytes} bytes"
        assert held <= memory + OVERHEAD, f"{metric}: NumPy holds {held} bytes"
        done.add(metric)


def test_live_bytes_are_those_that_are_held_at_one_time():
    given = torch.ones(1000)
    with LiveBytes() as live:
        one = given * 2
        other = one + 1
        del one
        other = other * 3
        given.add_(1)
    assert (live.now, live.peak) == (4000, 8000)


@pytest.mark.parametrize("name", ["sum_of_logits", "structured_sum_of_logits"])
@pytest.mark.parametrize("metric", mostly_slow(["trace", "alignment"], 1))
def test_a_pntk_of_a_deep_network_holds_no_more_than_the_memory(name, metric):
    """Including the weights of each end and all tensors of a certificate. Autograd saves 700 kB for 16 samples."""
    net = seeded(lambda: residual.network(18, 10, 2).eval(), 0)
    theta = {key: w.detach().double().numpy() for key, w in net.named_parameters()}
    theta_f = {key: 1.01 * w for key, w in theta.items()}
    # Alignments by sum_of_logits recompute all pairs of blocks; gradients of 8 samples at both ends exceed the memory.
    samples = 8 if (name, metric) == ("sum_of_logits", "alignment") else 16
    x = torch.randn(samples, 3, 16, 16, generator=torch.Generator().manual_seed(0)).numpy()
    problem, method = Problem("deep", net, x, theta, theta_f), methods.get(name)
    memory = 700_000
    target = Target("torch", "float32", "cpu", memory)
    ready = method.prepare(problem, target)
    with LiveBytes() as live:
        method.estimate(ready, metric)
    ends = 2 if metric == "alignment" else 1
    assert live.peak <= memory + ends * 4 * problem.P
    assert live.peak > memory / 4, "the memory limits something"


@pytest.mark.parametrize("independent", [True, False])
@pytest.mark.parametrize("hidden", [1, 3])
def test_blocks_of_a_kernel_from_rows_stay_within_the_memory(independent, hidden):
    """Apart from the result, and even where the outputs of the batch are much larger than a gradient."""
    problem, memory = testing.smooth_problem("rows", 200, 1, hidden, 2), 2**16
    j = operators.linearise(problem, "theta_0", Target("torch", "float64", "cpu", memory))
    theta = testing.explicit_jacobian(problem)
    theta = theta @ theta.T
    with Largest() as largest:
        rows = explicit_kernel(j, None, None, slice(0, 40), slice(40, 100), averaged=False, independent=independent)
    assert largest.nbytes <= memory
    np.testing.assert_allclose(rows, theta[:40, 40:100], rtol=1e-8, atol=1e-10)
    found = explicit_kernel(j, None, None, averaged=False, independent=independent)
    np.testing.assert_allclose(found, theta, rtol=1e-8, atol=1e-10)


class Whole(TorchDispatchMode):
    """Addresses of the tensors that have at least some number of bytes."""

    def __init__(self, nbytes: int) -> None:
        super().__init__()
        self.nbytes, self.found = nbytes, set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.found |= {storage.data_ptr() for storage in storages if storage.nbytes() >= self.nbytes}
        return made


def test_an_averaged_kernel_from_rows_is_the_only_array_of_its_size():
    problem = testing.smooth_problem("rows", 200, 1, 3, 2)
    j = operators.linearise(problem, "theta_0", Target("torch", "float64", "cpu", 2**16))
    theta = testing.explicit_jacobian(problem)
    theta = (theta @ theta.T).reshape(200, 2, 200, 2)
    with Whole(8 * 200**2) as whole:
        found = explicit_kernel(j, None, None, averaged=True, independent=True)
    assert len(whole.found) == 1
    np.testing.assert_allclose(found, np.einsum("aobo->ab", theta) / 2, rtol=1e-8, atol=1e-10)


def test_a_kernel_is_checked_without_a_copy():
    made = torch.rand(300, 300)
    with Largest() as largest:
        assert ntkbench.Kernel(torch.nn.Linear(3, 2), torch.ones(4, 3))._checked(made) is made
    assert largest.nbytes < made.nbytes / 2
    for wrong in (torch.nan, torch.inf, -torch.inf):
        made[200, 100] = wrong
        with pytest.raises(BadInput, match="nan or infinite"):
            ntkbench.Kernel(torch.nn.Linear(3, 2), torch.ones(4, 3))._checked(made)


@pytest.mark.parametrize("size", mostly_slow([700, 1400], 1))
def test_the_alignment_with_a_matrix_holds_no_whole_kernel(size):
    """Neither Theta, nor a matrix of its size other than the given one."""
    memory, target = 2**20, np.random.default_rng(0).standard_normal((size, size))
    kernel = ntkbench.Kernel(torch.nn.Linear(3, 2), torch.randn(700, 3), memory=memory)
    for _ in range(2):  # from rows, then layer by layer, which traces the programs
        kernel.alignment(target)
    tracemalloc.start()
    try:
        with Largest() as largest:
            kernel.alignment(target)
        held = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert largest.nbytes <= memory and held <= memory + OVERHEAD


@pytest.mark.parametrize(("rows", "columns", "most"), [(5, 3, 6), (5, 3, 5.9), (5, 3, 1), (1, 9, 100), (7, 1, 0)])
def test_strips_cover_all_rows_and_keep_to_their_entries(rows, columns, most):
    strips = arrays.strips(rows, columns, most)
    assert [i for strip in strips for i in range(rows)[strip]] == list(range(rows))
    assert all(len(range(rows)[s]) * columns <= most or len(range(rows)[s]) == 1 for s in strips)


@pytest.mark.parametrize("name", ["structured_sum_of_logits", "trace_kernel", "last_layer"])
@pytest.mark.parametrize("metric", ["trace", "norm", "alignment"])
def test_kernels_between_samples_do_not_depend_on_the_memory(name, metric):
    """Blocks of some samples, of some outputs of one, and the whole kernel."""
    method, problem = methods.get(name), testing.smooth_problem("outputs", 9, 3, 4, 6)
    values = [
        method.estimate(method.prepare(problem, Target("torch", "float64", "cpu", memory)), metric).value
        for memory in (2**30, 20_000, 2000, 1)
    ]
    assert values == pytest.approx([values[0]] * 4, rel=1e-12)


@pytest.mark.parametrize(("size", "kept"), [(1, None), (100, None), (10_000, None), (1, 7), (100, 10)])
def test_hashed_projections_do_not_depend_on_the_chunk_of_rows(size, kept, monkeypatch):
    """Each parameter has one sign in each replicate, in chunks of any size, and each mask its own parameters."""
    problem = testing.smooth_problem()
    j = operators.linearise(problem, "theta_0", Target("torch", "float64", "cpu"))
    monkeypatch.setattr(projected, "CHUNK", size)
    sketch = projected.hashed(j, 4, 5, 0, kept)
    S = sketch(j.parameter_basis(0, j.P))
    assert S.shape == (j.P, 4, 5)
    scale = 1 if kept is None else (j.P / kept) ** 0.5
    found = (abs(S).sum(2) / scale).round(decimals=12)
    assert ((found == 0) | (found == 1)).all()
    assert (found.sum(0) == (j.P if kept is None else kept)).all()
    rows = torch.randn(3, j.P, dtype=torch.float64)
    expected = torch.einsum("np,prw->nrw", rows, S)
    torch.testing.assert_close(sketch(rows), expected)
    torch.testing.assert_close(torch.cat([sketch(row[None]) for row in rows]), expected)


def test_products_of_many_features_are_taken_in_parts(monkeypatch):
    features = [np.random.default_rng(i).standard_normal((3, 4, 10)) for i in range(2)]
    whole = projections.pair_tables("alignment", features)[1]
    monkeypatch.setattr(projections, "ENTRIES", 70)
    for name, table in projections.pair_tables("alignment", features)[1].items():
        np.testing.assert_allclose(table, whole[name])


def test_two_sided_projections_do_not_depend_on_the_memory():
    module = torch.nn.Sequential(
        torch.nn.Embedding(9, 8), torch.nn.LayerNorm(8), torch.nn.Flatten(), torch.nn.Linear(48, 2)
    )
    weights = {key: w.detach().numpy() for key, w in module.named_parameters()}
    problem = Problem("mixed", module, torch.arange(24).reshape(4, 6).remainder(9).numpy(), weights)
    method = methods.get("kronecker_projection")
    (whole,), (less,) = (
        method.features(method.prepare(problem, Target("torch", "float64", "cpu", memory)), "norm", 4 * 8 * 4, 0)[0]
        for memory in (2**30, 1)
    )
    np.testing.assert_allclose(less, whole, rtol=1e-10, atol=1e-12)


def test_memory_of_the_factors_of_a_wide_layer_is_announced():
    """K-FAC and KFOC hold a matrix of the inputs of each layer, however few its outputs are."""
    problem, target = testing.smooth_problem("wide_inputs", 2, 1000, 2, 1), Target("torch", "float32", "cpu")
    for name in ("kfac", "kfoc"):
        assert methods.get(name).bytes_needed(problem, "norm", target) >= 8 * 1001**2


def test_products_of_probes_of_many_samples_are_within_the_memory():
    """P P* has a table of all pairs of probes for each sample."""
    net = torch.nn.Linear(2, 64)
    x = torch.randn(500, 2)
    found = ntkbench.Kernel(net, x, memory=2**22).factors(probes=64)
    assert found.P["norm"].standard_error is not None, "in groups of probes"
    assert ntkbench.Kernel(net, x).factors(probes=64).P["norm"].standard_error is None


NETWORKS = {
    "embedding": (
        lambda: nn.Sequential(nn.Embedding(1000, 32), Mean(), nn.Linear(32, 1)),
        lambda: torch.randint(0, 1000, (200, 256)),
    ),
    "transposed convolution": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 8, 3), nn.Tanh(), nn.ConvTranspose2d(8, 8, 5), nn.Tanh(), nn.Flatten(), nn.Linear(3200, 2)
        ),
        lambda: torch.randn(40, 1, 18, 18),
    ),
    "kernel of nearly the memory": (
        lambda: nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 7)),
        lambda: torch.randn(145, 3),
    ),
}


class Mean(nn.Module):
    def forward(self, x):
        return x.mean(1)


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize("metric", ["trace", "norm"])
def test_a_metric_by_layers_holds_no_more_than_the_memory(name, metric):
    """Also where cotangents are copied, and where the kernel is not the result."""
    torch.manual_seed(0)
    model, x = (made() for made in NETWORKS[name])
    memory = 2**22
    kernel = ntkbench.Kernel(model, x, memory=memory)
    expected = getattr(kernel, metric)(method="structured_derivatives")  # traces the programs
    with LiveBytes() as live:
        found = getattr(kernel, metric)(method="structured_derivatives")
    assert found.value == pytest.approx(expected.value)
    weights = sum(w.nbytes for w in model.parameters())
    assert live.peak <= 1.1 * memory + weights
