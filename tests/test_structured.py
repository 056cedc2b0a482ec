"""Exact kernels by layers: every kind of layer against explicit Jacobians, and the identities that kernels obey."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.nn.utils import parametrizations
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

import ntkbench
from ntkbench.errors import BadInput
from ntkbench.layerwise import contraction, sample_kernels
from ntkbench.layerwise.certificate import Certificate
from ntkbench.layerwise.factors import Lookups, Products, Tied
from ntkbench.layerwise.kernel import LayerwiseKernel, mirror
from ntkbench.layerwise.tuning import Tuning
from ntkbench.operators.certificate import Uncertified

ODD = 1e-10
"""Largest difference from the explicit kernel in float64, relative to its largest entry."""


def jacobian(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """J by a loop over outputs of plain autograd, ``[N * O, P]``."""
    theta = [w for w in model.parameters() if w.requires_grad]
    outputs = model(x).reshape(-1)
    rows = [torch.autograd.grad(f, theta, retain_graph=True, materialize_grads=True) for f in outputs]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def double(x: torch.Tensor) -> torch.Tensor:
    return x.double() if x.is_floating_point() else x


def close(a: torch.Tensor, b: torch.Tensor, tolerance: float = ODD) -> bool:
    return a.shape == b.shape and bool((a - b).abs().max() <= tolerance * b.abs().max())


def holds(model: nn.Module, x: torch.Tensor, memory: int = 2**30, tuning: Tuning | None = None) -> LayerwiseKernel:
    """Check kernel, rectangle, diagonal and trace kernel against J; returns the engine."""
    model, x = model.double(), double(x)
    J = jacobian(model, x)
    theta, N = J @ J.T, len(x)
    O = len(J) // N  # noqa: E741
    blocks = theta.view(N, O, N, O)
    parameters = {key: w.detach() for key, w in model.named_parameters() if w.requires_grad}
    engine, values = LayerwiseKernel(model, parameters, x, memory, tuning), list(parameters.values())
    found = engine.kernel(values, x)
    assert close(found, theta)
    assert torch.equal(found, found.T)
    assert close(engine.kernel(values, x[:1], x), blocks[:1].reshape(O, -1))
    assert close(engine.diagonal(values, x).reshape(-1), theta.diagonal())
    assert close(engine.kernel(values, x, fold=True), blocks.diagonal(dim1=1, dim2=3).sum(-1))
    return engine


class Call(nn.Module):
    """A layer that is not called on x alone."""

    def __init__(self, layer: nn.Module, call):
        super().__init__()
        self.layer = layer
        self.call = call

    def forward(self, x):
        return self.call(self.layer, x)


class Bare(nn.Module):
    """Parameters of given shapes, used by a given function."""

    def __init__(self, call, *shapes):
        super().__init__()
        self.weights = nn.ParameterList([torch.randn(shape) for shape in shapes])
        self.call = call

    def forward(self, x):
        return self.call(x, *self.weights)


def tied_autoencoder() -> nn.Module:
    return Bare(lambda x, w: torch.tanh(x @ w.T) @ w, (3, 5))


def tied_embedding() -> nn.Module:
    layer = nn.Embedding(7, 4, padding_idx=1)
    return Call(layer, lambda e, x: torch.tanh(e(x)).mean(1) @ e.weight.T)


def cell(kind: type[nn.Module], **options) -> nn.Module:
    def run(layer, x):
        state = None
        for t in range(x.shape[1]):
            state = layer(x[:, t], state)
        return state[0] if isinstance(state, tuple) else state

    return Call(kind(3, 4, **options), run)


def lora() -> nn.Module:
    return Bare(lambda x, w, a, b: torch.tanh(x @ (w + a @ b)), (5, 4), (5, 2), (2, 4))


def first(layer, x):
    return layer(x)[0]


VECTORS, SEQUENCES, IMAGES = (4, 5), (3, 4, 6), (3, 2, 6, 7)
KINDS = {
    "linear": (lambda: nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 3, bias=False)), VECTORS),
    "linear of sequences": (lambda: nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 2)), SEQUENCES),
    "bilinear": (lambda: Call(nn.Bilinear(5, 5, 3), lambda f, x: f(x, torch.tanh(x))), VECTORS),
    "batch norm, eval": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.BatchNorm2d(4), nn.Tanh()).eval(), IMAGES),
    "batch norm of vectors, eval": (lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)).eval(), VECTORS),
    "layer norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.LayerNorm(5), nn.Tanh()), SEQUENCES),
    "group norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.GroupNorm(2, 4), nn.Tanh()), IMAGES),
    "instance norm": (lambda: nn.Sequential(nn.Conv2d(2, 4, 3), nn.InstanceNorm2d(4, affine=True)), IMAGES),
    "RMS norm": (lambda: nn.Sequential(nn.Linear(6, 5), nn.RMSNorm(5), nn.Tanh()), SEQUENCES),
    "PReLU": (lambda: nn.Sequential(nn.Linear(5, 4), nn.PReLU(4)), VECTORS),
    "max pooling": (lambda: nn.Sequential(nn.Conv2d(2, 3, 3), nn.MaxPool2d(2), nn.Flatten()), IMAGES),
    "attention": (lambda: Call(nn.MultiheadAttention(6, 2, batch_first=True), lambda f, x: f(x, x, x)[0]), SEQUENCES),
    "attention, biased keys": (
        lambda: Call(
            nn.MultiheadAttention(6, 2, batch_first=True, add_bias_kv=True, kdim=6, vdim=3),
            lambda f, x: f(x, x, x[..., :3])[0],
        ),
        SEQUENCES,
    ),
    "transformer layer": (lambda: nn.TransformerEncoderLayer(6, 2, 5, dropout=0.0, batch_first=True), SEQUENCES),
    "transformer layer, eval": (lambda: nn.TransformerEncoderLayer(6, 2, 5, batch_first=True).eval(), SEQUENCES),
    "RNN": (lambda: Call(nn.RNN(6, 3, batch_first=True), first), SEQUENCES),
    "RNN, ReLU, two layers, both ways": (
        lambda: Call(nn.RNN(6, 3, 2, nonlinearity="relu", bidirectional=True, batch_first=True), first),
        SEQUENCES,
    ),
    "GRU": (lambda: Call(nn.GRU(6, 3, batch_first=True), first), SEQUENCES),
    "GRU, time first": (lambda: Call(nn.GRU(6, 3), lambda f, x: f(x.transpose(0, 1))[0].transpose(0, 1)), SEQUENCES),
    "LSTM": (lambda: Call(nn.LSTM(6, 3, batch_first=True), first), SEQUENCES),
    "LSTM, projected, no bias": (
        lambda: Call(nn.LSTM(6, 4, bias=False, proj_size=2, batch_first=True), first),
        SEQUENCES,
    ),
    "RNN cell": (lambda: cell(nn.RNNCell), (3, 4, 3)),
    "GRU cell": (lambda: cell(nn.GRUCell), (3, 4, 3)),
    "LSTM cell": (lambda: cell(nn.LSTMCell, bias=False), (3, 4, 3)),
    "bare parameters on the right": (lambda: Bare(lambda x, w, b: torch.tanh(x @ w) * b, (5, 4), (4,)), VECTORS),
    "bare parameters on the left": (lambda: Bare(lambda x, w: torch.tanh(w @ x), (3, 4)), SEQUENCES),
    "einsum": (lambda: Bare(lambda x, w: torch.einsum("nsd,cd->nsc", x, w).tanh(), (5, 6)), SEQUENCES),
    "experts": (lambda: Bare(lambda x, w: torch.einsum("nsd,sdc->nsc", x, w).tanh(), (4, 6, 2)), SEQUENCES),
    "learned initial state": (lambda: Bare(lambda x, h, w: torch.tanh(x + h @ w), (2,), (2, 5)), VECTORS),
    "learned positions": (lambda: Bare(lambda x, p, w: torch.tanh(x + p) @ w, (4, 6), (6, 2)), SEQUENCES),
    "a gain for all": (lambda: Bare(lambda x, w, s: s * torch.tanh(x @ w), (5, 3), ()), VECTORS),
    "a power": (lambda: Bare(lambda x, w: (1 + x**2) ** w, (5,)), VECTORS),
    "a product of weights": (lora, VECTORS),
    "tied, one transposed": (tied_autoencoder, VECTORS),
    "tied sequences": (lambda: Bare(lambda x, w: torch.tanh(torch.tanh(x @ w.T) @ w).mean(1), (3, 6)), SEQUENCES),
    "tied convolutions": (
        lambda: Bare(lambda x, w: F.conv_transpose2d(torch.tanh(F.conv2d(x, w)), w).mean((2, 3)), (3, 2, 2, 2)),
        IMAGES,
    ),
    "tied, then once more": (lambda: Bare(lambda x, w, v: torch.tanh(x @ w) @ w.T @ v @ w, (5, 4), (5, 5)), VECTORS),
    "called twice": (lambda: Call(nn.Linear(5, 5), lambda f, x: f(torch.tanh(f(x)))), VECTORS),
    "convolution called twice": (
        lambda: Call(nn.Conv2d(2, 2, 3, padding=1), lambda f, x: f(torch.tanh(f(x)))),
        IMAGES,
    ),
    "parts of a weight": (
        lambda: Bare(lambda x, w: torch.cat([torch.tanh(x @ w[:, :2]), x @ w[:, 2:]], -1), (5, 4)),
        VECTORS,
    ),
    "overlapping parts of a weight": (
        lambda: Bare(lambda x, w: torch.cat([torch.tanh(x @ w[:, :3]), x @ w[:, 1:]], -1), (5, 4)),
        VECTORS,
    ),
    "a bias of two layers": (
        lambda: Bare(lambda x, w, b: torch.addmm(b, torch.tanh(x @ w + b), w), (5, 5), (5,)),
        VECTORS,
    ),
    "weight norm": (lambda: parametrizations.weight_norm(nn.Linear(5, 4)), VECTORS),
    "a weight unused": (lambda: Bare(lambda x, w, unused: x @ w, (5, 3), (2, 2)), VECTORS),
}
FALLBACKS = {
    "a product of weights": {"weights.0"},
    "overlapping parts of a weight": {"weights.0"},
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.slow
def test_every_kind_of_layer_against_explicit_jacobians(kind):
    torch.manual_seed(0)
    make, shape = KINDS[kind]
    model, x = make(), torch.randn(shape)
    for norm in model.modules():
        if isinstance(norm, nn.modules.batchnorm._BatchNorm):
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    engine = holds(model, x)
    assert {name for layer in engine.layers for name in layer.parameters} == {
        key for key, _ in model.named_parameters()
    }
    assert set(engine.fallbacks()) == FALLBACKS.get(kind, set())


@pytest.mark.parametrize("padding", [None, 2])
def test_embeddings_have_no_fallbacks(padding):
    torch.manual_seed(0)
    model = Call(nn.Embedding(6, 4, padding_idx=padding), lambda e, x: torch.tanh(e(x)).sum(1))
    assert not holds(model, torch.randint(0, 6, (5, 7))).fallbacks()
    assert not holds(model, torch.randint(0, 6, (5, 1))).fallbacks()
    single = Call(model.layer, lambda e, x: torch.stack([torch.tanh(e(row[0])) for row in x]))  # indices without axes
    assert not holds(single, torch.randint(0, 6, (5, 1))).fallbacks()
    for positions in (1, 4, 40):
        assert not holds(tied_embedding(), torch.randint(0, 7, (3, positions))).fallbacks()


@st.composite
def convolutions(draw):
    """A convolution of some dimension with odd options, and an input that it can take."""
    d = draw(st.integers(1, 3))
    groups = draw(st.sampled_from([1, 1, 2, 3]))
    each = lambda low, high: tuple(draw(st.integers(low, high)) for _ in range(d))  # noqa: E731
    kernel, stride, dilation = each(1, 3), each(1, 3), each(1, 2)
    transposed = draw(st.booleans())
    options = {"stride": stride, "dilation": dilation, "groups": groups, "bias": draw(st.booleans())}
    options["padding"] = each(0, 1) if transposed else each(0, 2)
    if transposed:
        spare = [draw(st.integers(0, max(s, k) - 1)) for s, k in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(spare)
    kind = {1: (nn.Conv1d, nn.ConvTranspose1d), 2: (nn.Conv2d, nn.ConvTranspose2d), 3: (nn.Conv3d, nn.ConvTranspose3d)}
    channels = groups * draw(st.integers(1, 2)), groups * draw(st.integers(1, 2))
    size = tuple(dilation[i] * (kernel[i] - 1) + 1 + draw(st.integers(0, 2)) for i in range(d))
    if transposed:
        assume(
            all(
                (size[i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) >= 2 * options["padding"][i] for i in range(d)
            )
        )
    return kind[d][transposed](*channels, kernel, **options), torch.randn(2, channels[0], *size)


@settings(max_examples=40)
@given(drawn=convolutions(), seed=st.integers(0, 2**16))
@pytest.mark.slow
def test_convolutions_of_all_options(drawn, seed):
    torch.manual_seed(seed)
    layer, x = drawn
    shape = layer(x).shape
    if shape.numel() > 400:
        layer = nn.Sequential(layer, nn.Flatten(), nn.Tanh(), nn.Linear(shape[1:].numel(), 2))
    assert not holds(nn.Sequential(layer, nn.Tanh()), x).fallbacks()


FRAMES = {
    "conv1d": (lambda: nn.Conv1d(2, 3, 2, stride=2), (2, 5)),
    "conv2d": (lambda: nn.Conv2d(2, 4, 2, padding=1, groups=2), (2, 2, 2)),
    "transposed conv1d": (lambda: nn.ConvTranspose1d(2, 3, 2, stride=2, output_padding=1), (2, 3)),
    "transposed conv2d": (lambda: nn.ConvTranspose2d(2, 4, 2, groups=2), (2, 2, 2)),
}


@pytest.mark.parametrize("memory", [2**30, 9000])
@pytest.mark.parametrize("kind", FRAMES)
def test_convolutions_of_several_images_of_a_sample(kind, memory):
    torch.manual_seed(0)
    make, shape = FRAMES[kind]

    def mean(f, x):
        """The mean over the images of a sample, at every fifth output."""
        return f(x.flatten(0, 1)).tanh().flatten(1).unflatten(0, (len(x), -1)).mean(1)[:, ::5]

    model = Call(make(), mean)
    x = torch.randn(3, 2, *shape)
    assert not holds(model, x, memory).fallbacks()
    J = jacobian(model, x.double())
    theta = J @ J.T
    found = ntkbench.norm(model, x.double(), method="structured_derivatives", memory=memory)
    assert float(found) == pytest.approx(float(theta.norm()), rel=1e-10)


@settings(max_examples=25)
@given(
    sizes=st.lists(st.integers(1, 5), min_size=2, max_size=4),
    N=st.integers(1, 5),
    positions=st.integers(0, 3),
    bias=st.booleans(),
    memory=st.integers(1, 20_000),
)
@pytest.mark.slow
def test_linear_networks_of_all_shapes_in_any_memory(sizes, N, positions, bias, memory):
    torch.manual_seed(0)
    layers = [layer for a, b in itertools.pairwise(sizes) for layer in (nn.Linear(a, b, bias), nn.Tanh())]
    holds(nn.Sequential(*layers), torch.randn(N, *[positions] * (positions > 0), sizes[0]), memory)


@settings(max_examples=15)
@given(memory=st.integers(1, 300_000))
@pytest.mark.slow
def test_kernels_do_not_depend_on_the_memory(memory):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.ReLU(), nn.Flatten(), nn.Linear(48, 4))
    holds(model, torch.randn(5, 1, 6, 6), memory)


@st.composite
def tunings(draw) -> Tuning:
    """Sizes so small that every branch is taken, and costs that force one order of summation or the other."""
    return Tuning(
        triangle_blocks=draw(st.integers(1, 9)),
        block_rows=draw(st.integers(1, 5)),
        columns=draw(st.integers(1, 9)),
        cache_bytes=draw(st.integers(1, 2000)),
        entry_cost=draw(st.sampled_from([-1e9, 8, 1e9])),
        group_cost=draw(st.sampled_from([-math.inf, math.inf])),
        tile=draw(st.integers(1, 7)),
    )


@settings(max_examples=30)
@given(
    N=st.integers(1, 6),
    K=st.integers(1, 4),
    positions=st.integers(0, 3),
    memory=st.sampled_from([20_000, 2**30]),
    tuning=tunings(),
)
@pytest.mark.slow
def test_kernels_do_not_depend_on_the_tuning(N, K, positions, memory, tuning):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, K))
    holds(model, torch.randn(N, *[positions] * (positions > 0), 4), memory, tuning)


@given(N=st.integers(1, 6), K=st.integers(1, 5), tile=st.integers(1, 31))
def test_the_lower_triangle_is_mirrored_in_tiles(N, K, tile):
    size = N * K
    lower = torch.arange(1.0, size**2 + 1).reshape(size, size)
    theta = lower.clone().reshape(N, K, N, K)
    mirror(theta, tile)
    assert torch.equal(theta.reshape(size, size), lower.tril() + lower.tril(-1).T)


@pytest.mark.parametrize("memory", [2**30, 600])
def test_every_sample_is_certified(memory):
    model = Call(nn.Linear(1, 1, bias=False).double(), lambda f, x: f(x) * (1 + torch.relu(-x).sum()))
    parameters = {"layer.weight": torch.ones(1, 1).double()}
    x = torch.tensor([[1.0], [2.0], [-1.0]]).double()  # the third one changes the others
    engine = LayerwiseKernel(model, parameters, x, memory)
    theta = list(parameters.values())
    engine.kernel(theta, x[:2])
    with pytest.raises(Uncertified, match="differs from that of plain autograd"):
        engine.kernel(theta, x)
    with pytest.raises(Uncertified):
        engine.kernel(theta, x[:2], x)
    with pytest.raises(Uncertified):
        engine.diagonal(theta, x)
    engine = LayerwiseKernel(model, parameters, x, memory, Tuning(certified=False))
    assert engine.kernel(theta, x).shape == (3, 3) and engine.certificate is None


def test_every_layer_is_certified(monkeypatch):
    model = nn.Sequential(nn.Linear(4, 3), nn.Tanh(), nn.Linear(3, 2)).double()
    parameters = {key: w.detach() for key, w in model.named_parameters()}
    engine = LayerwiseKernel(model, parameters, X.double(), 2**30)
    add = Certificate.add

    def of_one(self, samples, directions, layer, factors):
        if layer.parameters[0] == "2.weight":
            add(self, samples, directions, layer, factors)

    monkeypatch.setattr(Certificate, "add", of_one)
    with pytest.raises(Uncertified, match="some layers were not computed"):
        engine.kernel(list(parameters.values()), X.double())


def factors(N: int, K: int, groups: int, C: int, D: int, S: int) -> Products:
    return Products(torch.randn(N, groups, D, S).double(), torch.randn(N, K, groups, C, S).double())


@given(
    N=st.tuples(st.integers(1, 5), st.integers(1, 5)),
    K=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    groups=st.integers(1, 3),
    C=st.integers(1, 4),
    D=st.integers(1, 4),
    S=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    memory=st.integers(1, 5000),
    tuning=tunings(),
    symmetric=st.booleans(),
)
def test_contractions_are_products_of_explicit_gradients(N, K, groups, C, D, S, memory, tuning, symmetric):
    torch.manual_seed(0)
    left = factors(N[0], K[0], groups, C, D, S[0])
    right = left if symmetric else factors(N[1], K[1], groups, C, D, S[1])
    rows = [torch.einsum("ngds,nkgcs->nkgcd", f.a, f.g).flatten(2).flatten(0, 1) for f in (left, right)]
    expected = rows[0] @ rows[1].T
    theta = torch.zeros(left.g.shape[0], left.g.shape[1], right.g.shape[0], right.g.shape[1]).double()
    contraction.add(theta, left, None if symmetric else right, memory, tuning)
    diagonal = contraction.diagonal(left, memory, tuning)
    found = theta.flatten(2).flatten(0, 1)
    found, expected = (found.tril(), expected.tril()) if symmetric else (found, expected)
    assert close(found, expected)
    assert close(diagonal.reshape(-1), (rows[0] ** 2).sum(1))


@given(
    N=st.integers(1, 5),
    K=st.integers(1, 3),
    C=st.integers(1, 3),
    S=st.integers(1, 4),
    memory=st.integers(1, 2000),
    tuning=tunings(),
)
def test_lookups_are_products_with_unit_vectors(N, K, C, S, memory, tuning):
    torch.manual_seed(0)
    numbers, g = torch.randint(-1, 4, (N, S)), torch.randn(N, K, C, S).double()
    units = F.one_hot(numbers.clamp(min=0), 4).double() * (numbers >= 0)[..., None]
    rows = torch.einsum("nsv,nkcs->nkvc", units, g).reshape(N * K, -1)
    theta = torch.zeros(N, K, N, K).double()
    contraction.add(theta, Lookups(numbers, g), None, memory, tuning)
    assert torch.allclose(theta.flatten(2).flatten(0, 1).tril(), (rows @ rows.T).tril(), atol=1e-12)
    diagonal = contraction.diagonal(Lookups(numbers, g), memory, tuning)
    assert torch.allclose(diagonal.reshape(-1), (rows**2).sum(1), atol=1e-12)


@given(
    N=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    K=st.tuples(st.integers(1, 3), st.integers(1, 3)),
    C=st.integers(1, 4),
    D=st.integers(1, 4),
    S=st.tuples(st.integers(1, 4), st.integers(1, 4)),
    table=st.booleans(),
    symmetric=st.booleans(),
    folded=st.booleans(),
    memory=st.integers(1, 5000),
    tuning=tunings(),
)
def test_a_tied_weight_is_the_sum_of_both_its_uses(N, K, C, D, S, table, symmetric, folded, memory, tuning):
    torch.manual_seed(0)

    def made(N, K, S, T):
        other = factors(N, K, 1, D, C, T)
        if not table:
            one = factors(N, K, 1, C, D, S)
            return Tied(one, other), torch.einsum("nds,nkcs->nkcd", one.a[:, 0], one.g[:, :, 0])
        one = Lookups(torch.randint(-1, D, (N, S)), torch.randn(N, K, C, S).double())
        units = F.one_hot(one.rows.clamp(min=0), D).double() * (one.rows >= 0)[..., None]
        return Tied(one, other), torch.einsum("nsd,nkcs->nkcd", units, one.g)

    K = (K[0], K[0]) if folded else K
    sets = [made(N[0], K[0], *S), made(N[1], K[1], *S[::-1])]
    left, right = sets[0], sets[0] if symmetric else sets[1]
    rows = [(one + torch.einsum("nct,nkdt->nkcd", t.other.a[:, 0], t.other.g[:, :, 0])) for t, one in (left, right)]
    c = torch.randn(N[0], K[0]).double()
    expected = torch.einsum("nk,nkcd->dc" if table else "nk,nkcd->cd", c, rows[0])
    torch.testing.assert_close(left[0].gradient(c).reshape(expected.shape), expected, rtol=1e-10, atol=1e-10)
    rows = [r.flatten(2).flatten(1)[:, None] if folded else r.flatten(2) for r in rows]
    one, other = (t.folded() if folded else t for t, _ in (left, right))
    theta = torch.zeros(N[0], rows[0].shape[1], len(rows[1]), rows[1].shape[1]).double()
    contraction.add(theta, one, None if symmetric else other, memory, tuning)
    found, expected = theta.flatten(2).flatten(0, 1), rows[0].flatten(0, 1) @ rows[1].flatten(0, 1).T
    found, expected = (found.tril(), expected.tril()) if symmetric else (found, expected)
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    if not folded:
        squares = contraction.diagonal(left[0], memory, tuning)
        torch.testing.assert_close(squares, rows[0].square().sum(-1), rtol=1e-10, atol=1e-10)


class Largest(TorchDispatchMode):
    """Bytes of the largest tensor that is made, apart from views of earlier tensors."""

    def __init__(self, before: list[torch.Tensor]) -> None:
        super().__init__()
        self.before = {t.untyped_storage().data_ptr() for t in before}
        self.nbytes = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        made = function(*args, **(kwargs or {}))
        storages = [t.untyped_storage() for t in tree_leaves(made) if isinstance(t, torch.Tensor)]
        self.nbytes = max(self.nbytes, *(s.nbytes() for s in storages if s.data_ptr() not in self.before), 0)
        return made


@pytest.mark.parametrize("sums", [contraction.SUMMED, contraction.BETWEEN, contraction.OWN])
@pytest.mark.parametrize("table", [False, True])
def test_cross_terms_of_tied_weights_stay_within_the_memory(table, sums):
    N, K, S, D, memory = 1, 5, 40, 6, 2**13
    straight, transposed = factors(N, K, 1, 3, D, S), factors(N, K, 1, D, 3, S)
    looked_up = Lookups(torch.randint(-1, D, (N, S)), straight.g[:, :, 0])
    tied = Tied(looked_up if table else straight, transposed)
    with Largest([t for part in (tied.one, tied.other) for t in vars(part).values()]) as largest:
        contraction._crossed(tied, tied, sums, memory)
    assert largest.nbytes <= memory < S * S * K * 8


def test_the_cheaper_order_of_summation_is_chosen():
    cheaper = functools.partial(contraction.pairwise_is_cheaper, symmetric=True, tuning=Tuning())
    many_channels, many_positions = factors(4, 2, 1, 64, 64, 2), factors(4, 2, 1, 2, 2, 64)
    depthwise = factors(4, 2, 64, 1, 9, 4)
    assert cheaper(many_channels, many_channels)
    assert not cheaper(many_positions, many_positions)
    assert not cheaper(depthwise, depthwise)


@pytest.fixture(scope="module")
def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(48, 6), nn.Tanh(), nn.Linear(6, 4))
    x = torch.randn(7, 1, 6, 6).double()
    model = model.double()
    return model, x, jacobian(model, x)


def test_kernels_between_samples_are_what_they_say(network):
    model, x, J = network
    N, O = len(x), 4  # noqa: E741
    rows = J.view(N, O, -1)
    u = torch.from_numpy(sample_kernels._random_vector(O, 3))[0]
    last = rows[..., -(6 * O + O) :]
    expected = {
        "full": J @ J.T,
        "sum_of_logits": rows.sum(1) @ rows.sum(1).T / O,
        "single_logit": rows[:, 0] @ rows[:, 0].T,
        "random_vector": (rows * u[:, None]).sum(1) @ (rows * u[:, None]).sum(1).T,
        "trace": torch.einsum("aop,bop->ab", rows, rows) / O,
        "last_layer": torch.einsum("aop,bop->ab", last, last) / O,
    }
    assert set(expected) == set(sample_kernels.KERNELS)
    for name, theta in expected.items():
        assert close(ntkbench.ntk(model, x, kernel=name, seed=3), theta), name
        rest = theta[: O * 5 if name == "full" else 5, O * 2 if name == "full" else 2 :]
        assert close(ntkbench.ntk(model, x[:5], x[2:], kernel=name, seed=3, memory=20_000), rest), name


def test_the_last_layer_of_a_linear_readout_is_the_kernel_of_its_features(network):
    model, x, _ = network
    features = model[:-1](x).detach()
    assert close(ntkbench.ntk(model, x, kernel="last_layer"), features @ features.T + 1)


def test_the_trace_kernel_is_the_nearest_kernel_between_samples(network):
    """||pNTK ⊗ I - Theta||^2 = ||T ⊗ I - Theta||^2 + O ||pNTK - T||^2; lambda_max(pNTK) <= lambda_max(Theta)."""
    model, x, _ = network
    theta, pntk, T = (ntkbench.ntk(model, x, kernel=k) for k in ("full", "sum_of_logits", "trace"))
    eye = torch.eye(4).double()
    left = (torch.kron(pntk, eye) - theta).square().sum()
    right = (torch.kron(T, eye) - theta).square().sum() + 4 * (pntk - T).square().sum()
    assert float(left) == pytest.approx(float(right), rel=1e-12)
    assert torch.linalg.eigvalsh(pntk)[-1] <= torch.linalg.eigvalsh(theta)[-1]


def test_linear_models_duplicates_and_permutations():
    torch.manual_seed(0)
    x = torch.randn(6, 5).double()
    linear = nn.Linear(5, 3, bias=False).double()
    assert close(ntkbench.ntk(linear, x), torch.kron(x @ x.T, torch.eye(3).double()), 1e-14)
    model = nn.Sequential(nn.Linear(5, 4), nn.Tanh(), nn.Linear(4, 2)).double()
    theta = ntkbench.ntk(model, torch.cat([x, x[2:3]])).view(7, 2, 7, 2)
    assert close(theta[6], theta[2], 1e-14)
    order = torch.randperm(6)
    both = ntkbench.ntk(model, x).view(6, 2, 6, 2), ntkbench.ntk(model, x[order]).view(6, 2, 6, 2)
    assert close(both[1], both[0][order][:, :, order], 1e-14)


def test_frozen_parameters_do_not_contribute(network):
    model, x, J = network
    model[0].weight.requires_grad_(False)
    try:
        assert close(ntkbench.ntk(model, x), J[:, 27:] @ J[:, 27:].T)
    finally:
        model[0].weight.requires_grad_(True)


def test_single_precision_is_close_and_torch_is_left_as_it_was(network):
    model, x, J = network
    before = torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled(), torch.random.get_rng_state()
    theta = ntkbench.ntk(model, x, dtype="float32")
    assert theta.dtype == torch.float32
    assert close(theta.double(), J @ J.T, 1e-5)
    assert before[:2] == (torch.backends.mha.get_fastpath_enabled(), torch._C._get_mkldnn_enabled())
    assert torch.equal(before[2], torch.random.get_rng_state())


@pytest.mark.parametrize("memory", [2**18, 2**20])
def test_unit_vectors_of_many_outputs_are_never_made_all_at_once(monkeypatch, memory):
    """O x O numbers would be 68 GB for a vocabulary of 4,096 at 32 positions."""
    made, empty, zeros = [], torch.Tensor.new_empty, torch.Tensor.new_zeros

    def noted(make):
        return lambda self, *size, **more: (
            made.append(torch.Size(size[0] if len(size) == 1 else size)) or make(self, *size, **more)
        )

    net = nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 1024)).float()
    x = torch.randn(2, 3)
    exact = ntkbench.trace(net, x, method="structured_derivatives")
    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "new_empty", noted(empty))
        patch.setattr(torch.Tensor, "new_zeros", noted(zeros))
        found = ntkbench.trace(net, x, method="structured_derivatives", memory=memory)
    assert float(found) == pytest.approx(float(exact), rel=1e-5)
    assert made and max(4 * size.numel() for size in made) <= memory


def test_the_jacobian_is_never_held():
    """Ten wide layers hold little more than one, and less than the Jacobian of one."""
    peaks = {}
    for depth in (1, 10):
        torch.manual_seed(0)
        layers = [layer for _ in range(depth) for layer in (nn.Linear(64, 64), nn.ReLU())]
        model, x = nn.Sequential(*layers, nn.Linear(64, 5)), torch.randn(20, 64)
        parameters = {key: w.detach() for key, w in model.named_parameters()}
        engine = LayerwiseKernel(model, parameters, x, 2**30)
        directions = torch.eye(5).expand(20, -1, -1)
        peaks[depth] = engine.program(engine.layers, list(parameters.values()), x, directions).peak
    activations = 9 * 2 * 20 * 64 * 4
    assert peaks[10] <= peaks[1] + activations
    assert peaks[10] < 20 * 5 * 64 * 64 * 4


def test_weights_normalised_by_columns_count_the_cotangents_of_their_inputs():
    """They are inner products of cotangents with directions: D / C times as many as the cotangents."""
    torch.manual_seed(0)
    N, D, S = 3, 16, 16
    layer = parametrizations.weight_norm(nn.Conv1d(4, 1, 4, bias=False), dim=2)
    model, x = nn.Sequential(layer, nn.Tanh(), nn.Flatten()), torch.randn(N, 4, S + 3)
    engine = holds(model, x)
    assert [layer.computed is not None for layer in engine.layers] == [True]
    values = [w.detach() for w in model.parameters()]
    program = engine.program(engine.layers, values, x.double(), torch.eye(S).double().expand(N, -1, -1))
    assert program.peak >= 8 * N * S * D * S


def test_a_program_of_shared_directions_does_not_serve_others():
    """Directions of each sample take more memory."""
    model, shared = nn.Linear(4, 3).double(), torch.eye(3).double().expand(6, -1, -1)
    values = [w.detach() for w in model.parameters()]

    def held(*directions: torch.Tensor) -> int:
        engine = LayerwiseKernel(model, dict(zip(("weight", "bias"), values, strict=True)), X.double(), 2**30)
        return [engine.program(engine.layers, values, X.double(), each).held for each in directions][-1]

    assert held(shared, shared.contiguous()) == held(shared.contiguous())


class Branch(nn.Linear):
    def forward(self, x):
        return torch.cat([super(Branch, self).forward(row if row.sum() > 0 else -2 * row) for row in x[:, None]])


X = torch.linspace(-1, 1, 24).reshape(6, 4)


@pytest.mark.parametrize(
    ("says", "call"),
    [
        ("allowed: full, last_layer, random_vector", lambda: ntkbench.ntk(nn.Linear(4, 2), X, kernel="pntk")),
        ("interact.*model.eval", lambda: ntkbench.ntk(nn.Sequential(nn.Linear(4, 2), nn.BatchNorm1d(2)), X, X)),
        ("Dropout in train mode.*model.eval", lambda: ntkbench.ntk(nn.Sequential(nn.Linear(4, 2), nn.Dropout()), X)),
        ("the second inputs must hold samples like the first", lambda: ntkbench.ntk(nn.Linear(4, 2), X, X[:, :3])),
        ("the second inputs must be a torch tensor", lambda: ntkbench.ntk(nn.Linear(4, 2), X, X.numpy())),
        ("memory must be a positive whole number of bytes", lambda: ntkbench.ntk(nn.Linear(4, 2), X, memory=0)),
        ("seed must be a whole number", lambda: ntkbench.ntk(nn.Linear(4, 2), X, seed=0.5)),
    ],
)
def test_bad_input_is_named(says, call):
    with pytest.raises(BadInput, match=says):
        call()


def test_auto_works_where_a_network_cannot_be_traced():
    torch.manual_seed(0)
    net = Branch(4, 2).double()
    x = X.double()
    rows = [torch.autograd.grad(y, tuple(net.parameters()), retain_graph=True) for y in net(x).reshape(-1)]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    theta = J @ J.T
    few = x[:2]  # fewer outputs than parameters
    estimate = ntkbench.norm(net, few)
    assert float(estimate) == pytest.approx(float(theta[: 2 * len(few), : 2 * len(few)].norm()), rel=1e-12)
    assert estimate.method == "jacobian_contraction"
    note = estimate.notes[-1]
    assert note.startswith("passed over structured_derivatives: ") and "cannot be traced" in note
    torch.testing.assert_close(ntkbench.ntk(net, x), theta, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(ntkbench.ntk(net, x, x[:2], memory=2000), theta[:, :4], rtol=1e-10, atol=1e-12)


def test_fallbacks_are_noted_and_logged(caplog):
    torch.manual_seed(0)
    model = Call(nn.Linear(8, 6, bias=False), lambda f, x: torch.cat([x, x.sin()], 1) @ (f.weight**3).T)
    (note,) = ntkbench.norm(model, X).notes
    assert note == "layer.weight written out: no rule for its use in aten.pow.Tensor_Scalar"
    kernel = ntkbench.Kernel(model, X)
    kernel.ntk()  # at its first use, from an explicit J
    assert "are written out" not in caplog.text
    kernel.ntk()
    assert "gradients of layer.weight are written out" in caplog.text
    assert ntkbench.norm(nn.Linear(4, 2), X).notes == ()


def one_hot(lookups: Lookups, V: int) -> Products:
    """The same gradients, with unit vectors as inputs."""
    found = lookups.rows[:, None] == torch.arange(V)[:, None]
    return Products(found.to(lookups.g.dtype)[:, None], lookups.g[:, :, None])


@given(
    sizes=st.tuples(*[st.integers(1, 4)] * 6),
    V=st.integers(1, 5),
    symmetric=st.booleans(),
    memory=st.sampled_from([1, 2000, 2**30]),
    seed=st.integers(0, 5),
)
@settings(max_examples=60, deadline=None)
def test_lookups_of_a_row_many_times_or_of_no_row(sizes, V, symmetric, memory, seed):
    """Positions of a sample with the same row add up; -1 is padding."""
    N1, N2, K, C, S, T = sizes
    rng = torch.Generator().manual_seed(seed)

    def made(N, positions):
        rows = torch.randint(-1, V, (N, positions), generator=rng)
        return Lookups(rows, torch.randn(N, K, C, positions, generator=rng, dtype=torch.float64))

    one, other = made(N1, S), made(N2, T)
    N2 = N1 if symmetric else N2
    tuning, kernels = Tuning(block_rows=2, columns=1), []
    for left, right in ((one, other), (one_hot(one, V), one_hot(other, V))):
        theta = torch.zeros(N1, K, N2, K, dtype=torch.float64)
        contraction.add(theta, left, None if symmetric else right, memory, tuning)
        kernels.append(theta.view(N1 * K, -1).tril() if symmetric else theta)
        squares = contraction.diagonal(left, memory, tuning)
        explicit = one_hot(one, V).explicit(slice(None), slice(None))
        torch.testing.assert_close(squares, explicit.square().sum(-1))
    torch.testing.assert_close(*kernels)


def test_the_cost_of_an_embedding_is_linear_in_the_length_of_sequences():
    costs = []
    for S in (64, 1024):
        rows, g = torch.randint(0, 4, (2, S)), torch.randn(2, 1, 8, S)
        with FlopCounterMode(display=False) as counter:
            contraction.diagonal(Lookups(rows, g), 2**30, Tuning())
            contraction.add(torch.zeros(2, 1, 2, 1), Lookups(rows, g), None, 2**30, Tuning())
        costs.append(counter.get_total_flops())
    assert costs[1] <= 16 * costs[0]


def test_a_branch_without_entries():
    class Empty(nn.Module):
        def __init__(self):
            super().__init__()
            self.none, self.all = nn.Linear(0, 5), nn.Linear(3, 5)

        def forward(self, x):
            return self.none(x[:, :0]) + self.all(x).tanh()

    holds(Empty(), torch.randn(3, 3))
