"""The factors K and P of Theta = P K P*, layer by layer, against explicit factors by autograd."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from conftest import metrics_of
from torch import Tensor, nn
from torch.nn import functional

import ntkbench
from ntkbench.networks.recurrent import States

torch.manual_seed(0)
METRICS = ("trace", "norm", "effective_rank", "alignment")


class Net(nn.Module):
    """A network whose operations with weights go through :meth:`use`, where injections are added.

    With ``held`` their inputs are detached from the parameters, so that their results are the images of S.
    """

    def __init__(self) -> None:
        super().__init__()
        self.taps: list[Tensor] | None = None
        self.held, self.results = False, []

    def use(self, operation: Callable[[Tensor], Tensor], a: Tensor) -> Tensor:
        z = operation(a.detach() if self.held and a.is_floating_point() else a)
        self.results.append(z)
        return z if self.taps is None else z + self.taps[len(self.results) - 1]

    def forward(self, x: Tensor) -> Tensor:
        self.results = []
        return self.run(x)


class Perceptron(Net):
    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 6), nn.Linear(6, 3, bias=False)

    def run(self, x: Tensor) -> Tensor:
        return self.use(self.two, torch.tanh(self.use(self.one, x)))


class Wide(Net):
    """More positions than inputs: convolutions, one of them grouped."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 4, 3, stride=2), nn.Conv2d(4, 6, 2, groups=2)

    def run(self, x: Tensor) -> Tensor:
        x = x.unflatten(1, (1, 8, 8))
        return self.use(self.two, torch.tanh(self.use(self.one, x))).mean((2, 3))


class Video(Net):
    """A convolution of the three images of each sample."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Conv2d(1, 2, 2), nn.Linear(8, 2)

    def run(self, x: Tensor) -> Tensor:
        images = torch.tanh(self.use(self.one, x.flatten(0, 1)))
        return self.use(self.two, images.flatten(1).unflatten(0, (len(x), 3)).mean(1))


class Twice(Net):
    """A weight that is used twice."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.two = nn.Linear(4, 4), nn.Linear(4, 2)

    def run(self, x: Tensor) -> Tensor:
        return self.use(self.two, torch.tanh(self.use(self.one, torch.tanh(self.use(self.one, x)))))


class Language(Net):
    """An embedding with padding, and one that is tied with the head."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.other = nn.Embedding(5, 3), nn.Embedding(5, 3, padding_idx=0)
        self.inner = nn.Linear(3, 3)

    def run(self, x: Tensor) -> Tensor:
        h = self.use(self.table, x) + self.use(self.other, x)
        h = torch.tanh(self.use(self.inner, h))
        return self.use(lambda a: functional.linear(a, self.table.weight), h)


class Autoencoder(Net):
    """A matrix that is used plain and transposed, on real inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(3, 5))

    def run(self, x: Tensor) -> Tensor:
        code = torch.tanh(self.use(lambda a: functional.linear(a, self.W), x))
        return self.use(lambda a: functional.linear(a, self.W.T), code)


class Attention(Net):
    """Two heads of attention whose queries, keys and values come from one weight, as in nn.MultiheadAttention."""

    def __init__(self) -> None:
        super().__init__()
        self.packed, self.out = nn.Linear(4, 12), nn.Linear(4, 4)

    def run(self, x: Tensor) -> Tensor:
        q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in self.use(self.packed, x).chunk(3, dim=-1))
        mixed = functional.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)
        return self.use(self.out, mixed).mean(1)


class Memory(Net):
    """An LSTM cell over three steps: two weights that are used at each of them."""

    def __init__(self) -> None:
        super().__init__()
        self.given, self.kept, self.read = nn.Linear(2, 12), nn.Linear(3, 12, bias=False), nn.Linear(3, 2)

    def run(self, x: Tensor) -> Tensor:
        h = c = x.new_ones(len(x), 3)
        for step in x.unbind(1):
            i, f, g, o = (self.use(self.given, step) + self.use(self.kept, h)).chunk(4, dim=-1)
            c = torch.sigmoid(f) * c + torch.sigmoid(i) * torch.tanh(g)
            h = torch.sigmoid(o) * torch.tanh(c)
        return self.use(self.read, h)


INPUTS = {
    Perceptron: lambda: torch.randn(5, 4),
    Wide: lambda: torch.randn(3, 64),
    Video: lambda: torch.randn(3, 3, 1, 3, 3),
    Twice: lambda: torch.randn(4, 4),
    Language: lambda: torch.randint(5, (3, 4)),
    Autoencoder: lambda: torch.randn(4, 5),
    Attention: lambda: torch.randn(3, 4, 4),
    Memory: lambda: torch.randn(3, 3, 2),
}


def pair(kind: type[Net], seed: int = 0) -> tuple[Net, Net, Tensor]:
    """Two networks of a kind, and inputs."""
    torch.manual_seed(seed)
    one, other, x = kind().double(), kind().double(), INPUTS[kind]()
    return one, other, x.double() if x.is_floating_point() else x


def written_out(net: Net, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """K, P and Theta as dense matrices, by automatic differentiation alone."""
    weights = list(net.parameters())
    J = rows(net(x).flatten(), weights)
    net.held = True
    net(x)
    S = torch.cat([rows(z.flatten(), weights) for z in net.results])
    net.held, shapes = False, [z.shape for z in net.results]
    net.taps = [torch.zeros(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    P = rows(net(x).flatten(), net.taps)
    net.taps = None
    return S @ S.T, P, J @ J.T


def rows(values: Tensor, of: list[Tensor]) -> Tensor:
    each = []
    for value in values:
        found = torch.autograd.grad(value, of, retain_graph=True, allow_unused=True)
        each.append(
            torch.cat(
                [torch.zeros_like(w).flatten() if g is None else g.flatten() for g, w in zip(found, of, strict=True)]
            )
        )
    return torch.stack(each)


@pytest.mark.parametrize("kind", INPUTS, ids=lambda kind: kind.__name__)
def test_both_factors_are_those_of_autograd(kind):
    one, other, x = pair(kind)
    (K, P, theta), (K_f, P_f, _) = written_out(one, x), written_out(other, x)
    assert torch.allclose(P @ K @ P.T, theta, rtol=1e-10)
    found = ntkbench.Kernel(one, x).factors(other, probes=64)
    of_k = metrics_of(K.numpy(), K_f.numpy())
    moved = K.diagonal() > 0  # results at padding do not depend on the table
    P, P_f = P[:, moved], P_f[:, moved]
    of_p = metrics_of((P @ P.T).numpy(), (P_f @ P_f.T).numpy())
    for metric in METRICS:
        assert found.K[metric].value == pytest.approx(of_k[metric], rel=1e-10)
        assert found.K[metric].standard_error is None and found.K[metric].certificate < 1e-10
        for factor, exact in ((found.K, of_k), (found.P, of_p)):
            low, high = factor[metric].interval()
            assert low <= exact[metric] <= high
        assert found.P[metric].value == pytest.approx(of_p[metric], rel=1e-10)
        assert found.P[metric].standard_error is None  # no more outputs than probes
    assert found.left_out == ()


@pytest.mark.parametrize("kind", [Wide, Autoencoder], ids=lambda kind: kind.__name__)
def test_probes_are_unbiased_and_have_calibrated_errors(kind):
    one, other, x = pair(kind)
    (_, P, _), (_, P_f, _) = written_out(one, x), written_out(other, x)
    exact = metrics_of((P @ P.T).numpy(), (P_f @ P_f.T).numpy())
    kernel = ntkbench.Kernel(one, x)
    seeds = [kernel.factors(other, probes=4, seed=seed).P for seed in range(100)]
    for metric in ("trace", "norm", "alignment"):
        off = np.array([(e[metric].value - exact[metric]) / e[metric].standard_error for e in seeds])
        values = np.array([e[metric].value for e in seeds])
        if metric != "alignment":  # a ratio, which is biased at few probes
            assert abs(values.mean() - exact[metric]) < 4 * values.std() / 10 + 0.02 * exact[metric]
        assert 0.3 < np.sqrt((off**2).mean()) < 3
    assert seeds[0]["trace"].passes >= 8  # 4 probes at both ends


def test_parameters_in_neither_factor_are_named():
    layers = (nn.Linear(4, 6), nn.LayerNorm(6), nn.Tanh(), nn.utils.parametrizations.weight_norm(nn.Linear(6, 2)))
    found = ntkbench.Kernel(nn.Sequential(*layers).double(), torch.randn(5, 4).double()).factors()
    assert {name.partition(".")[0] for name in found.left_out} == {"1", "3"}
    assert set(found.K) == set(found.P) == {"trace", "norm", "effective_rank"}
    assert "left out: " in repr(found) and "P P*" in repr(found)


def test_the_memory_budget_is_kept_or_the_call_is_refused():
    x = torch.randn(4, 300, 8).double()
    net = nn.Sequential(nn.Linear(8, 64), nn.Tanh(), nn.Linear(64, 4)).double()
    whole = ntkbench.Kernel(net, x).factors(probes=6, seed=1)
    blocked = ntkbench.Kernel(net, x, memory=2**24).factors(probes=6, seed=1)
    for metric in whole.K:
        assert blocked.K[metric].value == pytest.approx(whole.K[metric].value)
    with pytest.raises(ntkbench.errors.OverMemory, match="memory"):
        ntkbench.Kernel(net, x, memory=2**17).factors(probes=6)


def test_recurrent_networks_have_the_factors_of_their_gates():
    torch.manual_seed(0)
    gru, other = (nn.GRU(2, 3, batch_first=True) for _ in range(2))
    x = torch.randn(4, 5, 2)
    kernel = ntkbench.Kernel(States(gru).double(), x.double())
    found = kernel.factors(States(other).double(), probes=16)
    assert set(found.K) == set(METRICS) and found.left_out == () and found.K["trace"].standard_error is None
    assert found.P["norm"].standard_error > 0


def perceptron(width: int) -> nn.Module:
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, 2))


def convolution(size: int, stride: int) -> nn.Module:
    """A convolution whose outputs are averaged over its windows."""
    layers = nn.Unflatten(1, (1, 4)), nn.Conv1d(1, 2, size, stride, padding=size // 2), nn.AdaptiveAvgPool1d(1)
    return nn.Sequential(*layers, nn.Flatten())


def test_k_of_zero_inputs_is_undefined():
    with pytest.raises(ntkbench.errors.Undefined, match="K is zero"):
        ntkbench.Kernel(nn.Linear(4, 2, bias=False), torch.zeros(3, 4)).factors()


def test_an_effective_rank_is_at_most_the_size():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.Tanh(), nn.Linear(8, 6))
    kernels = [ntkbench.Kernel(net, torch.randn(1, 3)) for _ in range(4)]
    for seed in range(20):
        found = kernels[seed % 4].factors(probes=4, seed=seed)
        assert found.P["effective_rank"].value <= 6


def test_small_budgets_for_inputs_of_layers_give_the_same_values():
    """Windows of convolutions take nine times the memory of images, so samples are processed in blocks."""
    x = torch.randn(64, 4, 16, 16)
    net = nn.Sequential(nn.Conv2d(4, 8, 3), nn.Tanh(), nn.Conv2d(8, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    whole = ntkbench.Kernel(net, x).factors().K
    fewer = ntkbench.Kernel(net, x, memory=2**21).factors().K
    for metric in whole:
        assert fewer[metric].value == pytest.approx(whole[metric].value, rel=1e-6)


@pytest.mark.parametrize(
    ("network", "keywords", "message"),
    [
        (nn.Linear(4, 2), {"probes": 3}, "at least 4"),
        (nn.Linear(4, 2), {"other": np.eye(2)}, "got an array"),
        (nn.BatchNorm1d(4), {}, "samples interact"),
        (nn.LayerNorm(4), {}, "no parameter that counts"),
        (nn.Sequential(nn.Unflatten(1, (1, 4)), nn.ConvTranspose1d(1, 1, 3)), {}, "no parameter that counts"),
        (nn.Linear(4, 2), {"other": nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))}, "different layers"),
        (perceptron(6), {"other": perceptron(50)}, "different layers"),
        (convolution(3, 1), {"other": convolution(3, 2)}, "different layers"),
        (convolution(3, 1), {"other": convolution(1, 1)}, "different layers"),
    ],
)
def test_bad_arguments_are_refused(network, keywords, message):
    with pytest.raises(ntkbench.BadInput, match=message):
        ntkbench.Kernel(network, torch.randn(5, 4)).factors(**keywords)


def test_functions_in_jax_are_refused():
    jnp = pytest.importorskip("jax.numpy")
    kernel = ntkbench.Kernel(lambda w, x: x @ w, jnp.ones((4, 3)), params=jnp.ones((3, 2)))
    with pytest.raises(ntkbench.BadInput, match="no layers"):
        kernel.factors()
