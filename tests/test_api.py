"""The public functions against an explicit J by plain autograd."""

from __future__ import annotations

import copy
import math
import subprocess
import sys

import numpy as np
import pytest
import torch
from conftest import metrics_of
from torch import nn

import ntkbench
from ntkbench import ladder, methods
from ntkbench.errors import Undefined, unknown
from ntkbench.options import Target

METRICS = ("trace", "norm", "effective_rank")


def jacobian(model: nn.Module, x: torch.Tensor) -> np.ndarray:
    """J of the model in float64, in its current mode."""
    net = copy.deepcopy(model).double()
    theta = [w for w in net.parameters() if w.requires_grad]
    outputs = net(x.double() if x.is_floating_point() else x).reshape(-1)
    rows = [torch.autograd.grad(out, theta, retain_graph=True, materialize_grads=True) for out in outputs]
    return torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows]).numpy()


def truth(model: nn.Module, x: torch.Tensor) -> dict[str, float]:
    J = jacobian(model, x)
    return metrics_of(J @ J.T)


def seeded(make, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def net(seed: int = 0) -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), seed)


def convnet() -> nn.Sequential:
    return seeded(lambda: nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 2)))


X = seeded(lambda: torch.randn(6, 4))
IMAGES = seeded(lambda: torch.randn(5, 1, 5, 5))


def test_importing_ntkbench_loads_no_backend():
    code = "import sys, ntkbench; dir(ntkbench); print([m for m in ('torch', 'jax', 'numpy') if m in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


def test_every_public_name_exists_and_has_a_docstring():
    assert set(ntkbench.__all__) <= set(dir(ntkbench))
    for name in ntkbench.__all__:
        assert getattr(ntkbench, name).__doc__
    with pytest.raises(AttributeError, match="has no attribute 'kernels'"):
        ntkbench.kernels  # noqa: B018


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize(
    ("model", "x"),
    [
        pytest.param(net(), X, id="mlp"),
        pytest.param(convnet().eval(), IMAGES, id="conv, BatchNorm eval"),
        pytest.param(convnet(), IMAGES, id="conv, BatchNorm train"),
        pytest.param(
            seeded(lambda: nn.InstanceNorm2d(1, affine=True, track_running_stats=True)), IMAGES, id="InstanceNorm"
        ),
        pytest.param(
            seeded(lambda: nn.Sequential(nn.Embedding(7, 3), nn.Flatten(), nn.Linear(12, 2))),
            torch.arange(20).reshape(5, 4) % 7,
            id="embedding, integer inputs",
        ),
        pytest.param(seeded(lambda: nn.Sequential(nn.Linear(4, 1), nn.Flatten(0))), X, id="one output, no axis"),
        pytest.param(net(), X[:1], id="one sample"),
        pytest.param(seeded(lambda: nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 2)).eval()), X, id="Dropout eval"),
        pytest.param(seeded(lambda: nn.Sequential(nn.Dropout(0.0), nn.Linear(4, 2))), X, id="Dropout of nothing"),
    ],
)
def test_metrics_of_any_module(model, x, metric):
    before = copy.deepcopy(model.state_dict())
    random = torch.get_rng_state()
    exact = truth(model, x)[metric]
    for method in ("auto", "direct", "naive_jacobian"):
        estimate = getattr(ntkbench, metric)(model, x, method=method, dtype="float64")
        assert estimate.value == pytest.approx(exact, rel=1e-9)
        assert estimate.standard_error is None or method == "auto"
    assert getattr(ntkbench, metric)(model, x).value == pytest.approx(exact, rel=1e-4)
    assert all(torch.equal(model.state_dict()[key], w) for key, w in before.items())
    assert torch.equal(torch.get_rng_state(), random)


@pytest.mark.parametrize("method", ["auto", "direct", "naive_jacobian", "jacobian_contraction", "ntk_vector_products"])
def test_alignment_of_two_networks(method):
    J, J_f = jacobian(net(0), X), jacobian(net(1), X)
    exact = metrics_of(J @ J.T, J_f @ J_f.T)["alignment"]
    assert ntkbench.alignment(net(0), net(1), X, method=method, dtype="float64").value == pytest.approx(exact, rel=1e-9)
    assert ntkbench.alignment(net(0), net(0), X, method=method, dtype="float64").value == pytest.approx(1, rel=1e-12)


@pytest.mark.parametrize("metric", METRICS)
def test_stochastic_methods_by_name(metric):
    model = net()
    f = getattr(ntkbench, metric)
    first, again, other = (f(model, X, method="hutchinson", passes=100, seed=seed) for seed in (1, 1, 2))
    assert first == again
    assert first.value != other.value
    assert first.passes == 100
    assert first.method == "hutchinson"
    assert abs(first.value - truth(model, X)[metric]) < 6 * first.standard_error
    assert f(model, X, method="hutchinson").passes == methods.get("hutchinson").default_passes


def test_approximate_methods_by_name():
    model = net()
    g = jacobian(model, X).reshape(6, 3, -1).sum(1) / math.sqrt(3)
    estimate = ntkbench.norm(model, X, method="sum_of_logits", dtype="float64")
    assert estimate.value == pytest.approx(np.linalg.norm(np.kron(g @ g.T, np.eye(3))), rel=1e-9)


def test_frozen_parameters_are_not_part_of_theta():
    model = net()
    whole = truth(model, X)["trace"]
    model[0].weight.requires_grad_(False)
    J = jacobian(model, X)
    assert J.shape[1] == 5 + 15 + 3
    problem = ntkbench.from_module(model, X)
    assert list(problem.theta_0) == ["0.bias", "2.weight", "2.bias"]
    for method in ("auto", "direct"):
        value = ntkbench.trace(model, X, method=method, dtype="float64").value
        assert value == pytest.approx(np.trace(J @ J.T), rel=1e-9)
        assert value < whole


def test_frozen_recurrent_weights():
    class Last(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn = nn.GRU(4, 3, batch_first=True)

        def forward(self, x):
            return self.rnn(x)[0][:, -1]

    model, x = seeded(Last), seeded(lambda: torch.randn(3, 4, 4))
    model.rnn.weight_hh_l0.requires_grad_(False)
    for method in ("jacobian_contraction", "direct"):
        assert ntkbench.norm(model, x, method=method, dtype="float64").value == pytest.approx(
            truth(model, x)["norm"], rel=1e-9
        )


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.read = nn.Linear(4, 4)
            self.write = nn.Linear(4, 4)
            self.write.weight = self.read.weight

        def forward(self, x):
            return self.write(torch.tanh(self.read(x)))

    model = seeded(Tied)
    assert ntkbench.from_module(model, X).P == 16 + 4 + 4
    for method in ("auto", "direct", "ntk_vector_products"):
        for dtype in ("float32", "float64"):
            value = ntkbench.norm(model, X, method=method, dtype=dtype).value
            assert value == pytest.approx(truth(model, X)["norm"], rel=1e-4 if dtype == "float32" else 1e-9)


def test_precision_defaults_to_that_of_the_parameters(monkeypatch):
    seen = []
    method = type(methods.get("direct"))
    estimate = method.estimate
    monkeypatch.setattr(method, "estimate", lambda self, p, *rest: seen.append(p.target) or estimate(self, p, *rest))
    for model, dtype in ((net(), None), (net().double(), None), (net(), torch.float64), (net().double(), "float32")):
        ntkbench.trace(model, X, method="direct", dtype=dtype, memory=12345)
    assert [target.dtype for target in seen] == ["float32", "float64", "float64", "float32"]
    assert {(target.backend, target.device, target.memory) for target in seen} == {("torch", "cpu", 12345)}


def test_half_precision_models_need_a_dtype():
    model = net().bfloat16()
    with pytest.raises(ntkbench.BadInput, match=r"parameters are bfloat16; .* dtype='float32' or 'float64'"):
        ntkbench.trace(model, X)
    exact = truth(model.double(), X)["trace"]
    assert ntkbench.trace(net().bfloat16(), X, dtype="float64").value == pytest.approx(exact, rel=1e-9)
    mixed = net()
    mixed[0].double()
    with pytest.raises(ntkbench.BadInput, match="parameters are float32, float64"):
        ntkbench.trace(mixed, X)


def test_later_training_does_not_change_wrapped_problems():
    model = net()
    problem = ntkbench.from_module(model, X)
    digest, weights = problem.digest(), {key: w.copy() for key, w in problem.theta_0.items()}
    first = ntkbench.trace(model, X).value
    with torch.no_grad():
        for w in model.parameters():
            w.mul_(2)
    assert problem.digest() == digest
    assert all(np.array_equal(w, weights[key]) for key, w in problem.theta_0.items())
    second = ntkbench.trace(model, X).value
    assert second == pytest.approx(truth(model, X)["trace"], rel=1e-4)
    assert second != pytest.approx(first, rel=1e-2)


def test_each_call_sees_the_mode_the_model_is_in():
    model = convnet()
    values, exact = [], []
    for mode in (True, False):
        model.train(mode)
        values.append(ntkbench.trace(model, IMAGES, method="direct", dtype="float64").value)
        exact.append(truth(model, IMAGES)["trace"])
    assert values == pytest.approx(exact, rel=1e-9)
    assert values[0] != pytest.approx(values[1], rel=1e-3)


class Steep(nn.Linear):
    """Outputs are zero, and their gradients infinite times zero."""

    def forward(self, x):
        return torch.sqrt(0 * super().forward(x))


class Neighbours(nn.Module):
    """Mixes each sample with the one before it."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x + 0.01 * x.roll(1, 0))


class Pairs(nn.Module):
    """Processes samples in pairs, and fails for an odd number."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 2)

    def forward(self, x):
        return self.layer(x.reshape(-1, 2, 4)).reshape(-1, 2)


@pytest.mark.parametrize(
    ("model", "x", "interact"),
    [
        (net(), X, False),
        (net(), X[:1], False),
        (convnet().train(), IMAGES, True),
        (convnet().eval(), IMAGES, False),
        (seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3))), X, True),
        (seeded(Neighbours), X, True),
        (seeded(Pairs), X, True),
    ],
)
def test_whether_samples_interact_is_measured(model, x, interact):
    problem = ntkbench.from_module(model, x)
    assert problem.samples_interact is interact
    if interact:
        with pytest.raises(ntkbench.BadInput, match=r"jacobian_contraction cannot compute the norm .*samples interact"):
            ntkbench.norm(model, x, method="jacobian_contraction")
    for method in ("direct", "naive_jacobian"):
        value = ntkbench.norm(model, x, method=method, dtype="float64").value
        assert value == pytest.approx(truth(model, x)["norm"], rel=1e-9)


def test_wrapped_problems_describe_their_network():
    problem = ntkbench.from_module(net(), X.double(), net(1), name="mine")
    assert (problem.name, problem.N, problem.O, problem.P) == ("mine", 6, 3, 43)
    assert problem.x.dtype == np.float32
    assert problem.jax_forward is None
    assert list(problem.theta_f) == list(problem.theta_0)
    np.testing.assert_array_equal(problem.theta_f["0.weight"], net(1)[0].weight.detach().numpy())
    assert ntkbench.from_module(net(), X).name == "Sequential"


@pytest.mark.parametrize(
    ("metric", "size", "memory", "passes", "chosen"),
    [
        ("trace", (4, 256), 2**30, None, "structured_derivatives"),
        ("trace", (4, 257), 2**30, None, "structured_block_u_statistics"),
        ("trace", (4, 257), 2**30, 257, "structured_derivatives"),
        ("trace", (4, 64), 1, None, "structured_derivatives"),
        ("trace", (4, 3), 2**30, 2, "structured_block_u_statistics"),
        ("norm", (4, 3), 2**30, None, "structured_derivatives"),
        ("norm", (4, 3), 1, None, "structured_derivatives"),  # until it is known to be computed in many blocks
        ("norm", (4, 257), 2**30, None, "structured_block_u_statistics"),
        ("norm", (100, 16), 2**20, None, "structured_derivatives"),
        ("norm", (100, 17), 2**20, None, "structured_block_u_statistics"),
        ("norm", (6, 3), 2**30, None, "structured_derivatives"),  # 15 parameters for 18 outputs
        ("norm", (1000, 3), 2**30, None, "parameter_gram"),  # 15 parameters for 3000 outputs
        ("effective_rank", (4, 257), 2**30, None, "structured_block_u_statistics"),
        ("alignment", (4, 128), 2**30, None, "structured_derivatives"),
        ("alignment", (4, 129), 2**30, None, "structured_block_u_statistics"),
        ("alignment", (4, 3), 2**30, 5, "structured_block_u_statistics"),
        ("alignment", (4, 3), 2**30, 6, "structured_derivatives"),
    ],
)
def test_auto_chooses_by_passes_and_memory(metric, size, memory, passes, chosen):
    N, O = size  # noqa: E741 - the field's symbol
    inputs = 200 if N == 100 else 4
    x, model = torch.ones(N, inputs), seeded(lambda: nn.Linear(inputs, O))
    problem = ntkbench.from_module(model, x, model if metric == "alignment" else None)
    assert ladder.choices(problem, metric, Target(device="cpu", memory=memory), passes)[0] == chosen


def test_auto_reports_its_method_and_stays_within_its_budget():
    model, x = seeded(lambda: nn.Linear(4, 70)), X
    exact = ntkbench.trace(model, x)
    assert (exact.method, exact.passes, exact.standard_error) == ("structured_derivatives", 70, None)
    estimate = ntkbench.trace(model, x, passes=69)
    assert (estimate.method, estimate.passes) == ("structured_block_u_statistics", 69)
    # A linear model's blocks are diagonal, so sign probes have no variance and rounding is all that is left.
    assert estimate.value == pytest.approx(truth(model, x)["trace"], rel=1e-6)
    assert estimate.standard_error <= 1e-6 * estimate.value
    assert ntkbench.trace(model, x, passes=99).passes == 70  # exact for less than the budget
    assert ntkbench.norm(model, x, passes=41).passes == 41
    assert ntkbench.norm(model, x, passes=10, memory=1).method == "hutchinson"  # gradients would be computed 3.5 times


def test_auto_uses_explicit_jacobians_for_few_interacting_samples():
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3)))
    assert ntkbench.norm(model, X).method == "batched_jacobian"
    assert ntkbench.norm(model, X.repeat(5, 1)).passes == 21  # by columns: fewer parameters than outputs
    wide = seeded(lambda: nn.Sequential(nn.Linear(4, 90), nn.BatchNorm1d(90)))
    assert ntkbench.norm(wide, X).method == "nystrom_loo"
    assert ntkbench.norm(wide, X, rtol=0.1).method == "hutchinson"
    assert ntkbench.trace(wide, X).method == "hutchpp_adaptive"


def bad(says: str, call, id: str | None = None):
    return pytest.param(says, call, id=id or says[:40])


class Raw(nn.Module):
    """Returns a given function of its outputs."""

    def __init__(self, returns):
        super().__init__()
        self.layer = nn.Linear(4, 3)
        self.returns = returns

    def forward(self, x):
        return self.returns(self.layer(x))


@pytest.mark.parametrize(
    ("says", "call"),
    [
        bad(r"unknown method 'hutchpp2' \(did you mean 'hutchpp'", lambda: ntkbench.trace(net(), X, method="hutchpp2")),
        bad("passes must be a positive whole number, got 0", lambda: ntkbench.trace(net(), X, passes=0)),
        bad("passes must be a positive whole number, got -3", lambda: ntkbench.trace(net(), X, passes=-3)),
        bad("passes must be a positive whole number, got 2.5", lambda: ntkbench.trace(net(), X, passes=2.5)),
        bad("passes must be a positive whole number, got True", lambda: ntkbench.trace(net(), X, passes=True)),
        bad("seed must be a whole number, got '1'", lambda: ntkbench.trace(net(), X, seed="1")),
        bad(
            "direct is exact and takes no budget of passes: omit passes",
            lambda: ntkbench.trace(net(), X, method="direct", passes=10),
        ),
        bad(
            "sum_of_logits is approximate and takes no budget of passes",
            lambda: ntkbench.norm(net(), X, method="sum_of_logits", passes=10),
        ),
        bad(
            r"hutchpp takes at least 24 passes for the norm; got passes=\d+",
            lambda: ntkbench.norm(net(), X, method="hutchpp", passes=23),
        ),
        bad(
            "one_sided_reverse computes the trace only, not the norm",
            lambda: ntkbench.norm(net(), X, method="one_sided_reverse"),
        ),
        bad("unknown dtype 'float16'", lambda: ntkbench.trace(net(), X, dtype=torch.float16)),
        bad("unknown device 'tpu'", lambda: ntkbench.trace(net(), X, device="tpu")),
        bad("unknown device 'cuda:x'", lambda: ntkbench.trace(net(), X, device="cuda:x")),
        bad("memory must be a positive whole number of bytes", lambda: ntkbench.trace(net(), X, memory=0)),
        bad(
            "memory must be a positive whole number of bytes, got '1GB'", lambda: ntkbench.trace(net(), X, memory="1GB")
        ),
        bad("seed must be from 0 to", lambda: ntkbench.trace(net(), X, seed=-1)),
        bad("seed must be from 0 to", lambda: ntkbench.ntk(net(), X, seed=2**70)),
        bad("gradient is not finite", lambda: ntkbench.trace(Steep(4, 2), X)),
        bad("gradient is not finite", lambda: ntkbench.norm(Steep(4, 2), X, method="naive_jacobian")),
        bad("gradient is not finite", lambda: ntkbench.norm(Steep(4, 2), X, method="gram_reverse", passes=9)),
        bad("gradient is not finite", lambda: ntkbench.ntk(Steep(4, 2), X)),
        bad("at least one sample.*got shape \\(0, 4\\)", lambda: ntkbench.trace(net(), X[:0])),
        bad("at least one sample.*got shape \\(\\)", lambda: ntkbench.trace(net(), X[0, 0])),
        bad(
            "inputs must be a torch tensor, got ndarray: use torch.from_numpy", lambda: ntkbench.trace(net(), X.numpy())
        ),
        bad("x must be real or integer, got torch.complex64", lambda: ntkbench.trace(net(), X.to(torch.complex64))),
        bad(
            "model must be a torch.nn.Module, or a JAX function f\\(params, x\\) with params=..., got function",
            lambda: ntkbench.trace(lambda x: x, X),
        ),
        bad("no parameters with requires_grad=True", lambda: ntkbench.trace(nn.Tanh(), X), "no parameters"),
        bad(
            "no parameters with requires_grad=True",
            lambda: ntkbench.trace(net().requires_grad_(False), X),
            "all frozen",
        ),
        bad("lazy parameters", lambda: ntkbench.trace(nn.LazyLinear(3), X)),
        bad("complex parameters", lambda: ntkbench.trace(nn.Linear(4, 3, dtype=torch.complex64), X)),
        bad("must return one tensor.*got tuple", lambda: ntkbench.trace(Raw(lambda y: (y, y)), X)),
        bad("a row for each of the N = 6 samples, got shape \\(3, 6\\)", lambda: ntkbench.trace(Raw(lambda y: y.T), X)),
        bad("got shape \\(\\)", lambda: ntkbench.trace(Raw(lambda y: y.sum()), X)),
        bad("got shape \\(6, 0\\)", lambda: ntkbench.trace(Raw(lambda y: y[:, :0]), X)),
        bad("must return real numbers, got torch.int64", lambda: ntkbench.trace(Raw(lambda y: y.argmax(1)), X)),
        bad("nan or infinite", lambda: ntkbench.trace(Raw(lambda y: y / 0), X)),
        bad(
            "model has Dropout in train mode \\(1\\): call model.eval\\(\\) first",
            lambda: ntkbench.trace(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)), X),
        ),
        bad("is random.*model.eval", lambda: ntkbench.trace(Raw(lambda y: nn.functional.dropout(y, 0.5)), X)),
        bad(
            "changes its buffer '0.parametrizations.weight.0._u'.*model.eval",
            lambda: ntkbench.trace(nn.Sequential(unsettled()), X),
        ),
        bad(
            "model has Dropout in train mode",
            lambda: ntkbench.alignment(
                *(nn.Sequential(nn.Linear(4, 3), nn.Dropout(0.1)).train(mode) for mode in (False, True)), X
            ),
        ),
        bad(
            "model_f must be a network, its weights or a target kernel, got None",
            lambda: ntkbench.alignment(net(), None, X),
        ),
        bad(
            "values of its parameters by name, or a target array; got str",
            lambda: ntkbench.alignment(net(), "net", X),
        ),
        bad(
            "6 samples of 3 outputs and Sequential has 6 of 2: N and O must be equal",
            lambda: ntkbench.alignment(net(), net(1).append(nn.Linear(3, 2)), X),
        ),
    ],
)
def test_invalid_calls_are_refused_with_the_reason(says, call):
    with pytest.raises(ntkbench.BadInput, match=says):
        call()


def unsettled() -> nn.Linear:
    """A layer whose estimate of the spectral norm has not converged, so that every call changes it."""
    layer = seeded(lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(4, 3)))
    layer.parametrizations.weight.original.data = seeded(lambda: torch.randn(3, 4), seed=1)
    return layer


def test_bad_input_is_a_value_error():
    with pytest.raises(ValueError, match="passes"):
        ntkbench.trace(net(), X, passes=0)


class Unmoved(nn.Module):
    def __init__(self):
        super().__init__()
        self.unused = nn.Parameter(torch.ones(3))

    def forward(self, x):
        return x.flatten(1) + 0 * self.unused.sum()


@pytest.mark.parametrize("method", ["auto", "direct", "hutchpp", "sample_subset", "structured_block_u_statistics"])
def test_a_kernel_of_zero_has_a_norm_and_no_effective_rank(method):
    """A parameter that no output depends on: the norm is zero, and the effective rank is refused as undefined."""
    model = Unmoved()
    options = {} if method in ("auto", "direct") else {"passes": 400}
    norm = ntkbench.norm(model, torch.randn(6, 4), method=method, **options)
    assert norm.value == 0 and norm.standard_error in (None, 0)
    with pytest.raises(Undefined, match="the effective rank is not defined where Theta is zero"):
        ntkbench.effective_rank(model, torch.randn(6, 4), method=method, **options)


def test_an_absent_gpu_is_reported(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(ntkbench.Unavailable, match="device='cuda' was requested"):
        ntkbench.trace(net(), X, device="cuda")


def test_methods_without_blocks_must_fit_in_memory(monkeypatch):
    monkeypatch.setattr(type(methods.get("direct")), "bytes_needed", lambda *args: 1000, raising=False)
    with pytest.raises(
        ntkbench.OverMemory,
        match="direct needs 1,000 bytes at once for the trace, and memory= is 999 bytes: raise memory",
    ):
        ntkbench.trace(net(), X, method="direct", memory=999)
    assert ntkbench.trace(net(), X, method="direct", memory=1000).method == "direct"


def test_an_estimate_prints_its_interval_and_cost():
    Estimate = ntkbench.Estimate
    exact, random, unsure = (Estimate(12.5, error, 64.0, "some_method") for error in (None, 0.5, math.nan))
    assert str(exact) == "12.5 (some_method, 64 passes)"
    assert str(random) == "12.5, 95 % in [11.52, 13.48] (some_method, 64 passes)"
    assert str(unsure) == "12.5, error unknown (some_method, 64 passes)"
    assert str(Estimate(12.5, None, None, "some_method")) == "12.5 (some_method)"
    assert float(random) == 12.5
    assert exact.interval() == (12.5, 12.5)
    assert exact.relative_width() == 0
    assert unsure.relative_width() == math.inf


def test_intervals_are_symmetric_on_the_scale_of_the_metric():
    """Student's t with the error's degrees of freedom; logarithms of positive metrics, and Fisher's z of alignments."""

    def estimate(metric: str, value: float, degrees: float = math.inf, error: float = 0.1) -> ntkbench.Estimate:
        return ntkbench.Estimate(value, error, 8, "some_method", metric=metric, degrees=degrees)

    assert estimate("", 0.5).interval() == pytest.approx((0.5 - 0.196, 0.5 + 0.196), abs=1e-4)
    assert estimate("", 0.5, 4).interval() == pytest.approx((0.5 - 0.27764, 0.5 + 0.27764), abs=1e-4)
    assert estimate("", 0.5).interval(0.6827) == pytest.approx((0.4, 0.6), abs=1e-4)
    for metric in ("trace", "norm", "effective_rank"):
        low, high = estimate(metric, 5, 4, 1).interval()
        assert low * high == pytest.approx(25)
        assert high / 5 == pytest.approx(math.exp(0.55529), abs=1e-4)
        assert estimate(metric, 5, 4, 1).relative_width() == pytest.approx(math.exp(0.55529) - 1, abs=1e-4)
    low, high = estimate("alignment", 0.9, 4).interval()
    assert (
        math.atanh(high) - math.atanh(0.9)
        == pytest.approx(math.atanh(0.9) - math.atanh(low))
        == pytest.approx(0.27764 / 0.19, abs=1e-3)
    )
    assert -1 < low < high < 1
    # A value outside the metric's range is replaced by the nearest value in it.
    assert estimate("alignment", 1.05).interval() == pytest.approx((1 - 0.196, 1), abs=1e-4)
    assert estimate("trace", -1.0).interval() == pytest.approx((0, 0.196), abs=1e-4)
    assert estimate("trace", 1.0, 0).interval() == (-math.inf, math.inf)


def test_an_unknown_name_comes_with_the_closest_and_the_allowed_names():
    assert str(unknown("fruit", "aple", ["pear", "apple"])) == (
        "unknown fruit 'aple' (did you mean 'apple'?); allowed: apple, pear"
    )
    assert str(unknown("fruit", 7, ["pear"])) == "unknown fruit 7; allowed: pear"


@pytest.mark.parametrize("method", ["gram_reverse", "hutchinson", "block_u_statistics"])
def test_equal_networks_may_name_their_parameters_differently(method):
    model = nn.Linear(3, 2)
    other = nn.Sequential(nn.Linear(3, 2))
    other[0].load_state_dict(model.state_dict())
    found = ntkbench.alignment(model, other, torch.randn(6, 3), method=method, passes=8)
    assert found.value == pytest.approx(1, abs=1e-5)
