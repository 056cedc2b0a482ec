"""Traces that are reused, and the alignment of networks that differ in more than their parameters."""

from __future__ import annotations

import contextlib
import gc
import itertools
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.utils import parametrizations

import ntkbench
from ntkbench import methods, operators, testing
from ntkbench.errors import BadInput
from ntkbench.layerwise import capture, reuse
from ntkbench.layerwise import trace as tracing
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.operators.plain import PlainNetwork
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base import reference
from ntkbench.problems.base.module import from_module

FLOAT64 = Target("torch", "float64", "cpu")


@pytest.fixture(autouse=True)
def kept(monkeypatch) -> OrderedDict:
    """The traces that are kept, none at first."""
    monkeypatch.setattr(reuse, "_kept", OrderedDict())
    return reuse._kept


@pytest.fixture
def traces(monkeypatch) -> Callable[[], int]:
    """A function that counts the traces since its last call."""
    count = 0

    def counted(*args, **kwargs):
        nonlocal count
        count += 1
        return make_fx(*args, **kwargs)

    def since() -> int:
        nonlocal count
        found, count = count, 0
        return found

    for module in (tracing, capture):
        monkeypatch.setattr(module, "make_fx", counted)
    return since


def jacobian(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """J by a loop over outputs of plain autograd, ``[N * O, P]``."""
    theta = [w for w in model.parameters() if w.requires_grad]
    rows = [torch.autograd.grad(f, theta, retain_graph=True, materialize_grads=True) for f in model(x).reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def explicit(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    J = jacobian(model, x)
    return J @ J.T


def weights(model: nn.Module) -> dict[str, torch.Tensor]:
    return {key: w.detach() for key, w in model.named_parameters() if w.requires_grad}


def engine_of(model: nn.Module, x: torch.Tensor) -> LayerwiseKernel:
    return reuse.traced(model, weights(model), x, 2**30)


def check(model: nn.Module, x: torch.Tensor, tolerance: float = 1e-10) -> LayerwiseKernel:
    """Compare the kernel with an explicit one; returns the engine."""
    engine = engine_of(model, x)
    theta = list(weights(model).values())
    found, expected = engine.kernel(theta, x), explicit(model, x)
    assert found.shape == expected.shape
    assert float((found - expected).abs().max()) <= tolerance * float(expected.abs().max())
    assert torch.allclose(engine.diagonal(theta, x).reshape(-1), expected.diagonal(), rtol=tolerance)
    return engine


class Call(nn.Module):
    """A layer called by a function that is in no key of a trace."""

    def __init__(self, layer: nn.Module, call):
        super().__init__()
        self.layer, self.call = layer, call

    def forward(self, x):
        return self.call(self.layer, x)


class Masked(nn.Module):
    """Attention with a causal mask and positions in buffers."""

    def __init__(self):
        super().__init__()
        self.embed, self.read = nn.Embedding(7, 6), nn.Linear(6, 3)
        self.register_buffer("mask", torch.tril(torch.ones(4, 4)).bool())
        self.register_buffer("order", torch.randperm(4))
        self.register_buffer("positions", torch.randn(4, 6))

    def forward(self, ids):
        h = self.embed(ids)[:, self.order] + self.positions
        weights = (h @ h.mT).masked_fill(~self.mask, -torch.inf).softmax(-1)
        return self.read(torch.tanh(weights @ h)).mean(1)


def with_frozen() -> nn.Module:
    model = nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 2))
    model[2].requires_grad_(False)
    return model


def transformer() -> nn.Module:
    return nn.TransformerEncoderLayer(6, 2, 8, batch_first=True, dropout=0.0).eval()


VECTORS, SEQUENCES, IMAGES = (4, 5), (3, 4, 6), (3, 2, 6, 7)
KINDS = {
    "multilayer perceptron": (lambda: nn.Sequential(nn.Linear(5, 6), nn.ReLU(), nn.Linear(6, 3)), VECTORS),
    "batch norm, eval": (
        lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(80, 2)).eval(),
        IMAGES,
    ),
    "frozen layer": (with_frozen, VECTORS),
    "transformer": (transformer, SEQUENCES),
    "recurrent": (lambda: Call(nn.LSTM(6, 3, batch_first=True), lambda layer, x: layer(x)[0]), SEQUENCES),
    "weight norm": (lambda: nn.Sequential(parametrizations.weight_norm(nn.Linear(5, 4)), nn.Tanh()), VECTORS),
    "masked attention": (Masked, None),
}


def made(kind: str, seed: int) -> tuple[nn.Module, torch.Tensor]:
    """A network with weights, float buffers and inputs of its own."""
    torch.manual_seed(seed)
    make, shape = KINDS[kind]
    model = make().double()
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.copy_(torch.rand_like(buffer) + 0.5)
    return model, torch.randint(7, (3, 4)) if shape is None else torch.randn(shape).double()


@pytest.mark.parametrize("kind", KINDS)
def test_a_network_of_a_known_structure_is_not_traced_again(kind, traces):
    check(*made(kind, 0))
    assert traces() > 0
    for seed in (1, 2):
        check(*made(kind, seed))
    assert traces() == 0
    model, x = made(kind, 3)
    engine = engine_of(model, x)
    assert traces() == 0
    assert engine.fallbacks() == LayerwiseKernel(model, weights(model), x, 2**30).fallbacks()


@settings(max_examples=8)
@given(sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4), N=st.tuples(st.integers(1, 4), st.integers(1, 4)))
def test_other_numbers_of_samples_use_the_same_trace(sizes, N):
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b), nn.Tanh())]
    model = nn.Sequential(*layers).double()
    one, other = (check(model, torch.randn(n, sizes[0]).double()) for n in N)
    assert one.trace is other.trace


def test_ntk_and_metrics_trace_a_network_once(traces):
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    for seed in range(3):
        model, _ = made("multilayer perceptron", seed)
        theta = explicit(model, x.double())
        torch.testing.assert_close(ntkbench.ntk(model, x), theta)
        norm = ntkbench.norm(model, x, method="structured_derivatives")
        assert float(norm) == pytest.approx(float(theta.norm()), rel=1e-10)
        assert bool(traces()) == (seed == 0)


# --- changes that the structure does not show


class Scaled(nn.Linear):
    """A linear layer with a number as an attribute."""

    gain = 1.0

    def __init__(self, scale: float):
        super().__init__(5, 3)
        self.scale = scale

    def forward(self, x):
        return self.scale * self.gain * torch.tanh(super().forward(x))


class Settings:
    """Settings of a network: whether it stops a gradient."""

    def __init__(self, stopping: bool):
        self.stopping = stopping


class Stopping(nn.Module):
    def __init__(self, stopping: bool):
        super().__init__()
        self.one, self.other, self.settings = nn.Linear(5, 4), nn.Linear(4, 3), Settings(stopping)

    def forward(self, x):
        h = torch.tanh(self.one(x))
        return self.other(h.detach() if self.settings.stopping else h)


class Buffered(nn.Module):
    """A layer whose forward pass reads a buffer in some way."""

    def __init__(self, buffer: torch.Tensor, call):
        super().__init__()
        self.layer, self.call = nn.Linear(5, 3), call
        self.register_buffer("buffer", buffer)

    def forward(self, x):
        return self.call(self.layer, x, self.buffer)


def branching(layer, x, flag):
    return torch.tanh(layer(x)) if flag else torch.sin(layer(x))


def by_number(layer, x, number):
    return torch.tanh(layer(x)) * number.item()


def some(layer, x, chosen):
    return torch.tanh(layer(x))[:, chosen]


def marked(layer, x, mask):
    return torch.tanh(layer(torch.where(mask, x, 0.0)))


def closure(scale: float) -> nn.Module:
    return Call(nn.Linear(5, 3), lambda layer, x: scale * torch.tanh(layer(x)))


CHANGES = {
    "attribute": [lambda: Scaled(1.0), lambda: Scaled(3.0)],
    "closure": [lambda: closure(1.0), lambda: closure(3.0)],
    "gradients alone": [lambda: Stopping(False), lambda: Stopping(True)],
    "number in a buffer": [
        lambda: Buffered(torch.tensor(2.0), by_number),
        lambda: Buffered(torch.tensor(3.0), by_number),
    ],
    "branch on a buffer": [
        lambda: Buffered(torch.tensor(True), branching),
        lambda: Buffered(torch.tensor(False), branching),
    ],
    "positions": [
        lambda: Buffered(torch.tensor([0, 1, 1]), some),
        lambda: Buffered(torch.tensor([2, 2, 0]), some),
    ],
    "mask of positions": [
        lambda: Buffered(torch.tensor([True, False, True]), some),
        lambda: Buffered(torch.tensor([False, True, False]), some),
    ],
    "mask": [
        lambda: Buffered(torch.tensor([True, False, True, True, True]), marked),
        lambda: Buffered(torch.tensor([False, True, False, True, True]), marked),
    ],
}
FOUND = {"positions", "mask"}
"""Changes that a trace covers."""


@pytest.mark.parametrize("what", CHANGES)
def test_a_network_that_computes_something_else_gets_its_own_kernel(what, traces):
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()
    for i, make in enumerate(CHANGES[what] * 2):
        model = make().double()
        check(model, x)
        assert bool(traces()) == (i == 0 or (what not in FOUND and (what != "attribute" or i == 1)))


def test_a_change_below_the_tolerance_of_certificates_is_found():
    torch.manual_seed(0)
    x = torch.randn(4, 5)
    one, other = closure(1.0), closure(1 + 1e-4)
    other.load_state_dict(one.state_dict())
    check(one, x, 1e-6)
    check(other, x, 1e-6)


def test_a_class_attribute_is_found(monkeypatch, traces):
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()
    check(Scaled(1.0).double(), x)
    monkeypatch.setattr(Scaled, "gain", 2.0)
    check(Scaled(1.0).double(), x)
    assert traces()


def test_train_and_eval_mode_have_traces_of_their_own(kept):
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()
    model = Call(nn.Linear(5, 3), lambda layer, x: torch.tanh(layer(x)) * (2 if layer.training else 1)).double()
    for _ in range(2):
        check(model.train(), x)
        check(model.eval(), x)
    assert len(kept) == 2


def test_a_class_that_is_defined_again_under_its_name_has_a_trace_of_its_own(kept):
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()

    def defined(gain: float) -> nn.Module:
        class Net(nn.Linear):
            def forward(self, x):
                return gain * torch.tanh(super().forward(x))

        return Net(5, 3).double()

    models = [defined(1.0), defined(2.0)]
    for model in models * 2:
        check(model, x)
    assert len(kept) == 2


def gated(layer, x, gain):
    """Only samples with a positive first entry depend on the buffer."""
    return torch.tanh(layer(x)) * torch.where(x[:, :1] > 0, gain.item(), 1.0)


def test_changes_that_the_first_sample_does_not_show_are_found_by_the_certificate(traces):
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()
    x[:, 0] = torch.tensor([-1, 1, -1, 1])
    models = [Buffered(torch.tensor(gain), gated).double() for gain in (2.0, 3.0, 4.0)]
    check(models[0], x)
    traces()
    engine = engine_of(models[1], x)
    assert traces() == 0
    theta = list(weights(models[1]).values())
    torch.testing.assert_close(engine.kernel(theta, x), explicit(models[1], x))
    assert traces() > 0
    assert engine.directions_taken == 2 * 4 * 3  # the passes of the contradicted kernel count
    assert engine_of(models[1], x).trace is engine.trace
    torch.testing.assert_close(ntkbench.ntk(models[2], x), explicit(models[2], x))
    norm = ntkbench.norm(models[0], x, method="structured_derivatives")
    assert float(norm) == pytest.approx(float(explicit(models[0], x).norm()), rel=1e-10)


def test_wide_heads_are_traced_again_where_the_trace_of_another_network_fails():
    torch.manual_seed(0)
    x = torch.randn(4, 5).double()
    x[:, 0] = torch.tensor([-1, 1, -1, 1])
    method = methods.get("wide_head")
    for gain in (2.0, 3.0):
        model = nn.Sequential(Buffered(torch.tensor(gain), gated), nn.Linear(3, 7)).double()
        found = method.estimate(method.prepare(from_module(model, x), FLOAT64), "norm")
        assert found.value == pytest.approx(float(explicit(model, x).norm()), rel=1e-10)


def test_a_network_that_contradicts_itself_is_reported(traces):
    model = Call(nn.Linear(5, 1), lambda layer, x: layer(x) * (1 + torch.relu(-x[:, 0]).sum())).double()
    x = torch.randn(4, 5).double()
    x[:, 0] = torch.tensor([1, 1, -1, 1])  # the third one changes the others
    for _ in range(2):
        engine = engine_of(model, x)
        with pytest.raises(operators.certificate.Uncertified):
            engine.kernel(list(weights(model).values()), x)


# --- kept traces


def tensor_bytes() -> int:
    gc.collect()
    alive = [t for t in gc.get_objects() if type(t) in (torch.Tensor, nn.Parameter)]
    total = 0
    for t in alive:
        if t.layout is torch.strided and not t.is_meta:
            with contextlib.suppress(RuntimeError, NotImplementedError):  # left behind by a transform of torch.func
                total += t.untyped_storage().nbytes()
    return total


@pytest.mark.slow
def test_no_module_class_weight_buffer_or_input_is_held():
    def use() -> list[weakref.ref]:
        class Net(nn.Sequential):
            pass

        torch.manual_seed(0)
        model = Net(nn.Linear(300, 400), nn.BatchNorm1d(400), nn.Tanh(), nn.Linear(400, 3)).double().eval()
        model[3].requires_grad_(False)
        x = torch.randn(4, 300).double()
        for _ in range(2):
            engine = engine_of(model, x)
            engine.kernel(list(weights(model).values()), x)
        parts = [Net, model, *model.modules(), *model.parameters(), *model.buffers(), x, engine]
        return [weakref.ref(part) for part in parts]

    before = tensor_bytes()
    refs = use()
    assert tensor_bytes() - before < 10_000
    assert [ref() for ref in refs] == [None] * len(refs)
    ((trace, _),) = reuse._kept.values()
    assert trace.programs and trace.nbytes < 10_000


@pytest.mark.slow
def test_counting_what_autograd_saves_leaves_nothing_in_memory():
    """A saved output that is kept as it is would hold the node that saves it."""

    def use() -> None:
        model, x = (
            nn.Sequential(nn.Linear(300, 400), nn.Tanh(), nn.Linear(400, 3)).double(),
            torch.randn(4, 300).double(),
        )
        operators.linearise(from_module(model, x), "theta_0", Target("torch", "float64", "cpu")).bytes_per_probe()
        PlainNetwork(model, dict(model.named_parameters())).gradient(x, torch.ones(4, 3).double(), 1)

    before = tensor_bytes()
    use()
    assert tensor_bytes() - before < 10_000


def test_a_trace_with_a_large_tensor_is_not_kept(kept):
    class Net(nn.Linear):
        def forward(self, x):
            return super().forward(x) + self.table[:3]

    for _ in range(2):
        model = Net(5, 3).double()
        model.table = torch.randn(reuse.HELD // 8 + 1).double()
        check(model, torch.randn(4, 5).double())
    assert not kept


def test_the_least_recently_used_traces_and_programs_are_dropped_first(kept, monkeypatch, traces):
    monkeypatch.setattr(reuse, "KEPT", 2)
    monkeypatch.setattr(capture, "MOST_PROGRAMS", 2)
    models = [nn.Linear(3, size).double() for size in (1, 2, 3)]
    for i in (0, 1, 0, 2):
        check(models[i], torch.randn(2, 3).double())
    assert len(kept) == 2
    traces()
    check(models[0], torch.randn(2, 3).double())
    assert not traces()
    check(models[1], torch.randn(2, 3).double())
    assert traces()
    for N in (3, 4, 5):
        engine = check(models[0], torch.randn(N, 3).double())
    assert len(engine.trace.programs) == 2


def test_threads_share_a_trace(traces):
    check(*made("batch norm, eval", 0))
    once, failed = traces(), []
    reuse._kept.clear()
    barrier = threading.Barrier(4)

    def work(seed: int) -> None:
        try:
            model, x = made("batch norm, eval", 0)
            with torch.no_grad():
                for w in (*model.parameters(), model[1].running_mean):
                    w.add_(0.01 * seed)
            barrier.wait()
            check(model, x)
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert traces() == once


def arranged(call, *shape: int) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        layer = nn.Module()
        layer.weight = nn.Parameter(torch.randn(shape))
        return Call(layer, lambda layer, x: torch.tanh(call(x, layer.weight)))

    return make


ARRANGEMENTS = {
    "as it is": arranged(lambda x, w: x @ w, 5, 3),
    "transposed": arranged(lambda x, w: x @ w.T, 3, 5),
    "rows": arranged(lambda x, w: x @ w[1:6], 7, 3),
    "every other column": arranged(lambda x, w: x @ w[:, 1::2], 5, 6),
    "merged": arranged(lambda x, w: x @ w.permute(1, 0, 2).reshape(5, -1), 2, 5, 3),
    "a batch of matrices": arranged(lambda x, w: (x[:, None, None] @ w).flatten(1), 2, 5, 3),
}


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
def test_gradients_go_to_the_entries_of_a_weight_however_it_is_arranged(arrangement):
    torch.manual_seed(0)
    engine = check(ARRANGEMENTS[arrangement]().double(), torch.randn(4, 5).double())
    assert not engine.fallbacks()
    assert (engine.trace.nbytes > 0) == (arrangement == "merged")


# --- alignment


def trained(seed: int, hidden: int = 6) -> nn.Module:
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(5, hidden), nn.BatchNorm1d(hidden), nn.Tanh(), nn.Linear(hidden, 2)).double()
    for _ in range(3):
        model(torch.randn(8, 5).double() * (1 + seed) + seed)
    return model.eval()


def aligned(models: list[nn.Module], inputs: list[torch.Tensor]) -> float:
    thetas = [explicit(model, x) for model, x in zip(models, inputs, strict=True)]
    return float((thetas[0] * thetas[1]).sum() / (thetas[0].norm() * thetas[1].norm()))


BY_LAYERS = ("structured_derivatives", "sample_subset", "structured_block_u_statistics")


@pytest.mark.parametrize("memory", [2**30, 1])
@pytest.mark.parametrize("name", BY_LAYERS)
def test_networks_with_other_buffers_are_aligned_by_layers(name, memory):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    models = [trained(0), trained(1)]
    problem, method = from_module(models[0], x, models[1]), methods.get(name)
    assert set(problem.fixed_f) > {"1.running_mean"}
    target = replace(FLOAT64, memory=memory)
    check_alignment(name, problem, target, aligned(models, [x, x]))
    assert method.unsupported_reason(problem, "alignment", target, 10**6) is None


def check_alignment(name: str, problem: Problem, target: Target, expected: float) -> None:
    """An exact value is that of explicit kernels; an estimate is within six standard errors."""
    method = methods.get(name)
    prepared = method.prepare(problem, target)
    if not method.takes_passes:
        found = method.estimate(prepared, "alignment")
        if method.kind == "exact":
            assert found.value == pytest.approx(expected, rel=1e-10), name
        needed = method.passes_needed(problem, "alignment", target)
        assert found.passes >= needed if target.memory == 1 else found.passes == pytest.approx(needed)
        return
    passes = 400
    found = method.estimate(prepared, "alignment", passes, 0)
    assert 0 < found.passes <= passes
    assert found.certificate < 1e-7
    assert abs(found.value - expected) <= 6 * found.standard_error + 1e-9, name


def test_alignment_of_batch_norm_networks_takes_an_exact_method():
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    models = [trained(0), trained(1)]
    found = ntkbench.alignment(*models, x)
    assert found.method == "structured_derivatives"
    assert found.value == pytest.approx(aligned(models, [x, x]), rel=1e-10)
    assert found.passes == 4


@pytest.mark.parametrize("name", ["structured_sum_of_logits", "trace_kernel", "last_layer"])
def test_kernels_between_samples_are_aligned_with_other_buffers(name):
    x = torch.randn(6, 5, generator=torch.Generator().manual_seed(0)).double()
    models = [trained(0), trained(1)]
    problem, method = from_module(models[0], x, models[1]), methods.get(name)
    thetas = []
    for model in models:
        J = jacobian(model, x)
        J = J[:, -2 * 7 :] if name == "last_layer" else J
        rows = J.reshape(6, 2, -1)
        pairs = torch.einsum("bip,cjp->bcij", rows, rows)
        thetas.append(
            pairs.sum((2, 3)) if name == "structured_sum_of_logits" else pairs.diagonal(dim1=2, dim2=3).sum(2)
        )
    expected = float((thetas[0] * thetas[1]).sum() / (thetas[0].norm() * thetas[1].norm()))
    found = method.estimate(method.prepare(problem, FLOAT64), "alignment")
    assert found.value == pytest.approx(expected, rel=1e-10)


def two_networks(hidden: tuple[int, int] = (4, 6), outputs: int = 2) -> Problem:
    one = testing.smooth_problem("one", 4, 3, hidden[0], outputs)
    return replace(one, other=testing.smooth_problem("other", 4, 5, hidden[1], outputs))


ALIGNING = [
    (name, backend)
    for name in methods.names()
    if "alignment" in methods.get(name).metrics
    for backend in methods.get(name).backends
]


@pytest.mark.parametrize(("name", "backend"), ALIGNING)
@pytest.mark.slow
def test_different_networks_are_aligned(name, backend):
    problem, method = two_networks((2, 2), 5) if name.startswith("wide_head") else two_networks(), methods.get(name)
    target = Target(backend, "float64", "cpu")
    reason = method.unsupported_reason(problem, "alignment", target, 10**6)
    if method.needs_one_network:
        assert "two networks" in reason
        return
    if method.needs_recurrence:
        assert "recurrence" in reason
        return
    assert reason is None
    thetas = [J @ J.T for J in map(testing.explicit_jacobian, (problem, problem.other))]
    check_alignment(name, problem, target, testing.metrics_of(*thetas)["alignment"])
    if name in BY_LAYERS:
        check_alignment(name, problem, replace(target, memory=1), testing.metrics_of(*thetas)["alignment"])


def test_a_problem_may_have_another_network_at_theta_f():
    problem = two_networks()
    one, other = testing.smooth_problem("one", 4, 3, 4, 2), testing.smooth_problem("other", 4, 5, 6, 2)
    assert problem.theta_f is other.theta_0
    assert problem.P == other.P > one.P
    assert problem.end("theta_f") == (other, "theta_0") and problem.end("theta_0") == (problem, "theta_0")
    assert not problem.fixed("theta_f")
    assert len({problem.digest(), one.digest(), replace(one, other=replace(other, x=other.x + 1)).digest()}) == 3
    assert replace(one, other=replace(other, samples_interact=True)).samples_interact
    assert replace(problem, theta_f=None, other=None).theta_f is None
    exact = reference.compute(problem)["metrics"]["alignment"]
    thetas = [J @ J.T for J in map(testing.explicit_jacobian, (problem, other))]
    assert exact == pytest.approx(testing.metrics_of(*thetas)["alignment"], rel=1e-10)
    jax = Target("jax", "float64", "cpu")
    without = replace(one, other=replace(other, jax_forward=None))
    assert "no network in JAX" in methods.get("direct").unsupported_reason(without, "alignment", jax)
    assert methods.get("direct").unsupported_reason(without, "norm", jax) is None


@pytest.mark.parametrize("sizes", [(5, 3, 4, 2), (4, 3, 4, 3), (8, 3, 4, 1)])
def test_kernels_of_other_sizes_are_not_aligned(sizes):
    other = testing.smooth_problem("another", *sizes)
    with pytest.raises(BadInput, match=r"one has 4 samples of 2 outputs and another has .*: N and O must be equal"):
        replace(testing.smooth_problem("one", 4, 3, 4, 2), other=other)


def test_memory_of_two_whole_kernels_is_announced():
    method, problem = methods.get("structured_derivatives"), two_networks()
    assert method.bytes_needed(problem, "alignment", FLOAT64) == 3 * 8**2 * 8
    assert method.bytes_needed(problem, "norm", FLOAT64) == 0
    assert method.bytes_needed(testing.smooth_problem(), "alignment", FLOAT64) == 0
    assert methods.get("trace_kernel").bytes_needed(problem, "alignment", FLOAT64) == 3 * 4**2 * 8


def test_one_network_is_aligned_in_blocks_by_one_engine():
    problem = testing.smooth_problem("tanh_net")
    prepared = methods.get("structured_derivatives").prepare(problem, FLOAT64)
    one, other = prepared.ends("alignment")
    assert one.engine is other.engine and one.x is other.x
