"""Certificates: a result that contradicts plain autograd is rejected, and the next method is used."""

from __future__ import annotations

import copy
import functools

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from torch import nn

import ntkbench
from ntkbench import methods
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.operators import linearise
from ntkbench.operators.certificate import Uncertified, distance, distance_of_parts, ratio
from ntkbench.operators.plain import PlainNetwork, flat
from ntkbench.options import Target
from ntkbench.problems.base import module
from ntkbench.problems.base.module import from_module

FLOAT64 = Target("torch", "float64", "cpu")


def explicit(model: nn.Module, x: torch.Tensor) -> torch.Tensor:
    """J by one plain backward pass per output."""
    weights = [w for w in model.parameters() if w.requires_grad]
    rows = [torch.autograd.grad(y, weights, retain_graph=True, allow_unused=True) for y in model(x).reshape(-1)]
    zero = lambda g, w: torch.zeros_like(w) if g is None else g  # noqa: E731
    return torch.stack([torch.cat([zero(g, w).reshape(-1) for g, w in zip(row, weights, strict=True)]) for row in rows])


class Clip(torch.autograd.Function):
    """A custom autograd function without support for torch.func."""

    @staticmethod
    def forward(ctx, x):
        return x.clamp(-1, 1)

    @staticmethod
    def backward(ctx, g):
        return 3 * g


class Frozen(nn.Module):
    """A part under no_grad, which forward mode pushes tangents through."""

    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = nn.Linear(5, 8), nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        with torch.no_grad():
            frozen = self.a(x)
        return self.c(torch.tanh(self.b(x) + frozen))


class Clipped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(Clip.apply(self.a(x)))


class Branching(nn.Module):
    """A branch on data, which neither vmap nor tracing supports."""

    def __init__(self):
        super().__init__()
        self.a = nn.Linear(5, 3)

    def forward(self, x):
        return torch.stack([torch.tanh(self.a(row)) if row.sum() > 0 else 2 * self.a(row) for row in x])


class Mixed(nn.Module):
    """Samples interact through a mean."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        h = torch.tanh(self.a(x))
        return self.b(h - h.mean(0))


def problem_of(kind: type[nn.Module]):
    torch.manual_seed(0)
    model, x = kind().double(), 2 * torch.randn(5, 5, dtype=torch.float64)
    return from_module(model, x), explicit(model, x)


@pytest.mark.parametrize("kind", [Frozen, Clipped, Branching, Mixed])
def test_products_over_the_batch_are_those_of_plain_autograd(kind):
    problem, J = problem_of(kind)
    j = linearise(problem, "theta_0", FLOAT64)
    u, w = (torch.randn(4, size, dtype=torch.float64) for size in (j.n, j.P))
    torch.testing.assert_close(j.vjp(u), u @ J, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(j.jvp(w), w @ J.T, rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(j.row(7), J[7], rtol=1e-10, atol=1e-12)
    assert j.certificate is not None and j.certificate < 1e-12


@pytest.mark.parametrize("kind", [Frozen, Clipped, Branching])
def test_products_by_sample_are_those_of_plain_autograd(kind):
    problem, J = problem_of(kind)
    by_sample = J.reshape(5, 3, -1)
    j = linearise(problem, "theta_0", FLOAT64)
    v, w = torch.randn(2, 5, 3, dtype=torch.float64), torch.randn(2, 5, j.P, dtype=torch.float64)
    expected = torch.einsum("kbo,bop->kbp", v, by_sample)
    torch.testing.assert_close(j.sample_vjp(slice(1, 4), v[:, 1:4]), expected[:, 1:4], rtol=1e-10, atol=1e-12)
    torch.testing.assert_close(j.sample_squares(v), (expected**2).sum(-1), rtol=1e-10, atol=1e-12)
    pushed = torch.einsum("kbp,bop->kbo", w, by_sample)
    torch.testing.assert_close(j.sample_jvp(slice(1, 4), w[:, 1:4]), pushed[:, 1:4], rtol=1e-10, atol=1e-12)
    if kind is Branching:
        assert "per-sample VJP is computed by plain autograd" in " ".join(j.notes)


def test_per_sample_products_of_interacting_samples_are_rejected():
    problem, _ = problem_of(Mixed)
    object.__setattr__(problem, "samples_interact", False)
    j = linearise(problem, "theta_0", FLOAT64)
    with pytest.raises(Uncertified, match=r"sample_vjp products: .*differs from that of plain autograd"):
        j.sample_squares(torch.ones(1, 5, 3, dtype=torch.float64))
    with pytest.raises(Uncertified):
        j.sample_jvp(slice(0, 2), torch.ones(1, 2, j.P, dtype=torch.float64))


@pytest.mark.parametrize("name", methods.names())
@pytest.mark.parametrize("metric", ["trace", "norm", "alignment"])
def test_every_method_detects_a_wrong_network_function(name, metric):
    """Operators and kernels are made wrong: a method must raise an error or fall back to plain autograd."""
    method = methods.get(name)
    if metric not in method.metrics or method.needs_recurrence or "torch" not in method.backends:
        pytest.skip("the method does not give this metric of this network")
    torch.manual_seed(0)
    wrong = Wrong()
    problem = from_module(wrong, torch.randn(6, 5), copy.deepcopy(wrong) if metric == "alignment" else None)
    passes = method.least_passes(problem, metric) + 40 if method.takes_passes else None
    options = {"method": name, "passes": passes}
    wrong.a.armed = True
    if metric == "alignment":
        call = lambda: ntkbench.alignment(wrong, copy.deepcopy(wrong), torch.randn(6, 5), **options)  # noqa: E731
    else:
        call = lambda: getattr(ntkbench, metric)(wrong, torch.randn(6, 5), **options)  # noqa: E731
    try:
        found = call()
    except ntkbench.NtkbenchError:
        return
    assert found.certificate is not None and found.certificate < 1e-3
    assert "plain autograd" in " ".join(found.notes) or name in (
        "naive_jacobian",
        "last_layer",
    )  # neither uses the wrong products


class Wrong(nn.Module):
    """A network whose gradients are different under torch.func and while it is traced."""

    def __init__(self):
        super().__init__()
        self.a, self.b = Armed(5, 8), nn.Linear(8, 3)

    def forward(self, x):
        return self.b(torch.tanh(self.a(x)))


class Armed(nn.Linear):
    armed = False

    def forward(self, x):
        y = super().forward(x)
        transformed = torch._C._functorch.maybe_current_level() is not None or isinstance(
            self.weight, torch._subclasses.FakeTensor
        )
        traced = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.PROXY) is not None
        return y + 0.1 * (y - y.detach()) if self.armed and (transformed or traced) else y


class WrongForSome(torch.autograd.Function):
    """A backward that is wrong under torch.func for the third sample alone."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x):
        return x.clone()

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, g):
        wrong = torch._C._functorch.maybe_current_level() is not None
        return g * (torch.arange(len(g)) != 2)[:, None] if wrong else g


class Partly(Clipped):
    def forward(self, x):
        return self.b(WrongForSome.apply(self.a(x)))


@pytest.mark.parametrize(
    "probes",
    [lambda j: j.basis(0, 3), lambda j: torch.tensor([[1.0], [1], [-1], [-1]]).double() * torch.ones(j.n).double()],
)
def test_the_certificate_of_some_probes_covers_all_outputs(probes):
    """Unit vectors reach few samples, and signs cancel in sums."""
    problem, J = problem_of(Partly)
    j = linearise(problem, "theta_0", FLOAT64)
    j.vjp(probes(j))
    assert "VJP is computed by plain autograd" in " ".join(j.notes)
    torch.testing.assert_close(j.fresh().vjp(j.basis(0, j.n)), J, rtol=1e-10, atol=1e-12)


class OneParameter(nn.Module):
    """J is the inputs, of rank 1."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(1))

    def forward(self, x):
        return x @ self.w


def of_one_parameter():
    """An operator in float32 whose J has rank 1, and three vectors that J^T maps to zero up to rounding."""
    torch.manual_seed(0)
    x = torch.randn(6, 4, 1)
    j = linearise(from_module(OneParameter(), x), "theta_0", Target("torch", "float32", "cpu"))
    u, J = torch.randn(3, 24, dtype=torch.float64), x.double().reshape(24)
    return j, (u - torch.outer(u @ J, J) / (J @ J)).float()


@pytest.mark.parametrize("probes", [1, 3])
def test_products_that_cancel_are_certified(probes):
    j, u = of_one_parameter()
    assert float(j.ntk(u[:probes]).abs().max()) < 1e-4
    assert j.certificate < 1e-5 and not j.notes


@pytest.mark.parametrize("wrong", ["_vjp", "_jvp"])
@pytest.mark.parametrize("probes", [1, 3])
def test_wrong_products_are_detected_where_right_ones_cancel(monkeypatch, wrong, probes):
    """A product that is wrong by a factor is close to a right one if both are only rounding."""
    j, u = of_one_parameter()
    right = getattr(type(j), wrong)
    monkeypatch.setattr(type(j), wrong, lambda self, rows: 1.5 * right(self, rows))
    with pytest.raises(Uncertified, match=f"{wrong[1:]} products: its gradient differs"):
        j.ntk(u[:probes])


@pytest.mark.parametrize("wrong", ["_vjp", "_jvp"])
@pytest.mark.parametrize("probes", [1, 3])
def test_products_that_are_zero_show_nothing(monkeypatch, wrong, probes):
    """Signs that cancel, and tangents of zeros."""
    made = lambda: linearise(from_module(OneParameter(), torch.ones(6, 4, 1)), "theta_0", FLOAT64)  # noqa: E731
    j = made()
    zeros = torch.tensor([1.0, -1.0]).repeat(12)[None].repeat(probes, 1) if wrong == "_vjp" else torch.zeros(probes, 1)
    zeros = zeros.double()
    assert float(getattr(j, wrong[1:])(zeros).abs().max()) == 0
    right = getattr(type(j), wrong)
    monkeypatch.setattr(type(j), wrong, lambda self, rows: 1.5 * right(self, rows))
    with pytest.raises(Uncertified, match=f"{wrong[1:]} products: its gradient differs"):
        getattr(made(), wrong[1:])(zeros)


class EqualParameters(nn.Module):
    """J has two equal columns, which tangents of opposite signs cancel."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(2))

    def forward(self, x):
        return x * self.w.sum()


@pytest.mark.parametrize("probes", [1, 3])
def test_tangents_that_cancel_show_nothing(monkeypatch, probes):
    tangents = torch.tensor([[1.0, -1.0]], dtype=torch.float64).repeat(probes, 1)
    made = lambda: linearise(from_module(EqualParameters(), torch.ones(6, 4)), "theta_0", FLOAT64)  # noqa: E731
    assert float(made().jvp(tangents).abs().max()) == 0
    kind = type(made())
    right = kind._jvp
    monkeypatch.setattr(kind, "_jvp", lambda self, rows: 1.5 * right(self, rows))
    with pytest.raises(Uncertified, match="jvp products: its gradient differs"):
        made().jvp(tangents)


@pytest.mark.parametrize("factor", [1.0, 1.5])
def test_jvps_are_certified_by_cotangents_that_do_not_cancel(monkeypatch, factor):
    j, u = of_one_parameter()
    right = type(j)._jvp
    monkeypatch.setattr(type(j), "_jvp", lambda self, rows: factor * right(self, rows))
    j.reference.fixed_gradient(u[0])  # the cotangent of the next comparison
    if factor == 1:
        j.jvp(torch.ones(2, 1))
        assert j.certificate < 1e-5
    else:
        with pytest.raises(Uncertified, match="jvp products: its gradient differs"):
            j.jvp(torch.ones(2, 1))


def test_gradients_of_equal_samples_in_float32_are_certified():
    """With signs they cancel up to rounding."""
    samples = torch.randn(1, 4, 1, generator=torch.Generator().manual_seed(2)).repeat(6, 1, 1)
    found = ntkbench.trace(OneParameter(), samples, method="random_vector")
    assert found.certificate < 1e-5


def test_certificates_of_an_abandoned_way_are_dropped():
    problem, _ = problem_of(Clipped)
    j = linearise(problem, "theta_0", FLOAT64)
    j._certified("jvp", lambda: torch.zeros(2, dtype=torch.float64), lambda *_: 0.0, 2)
    assert set(j.reference.differences) == {"jvp"}
    with pytest.raises(Uncertified):
        j._certified("jvp", lambda: torch.zeros(1, dtype=torch.float64), lambda *_: 1.0, 1)
    assert not j.reference.differences


def test_a_kernel_is_recertified_after_values_change_in_place():
    torch.manual_seed(0)
    model, x = nn.Linear(4, 2), torch.randn(5, 4)
    parameters = {name: w.detach().clone() for name, w in model.named_parameters()}
    engine, theta = LayerwiseKernel(model, parameters, x, 2**30), list(parameters.values())
    for write in (lambda: None, lambda: None, lambda: theta[1].add_(1), lambda: x.add_(1)):
        write()
        engine.kernel(theta, x)
    assert len(engine._certified) == 3


def test_plain_gradients_of_unused_constant_and_sparse_parameters():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.unused, self.last = nn.Embedding(7, 3, sparse=True), nn.Linear(2, 2), nn.Linear(3, 2)

        def forward(self, ids):
            return self.last(self.table(ids).mean(1))

    torch.manual_seed(0)
    model, ids = Odd().double(), torch.randint(0, 7, (4, 5))
    weights = dict(model.named_parameters())
    plain = PlainNetwork(model, {name: w.detach() for name, w in weights.items()})
    v = torch.randn(8, dtype=torch.float64)
    dense = copy.deepcopy(model)
    dense.table.sparse = False
    expected = v @ explicit(dense, ids)
    torch.testing.assert_close(flat(plain.gradient(ids, v)), expected)
    pull = plain.pullback(ids)
    for _ in range(2):
        torch.testing.assert_close(flat(pull(v)), expected)
    assert all(w.grad is None for w in model.parameters())


def test_distances_of_zeros_and_non_finite_values():
    zero, one, nan = (np.array([value]) for value in (0.0, 1.0, np.nan))
    assert distance(zero, zero) == 0 and distance(one, zero) == np.inf and distance(one, one) == 0
    assert distance(nan, one) == np.inf and distance(one, nan) == np.inf
    assert ratio(1.0, 2.0) == 0.5


@pytest.mark.parametrize("N", [1, 2, 3, 7])
def test_a_plain_gradient_in_parts_is_that_of_the_whole_batch(N):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv1d(2, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(18, 2)).double()
    x, v = torch.randn(N, 2, 8, dtype=torch.float64), torch.randn(N, 2, dtype=torch.float64)
    plain = PlainNetwork(model, dict(model.named_parameters()))
    sizes = []
    plain._module.register_forward_hook(lambda module, args, out: sizes.append(len(out)))
    whole = plain.gradient(x, v)
    for memory, largest in ((10**9, N), (1, min(N, 2))):
        sizes.clear()
        torch.testing.assert_close(plain.gradient(x, v, memory), whole)
        assert max(sizes) == largest


def test_wrong_tiny_gradients_are_not_certified():
    """Their squares underflow."""
    expected = torch.full((3,), 1e-170, dtype=torch.float64)
    assert distance_of_parts([(2 * expected, expected)]) == pytest.approx(1)


def test_without_forward_mode_the_batched_jacobian_takes_the_fewer_passes():
    """A JVP of a custom autograd function takes two passes."""

    class Together(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Linear(2, 3, bias=False)

        def forward(self, x):
            hidden = Clip.apply(self.a(x))
            return hidden - hidden.mean(0)

    model, x = Together().double(), torch.randn(6, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    for samples, passes in ((3, 9), (6, 12)):
        found = ntkbench.trace(model, x[:samples], method="batched_jacobian")
        assert found.passes == passes
        assert float(found) == pytest.approx(float(ntkbench.trace(model, x[:samples], method="naive_jacobian")))


@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_gradients_that_are_zero_up_to_rounding_are_refused(dtype):
    """The mean over positions takes out the bias before it. Metrics of rounding errors would look exact."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.Tanh(), nn.Flatten(), nn.Linear(144, 2))
    x = torch.randn(5, 1, 8, 8)
    for use in (ntkbench.trace, ntkbench.effective_rank, functools.partial(ntkbench.trace, method="naive_jacobian")):
        with pytest.raises(ntkbench.BadInput, match="zero up to rounding"):
            use(model, x, parameters="0.bias", dtype=dtype)
    assert ntkbench.trace(model, x, parameters=["0.bias", "4.bias"], dtype=dtype).value == pytest.approx(10)


# Batches that are split


@pytest.fixture
def few_together(monkeypatch):
    """The test of a problem sees no more than eight samples at a time."""
    monkeypatch.setattr(module, "TOGETHER", 8)


def crowded(self, x):
    """An expert takes at most 16 samples of a batch."""
    taken = (torch.arange(len(x)) < 16).to(x)[:, None]
    return self.b(self.deep(self.a(x)).mean(1) * taken)


def routed(self, x):
    """Four experts, of which each takes at most 6 samples; at other weights they may have room."""
    weight, chosen = self.a(x).mean(1)[:, :4].softmax(-1).max(-1)
    y = self.b(torch.zeros(len(x), 8).to(x))
    for expert in range(4):
        wanted = chosen == expert
        kept = wanted & (wanted.cumsum(0) <= 6)
        y = y + torch.where(kept, weight, 0.0)[:, None] * self.b(self.deep(self.a(x) + expert).mean(1))
    return y


def behind_zero(self, x):
    """With a readout of zero no output depends on the batch, but gradients of the readout do."""
    return crowded(self, x)


def beside_offset(self, x):
    return 1e8 + 1e-3 * crowded(self, x)


def independent(self, x):
    return self.b(self.deep(self.a(x)).mean(1))


class Batched(nn.Module):
    def __init__(self, forward, outputs=2):
        super().__init__()
        self.a, self.b, self._of = nn.Linear(5, 8), nn.Linear(8, outputs), forward
        self.deep = nn.Sequential(*(part for _ in range(4) for part in (nn.Tanh(), nn.Linear(8, 8))), nn.Tanh())

    def forward(self, x):
        return self._of(self, x)


SPLIT = {each.__name__: each for each in (crowded, routed, behind_zero, beside_offset)}
TOO_LITTLE, LITTLE = 30_000, 60_000
"""Bytes: of which the whole batch takes more without a graph; of which it takes less, but more with a graph."""


def batched(forward, outputs=2):
    torch.manual_seed(0)
    model, x = Batched(forward, outputs).double(), torch.randn(20, 10, 5, dtype=torch.float64)
    if forward is behind_zero:
        nn.init.zeros_(model.b.weight)
    return model, x + x[:, :1]


@pytest.mark.parametrize("kind", mostly_slow(list(SPLIT), 1))
@pytest.mark.parametrize("memory", [None, LITTLE, TOO_LITTLE])
def test_no_method_for_independent_samples_is_certified_part_by_part(kind, memory, few_together):
    """It refuses; or its value says that it was compared with parts, as the whole batch does not fit in memory."""
    model, x = batched(SPLIT[kind])
    kernel = ntkbench.Kernel(model, x, memory=memory)
    J = explicit(model, x)
    exact = {"trace": float(J.square().sum()), "norm": float((J @ J.T).norm())}
    refused = 0
    for name in ("auto", *methods.names()):
        method = methods.get(name if name != "auto" else "structured_derivatives")
        if not method.needs_independent_samples or "torch" not in method.backends or method.needs_recurrence:
            continue
        if not (metric := next((each for each in exact if each in method.metrics), None)):
            continue
        try:
            found = getattr(kernel, metric)(method=name, passes=40 if method.takes_passes else None)
        except ntkbench.NtkbenchError as error:
            assert name != "auto"
            refused += "samples interact" in str(error) or "differs from that of plain autograd" in str(error)
            continue
        if memory != TOO_LITTLE or not any("interactions of more than" in note for note in found.notes):
            assert found.kernel != "Theta" or found.covers(exact[metric], "float64"), (name, found)
    assert refused > 10 or memory == TOO_LITTLE


def test_kernels_are_not_certified_part_by_part(tmp_path, caplog, few_together):
    model, x = batched(crowded)
    J, kernel = explicit(model, x), ntkbench.Kernel(model, x, memory=LITTLE)
    for file in (None, tmp_path / "theta.npy"):
        torch.testing.assert_close(torch.from_numpy(np.array(kernel.ntk(file=file))), J @ J.T)
    with pytest.raises(ntkbench.BadInput, match="samples interact"):
        ntkbench.Kernel(model, x[:15], memory=LITTLE).ntk(x)
    with pytest.raises(Uncertified, match="samples interact"):
        kernel.factors()
    assert "in parts of" not in caplog.text
    kernel = ntkbench.Kernel(model, x, memory=TOO_LITTLE)
    kernel.ntk(kernel="trace")
    assert "the kernel was compared with plain autograd in parts of " in caplog.text
    found = kernel.factors(probes=4)
    for each in (found.K["trace"], found.P["trace"]):
        assert "interactions of more than" in " ".join(each.notes)


def test_interaction_at_later_weights_is_seen(few_together):
    """Experts have room at first, and one is crowded later, as while a network trains."""
    model, x = batched(routed)
    x = x[:16] + 3 * torch.eye(5, dtype=torch.float64)[torch.arange(16) % 4][:, None]
    with torch.no_grad():
        model.a.weight[:4].copy_(torch.eye(4, 5)), model.a.bias.zero_()
    kernel, method = ntkbench.Kernel(model, x, memory=LITTLE), {"method": "structured_derivatives"}
    assert kernel.trace(**method).value == pytest.approx(float(explicit(model, x).square().sum()))
    with torch.no_grad():
        model.a.bias[0] = 100.0
    later = kernel.at(model)
    for estimate in (lambda: later.trace(**method), lambda: kernel.alignment(later, **method)):
        with pytest.raises(Uncertified, match=r"samples interact"):
            estimate()
    assert later.trace().value == pytest.approx(float(explicit(model, x).square().sum()))


def test_wide_heads_are_not_certified_part_by_part(few_together):
    model, x = batched(crowded, 40)
    for name in ("wide_head", "wide_head_u_statistics"):
        with pytest.raises(Uncertified, match=r"samples interact"):
            ntkbench.trace(model, x, memory=LITTLE, method=name)
        with pytest.raises(Uncertified):  # hidden vectors are those of the whole batch
            ntkbench.trace(model, x, memory=TOO_LITTLE, method=name)
        found = ntkbench.trace(*batched(independent, 40), memory=TOO_LITTLE, method=name)
        assert "interactions of more than" in " ".join(found.notes)


@pytest.mark.parametrize("memory", [LITTLE, TOO_LITTLE])
def test_independent_samples_in_parts_are_certified(memory):
    model, x = batched(independent)
    found = ntkbench.trace(model, x, memory=memory, method="structured_derivatives")
    assert found.value == pytest.approx(float(explicit(model, x).square().sum()))
    assert ("interactions of more than" in " ".join(found.notes)) == (memory == TOO_LITTLE)
