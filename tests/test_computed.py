"""Weights that are computed from parameters: normalised, standardised, scaled; kernels against explicit Jacobians."""

from __future__ import annotations

import functools
import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations, parametrize

import ntkbench
from ntkbench.layerwise import contraction
from ntkbench.layerwise.factors import Products, Weighted
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.layerwise.tuning import Tuning
from ntkbench.operators.certificate import Uncertified

CONVOLUTIONS = {
    "conv1d": (nn.Conv1d, 1),
    "conv2d": (nn.Conv2d, 2),
    "transposed conv1d": (nn.ConvTranspose1d, 1),
    "transposed conv2d": (nn.ConvTranspose2d, 2),
}


def jacobian(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """J by a loop over outputs of plain autograd, ``[N * O, P]``."""
    theta = [w for w in model.parameters() if w.requires_grad]
    rows = [torch.autograd.grad(f, theta, retain_graph=True, materialize_grads=True) for f in model(x).reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def engine_of(model: nn.Module, x: torch.Tensor, memory: int = 2**30) -> tuple[LayerwiseKernel, list[torch.Tensor]]:
    parameters = {key: w.detach() for key, w in model.named_parameters() if w.requires_grad}
    return LayerwiseKernel(model, parameters, x, memory), list(parameters.values())


def holds(model: nn.Module, x: torch.Tensor, memory: int = 2**30) -> LayerwiseKernel:
    """Check kernel, rectangle, diagonal and trace kernel against J; returns the engine for inspection."""
    J, N = jacobian(model, x), len(x)
    theta, O = J @ J.T, len(J) // N  # noqa: E741
    engine, values = engine_of(model, x, memory)
    close = functools.partial(torch.testing.assert_close, rtol=1e-9, atol=1e-10 * float(theta.abs().max()))
    found = engine.kernel(values, x)
    close(found, theta)
    assert torch.equal(found, found.T)
    close(engine.kernel(values, x[:1], x), theta[:O])
    close(engine.diagonal(values, x).reshape(-1), theta.diagonal())
    close(engine.kernel(values, x, fold=True), theta.view(N, O, N, O).diagonal(dim1=1, dim2=3).sum(-1))
    return engine


def old_weight_norm(layer: nn.Module, dim: int | None) -> nn.Module:
    with warnings.catch_warnings(category=FutureWarning, action="ignore"):
        return nn.utils.weight_norm(layer, dim=dim)


NORMS = {
    "weight_norm": lambda layer, dim: parametrizations.weight_norm(layer, dim=dim),
    "weight_norm, hooks": old_weight_norm,
    "spectral_norm": lambda layer, dim: parametrizations.spectral_norm(layer).eval(),
}


def moved(model: nn.Module) -> nn.Module:
    """The model in float64, with parameters perturbed, since initial ones are often special."""
    model = model.double().eval()
    with torch.no_grad():
        for w in model.parameters():
            w.add_(0.3 * torch.randn_like(w))
    return model


def before_readout(layer: nn.Module, x: torch.Tensor, calls: int = 1) -> nn.Module:
    """The layer, called one or more times in a row, and a readout to two outputs."""
    steps = [each for _ in range(calls) for each in (layer, nn.Tanh())]
    body = moved(nn.Sequential(*steps))
    return nn.Sequential(body, nn.Flatten(), nn.Linear(body(x)[0].numel(), 2)).double()


def is_by_rule(engine: LayerwiseKernel) -> bool:
    return not engine.fallbacks() and any(layer.computed for layer in engine.layers)


@st.composite
def normalised_layers(draw):
    """A linear layer or a convolution with a normalised weight, some of its parameters frozen, and an input."""
    kind = draw(st.sampled_from(["linear", *CONVOLUTIONS]))
    norm = draw(st.sampled_from(list(NORMS)))
    bias, square = draw(st.booleans()), draw(st.booleans())
    if kind == "linear":
        D = draw(st.integers(2, 9))
        positions = draw(st.integers(0, 3))
        layer: nn.Module = nn.Linear(D, D if square else draw(st.integers(1, 9)), bias)
        shape = (3, *[positions] * (positions > 0), D)
    else:
        make, d = CONVOLUTIONS[kind]
        groups = draw(st.sampled_from([1, 2]))
        inside = groups * draw(st.integers(1, 3))
        outside = inside if square else groups * draw(st.integers(1, 3))
        kernel = draw(st.sampled_from([1, 3]))
        layer = make(inside, outside, kernel, padding=kernel // 2, groups=groups, bias=bias)
        shape = (3, inside, *[4] * d)
    layer = NORMS[norm](layer, draw(st.sampled_from([0, 1, None])))
    calls = 2 if layer(torch.zeros(shape)).shape == shape and draw(st.booleans()) else 1
    names = [key for key, _ in layer.named_parameters() if "bias" not in key]
    frozen = draw(st.sampled_from([None, *names])) if len(names) > 1 else None
    for key, w in layer.named_parameters():
        w.requires_grad_(key != frozen)
    return layer, shape, calls


@settings(max_examples=20)
@given(drawn=normalised_layers(), memory=st.sampled_from([2**30, 30_000]), seed=st.integers(0, 2**16))
@pytest.mark.slow
def test_normalised_layers_of_all_options(drawn, memory, seed):
    torch.manual_seed(seed)
    layer, shape, calls = drawn
    x = torch.randn(shape).double()
    assert is_by_rule(holds(before_readout(layer, x, calls), x, memory))


class Standardised(nn.Conv2d):
    """A convolution with a standardised weight, with or without a gain; see timm's StdConv2d and ScaledStdConv2d."""

    def __init__(self, *sizes: int, gain: bool, eps: float, groups: int, batch_norm: bool) -> None:
        super().__init__(*sizes, groups=groups)
        self.gain = nn.Parameter(torch.rand(self.out_channels, 1, 1, 1) + 0.5) if gain else None
        self.eps, self.batch_norm = eps, batch_norm

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        w = self.weight
        if self.batch_norm:
            gain = None if self.gain is None else (0.3 * self.gain).view(-1)
            w = F.batch_norm(w.reshape(1, len(w), -1), None, None, gain, training=True, momentum=0.0, eps=self.eps)
            w = w.reshape_as(self.weight)
        else:
            variance, mean = torch.var_mean(w, dim=(1, 2, 3), keepdim=True, unbiased=False)
            w = (w - mean) / (variance + self.eps).sqrt()
            w = w if self.gain is None else self.gain * w
        return self._conv_forward(x, w, self.bias)


@pytest.mark.parametrize(("groups", "gain", "batch_norm"), [(1, True, False), (2, False, True)])
def test_standardised_convolutions(groups, gain, batch_norm):
    check_standardised(groups, (2, 2), 2, gain, batch_norm, 1e-6, 2**30)


@settings(max_examples=15)
@given(
    groups=st.sampled_from([1, 2]),
    channels=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    size=st.integers(1, 3),
    gain=st.booleans(),
    batch_norm=st.booleans(),
    eps=st.sampled_from([1e-6, 0.1]),
    memory=st.sampled_from([2**30, 30_000]),
)
@pytest.mark.slow
def test_standardised_convolutions_of_all_options(groups, channels, size, gain, batch_norm, eps, memory):
    check_standardised(groups, channels, size, gain, batch_norm, eps, memory)


def check_standardised(groups, channels, size, gain, batch_norm, eps, memory):
    torch.manual_seed(0)
    inside, outside = (groups * c for c in channels)
    if inside // groups * size**2 == 1:
        size = 2  # a single entry is standardised to zero
    layer = Standardised(inside, outside, size, gain=gain, eps=eps, groups=groups, batch_norm=batch_norm)
    x = torch.randn(3, inside, 4, 4).double()
    assert is_by_rule(holds(before_readout(layer, x), x, memory))


class Weight(nn.Module):
    """A linear layer whose weight is a function of parameters."""

    def __init__(self, make, *shapes):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])
        self.make = make

    def forward(self, x):
        return x @ self.make(*self.weights).T


MADE = {
    "a gain for each output": (lambda g, v: g[:, None] * v, (4,), (4, 7)),
    "a gain for each input": (lambda g, v: g * v, (7,), (4, 7)),
    "a gain for all": (lambda g, v: g * v, (), (4, 7)),
    "a number times the weight": (lambda v: v * 7**-0.5, (4, 7)),
    "a mask of inputs": (lambda v: v * (torch.arange(7) % 2), (8, 7)),
    "rows of norm one": (lambda v: F.normalize(v, dim=1), (4, 7)),
    "columns of norm one": (lambda v: F.normalize(v, dim=0), (8, 7)),
    "a norm that is no function": (lambda v: v / v.detach().norm(), (4, 7)),
    "a matrix that is transposed": (lambda v: F.normalize(v, dim=0).T, (7, 4)),
    "a softmax of few": (lambda v: v.softmax(0), (4, 7)),
}
NOT_OF_THE_FORM = {
    "cubes": (lambda v: v**3, (8, 7)),
    "symmetric": (lambda v: (v + v.T) / 2, (7, 7)),
    "a product and a sum": (lambda w, a, b: w + a @ b, (4, 7), (4, 2), (2, 7)),
    "a mask": (lambda v: v * ((torch.arange(7) + torch.arange(8)[:, None]) % 2), (8, 7)),
    "two uses of a parameter": (lambda v: F.normalize(v, dim=1) * v.sin(), (4, 7)),
}


@pytest.mark.parametrize("kind", [*MADE, *NOT_OF_THE_FORM])
def test_weights_of_the_assumed_form_have_a_rule(kind):
    torch.manual_seed(0)
    model = moved(Weight(*(MADE | NOT_OF_THE_FORM)[kind]))
    x = torch.randn(3, 7).double()
    assert is_by_rule(holds(nn.Sequential(model, nn.Tanh()), x)) == (kind in MADE)


class TwoWeights(nn.Module):
    """Two weights that share their directions, or a weight whose parameter is also used directly."""

    def __init__(self, call):
        super().__init__()
        self.v, self.g = nn.Parameter(torch.randn(6, 6)), nn.Parameter(torch.randn(6, 1))
        self.call = call

    def forward(self, x):
        return self.call(x, F.normalize(self.v, dim=1), self.v, self.g)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, v, g: torch.tanh(x @ w.T) @ v.T,
        lambda x, w, v, g: torch.tanh(x @ w.T) @ (g * v).T,
        lambda x, w, v, g: torch.tanh(x @ (g * w).T) @ w.T,
        lambda x, w, v, g: torch.tanh(x @ w.T) @ w,
        lambda x, w, v, g: torch.tanh(x @ w.T) * g[:, 0],
        lambda x, w, v, g: torch.cat([x @ w[:3].T, torch.tanh(x) @ w[2:].T], 1),
    ],
    ids=["as it is", "two weights", "one in another", "transposed", "with a gain", "overlapping parts"],
)
def test_parameters_that_are_shared_between_weights(call):
    torch.manual_seed(0)
    holds(moved(TwoWeights(call)), torch.randn(3, 6).double())


def test_the_readout_alone_and_alignment_with_other_weights():
    torch.manual_seed(0)
    make = lambda: nn.Sequential(  # noqa: E731
        parametrizations.weight_norm(nn.Linear(5, 8)), nn.Tanh(), parametrizations.weight_norm(nn.Linear(8, 3), dim=1)
    )
    one, other = moved(make()), moved(make())
    x = torch.randn(4, 5).double()
    engine, values = engine_of(one, x)
    J = jacobian(one, x)
    last = J[:, -sum(w.numel() for w in one[2].parameters()) :]
    torch.testing.assert_close(engine.kernel(values, x, last_layer=True), last @ last.T, rtol=1e-9, atol=1e-12)
    a, b = J @ J.T, jacobian(other, x) @ jacobian(other, x).T
    exact = float((a * b).sum() / (a.norm() * b.norm()))
    assert float(ntkbench.alignment(one, other, x, method="structured_derivatives")) == pytest.approx(exact, rel=1e-10)


@pytest.mark.parametrize("scale", [1e-3, 1.0, 1e3])
def test_single_precision_is_accurate_for_any_norm_of_the_direction(scale):
    torch.manual_seed(0)
    model = before_readout(parametrizations.weight_norm(nn.Linear(40, 30)), torch.randn(6, 40).double())
    with torch.no_grad():
        model[0][0].parametrizations.weight.original1.mul_(scale)
    x = torch.randn(6, 40).double()
    J = jacobian(model, x)
    engine, values = engine_of(model.float(), x.float())
    found = engine.kernel(values, x.float()).double()
    assert is_by_rule(engine)
    assert (found - J @ J.T).abs().max() < 2e-6 * (J @ J.T).abs().max()


class Masked(nn.Module):
    """A parametrisation by a mask, which is a multiple of the identity only where the mask is constant."""

    def __init__(self, mask):
        super().__init__()
        self.mask = nn.Buffer(mask)

    def forward(self, w):
        return w * self.mask


def masked(mask: torch.Tensor) -> nn.Module:
    layer = nn.Linear(7, 4)
    parametrize.register_parametrization(layer, "weight", Masked(mask))
    return moved(nn.Sequential(layer, nn.Tanh()))


def test_values_that_change_the_form_of_a_weight_are_detected():
    torch.manual_seed(0)
    whole, parts = masked(torch.ones(4, 7)), masked((torch.rand(4, 7) > 0.5).float())
    x = torch.randn(5, 7).double()
    engine, _ = engine_of(whole, x)
    assert is_by_rule(engine)
    with pytest.raises(Uncertified, match="original have other inner products"):
        other = LayerwiseKernel(parts, dict(parts.named_parameters()), x, 2**30, trace=engine.trace)
        other.kernel([w.detach() for w in parts.parameters()], x)
    kernel = ntkbench.Kernel(whole, x)
    for model in (whole, parts, whole):
        J = jacobian(model, x)
        for _ in range(2):
            torch.testing.assert_close(kernel.at(model).ntk(), J @ J.T, rtol=1e-9, atol=1e-12)
        assert float(kernel.at(model).norm()) == pytest.approx(float((J @ J.T).norm()), rel=1e-9)


def test_peak_memory_is_below_the_size_of_a_jacobian():
    torch.manual_seed(0)
    peaks = []
    for norm in (lambda layer: layer, parametrizations.weight_norm):
        model, x = nn.Sequential(norm(nn.Linear(64, 64)), nn.ReLU(), nn.Linear(64, 5)), torch.randn(20, 64)
        engine, values = engine_of(model, x)
        peaks.append(engine.program(engine.layers, values, x, torch.eye(5).expand(20, -1, -1)).peak)
    assert peaks[1] < 2 * peaks[0] < 20 * 5 * 64 * 64 * 4


def test_a_trace_stores_no_parameter_values():
    torch.manual_seed(0)
    model = nn.Sequential(parametrizations.weight_norm(nn.Linear(64, 48)), nn.Tanh())
    engine, _ = engine_of(model, torch.randn(3, 64))
    assert engine.trace.nbytes <= 48 * 8


@settings(max_examples=40)
@given(
    N=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    K=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    groups=st.integers(1, 2),
    C=st.integers(1, 4),
    D=st.integers(1, 4),
    S=st.integers(1, 3),
    directions=st.integers(0, 3),
    by_columns=st.booleans(),
    symmetric=st.booleans(),
    folded=st.booleans(),
    memory=st.integers(1, 5000),
)
def test_contractions_weight_products_by_m(N, K, groups, C, D, S, directions, by_columns, symmetric, folded, memory):
    torch.manual_seed(0)
    K = (K[0], K[0]) if folded else K
    c = torch.rand((groups, 1, D) if by_columns else (groups, C, 1)).double()
    q, b = torch.randn(directions, groups, C, D).double(), torch.randn(directions).double()
    M = torch.diag(c.expand(groups, C, D).reshape(-1)) + torch.einsum("rp,r,rq->pq", q.flatten(1), b, q.flatten(1))

    def made(N: int, K: int) -> tuple[Weighted, torch.Tensor]:
        own = Products(torch.randn(N, groups, D, S).double(), torch.randn(N, K, groups, C, S).double())
        G = torch.einsum("ngds,nkgcs->nkgcd", own.a, own.g).flatten(2)
        return Weighted(own, c, G @ q.flatten(1).T, b, gram=None), G

    (left, G), (right, H) = made(N[0], K[0]), made(N[1], K[1])
    right, H = (left, G) if symmetric else (right, H)
    expected = torch.einsum("nkp,pq,mlq->nkml", G, M, H)
    diagonal = expected.diagonal(dim1=0, dim2=2).diagonal(dim1=0, dim2=1)
    tuning = Tuning()
    if symmetric:
        torch.testing.assert_close(contraction.diagonal(left, memory, tuning), diagonal, rtol=1e-10, atol=1e-10)
    if folded:
        expected = expected.diagonal(dim1=1, dim2=3).sum(-1)[:, None, :, None]
        left, right = left.folded(), right.folded()
    theta = torch.zeros_like(expected)
    contraction.add(theta, left, None if symmetric else right, memory, tuning)
    found, expected = (t.flatten(2).flatten(0, 1) for t in (theta, expected))
    found, expected = (found.tril(), expected.tril()) if symmetric else (found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
