"""The contract checks: a plug-in that breaks the contract gets a message that says how."""

from __future__ import annotations

import dataclasses
import functools
import math
import random

import numpy as np
import pandas as pd
import pytest
import torch
from conftest import written_out
from torch import nn

from ntkbench import figures, methods, paths, problems, studies, testing
from ntkbench.errors import BadInput
from ntkbench.layerwise import rules
from ntkbench.layerwise.factors import Products
from ntkbench.methods.base import Method

HONEST = type(methods.get("direct"))
RANDOM = type(methods.get("hutchinson"))


def changed(**fields):
    """An exact method whose estimates have other fields."""

    class Changed(HONEST):
        def estimate(self, *args, **kwargs):
            return dataclasses.replace(super().estimate(*args, **kwargs), **fields)

    return Changed


class Wrong(HONEST):
    def estimate(self, prepared, metric, passes=None, seed=0):
        found = super().estimate(prepared, metric, passes, seed)
        return dataclasses.replace(found, value=found.value * (1 + 1e-6))


class Rounding(HONEST):
    def estimate(self, prepared, metric, passes=None, seed=0):
        found = super().estimate(prepared, metric, passes, seed)
        return dataclasses.replace(found, value=found.value * (1 + 1e-3 * (prepared.target.dtype == "float32")))


class Drifting(HONEST):
    def estimate(self, prepared, metric, passes=None, seed=0):
        found = super().estimate(prepared, metric, passes, seed)
        return dataclasses.replace(found, value=found.value + 1e-12 * seed)


class Hungry(HONEST):
    def estimate(self, prepared, metric, passes=None, seed=0):
        found = super().estimate(prepared, metric, passes, seed)
        return dataclasses.replace(found, value=found.value * (1 + 1e-9 * (prepared.target.memory == 1)))


class Announcing(HONEST):
    def passes_needed(self, problem, metric, target):
        return super().passes_needed(problem, metric, target) + 1


class Number(HONEST):
    def estimate(self, *args, **kwargs):
        return super().estimate(*args, **kwargs).value


class Silent(HONEST):
    def unsupported_reason(self, problem, metric, target, passes=None):
        return None


class Verbose(HONEST):
    def unsupported_reason(self, *args):
        reason = super().unsupported_reason(*args)
        return reason and f"{reason}\nand more"


class Running(HONEST):
    def unsupported_reason(self, problem, *args):
        import torch

        problem.module(torch.from_numpy(problem.x))
        return super().unsupported_reason(problem, *args)


class Careless(HONEST):
    needs_independent_samples = True

    def unsupported_reason(self, problem, *args):
        return super().unsupported_reason(dataclasses.replace(problem, samples_interact=False), *args)


class Guessing(HONEST):
    def bytes_needed(self, *args):
        return -1


class Spending(RANDOM):
    def spend(self, prepared, metric, passes, seed):
        return super().spend(prepared, metric, 2 * passes, seed)


class Miscounting(RANDOM):
    def spend(self, prepared, metric, passes, seed):
        found = super().spend(prepared, metric, passes, seed)
        return dataclasses.replace(found, passes=found.passes - 1)


class Unseeded(RANDOM):
    def spend(self, prepared, metric, passes, seed):
        return super().spend(prepared, metric, passes, int(np.random.default_rng().integers(1 << 30)))


class Fixed(RANDOM):
    def spend(self, prepared, metric, passes, seed):
        return super().spend(prepared, metric, passes, 0)


class Biased(RANDOM):
    def spend(self, prepared, metric, passes, seed):
        found = super().spend(prepared, metric, passes, seed)
        return dataclasses.replace(found, value=found.value + 8 * found.standard_error)


class Shifted(RANDOM):
    def spend(self, prepared, metric, passes, seed):
        found = super().spend(prepared, metric, passes, seed)
        return dataclasses.replace(found, value=found.value + 100)


class Overconfident(RANDOM):
    def spend(self, prepared, metric, passes, seed):
        found = super().spend(prepared, metric, passes, seed)
        return dataclasses.replace(found, standard_error=found.standard_error / 1.5)


class Eager(RANDOM):
    def estimate(self, prepared, metric, passes=None, seed=0):
        return super().estimate(prepared, metric, passes or 100, seed)


class Larger(HONEST):
    def estimate(self, prepared, metric, passes=None, seed=0):
        found = super().estimate(prepared, metric, passes, seed)
        return dataclasses.replace(found, value=found.value * (1 + (prepared.problem.N > 3)))


class Constant(type(methods.get("sum_of_logits"))):
    def estimate(self, *args, **kwargs):
        return dataclasses.replace(super().estimate(*args, **kwargs), value=17.0)


class ConstantOfItsOwn(Constant):
    computes = "a kernel that the suite does not know"

    def estimate(self, *args, **kwargs):
        return dataclasses.replace(super().estimate(*args, **kwargs), kernel=self.computes)


class Scattered(RANDOM):
    def estimates(self, prepared, names, passes, seed=0, *args, **kwargs):
        found = super().estimates(prepared, names, passes, seed, *args, **kwargs)
        factor = 0.3 if seed % 2 else 1.38
        return {k: dataclasses.replace(e, standard_error=factor * e.standard_error) for k, e in found.items()}


class Doubtful(RANDOM):
    def estimates(self, *args, **kwargs):
        return {k: dataclasses.replace(e, degrees=0.3) for k, e in super().estimates(*args, **kwargs).items()}


class SlightlyBiased(RANDOM):
    def estimates(self, *args, **kwargs):
        return {k: dataclasses.replace(e, value=1.02 * e.value) for k, e in super().estimates(*args, **kwargs).items()}


class TwoFaced(RANDOM):
    def spend(self, *args):
        return dataclasses.replace(found := super().spend(*args), value=found.value * (1 + 1e-3))


class Impatient(RANDOM):
    def estimates(self, prepared, names, passes, seed=0, rtol=None, *args):
        found = super().estimates(prepared, names, passes, seed, rtol, *args)
        return found if rtol is None else {k: dataclasses.replace(e, value=2 * e.value) for k, e in found.items()}


def damaging(damage):
    """An exact method that does something to its network, or to the process."""

    class Damaging(HONEST):
        def estimate(self, prepared, *args, **kwargs):
            found = super().estimate(prepared, *args, **kwargs)
            damage(prepared.problem.module)
            return found

    return Damaging


@torch.no_grad()
def scale(module):
    next(module.parameters()).mul_(1.5)


def accumulate(module):
    module(torch.ones(1, 3)).sum().backward()


def run_again(module):
    with torch.no_grad():
        for _ in range(100):
            module(torch.ones(3, 3))


class Undemanding(RANDOM):
    def unsupported_reason(self, problem, metric, target, passes=None):
        return super().unsupported_reason(problem, metric, target)


def check(monkeypatch, cls: type[Method], name: str, run=testing.check_method, *args) -> None:
    monkeypatch.setattr(cls, "name", name, raising=False)
    monkeypatch.setattr(methods, "get", lambda _: cls())
    run(name, *args)


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (changed(value=math.nan), "has the value nan"),
        (changed(value=np.float64(1)), "has the value np.float64"),
        (changed(value=1j), "has the value 1j"),
        (changed(method="other"), "names itself 'other'"),
        (changed(metric="norm"), "reports the metric 'norm'"),
        (changed(standard_error=0.1), "is deterministic, but has a standard error of 0.1"),
        (changed(passes=7.0), "reports 7.0 passes, but its operators counted 12"),
        (changed(certificate=None), "has the certificate None"),
        (changed(rounding=None), "has the rounding None"),
        (Wrong, "instead of .* in float64"),
        (Larger, "instead of .* for N=7 and O=4"),
        (Constant, "is 17.0 instead of .* in float64"),
        (ConstantOfItsOwn, "is 17.0 for two different networks"),
        (TwoFaced, "estimate gives .* but estimates gives"),
        (Impatient, "is wrong by .* with rtol=0.3"),
        (damaging(scale), "changes values of the network"),
        (damaging(accumulate), "changes gradients of parameters"),
        (damaging(lambda module: module[0].requires_grad_(False)), "changes requires_grad of parameters"),
        (damaging(lambda module: module.register_forward_hook(print)), "changes hooks of the network"),
        (damaging(lambda module: module[0].weight.register_hook(abs)), "changes hooks of the network"),
        (damaging(lambda module: module.eval()), "changes the mode of the network"),
        (damaging(lambda module: torch.manual_seed(0)), "changes PyTorch's random state"),
        (damaging(lambda module: np.random.rand()), "changes NumPy's random state"),
        (damaging(lambda module: random.random()), "changes Python's random state"),
        (damaging(lambda module: torch.set_default_dtype(torch.float64)), "changes the default precision"),
        (damaging(lambda module: torch.set_grad_enabled(False)), "changes whether gradients are recorded"),
        (damaging(lambda module: torch.set_num_threads(3)), "changes the number of threads"),
        (damaging(lambda module: torch.use_deterministic_algorithms(True)), "changes deterministic algorithms"),
        (damaging(run_again), "reports 12.0 passes, but runs the network 10[1-9] times"),
        (Rounding, "instead of .* in float32"),
        (Drifting, "two calls differ"),
        (Hungry, "instead of .* with memory for one row at a time"),
        (Announcing, "announced 13 passes, but spent 12"),
        (Number, "returns a float, not an Estimate"),
        (Silent, "gives no reason against the metric"),
        (Verbose, "a reason must be one line"),
        (Running, "runs the network to determine what it does not support"),
        (Careless, "needs_independent_samples is True; for interacting samples it says None"),
        (Guessing, "bytes_needed must be known beforehand"),
        (Spending, "spent .* passes"),
        (Miscounting, "but its operators counted"),
        (Unseeded, "one seed gives"),
        (Fixed, "another seed gives the same number"),
        (Biased, "but six standard errors are"),
        (Eager, "estimates without a budget"),
        (Undemanding, "gives no reason against"),
    ],
)
def test_a_method_that_breaks_its_contract_gets_the_reason(monkeypatch, cls, says):
    def process():
        states = torch.get_rng_state().tolist(), np.random.get_state()[1].tolist(), random.getstate()
        exact = torch.are_deterministic_algorithms_enabled()
        return *states, torch.get_default_dtype(), torch.is_grad_enabled(), torch.get_num_threads(), exact

    before = process()
    with pytest.raises(AssertionError, match=rf"^method 'mine', torch, trace: .*{says}"):
        check(monkeypatch, cls, "mine", testing.check_method, "torch", "trace")
    if cls is not Unseeded:
        assert process() == before


@pytest.mark.parametrize("kernel", testing.KERNELS)
def test_kernels_that_methods_declare_are_those_of_their_definitions(tiny, kernel):
    """On a linear network without a hidden layer, each kernel of N samples is their Gram matrix, and all are equal."""
    layer = nn.Linear(3, 2)
    weights = {key: w.detach().numpy().copy() for key, w in layer.named_parameters()}
    problem = dataclasses.replace(tiny, module=layer, theta_0=weights, theta_f=None, jax_forward=None, _shape=[])
    x = np.column_stack([problem.x, np.ones(problem.N)]).astype(float)
    found = testing.KERNELS[kernel](problem, testing.explicit_jacobian(problem))
    np.testing.assert_allclose(found, np.kron(x @ x.T, np.eye(2)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize(("name", "cls"), [("direct", HONEST), ("hutchinson", RANDOM)])
def test_honest_methods_pass(monkeypatch, name, cls):
    check(monkeypatch, cls, name, testing.check_method, "torch")


@pytest.mark.slow
def test_an_honest_method_passes_in_all_backends(monkeypatch):
    check(monkeypatch, HONEST, "direct")


def test_standard_errors_that_are_too_small_are_detected(monkeypatch):
    testing.check_calibration("hutchinson", "trace")
    with pytest.raises(AssertionError, match=r"standard errors imply a variance of .*, but over seeds it is"):
        check(monkeypatch, Overconfident, "mine", testing.check_calibration, "trace")
    with pytest.raises(AssertionError, match="a bias of"):
        check(monkeypatch, Shifted, "mine", testing.check_calibration, "trace")


@pytest.mark.parametrize(
    ("cls", "says"),
    [
        (Scattered, "1[0-9]* of 200 intervals at 95 % contain the exact value"),
        (Doubtful, "intervals reach .* to either side, at a standard deviation of"),
        (SlightlyBiased, "160 passes: a bias of"),
    ],
)
def test_intervals_that_mislead_are_detected(monkeypatch, cls, says):
    with pytest.raises(AssertionError, match=says):
        check(monkeypatch, cls, "mine", testing.check_calibration, "trace")


def test_the_explicit_jacobian_matches_derivatives_by_hand(tiny):
    J = written_out(tiny)
    assert J.shape == (tiny.n, tiny.P)
    x, w = tiny.x[0].astype(float), tiny.theta_0
    hidden = np.tanh(w["0.weight"] @ x + w["0.bias"])
    by_hand = np.concatenate(
        [
            np.outer(w["2.weight"][0] * (1 - hidden**2), x).ravel(),
            w["2.weight"][0] * (1 - hidden**2),
            np.outer([1, 0], hidden).ravel(),
            [1, 0],
        ]
    )
    np.testing.assert_allclose(J[0], by_hand, rtol=1e-6)


def test_unknown_plug_ins_are_refused():
    for check_one, kind in ((testing.check_method, "method"), (testing.check_problem, "problem")):
        with pytest.raises(BadInput, match=f"unknown {kind} 'no_such'"):
            check_one("no_such")


def problem_with(monkeypatch, **changes):
    """Check a good small problem with some changes."""
    good = dataclasses.replace(testing.smooth_problem("mine", N=4), samples_interact=False)

    def load(label):
        N = 3 if "[" in label else 4
        made = dataclasses.replace(good, name=label, x=good.x[:N], _shape=[])
        return dataclasses.replace(made, **{key: change(made) for key, change in changes.items()})

    load.cache_clear = lambda: None
    monkeypatch.setattr(problems, "load", load)
    monkeypatch.setattr(problems, "describe", lambda name: "A problem.")
    testing.check_problem("mine")


def moved(weights):
    return {key: w + 1 for key, w in weights.items()}


def test_a_good_problem_passes(monkeypatch):
    problem_with(monkeypatch)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"x": lambda p: p.x + np.random.default_rng().random()}, "is not the same at every load"),
        ({"x": lambda p: p.x[::-1].copy()}, "with N=3 does not have its first three inputs"),
        ({"theta_0": lambda p: p.theta_0 if p.N == 4 else moved(p.theta_0)}, "with N=3 has another theta_0"),
        ({"theta_f": lambda p: dict(p.theta_0)}, "training leaves 0.weight unchanged"),
        ({"theta_f": lambda p: {k: w * np.nan for k, w in p.theta_f.items()}}, "training makes 0.weight invalid"),
        ({"jax_forward": lambda p: lambda w, x: 2 * p.jax_forward(w, x)}, "torch and JAX differ by 1 at theta_0"),
        ({"samples_interact": lambda p: True}, "samples_interact is True; it is False"),
    ],
)
def test_a_problem_that_breaks_its_contract_gets_the_reason(monkeypatch, changes, says):
    with pytest.raises(AssertionError, match=f"^problem 'mine': .*({says})"):
        problem_with(monkeypatch, **changes)


def test_a_problem_that_changes_the_random_state_gets_the_reason(monkeypatch):
    with pytest.raises(AssertionError, match="changes torch's random state"):
        problem_with(monkeypatch, recipe=lambda p: torch.rand(1) and "")


GOOD_ROWS = pd.DataFrame({"status": ["ok", "failed"], "reason": ["", "why"], "seeds": [1, 0], "calls": [1, 0]})


@pytest.mark.parametrize(
    ("table", "says"),
    [
        (GOOD_ROWS.iloc[:0], "has no rows"),
        (GOOD_ROWS.drop(columns="seeds"), "has no columns seeds"),
        (GOOD_ROWS.assign(status="fine"), "has the statuses {'fine'}"),
        (GOOD_ROWS.assign(reason=""), "gives no reason for 1 rows"),
    ],
)
def test_a_study_that_breaks_its_contract_gets_the_reason(monkeypatch, table, says):
    monkeypatch.setattr(studies, "run", lambda name, settings: table)
    with pytest.raises(AssertionError, match=f"^study 'training': {says}"):
        testing.check_study("training", {})


def test_a_good_study_passes():
    table = testing.check_study("mohamadi_drift", {"threads": 1, "width": 8, "steps": 20, "looks": 2, "images": 2})
    assert set(table["status"]) == {"ok"}


@pytest.mark.slow
def test_a_good_figure_passes():
    table = pd.read_csv(paths.REFERENCE / "default" / "studies" / "hazelden_trace.csv")
    testing.check_figure("hazelden_trace", table)


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda table, n: table.insert(0, f"c{n}", 1), "changes the table that it is given"),
        (lambda table, n: str(n), "gives another .png for the same table"),
        (lambda table, n: "Mine. " + "word " * 61, "has a caption of more than 60 words: word"),
    ],
)
def test_a_figure_that_breaks_its_contract_gets_the_reason(monkeypatch, draw, says):
    calls = []

    def drawn(name, table, folder):
        calls.append(1)
        written = draw(table, len(calls)) or "same"
        files = [folder / f"mine{form}" for form in (".png", ".pdf", ".csv", ".txt")]
        for file in files:
            file.write_text(written)
        return files

    monkeypatch.setattr(figures, "draw", drawn)
    with pytest.raises(AssertionError, match=f"^figure 'mine': {says}"):
        testing.check_figure("mine", pd.DataFrame({"a": [1]}))


class Scaled(nn.Module):
    """A weight that multiplies a sample entry by entry, for which ntkbench has no rule."""

    def __init__(self):
        super().__init__()
        self.w, self.out = nn.Parameter(torch.randn(4, 5)), nn.Linear(5, 2)

    def forward(self, x):
        return self.out(torch.tanh(x * self.w)).sum(1)


def scaling(times=1.0, fits=True):
    def factors(x, g):
        return Products(times * x.reshape(len(x), -1, 1, 1), g.reshape(*g.shape[:2], -1, 1, 1) if fits else g)

    def scale(node, position, entries):
        other = node.args[1 - position]
        same = isinstance(other, torch.fx.Node) and other.meta["val"].shape[1:] == entries.shape
        return rules.Use(node, other, entries.reshape(-1, 1, 1), functools.partial(factors)) if same else None

    return {torch.ops.aten.mul.Tensor: scale}


def check_rule(monkeypatch, given, network):
    monkeypatch.setitem(rules.REGISTRY._loaded, "mine", given)
    monkeypatch.setattr(rules, "RULES", rules.RULES | given)
    testing.check_rule("mine", network, torch.randn(3, 4, 5))


def test_a_good_rule_passes(monkeypatch):
    check_rule(monkeypatch, scaling(), Scaled())


@pytest.mark.parametrize(
    ("given", "network", "says"),
    [
        (scaling(2.0), Scaled(), "its gradient differs from that of plain autograd by .*, in float64"),
        (scaling(1.00001), Scaled(), "differs from that of plain autograd by|is wrong by"),
        (scaling(fits=False), Scaled(), "RuntimeError|ValueError|IndexError"),
        (scaling(), nn.Linear(5, 2), "is used for no weight of the network"),
    ],
)
def test_a_rule_that_breaks_its_contract_gets_the_reason(monkeypatch, given, network, says):
    with pytest.raises(AssertionError, match=f"^rule 'mine': .*({says})"):
        check_rule(monkeypatch, given, network)
