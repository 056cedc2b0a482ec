"""First, later and prepared calls: all compute the same kernel, and only a first call traces."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from ntkbench import studies
from ntkbench.layerwise import reuse
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.networks import fully_connected
from ntkbench.options import Target
from ntkbench.studies import prepared_kernel

FULLY_CONNECTED, CONVOLUTIONAL = "fc_relu[N=3,O=2,width=8,depth=2]", "digits_conv[N=3]"


def test_a_row_has_the_seconds_of_each_way_and_their_ratios():
    cases = [{"problem": FULLY_CONNECTED}, {"problem": CONVOLUTIONAL, "calls": 2}]
    given = {"threads": 1, "device": "cpu", "dtype": "float64", "calls": 3, "cases": cases}
    table = studies.run("prepared_kernel", studies.settings("prepared_kernel", given))
    assert list(table["status"]) == ["ok", "ok"], table["reason"].tolist()
    assert table["calls"].tolist() == [3, 2] and (table["difference"] < 1e-12).all()
    ratios = ("prepared_over_engine", "first_over_textbook", "later_over_textbook")
    for name in (*(f"{way}_seconds" for way in ("engine", "prepared", "first", "later", "textbook")), *ratios):
        assert (table[f"{name}_q25"] <= table[name]).all() and (table[name] <= table[f"{name}_q75"]).all()
    assert table["hooks_seconds"].notna().tolist() == table["first_over_hooks"].notna().tolist() == [True, False]


def test_a_jacobian_that_does_not_fit_is_a_row_with_its_reason():
    given = {"threads": 1, "device": "cpu", "cases": [{"problem": FULLY_CONNECTED}], "limits": {"memory_mb": 0.1}}
    (row,) = studies.run("prepared_kernel", studies.settings("prepared_kernel", given)).to_dict("records")
    assert row["status"] == "out_of_memory"


@pytest.mark.parametrize("bias", [True, False])
def test_rivals_compute_the_kernel(bias):
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(4, 6, bias=bias), nn.ReLU(), nn.Linear(6, 3, bias=bias)).double()
    x = torch.randn(5, 4, dtype=torch.float64)
    rows = []
    for output in network(x).flatten():
        gradients = torch.autograd.grad(output, list(network.parameters()), retain_graph=True)
        rows.append(torch.cat([g.flatten() for g in gradients]))
    j = torch.stack(rows)
    for rival in (prepared_kernel.by_contraction, prepared_kernel.by_hooks):
        torch.testing.assert_close(rival(network, x), j @ j.T, rtol=1e-12, atol=1e-12)


@pytest.mark.slow
def test_only_a_first_call_traces(monkeypatch):
    network = fully_connected.network([40, 300, 300, 10]).double()  # too large for an explicit J
    x = torch.randn(64, 40, dtype=torch.float64)
    ways = prepared_kernel._ways(network, x, Target("torch", "float64"))
    for way in ways.values():
        way()
    traces, engines = [], []
    traced = LayerwiseKernel.__init__

    def counted(self, *args, trace=None, **more):
        (engines if trace else traces).append(1)
        traced(self, *args, trace=trace, **more)

    monkeypatch.setattr(LayerwiseKernel, "__init__", counted)
    expected = {"engine": (0, 0), "prepared": (0, 0), "later": (0, 1), "first": (1, 0)}
    for name, counts in expected.items():
        traces.clear(), engines.clear()
        ways[name]()
        assert (len(traces), len(engines)) == counts, name


def test_forgetting_drops_all_traces():
    network, x = fully_connected.network([4, 5, 2]), torch.randn(3, 4)
    made = reuse.traced(network, dict(network.named_parameters()), x, 2**30)
    assert reuse.traced(network, dict(network.named_parameters()), x, 2**30).trace is made.trace
    reuse.forget()
    assert reuse.traced(network, dict(network.named_parameters()), x, 2**30).trace is not made.trace


def test_the_default_cases_are_valid():
    for case in prepared_kernel.CASES:
        prepared_kernel.Case.model_validate(case.model_dump())
