"""Traced programs against explicit Jacobians: operations, and what autograd sees that a tracer does not."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F  # noqa: N812
from torch.utils.checkpoint import checkpoint

from ntkbench.errors import BadInput
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.layerwise.tuning import Tuning


class Two(nn.Module):
    """An operation on the outputs of two linear layers, ``[N, 8]`` each."""

    def __init__(self, operation):
        super().__init__()
        self.one, self.other, self.operation = nn.Linear(5, 8), nn.Linear(5, 8), operation

    def forward(self, x):
        made = self.operation(self.one(x), self.other(x))
        made = torch.view_as_real(made) if made.is_complex() else made
        return made.reshape(len(x), -1)


def explicit(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    theta = list(model.parameters())
    rows = [torch.autograd.grad(f, theta, retain_graph=True, materialize_grads=True) for f in model(x).reshape(-1)]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    return J @ J.T


def layer_by_layer(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    parameters = {key: w.detach() for key, w in model.named_parameters()}
    return LayerwiseKernel(model, parameters, x, 2**28, Tuning(certified=False)).kernel(list(parameters.values()), x)


def holds(model: nn.Module, x: torch.Tensor) -> None:
    """The kernel is right without the help of a certificate."""
    model = model.double()
    expected = explicit(copy.deepcopy(model), x)
    assert bool(expected.isfinite().all()) and bool(expected.any())
    torch.testing.assert_close(layer_by_layer(model, x), expected, rtol=1e-9, atol=1e-9 * float(expected.abs().max()))


@pytest.fixture
def x() -> torch.Tensor:
    torch.manual_seed(0)
    return torch.randn(4, 5).double()


def square(v: torch.Tensor) -> torch.Tensor:
    """Well-conditioned ``[N, 2, 2]``."""
    return v[:, :4].reshape(-1, 2, 2) + 3 * torch.eye(2).double()


def positive(v: torch.Tensor) -> torch.Tensor:
    return square(v) @ square(v).mT + torch.eye(2).double()


def complex_square(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    return torch.complex(square(a), b[:, :4].reshape(-1, 2, 2))


def singular(v: torch.Tensor) -> torch.Tensor:
    """A first row that is zero, but not its derivative."""
    first, second = v[:, :2], v[:, 2:4]
    return torch.stack([first - first.detach(), second], 1)


def wide(v: torch.Tensor) -> torch.Tensor:
    return v[:, :6].reshape(-1, 2, 3)


def zeroed(v: torch.Tensor) -> torch.Tensor:
    """An entry that is zero, but not its derivative."""
    return v - v.detach() * (torch.arange(8) == 2)


def image(v: torch.Tensor) -> torch.Tensor:
    return v.reshape(-1, 1, 2, 4)


L = torch.linalg
MASK = torch.arange(8) % 3 == 0
OPERATIONS = {
    "det": lambda a, b: L.det(square(a)),
    "det of singular matrices": lambda a, b: L.det(singular(a)) + b[:, 0],
    "det of transposed": lambda a, b: L.det(square(a).mT),
    "complex det": lambda a, b: L.det(complex_square(a, b)),
    "slogdet": lambda a, b: L.slogdet(square(a)).logabsdet,
    "complex slogdet": lambda a, b: (
        torch.cat([L.slogdet(complex_square(a, b))[0], 0j + L.slogdet(complex_square(a, b))[1]]).reshape(2, -1).T
    ),
    "logdet": lambda a, b: torch.logdet(positive(a)),
    "solve": lambda a, b: L.solve(square(a), b[:, :4].reshape(-1, 2, 2)),
    "solve for vectors": lambda a, b: L.solve(square(a), b[:, :2]),
    "solve from the right": lambda a, b: L.solve(square(a), b[:, :6].reshape(-1, 3, 2), left=False),
    "solve of transposed": lambda a, b: L.solve(square(a).mT, b[:, :2]),
    "complex solve": lambda a, b: L.solve(complex_square(a, b), torch.complex(a, b)[:, :2]),
    "solve_ex": lambda a, b: L.solve_ex(square(a), b[:, :2])[0],
    "inv": lambda a, b: L.inv(square(a)),
    "tensorsolve": lambda a, b: torch.stack([L.tensorsolve(m, v) for m, v in zip(square(a), b[:, :2], strict=True)]),
    "matrix_power": lambda a, b: L.matrix_power(square(a), -2),
    "matrix_exp": lambda a, b: torch.matrix_exp(square(a)),
    "cholesky": lambda a, b: L.cholesky(positive(a)),
    "cholesky_solve": lambda a, b: torch.cholesky_solve(b[:, :2, None], L.cholesky(positive(a))),
    "cholesky_inverse": lambda a, b: torch.cholesky_inverse(L.cholesky(positive(a))),
    "solve_triangular": lambda a, b: L.solve_triangular(square(a).tril(), b[:, :2, None], upper=False),
    "lu": lambda a, b: torch.cat(L.lu(square(a))[1:], 1),
    "lu_solve": lambda a, b: L.lu_solve(*L.lu_factor(square(a)), b[:, :2, None]),
    "lu_solve, adjoint": lambda a, b: L.lu_solve(*L.lu_factor(square(a)), b[:, :2, None], adjoint=True),
    "lu_solve, shared pivots": lambda a, b: L.lu_solve(
        square(a), torch.tensor([2, 2], dtype=torch.int32).expand(len(a), -1), b[:, :2, None]
    ),
    "qr": lambda a, b: L.qr(square(a)).R,
    "eigh": lambda a, b: L.eigvalsh(positive(a)),
    "eigenvectors": lambda a, b: L.eigh(positive(a)).eigenvectors.square(),
    "svdvals": lambda a, b: L.svdvals(wide(a)),
    "pinv": lambda a, b: L.pinv(wide(a)),
    "lstsq": lambda a, b: L.lstsq(wide(a).mT, b[:, :3, None]).solution,
    "nuclear norm": lambda a, b: L.matrix_norm(square(a), "nuc"),
    "norm at zero": lambda a, b: L.vector_norm(torch.relu(a) * 0, dim=1) + b[:, 0],
    "cdist": lambda a, b: torch.cdist(a.reshape(-1, 4, 2), b.reshape(-1, 4, 2)),
    "cdist, p=1": lambda a, b: torch.cdist(a.reshape(-1, 4, 2), b.reshape(-1, 4, 2), p=1.0),
    "pdist": lambda a, b: torch.stack([F.pdist(r.reshape(4, 2)) for r in a]),
    "cosine similarity": F.cosine_similarity,
    "cumprod with zeros": lambda a, b: zeroed(a).cumprod(1),
    "prod with zeros": lambda a, b: zeroed(a).prod(1),
    "logcumsumexp": lambda a, b: a.logcumsumexp(1),
    "cummax": lambda a, b: a.cummax(1).values,
    "median": lambda a, b: a.median(1).values,
    "quantile": lambda a, b: a.quantile(0.3, dim=1),
    "kthvalue": lambda a, b: a.kthvalue(3).values,
    "max": lambda a, b: a.max(1).values,
    "max pooling": lambda a, b: F.max_pool2d(image(a), 2, 1),
    "max pooling of sequences": lambda a, b: F.max_pool1d(a[:, None], 3, 2),
    "average pooling": lambda a, b: F.adaptive_avg_pool1d(a[:, None], 3),
    "unpooling": lambda a, b: F.max_unpool1d(*F.max_pool1d(a[:, None], 2, return_indices=True), 2),
    "grid_sample": lambda a, b: F.grid_sample(image(a), b.tanh().reshape(-1, 2, 2, 2), align_corners=False),
    "interpolate": lambda a, b: F.interpolate(image(a), scale_factor=1.5, mode="bicubic"),
    "fold": lambda a, b: F.fold(F.unfold(image(a), 2), (2, 4), 2),
    "rfft": lambda a, b: torch.fft.rfft(a),
    "irfft": lambda a, b: torch.fft.irfft(torch.fft.rfft(a) * torch.fft.rfft(b), n=8),
    "fft2": lambda a, b: torch.fft.ifft2(torch.fft.fft2(image(a)) * image(b)).real,
    "hfft": lambda a, b: torch.fft.hfft(torch.complex(a, b), n=8),
    "stft": lambda a, b: torch.stft(a, 4, window=torch.hann_window(4).double(), return_complex=True),
    "conv of two": lambda a, b: F.conv1d(a[None], b.reshape(-1, 1, 8)[:, :, :3], groups=len(a)),
    "index_put": lambda a, b: a.index_put((torch.arange(len(a))[:, None], torch.tensor([[1, 3]])), b[:, :2]),
    "index_add": lambda a, b: a.index_add(1, torch.tensor([0, 0, 2]), b[:, :3]),
    "index_fill": lambda a, b: a.index_fill(1, torch.tensor([1, 3]), 2.0) * b,
    "scatter": lambda a, b: a.scatter(1, b.argsort(-1), b),
    "scatter_reduce": lambda a, b: a.scatter_reduce(1, torch.arange(8).expand_as(a) // 3, b, "amax"),
    "gather": lambda a, b: a.gather(1, b.argmax(1, keepdim=True)),
    "take_along_dim": lambda a, b: a.take_along_dim(b.argsort(1), 1),
    "masked_fill": lambda a, b: a.masked_fill(MASK, 0.0) * b,
    "masked_select": lambda a, b: a.masked_select(MASK).reshape(len(a), -1),
    "boolean mask": lambda a, b: a[:, MASK] * b[:, MASK],
    "roll": lambda a, b: a.roll(2, 1) * b.flip(1),
    "as_strided": lambda a, b: torch.cat([r[None].as_strided((1, 3, 4), (8, 2, 1)) for r in a * 1]),
    "cross entropy": lambda a, b: F.cross_entropy(a, b.argmax(1), reduction="none"),
    "binary cross entropy": lambda a, b: F.binary_cross_entropy_with_logits(
        a, MASK.double().expand_as(a), reduction="none"
    ),
    "KL divergence": lambda a, b: F.kl_div(a.log_softmax(1), b.softmax(1), reduction="none"),
    "local response norm": lambda a, b: F.local_response_norm(a[:, None], 2),
    "normalize": lambda a, b: F.normalize(a),
    "renorm": lambda a, b: a.renorm(2, 0, 0.5),
    "einsum": lambda a, b: torch.einsum("ni,nj->nij", a, b),
    "complex sgn": lambda a, b: torch.sgn(torch.complex(a, b)),
    "angle": lambda a, b: torch.complex(a, b).angle(),
    "sinc": lambda a, b: torch.sinc(zeroed(a)),
    "xlogy": lambda a, b: torch.xlogy(a, b.exp()),
    "trapezoid": lambda a, b: torch.trapezoid(a, b),
    "diff": lambda a, b: a.diff(dim=1),
    "tri": lambda a, b: torch.einsum("ni,nj->nij", a, b).tril(-1),
    "block_diag": lambda a, b: torch.stack([torch.block_diag(p, q) for p, q in zip(square(a), square(b), strict=True)]),
    "layer norm of one": lambda a, b: F.layer_norm(a, (8,)) + F.layer_norm(b[:, :1], (1,)),
    "GLU": lambda a, b: F.glu(a),
    "hardswish": lambda a, b: F.hardswish(3 * a),
}


@pytest.mark.parametrize("name", OPERATIONS)
@pytest.mark.slow
def test_operations_against_explicit_jacobians(name, x):
    holds(Two(OPERATIONS[name]), x)


def under(switch):
    """An operation of which a part is computed with gradients switched off."""

    def operation(a, b):
        with switch():
            scale = a.tanh() * 2
        return scale.clone() * b

    return operation


def regained(a, b):
    with torch.no_grad():
        first = a.tanh()
        with torch.enable_grad():
            second = a.sin()
        first = first + second
    return first * b + second


def clamped_norm(a, b):
    norm = a.norm(dim=1, keepdim=True).clone()
    with torch.no_grad():
        norm.clamp_(min=2.0)
    return b / norm


def clamped_without_gradient(a, b):
    with torch.no_grad():
        scale = a * 2
        scale.clamp_(-0.3, 0.3)
        scale[:, 1] = 0
    return scale * b


def written_states(a, b):
    states = a.new_empty(len(a), 2, 8)
    states[:, 0] = a * b
    states[:, 1].copy_(states[:, 0].tanh() * b)
    return states


def swapped(a, b):
    z = a.clone()
    z[:, 0] = a[:, 1]
    z[:, MASK] = 0.0
    z[z < 0.1] = 0.25
    return z * b


def written_detached(a, b):
    z = a.detach().clone()
    z += 1
    z[:, 0] = b[:, 0]
    return z * b


def by_numpy(a, b):
    return a * torch.from_numpy(np.cumsum(torch.arange(8.0).double().numpy())) + b * float(torch.ones(3).tolist()[0])


def causal(a, b):
    mask = torch.ones(8, 8).tril().bool()
    if mask.all() or not torch.ones_like(a).bool().all():
        return a
    return a * mask.sum().item() + b * mask[3]


SEEN = {
    "no_grad": under(torch.no_grad),
    "inference mode": under(torch.inference_mode),
    "set_grad_enabled": under(lambda: torch.set_grad_enabled(False)),
    "gradients switched on again": regained,
    "in place without gradient": clamped_norm,
    "in place on what has no gradient": clamped_without_gradient,
    "data": lambda a, b: a.data * b,
    "detach": lambda a, b: a.detach() * b,
    "straight-through": lambda a, b: (a.round() - a).detach() + a * b,
    "gate alone": lambda a, b: torch.where(a > 0, b, -b),
    "shape alone": lambda a, b: b + torch.zeros_like(a),
    "states written into a buffer": written_states,
    "item assignment": swapped,
    "item assignment to detached values": written_detached,
    "activations in place": lambda a, b: F.relu_(a) * F.leaky_relu(b * 2, inplace=True),
    "checkpoint": lambda a, b: checkpoint(lambda v: v.tanh() * v, a, use_reentrant=False) * b,
    "constants by NumPy": by_numpy,
    "branches on constants": causal,
}


@pytest.mark.parametrize("name", SEEN)
def test_traces_see_what_autograd_sees(name, x):
    holds(Two(SEEN[name]), x)


def test_reentrant_checkpoints_are_traced_through(x):
    nets = [
        Two(lambda a, b, call=call: call(lambda v: v.tanh() * v, a) * b).double()
        for call in (lambda f, v: f(v), lambda f, v: checkpoint(f, v, use_reentrant=True))
    ]
    nets[1].load_state_dict(nets[0].state_dict())
    torch.testing.assert_close(layer_by_layer(nets[1], x), explicit(nets[0], x), rtol=1e-9, atol=1e-9)


class Energy(nn.Module):
    """A gradient of the network by its inputs, taken in the forward pass."""

    def __init__(self, derivative):
        super().__init__()
        self.hidden, self.readout, self.derivative = nn.Linear(5, 7), nn.Linear(7, 1), derivative

    def energy(self, x):
        h = self.hidden(x)
        return (self.readout(h.tanh()) + (h.softmax(-1) * h.sigmoid().detach()).sum(-1, keepdim=True))[..., 0]

    def forward(self, x):
        return self.derivative(self.energy, x)


def residual(energy, x):
    x = x.clone().requires_grad_()
    (g,) = torch.autograd.grad(energy(x).sum(), x, create_graph=True)
    (h,) = torch.autograd.grad(g[:, 0].sum(), x, create_graph=True)
    return g * h


@pytest.mark.parametrize(
    "derivative",
    [
        residual,
        lambda energy, x: torch.func.vmap(torch.func.grad(energy))(x),
        pytest.param(
            lambda energy, x: torch.func.vmap(torch.func.hessian(energy))(x).flatten(1), marks=pytest.mark.slow
        ),
        lambda energy, x: torch.func.jvp(energy, (x,), (x.cos(),))[1][:, None],
    ],
    ids=["autograd.grad", "func.grad", "func.hessian", "func.jvp"],
)
def test_gradients_inside_forward_are_traced(derivative, x):
    holds(Energy(derivative), x)


class Doubled(torch.autograd.Function):
    @staticmethod
    def forward(ctx, v):
        return v.clone()

    @staticmethod
    def backward(ctx, g):
        return 2 * g


class DoubledForFunctorch(torch.autograd.Function):
    generate_vmap_rule = True

    @staticmethod
    def forward(v):
        return v.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        return 2 * g


def branch(a, b):
    return a if a[0, 0] > 0 else b


def hooked(a, b):
    a.register_hook(lambda g: 2 * g)
    return a * b


def detached_alias(a, b):
    z = a * 1
    z.detach().mul_(2)
    return z * b


@pytest.mark.parametrize(
    ("says", "operation"),
    [
        (r"autograd.Function \(Doubled", lambda a, b: Doubled.apply(a)),
        (r"autograd.Function \(Doubled", lambda a, b, apply=DoubledForFunctorch.apply: apply(a) * b),
        ("depends on x", branch),
        ("depends on x", lambda a, b: a * b.sum().item()),
        ("Python or NumPy", lambda a, b: a * torch.from_numpy(np.tanh(b.detach().numpy()))),
        ("Python or NumPy", lambda a, b: a * torch.tensor(b.detach().tolist())),
        ("random numbers", lambda a, b: a * torch.rand(8)),
        ("detached alias", detached_alias),
        ("a hook", hooked),
    ],
)
def test_what_a_trace_would_get_wrong_is_refused(says, operation, x):
    with pytest.raises(BadInput, match=says):
        layer_by_layer(Two(operation).double(), x)


def test_a_custom_function_without_gradient_is_traced(x):
    holds(Two(lambda a, b: Doubled.apply(a).detach() * b), x)


def test_tracing_leaves_buffers_as_they_were(x):
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(5, 2)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            scale = self.calls + 1
            self.calls += 1
            return self.layer(x) * scale

    model = Counting().double()
    found = layer_by_layer(model, x)
    assert float(model.calls) == 0
    torch.testing.assert_close(found, explicit(model, x), rtol=1e-9, atol=1e-9)
