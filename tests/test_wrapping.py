"""Wrapping a network: precision, randomness, interaction, state, ambient settings, refusals."""

from __future__ import annotations

import functools
import random
import sys
import threading
import weakref
from collections import UserDict
from types import SimpleNamespace

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from conftest import metrics_of
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import ntkbench
from ntkbench import modules
from ntkbench.ambient import own_settings
from ntkbench.operators.recurrent.cells import Recurrence
from ntkbench.problems.base.module import last_layer


def seeded(make, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


X = seeded(lambda: torch.randn(6, 4))


def explicit(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """Theta of the model as it is, one plain backward pass per output, in float64."""
    model = modules.cast(modules.copied(model), torch.float64)
    theta = [w for w in model.parameters() if w.requires_grad]
    outputs = model(x.double() if x.is_floating_point() else x)
    outputs = outputs[0] if isinstance(outputs, tuple) else outputs
    rows = [torch.autograd.grad(y, theta, retain_graph=True, materialize_grads=True) for y in outputs.reshape(-1)]
    J = torch.stack([torch.cat([g.to_dense().reshape(-1) for g in row]) for row in rows])
    return J @ J.T


def check(model: nn.Module, x: torch.Tensor) -> None:
    """ntk() and trace() are those of the model."""
    with own_settings("float64"):
        theta = explicit(model, x)
    found, size = ntkbench.ntk(model, x, dtype="float64"), float(theta.abs().max())
    assert torch.allclose(found, theta, rtol=1e-9, atol=1e-9 * size)
    assert float(ntkbench.trace(model, x, dtype="float64")) == pytest.approx(float(theta.trace()), rel=1e-9)


class Lambda(nn.Module):
    """A linear layer in a given forward pass."""

    def __init__(self, forward, **attributes):
        super().__init__()
        self.layer, self.call = nn.Linear(4, 3), forward
        for name, value in attributes.items():
            if isinstance(value, torch.Tensor) and not isinstance(value, nn.Parameter):
                self.register_buffer(name, value)
            else:
                setattr(self, name, value)

    def forward(self, x):
        return self.call(self, x)


# Precision


PHASES = torch.polar(torch.ones(2), torch.tensor([0.5, 1.5]))


def rotated(self, x):
    pairs = torch.view_as_complex(self.layer(torch.cat([x, x], 1)[:, :4]).repeat(1, 2)[:, :4].reshape(-1, 2, 2))
    return torch.view_as_real(pairs * self.phases).flatten(1).tanh()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("kept", [lambda: PHASES, lambda: nn.Parameter(PHASES, requires_grad=False)])
def test_complex_buffers_and_frozen_parameters_keep_their_imaginary_part(dtype, kept):
    model = seeded(lambda: Lambda(rotated, phases=kept()))
    problem = ntkbench.from_module(model, X, dtype=dtype)
    assert problem.module.phases.dtype == (torch.complex64 if dtype == "float32" else torch.complex128)
    assert problem.module.phases.imag.abs().min() > 0
    assert float(ntkbench.trace(model, X, dtype=dtype)) == pytest.approx(float(explicit(model, X).trace()), rel=1e-5)
    other = Lambda(rotated, phases=PHASES.conj().resolve_conj())
    other.load_state_dict({key: w for key, w in model.state_dict().items() if key != "phases"}, strict=False)
    assert problem.digest() != ntkbench.from_module(other, X, dtype=dtype).digest()
    check(model, X)


def test_alignment_uses_the_complex_buffers_of_each_end():
    ends = [seeded(lambda phases=phases: Lambda(rotated, phases=phases)) for phases in (PHASES, PHASES**2)]
    thetas = [explicit(model, X).numpy() for model in ends]
    found = ntkbench.alignment(*ends, X, dtype="float64")
    assert float(found) == pytest.approx(metrics_of(*thetas)["alignment"], rel=1e-9)


class Times(nn.Module):
    """Counts on inputs in float64, and on its own origin in float64."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("origin", torch.tensor(1.7e9, dtype=torch.float64))

    def forward(self, t):
        phase = (t - self.origin) / 100
        return torch.tanh(self.layer(torch.cat([phase.sin(), phase.cos()], 1).to(self.layer.weight.dtype)))


class FrozenHalf(nn.Module):
    def __init__(self):
        super().__init__()
        self.backbone, self.head = nn.Linear(4, 8).half().requires_grad_(False), nn.Linear(8, 2)

    def forward(self, x):
        return torch.tanh(self.head(torch.tanh(self.backbone(x.half())).float()))


MOMENTS = 1.7e9 + 1000 * seeded(lambda: torch.rand(6, 1, dtype=torch.float64))


class FrozenHalfOfHalf(FrozenHalf):
    def forward(self, x):
        return torch.tanh(self.head(torch.tanh(self.backbone(x)).float()))


class OfFineInputs(nn.Module):
    """A float32 layer of inputs that are used in their own, coarser precision."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return torch.tanh(self.layer(torch.sin(30 * x).float()))


@pytest.mark.parametrize("make", [FrozenHalfOfHalf, OfFineInputs])
def test_inputs_in_half_precision_keep_it_or_are_refused(make):
    model = seeded(make)
    for dtype in (torch.float16, torch.bfloat16):
        model.backbone = model.backbone.to(dtype) if make is FrozenHalfOfHalf else None
        x = X.to(dtype)
        if dtype == torch.float16:
            torch.testing.assert_close(ntkbench.ntk(model, x).double(), own_theta(model, x), rtol=2e-3, atol=2e-3)
            continue
        with pytest.raises(ntkbench.BadInput, match="counts on inputs in bfloat16, which NumPy lacks"):
            ntkbench.ntk(model, x)


def own_theta(model, x):
    """Theta of the model in its own precisions, one plain backward pass per output."""
    theta = [w for w in model.parameters() if w.requires_grad]
    rows = [torch.autograd.grad(y, theta, retain_graph=True) for y in model(x).reshape(-1)]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).double()
    return J @ J.T


@pytest.mark.parametrize(("make", "x", "rtol"), [(Times, MOMENTS, 1e-5), (FrozenHalf, X, 2e-3)])
def test_parts_of_another_precision_keep_it_where_the_network_counts_on_it(make, x, rtol, tmp_path):
    one, other = seeded(make), seeded(make, 1)
    thetas = [own_theta(model, x) for model in (one, other)]
    close = lambda found, theta: torch.allclose(found.double(), theta, rtol=rtol, atol=rtol * float(theta.max()))  # noqa: E731
    kernel = ntkbench.Kernel(one, x)
    assert kernel.problem.mixed and kernel.ntk().dtype == torch.float32
    assert close(kernel.ntk(), thetas[0]) and close(torch.tensor(kernel.ntk(file=tmp_path / "k.npy")), thetas[0])
    for weights in (other, other.state_dict()):
        assert close(kernel.at(weights).ntk(), thetas[1])
    assert close(kernel.ntk(x[:2]), thetas[0][:, : 2 * len(thetas[0]) // len(x)])
    for method in ("auto", "direct"):
        assert float(ntkbench.trace(one, x, method=method)) == pytest.approx(float(thetas[0].trace()), rel=rtol)
    expected = metrics_of(*(theta.numpy() for theta in thetas))["alignment"]
    assert float(ntkbench.alignment(one, other, x)) == pytest.approx(expected, rel=rtol)
    assert close(ntkbench.ntk(one, (x,)), thetas[0])  # inputs as buffers


def test_parts_of_another_precision_are_converted_where_that_changes_nothing():
    model = seeded(lambda: Lambda(lambda self, x: self.layer(x * self.scale), scale=torch.ones(4, dtype=torch.float64)))
    model.layer.double()
    with own_settings("float64"):
        theta = explicit(model, X)
    for converted, x in ((model, X), (nn.Linear(4, 3), X.double()), (model, X.double())):
        assert not ntkbench.from_module(converted, x).mixed
    torch.testing.assert_close(ntkbench.ntk(model, X), theta)


def test_a_precision_that_changes_gradients_is_refused():
    fine = seeded(lambda: Times()).double()
    with pytest.raises(ntkbench.BadInput, match="has other gradients in float32 than in its own precision"):
        ntkbench.trace(fine, MOMENTS, dtype="float32")
    assert not ntkbench.from_module(seeded(lambda: nn.Linear(4, 2)).double(), X, dtype="float32").mixed
    with pytest.raises(ntkbench.BadInput, match="computes in float32 only"):
        ntkbench.from_module(Times(), MOMENTS).conversion("float64")


# Randomness


def dropping(draw):
    """Halves the outputs now and then in train mode."""
    return lambda self, x: self.layer(x) * (0.5 if self.training and draw(self) < 0.1 else 1)


DRAWS = {
    "Python": lambda self: random.random(),
    "NumPy": lambda self: np.random.rand(),
    "torch": lambda self: torch.rand(()),
    "own, Python": lambda self: self.own.random(),
    "own, NumPy": lambda self: self.own.random(),
    "own, torch": lambda self: torch.rand((), generator=self.own),
}
OWN = {
    "own, Python": lambda: random.Random(0),
    "own, NumPy": lambda: np.random.default_rng(0),
    "own, torch": lambda: torch.Generator().manual_seed(0),
}


@pytest.mark.parametrize("kind", DRAWS)
def test_rare_draws_in_train_mode_are_refused_every_time(kind):
    model = seeded(lambda: Lambda(dropping(DRAWS[kind]), own=OWN.get(kind, lambda: None)()))
    for seed in range(8):
        random.seed(seed), np.random.seed(seed), torch.manual_seed(seed)
        with pytest.raises(ntkbench.BadInput, match=r"is random.*model.eval\(\)"):
            ntkbench.trace(model, X)
    check(model.eval(), X)


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_without_effect_in_eval_mode_are_accepted_and_leave_generators_unchanged(kind):
    def forward(self, x):
        return self.layer(x) * (0.5 if DRAWS[kind](self) < 0.1 and self.training else 1)

    model = seeded(lambda: Lambda(forward, own=OWN.get(kind, lambda: None)())).eval()
    before = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()
    problem = ntkbench.from_module(model, X)
    assert random.getstate() == before[0]
    np.testing.assert_array_equal(np.random.get_state()[1], before[1])
    assert torch.equal(torch.get_rng_state(), before[2])
    assert not problem.samples_interact
    assert float(ntkbench.trace(model, X)) == pytest.approx(float(explicit(model, X).trace()), rel=1e-5)


@pytest.mark.parametrize("kind", DRAWS)
def test_draws_with_an_effect_in_eval_mode_are_refused(kind):
    model = seeded(lambda: Lambda(lambda self, x: self.layer(x) * (1 + float(DRAWS[kind](self))))).eval()
    model.own = OWN.get(kind, lambda: None)()
    with pytest.raises(ntkbench.BadInput, match="is random or keeps a state"):
        ntkbench.trace(model, X)


def test_a_network_that_seeds_its_own_draws_is_accepted():
    def features(self, x):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            return self.layer(x @ torch.randn(4, 4).to(x))

    def seeds(self, x):
        generator = torch.manual_seed(3)
        return self.layer(x @ torch.randn(4, 4, generator=generator).to(x))

    for forward in (features, seeds):
        check(seeded(lambda forward=forward: Lambda(forward)), X)


GENERATOR = np.random.default_rng(0)


def closed():
    generator = np.random.default_rng(0)
    return lambda *_: generator.random()


def with_hook() -> nn.Module:
    model, draw = Lambda(lambda self, x: self.layer(x)), closed()
    model.layer.register_forward_hook(lambda layer, inputs, outputs: outputs * (0.5 if draw() < 0.1 else 1))
    return model


PLACES = {
    "a global variable": lambda: Lambda(dropping(lambda self: GENERATOR.random())),
    "a closure": lambda: Lambda(dropping(closed())),
    "a list": lambda: Lambda(dropping(lambda self: self.own[0].random()), own=[np.random.default_rng(0)]),
    "an object": lambda: Lambda(
        dropping(lambda self: self.own.draws.random()), own=SimpleNamespace(draws=np.random.default_rng(0))
    ),
    "a hook": with_hook,
}


@pytest.mark.parametrize("place", PLACES)
def test_draws_from_a_generator_are_seen_wherever_it_is(place):
    model = seeded(PLACES[place])
    for _ in range(4):
        with pytest.raises(ntkbench.BadInput, match=r"is random.*model.eval\(\)"):
            ntkbench.trace(model, X)


@pytest.mark.parametrize("argument", ["call", "output"])
def test_draws_of_functions_that_are_given_are_seen(argument):
    draw, model = closed(), seeded(lambda: nn.Linear(4, 3))
    scale = lambda y: y * (0.5 if draw() < 0.1 else 1)  # noqa: E731
    given = {"call": lambda model, x: scale(model(x)), "output": scale}
    for _ in range(4):
        with pytest.raises(ntkbench.BadInput, match=r"is random.*model.eval\(\)"):
            ntkbench.trace(model, X, **{argument: given[argument]})


# Interaction


def zeroed(model: nn.Sequential) -> nn.Sequential:
    nn.init.zeros_(model[-1].weight), nn.init.zeros_(model[-1].bias)
    return model


def beside(self, x):
    """A weak dependence on the mean of the batch, beside a large constant."""
    return 1e8 + 1e-3 * self.layer(x - x.mean(0))


INTERACTING = {
    "BatchNorm behind a readout of zero": lambda: zeroed(
        nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))
    ),
    "behind two zeros": lambda: zeroed(zeroed(nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Linear(5, 2)))),
    "beside an offset": lambda: Lambda(beside),
    "scaled by the largest": lambda: Lambda(lambda self, x: self.layer(x) / x.abs().max().detach()),
    "contrastive": lambda: Lambda(lambda self, x: (self.layer(x) @ self.layer(x).T).softmax(1)),
    "on a graph": lambda: Lambda(lambda self, x: self.graph.to(x) @ self.layer(x), graph=torch.eye(6).roll(1, 0)),
}


@pytest.mark.parametrize("kind", INTERACTING)
def test_interacting_samples_are_detected(kind):
    model = seeded(INTERACTING[kind])
    assert ntkbench.from_module(model, X).samples_interact
    check(model, X)


def float32_inside(self, x):
    return self.layer((x.float() * 1.7).tanh().softmax(-1).to(x))


def masked(self, x):
    """The fourth sample is all padding. In float64 its scores are infinite in float32, and their softmax is nan."""
    scores = self.layer(x).masked_fill(x[:, :1] == 0, torch.finfo(x.dtype).min)
    return scores.softmax(-1, dtype=torch.float32).to(x.dtype) * self.layer(x)


INDEPENDENT = {
    "finite in its own precision alone": lambda: Lambda(masked),
    "a large offset": lambda: Lambda(lambda self, x: 1e8 + self.layer(x)),
    "float32 inside": lambda: Lambda(float32_inside),
    "float32 alone": lambda: Lambda(lambda self, x: self.layer(x.float()).softmax(-1)),
    "zero": lambda: Lambda(lambda self, x: 0 * self.layer(x)),
    "BatchNorm in eval mode": lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5)).eval(),
    "weights that must stay as they are": lambda: Lambda(
        lambda self, x: self.layer(x) if float(self.layer.bias.detach().sum()) < 1e-3 else 1 / 0 * x
    ),
}


@pytest.mark.parametrize("kind", INDEPENDENT)
@pytest.mark.parametrize("dtype", ["float32", None])
def test_independent_samples_are_detected_too(kind, dtype):
    model = seeded(INDEPENDENT[kind])
    x = X
    if kind.startswith("weights"):
        nn.init.zeros_(model.layer.bias)
    if kind.startswith("finite"):
        x = X.clone()
        x[3] = 0
    assert not ntkbench.from_module(model, x, dtype=dtype).samples_interact


def test_gradients_that_are_not_finite_are_no_interaction(caplog):
    model, x = seeded(lambda: Lambda(masked)), torch.randn(200, 4)
    x[::3] = 0
    calls = []
    model.layer.register_forward_hook(lambda layer, given, made: calls.append(len(made)))
    kernel = ntkbench.Kernel(model, x)
    assert max(calls) <= 64 and not kernel.problem.samples_interact
    found = kernel.trace()
    assert "interact" not in " ".join(found.notes) and found.covers(exact_trace(model, x), "float32")
    root = seeded(lambda: Lambda(lambda self, x: (self.layer(x) * (self.layer(x) > 0)).square().sqrt()))
    kernel = ntkbench.Kernel(root, X)
    assert not kernel.problem.samples_interact
    with pytest.raises(ntkbench.BadInput, match="not finite"):
        kernel.trace()
    with pytest.raises(ntkbench.BadInput, match="not finite"):
        kernel.at(root).trace()  # which is the same network
    with pytest.raises(ntkbench.BadInput, match="nan or infinite"):
        kernel.regress(X, torch.ones(len(X), 3), ridge=0.1)


def exact_trace(model, x) -> float:
    theta = [w for w in model.parameters() if w.requires_grad]
    rows = (torch.autograd.grad(f, theta, retain_graph=True) for f in model(x).reshape(-1))
    return float(sum(g.double().square().sum() for row in rows for g in row))


def test_checks_take_few_samples_at_a_time():
    calls = []
    model = seeded(lambda: Lambda(lambda self, x: calls.append((len(x), torch.is_grad_enabled())) or self.layer(x)))
    kernel = ntkbench.Kernel(model, torch.randn(1000, 4))
    assert max(size for size, _ in calls) <= 64
    assert sum(size for size, graph in calls if not graph) == 1000
    assert sum(size for size, graph in calls if graph) <= 6 * 64 + 16
    assert kernel.problem.n == 3000
    calls.clear()
    kernel.at(model)
    assert max(size for size, _ in calls) <= 64


def test_checks_of_a_network_with_a_fixed_size_of_batch_use_that_size():
    model = seeded(lambda: Lambda(lambda self, x: self.layer(x) + x.view(100, 4)[:, :1]))
    assert ntkbench.from_module(model, torch.randn(100, 4)).N == 100


@pytest.mark.parametrize("last", [1000, 999])
def test_outputs_that_are_not_finite_are_seen_wherever_they_are(last):
    model, x = seeded(lambda: Lambda(lambda self, x: self.layer(x).log1p().abs())), torch.randn(last, 4).abs()
    with torch.no_grad():
        model.layer.weight.abs_(), model.layer.bias.zero_()
    kernel = ntkbench.Kernel(model, x)
    x[-2] = -100.0
    with pytest.raises(ntkbench.errors.BadInput, match="the model returns nan or infinite outputs"):
        ntkbench.from_module(model, x)
    with torch.no_grad():
        model.layer.weight.neg_()
    with pytest.raises(ntkbench.errors.BadInput, match="the other network returns nan or infinite outputs"):
        kernel.at(model)


# Networks of all kinds


class Residual(nn.Module):
    """The Laplacian of a network's output by its input."""

    def __init__(self):
        super().__init__()
        self.u = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1))

    def forward(self, x):
        x = x.detach().requires_grad_()
        (g,) = torch.autograd.grad(self.u(x).sum(), x, create_graph=True)
        return sum(torch.autograd.grad(g[:, i].sum(), x, create_graph=True)[0][:, i] for i in range(4))[:, None]


def scratch(self, x):
    self.table = torch.zeros(len(x), 3).to(x)
    self.table[:, :] = self.layer(x)
    return self.table.tanh()


def kept(self, x):
    self.table.detach_().copy_(self.layer(x).detach().mean())
    return self.layer(x)


def caching(self, x):
    if self.table is None:
        self.table = torch.arange(3.0, dtype=x.dtype).cos()
    return self.layer(x) * self.table


def showing(self, x):
    self.shown = self.layer(x)
    return self.shown.tanh()


def counting(self, x):
    self.calls += 1
    return self.layer(x)


def weight_normed():
    layer = nn.utils.weight_norm(nn.Linear(4, 3))
    layer(X)  # leaves a tensor with a graph as an attribute
    return layer


NETWORKS = {
    "gradients inside": Residual,
    "checkpointed": lambda: Lambda(
        lambda self, x: torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=False)
    ),
    "a scratch buffer": lambda: Lambda(scratch, table=torch.zeros(1)),
    "values kept in a buffer": lambda: Lambda(kept, table=torch.zeros(1)),
    "a table made at the first call": lambda: Lambda(caching, table=None),
    "activations shown as an attribute": lambda: Lambda(showing),
    "a counter": lambda: Lambda(counting, calls=torch.tensor(0)),
    "in place": lambda: Lambda(lambda self, x: self.layer(x).mul_(2).tanh_()),
    "a branch on data": lambda: Lambda(lambda self, x: self.layer(x) if x.sum() > 0 else self.layer(2 * x).tanh()),
    "DataParallel": lambda: nn.DataParallel(nn.Linear(4, 3)),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3))),
    "weight_norm of old": weight_normed,
    "state of the default precision": lambda: Lambda(
        lambda self, x: torch.zeros(len(x), 3).addmm(x, self.layer.weight.T)
    ),
    "something called recurrence": lambda: Lambda(lambda self, x: self.recurrence * self.layer(x), recurrence=3),
    "a layer called recurrence": lambda: Lambda(lambda self, x: self.recurrence(x), recurrence=nn.Linear(4, 2)),
}


@pytest.mark.parametrize("kind", NETWORKS)
def test_networks_of_all_kinds_are_supported(kind):
    model = seeded(NETWORKS[kind])
    check(model, X)


class Centred(nn.Module):
    """Subtracts the mean of the inputs of its first call."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("mean", torch.zeros(4))
        self.register_buffer("fitted", torch.tensor(False))

    def forward(self, x):
        if not self.fitted:
            self.mean.copy_(x.mean(0))
            self.fitted.fill_(True)
        return self.layer(x - self.mean).tanh()


def test_a_state_that_the_first_call_fits_is_refused_until_it_is_fitted():
    """Otherwise some products would fit it to one sample."""
    model = seeded(Centred)
    with pytest.raises(ntkbench.BadInput, match="a state that its first call fits to the inputs: call it once"):
        ntkbench.trace(model, X)
    assert not model.fitted
    model(X)
    check(model, X)


class Shown(nn.Module):
    """Its head reads what a hook of its body wrote."""

    def __init__(self):
        super().__init__()
        self.body, self.head = nn.Linear(4, 5), nn.Linear(5, 3)

    def show(self, layer, inputs, outputs):
        self.shown = outputs

    def forward(self, x):
        self.body(x)
        return self.head(self.shown.tanh())


SHOWN = seeded(Shown)
HOOKS = {
    "a closure": lambda model: lambda layer, inputs, outputs: setattr(model, "shown", outputs),
    "a default": lambda model: lambda layer, inputs, outputs, own=model: setattr(own, "shown", outputs),
    "a function in a closure": lambda model: (lambda show: lambda *given: show(*given))(model.show),
    "a global variable": lambda model: lambda layer, inputs, outputs: setattr(SHOWN, "shown", outputs),
}


@pytest.mark.parametrize("kind", HOOKS)
def test_a_hook_that_uses_the_model_itself_is_refused_and_not_called(kind):
    model = SHOWN if "global" in kind else seeded(Shown)
    model.body.register_forward_hook(HOOKS[kind](model))
    with torch.no_grad():
        model(X)
    shown = model.shown
    with pytest.raises(ntkbench.BadInput, match=r"a function that uses model itself \(a hook of 'body'\)"):
        ntkbench.trace(model, X)
    assert model.shown is shown


class Gain(nn.Module):
    """A layer times a buffer that it finds in some way."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.register_buffer("gain", torch.tensor(2.0))

    def forward(self, x):
        return self.layer(x) * self.found()

    def found(self):
        return self.through()

    def through(self):
        return self.where().gain


class ByGlobalVariable(Gain):
    def through(self):
        return GLOBAL.gain


class ByFunction(Gain):
    def found(self):
        return of_global()


def of_global():
    return GLOBAL.gain


HELD: list[Gain] = []


class ByListOfModels(Gain):
    def through(self):
        return HELD[0].gain


GLOBAL = Gain()


@pytest.mark.parametrize(
    ("make", "where"),
    [
        (lambda: setattr(model := Gain(), "where", weakref.ref(model)) or model, "the attribute 'where'"),
        (ByGlobalVariable, "the method 'through'"),
        (ByFunction, "the method 'found'"),
        (ByListOfModels, "the method 'through'"),
    ],
)
def test_what_copies_would_share_is_refused_if_it_refers_to_the_model(monkeypatch, make, where):
    model = seeded(make)
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", model)
    monkeypatch.setattr(sys.modules[__name__], "HELD", [model])
    with pytest.raises(ntkbench.BadInput, match=rf"a function that uses model itself \({where}\)"):
        ntkbench.Kernel(model, X)


class Unregistered(nn.Module):
    """Its second layer is trainable, but not among its parameters."""

    def __init__(self):
        super().__init__()
        self.first, self.others = nn.Linear(4, 5), [nn.Linear(5, 3)]

    def forward(self, x):
        return self.others[0](self.first(x).tanh())


class Hidden(Unregistered):
    def __init__(self):
        super().__init__()
        self.second = self.others[0]

    def named_parameters(self, *args, **kwargs):
        return ((key, w) for key, w in super().named_parameters(*args, **kwargs) if key.startswith("first"))


@pytest.mark.parametrize("make", [Unregistered, Hidden])
def test_trainable_tensors_that_are_no_parameters_are_left_out_with_a_note(make):
    model = seeded(make)
    twin = seeded(Hidden)
    twin.second.requires_grad_(False)
    expected = ntkbench.trace(twin, X)
    assert expected.notes == ()
    for method in ("auto", "batched_jacobian", "block_u_statistics", "hutchpp", "per_sample_trace_forward"):
        passes = None if method in ("auto", "batched_jacobian") else 60
        found, of_twin = (ntkbench.trace(each, X, method=method, passes=passes) for each in (model, twin))
        assert found.value == pytest.approx(of_twin.value, rel=1e-5)
        assert found.notes[-1].startswith("J leaves out tensors with requires_grad=True that are not among")
    assert "structured_derivatives" in str(ntkbench.recommend(model, X))
    assert all(w.grad is None for w in (*model.first.parameters(), *model.others[0].parameters()))


class Keeping(nn.Module):
    """Keeps a tensor that its first call computes from a parameter."""

    def __init__(self):
        super().__init__()
        self.layer, self.kept = nn.Linear(4, 3), None

    def forward(self, x):
        if self.kept is None:
            self.kept = self.layer.weight.tanh().sum(0)
        return self.layer(x * self.kept)


def test_a_network_that_keeps_a_part_of_its_graph_is_refused_in_one_line():
    says = "^the network keeps a tensor that its first call computed from parameters, [^:]*: compute it in each call$"
    for use in (ntkbench.trace, ntkbench.ntk, lambda m, x: ntkbench.norm(m, x, method="naive_jacobian")):
        with pytest.raises(ntkbench.BadInput, match=says):
            use(seeded(Keeping), X)


class Conditional(nn.Module):
    """Two branches, of which torch compiles both."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return torch.cond(x.sum() > 0, lambda x: self.layer(x).sin(), lambda x: self.layer(x).cos(), (x,))


def test_a_network_with_branches_that_torch_compiles_still_works_afterwards():
    model = seeded(Conditional)
    outputs = model(X).detach()
    expected = own_theta(model, X).trace()
    assert ntkbench.trace(model, X).value == pytest.approx(float(expected), rel=1e-5)
    with pytest.raises(ntkbench.BadInput):
        ntkbench.trace(model, X, method="structured_derivatives")
    assert torch.equal(model(X), outputs)


def test_a_proxy_refers_to_the_copy():
    class ByProxy(Gain):
        def through(self):
            return self.proxy.gain

    model = seeded(ByProxy)
    object.__setattr__(model, "proxy", weakref.proxy(model))
    kernel = ntkbench.Kernel(model, X)
    expected = kernel.trace().value * 9
    assert kernel.at({"gain": torch.tensor(6.0)}).trace().value == pytest.approx(expected, rel=1e-5)


def test_references_to_other_models_are_allowed(monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "GLOBAL", seeded(Gain))
    model = seeded(ByGlobalVariable)
    model.unused = weakref.ref(GLOBAL)
    assert ntkbench.trace(model, X).value > 0


def test_a_hook_that_is_a_method_uses_the_copy():
    model = seeded(Shown)
    model.body.register_forward_hook(model.show)
    with torch.no_grad():
        model(X)
    shown = model.shown
    check(model, X)
    assert model.shown is shown


@pytest.mark.parametrize(
    "model",
    [
        pytest.param(nn.EmbeddingBag(9, 3), id="bag"),
        pytest.param(nn.Sequential(nn.Embedding(9, 3, sparse=True), nn.Flatten()), id="sparse"),
    ],
)
def test_embedding_tables_are_supported(model):
    check(model, torch.arange(10).reshape(5, 2) % 9)


# Alignment


def test_alignment_uses_the_statistics_of_each_end():
    ends = []
    for seed in range(2):
        make = lambda: nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 2))  # noqa: E731
        model = seeded(make, seed)
        model[0].bias.requires_grad_(False)
        model(2 * X + seed)
        ends.append(model)
    for mode in (False, True):
        thetas = [explicit(model.train(mode), X).numpy() for model in ends]
        exact = metrics_of(*thetas)["alignment"]
        for method in ("auto", "direct", "naive_jacobian", *(() if mode else ("jacobian_contraction",))):
            found = ntkbench.alignment(*ends, X, method=method, dtype="float64")
            assert float(found) == pytest.approx(exact, rel=1e-9), method
    problem = ntkbench.from_module(ends[0].eval(), X, ends[1].eval())
    assert "1.running_mean" in problem.fixed_0 and "0.bias" in problem.fixed_f
    assert problem.digest() != ntkbench.from_module(ends[0], X, ends[0]).digest()


class Fixed(nn.BatchNorm1d):
    """torch's own forward with a flag: it uses the running statistics in train mode too."""

    def forward(self, x):
        off = self.running_mean is None
        return nn.functional.batch_norm(x, self.running_mean, self.running_var, self.weight, self.bias, off, 0.1)


class Counted(nn.BatchNorm1d):
    def forward(self, x):
        return self.weight * x * (1 if self.num_batches_tracked is None else 2 + self.num_batches_tracked) + self.bias


class Activated(nn.BatchNorm1d):
    def forward(self, x):
        return torch.tanh(super().forward(x))


class ReadByParent(nn.Sequential):
    def forward(self, x):
        mean = self[1].running_mean
        return self[2](self[0](x) - (0 if mean is None else self[1].weight * mean))


@pytest.mark.parametrize("new", [False, True])
@pytest.mark.parametrize(
    ("kind", "kept"),
    [(Fixed, True), (Counted, True), (ReadByParent, True), (Activated, False), (nn.BatchNorm1d, False)],
)
def test_running_statistics_in_train_mode_are_kept_if_they_are_read(kind, kept, new):
    """Also those of a new layer, 0 and 1, which may have no effect yet."""

    def make(new=False):
        norm = nn.BatchNorm1d(5) if kind is ReadByParent else kind(5)
        outer = kind if kind is ReadByParent else nn.Sequential
        made = outer(nn.Linear(4, 5), norm, nn.Linear(5, 2)).double()
        if not new:
            norm.running_mean.normal_(), norm.running_var.uniform_(0.5, 2)
        return made

    one, other = seeded(functools.partial(make, new)), seeded(make, 1)
    x = X.double()
    with own_settings("float64"):
        thetas = [explicit(model, x) for model in (one, other)]
    check(one, x)
    kernel = ntkbench.Kernel(one, x)
    assert any("running" in key for key, _ in kernel.problem.module.named_buffers()) == kept
    for weights in (other, other.state_dict()):
        torch.testing.assert_close(kernel.at(weights).ntk(), thetas[1])
    expected = metrics_of(*(theta.numpy() for theta in thetas))["alignment"]
    assert float(ntkbench.alignment(one, other, x)) == pytest.approx(expected, rel=1e-9)


def test_non_persistent_buffers_count():
    ends = []
    for scale in (1.0, 2.0):
        model = seeded(lambda: Lambda(lambda self, x: (self.layer(x) * self.scale).tanh()))
        model.register_buffer("scale", torch.tensor(scale), persistent=False)
        ends.append(model)
    exact = metrics_of(*(explicit(model, X).numpy() for model in ends))["alignment"]
    assert float(ntkbench.alignment(*ends, X, dtype="float64")) == pytest.approx(exact, rel=1e-9)


# Recurrent layers


@pytest.mark.parametrize("layer", [nn.RNN, nn.GRU, nn.LSTM])
def test_recurrent_layers_take_their_own_layout(layer):
    x = seeded(lambda: torch.randn(7, 2, 4))
    late = seeded(lambda: layer(4, 3))
    first = layer(4, 3, batch_first=True)
    first.load_state_dict(late.state_dict())
    theta = explicit(late, x)
    for metric, value in metrics_of(theta.numpy()).items():
        for model, inputs in ((late, x), (first, x.transpose(0, 1))):
            assert float(getattr(ntkbench, metric)(model, inputs, dtype="float64")) == pytest.approx(value, rel=1e-9)
    problem = ntkbench.from_recurrent(late, x)
    assert (problem.N, problem.output_shape) == (2, (2, 7, 3))
    with pytest.raises(ntkbench.BadInput, match="batch_first differs"):
        ntkbench.alignment(late, first, x)
    with pytest.raises(ntkbench.BadInput, match=r"\[T, N, \.\.\.\].*got shape \(7, 4\)"):
        ntkbench.trace(late, x[:, 0])


def test_a_recurrence_of_parameters_that_do_not_exist_is_refused():
    model = seeded(lambda: Lambda(lambda self, x: self.layer(x), recurrence=Recurrence("rnn", {"weight_ih": "none"})))
    with pytest.raises(ntkbench.BadInput, match="declares a recurrence that cannot be computed"):
        ntkbench.trace(model, X[None])


# The last layer


LAST = {
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 2)),
    "weight_norm without bias": lambda: nn.utils.parametrizations.weight_norm(nn.Linear(5, 2, bias=False)),
    "weight_norm of old": lambda: nn.utils.weight_norm(nn.Linear(5, 2)),
    "spectral_norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(5, 2)),
    "spectral_norm of old": lambda: nn.utils.spectral_norm(nn.Linear(5, 2)),
    "orthogonal": lambda: nn.utils.parametrizations.orthogonal(nn.Linear(5, 2)),
    "plain": lambda: nn.Linear(5, 2),
}


@pytest.mark.parametrize("branching", [False, True])
@pytest.mark.parametrize("kind", LAST)
def test_the_last_layer_has_all_parameters_of_its_weight(kind, branching):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.last, self.first = LAST[kind](), nn.Linear(4, 5)  # not in the order of use

        def forward(self, x):
            if branching and x.sum() > 1e6:
                return x
            return self.last(self.first(x).tanh())

    model = seeded(Net).eval()
    for key, w in model.named_parameters():
        w.requires_grad_(key.startswith("last"))
    theta = explicit(model, X).reshape(6, 2, 6, 2).diagonal(dim1=1, dim2=3).mean(-1)
    model.requires_grad_(True)
    assert torch.allclose(ntkbench.ntk(model, X, kernel="last_layer", dtype="float64"), theta, rtol=1e-9, atol=1e-9)


class TwoHeads(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.policy, self.value = nn.Linear(4, 5), nn.Linear(5, 3), nn.Linear(5, 1)

    def forward(self, x):
        features = self.body(x).tanh()
        return self.policy(features), self.value(features)


def test_the_last_layer_is_one_that_the_outputs_depend_on():
    model = seeded(TwoHeads)
    with torch.no_grad():
        features = torch.tanh(X.double() @ model.body.weight.double().T + model.body.bias.double())
    kernel = ntkbench.Kernel(model, X, output=lambda outputs: outputs[0], dtype="float64")
    for _ in range(2):  # from an explicit J, then layer by layer
        torch.testing.assert_close(kernel.ntk(kernel="last_layer"), features @ features.T + 1)


def test_the_last_layer_may_be_hidden_from_the_graph():
    """As by reentrant checkpointing."""
    assert list(last_layer(ntkbench.from_module(Asking(), X)).theta_0) == ["layer.weight", "layer.bias"]


# Ambient settings


def settings():
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        torch.is_autocast_enabled("cpu"),
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.cudnn.allow_tf32,
        torch.backends.mkldnn.matmul.fp32_precision,
        torch.get_default_device(),
    )


@pytest.fixture
def restored():
    yield
    torch.set_float32_matmul_precision("highest")


@pytest.mark.parametrize(
    "ambient",
    [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16), lambda: torch.device("meta")],
)
@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_own_settings_restore_those_of_the_caller(ambient, precision, restored):
    torch.set_float32_matmul_precision(precision)
    with ambient():
        before = settings()
        with pytest.raises(KeyError), own_settings("float64", "cpu"):
            inside = settings()
            raise KeyError
        assert settings() == before
    assert inside[:5] == (True, False, False, torch.float64, "highest")
    assert inside[7] == torch.device("cpu")
    assert inside[6] in ("ieee", "none")


@pytest.mark.parametrize(
    "ambient", [torch.no_grad, torch.inference_mode, lambda: torch.autocast("cpu", torch.bfloat16)]
)
def test_wrapping_works_under_any_setting(ambient):
    theta = float(explicit(seeded(Residual), X).trace())
    with ambient():
        model, x = seeded(Residual), X.clone()
        problem = ntkbench.from_module(model, x, model)
        assert not problem.samples_interact
        assert float(ntkbench.trace(model, x)) == pytest.approx(theta, rel=1e-4)
        assert len(problem.digest()) == 16
    with ambient():
        layer = seeded(lambda: nn.GRU(4, 3, batch_first=True))
        assert ntkbench.from_recurrent(layer, x[None]).N == 1


def test_hooks_on_saved_tensors_do_not_reach_kernels_and_are_left_as_they_were():
    model, packed = seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 2))).double(), []
    x = X.double()
    theta = explicit(model, x)
    outer, inner = (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda kept: kept.double())
        for pack in (lambda t: t.half(), lambda t: packed.append(t) or t.bfloat16())
    )
    with outer:
        with inner:
            kernel = ntkbench.Kernel(model, x)
            for _ in range(2):  # from an explicit J, then layer by layer
                torch.testing.assert_close(kernel.ntk(), theta, rtol=1e-12, atol=1e-12)
            assert float(kernel.norm()) == pytest.approx(float(theta.norm()), rel=1e-12)
            assert not packed
            (g,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
            assert packed
        count = len(packed)
        (h,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    assert len(packed) == count and not torch.equal(g, h)
    (exact,) = torch.autograd.grad(model(x).square().sum(), model[0].weight)
    assert not torch.equal(h, exact)


def test_a_surrounding_fake_tensor_mode_is_reported():
    model = seeded(lambda: nn.Linear(4, 3))
    with FakeTensorMode(allow_non_fake_inputs=True):
        for call in (ntkbench.trace, ntkbench.ntk, ntkbench.Kernel, ntkbench.from_module):
            with pytest.raises(ntkbench.BadInput, match="inside a FakeTensorMode tensors have no values"):
                call(model, X)


# What cannot be wrapped


class Returns(nn.Module):
    def __init__(self, returns):
        super().__init__()
        self.layer, self.returns = nn.Linear(4, 3), returns

    def forward(self, x):
        return self.returns(self.layer(x))


class Two(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x, mask):
        return self.layer(x) * mask


def with_nan() -> nn.Linear:
    layer = nn.Linear(4, 3)
    layer.weight.data[0, 0] = float("nan")
    return layer


def closing_over_itself() -> nn.Module:
    layer = nn.Linear(4, 3)
    layer.forward = lambda x: x @ layer.weight.T  # the original's parameters in every copy
    return layer


def locked() -> nn.Module:
    model = nn.Sequential(nn.Linear(4, 3))
    model[0].lock = threading.Lock()
    return model


def generating() -> nn.Module:
    model = nn.Linear(4, 3)
    model.steps = (i for i in range(3))
    return model


class Copied(nn.Linear):
    """A linear layer that is copied by a given function."""

    def __init__(self, copy):
        super().__init__(4, 3)
        self.copy = copy

    def __deepcopy__(self, memo):
        return self.copy(self)


def starting(self, x):
    if not self.started:
        self.layer.weight.data *= 2
        self.started.fill_(True)
    return self.layer(x)


LAYER = nn.Linear(4, 3)
FAKE = FakeTensorMode()
with FAKE:
    FAKE_LAYER = nn.Linear(4, 3)
WRAP = "wrap the model in a module that takes one tensor and returns one tensor"


@pytest.mark.parametrize(
    ("model", "x", "says"),
    [
        (LAYER, {"x": X}, r"cannot be called on inputs\['x'\] .*unexpected keyword argument 'x'"),
        (LAYER, UserDict(x=X), r"cannot be called on inputs\['x'\] .*unexpected keyword argument 'x'"),
        (LAYER, (X, X), r"cannot be called on inputs\[0\] .*takes 2 positional arguments but 3 were given"),
        (LAYER, [[1.0], [1.0, 2.0]], "inputs must hold at least one tensor"),
        (LAYER, X.numpy(), "got ndarray: use torch.from_numpy"),
        (LAYER, torch.nested.nested_tensor([X, X[:2]]), "got a nested one"),
        (LAYER, X.to_sparse(), "got a sparse coo one"),
        (LAYER, X.to("meta"), "got a meta one"),
        (LAYER, FAKE.from_tensor(X), "got a fake one"),
        (LAYER, torch.quantize_per_tensor(X, 0.1, 0, torch.qint8), "got a quantised one"),
        (LAYER, X.to(torch.complex64), "must be real or integer"),
        (nn.Linear(4, 3, device="meta"), X, "'weight' is a meta one"),
        (FAKE_LAYER, X, "'weight' is a fake one"),
        (Two(), X, rf"takes 2 inputs, forward\(x, mask\), but x is one tensor: {WRAP}"),
        (Returns(lambda y: SimpleNamespace(logits=y)), X, f"got SimpleNamespace: {WRAP}"),
        (Returns(lambda y: (y, y)), X, f"got tuple: {WRAP}"),
        (Returns(lambda y: y.detach()), X, "no output of the model depends on a trainable parameter"),
        (Returns(lambda y: torch.ones(len(y), 2)), X, "no output of the model depends on a trainable parameter"),
        (Returns(lambda y: y / 0), X, "nan or infinite outputs"),
        (Returns(lambda y: torch.complex(y, y)), X, "must return real numbers, got torch.complex64"),
        (LAYER, torch.randn(6, 5), r"cannot be called on x, \(6, 5\) of torch.float32, in float32: RuntimeError"),
        (LAYER, torch.ones(6, 4, dtype=torch.int64), "cannot be called on x"),
        (
            Lambda(starting, started=torch.tensor(False)),
            X,
            "sets its parameter 'layer.weight' when it is called: call it once first",
        ),
        (closing_over_itself(), X, r"a function that uses model itself \(the attribute 'forward'\)"),
        (with_nan(), X, "has nan or infinite weights: 'weight'"),
        (locked(), X, "cannot be copied because of its attribute '0.lock': TypeError"),
        (generating(), X, "cannot be copied because of its attribute 'steps'"),
        (nn.Sequential(Copied(lambda layer: 1 / 0)), X, "copied by the __deepcopy__ of Copied: ZeroDivisionError"),
        (Copied(lambda layer: None), X, "copied by the __deepcopy__ of Copied: it returns NoneType"),
        (
            Copied(lambda layer: layer),
            X,
            "copied by the __deepcopy__ of Copied: the copy shares the parameter 'weight'",
        ),
        (Copied(lambda layer: nn.Linear(4, 2)), X, "by the __deepcopy__ of Copied: the copy has other parameters"),
        (nn.Linear(4, 3).half(), X, "choose the precision to compute in"),
    ],
)
def test_what_cannot_be_wrapped_is_refused_in_one_line(model, x, says):
    for call in (ntkbench.trace, ntkbench.ntk):
        with pytest.raises(ntkbench.BadInput, match=says) as caught:
            call(model, x)
        assert "\n" not in str(caught.value)


def recurring(frozen: bool) -> nn.Module:
    """A layer that is called at three places, under three names."""
    layer = nn.Linear(4, 4).requires_grad_(not frozen)
    return nn.Sequential(layer, nn.Linear(4, 4), nn.Tanh(), layer, nn.Tanh(), layer)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(
    "method", ["naive_jacobian", "batched_jacobian", "jacobian_contraction", "structured_derivatives"]
)
def test_a_layer_with_several_names_keeps_its_values(frozen, method):
    model, other = (seeded(lambda: recurring(frozen), seed) for seed in range(2))
    check(model, X)
    with own_settings("float64"):
        theta, theta_f = explicit(model, X), explicit(other, X)
    kernel = ntkbench.Kernel(model, X, dtype="float64")
    for _ in range(2):  # the copies of the network that are kept are used again
        assert float(kernel.norm(method=method)) == pytest.approx(float(theta.norm()), rel=1e-9)
        assert float(kernel.at(other).norm(method=method)) == pytest.approx(float(theta_f.norm()), rel=1e-9)
    found = kernel.norm(method="hutchinson", passes=400)
    assert found.interval(0.9999)[0] < float(theta.norm()) < found.interval(0.9999)[1]
    assert type(kernel.problem.module[0].weight) is nn.Parameter and not kernel.problem.module[0].weight.is_meta


class Asking(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = seeded(lambda: nn.Linear(4, 3))

    def forward(self, x):
        x = x.requires_grad_() if x.is_leaf else x
        return torch.utils.checkpoint.checkpoint(self.layer, x, use_reentrant=True).tanh()


def test_a_network_may_require_gradients_of_its_input_in_place():
    """As reentrant checkpointing and physics-informed networks do."""
    model, x = Asking(), X.clone()
    with own_settings("float64"):
        theta = explicit(nn.Sequential(model.layer, nn.Tanh()), x)
    torch.testing.assert_close(ntkbench.ntk(model, x, dtype="float64"), theta)
    assert float(ntkbench.trace(model, x, dtype="float64")) == pytest.approx(float(theta.trace()), rel=1e-9)
    assert not x.requires_grad
