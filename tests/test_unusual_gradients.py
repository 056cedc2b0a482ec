"""Networks whose gradients are not those of their operations alone: hooks, clipping, stale attributes, underflow."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import ntkbench
from ntkbench import kernel as kernels
from ntkbench.errors import BadInput, Undefined
from ntkbench.modules import copied

METHODS = (
    "structured_derivatives",
    "jacobian_contraction",
    "naive_jacobian",
    "per_sample_trace",
    "one_sided_reverse",
    "one_sided_forward",
    "one_sided_orthonormal",
    "hutchpp",
)


def network(outputs: int = 2) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 5), nn.Tanh(), nn.Linear(5, outputs)).double()


X = torch.randn(4, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def theta(module: nn.Module, x: Tensor = X) -> Tensor:
    """The NTK by one ``backward`` of the module itself for each output."""
    outputs = module(x).reshape(-1)
    rows = []
    for output in outputs:
        module.zero_grad()
        output.backward(retain_graph=True)
        rows.append(
            torch.cat(
                [torch.zeros_like(w).flatten() if w.grad is None else w.grad.flatten() for w in module.parameters()]
            )
        )
    module.zero_grad()
    j = torch.stack(rows)
    return j @ j.T


def hooked(hook) -> nn.Module:
    made = network()
    made[0].weight.register_hook(hook)
    return made


MASK = torch.randint(0, 2, (5, 3), generator=torch.Generator().manual_seed(2)).double()
LINEAR = {"scaled": lambda g: 4 * g, "masked": lambda g: g * MASK, "to zero": torch.zeros_like}


@pytest.mark.parametrize("hook", LINEAR.values(), ids=LINEAR)
def test_hooks_on_parameters_count(hook):
    module = hooked(hook)
    expected = theta(module)
    torch.testing.assert_close(ntkbench.ntk(module, X), expected)
    for metric, value in (("trace", expected.trace()), ("norm", expected.norm())):
        assert float(getattr(ntkbench, metric)(module, X)) == pytest.approx(float(value))


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_right_about_hooks_or_refuses(method):
    module = hooked(LINEAR["scaled"])
    try:
        found = ntkbench.trace(module, X, method=method)
    except BadInput:
        return
    assert found.covers(float(theta(module).trace()), "float64", 0.9999)


def test_hooks_after_accumulation_are_no_part_of_the_kernel_and_are_named(caplog):
    module = network()
    expected = theta(module)
    module[0].weight.register_post_accumulate_grad_hook(lambda w: w.grad.zero_())
    torch.testing.assert_close(ntkbench.ntk(module, X), expected)
    ntkbench.trace(network(), X)
    (warning,) = (record.getMessage() for record in caplog.records if record.name == "ntkbench")
    assert "register_post_accumulate_grad_hook (of 0.weight) are no part of the NTK" in warning


def test_copies_keep_hooks_and_add_none_to_originals():
    module = hooked(LINEAR["scaled"])
    twice = copied(copied(module))
    assert len(twice[0].weight._backward_hooks) == len(module[0].weight._backward_hooks) == 1
    frozen = hooked(LINEAR["scaled"]).requires_grad_(False)
    assert not any(w.requires_grad for w in copied(frozen).parameters())


def passing(back):
    """The identity, with a backward function of its own."""

    class Passing(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, g):
            return back(g)

    return Passing.apply


normalised = passing(lambda g: g / (g.norm() + 1e-3))
larger_half = passing(lambda g: g * (g.abs() >= g.abs().median()))
"""Odd and homogeneous, but not linear."""


class Through(nn.Module):
    def __init__(self, function, outputs: int = 2) -> None:
        super().__init__()
        self.network, self.function = network(outputs), function

    def forward(self, x):
        return self.function(self.network[1](self.network[0](x))) @ self.network[2].weight.T


NONLINEAR = {
    "normalised": lambda: Through(normalised),
    "largest": lambda: Through(larger_half),
    "clipped": lambda: hooked(lambda g: g.clamp(-0.02, 0.02)),
    "one sign": lambda: hooked(lambda g: g.clamp(min=0)),
    "decayed": lambda: hooked(lambda g: g + 0.1),
}


@pytest.mark.parametrize("kind", NONLINEAR)
def test_a_backward_pass_that_is_not_linear_is_taken_row_by_row(kind):
    module = NONLINEAR[kind]()
    expected = theta(module)
    torch.testing.assert_close(ntkbench.ntk(module, X), expected)
    assert float(ntkbench.trace(module, X)) == pytest.approx(float(expected.trace()))
    assert float(ntkbench.trace(module, X, method="naive_jacobian")) == pytest.approx(float(expected.trace()))


@pytest.mark.parametrize("method", [m for m in METHODS if m not in ("naive_jacobian", "jacobian_contraction")])
@pytest.mark.parametrize("kind", NONLINEAR)
def test_methods_that_combine_cotangents_are_right_or_refuse_a_nonlinear_backward_pass(kind, method):
    module = NONLINEAR[kind]()
    try:
        found = ntkbench.trace(module, X, method=method)
    except BadInput:
        return
    assert found.covers(float(theta(module).trace()), "float64", 0.9999)


def test_auto_ends_row_by_row_where_estimates_are_refused():
    torch.manual_seed(0)
    module = Through(normalised, outputs=100)
    found = ntkbench.trace(module, X)
    assert found.method == "naive_jacobian" and found.standard_error is None
    assert float(found) == pytest.approx(float(theta(module).trace()))
    assert any("not linear" in note for note in found.notes)


def test_low_precision_inside_is_no_reason_to_refuse():
    class Low(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(100)

        def forward(self, x):
            with torch.autocast("cpu", dtype=torch.bfloat16):
                return self.network(x).float()

    module = Low().float()
    found = ntkbench.trace(module, X.float())
    assert float(found) == pytest.approx(float(theta(module, X.float()).trace()), rel=0.1)


class Stale(nn.Module):
    """Uses a product of its parameters that was computed when it was made."""

    def __init__(self, kept) -> None:
        super().__init__()
        self.a, self.b = nn.Parameter(torch.randn(3, 2)), nn.Parameter(torch.randn(2, 3))
        self.readout = nn.Linear(3, 2)
        kept(self, self.a @ self.b)

    def forward(self, x):
        return self.readout(x @ self.product())


@pytest.mark.parametrize(
    ("place", "taken"),
    {
        "an attribute": (lambda m, p: setattr(m, "kept", p), lambda m: m.kept),
        "a list": (lambda m, p: setattr(m, "kept", [p]), lambda m: m.kept[0]),
        "a dict": (lambda m, p: setattr(m, "kept", {"of": p}), lambda m: m.kept["of"]),
        "a buffer": (lambda m, p: m.register_buffer("kept", p), lambda m: m.kept),
        "a view": (lambda m, p: setattr(m, "kept", m.a.view(-1)[:1]), lambda m: m.kept * torch.eye(3)),
    }.values(),
    ids=["an attribute", "a list", "a dict", "a buffer", "a view"],
)
def test_tensors_computed_from_parameters_before_the_call_are_refused(place, taken):
    class Module(Stale):
        def product(self):
            return taken(self)

    module = Module(place)
    with pytest.raises(BadInput, match=r"'kept'.*compute it in forward"):
        ntkbench.trace(module, X.float())


def test_tensors_that_are_recomputed_at_each_call_are_accepted():
    class Cached(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.kept = None

        def forward(self, x):
            self.kept = self.network(x)
            return 2 * self.kept

    module = Cached()
    module(X)  # leaves a tensor that belongs to a graph
    torch.testing.assert_close(ntkbench.ntk(module, X), theta(module))
    old = nn.utils.weight_norm(nn.Linear(3, 2).double())  # its weight is such an attribute
    torch.testing.assert_close(ntkbench.ntk(old, X), theta(old))


def test_a_network_that_writes_into_its_input_is_refused():
    class Writing(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()

        def forward(self, x):
            return self.network(x.mul_(2))

    x = X.clone()
    with pytest.raises(BadInput, match="writes into its input"):
        ntkbench.trace(Writing(), x)
    assert torch.equal(x, X)


class Scaled(nn.Module):
    def __init__(self, scale: float) -> None:
        super().__init__()
        self.network, self.scale = network(), scale

    def forward(self, x):
        return self.scale * self.network(x)


SMALL = {"float32": (1e-12, 1e-22, 1e-30), "float64": (1e-90, 1e-160)}


@pytest.mark.parametrize("method", ["auto", "naive_jacobian", "hutchpp", "block_u_statistics", "gram_reverse"])
@pytest.mark.parametrize(("dtype", "scale"), [(dtype, scale) for dtype, scales in SMALL.items() for scale in scales])
def test_squares_that_underflow_are_refused_or_right(dtype, scale, method):
    module, x = Scaled(scale).to(getattr(torch, dtype)), X.to(getattr(torch, dtype))
    exact = ntkbench.metrics_of(Scaled(1.0), X, copy.deepcopy(Scaled(1.0)), method="structured_derivatives")
    for metric, power in (("trace", 2), ("norm", 2), ("effective_rank", 0), ("alignment", 0)):
        others = (copy.deepcopy(module),) if metric == "alignment" else ()
        try:
            found = getattr(ntkbench, metric)(module, *others, x, method=method)
        except BadInput as error:
            assert "underflow" in str(error) or "cannot compute" in str(error)
            continue
        assert found.value / scale**power == pytest.approx(exact[metric].value, rel=0.5)
        if found.standard_error is None:
            assert found.value / scale**power == pytest.approx(exact[metric].value, rel=1e-4)


@pytest.mark.parametrize("scale", [1e-12, 1e-21, 1e-25])
def test_kernels_that_underflow_are_refused_or_right(scale):
    try:
        found = ntkbench.ntk(Scaled(scale).float(), X.float())
    except BadInput as error:
        assert "underflow" in str(error) and "float64" in str(error)
        assert scale < 1e-15
        return
    torch.testing.assert_close(found.double() / scale**2, theta(Scaled(1.0)), rtol=1e-4, atol=1e-4)


def test_eigenvalues_of_tiny_gradients_are_refused(monkeypatch):
    monkeypatch.setattr(kernels, "SMALL", 0)
    with pytest.raises(BadInput, match="underflow"):
        ntkbench.Kernel(Scaled(1e-12).float(), X.float()).eigenvalues(2)


def test_small_gradients_that_do_not_underflow_have_their_value():
    found = ntkbench.norm(Scaled(1e-6).float(), X.float())
    assert found.value == pytest.approx(1e-12 * float(theta(Scaled(1.0)).norm()), rel=1e-4)


def test_a_kernel_of_zero_is_zero_and_no_underflow():
    module = Scaled(0.0).float()
    assert float(ntkbench.norm(module, X.float())) == 0 and not ntkbench.ntk(module, X.float()).any()
    with pytest.raises(Undefined):
        ntkbench.effective_rank(module, X.float())


def test_transforms_of_torch_func_inside_forward_are_supported():
    class Derivative(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network(1)

        def forward(self, x):
            slope = torch.func.vmap(torch.func.grad(lambda one: self.network(one)[0]))(x)
            return torch.cat([slope, self.network(x)], 1)

    module = Derivative()
    expected = theta(module)
    torch.testing.assert_close(ntkbench.ntk(module, X), expected)
    for method in ("naive_jacobian", "one_sided_reverse", "per_sample_trace", "hutchpp"):
        found = ntkbench.trace(module, X, method=method)
        assert found.covers(float(expected.trace()), "float64", 0.9999), method


class HalfDetached(nn.GRU):
    def forward(self, x, state=None):
        y, state = super().forward(x, state)
        return torch.cat([y[:2], y[2:].detach()]), state


class Backwards(nn.RNN):
    def forward(self, x, state=None):
        y, state = super().forward(x.flip(0), state)
        return y.flip(0), state


def with_doubled_gradients() -> nn.GRU:
    made = nn.GRU(2, 3)
    made.register_full_backward_pre_hook(lambda _, gradients: tuple(None if g is None else 2 * g for g in gradients))
    return made


def with_parameter_hook() -> nn.GRU:
    made = nn.GRU(2, 3)
    made.weight_hh_l0.register_hook(lambda g: 3 * g)
    return made


def tied() -> nn.RNN:
    made = nn.RNN(3, 3)
    made.weight_hh_l0 = made.weight_ih_l0
    return made


LAYERS = {
    "a class derived from GRU": lambda: HalfDetached(2, 3),
    "one that reads backwards": lambda: Backwards(2, 3),
    "backward hooks": with_doubled_gradients,
    "a hook on a parameter": with_parameter_hook,
    "weight_norm": lambda: nn.utils.parametrizations.weight_norm(nn.GRU(2, 3), "weight_hh_l0"),
    "tied weights": tied,
    "two layers": lambda: nn.LSTM(2, 3, 2),
    "both directions": lambda: nn.GRU(2, 3, bidirectional=True, batch_first=True),
    "projected": lambda: nn.LSTM(2, 4, proj_size=2),
    "relu": lambda: nn.RNN(2, 3, nonlinearity="relu"),
    "as made": lambda: nn.GRU(2, 3),
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind", LAYERS)
@pytest.mark.slow
def test_modified_recurrent_layers_have_their_own_kernel(kind):
    torch.manual_seed(0)
    layer = LAYERS[kind]().double()
    N, T = 3, 4
    x = torch.randn(*((N, T) if layer.batch_first else (T, N)), layer.input_size, dtype=torch.float64)

    class ByTrial(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = layer

        def forward(self, x):
            y = self.layer(x)[0]
            return y if layer.batch_first else y.transpose(0, 1)

    expected = theta(ByTrial(), x)
    torch.testing.assert_close(ntkbench.ntk(layer, x), expected)
    assert float(ntkbench.trace(layer, x)) == pytest.approx(float(expected.trace()))
    found = ntkbench.trace(layer, x, method="one_sided_reverse")
    assert found.covers(float(expected.trace()), "float64", 0.9999)


def test_a_declared_recurrence_with_other_gradients_is_refused():
    from ntkbench.networks.recurrent import Recurrent

    class Detached(Recurrent):
        def forward(self, x):
            y = super().forward(x)
            return torch.cat([y[:, :2], y[:, 2:].detach()], 1)

    torch.manual_seed(0)
    module, x = Detached("gru", 2, 3).double(), torch.randn(3, 4, 2, dtype=torch.float64)
    for method in ("one_sided_reverse", "naive_jacobian", "one_sided_forward"):
        with pytest.raises(BadInput, match="differs from that of plain autograd"):
            ntkbench.trace(module, x, method=method)
    assert float(ntkbench.trace(module, x)) == pytest.approx(float(theta(module, x).trace()))


def test_sparse_constants_are_part_of_the_function():
    class Graph(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = network()
            self.register_buffer("adjacency", (torch.eye(4) + torch.eye(4).roll(1, 0)).double().to_sparse())

        def forward(self, x):
            return torch.sparse.mm(self.adjacency, self.network(x))

    module = Graph()
    torch.testing.assert_close(ntkbench.ntk(module, X), theta(module))
    assert float(ntkbench.trace(module, X)) == pytest.approx(float(theta(module).trace()))
