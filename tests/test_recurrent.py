"""Recurrent networks: derivatives by hand against autograd, the factors of Theta, exact baselines, and bad input."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch
from conftest import metrics_of, mostly_slow, written_out
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils.rnn import pack_sequence

import ntkbench
from ntkbench import methods
from ntkbench.errors import BadInput
from ntkbench.estimators import state_factors
from ntkbench.networks.recurrent import Recurrent, jax_forward
from ntkbench.operators import ChunkBytes, linearise
from ntkbench.operators.arrays import to_numpy
from ntkbench.operators.recurrent import base, products
from ntkbench.operators.recurrent.cells import GATES, Recurrence
from ntkbench.operators.recurrent.state_kernel import StateKernel
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base.sequences import from_recurrent

KINDS = sorted(GATES)
PARTS = {
    "all": (),
    "recurrent": ("weight_ih", "bias_ih", "bias_hh", "readout.weight", "readout.bias"),
    "inputs": ("weight_hh", "bias_hh", "bias_ih", "readout.weight", "readout.bias"),
    "recurrent, inputs and a bias": ("bias_ih", "readout.weight"),
}
"""What is frozen for the NTK of a part of the network."""


def network(kind: str, inputs=3, hidden=4, outputs=None, frozen=(), seed=0) -> Recurrent:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        module = Recurrent(kind, inputs, hidden, outputs, alpha=0.3 if kind == "ctrnn" else None)
        with torch.no_grad():
            for name, w in module.named_parameters():
                w.mul_(2)  # away from the linear range of the gates
                w.requires_grad_(name not in frozen)
    return module


@functools.cache
def problem(kind: str, N=4, T=5, inputs=3, hidden=4, outputs=None, frozen=()) -> Problem:
    module = network(kind, inputs, hidden, outputs, frozen)
    other = network(kind, inputs, hidden, outputs, frozen, seed=1)
    theta_0, theta_f = (
        {key: w.detach().numpy().copy() for key, w in m.named_parameters() if w.requires_grad} for m in (module, other)
    )
    x = np.random.default_rng(0).standard_normal((N, T, inputs)).astype("f4")
    return Problem(kind, module, x, theta_0, theta_f, jax_forward(module))


def linear(problem: Problem, backend: str, end: str = "theta_0") -> base.RecurrentJacobian:
    j = linearise(problem, end, Target(backend, "float64", "cpu"))
    assert isinstance(j, base.RecurrentJacobian)
    return j


def columns(problem: Problem, backend: str) -> np.ndarray:
    """Positions of an operator's columns in the explicit J: JAX sorts parameters by name."""
    sizes = {key: w.size for key, w in problem.theta_0.items()}
    starts = dict(zip(sizes, np.cumsum([0, *sizes.values()]), strict=False))
    order = sizes if backend == "torch" else sorted(sizes)
    return np.concatenate([np.arange(starts[key], starts[key] + sizes[key]) for key in order])


def host(array) -> np.ndarray:
    return to_numpy(array)


def off(a, b) -> float:
    a, b = host(a), host(b)
    assert a.shape == b.shape
    return np.abs(a - b).max() / (np.abs(b).max() or 1)  # all zeros where a single step has no previous state


SIZES = {
    "N": st.integers(1, 3),
    "T": st.integers(1, 4),
    "inputs": st.integers(1, 3),
    "hidden": st.integers(1, 4),
    "outputs": st.sampled_from((None, 1, 3)),
    "part": st.sampled_from(sorted(PARTS)),
}


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=8)
@given(**SIZES)
def test_products_are_those_of_autograd(kind, **sizes):
    check_products(kind, "torch", **sizes)


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=2)  # each has to be compiled
@given(**SIZES)
@pytest.mark.slow
def test_products_in_jax_are_those_of_autograd(kind, **sizes):
    check_products(kind, "jax", **sizes)


def check_products(kind, backend, N, T, inputs, hidden, outputs, part):
    p = problem(kind, N, T, inputs, hidden, outputs, PARTS[part])
    J = written_out(p)[:, columns(p, backend)]
    j = linear(p, backend)
    assert off(j.vjp(j.basis(0, j.n)), J) < 1e-10
    assert off(j.jvp(j._eye(j.P, 0, j.P)).T, J) < 1e-10
    assert j.passes == j.n + j.P


@pytest.mark.parametrize(("kind", "backend"), [*((kind, "torch") for kind in KINDS), ("gru", "jax")])
@pytest.mark.slow
def test_products_by_trial_match_the_explicit_jacobian(kind, backend):
    p = problem(kind, N=3, T=3, outputs=2)
    J = written_out(p)[:, columns(p, backend)].reshape(3, 6, -1)
    j = linear(p, backend)
    v = j.rng(0).normal(2, j.n).reshape(2, 3, 6)
    each = np.einsum("kbo,bop->kbp", host(v), J)
    assert off(j.sample_vjp(slice(1, 3), v[:, 1:3]), each[:, 1:]) < 1e-10
    groups = [slice(0, 2), slice(2, 3)]
    expected = np.stack([each[:, g].sum(1) for g in groups], axis=1).reshape(4, -1)
    found = host(j.group_gradients(groups, v))
    assert off(found.reshape(4, -1) @ found.reshape(4, -1).T, expected @ expected.T) < 1e-10
    assert off(j.group_gradients(groups[1:], v[:, 2:]), found[:, 1:]) < 1e-10
    # By inner products between steps, and by the gradients themselves.
    by_steps = j.call(products.squares_by_trial, j.linear, v.reshape(2, 3, 3, 2))
    for squares in (by_steps, j.sample_squares(v), (j.sample_vjp(slice(0, 3), v) ** 2).sum(-1)):
        assert off(squares, (each**2).sum(-1)) < 1e-10
    w = j.rng(1).normal(2, 3 * j.P).reshape(2, 3, j.P)
    assert off(j.sample_jvp(slice(1, 3), w[:, 1:]), np.einsum("bop,kbp->kbo", J, host(w))[:, 1:]) < 1e-10
    assert off(j.sample_rows(slice(0, 2), slice(1, 4)), J[:2, 1:4].swapaxes(0, 1).reshape(6, -1)) < 1e-10
    assert off(j.row(7), J.reshape(18, -1)[7]) < 1e-10


@pytest.mark.parametrize("kind", KINDS)
def test_products_do_not_depend_on_the_memory(kind):
    p = problem(kind)
    tight = linearise(p, "theta_0", Target("torch", "float64", "cpu", 1))
    roomy = linear(p, "torch")
    u = roomy.rng(0).normal(3, roomy.n)
    assert off(tight.ntk(u), roomy.ntk(u)) < 1e-12
    assert off(tight.sample_squares(u.reshape(3, 4, -1)), roomy.sample_squares(u.reshape(3, 4, -1))) < 1e-12


@functools.cache
def jacobian(kind: str) -> np.ndarray:
    return written_out(problem(kind, outputs=2))


@pytest.mark.parametrize("kind", KINDS)
@settings(max_examples=6)
@given(chunk=st.integers(1, 4000), by_trial=st.integers(1, 4000), k=st.integers(1, 6))
def test_products_do_not_depend_on_chunks(kind, chunk, by_trial, k):
    p = problem(kind, outputs=2)
    sizes = ChunkBytes(sample_squares=by_trial, gates=chunk, gates_by_trial=by_trial)
    j = linearise(p, "theta_0", Target("torch", "float64", "cpu"), sizes)
    N, O, J = j.N, j.O, jacobian(kind)  # noqa: E741 - the field's symbol
    u, w = j.rng(0).normal(k, j.n), j.rng(1).normal(k, j.P)
    assert off(j.vjp(u), host(u) @ J) < 1e-10
    assert off(j.jvp(w), host(w) @ J.T) < 1e-10
    v, tangents = u.reshape(k, N, O), j.rng(2).normal(k, N * j.P).reshape(k, N, j.P)
    rows = J.reshape(N, O, -1)
    assert off(j.sample_squares(v), (np.einsum("kbo,bop->kbp", host(v), rows) ** 2).sum(-1)) < 1e-10
    assert off(j.sample_jvp(slice(0, N), tangents), np.einsum("bop,kbp->kbo", rows, host(tangents))) < 1e-10
    assert j.passes == 4 * k


@pytest.mark.parametrize(("chunk", "sizes"), [(1, [1, 1, 1, 1, 1]), (2, [2, 2, 1]), (5, [5]), (2**20, [5])])
def test_chunks_hold_as_many_probes_as_fit(chunk, sizes, monkeypatch):
    gates = 4 * 5 * 4 * 8  # bytes of the gates of one probe: trials, steps, units, float64
    target = Target("torch", "float64", "cpu")
    j = linearise(problem("rnn"), "theta_0", target, ChunkBytes(gates=chunk * gates))
    u, call, seen = j.rng(0).normal(5, j.n), j.call, []
    j.vjp(u)  # the forward pass
    monkeypatch.setattr(j, "call", lambda product, linear, u: seen.append(len(u)) or call(product, linear, u))
    j.vjp(u)
    assert seen == sizes


@settings(max_examples=12)
@given(T=st.integers(1, 8), hidden=st.integers(1, 6), inputs=st.integers(1, 12))
def test_squares_of_gradients_are_right_in_either_order(T, hidden, inputs):
    """From inner products between steps where steps are few, from the gradients where they are many."""
    p = problem("rnn", N=2, T=T, inputs=inputs, hidden=hidden)
    j = linear(p, "torch")
    v = j.rng(0).normal(2, j.n).reshape(2, 2, -1)
    gradients = np.einsum("kbo,bop->kbp", host(v), written_out(p).reshape(2, j.O, -1))
    assert off(j.sample_squares(v), (gradients**2).sum(-1)) < 1e-10


@pytest.mark.parametrize(
    ("kind", "backend"), mostly_slow([*((kind, "torch") for kind in KINDS), ("lstm", "jax")], len(KINDS))
)
def test_a_prefix_is_the_network_on_shorter_sequences(kind, backend):
    p = problem(kind)
    short = Problem(p.name, p.module, p.x[:, :3], p.theta_0, p.theta_f, p.jax_forward)
    j = linear(p, backend).prefix(3)
    assert off(j.vjp(j.basis(0, j.n)), written_out(short)[:, columns(p, backend)]) < 1e-10


@pytest.mark.parametrize("kind", ("rnn", "gru", "lstm"))
def test_weights_are_those_of_torch_layers(kind):
    module = network(kind)
    layer = {"rnn": nn.RNN, "gru": nn.GRU, "lstm": nn.LSTM}[kind](3, 4, batch_first=True)
    layer.load_state_dict({f"{key}_l0": w for key, w in module.state_dict().items()})
    x = torch.from_numpy(problem(kind).x)
    torch.testing.assert_close(module(x), layer(x)[0])
    ours, theirs = problem(kind), from_recurrent(layer, x)
    j, k = linear(ours, "torch"), linear(theirs, "torch")
    u = j.rng(0).normal(2, j.n)
    assert off(j.vjp(u), k.vjp(u)) < 1e-12


@pytest.mark.parametrize("kind", mostly_slow(KINDS, {"lstm", "ctrnn"}))
def test_both_backends_compute_one_network(kind):
    p = problem(kind, outputs=2)
    weights = {key: w.astype("f8") for key, w in p.theta_0.items()}
    with torch.no_grad():
        expected = p.module.double()(torch.from_numpy(p.x).double())
        p.module.float()
    linear(p, "jax")  # turns on float64
    assert off(p.jax_forward(weights, p.x.astype("f8")), expected) < 1e-12


@pytest.mark.parametrize("part", sorted(PARTS))
@pytest.mark.parametrize("outputs", (None, 2))
@pytest.mark.parametrize("kind", KINDS)
def test_theta_is_p_k_p(kind, outputs, part):
    p = problem(kind, outputs=outputs, frozen=PARTS[part])
    kernel = StateKernel(p, "theta_0", Target("torch", "float64", "cpu"))
    j, m = kernel.jacobian, kernel.K.shape[0]
    u = j.rng(0).normal(3, j.n)
    assert off(kernel.P(kernel.K(kernel.P.T(u))), kernel.theta(u)) < 1e-12
    e = j.rng(1).normal(3, m)
    assert off((kernel.P(e) * u).sum(1), (e * kernel.P.T(u)).sum(1)) < 1e-12  # P* is the adjoint of P
    K, J = kernel.K.to_scipy() @ np.eye(m), written_out(p)
    P = kernel.P.to_scipy() @ np.eye(m)
    assert off(K, K.T) < 1e-12
    assert off(P @ K @ P.T, J @ J.T) < 1e-12
    if kind == "rnn" and part == "all" and outputs is None:
        before = np.concatenate([np.zeros((4, 1, 4)), written_states(p)[:, :-1]], axis=1)
        V = np.concatenate([before, p.x.astype("f8"), np.ones((4, 5, 2))], axis=2).reshape(20, -1)
        assert off(K, np.kron(V @ V.T, np.eye(4))) < 1e-12


def written_states(p: Problem) -> np.ndarray:
    h, states = np.zeros((4, 4)), []
    w = {key: weight.astype("f8") for key, weight in p.theta_0.items()}
    for t in range(5):
        h = np.tanh(p.x[:, t].astype("f8") @ w["weight_ih"].T + w["bias_ih"] + h @ w["weight_hh"].T + w["bias_hh"])
        states.append(h)
    return np.stack(states, 1)


@pytest.mark.parametrize(("kind", "backend"), [("rnn", "torch"), ("gru", "torch"), ("lstm", "torch"), ("ctrnn", "jax")])
@pytest.mark.slow
def test_metrics_of_the_factors_match_explicit_matrices(kind, backend):
    p = problem(kind, outputs=2)
    target = Target(backend, "float64", "cpu")
    kernel, at_f = (StateKernel(p, end, target) for end in ("theta_0", "theta_f"))
    one = np.eye(kernel.K.shape[0])
    K, K_f, P, P_f = (op.to_scipy() @ one for op in (kernel.K, at_f.K, kernel.P, at_f.P))
    for metric, exact in metrics_of(K, K_f).items():
        other = at_f if metric == "alignment" else None
        assert state_factors.metric_of_k(kernel, metric, other).value == pytest.approx(exact, rel=1e-12)
    for metric, exact in metrics_of(P @ P.T, P_f @ P_f.T).items():
        estimate = state_factors.metric_of_p(kernel, metric, 200, at_f=at_f if metric == "alignment" else None)
        assert estimate.covers(exact, "float64", 0.9999)
        assert 0 < estimate.standard_error < 0.1 * exact
        assert abs(estimate.value - exact) < 4 * estimate.standard_error


@pytest.mark.parametrize("kind", KINDS)
def test_exact_baselines_match_the_explicit_kernel(kind):
    p = problem(kind, outputs=2)
    J, J_f = written_out(p), written_out(p, "theta_f")
    exact = metrics_of(J @ J.T, J_f @ J_f.T)
    target = Target("torch", "float64", "cpu")
    for metric, value in exact.items():
        gram = methods.get("parameter_gram")
        assert float(gram.estimate(gram.prepare(p, target), metric)) == pytest.approx(value, rel=1e-11)
    trace = methods.get("recurrent_exact_trace")
    estimate = trace.estimate(trace.prepare(p, target), "trace")
    assert estimate.value == pytest.approx(exact["trace"], rel=1e-11)
    assert estimate.passes == pytest.approx(2 * (5 + 1) / 2)
    assert estimate.passes == pytest.approx(trace.passes_needed(p, "trace", target))


def test_parameter_gram_says_what_does_not_fit():
    reason = methods.get("parameter_gram").unsupported_reason(
        problem("gru"), "norm", Target("torch", "float64", "cpu", 2**10)
    )
    assert "over the memory" in reason


def test_a_layer_of_torch_is_accepted_as_a_model():
    layer = nn.GRU(3, 4, batch_first=True)
    J = written_out(from_recurrent(layer, X))
    estimate = ntkbench.trace(layer, X, method="recurrent_exact_trace", dtype="float64")
    assert float(estimate) == pytest.approx((J**2).sum(), rel=1e-10)


class Reverses(nn.Module):
    """A layer that reads its input backwards."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = Recurrent("rnn", 3, 4)

    def forward(self, x):
        return self.layer(x.flip(1)).flip(1)


class Detached(Reverses):
    def forward(self, x):
        return self.layer(x).detach()


class Declares(Reverses):
    """A module that declares itself an RNN, but scales its states."""

    def __init__(self) -> None:
        super().__init__()
        self.recurrence = Recurrence("rnn", {role: f"layer.{role}" for role in self.layer.recurrence.names})

    def forward(self, x):
        return 2 * self.layer(x)


X = torch.linspace(-1, 1, 30).reshape(2, 5, 3)


@pytest.mark.parametrize(
    ("model", "x", "message"),
    [
        (Reverses(), X, "not causal: its outputs before step 1"),
        (nn.GRU(3, 4, bidirectional=True), X, "not causal"),
        (Detached(), X, "no output of the model depends on a trainable parameter"),
        (Declares(), X, "declares a recurrence of kind 'rnn', but"),
        (Recurrent("gru", 3, 4), [X[0], X[1, :3]], "2 sequences of lengths 5, 3"),
        (Recurrent("gru", 3, 4), pack_sequence([X[0], X[1, :3]]), "PackedSequence"),
        (Recurrent("gru", 3, 4), X[0], r"T > 0; got shape \(5, 3\)"),
        (nn.Flatten(), X, "no parameters"),
    ],
)
def test_bad_networks_and_sequences_are_refused(model, x, message):
    with pytest.raises(BadInput, match=message) as caught:
        from_recurrent(model, x)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("grue", 3, 4), "did you mean 'gru'"),
        (("gru", 0, 4), "inputs=0"),
        (("ctrnn", 3, 4), "got None for 'ctrnn'"),
        (("rnn", 3, 4, None, 0.5), "got 0.5 for 'rnn'"),
    ],
)
def test_bad_sizes_are_refused(arguments, message):
    with pytest.raises(BadInput, match=message):
        Recurrent(*arguments)


def test_other_networks_have_no_factors(tiny):
    with pytest.raises(BadInput, match="declares no recurrence"):
        StateKernel(tiny, "theta_0", Target())


def test_bad_arguments_for_metrics_of_the_factors_are_refused():
    kernel = StateKernel(problem("rnn"), "theta_0", Target())
    with pytest.raises(BadInput, match="at least 2"):
        state_factors.metric_of_p(kernel, "trace", 1)
    for metric_of in (state_factors.metric_of_k, state_factors.metric_of_p):
        with pytest.raises(BadInput, match="got none for alignment"):
            metric_of(kernel, "alignment")
        with pytest.raises(BadInput, match="got one for trace"):
            metric_of(kernel, "trace", at_f=kernel)


def test_parameters_outside_the_recurrence_are_refused():
    module = network("rnn")
    module.scale = nn.Parameter(torch.ones(1))
    with pytest.raises(BadInput, match="'scale' is not part of the recurrence"):
        linearise(from_recurrent(module, X), "theta_0", Target())
