"""Small networks, each built around one operation, layer or coding pattern."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations, parametrize, rnn
from torch.utils.checkpoint import checkpoint

from zoo import Case, Network

Operation = Callable[..., Any]


class Net(nn.Module):
    """Named submodules and tensors, with a function of the network and its inputs as forward pass."""

    def __init__(self, function: Operation, **parts: Any) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, x)


def around(operation: Operation, after: int = 8, width: int = 8) -> nn.Module:
    """Linear, the operation on ``[N, width]`` with results ``[N, after]``, Linear."""
    parts = {"first": nn.Linear(5, width), "operation": operation, "last": nn.Linear(after, 2)}
    return Net(lambda net, x: net.last(net.operation(net.first(x))), **parts)


def between(operation: Operation) -> nn.Module:
    """An operation on the outputs of two linear layers."""
    parts = {"one": nn.Linear(5, 4), "other": nn.Linear(5, 4), "operation": operation}
    return Net(lambda net, x: net.operation(net.one(x), net.other(x)), **parts)


def image(operation: Operation, after: int, channels: int = 2, size: int = 4) -> nn.Module:
    """Linear, the operation on ``[N, channels, size, size]``, Linear."""
    shape = (-1, channels, size, size)
    return around(Flat(operation, shape), after, channels * size * size)


def sequence(operation: Operation, after: int) -> nn.Module:
    """Linear, the operation on ``[N, 4, 2]``, Linear."""
    return around(Flat(operation, (-1, 4, 2)), after)


class Flat(nn.Module):
    """An operation on reshaped inputs, with flattened outputs."""

    def __init__(self, operation: Operation, shape: tuple[int, ...]) -> None:
        super().__init__()
        self.operation, self.shape = operation, shape

    def forward(self, v: Tensor) -> Tensor:
        return self.operation(v.reshape(self.shape)).flatten(1)


def square(v: Tensor) -> Tensor:
    """The first four entries as ``[N, 2, 2]``."""
    return v[:, :4].reshape(-1, 2, 2)


def positive(v: Tensor) -> Tensor:
    """Positive definite ``[N, 2, 2]``."""
    a = square(v)
    return a @ a.mT + torch.eye(2, dtype=v.dtype)


def column(v: Tensor) -> Tensor:
    """``[N]`` as ``[N, 1]``."""
    return v.unsqueeze(-1)


# --- operations that need more than a line


def swapped(v: Tensor) -> Tensor:
    z = v.clone()
    z[:, 0] = v[:, 1] * v[:, 2]
    z[:, 3:5].mul_(2).add_(v[:, 5:7])
    return z


def filled_buffer(v: Tensor) -> Tensor:
    states, h = torch.zeros(len(v), 4, 2, dtype=v.dtype), v[:, :2]
    for t in range(4):
        h = torch.tanh(h + v[:, 2 * t : 2 * t + 2])
        states[:, t] = h
    return states.flatten(1)


def scattered(v: Tensor) -> Tensor:
    at = torch.tensor([0, 2, 2, 1, 0, 3, 3, 3]).expand(len(v), -1)
    return torch.zeros(len(v), 4, dtype=v.dtype).scatter_add(1, at, v.tanh())


def put(v: Tensor) -> Tensor:
    at = torch.tensor([0, 1, 1, 3])
    return torch.zeros_like(v).index_put((torch.arange(len(v))[:, None], at), v[:, :4] ** 2, accumulate=True)


def masked_by_value(v: Tensor) -> Tensor:
    return v.masked_fill(v < v.detach().mean(-1, keepdim=True), -1.0)


def selected(v: Tensor) -> Tensor:
    return torch.stack([row[row > 0].sum() + row[row <= 0].prod() for row in v])[:, None]


def unpooled(v: Tensor) -> Tensor:
    values, at = functional.max_pool1d(v[:, None], 2, return_indices=True)
    return functional.max_unpool1d(values, at, 2)[:, 0]


def sampled(v: Tensor) -> Tensor:
    return functional.grid_sample(v.reshape(-1, 1, 2, 4), v.tanh().reshape(-1, 2, 2, 2), align_corners=False)


def fourier_filter(net: Net, x: Tensor) -> Tensor:
    z = torch.fft.rfft(torch.tanh(net.first(x)))
    return net.last(torch.fft.irfft(z * torch.view_as_complex(net.filter) * net.fixed, n=8))


def rotations(count: int) -> Tensor:
    return torch.polar(torch.ones(count), torch.rand(count))


def rotary(net: Net, x: Tensor) -> Tensor:
    z = torch.view_as_complex(net.first(x).reshape(-1, 4, 2))
    return net.last(torch.view_as_real(z * net.table).flatten(1).tanh())


def logarithm(v: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(positive(v))
    return ((vectors * values.log()[:, None]) @ vectors.mT).flatten(1)


class Clip(torch.autograd.Function):
    """Clips to [-1, 1], with the gradient of the identity."""

    @staticmethod
    def forward(ctx: Any, v: Tensor) -> Tensor:
        return v.clamp(-1, 1)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad


class Scaled(torch.autograd.Function):
    """tanh(v), with half of its gradient."""

    generate_vmap_rule = True

    @staticmethod
    def forward(v: Tensor) -> Tensor:
        return v.tanh()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (y,) = ctx.saved_tensors
        return 0.5 * grad * (1 - y**2)


def residual(net: Net, x: Tensor) -> Tensor:
    """u_xx + u_x of a network u, as in a physics-informed network."""
    x = x.detach().requires_grad_()
    u = net.body(x)
    (first,) = torch.autograd.grad(u.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first[:, 0].sum(), x, create_graph=True)
    return first[:, 1:2] + second[:, :1]


def energy_and_forces(net: Net, x: Tensor) -> Tensor:
    with torch.enable_grad():
        x = x.detach().requires_grad_()
        energy = net.body(x)
        (forces,) = torch.autograd.grad(energy.sum(), x, create_graph=True)
    return torch.cat([energy, -forces], -1)


def tangent(net: Net, x: Tensor) -> Tensor:
    return torch.func.jvp(net.body, (x,), (torch.ones_like(x),))[1]


def hyper(net: Net, x: Tensor) -> Tensor:
    """A network whose weights are outputs of another network."""
    made = net.makes(x).reshape(-1, 4, 5)
    return torch.func.vmap(lambda w, row: torch.tanh(w @ row))(made, x)


def fixed_point(net: Net, x: Tensor) -> Tensor:
    """The equilibrium of a layer, found without gradients, and one step with them."""
    step = lambda z: torch.tanh(0.2 * net.inner(z) + net.first(x))  # noqa: E731
    with torch.no_grad():
        z = torch.zeros(len(x), 4, dtype=x.dtype)
        while (move := step(z) - z).abs().max() > 1e-12:
            z = z + move
    return step(z)


def integrated(net: Net, x: Tensor) -> Tensor:
    """Euler steps, whose number depends on the largest velocity."""
    velocity = torch.tanh(net.first(x))
    steps = 2 + int(velocity.detach().abs().max().mul(4))
    z = velocity
    for _ in range(steps):
        z = z + torch.tanh(net.inner(z)) / steps
    return z


def branch(net: Net, x: Tensor) -> Tensor:
    h = net.first(x)
    return torch.stack([net.inner(row) if row.sum() > 0 else row.sin() for row in h])


def routed(net: Net, x: Tensor) -> Tensor:
    """The top two of three experts, dispatched by index."""
    weights, chosen = net.gate(x).softmax(-1).topk(2, -1)
    outputs = torch.zeros(len(x), 2, dtype=x.dtype)
    for k, expert in enumerate(net.experts):
        rows, slot = (chosen == k).nonzero(as_tuple=True)
        outputs = outputs.index_add(0, rows, weights[rows, slot, None] * expert(x[rows]))
    return outputs


def packed(net: Net, x: Tensor) -> Tensor:
    padded = net.first(x).reshape(-1, 4, 2)
    lengths = 1 + (x[:, :3] > 0).sum(1)
    states = net.recurrent(rnn.pack_padded_sequence(padded, lengths, batch_first=True, enforce_sorted=False))
    return rnn.pad_packed_sequence(states[0], batch_first=True, total_length=4)[0].flatten(1)


def unrolled(net: Net, x: Tensor) -> Tensor:
    h = c = x.new_zeros(len(x), 3)
    for v in net.first(x).reshape(-1, 4, 2).unbind(1):
        h, c = net.cell(v, (h, c)) if isinstance(net.cell, nn.LSTMCell) else (net.cell(v, h), c)
    return net.last(h)


def propagated(net: Net, x: Tensor) -> Tensor:
    """Two layers of a graph network; each row of x is a node."""
    h = torch.tanh(torch.sparse.mm(net.adjacency.to_sparse(), net.first(x)))
    return net.adjacency @ net.last(h)


def standardised(net: Net, x: Tensor) -> Tensor:
    w = net.conv.weight
    w = (w - w.mean((1, 2), keepdim=True)) / w.std((1, 2), keepdim=True)
    return functional.conv1d(net.first(x)[:, None], w, net.conv.bias, padding=1).flatten(1)


class Symmetric(nn.Module):
    """W as its symmetric part."""

    def forward(self, w: Tensor) -> Tensor:
        return (w + w.mT) / 2


def parametrized(layer: nn.Linear) -> nn.Linear:
    parametrize.register_parametrization(layer, "weight", Symmetric())
    return layer


def checkpointed(*, reentrant: bool) -> nn.Module:
    return Net(
        lambda net, v: checkpoint(net.inner, v, use_reentrant=reentrant),
        inner=nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
    )


def without_gradient(v: Tensor) -> Tensor:
    with torch.no_grad():
        gate = torch.sigmoid(v.flip(-1))
    return v * gate


def hooked(v: Tensor) -> Tensor:
    y = v.tanh()
    if y.requires_grad:
        y.register_hook(lambda grad: 0.3 * grad)
    return y


# --- layers


def recurrent(layer: nn.RNNBase) -> nn.Module:
    """A recurrent layer between linear ones, with samples along the axis that it expects."""
    width = 4 * (layer.proj_size or layer.hidden_size) * (1 + layer.bidirectional)
    return Net(states, first=nn.Linear(5, 8), layer=layer, last=nn.Linear(width, 2))


def states(net: Net, x: Tensor) -> Tensor:
    v = net.first(x).reshape(-1, 4, 2)
    h = net.layer(v)[0] if net.layer.batch_first else net.layer(v.transpose(0, 1))[0].transpose(0, 1)
    return net.last(h.flatten(1))


def cell(made: nn.RNNCellBase) -> nn.Module:
    return Net(unrolled, first=nn.Linear(5, 8), cell=made, last=nn.Linear(3, 2))


def convolution(layer: nn.Module, after: int, shape: tuple[int, ...]) -> nn.Module:
    """Linear, the layer on ``[N, *shape]``, Linear."""
    return around(Flat(nn.Sequential(layer, nn.Tanh()), (-1, *shape)), after, torch.Size(shape).numel())


def attention(net: Net, x: Tensor) -> Tensor:
    v = net.first(x).reshape(-1, 4, 4)
    return net.last(net.layer(v, v, v, need_weights=False)[0].flatten(1))


def decoded(net: Net, x: Tensor) -> Tensor:
    v = net.first(x).reshape(-1, 4, 4)
    mask = nn.Transformer.generate_square_subsequent_mask(4, dtype=x.dtype)
    return net.last(net.layer(v, v.tanh(), tgt_mask=mask, tgt_is_causal=True).flatten(1))


def causal(v: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(v, v.tanh(), v.sin(), is_causal=True)


def attended(layer: nn.Module, function: Operation) -> nn.Module:
    return Net(function, first=nn.Linear(5, 16), layer=layer, last=nn.Linear(16, 2))


def words(function: Operation, **parts: Any) -> Network:
    """A network on integers below 7, four per sample; 0 is padding."""
    return Net(function, **parts), torch.randint(0, 7, (4, 4))


def settled(module: nn.Module) -> nn.Module:
    """The module in eval mode, with random running statistics in its norms."""
    for norm in module.modules():
        if getattr(norm, "running_mean", None) is not None:
            norm.running_mean.normal_()
            norm.running_var.uniform_(0.5, 2)
    return module.eval()


# --- the list

OPERATIONS: dict[str, dict[str, Callable[[], nn.Module | Network]]] = {
    "linear algebra": {
        "det": lambda: around(lambda v: column(torch.linalg.det(square(v))), 1),
        "slogdet": lambda: around(lambda v: column(torch.linalg.slogdet(square(v)).logabsdet), 1),
        "solve": lambda: around(lambda v: torch.linalg.solve(square(v), v[:, 4:6]), 2),
        "triangular solve": lambda: around(
            lambda v: torch.linalg.solve_triangular(
                positive(v).tril(), v[:, 4:].reshape(-1, 2, 2), upper=False
            ).flatten(1),
            4,
        ),
        "inv": lambda: around(lambda v: torch.linalg.inv(square(v)).flatten(1), 4),
        "pinv": lambda: around(lambda v: torch.linalg.pinv(v[:, :6].reshape(-1, 2, 3)).flatten(1), 6),
        "cholesky": lambda: around(lambda v: torch.linalg.cholesky(positive(v)).flatten(1), 4),
        "qr": lambda: around(lambda v: torch.linalg.qr(square(v)).R.flatten(1), 4),
        "eigh": lambda: around(logarithm, 4),
        "svdvals": lambda: around(lambda v: torch.linalg.svdvals(v[:, :6].reshape(-1, 2, 3)), 2),
        "matrix_exp": lambda: around(lambda v: torch.matrix_exp(square(v)).flatten(1), 4),
        "matrix_power": lambda: around(lambda v: torch.linalg.matrix_power(square(v), 3).flatten(1), 4),
        "cdist": lambda: around(lambda v: torch.cdist(v.reshape(-1, 4, 2), v.reshape(-1, 4, 2).tanh()).flatten(1), 16),
        "einsum": lambda: around(lambda v: torch.einsum("nij,njk,nk->ni", square(v), square(v.tanh()), v[:, 6:]), 2),
    },
    "Fourier and complex numbers": {
        "irfft(rfft)": lambda: around(lambda v: torch.fft.irfft(torch.fft.rfft(v), n=8)),
        "rfft.abs": lambda: around(lambda v: torch.fft.rfft(v).abs(), 5),
        "fft2, real and imaginary": lambda: around(
            lambda v: torch.view_as_real(torch.fft.fft2(v.reshape(-1, 2, 4))).flatten(1), 16
        ),
        "Fourier filter": lambda: Net(
            fourier_filter,
            first=nn.Linear(5, 8),
            last=nn.Linear(8, 2),
            filter=nn.Parameter(torch.randn(5, 2)),
            fixed=nn.Buffer(rotations(5)),
        ),
        "rotary table": lambda: Net(
            rotary,
            first=nn.Linear(5, 8),
            last=nn.Linear(8, 2),
            table=nn.Buffer(rotations(4)),
        ),
        "stft": lambda: around(
            lambda v: torch.stft(v, 4, 2, window=v.new_ones(4), return_complex=True).abs().flatten(1), 15
        ),
    },
    "pooling and resampling": {
        "max_pool": lambda: around(lambda v: functional.max_pool1d(v[:, None], 3, 2)[:, 0], 3),
        "avg_pool": lambda: image(lambda v: functional.avg_pool2d(v, 2, 1, 1).sin(), 50),
        "adaptive_max_pool": lambda: image(lambda v: functional.adaptive_max_pool2d(v, 3), 18),
        "lp_pool": lambda: image(lambda v: functional.lp_pool2d(v, 2.0, 2), 8),
        "max_unpool": lambda: around(unpooled),
        "grid_sample": lambda: around(lambda v: sampled(v).flatten(1), 4),
        "interpolate, bicubic": lambda: image(
            lambda v: functional.interpolate(v, size=6, mode="bicubic", align_corners=False).sin(), 72
        ),
        "unfold": lambda: image(lambda v: functional.unfold(v, 2, stride=2).sin(), 32),
        "pad, reflect and circular": lambda: image(
            lambda v: functional.pad(
                functional.pad(v, (1, 1, 0, 1), mode="reflect"), (1, 0, 0, 0), mode="circular"
            ).sin(),
            70,
        ),
        "pixel_shuffle": lambda: image(lambda v: functional.pixel_shuffle(v, 2).sin(), 64, 4),
    },
    "norms": {
        "LayerNorm": lambda: around(nn.LayerNorm(8)),
        "RMSNorm": lambda: around(nn.RMSNorm(8)),
        "GroupNorm": lambda: image(nn.GroupNorm(2, 4), 64, 4),
        "InstanceNorm": lambda: image(nn.InstanceNorm2d(2, affine=True), 32),
        "InstanceNorm, running": lambda: settled(
            image(nn.InstanceNorm2d(2, affine=True, track_running_stats=True), 32)
        ),
        "LocalResponseNorm": lambda: image(nn.LocalResponseNorm(2), 64, 4),
        "BatchNorm, eval": lambda: settled(around(nn.Sequential(nn.BatchNorm1d(8), nn.Tanh()))),
        "normalize": lambda: around(lambda v: functional.normalize(v, dim=-1)),
        "std": lambda: around(lambda v: v.std(-1, keepdim=True), 1),
    },
    "indexing and sorting": {
        "gather": lambda: between(lambda a, b: b.gather(-1, a.argsort(-1))),
        "argmax": lambda: between(lambda a, b: b.gather(-1, a.argmax(-1, keepdim=True))),
        "scatter_add": lambda: around(scattered, 4),
        "index_put, accumulated": lambda: around(put),
        "masked by value": lambda: around(masked_by_value),
        "selected by value": lambda: around(selected, 1),
        "sort": lambda: around(lambda v: v.sort(-1).values),
        "topk": lambda: around(lambda v: v.topk(3, -1).values, 3),
        "median": lambda: around(lambda v: v.median(-1, keepdim=True).values, 1),
        "amax": lambda: around(lambda v: v.amax(-1, keepdim=True), 1),
        "cummax": lambda: around(lambda v: v.cummax(-1).values),
        "cumprod": lambda: around(lambda v: v.cumprod(-1)),
        "logsumexp, cumulative": lambda: around(lambda v: v.logcumsumexp(-1)),
        "unfold of a tensor": lambda: around(lambda v: v.unfold(-1, 3, 1).flatten(1), 18),
        "bucketize": lambda: between(lambda a, b: b * torch.bucketize(a, torch.linspace(-1, 1, 5, dtype=a.dtype))),
    },
    "writing in place": {
        "item assignment": lambda: around(swapped),
        "states written into a buffer": lambda: around(filled_buffer),
        "ReLU in place": lambda: around(lambda v: functional.relu_(v.clone()) * v.sin().add_(1)),
    },
    "convolutions": {
        "Conv1d, circular": lambda: convolution(nn.Conv1d(2, 3, 3, padding=1, padding_mode="circular"), 12, (2, 4)),
        "Conv2d, strided, dilated": lambda: convolution(nn.Conv2d(2, 3, 2, 2, 1, dilation=2), 12, (2, 4, 4)),
        "Conv2d, grouped": lambda: convolution(nn.Conv2d(4, 6, 3, groups=2), 24, (4, 4, 4)),
        "Conv2d, depthwise": lambda: convolution(nn.Conv2d(3, 6, 3, groups=3, padding="same"), 96, (3, 4, 4)),
        "Conv3d": lambda: convolution(nn.Conv3d(2, 3, 2), 24, (2, 3, 3, 3)),
        "ConvTranspose1d": lambda: convolution(nn.ConvTranspose1d(2, 3, 3, 2, 1, 1, 1), 24, (2, 4)),
        "ConvTranspose2d, grouped": lambda: convolution(nn.ConvTranspose2d(4, 4, 2, 2, groups=2), 144, (4, 3, 3)),
        "standardised weights": lambda: Net(standardised, first=nn.Linear(5, 4), conv=nn.Conv1d(1, 2, 3)),
    },
    "attention": {
        "scaled_dot_product, causal": lambda: sequence(causal, 8),
        "MultiheadAttention": lambda: attended(nn.MultiheadAttention(4, 2, batch_first=True), attention),
        "TransformerEncoderLayer, eval": lambda: around(
            Flat(nn.TransformerEncoderLayer(4, 2, 6, batch_first=True), (-1, 2, 4))
        ).eval(),
        "TransformerDecoderLayer": lambda: attended(
            nn.TransformerDecoderLayer(4, 2, 6, dropout=0.0, batch_first=True), decoded
        ),
    },
    "recurrent": {
        "RNN, time first, bidirectional": lambda: recurrent(nn.RNN(2, 3, bidirectional=True)),
        "GRU, time first": lambda: recurrent(nn.GRU(2, 3)),
        "GRU, batch first": lambda: recurrent(nn.GRU(2, 3, batch_first=True)),
        "LSTM, time first": lambda: recurrent(nn.LSTM(2, 3)),
        "LSTM, two layers, projected": lambda: recurrent(nn.LSTM(2, 3, 2, batch_first=True, proj_size=2)),
        "GRUCell": lambda: cell(nn.GRUCell(2, 3)),
        "LSTMCell": lambda: cell(nn.LSTMCell(2, 3)),
        "packed sequences": lambda: Net(packed, first=nn.Linear(5, 8), recurrent=nn.GRU(2, 2, batch_first=True)),
    },
    "embeddings": {
        "Embedding with padding": lambda: words(
            lambda net, x: net.last(net.table(x).flatten(1).tanh()),
            table=nn.Embedding(7, 3, padding_idx=0),
            last=nn.Linear(12, 2),
        ),
        "Embedding, sparse": lambda: words(
            lambda net, x: net.last(net.table(x).prod(1)), table=nn.Embedding(7, 3, sparse=True), last=nn.Linear(3, 2)
        ),
        "EmbeddingBag, mean": lambda: words(
            lambda net, x: net.last(net.table(x).tanh()), table=nn.EmbeddingBag(7, 3), last=nn.Linear(3, 2)
        ),
        "EmbeddingBag, sum, sparse": lambda: words(
            lambda net, x: net.last(net.table(x).tanh()),
            table=nn.EmbeddingBag(7, 3, mode="sum", sparse=True),
            last=nn.Linear(3, 2),
        ),
        "EmbeddingBag, max": lambda: words(
            lambda net, x: net.last(net.table(x)), table=nn.EmbeddingBag(7, 3, mode="max"), last=nn.Linear(3, 2)
        ),
        "tied with the head": lambda: words(
            lambda net, x: torch.tanh(net.inner(net.table(x).mean(1))) @ net.table.weight.T,
            table=nn.Embedding(7, 3),
            inner=nn.Linear(3, 3),
        ),
    },
    "weights": {
        "weight_norm": lambda: around(parametrizations.weight_norm(nn.Linear(8, 8))),
        "spectral_norm": lambda: around(parametrizations.spectral_norm(nn.Linear(8, 8))).eval(),
        "orthogonal": lambda: around(parametrizations.orthogonal(nn.Linear(8, 8))),
        "symmetric": lambda: around(parametrized(nn.Linear(8, 8))),
        "Bilinear": lambda: between(nn.Bilinear(4, 4, 2)),
        "one layer, used twice": lambda: Net(lambda net, x: net.layer(torch.tanh(net.layer(x))), layer=nn.Linear(5, 5)),
        "low-rank adaptation": lambda: Net(
            lambda net, x: net.base(x) + (x @ net.down) @ net.up,
            base=nn.Linear(5, 4).requires_grad_(False),
            down=nn.Parameter(torch.randn(5, 2)),
            up=nn.Parameter(torch.zeros(2, 4)),
        ),
        "weights made by a network": lambda: Net(hyper, makes=nn.Linear(5, 20)),
    },
    "gradients of one's own": {
        "straight-through by Function": lambda: around(Clip.apply),
        "Function with setup_context": lambda: around(Scaled.apply),
        "straight-through by detach": lambda: around(lambda v: v.round().detach() + v - v.detach()),
        "detach times": lambda: between(lambda a, b: a.detach() * b),
        "no_grad in forward": lambda: around(without_gradient),
        "scaled by a hook": lambda: around(hooked),
        "checkpoint": lambda: around(
            Net(
                lambda net, v: checkpoint(net.inner, v, use_reentrant=False),
                inner=nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
            )
        ),
        "checkpoint, reentrant": lambda: around(
            Net(
                lambda net, v: checkpoint(net.inner, v, use_reentrant=True),
                inner=nn.Sequential(nn.Linear(8, 8), nn.Tanh()),
            )
        ),
        "residual of a differential equation": lambda: Net(
            residual, body=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        ),
        "energy and forces": lambda: Net(
            energy_and_forces, body=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 1))
        ),
        "jvp in forward": lambda: Net(tangent, body=nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))),
    },
    "control flow": {
        "gate only": lambda: between(lambda a, b: torch.where(a > 0, b, -b)),
        "unused": lambda: between(lambda a, b: b + torch.zeros_like(a)),
        "branch on data": lambda: Net(branch, first=nn.Linear(5, 4), inner=nn.Linear(4, 4)),
        "mixture of experts": lambda: Net(
            routed, gate=nn.Linear(5, 3), experts=nn.ModuleList(nn.Linear(5, 2) for _ in range(3))
        ),
        "fixed point": lambda: Net(fixed_point, first=nn.Linear(5, 4), inner=nn.Linear(4, 4)),
        "scripted": lambda: torch.jit.script(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))),
        "DataParallel": lambda: nn.DataParallel(nn.Sequential(nn.Linear(5, 6), nn.Tanh(), nn.Linear(6, 2))),
    },
    "samples that interact": {
        "BatchNorm, train": lambda: around(nn.Sequential(nn.BatchNorm1d(8), nn.ReLU())),
        "graph": lambda: Net(
            propagated,
            first=nn.Linear(5, 4),
            last=nn.Linear(4, 2),
            adjacency=nn.Buffer(torch.rand(4, 4).round()),
        ),
        "steps by the fastest": lambda: Net(integrated, first=nn.Linear(5, 4), inner=nn.Linear(4, 4)),
        "attention between samples": lambda: around(lambda v: (v @ v.T).softmax(-1) @ v),
    },
}


def cases() -> Iterator[Case]:
    """One case for each operation."""
    for group, made in OPERATIONS.items():
        for name, make in made.items():
            yield Case(name, lambda make=make: _built(make), group)


def _built(make: Callable[[], nn.Module | Network]) -> Network:
    made = make()
    model, x = made if isinstance(made, tuple) else (made, torch.randn(4, 5))
    with torch.no_grad():
        for p in model.parameters():
            p.normal_(std=0.5)
    return model.double(), x.double() if x.is_floating_point() else x
