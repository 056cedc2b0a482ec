"""The trace over the batches of a loader is that of all samples, and batches are dropped after use."""

from __future__ import annotations

import dataclasses
import gc
import weakref

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset, IterableDataset, TensorDataset

import ntkbench
from ntkbench import methods
from ntkbench.errors import BadInput, OverMemory
from ntkbench.estimate import Estimate
from ntkbench.operators import interact
from ntkbench.operators.plain import PlainNetwork
from ntkbench.options import Target
from ntkbench.problems.base import calls
from ntkbench.stream import total

N, INPUTS = 200, 5


def seeded(make, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


def network(outputs: int = 3) -> nn.Module:
    return seeded(lambda: nn.Sequential(nn.Linear(INPUTS, 8), nn.Tanh(), nn.Linear(8, outputs)).double())


X = seeded(lambda: torch.randn(N, INPUTS, dtype=torch.float64))


class Once(IterableDataset):
    """Samples that can be read once, as from a stream."""

    def __init__(self, samples):
        self._left = iter(samples)

    def __iter__(self):
        return self._left


LOADERS = {
    "tensors": lambda: (DataLoader(X, batch_size=40), None),
    "with labels": lambda: (DataLoader(TensorDataset(X, torch.arange(N)), batch_size=40), lambda m, b: m(b[0])),
    "shuffled": lambda: (DataLoader(X, batch_size=40, shuffle=True), None),
    "dicts": lambda: (DataLoader([{"x": x} for x in X], batch_size=40), lambda m, b: m(b["x"])),
    "batches": lambda: (DataLoader([X[:150], X[150:]], batch_size=None), None),
    "one batch": lambda: (DataLoader(X, batch_size=N), None),
    "one sample at a time": lambda: (DataLoader(X, batch_size=1), None),
    "read once": lambda: (DataLoader(Once(X), batch_size=40), None),
}


@pytest.mark.parametrize("kind", LOADERS)
def test_the_trace_is_that_of_all_samples(kind):
    loader, call = LOADERS[kind]()
    found, joined = ntkbench.trace(network(), loader, call=call), ntkbench.trace(network(), X)
    assert found.value == pytest.approx(joined.value, rel=1e-12)
    assert found.standard_error is None and found.certificate < 1e-7
    assert found.passes == pytest.approx(joined.passes)


def test_groups_of_parameters_have_the_traces_of_all_samples():
    groups = {"first": "0.*", "last": "2.*"}
    found = ntkbench.trace(network(), DataLoader(X, batch_size=40), parameters=groups)
    joined = ntkbench.trace(network(), X, parameters=groups)
    assert {name: e.value for name, e in found.items()} == pytest.approx({name: e.value for name, e in joined.items()})


def less_the_mean() -> nn.Module:
    """Its samples interact, which one sample alone does not show."""

    class LessTheMean(nn.Module):
        def forward(self, x):
            return x - (x.mean(0) if len(x) > 1 else 0)

    return nn.Sequential(network(), LessTheMean())


def normalised() -> nn.Module:
    return nn.Sequential(network(), nn.BatchNorm1d(3, dtype=torch.float64)).train()


@pytest.mark.parametrize("make", [normalised, less_the_mean])
@pytest.mark.parametrize("kind", ["batches", "read once", "one sample at a time"])
def test_samples_that_interact_are_joined(kind, make):
    loader, call = LOADERS[kind]()
    assert ntkbench.trace(make(), loader, call=call).value == pytest.approx(ntkbench.trace(make(), X).value, rel=1e-10)


class Capacity(nn.Module):
    """A mixture of experts that takes at most 5/8 of a batch, as few do: samples interact in the second part alone."""

    def __init__(self):
        super().__init__()
        self.all, self.expert = nn.Linear(INPUTS, 3), nn.Linear(INPUTS, 3)

    def forward(self, x):
        wanted = x[:, 0] > 0
        taken = wanted & (wanted.cumsum(0) <= -(-len(x) * 5 // 8))
        return self.all(x) + self.expert(x) * taken[:, None]


CROWDED = X[:130].abs() * torch.where(torch.arange(130) < 70, 1 - 2 * (torch.arange(130) % 2), 1)[:, None]


@pytest.mark.parametrize("memory", [None, 4000])  # with little, certificates compare with passes over two samples
def test_samples_that_interact_in_a_later_part_are_joined(memory):
    model, loader = seeded(Capacity).double(), DataLoader(TensorDataset(CROWDED), batch_size=70)
    assert not ntkbench.Kernel(model, CROWDED[:70]).problem.samples_interact
    jacobian = [
        torch.cat([g.reshape(-1) for g in torch.autograd.grad(f, tuple(model.parameters()), retain_graph=True)])
        for f in model(CROWDED).reshape(-1)
    ]
    exact = float(torch.stack(jacobian).square().sum())
    if memory:
        assert ntkbench.trace(model, loader, memory=memory).covers(exact, "float64")
        reverse = {"method": "one_sided_reverse", "passes": 40, "memory": memory}
        assert ntkbench.trace(model, loader, **reverse).value == ntkbench.trace(model, CROWDED, **reverse).value
        return
    assert ntkbench.trace(model, loader).value == pytest.approx(exact, rel=1e-10)
    groups = ntkbench.trace(model, loader, parameters={"all": "all.*", "expert": "expert.*"})
    assert sum(each.value for each in groups.values()) == pytest.approx(exact, rel=1e-10)
    found, joined = (ntkbench.trace(model, each, method="hutchinson", passes=20) for each in (loader, CROWDED))
    assert found.value == joined.value


def test_samples_that_interact_in_a_later_part_need_a_loader_that_can_be_read_again():
    model = seeded(Capacity).double()
    with pytest.raises(BadInput, match=r"before index 130 .* gives other samples when it is read again"):
        ntkbench.trace(model, DataLoader(Once(CROWDED), batch_size=70))
    with pytest.raises(BadInput, match="from index 70 on: per_sample_trace cannot compute"):
        ntkbench.trace(model, DataLoader(CROWDED, batch_size=70), method="per_sample_trace", passes=20)


def test_a_loader_with_missing_values_is_read_again():
    class Masked(Capacity):
        def forward(self, x):
            return super().forward(x.nan_to_num())

    model, x = seeded(Masked).double(), CROWDED.clone()
    x[3, 1] = torch.nan
    expected = ntkbench.trace(model, x).value
    assert ntkbench.trace(model, DataLoader(x, batch_size=70)).value == pytest.approx(expected, rel=1e-10)


@pytest.mark.parametrize("samples", [2, 3, 70])
def test_every_pair_of_samples_that_interact_is_noticed(samples):
    class Pair(nn.Module):
        """Two samples, marked by their first entry, see each other."""

        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(INPUTS, 2)

        def forward(self, x):
            marked = x[:, :1] > 5
            return self.layer(x) * (1 + marked * (marked.sum() > 1))

    model, target = seeded(Pair).double(), Target(dtype="float64")
    for one, other in {(0, 1), (0, samples - 1), (samples - 2, samples - 1)}:
        x = X[:samples].clone().clamp(max=1)
        problem = ntkbench.from_module(model, x)
        assert not interact(problem, target)
        x[[one, other], 0] = 9.0
        assert interact(dataclasses.replace(problem, x=x.numpy()), target)


def test_gradients_that_are_clipped_sample_by_sample_are_no_interaction():
    class Clip(torch.autograd.Function):
        @staticmethod
        def forward(ctx, h):
            return h.clone()

        @staticmethod
        def backward(ctx, g):
            return g.clamp(-0.5, 0.5)

    class Clipped(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer = nn.Linear(INPUTS, 2)

        def forward(self, x):
            return Clip.apply(self.layer(x))

    assert not interact(ntkbench.from_module(seeded(Clipped).double(), X), Target(dtype="float64"))


@pytest.mark.parametrize("memory", [None, 4000])
def test_regression_refuses_other_inputs_that_interact(memory):
    kernel = ntkbench.Kernel(seeded(Capacity).double(), CROWDED[:70], memory=memory)
    with pytest.raises(BadInput, match="samples interact in this network"):
        kernel.regress(CROWDED[70:], torch.ones(70, 3), ridge=0.1)
    assert kernel.regress(CROWDED[:70], torch.ones(70, 3), ridge=0.1).values.shape == (70, 3)


def test_a_pass_that_does_not_fit_is_no_interaction(monkeypatch):
    kernel = ntkbench.Kernel(seeded(Capacity).double(), CROWDED[:20])

    def full(*_, **__):
        raise RuntimeError("out of memory")

    monkeypatch.setattr(PlainNetwork, "gradient", full)
    with pytest.raises(RuntimeError, match="out of memory"):
        interact(kernel.problem, Target(dtype="float64"))


def test_batches_that_do_not_fit_together_are_refused_in_one_line(monkeypatch):
    def full(parts, start=0):
        raise RuntimeError("can't allocate memory: you tried to allocate 9 bytes")

    model, loader = seeded(Capacity).double(), DataLoader(CROWDED, batch_size=70)
    own = calls.concatenated
    monkeypatch.setattr(calls, "concatenated", lambda parts, start=0: (own if isinstance(parts, list) else full)(parts))
    with pytest.raises(OverMemory, match=r"samples interact, so all batches .* do not fit in memory"):
        ntkbench.trace(model, loader)


@pytest.mark.slow
def test_estimates_of_batches_are_independent_and_their_errors_add_up():
    exact, loader = ntkbench.trace(network(), X).value, DataLoader(X, batch_size=40)
    found = [ntkbench.trace(network(), loader, method="hutchinson", passes=20, seed=s) for s in range(60)]
    off = np.array([e.value - exact for e in found])
    stated = np.sqrt(np.mean([e.standard_error**2 for e in found]))
    assert 0.7 < off.std() / stated < 1.4
    assert sum(e.covers(exact, "float64") for e in found) >= 50
    assert all(e.passes == 20 for e in found)
    again = ntkbench.trace(network(), loader, method="hutchinson", passes=20, seed=7)
    assert again == found[7]


def test_degrees_of_freedom_are_those_of_welch_and_satterthwaite():
    parts = [
        Estimate(1.0, 0.3, 4, "a", metric="trace", degrees=3),
        Estimate(2.0, 0.1, 8, "b", metric="trace", degrees=9),
    ]
    found = total(parts, [1, 3])
    assert (found.value, found.passes, found.method) == (3.0, 7.0, "a, b")
    assert found.standard_error == pytest.approx(0.1**0.5)
    assert found.degrees == pytest.approx(0.1**2 / (0.09**2 / 3 + 0.01**2 / 9))
    for more in (Estimate(1.0, 0.0, 1, "a", metric="trace", degrees=0), Estimate(1.0, None, 1, "a", metric="trace")):
        assert total([*parts, more], [1, 3, 1]).degrees == pytest.approx(found.degrees)


@pytest.mark.parametrize("degrees", [0, 3, np.inf])
@pytest.mark.parametrize("error", [0.0, 0.3, None])
def test_an_unknown_error_makes_that_of_the_sum_unknown(error, degrees):
    unknown = Estimate(1.0, float("nan"), 4, "a", metric="trace", degrees=degrees)
    known = Estimate(2.0, error, 4, "a", metric="trace", degrees=9)
    for parts in ([unknown, known], [known, unknown], [unknown, unknown]):
        found = total(parts, [1, 1])
        assert found.value == sum(each.value for each in parts)
        assert np.isnan(found.standard_error) and found.degrees == 0
        assert found.interval() == (-np.inf, np.inf) and found.relative_width() == np.inf


STOCHASTIC = [name for name in methods.names() if methods.get(name).takes_passes]


@pytest.mark.parametrize("method", [name for name in STOCHASTIC if "trace" in methods.get(name).metrics])
def test_a_last_batch_of_one_sample_with_one_output_has_an_error(method):
    """Most methods draw no more probes than there are outputs, and one probe shows no scatter."""
    loader = DataLoader(X[:65], batch_size=64)
    try:
        found = ntkbench.trace(network(1), loader, method=method, passes=16)
    except BadInput as error:  # the method takes other networks
        assert "DataLoader" not in str(error)
        return
    if method == "grass" and np.isnan(found.standard_error):  # its masks may miss one of few parameters
        assert any("unknown error: " in note for note in found.notes)
        return
    exact = ntkbench.trace(network(1), X[:65]).value
    assert np.isfinite(found.standard_error) and found.degrees > 0
    assert abs(found.value - exact) <= 6 * found.standard_error + 1e-6 * exact


def test_a_tolerance_holds_for_the_sum():
    found = ntkbench.trace(network(50), DataLoader(X, batch_size=40), method="per_sample_trace", rtol=0.1)
    assert found.relative_width() <= 0.1


class Watched(Dataset):
    """Batches that count how many of them are still alive, without those in garbage."""

    def __init__(self):
        self.made: list[weakref.ref] = []
        self.most = 0

    def __len__(self):
        return 12

    def alive(self) -> int:
        return sum(made() is not None for made in self.made)

    def __getitem__(self, i):
        batch = X[i : i + 70].clone()
        self.made.append(weakref.ref(batch))
        if self.alive() > 3:  # a collection is slow
            gc.collect()
        self.most = max(self.most, self.alive())
        return batch


def test_batches_are_dropped():
    data = Watched()
    ntkbench.trace(network(), DataLoader(data, batch_size=None))
    assert len(data.made) >= 12 and data.most <= 3


def test_random_generators_are_left_as_they_were():
    generator = torch.Generator().manual_seed(3)
    loader = DataLoader(X, batch_size=40, shuffle=True, generator=generator)
    before = torch.get_rng_state(), generator.get_state()
    ntkbench.trace(network(), loader)
    assert all(torch.equal(*each) for each in zip(before, (torch.get_rng_state(), generator.get_state()), strict=True))


@pytest.mark.parametrize("metric", ["trace", "norm"])
def test_random_generators_are_not_set_back_after_a_failure(metric):
    torch.manual_seed(0)
    expected = torch.rand(2)
    torch.manual_seed(0)
    with pytest.raises(BadInput) as caught:
        getattr(ntkbench, metric)(network(), DataLoader([X[:90], X[:90, :3], X[:90]], batch_size=None))
    first = torch.rand(1)
    del caught
    gc.collect()
    assert torch.equal(torch.cat([first, torch.rand(1)]), expected)


@pytest.mark.parametrize("layer", [nn.GRU, nn.LSTM, nn.RNN])
def test_recurrent_layers_are_supported(layer):
    model, x = seeded(lambda: layer(INPUTS, 3, batch_first=True)), torch.randn(90, 4, INPUTS)
    found = ntkbench.trace(model, DataLoader(x, batch_size=30))
    assert found.value == pytest.approx(ntkbench.trace(model, x).value, rel=1e-5)


@pytest.mark.parametrize(
    ("batches", "says"),
    [
        ([], "gives no batch"),
        ([X[:90], X[:90, :3]], "samples of the DataLoader from index 90 on: .*got shape"),
        ([X[:90], X[:4], X[:4, :3]], "batch 2 of the DataLoader must be like the first one"),
        ([X[:90], {"x": X[:90]}], "samples of the DataLoader from index 90 on"),
        ([X[:90], X[:90].long()], "samples of the DataLoader from index 90 on: .*int64"),
        ([X[:90], X[:90] * float("nan")], "samples of the DataLoader from index 90 on: .*its gradient is not finite"),
    ],
)
def test_batches_that_do_not_fit_are_named(batches, says):
    with pytest.raises(BadInput, match=says):
        ntkbench.trace(network(), DataLoader(batches, batch_size=None))


@pytest.mark.parametrize("metric", ["trace", "norm"])
@pytest.mark.parametrize("data", [X, TensorDataset(X, torch.arange(N))])
def test_a_loader_that_does_not_batch_its_samples_is_named(metric, data):
    with pytest.raises(BadInput, match=r"batch_size=None, so each of its items must be a batch \[N, ...\]"):
        getattr(ntkbench, metric)(network(), DataLoader(data, batch_size=None), call=lambda m, b: m(b))
