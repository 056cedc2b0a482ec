"""Recurrent problems: initial weights, training that reaches its goal, and the NTK of a part of a network."""

from __future__ import annotations

import copy
import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ntkbench import methods, operators, problems
from ntkbench.data import tasks
from ntkbench.errors import BadInput, DidNotTrain
from ntkbench.networks import recurrent
from ntkbench.operators.recurrent.cells import GATES
from ntkbench.options import Target
from ntkbench.problems.base import reference, training, weights

SEEDS = st.integers(0, 10**6)
CHANNELS = tasks.channels("flipflop")
PART = "[N=2,parameters=recurrent,read=outputs]"


@given(rank=st.integers(1, 8), gain=st.floats(0.2, 3), seed=SEEDS)
def test_initialisations_have_the_requested_rank_and_norm(rank, gain, seed):
    cut, full = (
        recurrent.initialised("rnn", CHANNELS, 8, gain=gain, rank=r, seed=seed).weight_hh.detach().double()
        for r in (rank, None)
    )
    assert float(cut.norm()) == pytest.approx(float(full.norm()), rel=1e-5)
    assert np.linalg.matrix_rank(cut.numpy(), tol=1e-4 * float(cut.norm())) == rank
    again = recurrent.initialised("rnn", CHANNELS, 8, gain=2 * gain, seed=seed).weight_hh
    np.testing.assert_allclose(again.detach(), 2 * full, rtol=1e-5)


def test_gains_are_in_units_of_the_edge_of_chaos():
    w = recurrent.initialised("rnn", CHANNELS, 300, gain=1.5).weight_hh.detach().numpy()
    assert np.abs(np.linalg.eigvals(w)).max() == pytest.approx(1.5, rel=0.1)


@pytest.mark.parametrize("wrong", [{"gain": 0.0}, {"gain": float("nan")}, {"rank": 0}, {"rank": 9}])
def test_impossible_initialisations_are_refused(wrong):
    with pytest.raises(BadInput, match="gain must be positive and rank from 1 to H=8"):
        recurrent.initialised("rnn", CHANNELS, 8, **wrong)


@pytest.mark.parametrize("kind", GATES)
def test_training_reaches_the_stated_loss(kind):
    import torch

    trials = tasks.trials("match_to_sample", 16, 5, seed=1)
    module = recurrent.initialised(kind, tasks.channels("match_to_sample"), 12)
    *_, (steps, last) = training.course(module, trials, loss=0.2)
    assert steps > 3
    assert last <= 0.2
    assert module.weight_hh.dtype == torch.float32
    with torch.no_grad():
        assert float(trials.loss()(module(torch.from_numpy(trials.inputs)))) == pytest.approx(last, rel=1e-3)


@given(T=st.integers(2, 400))
def test_short_trials_come_before_long_ones(T):
    lengths = training.curriculum(T)
    assert lengths[-1] == T
    assert all(short == long // 3 for short, long in itertools.pairwise(lengths))
    assert lengths[0] < 3 * training.SHORTEST
    assert len(lengths) == 1 or lengths[0] >= training.SHORTEST


@pytest.mark.slow
def test_a_vanilla_network_learns_long_trials_from_short_ones():
    """Trials of 90 steps need the short ones; 45 steps are enough to test lengths in turn."""
    import torch

    definition = problems.define("rnn_match_to_sample[N=2,T=45,H=16]")
    assert "lengths=(15, 45)" in str(definition.training)
    trials, module = tasks.trials("match_to_sample", training.TRIALS, 45, seed=1), definition.module
    definition.training.train(module)
    with torch.no_grad():
        assert float(trials.loss()(module(torch.from_numpy(trials.inputs)))) <= training.LOSS * 1.001


@pytest.mark.parametrize("name", [f"{kind}_{task}" for kind in GATES for task in tasks.TASKS])
def test_committed_weights_solve_their_task(name):
    import torch

    task = name.partition("_")[2]
    definition = problems.define(name)
    assert weights.committed_file(name).stat().st_size < 2e6
    stored = np.load(weights.committed_file(name))
    trained = copy.deepcopy(definition.module)
    trained.load_state_dict({key: torch.from_numpy(stored[f"theta_f/{key}"]) for key in trained.state_dict()})
    trials = tasks.trials(task, training.TRIALS, 10, seed=1)
    with torch.no_grad():
        losses = [float(trials.loss()(m(torch.from_numpy(trials.inputs)))) for m in (definition.module, trained)]
    assert losses[1] <= training.LOSS * 1.001 < losses[0]


@pytest.fixture
def impatient(monkeypatch, tmp_path):
    """Training that is limited to two steps, with a cache of its own."""
    descent = training.descent
    monkeypatch.setattr(training, "descent", lambda *args, **kwargs: descent(*args, **(kwargs | {"most": 2})))
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    problems.load.cache_clear()
    yield tmp_path
    problems.load.cache_clear()


def test_failed_training_is_one_error_and_leaves_no_file(impatient):
    says = r"rnn_flipflop: training did not reach a loss of 0\.1: it is [\d.]+ after 2 steps"
    with pytest.raises(DidNotTrain, match=says):
        problems.load("rnn_flipflop[H=5]")
    assert [path for path in impatient.rglob("*") if path.is_file()] == []


def test_a_nan_loss_ends_training():
    import torch

    w = torch.nn.Parameter(torch.tensor(1.0))
    course = training.descent(lambda: w * float("nan"), torch.optim.SGD([w], lr=1), to=0.1, most=9)
    with pytest.raises(DidNotTrain, match="it is nan after 0 steps"):
        list(course)


@given(steps=st.integers(0, 3000))
def test_checkpoints_are_log_spaced_and_end_with_the_last_step(steps):
    import torch

    module = torch.nn.Linear(1, 1, bias=False)

    def course():
        for step in range(steps + 1):
            module.weight.data.fill_(step)
            yield step, float(steps - step)

    kept = list(training.checkpoints(module, course()))
    at = [step for step, _, _ in kept]
    assert at[0] == 0
    assert at[-1] == steps
    assert at == sorted(set(at))
    assert all(b - a <= max(1, a * (2**0.5 - 1) + 1) for a, b in itertools.pairwise(at))
    assert len(at) <= 4 + 2 * np.log2(steps + 1)
    for step, loss, theta in kept:
        assert (loss, theta["weight"].item()) == (steps - step, step)


def test_parameters_of_the_readout_need_outputs():
    with pytest.raises(BadInput, match="states do not depend on the readout: parameters=readout needs read=outputs"):
        problems.load("gru_flipflop[parameters=readout]")


def test_parts_share_inputs_and_weights_with_the_whole(load):
    whole, states = load("gru_flipflop[read=outputs]"), load("gru_flipflop")
    assert whole.output_shape == (20, 10, 3)
    assert states.output_shape == (20, 10, 32)
    assert "readout.weight" not in {**states.theta_0, **states.fixed_0}
    for parameters, names in recurrent.PARTS.items():
        part = load(f"gru_flipflop[read=outputs,parameters={parameters}]")
        assert set(part.theta_0) == set(names)
        assert part.digest() != whole.digest() or parameters == "all"
        for end in ("theta_0", "theta_f"):
            both = {**part.fixed(end), **part.weights(end)}
            assert both.keys() == whole.weights(end).keys()
            assert all(np.array_equal(both[key], w) for key, w in whole.weights(end).items())


def columns_of(problem, names):
    """Columns of J that belong to some parameters."""
    start, chosen = 0, []
    for key, w in problem.theta_0.items():
        chosen += range(start, start + w.size) if key in names else ()
        start += w.size
    return chosen


@pytest.mark.parametrize("end", ["theta_0", "theta_f"])
@pytest.mark.parametrize("backend", ["torch", "jax", "torch autodiff", "jax autodiff"])
@pytest.mark.parametrize("name", ["rnn_flipflop", "lstm_match_to_sample"])
def test_the_jacobian_of_a_part_is_a_block_of_the_whole(name, backend, end, load):
    from ntkbench.operators import torch as autodiff

    whole, part = load(f"{name}[N=2,read=outputs]"), load(f"{name}{PART}")
    target = Target(backend.split()[0], "float64", "cpu")
    linearise = operators.linearise
    if "autodiff" in backend:
        linearise = __import__(f"ntkbench.operators.{target.backend}", fromlist=["linearise"]).linearise
    j = linearise(part, end, target)
    made = np.asarray(j.vjp(j.basis(0, j.n)))
    j = autodiff.linearise(whole, end, Target("torch", "float64", "cpu"))
    full = np.asarray(j.vjp(j.basis(0, j.n)))
    block = full[:, columns_of(whole, set(part.theta_0))]
    np.testing.assert_allclose(made, block, rtol=0, atol=1e-11 * np.abs(block).max())


@pytest.mark.parametrize(
    "method", ["jacobian_contraction", "direct", "nt_jacobian_contraction", "structured_derivatives"]
)
def test_alignment_of_a_part_uses_the_fixed_parameters_of_each_end(method, load):
    part, whole = load(f"rnn_flipflop{PART}"), load("rnn_flipflop[N=2,read=outputs]")
    thetas = []
    for end in ("theta_0", "theta_f"):
        j = operators.linearise(whole, end, Target("torch", "float64", "cpu"))
        block = np.asarray(j.vjp(j.basis(0, j.n)))[:, columns_of(whole, {"weight_hh"})]
        thetas.append(block @ block.T)
    expected = (thetas[0] * thetas[1]).sum() / np.prod([np.linalg.norm(t) for t in thetas])
    assert reference.compute(part)["metrics"]["alignment"] == pytest.approx(expected, rel=1e-10)
    chosen = methods.get(method)
    target = Target(chosen.backends[0], "float64", "cpu")
    assert chosen.unsupported_reason(part, "alignment", target) is None
    found = chosen.estimate(chosen.prepare(part, target), "alignment")
    assert found.value == pytest.approx(expected, rel=1e-9)
