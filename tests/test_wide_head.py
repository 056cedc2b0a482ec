"""Wide linear heads: metrics from the hidden vectors, against explicit Jacobians in float64."""

from __future__ import annotations

import copy
import dataclasses
import fnmatch
import functools
import math
import statistics

import pytest
import torch
from conftest import mostly_slow
from torch import nn

import ntkbench
from ntkbench import BadInput, OverMemory, methods, metrics, problems
from ntkbench.methods.base import gram, tied_head
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


class Own(nn.Module):
    """A head with parameters of its own, applied by a function of hidden vectors, weight and bias."""

    def __init__(self, apply, *shape: int, bias: bool = False) -> None:
        super().__init__()
        self.table = nn.Embedding(V, D)
        self.hidden = nn.Linear(D, D)
        self.apply_head = apply
        self.W = nn.Parameter(torch.randn(shape))
        self.b = nn.Parameter(torch.randn(max(shape))) if bias else None

    def forward(self, tokens):
        return self.apply_head(self.hidden(self.table(tokens)).tanh(), self.W, self.b)


class Conv1D(nn.Module):
    """A linear layer with the weight and the sizes of that in Hugging Face's GPT-2."""

    def __init__(self) -> None:
        super().__init__()
        self.nf = V
        self.weight = nn.Parameter(torch.randn(D, V))
        self.bias = nn.Parameter(torch.randn(V))

    def forward(self, x):
        return torch.addmm(self.bias, x.view(-1, x.shape[-1]), self.weight).view(*x.shape[:-1], self.nf)


class InList(nn.Module):
    """A head whose weight is in a list of parameters, read at some positions by index."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.hidden = nn.Embedding(V, D), nn.Linear(D, D)
        self.heads = nn.ParameterList([torch.randn(V, D)])

    def forward(self, tokens):
        logits = nn.functional.linear(self.hidden(self.table(tokens)).tanh(), self.heads[0])
        return logits[:, torch.tensor([2, 0, 2])]


OWN = {
    "linear": lambda: Own(nn.functional.linear, V, D),
    "linear with a bias": lambda: Own(nn.functional.linear, V, D, bias=True),
    "product": lambda: Own(lambda h, W, b: h @ W, D, V),
    "product with a bias": lambda: Own(lambda h, W, b: h @ W + b, D, V, bias=True),
    "bias first": lambda: Own(lambda h, W, b: b + h @ W.T, V, D, bias=True),
    "einsum": lambda: Own(lambda h, W, b: torch.einsum("btd,vd->btv", h, W), V, D),
    "einsum, weight first": lambda: Own(lambda h, W, b: torch.einsum("dv,btd->btv", W, h), D, V),
    "einsum with a bias": lambda: Own(lambda h, W, b: torch.einsum("btd,dv->btv", h, W) + b, D, V, bias=True),
    "product of a batch": lambda: Own(lambda h, W, b: torch.bmm(h, W.expand(len(h), -1, -1)), D, V),
    "Conv1D": lambda: nn.Sequential(nn.Embedding(V, D), nn.Linear(D, D), nn.Tanh(), Conv1D()),
    "in a list": InList,
}
"""Heads that are not linear layers of torch.nn."""

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


def explicit(model: nn.Module, x: torch.Tensor = TOKENS) -> torch.Tensor:
    """Theta by plain autograd in float64."""
    model = copy.deepcopy(model).double()
    theta = [w for w in model.parameters() if w.requires_grad]
    outputs = model(x).reshape(-1)
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


@functools.cache
def pair(kind: str, tied: bool):
    """A network with a wide head at two sets of weights, as a problem, and its exact kernels."""
    model, other = two(TIED[kind]) if tied else (seeded(HEADED[kind]).eval(), seeded(HEADED[kind], 1).eval())
    return from_module(model, TOKENS, model_f=other, dtype="float64"), (explicit(model), explicit(other))


@functools.cache
def ready_for(kind: str, tied: bool, memory: int):
    """The problem as all methods of wide heads prepare it."""
    return methods.get("wide_head").prepare(pair(kind, tied)[0], Target("torch", "float64", "cpu", memory=memory))


CASES = [(kind, 2**30) for kind in HEADED] + [("with a bias", 2**17), ("last position", 2**15)]


@pytest.mark.parametrize(("kind", "memory"), mostly_slow(CASES, {("with a bias", 2**30)}))
def test_all_metrics_match_the_explicit_kernel(kind, memory):
    problem, thetas = pair(kind, False)
    target = Target("torch", "float64", "cpu", memory=memory)
    method, prepared = methods.get("wide_head"), ready_for(kind, False, memory)
    for metric in METRICS:
        assert method.unsupported_reason(problem, metric, target) is None
        found = method.estimate(prepared, metric)
        assert found.value == pytest.approx(exact(metric, *thetas), rel=1e-10), metric
        assert found.certificate < 1e-10
        positions = problem.O // prepared.ends("trace")[0].V
        width = positions * prepared.ends("trace")[0].d
        if memory == 2**30:
            assert found.passes == width * {"trace": 1, "alignment": 3}.get(metric, 1)


@pytest.mark.parametrize(
    "kind",
    mostly_slow(OWN, {"linear with a bias", "bias first", "einsum, weight first", "product of a batch", "in a list"}),
)
def test_heads_that_are_not_linear_layers_are_found(kind):
    """The exact value by ``auto``, an alignment, and the kernel that estimators run on, against plain autograd."""
    (model, other), target = two(OWN[kind]), Target("torch", "float64", "cpu")
    thetas = explicit(model), explicit(other)
    found = ntkbench.norm(model, TOKENS, dtype="float64")
    assert found.method == "wide_head" and found.passes == found.passes // D * D < T * V
    plain = ntkbench.norm(model, TOKENS, dtype="float64", method="naive_jacobian")
    assert found.value == pytest.approx(plain.value, rel=1e-10)
    assert found.value == pytest.approx(exact("norm", *thetas), rel=1e-10)
    problem = from_module(model, TOKENS, model_f=other, dtype="float64")
    prepared = methods.get("wide_head").prepare(problem, target)
    assert methods.get("wide_head").estimate(prepared, "alignment").value == pytest.approx(
        exact("alignment", *thetas), rel=1e-10
    )
    (short,) = prepared.short.networks("norm")
    gram_of = short.engine.kernel(short.parameters, short.x).reshape(2 * (len(short.x) * short.engine.O,))
    assert prepared.short.certificate("norm") < 1e-10
    assert metrics.from_gram(gram_of).plus(prepared.short.known("norm")).metric("norm") == pytest.approx(
        exact("norm", *thetas), rel=1e-10
    )


@pytest.mark.parametrize("chosen", ["hidden.* table.*", "hidden.* b", "W table.*", "W b"])
def test_heads_with_selected_parameters_have_their_kernel(chosen):
    model = seeded(OWN["product with a bias"]).eval()
    found = ntkbench.norm(model, TOKENS, parameters=chosen.split(), dtype="float64")
    for key, w in model.named_parameters():
        w.requires_grad_(any(fnmatch.fnmatch(key, pattern) for pattern in chosen.split()))
    assert (found.method == "wide_head") == (chosen != "W b")  # then nothing in front of the head counts
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-10)


PRODUCT, WEIGHT = "not the unchanged results of its last linear layer", "the weight of its last product"
NOT_HEADS = {
    "a function behind it": (lambda h, W, b: (h @ W).tanh(), f"{PRODUCT}, but of aten.tanh"),
    "a factor": (lambda h, W, b: 2 * (h @ W), f"{PRODUCT}, but of aten.mul"),
    "a multiple of the bias": (lambda h, W, b: torch.add(h @ W, b, alpha=2), f"{PRODUCT}, but of aten.add"),
    "two summands": (lambda h, W, b: h @ W + b + b.mean(), "more than a bias is added"),
    "what is added depends on x": (lambda h, W, b: h @ W + h.sum(-1, keepdim=True), "is no bias"),
    "a bias in another order": (lambda h, W, b: h @ W + b.flip(0), "is no bias"),
    "a bias that is rearranged": (lambda h, W, b: h @ W + b.view(2, 5).T.reshape(10), "the bias .* is rearranged"),
    "a bias that is used twice": (lambda h, W, b: (h * b.mean()) @ W + b, "no bias that is used once"),
    "a weight that is used twice": (lambda h, W, b: (h * W.mean()) @ W, f"{WEIGHT} is not .* used more than once"),
    "a weight that is computed": (lambda h, W, b: h @ W.softmax(0), f"{WEIGHT} is not a parameter"),
    "a weight in another order": (lambda h, W, b: h @ W.T.reshape(W.shape), f"{WEIGHT}, W, is rearranged"),
    "a gradient that stops": (lambda h, W, b: h @ W.detach(), f"{WEIGHT} is not a parameter"),
    "outputs in another order": (lambda h, W, b: (h @ W).transpose(1, 2), f"{PRODUCT}$"),
    "positions that depend on x": (lambda h, W, b: (h @ W).take_along_dim(h[..., :1].argsort(1), 1), PRODUCT),
}
"""Last operations that are no heads, and the reasons."""


@pytest.mark.parametrize("kind", NOT_HEADS)
def test_other_last_operations_are_not_heads(kind):
    apply, says = NOT_HEADS[kind]
    problem = from_module(seeded(lambda: Own(apply, D, 10, bias=True)).eval(), TOKENS, dtype="float64")
    with pytest.raises(BadInput, match=says):
        methods.get("wide_head").prepare(problem, Target("torch", "float64", "cpu"))


def check_computed_otherwise(model: nn.Module, x: torch.Tensor = TOKENS) -> None:
    """Check that the exact value is computed by another method."""
    found = ntkbench.norm(model, x, dtype="float64")
    assert found.method != "wide_head"
    assert found.value == pytest.approx(float(explicit(model, x).norm()), rel=1e-10)


@pytest.mark.parametrize("kind", ["a factor", "a weight that is used twice"])
def test_networks_with_other_last_operations_are_computed_otherwise(kind):
    apply, _ = NOT_HEADS[kind]
    check_computed_otherwise(seeded(lambda: Own(apply, D, 10, bias=True)).eval())


def test_auto_chooses_wide_head_where_it_takes_fewer_passes():
    model = seeded(Language).eval()
    found = ntkbench.norm(model, TOKENS, dtype="float64")
    assert found.method == "wide_head" and found.passes == T * D
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-10)


def softmax() -> nn.Module:
    return nn.Sequential(Language(), nn.LogSoftmax(-1))


class Detached(Language):
    """Its outputs are those of the network, but the gradient of the hidden vectors is halved."""

    def forward(self, tokens):
        hidden = self.block(self.table(tokens))
        return self.lm_head(hidden + (hidden.detach() - hidden) / 2)


class Lying(Language):
    """Its hidden vectors do not depend on the size of the head, but their gradient does."""

    def forward(self, tokens):
        hidden = self.block(self.table(tokens))
        return self.lm_head(hidden + len(self.lm_head.weight) * (hidden - hidden.detach()))


class LyingBehind(Language):
    """A copy of the head's results, with another gradient."""

    def forward(self, tokens):
        logits = super().forward(tokens)
        return logits.detach() + 2 * (logits - logits.detach())


class Twice(Language):
    """The head's results are also its inputs."""

    def __init__(self) -> None:
        super().__init__()
        self.back = nn.Linear(V, D)

    def forward(self, tokens):
        hidden = self.block(self.table(tokens))
        return self.lm_head(hidden + self.back(self.lm_head(hidden).tanh()))


class Regularised(Language):
    """The weight of the head is used in front of it as well."""

    def forward(self, tokens):
        return self.lm_head(self.block(self.table(tokens)) * self.lm_head.weight.square().sum())


class Viewed(Language):
    """A module in front of the head's holds its size."""

    def __init__(self) -> None:
        super().__init__()
        self.V = V

    def forward(self, tokens):
        return super().forward(tokens).reshape(-1, T, self.V)


class Sized(Language):
    """Hidden vectors depend on the size of the head."""

    def forward(self, tokens):
        return self.lm_head(self.block(self.table(tokens)) / len(self.lm_head.weight))


REFUSED = {
    "not the unchanged results of its last linear layer, but of aten._log_softmax": softmax,
    "no linear layer or embedding of the network is wider": lambda: vectors(
        nn.Linear(6, 12), nn.Tanh(), nn.Linear(12, 6)
    ),
    "not the unchanged results of its last linear layer;": lambda: nn.Sequential(Language(), Sliced()),
    "not the unchanged results of its last linear layer, but of aten.detach": LyingBehind,
    "used more than once": Twice,
    "or is used more than once": Regularised,
    "cannot be replaced by a shorter one": Viewed,
    "the inputs of that layer differ": Sized,
}


class Sliced(nn.Module):
    def forward(self, x):
        return x.flatten(1)[:, 1 : 1 + 3 * V]


@pytest.mark.parametrize("says", REFUSED)
def test_networks_without_a_wide_head_are_refused_in_one_line(says):
    problem = from_module(seeded(REFUSED[says]).eval(), TOKENS, dtype="float64")
    target = Target("torch", "float64", "cpu")
    method = methods.get("wide_head")
    with pytest.raises(BadInput, match=says):
        if reason := method.unsupported_reason(problem, "norm", target):
            raise BadInput(reason)
        method.prepare(problem, target)


@pytest.mark.parametrize("says", mostly_slow(REFUSED, {"or is used more than once", "the inputs of that layer differ"}))
def test_networks_without_a_wide_head_are_computed_otherwise(says):
    check_computed_otherwise(seeded(REFUSED[says]).eval())


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
def test_operations_behind_the_last_layer_are_detected(behind):
    model = seeded(lambda: nn.Sequential(vectors(nn.Linear(6, 9)), Function(BEHIND[behind]))).eval()
    problem = from_module(model, TOKENS, dtype="float64")
    with pytest.raises(BadInput, match="not the unchanged results of its last linear layer"):
        methods.get("wide_head").prepare(problem, Target("torch", "float64", "cpu"))


class Function(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_gradients_that_stop_in_front_of_the_head_are_followed():
    model = seeded(Detached).eval()
    found = ntkbench.norm(model, TOKENS, dtype="float64", method="wide_head")
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-10)


def test_gradients_that_are_not_those_of_the_head_are_not_certified():
    model = seeded(Lying).eval()
    with pytest.raises(Uncertified):
        ntkbench.norm(model, TOKENS, dtype="float64", method="wide_head")
    check_computed_otherwise(model)


# --- tied to the embedding


WIDE = 40
M = len(TOKENS.unique())


class Tied(nn.Module):
    """Tokens to logits, with W as the embedding and as the head."""

    def __init__(self, *, bias: bool = False, head_first: bool = False, padding: int | None = None) -> None:
        super().__init__()
        head = nn.Linear(D, WIDE, bias=bias)
        if head_first:
            self.lm_head = head
        self.table = nn.Embedding(WIDE, D, padding_idx=padding)
        self.block = nn.Sequential(nn.Linear(D, 8), nn.Tanh(), nn.Linear(8, D))  # 8 divides the outputs as well
        self.lm_head = head
        self.lm_head.weight = self.table.weight
        self.register_buffer("scale", torch.ones(()))
        with torch.no_grad():
            self.table.weight.normal_()

    def hidden(self, tokens):
        x = self.scale * self.table(tokens)
        return self.block(x + x.mean(1, keepdim=True)).tanh()

    def forward(self, tokens):
        return self.lm_head(self.hidden(tokens))


class Functional(Tied):
    """The head is a bare product of the hidden vectors at two positions with the table."""

    def forward(self, tokens):
        return self.hidden(tokens)[:, [-1, 0]] @ self.table.weight.T


class LastOf(Tied):
    def forward(self, tokens):
        return super().forward(tokens)[:, -1]


class ThirdUse(Tied):
    def forward(self, tokens):
        return super().forward(tokens) + self.table.weight.mean()


class ReadTwice(Tied):
    def forward(self, tokens):
        return self.lm_head(self.hidden(tokens) + self.table(tokens.flip(1)))


class OfVectors(Tied):
    def forward(self, vectors):
        return self.lm_head(self.block(vectors).tanh())


class Scaled(Tied):
    def forward(self, tokens):
        return 0.5 * super().forward(tokens)


class LyingTied(Tied):
    """The head's results with twice the gradient of the hidden vectors."""

    def forward(self, tokens):
        hidden = self.hidden(tokens)
        return self.lm_head(2 * hidden - hidden.detach())


def tied_frozen(padding: int) -> nn.Module:
    made = Tied(bias=True, padding=padding)
    made.lm_head.bias.requires_grad_(False)
    return made


def gpt2() -> nn.Module:
    from ntkbench.networks import language

    made = language.Transformer(language.Size(WIDE, T, D, layers=1, heads=1), "tied")
    with torch.no_grad():
        for w in made.parameters():
            w.add_(0.3 * torch.randn(w.shape))
    return made


TIED = {
    "tied": Tied,
    "with a bias": lambda: Tied(bias=True, head_first=True),
    "frozen bias": lambda: tied_frozen(padding=WIDE - 1),
    "functional": Functional,
    "last position": lambda: LastOf(padding=int(TOKENS[0, 0])),
    "transformer": gpt2,
}


def test_passes_are_those_of_the_head_where_outputs_are_flattened():
    """The first layer is wider than its inputs as well, and its width divides the outputs."""
    model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 16), nn.Flatten())
    problem = from_module(model, torch.randn(3, 4, 1))
    method, target = methods.get("wide_head"), Target("torch", "float64", "cpu")
    found = method.estimate(method.prepare(problem, target), "norm")
    assert method.passes_needed(problem, "norm", target) == found.passes == 4 * 8


def test_wide_weights_in_front_of_the_last_product_are_no_heads():
    """Neither network is traced to see that: 8 and 32 divide the outputs."""
    narrow = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 4), nn.Flatten())
    for problem in (from_module(narrow, torch.randn(3, 4, 1)), problems.load("rnn_flipflop")):
        reason = methods.get("wide_head").unsupported_reason(problem, "norm", Target("torch", "float64", "cpu"))
        assert reason is not None and "no linear layer or embedding" in reason


def two(make):
    """A network at two sets of weights, with other buffers at the second one."""
    model, other = seeded(make).eval(), seeded(make, 1).eval()
    with torch.no_grad():
        for buffer in other.buffers():
            buffer.add_(0.5)
    return model, other


@pytest.mark.parametrize(
    ("kind", "memory"), mostly_slow([*((kind, 2**30) for kind in TIED), ("with a bias", 2**17)], 1)
)
def test_all_metrics_of_tied_heads_match_the_explicit_kernel(kind, memory):
    problem, thetas = pair(kind, True)
    target, positions = Target("torch", "float64", "cpu", memory=memory), problem.O // WIDE
    method, prepared = methods.get("wide_head"), ready_for(kind, True, memory)
    for metric in METRICS:
        assert method.unsupported_reason(problem, metric, target) is None
        found = method.estimate(prepared, metric)
        assert found.value == pytest.approx(exact(metric, *thetas), rel=1e-12), metric
        assert found.certificate < 1e-12
        ends = 2 if metric == "alignment" else 1
        needed = ends * positions * (M + ends * D)
        assert method.passes_needed(problem, metric, target) == needed
        if memory == 2**30:
            assert found.passes == needed


def test_kernels_that_are_close_have_a_precise_complement():
    model, other = seeded(Tied).eval(), seeded(Tied).eval()
    with torch.no_grad():
        for w in other.parameters():
            w.mul_(1 + 1e-5)
    found = ntkbench.alignment(model, other, TOKENS, dtype="float64", method="wide_head")
    first, second = (theta / theta.norm() for theta in (explicit(model), explicit(other)))
    assert found.complement == pytest.approx(float((first - second).norm() ** 2) / 2, rel=1e-6)


def test_auto_chooses_tied_heads_and_the_other_end_may_be_another_network():
    model, other = seeded(Tied).eval(), seeded(gpt2, 1).eval()
    found = ntkbench.norm(model, TOKENS, dtype="float64")
    assert found.method == "wide_head" and found.passes == T * (M + D)
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-12)
    kernel = ntkbench.Kernel(model, TOKENS, dtype="float64")
    moved = kernel.at(two(Tied)[1])
    assert moved.trace(method="wide_head").value == pytest.approx(float(explicit(two(Tied)[1]).trace()), rel=1e-12)
    found = kernel.alignment(other, method="wide_head")
    assert found.value == pytest.approx(exact("alignment", explicit(model), explicit(other)), rel=1e-12)


def test_several_inputs_are_supported():
    model = seeded(Tied).eval()
    found = ntkbench.norm(
        model, {"tokens": TOKENS, "mask": torch.ones(N, T)}, call=lambda m, x: m(x["tokens"]), dtype="float64"
    )
    assert found.method == "wide_head"
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-12)


REFUSED_TIED = {
    "must be used exactly twice, there and as the head": (ThirdUse, ReadTwice),
    "unchanged": (Scaled,),
    "no tokens are looked up": (OfVectors,),
    "is not larger than its": (lambda: Language(tied=True),),
    "is frozen or not selected": (lambda: partly_frozen("table"),),
}


def partly_frozen(name: str) -> nn.Module:
    made = Tied()
    made.get_submodule(name).requires_grad_(False)
    return made


NO_TIED_HEADS = [(says, make) for says, makers in REFUSED_TIED.items() for make in makers]


def without_tied_head(make) -> tuple[nn.Module, torch.Tensor]:
    """A network, and inputs of it."""
    x = torch.randn(N, T, D, dtype=torch.float64) if make is OfVectors else TOKENS
    return seeded(make).eval(), x


@pytest.mark.parametrize(("says", "make"), NO_TIED_HEADS)
def test_tied_weights_that_are_no_head_are_refused(says, make):
    model, x = without_tied_head(make)
    with pytest.raises(BadInput, match=says):
        methods.get("wide_head").prepare(from_module(model, x, dtype="float64"), Target("torch", "float64", "cpu"))


@pytest.mark.parametrize(("says", "make"), list(NO_TIED_HEADS)[:1])
def test_networks_with_tied_weights_that_are_no_head_are_computed_otherwise(says, make):
    check_computed_otherwise(*without_tied_head(make))


def test_gradients_in_front_of_a_tied_head_are_followed():
    model = seeded(LyingTied).eval()
    found = ntkbench.norm(model, TOKENS, dtype="float64", method="wide_head")
    assert found.value == pytest.approx(float(explicit(model).norm()), rel=1e-12)


def test_a_wrong_vocabulary_is_not_certified(monkeypatch):
    """The tokens' rows in another order: the hidden vectors are not those of the network."""
    right = tied_head.Basis.down
    monkeypatch.setattr(tied_head.Basis, "down", lambda self, t: right(self, t)[torch.arange(self.shape[1]).roll(1)])
    with pytest.raises(Uncertified):
        ntkbench.norm(seeded(Tied).eval(), TOKENS, dtype="float64", method="wide_head")


def test_no_matrix_is_as_large_as_the_outputs():
    """20,000 outputs at 8 positions: Theta would have 2.6e10 entries."""
    V, d = 20_000, 6

    def make():
        model = nn.Sequential(nn.Embedding(V, d), nn.Linear(d, d), nn.Tanh(), nn.Linear(d, V, bias=False))
        model[3].weight = model[0].weight
        return model

    model, x = seeded(make).eval(), torch.arange(8).reshape(2, 4) * 7
    found = ntkbench.norm(model, x, dtype="float64", memory=2**24)
    assert found.method == "wide_head" and found.passes == 4 * (8 + d)
    # The rows of other tokens matter only through their inner products: six rows with the same ones replace them, and
    # each output that is left out of the head adds the square of G.
    model.double()
    tokens = x.unique()
    others = model[0].weight[~torch.isin(torch.arange(V), tokens)].detach()
    short = copy.deepcopy(model)
    short[0] = nn.Embedding(len(tokens) + d, d, dtype=torch.float64)
    short[3].weight = short[0].weight
    with torch.no_grad():
        short[0].weight.copy_(torch.cat([model[0].weight[tokens], torch.linalg.cholesky(others.T @ others).T]))
    G = model[:3](x).reshape(-1, d).detach()
    G = G @ G.T
    square = explicit(short, torch.searchsorted(tokens, x)).square().sum() + (V - len(tokens) - d) * G.square().sum()
    assert found.value == pytest.approx(float(square.sqrt()), rel=1e-10)


# --- estimates


def ends_of(kind: str):
    """As :func:`pair`, with a tied head if there is one of this kind."""
    return pair(kind, kind in TIED)


KINDS = (*HEADED, *(kind for kind in TIED if kind not in HEADED))
SPANNED = {"one position": "9 outputs are no more than the 12 dimensions"}
"""Kinds of which two heads together span all outputs, and the reason that is given."""


@pytest.mark.parametrize("kind", mostly_slow(KINDS, 1))
def test_shorter_heads_and_known_moments_give_the_whole_kernel(kind):
    """Without random probes: the whole kernels of the networks that estimators run on."""
    problem, thetas = ends_of(kind)
    short = ready_for(kind, kind in TIED, 2**30).short
    for metric in METRICS:
        if metric == "alignment" and kind in SPANNED:
            with pytest.raises(BadInput, match=SPANNED[kind]):
                short.networks(metric)
            continue
        networks = short.networks(metric)
        assert short.certificate(metric) < 1e-10 and networks[0].engine.O < problem.O
        grams = [
            each.engine.kernel(each.parameters, each.x).reshape(2 * (len(each.x) * each.engine.O,)) for each in networks
        ]
        found = metrics.from_gram(*grams).plus(short.known(metric)).metric(metric)
        assert found == pytest.approx(exact(metric, *thetas), rel=1e-10), metric


@pytest.mark.parametrize("kind", mostly_slow(["with a bias", "tied", "last position", "functional"], 1))
def test_estimates_are_unbiased_with_calibrated_errors(kind):
    problem, thetas = ends_of(kind)
    target = Target("torch", "float64", "cpu")
    method, whole = (methods.get(name) for name in ("wide_head_u_statistics", "structured_block_u_statistics"))
    prepared, all_outputs = ready_for(kind, kind in TIED, 2**30), whole.prepare(problem, target)
    for metric in METRICS:
        right, passes = exact(metric, *thetas), 64 if metric == "alignment" else 32
        found = [method.estimate(prepared, metric, passes, seed) for seed in range(60)]
        errors = [e.value - right for e in found]
        spread, mean = statistics.stdev(errors), statistics.fmean(errors)
        assert abs(mean) < 4 * spread / 60**0.5 + 0.02 * right * (metric != "trace"), metric  # ratios are biased
        assert sum(e.covers(right, "float64") for e in found) >= 50, metric
        assert all(e.passes <= passes and e.certificate < 1e-10 for e in found)
        if metric in ("trace", "norm"):
            others = [whole.estimate(all_outputs, metric, passes, seed).value for seed in range(60)]
            assert spread < 1.2 * statistics.stdev(others), metric


@pytest.mark.parametrize("names", [("trace",), ("trace", "norm")])
def test_few_probes_of_few_hidden_units_that_agree_have_an_unknown_error(names):
    """Two probes of two hidden units agree in half of the cases for each of two samples."""
    model = seeded(lambda: nn.Sequential(nn.Linear(3, 2), nn.Tanh(), nn.Linear(2, 8)).double())
    x = seeded(lambda: torch.randn(2, 3, dtype=torch.float64))
    right, method = float(explicit(model, x).trace()), methods.get("wide_head_u_statistics")
    prepared = method.prepare(from_module(model, x, dtype="float64"), Target("torch", "float64", "cpu"))
    found = [method.estimates(prepared, names, 2, seed)["trace"] for seed in range(24)]
    for each in found:
        assert not each.standard_error <= 1e-12 * right or each.value == pytest.approx(right, rel=1e-9)
    assert any(math.isnan(each.standard_error) for each in found)
    assert 0 < method.estimates(prepared, names, 40)["trace"].standard_error < right


@pytest.mark.parametrize("kind", ["with a bias", "tied"])
def test_the_same_probes_serve_several_metrics(kind):
    _, thetas = ends_of(kind)
    method, prepared = methods.get("wide_head_u_statistics"), ready_for(kind, kind in TIED, 2**30)
    for names in (("trace", "norm"), ("trace", "effective_rank"), METRICS):
        for name, found in method.estimates(prepared, names, 64, seed=1).items():
            low, high = found.interval(0.9999)
            assert low <= exact(name, *thetas) <= high, (names, name)


@pytest.mark.parametrize("biases", [(False, False), (True, True), (True, False)])
def test_moments_of_a_heads_gram_matrix_are_those_of_the_explicit_one(biases):
    H, H_f = (seeded(lambda: torch.randn(7, 3, dtype=torch.float64), seed) for seed in (0, 1))
    grams = [gram.Gram(each, bias) for each, bias in zip((H, H_f), biases, strict=True)]
    written = [each @ each.T + bias for each, bias in zip((H, H_f), biases, strict=True)]
    for count in (1, 2):
        found, whole = gram.moments_of_grams(*grams[:count]), metrics.from_gram(*written[:count])
        assert dataclasses.astuple(found)[: 2 * count] == pytest.approx(dataclasses.astuple(whole)[: 2 * count])
    assert (found.difference, found.difference_cross) == pytest.approx((whole.difference, whole.difference_cross))
    assert torch.allclose(grams[0].part([2, 0], slice(1, 3)), written[0][[2, 0], 1:3])


def test_the_difference_of_two_heads_that_are_close_is_precise():
    H = seeded(lambda: torch.randn(7, 3, dtype=torch.float64))
    change = 1e-9 * seeded(lambda: torch.randn(7, 3, dtype=torch.float64), 1)
    D = (change @ H.T + H @ change.T).norm() ** 2
    assert gram.moments_of_grams(gram.Gram(H, True), gram.Gram(H + change, True)).difference == pytest.approx(
        float(D), rel=1e-6
    )


@pytest.mark.parametrize(
    "chosen",
    mostly_slow(["*", "block.*", "lm_head.bias block.*", "lm_head.weight table.*"], {"*", "lm_head.bias block.*"}),
)
def test_intervals_in_float32_and_of_some_parameters_cover(chosen):
    model = seeded(lambda: Language(bias=True)).eval()
    asked = {"method": "wide_head_u_statistics", "passes": 400, "parameters": chosen.split(), "dtype": "float32"}
    found = {name: getattr(ntkbench, name)(model, TOKENS, **asked) for name in ("trace", "norm")}
    for key, w in model.named_parameters():
        w.requires_grad_(any(fnmatch.fnmatch(key, pattern) for pattern in chosen.split()))
    theta = explicit(model)
    for name, estimate in found.items():
        low, high = estimate.interval(0.9999)
        assert low <= exact(name, theta, theta) <= high
        assert estimate.rounding > 1e-7 and estimate.certificate < 1e-5


def test_a_tolerance_below_rounding_is_noted():
    make = lambda: nn.Sequential(nn.Embedding(64, 4), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 64))  # noqa: E731
    model, x = seeded(make).eval(), torch.arange(12).reshape(3, 4)
    asked = {"rtol": 2e-6, "dtype": "float32"}
    estimate = ntkbench.trace(model, x, method="wide_head_u_statistics", **asked)
    assert any("did not reach rtol" in note for note in estimate.notes)
    found = ntkbench.trace(model, x, **asked)
    assert found.method == "wide_head", "an exact value ends the search"
    assert any("rounding may exceed" in note for note in found.notes)


@pytest.mark.parametrize("kind", mostly_slow(["logits", "tied"], 1))
def test_a_head_that_does_not_fit_in_memory_is_left_to_other_methods(kind):
    problem, _ = ends_of(kind)
    width = WIDE if kind == "tied" else V
    for name in ("wide_head", "wide_head_u_statistics"):
        needed = methods.get(name).bytes_needed(problem, "trace", Target("torch", "float64", "cpu"), 16)
        assert needed >= 2 * 8 * width * D
    with pytest.raises(OverMemory, match="wide_head needs"):
        ntkbench.norm(problem.module, TOKENS, method="wide_head", memory=2 * 8 * width * D - 1, dtype="float64")
    found = ntkbench.norm(problem.module, TOKENS, memory=2 * 8 * width * D - 1, dtype="float64")
    assert "wide_head" not in found.method and any("wide_head: needs" in note for note in found.notes)


def test_auto_estimates_in_the_hidden_dimension():
    model = seeded(gpt2).eval()
    found = ntkbench.norm(model, TOKENS, dtype="float64", passes=40)
    assert found.method == "wide_head_u_statistics" and found.passes <= 40
    low, high = found.interval(0.999)
    assert low <= float(explicit(model).norm()) <= high


def test_gradients_that_are_not_those_of_a_shorter_head_are_not_certified():
    with pytest.raises(Uncertified):
        ntkbench.norm(seeded(Lying).eval(), TOKENS, method="wide_head_u_statistics", passes=16, dtype="float64")
