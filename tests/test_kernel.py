"""Kernels that are prepared once: every use agrees with an explicit Jacobian, and nothing is prepared twice."""

from __future__ import annotations

import copy
import functools
import pickle

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

import ntkbench
from ntkbench import kernel as kernels
from ntkbench import ladder, methods, metrics, progress_bar
from ntkbench.errors import BadInput, Undefined
from ntkbench.estimators import lanczos, spectrum
from ntkbench.layerwise import kernel as layerwise
from ntkbench.layerwise.certificate import Certificate
from ntkbench.operators.dense import DenseJacobian
from ntkbench.operators.torch import TorchRng

N, O = 5, 3  # noqa: E741 - the field's symbol


def net(seed: int = 0, width: int = 7, dtype: torch.dtype = torch.float64) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, O)).to(dtype)


def normed(seed: int = 0) -> nn.Sequential:
    """A network with buffers that training changes."""
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, O)).double()
    model(torch.randn(50, 4, dtype=torch.float64) * (1 + seed) + seed)
    return model.eval()


X = torch.randn(N, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
X2 = torch.randn(2, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def jacobian(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    parameters = [w for w in model.parameters() if w.requires_grad]
    rows = [torch.autograd.grad(y, parameters, retain_graph=True) for y in model(x).reshape(-1)]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])


def theta(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    j = jacobian(model, x)
    return j @ j.T


def cosine(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_all_uses_of_a_kernel_agree_with_the_explicit_theta():
    model = net()
    exact, kernel = theta(model), ntkbench.Kernel(model, X)
    for _ in range(3):  # from an explicit J, then traced, then from the kept trace
        torch.testing.assert_close(kernel.ntk(), exact)
    torch.testing.assert_close(kernel.ntk(X2), jacobian(model) @ jacobian(model, X2).T)
    torch.testing.assert_close(kernel.ntk(X2), jacobian(model) @ jacobian(model, X2).T)
    spectrum = torch.linalg.eigvalsh(exact)
    assert float(kernel.trace()) == pytest.approx(float(exact.trace()))
    assert float(kernel.norm()) == pytest.approx(float(exact.norm()))
    assert float(kernel.effective_rank()) == pytest.approx(float(spectrum.sum() ** 2 / (spectrum**2).sum()))
    np.testing.assert_allclose(kernel.eigenvalues(4).values, spectrum.flip(0)[:4], rtol=1e-9)
    found = kernel.metrics()
    assert set(found) == {"trace", "norm", "effective_rank"} and found["norm"] == float(kernel.norm())
    assert repr(kernel) == "Kernel(Sequential: N = 5, O = 3, P = 59, float64, torch)"


@pytest.mark.parametrize("name", ["sum_of_logits", "single_logit", "random_vector", "trace", "last_layer"])
def test_kernels_between_samples_are_the_same_explicit_and_traced(name):
    kernel = ntkbench.Kernel(net(), X)
    first = kernel.ntk(kernel=name, seed=3)
    assert first.shape == (N, N)
    torch.testing.assert_close(kernel.ntk(kernel=name, seed=3), first)
    torch.testing.assert_close(kernel.ntk(X2, kernel=name, seed=3), ntkbench.ntk(net(), X, X2, kernel=name, seed=3))


class Shared(nn.Module):
    """A head that is used twice, or whose weight is transposed before the first layer."""

    def __init__(self, early: bool) -> None:
        super().__init__()
        self.a, self.b, self.head = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, O, bias=False)
        self.early = early

    def forward(self, x):
        turned = self.head.weight.T
        h = self.a(x).tanh()
        if self.early:
            return self.b(h).tanh() @ turned
        return self.head(h) + self.head(self.b(h).tanh())


class Foreign(nn.Module):
    """A decoder whose bias is a parameter of another module, and whose weight may be that of an embedding."""

    def __init__(self, tied: bool, *, turned: bool = False) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(O))
        self.scale = nn.Parameter(torch.ones(4))
        self.body = nn.Embedding(O, 4) if tied else nn.Linear(4, 4)
        self.decoder = nn.Linear(4, O)
        self.decoder.bias = self.bias
        if tied:
            self.decoder.weight = self.body.weight
        self.turned = turned

    def forward(self, x):
        h = (self.body(x) * self.scale).tanh()
        if self.turned:  # the layer gets a sequence that is not contiguous
            return self.decoder(torch.stack([h, h.sin()], 2).transpose(1, 2)).flatten(1)
        return self.decoder(h)


class Watched(nn.Module):
    """A network that uses its first layer again at the end, for a value that no output depends on."""

    def __init__(self, how: str) -> None:
        super().__init__()
        self.a, self.b, self.how = nn.Linear(4, 4), nn.Linear(4, O), how

    def forward(self, x):
        y = self.b(self.a(x).tanh())
        with torch.no_grad() if self.how == "without gradient" else torch.enable_grad():
            watched = self.a(x).std()
        return y + 0 * watched.detach() if self.how == "detached" else y


TOKENS = torch.tensor([0, 2, 1, 1, 2])
LAST = {
    **{
        f"watched, {how}": (functools.partial(Watched, how), X, ["b.weight", "b.bias"])
        for how in ("without gradient", "detached", "discarded")
    },
    "used twice": (lambda: Shared(False), X, ["head.weight"]),
    "transposed early": (lambda: Shared(True), X, ["head.weight"]),
    "foreign bias": (lambda: Foreign(False), X, ["bias", "decoder.weight"]),
    "foreign bias, added": (lambda: Foreign(False, turned=True), X, ["bias", "decoder.weight"]),
    "tied, foreign bias": (lambda: Foreign(True), TOKENS, ["bias", "body.weight"]),
}


@pytest.mark.parametrize("case", LAST)
def test_the_last_layer_is_the_same_explicit_and_traced(case):
    torch.manual_seed(0)
    make, x, names = LAST[case]
    model = make().double()
    own, outputs = dict(model.named_parameters()), model(x)
    rows = [torch.autograd.grad(y, [own[key] for key in names], retain_graph=True) for y in outputs.reshape(-1)]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).view(N, outputs[0].numel(), -1)
    exact = torch.einsum("aop,bop->ab", J, J) / J.shape[1]
    kernel = ntkbench.Kernel(model, x, dtype="float64")
    for _ in range(2):  # sample by sample, then layer by layer
        torch.testing.assert_close(kernel.ntk(kernel="last_layer"), exact)


def test_functions_give_the_same_as_the_methods_of_a_kernel():
    model, kernel = net(), ntkbench.Kernel(net(), X)
    for name in ("trace", "norm", "effective_rank"):
        wishes = {"method": "hutchinson", "passes": 40, "seed": 5}
        assert getattr(ntkbench, name)(model, X, **wishes) == getattr(kernel, name)(**wishes)
    assert ntkbench.metrics_of(model, X, seed=5) == kernel.metrics(seed=5)
    assert ntkbench.alignment(model, net(1), X, seed=5) == kernel.alignment(net(1), seed=5)


def test_a_network_is_traced_once_for_all_uses(monkeypatch):
    traced = []
    trace = layerwise.trace
    monkeypatch.setattr(layerwise, "trace", lambda *given: traced.append(1) or trace(*given))
    torch.manual_seed(9)
    model = nn.Sequential(nn.Linear(4, 11), nn.Softplus(), nn.Linear(11, O)).double()
    kernel = ntkbench.Kernel(model, X)
    for _ in range(2):
        kernel.ntk(), kernel.ntk(X2), kernel.trace(), kernel.metrics()
        kernel.norm(method="structured_block_u_statistics")
        kernel.at({key: w + 0.1 for key, w in model.state_dict().items()}).norm()
    assert len(traced) == 1


def test_a_method_that_refuses_the_network_is_asked_once(monkeypatch):
    """A ReLU follows the wide layer, which only a trace of the network shows."""
    from ntkbench.methods.wide_head import WideHead

    asked = []
    prepare = WideHead.prepare
    monkeypatch.setattr(WideHead, "prepare", lambda self, *given: asked.append(self.name) or prepare(self, *given))
    net = nn.Sequential(nn.Linear(3, 2), nn.Linear(2, 8), nn.ReLU())
    kernel = ntkbench.Kernel(net, torch.randn(4, 3))
    for _ in range(3):
        with pytest.raises(BadInput, match=r"wide|layer"):
            kernel.trace(method="wide_head")
    assert asked == ["wide_head"]


@pytest.mark.parametrize("make", [net, normed])
def test_other_weights_are_given_by_a_network_or_by_its_state_dict(make):
    kernel, trained = ntkbench.Kernel(make(), X), make(1)
    for weights in (trained, trained.state_dict()):
        torch.testing.assert_close(kernel.at(weights).ntk(), theta(trained))
        assert float(kernel.at(weights).trace(method="one_sided_reverse", passes=30)) == float(
            ntkbench.trace(trained, X, method="one_sided_reverse", passes=30)
        )
    torch.testing.assert_close(kernel.ntk(), theta(make()))  # the kernel itself keeps its weights
    torch.testing.assert_close(kernel.at(trained).at(make()).ntk(), theta(make()))


def test_parameters_that_are_not_given_keep_their_values():
    model = net()
    changed = net()
    with torch.no_grad():
        changed[0].weight.mul_(2)
    kernel = ntkbench.Kernel(model, X).at({"0.weight": model[0].weight * 2})
    torch.testing.assert_close(kernel.ntk(), theta(changed))


@pytest.mark.parametrize(
    ("says", "weights"),
    [
        ("unknown parameter or buffer '0.weigth' \\(did you mean '0.weight'\\?\\)", {"0.weigth": torch.ones(7, 4)}),
        ("'0.weight' must be of shape \\(7, 4\\), got \\(4, 7\\)", {"0.weight": torch.ones(4, 7)}),
        ("nan or infinite weights: '0.weight'", {"0.weight": torch.full((7, 4), torch.nan)}),
        ("weights must be a torch.nn.Module or values by name, got int", 3),
        ("'0.weight' is \\(7, 4\\) in the first and \\(8, 4\\) in the other", net(width=8)),
        ("does not compute what the other network computes", nn.Sequential(net()[0], nn.ReLU(), net()[2])),
        ("has requires_grad=False for '0.bias'", "frozen"),
    ],
)
def test_weights_of_another_network_are_refused(says, weights):
    if weights == "frozen":
        weights = net()
        weights[0].bias.requires_grad_(False)
    with pytest.raises(ntkbench.BadInput, match=says):
        ntkbench.Kernel(net(), X).at(weights)


@pytest.mark.parametrize("method", ["auto", "hutchinson", "block_u_statistics", "structured_derivatives"])
@pytest.mark.parametrize(
    ("first", "second"),
    [(net(), net(1)), (normed(), normed(1)), (net(), normed()), (net(), net(2, width=9))],
    ids=["weights", "buffers", "other network", "other width"],
)
def test_alignment_with_other_weights_buffers_and_networks(first, second, method):
    exact = cosine(theta(first), theta(second))
    wishes = {"hutchinson": {"passes": 4096}, "block_u_statistics": {"passes": 256}}.get(method, {})
    found = ntkbench.alignment(first, second, X, method=method, **wishes)
    assert not any("cannot be traced" in note for note in found.notes)
    if found.standard_error is None:
        assert found.value == pytest.approx(exact, rel=1e-9)
    else:
        low, high = found.interval(0.9999)
        assert low <= exact <= high and high - low < 0.5
    again = ntkbench.Kernel(first, X).alignment(ntkbench.Kernel(second, X), method=method, **wishes)
    assert again.value == pytest.approx(found.value, rel=1e-9)


def test_alignment_with_a_target():
    model = net()
    exact, kernel = theta(model), ntkbench.Kernel(model, X)
    y = torch.randn(N, O, dtype=torch.float64)
    outer = y.reshape(-1, 1) @ y.reshape(1, -1)
    assert kernel.alignment(y).value == pytest.approx(cosine(exact, outer))
    assert kernel.alignment(outer).value == pytest.approx(cosine(exact, outer))
    samples = X @ X.T
    assert kernel.alignment(samples.numpy()).value == pytest.approx(cosine(exact, torch.kron(samples, torch.eye(O))))
    estimated = kernel.alignment(y, method="hutchinson", passes=2000)
    assert estimated.standard_error > 0 and estimated.passes <= 2000
    assert estimated.interval(0.9999)[0] <= cosine(exact, outer) <= estimated.interval(0.9999)[1]
    assert ntkbench.alignment(model, y, X).value == pytest.approx(cosine(exact, outer))


APPROXIMATE = [method.name for method in map(methods.get, methods.names()) if method.kind == "approximate"]


@pytest.mark.parametrize("method", [*APPROXIMATE, "shared_probe_alignment"])
def test_alignment_with_labels_needs_the_norm_of_theta_itself(method):
    """An approximate kernel has another norm, with which the alignment may exceed 1."""
    kernel, y = ntkbench.Kernel(net(), X), torch.ones(N, O)
    says = f"norm of Theta itself, which {method} does not compute; allowed: auto, "
    with pytest.raises(BadInput, match=says) as caught:
        kernel.alignment(y, method=method)
    allowed = str(caught.value).partition("allowed: ")[2].split(", ")
    assert {"structured_derivatives", "hutchinson"} <= set(allowed) and not {*APPROXIMATE, method} & set(allowed)
    with pytest.raises(BadInput) as caught:
        kernel.metrics(y, method=method)
    assert "\n" not in str(caught.value)


def test_the_alignment_with_labels_is_at_most_one():
    model = nn.Sequential(nn.Linear(3, 1, bias=False), nn.Linear(1, 2, bias=False)).double()
    model[1].weight = nn.Parameter(torch.tensor([[1.0], [0.0]], dtype=torch.float64), requires_grad=False)
    x, y = torch.ones(1, 3, dtype=torch.float64), torch.tensor([[1.0, 0.0]])
    assert 1 - 1e-9 < float(ntkbench.alignment(model, y, x)) <= 1
    with pytest.raises(BadInput, match="norm of Theta itself"):
        ntkbench.alignment(model, y, x, method="sum_of_logits")


@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_rounding_is_within_the_interval_where_labels_cancel(scale):
    """Rows of J are alike up to ``scale``, so that centred labels leave only their differences."""
    for seed in range(5):
        model = net(seed, dtype=torch.float32)
        generator = torch.Generator().manual_seed(seed)
        x = 1 + scale * torch.randn(20, 4, generator=generator)
        y = torch.randn(20, O, dtype=torch.float64, generator=generator)
        y -= y.mean(0)
        exact = cosine(theta(copy.deepcopy(model).double(), x.double()), y.reshape(-1, 1) @ y.reshape(1, -1))
        found = ntkbench.Kernel(model, x).alignment(y)
        low, high = found.interval()
        assert low <= exact <= high
        assert found.rounding < 0.1 or scale < 1


def near(value: float, n: int = 20) -> tuple[nn.Linear, torch.Tensor, torch.Tensor]:
    """A network, inputs and labels with an alignment of ``value``: Theta = I + (q - 1) y y^T."""
    q = ((n - 1) / (value**-2 - 1)) ** 0.5
    y = torch.full((n, 1), n**-0.5, dtype=torch.float64)
    x = torch.cat([(q - 1) ** 0.5 * y, torch.eye(n, dtype=torch.float64)], 1)
    return nn.Linear(n + 1, 1, bias=False).double(), x, y


@pytest.mark.parametrize("passes", [None, 600])
@pytest.mark.parametrize("value", [0.3, 0.6, 0.9, 0.97, 0.9995])
def test_an_alignment_with_labels_reaches_its_tolerance_or_notes_that_it_did_not(value, passes):
    model, x, y = near(value)
    kernel = ntkbench.Kernel(model, x)
    assert kernel.alignment(y).value == pytest.approx(value)
    for seed in range(3):
        asked = {"method": "hutchinson", "rtol": 0.1, "passes": passes, "seed": seed}
        for found in (kernel.alignment(y, **asked), kernel.metrics(y, **asked)["alignment"]):
            assert found.passes <= (passes or ladder.TOLERANCE_PASSES)
            missed = any("the alignment did not reach rtol=0.1 at confidence 0.95" in note for note in found.notes)
            assert missed == (found.relative_width() > 0.1)
            low, high = found.interval(0.9999)
            assert low <= value <= high
    found = kernel.metrics(y, rtol=0.1, passes=passes)
    assert found["alignment"].relative_width() <= 0.1 and found["alignment"].value == pytest.approx(value, rel=0.2)


@pytest.mark.parametrize(
    ("case", "memory"),
    mostly_slow(
        [(case, size) for case in ("written out", "traced", "interacting") for size in (None, 20_000, 2000, 64)],
        11,  # all but single rows of samples that interact
    ),
)
def test_the_alignment_with_a_matrix_does_not_depend_on_the_memory(case, memory):
    """Theta as a whole, blocks of samples, and single rows."""
    make = (lambda: normed().train()) if case == "interacting" else net
    exact, generator = theta(make()), torch.Generator().manual_seed(5)
    for size, dtype in ((N * O, torch.float64), (N, torch.float64), (N, torch.float32), (N, torch.int64)):
        target = (10 * torch.randn(size, size, dtype=torch.float64, generator=generator)).to(dtype)
        whole = target.double() if size == N * O else torch.kron(target.double(), torch.eye(O, dtype=torch.float64))
        kernel = ntkbench.Kernel(make(), X, memory=memory)
        kernel._used = case == "traced"
        found = kernel.alignment(target)
        assert found.value == pytest.approx(cosine(exact, whole), rel=1e-9, abs=1e-12)
        assert found.standard_error is None and found.rounding > 0


@pytest.mark.parametrize("memory", [None, 34 * (N * O) ** 2])
@pytest.mark.parametrize("case", ["written out", "traced", "interacting", "contradicted"])
def test_results_from_all_of_theta_state_the_passes_spent(monkeypatch, case, memory):
    """Including those of failed methods, which the notes name."""
    counted: list[float] = []
    monkeypatch.setattr(progress_bar, "advance", counted.append)
    if case == "contradicted":
        monkeypatch.setattr(Certificate, "difference", lambda *_: 1.0)
    kernel = ntkbench.Kernel(normed().train() if case == "interacting" else net(), X, memory=memory)
    uses = {
        "spectrum": lambda: kernel.spectrum(2),
        "eigenvalues": lambda: kernel.eigenvalues(2),
        "solution": lambda: kernel.solve(torch.ones(N, O), ridge=1.0),
        "alignment": lambda: kernel.alignment(torch.eye(N * O)),
    }
    least = {"interacting": N * O, "contradicted": 2 * O}.get(case, O)
    for name, use in uses.items():
        kernel._used = case in ("traced", "contradicted")
        counted.clear()
        found = use()
        assert found.passes == pytest.approx(sum(counted) / N), name
        if memory is None or name == "alignment":
            assert found.passes >= least
            failed = any(note.startswith("passed over layer by layer: ") for note in found.notes)
            assert failed == (case == "contradicted")


def test_eigenvalues_use_products_where_a_decomposition_does_not_fit(monkeypatch):
    """Theta itself would fit twice."""
    monkeypatch.setattr(spectrum, "of_matrix", lambda *given: pytest.fail("it holds four matrices"))
    found = ntkbench.Kernel(net(), X, memory=34 * (N * O) ** 2).eigenvalues(3, rtol=1e-6)
    np.testing.assert_allclose(found.values, torch.linalg.eigvalsh(theta(net())).flip(0)[:3], rtol=1e-8)


def test_eigenvalues_use_products_where_a_sample_has_many_outputs():
    """The kernel takes a pass for each output of a sample."""
    made = nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 300)).double()
    kernel = ntkbench.Kernel(made, X[:2])
    found = kernel.eigenvalues(1)
    assert found.passes < 300
    assert abs(found.values[0] - np.linalg.eigvalsh(theta(made, X[:2]))[-1]) <= found.errors[0]
    assert kernel.eigenvalues().passes < 300 <= kernel.spectrum().passes


def test_the_default_number_of_eigenvalues_fits_in_memory():
    kernel = ntkbench.Kernel(net(), X, memory=34 * (N * O) ** 2)
    assert len(kernel.eigenvalues().values) == 10
    wide = ntkbench.Kernel(nn.Linear(4, 1).double(), torch.randn(100, 4, dtype=torch.float64), memory=100_000)
    assert len(wide.eigenvalues().values) == lanczos.most(100, 100_000) == 6
    with pytest.raises(ntkbench.OverMemory, match=r"top=7 needs .* enough for top=6"):
        wide.eigenvalues(7)


BUDGETED = [method.name for method in map(methods.get, methods.names()) if method.takes_passes]
QUICK = {"auto", "hutchinson", "hutchpp", "sample_subset", "dense_jl"}
"""One for each way to spend a budget: probes for all metrics, probes for each of them, samples, and features."""


@pytest.mark.parametrize("method", mostly_slow(["auto", *BUDGETED], QUICK))
def test_a_budget_covers_all_metrics_and_a_target_together(monkeypatch, method):
    """A budget that is too small is refused in one line."""
    counted: list[float] = []
    monkeypatch.setattr(progress_bar, "advance", counted.append)
    kernel, y = ntkbench.Kernel(net(), X), torch.randn(N, O, dtype=torch.float64)
    uses = {
        "alone": lambda **asked: kernel.metrics(**asked),
        "with a network": lambda **asked: kernel.metrics(net(1), **asked),
        "with a target": lambda **asked: kernel.metrics(y, **asked),
        "target alone": lambda **asked: {"alignment": kernel.alignment(y, **asked)},
    }
    done, gives = 0, metrics.METRICS if method == "auto" else methods.get(method).metrics
    for name, use in uses.items():
        for passes in (1, 7, 33, 100, 145, 400):
            try:
                use(method=method, passes=passes)  # certifies the products
                counted.clear()
                found = use(method=method, passes=passes)
            except ntkbench.NtkbenchError as error:
                assert len(str(error).splitlines()) == 1
                continue
            done += 1
            assert all(e.passes <= passes for e in found.values()), (name, passes)
            if name != "with a network":  # whose products are certified again
                assert sum(counted) / N <= passes + 1e-9, (name, passes)
                if any(e.standard_error is not None for e in found.values()):
                    assert [e.passes for e in found.values()] == pytest.approx([sum(counted) / N] * len(found))
    assert done or not {"trace", "norm"} <= set(gives) or method == "wide_head_u_statistics"


def test_methods_that_cannot_add_probes_say_how_they_split_a_budget():
    kernel = ntkbench.Kernel(net(), X)
    found = kernel.metrics(method="hutchpp", passes=100)
    spent = [16 // 6 * 6, 33 // 12 * 12, 50 // 18 * 18]
    for e, part in zip(found.values(), (16, 33, 50), strict=True):
        assert e.passes == sum(spent)
        assert f"the metrics share no probes: {part} of 100 passes are for the {metrics.words(e.metric)}" in e.notes
    says = "hutchpp takes at least 72 passes for the trace, norm and effective rank together; got passes=71"
    with pytest.raises(BadInput, match=says):
        kernel.metrics(method="hutchpp", passes=71)
    y = torch.ones(N, O)
    with pytest.raises(BadInput, match="norm by gram_reverse, and the alignment with a target, take at least 5 passes"):
        kernel.alignment(y, method="gram_reverse", passes=4)
    assert kernel.alignment(y, method="gram_reverse", passes=5).passes == 5


@pytest.mark.parametrize(
    ("says", "other"),
    [
        (r"like the outputs, \(5, 3\) or \(15,\), or a kernel \(15, 15\) or \(5, 5\); got", torch.ones(4, 4)),
        ("finite and not zero", torch.zeros(5, 3)),
        ("finite and not zero", torch.full((5, 3), torch.nan)),
        ("5 samples of 3 outputs and Linear has 5 of 2: N and O must be equal", nn.Linear(4, 2).double()),
    ],
)
def test_an_alignment_with_an_invalid_target_or_network_is_refused(says, other):
    with pytest.raises(ntkbench.BadInput, match=says):
        ntkbench.Kernel(net(), X).alignment(other)


@given(
    n=st.integers(3, 40), rank=st.integers(1, 40), top=st.integers(1, 5), twice=st.booleans(), seed=st.integers(0, 99)
)
@settings(deadline=None, max_examples=40)
def test_largest_eigenvalues_are_within_their_errors_of_the_exact_ones(n, rank, top, twice, seed):
    rng = np.random.default_rng(seed)
    j = rng.standard_normal((n, min(rank, n)))
    if twice:  # multiple eigenvalues
        j = np.block([[j, np.zeros_like(j)], [np.zeros_like(j), j]])
    top = min(top, len(j))
    exact = np.linalg.eigvalsh(j @ j.T)[::-1][:top]
    found = lanczos.largest(dense(j), top, rtol=1e-6, passes=10**6, seed=seed)
    np.testing.assert_allclose(found.values, exact, atol=1e-5 * exact[0])
    assert (found.errors <= 1e-6 * np.maximum(exact, 1e-6 * exact[0]) + 1e-9 * exact[0]).all() or found.notes == ()


@pytest.mark.parametrize("outputs", [1, 3])
def test_eigenvalues_of_a_small_theta_in_float32_are_within_their_errors(outputs):
    """Most of the error is due to the network's own passes, not to the decomposition."""
    for seed in range(10):
        torch.manual_seed(seed)
        layers = [layer for _ in range(12) for layer in (nn.Linear(4, 4), nn.Tanh())]
        model, x = nn.Sequential(*layers, nn.Linear(4, outputs)), torch.randn(1, 4)
        exact = np.linalg.eigvalsh(theta(copy.deepcopy(model).double(), x.double()))[::-1]
        kernel = ntkbench.Kernel(model, x)
        found = kernel.eigenvalues(outputs)
        assert (abs(found.values - exact) <= found.errors).all()
        # The errors include the certificate, which uses other products in each call.
        np.testing.assert_allclose(found.errors, kernel.spectrum(outputs).errors, rtol=0.5)


def dense(j: np.ndarray) -> DenseJacobian:
    return DenseJacobian(torch.from_numpy(j), lambda seed: TorchRng(seed, torch.float64, torch.device("cpu")))


def test_eigenvalues_of_a_large_theta_use_products_and_note_a_missed_tolerance(monkeypatch):
    model = net()
    exact = torch.linalg.eigvalsh(theta(model)).flip(0)
    monkeypatch.setattr(kernels, "SMALL", 2)
    found = ntkbench.Kernel(model, X).eigenvalues(3, rtol=1e-6)
    np.testing.assert_allclose(found.values, exact[:3], rtol=1e-8)
    assert found.passes >= 14 and (found.errors <= 1e-6 * found.values).all() and found.notes == ()
    short = ntkbench.Kernel(model, X).eigenvalues(3, rtol=1e-9, passes=14)
    assert "rtol=1e-09 was not reached in 14 passes" in short.notes[0]
    assert (np.abs(short.values - exact[:3].numpy()) <= short.errors).all()


@pytest.mark.parametrize(
    ("says", "given"),
    [
        ("top must be at most n = 15", {"top": 16}),
        ("top must be a positive whole number", {"top": 0}),
        ("rtol must be a number between 0 and 1", {"rtol": 2}),
        ("passes must be a positive whole number", {"passes": 1.5}),
    ],
)
def test_eigenvalues_that_cannot_be_computed_are_refused(says, given):
    with pytest.raises(ntkbench.BadInput, match=says):
        ntkbench.Kernel(net(), X).eigenvalues(**given)


def test_unknown_keywords_are_named_before_anything_runs():
    with pytest.raises(ntkbench.BadInput, match="unknown keyword 'pases' \\(did you mean 'passes'\\?\\)"):
        ntkbench.trace(net(), X, pases=3)
    for keyword in ("method", "passes", "rtol", "confidence"):  # of metrics
        with pytest.raises(ntkbench.BadInput, match=f"unknown keyword '{keyword}'"):
            ntkbench.ntk(net(), X, **{keyword: 3})
    with pytest.raises(ntkbench.BadInput, match="unknown method 'hutchinsons'"):
        ntkbench.trace("no model", X, method="hutchinsons")


def test_a_tracker_follows_training_with_the_same_probes():
    model, seen = net(), []
    tracker = ntkbench.Tracker(model, X, every=2, log=lambda step, found: seen.append(step), seed=4)
    exact, start = [], theta(model)
    for step in range(5):
        before = torch.get_rng_state()
        found = tracker(step)
        assert torch.equal(torch.get_rng_state(), before)
        assert (found is None) == (step % 2 == 1)
        if found is not None:
            exact.append((float(theta(model).trace()), cosine(theta(model), start)))
        with torch.no_grad():
            for w in model.parameters():
                w.add_(0.05 * torch.randn(w.shape, generator=torch.Generator().manual_seed(step)))
    table = tracker.table()
    assert table["step"].tolist() == seen == [0, 2, 4]
    np.testing.assert_allclose(table[["trace", "alignment"]], exact, rtol=1e-9)
    assert set(metrics.METRICS) <= set(table.columns) and (table["norm_low"] <= table["norm_high"]).all()


@pytest.mark.parametrize("mode", [True, False])
def test_a_tracker_keeps_the_mode_that_it_was_made_in(mode):
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(6) if mode else nn.Sequential(nn.BatchNorm1d(6), nn.Dropout(0.5))
    model = nn.Sequential(nn.Linear(4, 6), norm, nn.Linear(6, O)).double().train(mode)
    tracker = ntkbench.Tracker(model, X, every=1, metrics=("trace",), seed=1)
    for step in range(2):
        model.train(mode)
        exact = float(theta(copy.deepcopy(model)).trace())
        model.train()
        assert float(tracker(step)["trace"]) == pytest.approx(exact)
        model(X).square().sum().backward()
        with torch.no_grad():
            for w in model.parameters():
                w -= 0.01 * w.grad


def test_a_tracker_refuses_invalid_arguments():
    for says, keywords in (
        ("every must be a positive whole number", {"every": 0}),
        ("unknown metric 'tracer'", {"metrics": ["tracer"]}),
        ("metrics must be one or more names", {"metrics": "trace"}),
        ("unknown keyword 'seeds'", {"seeds": 3}),
    ):
        with pytest.raises(ntkbench.BadInput, match=says):
            ntkbench.Tracker(net(), X, **keywords)


def test_a_tracker_refuses_steps_that_go_back():
    """With batch numbers that start again in each epoch, it would measure the first epoch alone."""
    tracker = ntkbench.Tracker(net(), X, every=2, metrics=("trace",))
    for step in range(4):
        tracker(step)
    tracker(3)
    with pytest.raises(BadInput, match=r"^steps must not go back, got 0 after 3: count over all epochs$"):
        tracker(0)
    assert tracker.table()["step"].tolist() == [0, 2]


@pytest.mark.slow
def test_a_hugging_face_trainer_calls_a_tracker():
    pytest.importorskip("transformers")
    tracker = ntkbench.Tracker(net(), X, every=10, metrics=("trace",))
    callback = tracker.trainer_callback()

    class State:
        global_step = 0

    for State.global_step in range(21):
        callback.on_step_end(None, State, None)
    assert tracker.table()["step"].tolist() == [0, 10, 20]


def function(params, x):
    import jax.numpy as jnp

    return jnp.tanh(x @ params["layers"][0]) @ params["layers"][1]


def explicit_in_jax(params, x, x2=None) -> np.ndarray:
    import jax

    def rows(x):
        made = jax.jacrev(function)(params, x)
        return np.concatenate([np.asarray(j).reshape(len(x) * O, -1) for j in made["layers"]], 1)

    with jax.enable_x64():
        return rows(x) @ rows(x if x2 is None else x2).T


@pytest.mark.slow
def test_a_function_in_jax_has_all_uses_of_a_kernel():
    import jax

    wide = jax.config.jax_enable_x64
    rng = np.random.default_rng(0)
    params, params_f = ({"layers": [rng.standard_normal((4, 6)), rng.standard_normal((6, O))]} for _ in range(2))
    x, x2 = rng.standard_normal((N, 4)), rng.standard_normal((2, 4))
    exact, exact_f = explicit_in_jax(params, x), explicit_in_jax(params_f, x)
    kernel = ntkbench.Kernel(function, x, params=params)
    assert repr(kernel) == "Kernel(function: N = 5, O = 3, P = 42, float64, jax)"
    np.testing.assert_allclose(kernel.ntk(), exact, rtol=1e-9)
    np.testing.assert_allclose(kernel.ntk(x2), explicit_in_jax(params, x, x2), rtol=1e-9)
    np.testing.assert_allclose(ntkbench.ntk(function, x, params=params), exact, rtol=1e-9)
    u = np.kron(np.eye(N), np.full((1, O), O**-0.5))
    np.testing.assert_allclose(kernel.ntk(kernel="sum_of_logits"), u @ exact @ u.T, rtol=1e-9)
    assert float(kernel.trace()) == pytest.approx(exact.trace())
    assert float(ntkbench.norm(function, x, params=params)) == pytest.approx(float(np.linalg.norm(exact)))
    aligned = float((exact * exact_f).sum() / np.linalg.norm(exact) / np.linalg.norm(exact_f))
    assert float(kernel.alignment(params_f)) == pytest.approx(aligned)
    assert float(ntkbench.alignment(function, params_f, x, params=params)) == pytest.approx(aligned)
    assert float(kernel.alignment(kernel.at(params_f))) == pytest.approx(aligned)
    same = kernel.alignment(ntkbench.Kernel(function, x.copy(), params=params_f))
    assert float(same) == pytest.approx(aligned) and same.standard_error is None
    elsewhere = kernel.alignment(ntkbench.Kernel(function, x + 1, params=params_f), passes=16)
    assert elsewhere.standard_error > 0, "kernels on other inputs are not those of one function on the same ones"
    np.testing.assert_allclose(kernel.at(params_f).ntk(), exact_f, rtol=1e-9)
    np.testing.assert_allclose(kernel.eigenvalues(3).values, np.linalg.eigvalsh(exact)[::-1][:3], rtol=1e-9)
    parts = kernel.groups({"first": "layers.0", "second": "layers.1"})
    np.testing.assert_allclose(parts["first"].ntk() + parts["second"].ntk(), exact, rtol=1e-9)
    estimated = kernel.norm(method="hutchinson", passes=400)
    assert estimated.interval(0.9999)[0] <= np.linalg.norm(exact) <= estimated.interval(0.9999)[1]
    assert jax.config.jax_enable_x64 == wide, "the caller's settings were changed"
    with pytest.raises(ntkbench.BadInput, match=r"kernel='last_layer' is for a torch\.nn\.Module; for a JAX function"):
        kernel.ntk(kernel="last_layer")
    with pytest.raises(ntkbench.BadInput, match="structure"):
        kernel.at({"layers": params["layers"][:1]})


@pytest.mark.parametrize("make", [nn.RNN, nn.GRU, nn.LSTM])
def test_weights_and_groups_of_recurrent_layers_have_the_names_of_the_layer(make):
    torch.manual_seed(0)
    layer, other = make(3, 4).double(), make(3, 4).double()
    x = torch.randn(5, 2, 3, dtype=torch.float64)
    kernel = ntkbench.Kernel(layer, x)
    exact = ntkbench.ntk(other, x)
    for weights in (other, other.state_dict()):
        torch.testing.assert_close(kernel.at(weights).ntk(), exact)
    parts = kernel.at(other).groups({"inputs": "*_ih_l0", "states": "*_hh_l0"})
    torch.testing.assert_close(sum(part.ntk() for part in parts.values()), exact)
    assert kernel.alignment(other).value == pytest.approx(cosine(kernel.ntk(), exact))


def test_weights_and_groups_of_a_model_given_with_call_have_its_own_names():
    model, other = net(), net(1)
    batch = {"a": X[:, :2], "b": X[:, 2:]}
    kernel = ntkbench.Kernel(model, batch, call=lambda m, b: m(torch.cat([b["a"], b["b"]], 1)), output=1)
    exact = theta(other)[1::O, 1::O]
    for weights in (other, other.state_dict()):
        torch.testing.assert_close(kernel.at(weights).ntk(), exact)
    more = {"a": X2[:, :2], "b": X2[:, 2:]}
    torch.testing.assert_close(kernel.at(other).ntk(more), (jacobian(other) @ jacobian(other, X2).T)[1::O, 1::O])
    parts = kernel.at(other).groups({"first": "0", "last": "2.*"})
    torch.testing.assert_close(sum(part.ntk() for part in parts.values()), exact)
    found = ntkbench.ntk(
        model, batch, call=kernel.problem.module.call, output=1, parameters={"first": "0", "last": "2"}
    )
    torch.testing.assert_close(sum(found.values()), theta(model)[1::O, 1::O])
    aligned = kernel.alignment(nn.Sequential(nn.Linear(4, O).double()))
    assert 0 < aligned.value < 1


@pytest.mark.parametrize("call", [None, lambda model, inputs: model(inputs["x"])])
def test_later_writes_to_the_inputs_change_nothing(call):
    """Another network is evaluated on the kept inputs as well."""
    x = X.clone()
    kernel = ntkbench.Kernel(net(), x if call is None else {"x": x}, call=call)
    exact = cosine(theta(net()), theta(net(1, width=9)))
    x.zero_()
    assert kernel.alignment(net(1, width=9)).value == pytest.approx(exact)
    torch.testing.assert_close(kernel.at(net(1)).ntk(), theta(net(1)))


@pytest.mark.parametrize("inputs", [X, {"input": X}], ids=["a tensor", "a mapping"])
def test_pickling_a_used_kernel_drops_what_was_prepared(inputs):
    kernel = ntkbench.Kernel(net(), inputs, output=[0, 2])
    used = [kernel.ntk() for _ in range(2)], kernel.metrics(net(1)), kernel.eigenvalues(3).values
    stored = pickle.dumps(kernel)
    assert len(stored) < len(pickle.dumps(ntkbench.Kernel(net(), inputs, output=[0, 2]))) + 100
    for same in (pickle.loads(stored), copy.copy(kernel), copy.deepcopy(kernel)):
        for found, theta in zip([same.ntk() for _ in range(2)], used[0], strict=True):
            assert torch.equal(found, theta)
        assert same.metrics(net(1)) == used[1]
        np.testing.assert_array_equal(same.eigenvalues(3).values, used[2])
        torch.testing.assert_close(same.at(net(1)).ntk(), kernel.at(net(1)).ntk())


def test_the_alignment_of_a_zero_theta_is_undefined():
    model = nn.Sequential(nn.Linear(4, O), nn.ReLU()).double()
    with torch.no_grad():
        model[0].weight.zero_()
        model[0].bias.fill_(-1)
    for target in (torch.ones(N, O), torch.ones(N, N)):
        with pytest.raises(Undefined, match="not defined where Theta is zero"):
            ntkbench.Kernel(model, X).alignment(target)


def test_a_failed_measurement_of_a_tracker_does_not_stop_the_training():
    model, seen = net(), []
    tracker = ntkbench.Tracker(model, X, every=1, metrics=("alignment",), log=lambda step, found: seen.append(step))
    first = next(model.parameters())
    kept = first.detach().clone()
    for step in range(3):
        with torch.no_grad():
            first.copy_(kept)
            if step == 1:
                first[0, 0] = torch.nan
        assert bool(tracker(step)) == (step != 1)
    table = tracker.table()
    assert table["step"].tolist() == [0, 1, 2] and seen == [0, 2]
    assert table["alignment"].isna().tolist() == [False, True, False]
    assert "nan or infinite weights" in table["reason"][1] and table["reason"][0] == ""


def test_an_error_of_a_group_names_it():
    class Unused(nn.Module):
        def __init__(self):
            super().__init__()
            self.used, self.unused = nn.Linear(3, 2), nn.Linear(3, 2)

        def forward(self, x):
            return self.used(x)

    groups = {"body": "used.*", "pooler": "unused.*"}
    with pytest.raises(Undefined, match=r"^group 'pooler': "):
        ntkbench.effective_rank(Unused(), torch.randn(4, 3), parameters=groups)


def test_sparse_targets():
    model, kernel = net(), ntkbench.Kernel(net(), X)
    A = torch.eye(N, dtype=torch.float64)
    y = torch.zeros(N, O, dtype=torch.float64)
    y[1, 2] = 1
    for sparse in (A.to_sparse(), A.to_sparse_csr()):
        assert ntkbench.alignment(model, sparse, X).value == ntkbench.alignment(model, A, X).value
    np.testing.assert_allclose(kernel.solve(y.to_sparse(), ridge=1).values, kernel.solve(y, ridge=1).values)


def test_the_interval_of_a_negative_alignment_covers_rounding():
    e = ntkbench.alignment(net(), -torch.eye(N * O, dtype=torch.float64), X)
    low, high = e.interval()
    assert low < e.value < 0 and e.value < high
