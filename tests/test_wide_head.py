"""Wide linear heads: metrics from the hidden vectors, against explicit Jacobians in float64."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import ntkbench
from ntkbench import BadInput, methods
from ntkbench.metrics import METRICS
from ntkbench.operators.certificate import Uncertified
from ntkbench.options import Target
from ntkbench.problems.base.module import from_module

N, T, D, V = 3, 4, 5, 11


def seeded(make, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class Language(nn.Module):
    """Tokens to logits, with attention between the positions."""

    def __init__(self, *, bias: bool = False, last: bool = False, tied: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.block = nn.TransformerEncoderLayer(D, 1, 8, dropout=0.0, batch_first=True)
        self.lm_head = nn.Linear(D, V, bias=bias)
        self.last = last
        if tied:
            self.lm_head.weight = self.table.weight

    def forward(self, tokens):
        logits = self.lm_head(self.block(self.table(tokens)).tanh())
        return logits[:, -1] if self.last else logits


def frozen(name: str) -> nn.Module:
    made = Language(bias=True)
    getattr(made.lm_head, name).requires_grad_(False)
    return made


def deficient() -> nn.Module:
    made = Language()
    with torch.no_grad():
        made.lm_head.weight[:, 1] = made.lm_head.weight[:, 0]
    return made


def vectors(*layers: nn.Module) -> nn.Module:
    return nn.Sequential(nn.Embedding(V, D), nn.Flatten(), nn.Linear(T * D, 6), nn.Tanh(), *layers)


HEADED = {
    "logits": Language,
    "with a bias": lambda: Language(bias=True),
    "last position": lambda: Language(last=True),
    "frozen weight": lambda: frozen("weight"),
    "frozen bias": lambda: frozen("bias"),
    "deficient": deficient,
    "one position": lambda: vectors(nn.Linear(6, 9)),
    "another wide layer before it": lambda: vectors(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 4), nn.Linear(4, 18)),
}
TOKENS = seeded(lambda: torch.randint(0, V, (N, T)))


def explicit(model: nn.Module) -> torch.Tensor:
    """Theta by plain autograd in float64."""
    model = copy.deepcopy(model).double()
    theta = [w for w in model.parameters() if w.requires_grad]
    outputs = model(TOKENS).reshape(-1)
    rows = [torch.autograd.grad(f, theta, retain_graph=True, materialize_grads=True) for f in outputs]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    return J @ J.T


def exact(metric: str, first: torch.Tensor, second: torch.Tensor) -> float:
    found = {
        "trace": first.trace(),
        "norm": first.norm(),
        "effective_rank": first.trace() ** 2 / first.norm() ** 2,
        "alignment": (first * second).sum() / (first.norm() * second.norm()),
    }
    return float(found[metric])


CASES = [(kind, 2**30) for kind in HEADED] + [("with a bias", 2**17), ("last position", 2**15)]


@pytest.mark.parametrize(("kind", "memory"), CASES)
def test_all_metrics(kind, memory):
    model, other = seeded(HEADED[kind]).eval(), seeded(HEADED[kind], 1).eval()
    problem = from_module(model, TOKENS, model_f=other, dtype="float64")
    target = Target("torch", "float64", "cpu", memory=memory)
    method = methods.get("wide_head")
    prepared = method.prepare(problem, target)
    thetas = explicit(model), explicit(other)
    for metric in METRICS:
        assert method.unsupported_reason(problem, metric, target) is None
        found = method.estimate(prepared, metric)
        assert found.value == pytest.approx(exact(metric, *thetas), rel=1e-10), metric
        assert found.certificate < 1e-10
        positions = problem.O // prepared.ends("trace")[0].V
        width = positions * prepared.ends("trace")[0].d
        if memory == 2**30:
            assert found.passes == width * {"trace": 1, "alignment": 3}.get(metric, 1)


def test_auto_takes_it_where_it_takes_fewer_passes():
    model = seeded(Language).eval()
    found = ntkbench.norm(model, TOKENS, dtype="float64")
    assert found.method == "wide_head" and found.passes == T * D
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-10)


def softmax() -> nn.Module:
    return nn.Sequential(Language(), nn.LogSoftmax(-1))


def twice() -> nn.Module:
    layer = nn.Linear(6, 6)
    return vectors(layer, nn.Tanh(), nn.Linear(6, 9), nn.Linear(9, 6), layer)


REFUSED = {
    "as they are": softmax,
    "used more than once": lambda: Language(tied=True),
    "no wider": lambda: vectors(nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)),
    "not those of": lambda: nn.Sequential(Language(), Sliced()),
}


class Sliced(nn.Module):
    def forward(self, x):
        return x[:, :, :10]


@pytest.mark.parametrize("says", REFUSED)
def test_networks_without_a_wide_head_are_refused_in_one_line_and_computed_otherwise(says):
    model = seeded(REFUSED[says]).eval()
    problem = from_module(model, TOKENS, dtype="float64")
    target = Target("torch", "float64", "cpu")
    method = methods.get("wide_head")
    reason = method.unsupported_reason(problem, "norm", target)
    if reason is None:
        with pytest.raises(BadInput, match=says):
            method.prepare(problem, target)
    found = ntkbench.norm(model, TOKENS, dtype="float64")
    assert found.method != "wide_head"
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-10)


BEHIND = {
    "ReLU": nn.ReLU(),
    "ReLU6": nn.ReLU6(),
    "LeakyReLU": nn.LeakyReLU(),
    "ELU": nn.ELU(),
    "Softplus": nn.Softplus(),
    "Hardswish": nn.Hardswish(),
    "Threshold": nn.Threshold(0.5, 0.0),
    "Tanh": nn.Tanh(),
    "abs": abs,
    "sort": lambda x: x.sort(-1).values,
    "flip": lambda x: x.flip(-1),
}


@pytest.mark.parametrize("behind", BEHIND)
def test_what_stands_behind_the_last_layer_is_seen(behind):
    model = seeded(lambda: nn.Sequential(Language(), Function(BEHIND[behind]))).eval()
    problem = from_module(model, TOKENS, dtype="float64")
    with pytest.raises(BadInput, match="not those of its last linear layer"):
        methods.get("wide_head").prepare(problem, Target("torch", "float64", "cpu"))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


class Detached(Language):
    """Its outputs are those of the head, and their gradient is not."""

    def forward(self, tokens):
        hidden = self.block(self.table(tokens))
        return self.lm_head(hidden + (hidden.detach() - hidden) / 2)


class Lying(nn.Module):
    """A copy of the head's results, with another gradient."""

    def __init__(self):
        super().__init__()
        self.model = Language()

    def forward(self, tokens):
        logits = self.model(tokens)
        return logits.detach() + 2 * (logits - logits.detach())


def test_gradients_that_stop_in_front_of_the_head_are_followed():
    model = seeded(Detached).eval()
    found = ntkbench.norm(model, TOKENS, dtype="float64", method="wide_head")
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-10)


def test_gradients_that_are_not_those_of_the_head_are_noticed():
    model = seeded(Lying).eval()
    with pytest.raises(Uncertified):
        ntkbench.norm(model, TOKENS, dtype="float64", method="wide_head")
    found = ntkbench.norm(model, TOKENS, dtype="float64")
    assert found.method != "wide_head"
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-10)
