"""Kernels at other weights, and alignments with networks, targets and loaders, as users have them."""

from __future__ import annotations

import copy
import itertools
import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import ntkbench
from ntkbench import Kernel
from ntkbench.errors import BadInput

O = 3  # noqa: E741 - the field's symbol
X = torch.randn(6, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
Y = torch.randn(6, O, dtype=torch.float64, generator=torch.Generator().manual_seed(2))


def net(seed: int = 0, width: int = 5) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, width), nn.Tanh(), nn.Linear(width, O)).double()


def normed(seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, O)).double()


class Tied(nn.Module):
    def __init__(self, seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.a, self.b, self.readout = nn.Linear(4, 4), nn.Linear(4, 4), nn.Linear(4, O)
        self.b.weight = self.a.weight
        self.double()

    def forward(self, x):
        return self.readout(torch.tanh(self.b(torch.tanh(self.a(x)))))


def theta(module: nn.Module, x: Tensor = X, names: str = "") -> Tensor:
    chosen = [w for name, w in module.named_parameters() if name.startswith(names) and w.requires_grad]
    rows = [torch.autograd.grad(y, chosen, retain_graph=True, materialize_grads=True) for y in module(x).reshape(-1)]
    j = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    return j @ j.T


def cosine(a: Tensor, b: Tensor) -> float:
    return float((a * b).sum() / (a.norm() * b.norm()))


def test_parameters_that_count_also_count_in_another_network():
    one, other = net(), net(1, width=7)
    expected = cosine(theta(one, names="0."), theta(other, names="0."))
    assert float(ntkbench.alignment(one, other, X, parameters="0.*")) == pytest.approx(expected)
    assert float(ntkbench.alignment(one, other, X, parameters={"first": "0.*"})["first"]) == pytest.approx(expected)
    assert float(Kernel(one, X).groups({"first": "0.*"})["first"].alignment(other)) == pytest.approx(expected)
    with pytest.raises(BadInput, match="matches no parameter"):
        ntkbench.alignment(one, nn.Sequential(nn.Identity(), net()), X, parameters="0.*")


@pytest.mark.parametrize("inputs", [X, {"input": X}], ids=["a tensor", "a mapping"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_another_network_is_evaluated_in_the_precision_of_the_first(dtype, inputs):
    one, other = net(), net(1, width=7).to(dtype)
    expected = cosine(theta(one), theta(copy.deepcopy(other).double()))
    assert float(ntkbench.alignment(one, other, inputs)) == pytest.approx(expected, rel=1e-11)
    assert float(ntkbench.alignment(other, one, inputs, dtype="float64")) == pytest.approx(expected, rel=1e-11)


def test_the_same_parameters_must_be_trainable_in_both_networks():
    one, other = net(), net(1)
    one[0].bias.requires_grad_(False)
    with pytest.raises(BadInput, match=r"requires_grad=True for '0.bias', which is frozen.*parameters="):
        ntkbench.alignment(one, other, X)
    with pytest.raises(BadInput, match=r"requires_grad=False for '0.bias', which is trainable.*parameters="):
        ntkbench.alignment(other, one, X)
    expected = cosine(theta(one, names="2."), theta(other, names="2."))
    for ends in ((one, other), (other, one)):
        assert float(ntkbench.alignment(*ends, X, parameters="2.*")) == pytest.approx(expected)


class Reading(nn.Module):
    """A readout that is given as ``call``."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(O, 2).double()

    def forward(self, model: nn.Module, x: Tensor) -> Tensor:
        return self.layer(model(x))


@pytest.mark.parametrize("argument", ["call", "output"])
def test_modules_that_are_given_have_their_present_values(argument):
    body, reading = net(), Reading()
    given = {argument: reading if argument == "call" else reading.layer}
    kernel = Kernel(body, X, **given)
    tracker = ntkbench.Tracker(body, X, every=1, metrics=("trace", "alignment"), **given)
    whole = nn.Sequential(body, reading.layer)
    before = theta(whole)
    assert float(tracker(0)["trace"]) == pytest.approx(float(before.trace()))
    with torch.no_grad():
        reading.layer.weight.add_(1)
    after = theta(whole)
    assert float(kernel.trace()) == pytest.approx(float(before.trace()))
    assert float(kernel.at(body).trace()) == pytest.approx(float(after.trace()))
    wide = net(1, width=7)
    assert float(kernel.alignment(wide)) == pytest.approx(cosine(before, theta(nn.Sequential(wide, reading.layer))))
    reading.requires_grad_(False).eval()  # a tracker keeps its parameters
    found = tracker(1)
    assert float(found["trace"]) == pytest.approx(float(after.trace()))
    assert float(found["alignment"]) == pytest.approx(cosine(before, after))


@pytest.mark.parametrize("make", [net, normed, lambda seed=0: normed(seed).eval(), Tied], ids=lambda f: f.__name__)
def test_a_network_takes_its_own_state_dict(make):
    module, other = make(), make(1)
    kernel = Kernel(module, X)
    torch.testing.assert_close(kernel.at(module.state_dict()).ntk(), kernel.ntk())
    torch.testing.assert_close(kernel.at(other.state_dict()).ntk(), Kernel(other, X).ntk())
    prefixed = {f"module._orig_mod.{name}": w for name, w in other.state_dict().items()}
    torch.testing.assert_close(kernel.at(prefixed).ntk(), Kernel(other, X).ntk())


def test_a_wrapped_network_takes_its_own_state_dict():
    module = nn.DataParallel(net())
    torch.testing.assert_close(Kernel(module, X).at(module.state_dict()).ntk(), theta(net()))


def test_two_values_for_a_tied_tensor_are_refused():
    module = Tied()
    values = {"a.weight": torch.zeros(4, 4), "b.weight": torch.ones(4, 4)}
    with pytest.raises(BadInput, match=r"'b.weight' is tied"):
        Kernel(module, X).at(values)
    same = Kernel(module, X).at({"b.weight": torch.ones(4, 4)}).ntk()
    torch.testing.assert_close(same, Kernel(module, X).at({"a.weight": torch.ones(4, 4)}).ntk())


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ({"0.weight": "zeros"}, r"value of '0.weight' must be a tensor, got str"),
        ({"0.weight": None}, r"value of '0.weight' must be a tensor, got NoneType"),
        ({"model": net().state_dict(), "epoch": 3}, "unknown parameter or buffer 'model'"),
        ({"0.weight": torch.zeros(5, 4, dtype=torch.complex64)}, "'0.weight' must be real"),
        ({"0.weight": torch.zeros(4, 5)}, "of shape"),
        ({"0.weight": torch.full((5, 4), torch.nan)}, "nan or infinite"),
    ],
)
def test_values_that_do_not_fit_the_network_are_refused(values, said):
    with pytest.raises(BadInput, match=said):
        Kernel(net(), X).at(values)


def test_internal_names_are_not_names_of_parameters():
    class Named(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network = net()

        def forward(self, input):
            return self.network(input)

    kernel = Kernel(Named(), {"input": X})
    for name in ("input_0", "model.network.0.weight"):
        with pytest.raises(BadInput, match="unknown parameter or buffer") as caught:
            kernel.at({name: torch.zeros(6, 4)})
        assert "input_" not in str(caught.value).split("allowed")[1]
    torch.testing.assert_close(kernel.at({"network.2.bias": torch.ones(O)}).ntk(), kernel.ntk())


def test_bfloat16_weights_and_targets_are_supported():
    module = net().to(torch.bfloat16)
    wide = copy.deepcopy(module).double()
    kernel = Kernel(module, X.to(torch.bfloat16), dtype="float64")
    torch.testing.assert_close(kernel.at(module.state_dict()).ntk(), theta(wide, X.to(torch.bfloat16).double()))
    y = Y.to(torch.bfloat16)
    assert float(kernel.alignment(y)) == pytest.approx(float(kernel.alignment(y.double())))
    tracker = ntkbench.Tracker(module, X.to(torch.bfloat16), metrics=("trace",), dtype="float32")
    assert float(tracker(0)["trace"]) > 0


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e-30, 1e30, 1e-200, 1e200])
def test_the_scale_of_a_target_does_not_matter(scale, dtype):
    kernel = Kernel(net().to(dtype), X.to(dtype))
    expected = cosine(theta(net()), Y.reshape(-1, 1) @ Y.reshape(1, -1))
    for target in (scale * Y, scale * Y.reshape(-1, 1) @ Y.reshape(1, -1)):
        assert float(kernel.alignment(target)) == pytest.approx(expected, rel=1e-4)


def test_invalid_targets_are_refused():
    kernel = Kernel(net(), X)
    with pytest.raises(BadInput, match="real numbers"):
        kernel.alignment(1j * Y)
    for wrong in (None, "y", [1.0, 2.0]):
        with pytest.raises(BadInput, match=r"must be a torch.nn.Module, a Kernel"):
            kernel.alignment(wrong)
    with pytest.raises(BadInput, match="omit method, passes and rtol"):
        kernel.alignment(torch.eye(6), method="hutchinson", passes=8)


def in_axes(*outputs: int) -> nn.Sequential:
    """A network with several axes of outputs."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, math.prod(outputs)), nn.Tanh(), nn.Unflatten(1, outputs)).double()


USES = {
    "solve": lambda kernel, y: kernel.solve(y, ridge=1.0).values.reshape(-1),
    "regress": lambda kernel, y: kernel.regress(X[:2], y, ridge=1.0).values.reshape(-1),
    "alignment": lambda kernel, y: kernel.alignment(y).value,
    "metrics": lambda kernel, y: kernel.metrics(y)["alignment"].value,
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("outputs", [(2, 5), (5, 2), (10,), (1, 10), ()])
def test_labels_have_the_shape_of_the_outputs_or_are_flat(use, outputs):
    """All other shapes of the same size are refused."""
    model, of = in_axes(*outputs) if outputs else nn.Sequential(in_axes(1), nn.Flatten(0)), USES[use]
    N, O, kernel = len(X), math.prod(outputs), Kernel(model, X)  # noqa: E741 - the field's symbols
    y = torch.randn(N, *outputs, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    allowed = {(N, *outputs), (N, O), (N * O,)}
    for shape in allowed:
        np.testing.assert_allclose(of(kernel, y.reshape(shape)), of(kernel, y), rtol=1e-9)
    others = {(O, N), (1, N * O), (N * O, 1), (N, 1, O), (N, O, 1), (2, N * O // 2)}
    for shape in {*itertools.permutations((N, *outputs)), *others} - allowed:
        with pytest.raises(BadInput, match=r"like the outputs, \(6.* got shape \(") as caught:
            of(kernel, y.reshape(shape))
        assert str(shape) in str(caught.value)


@pytest.mark.parametrize("outputs", [(6,), (2, 3), (3, 2)])
def test_a_target_that_may_be_labels_or_a_kernel_is_refused(outputs, monkeypatch):
    """Where N = O; the message says how to give either."""
    kernel, target = Kernel(in_axes(*outputs), X), X @ X.T
    matrix = theta(in_axes(*outputs))
    assert kernel.alignment(target.reshape(-1)).value == pytest.approx(
        cosine(matrix, target.reshape(-1, 1) @ target.reshape(1, -1))
    )
    between = torch.kron(target, torch.eye(6, dtype=torch.float64))
    assert kernel.alignment(between).value == pytest.approx(cosine(matrix, between))
    np.testing.assert_array_equal(  # a right-hand side is no kernel
        kernel.solve(target, ridge=1.0).values.reshape(-1), kernel.solve(target.reshape(-1), ridge=1.0).values
    )
    monkeypatch.setattr(Kernel, "_estimates", lambda *given: pytest.fail("it is refused first"))
    for refused in (kernel.alignment, kernel.metrics):
        with pytest.raises(BadInput, match=r"\(6, 6\) may be y or .* N = O = 6: .*\(36,\), y.reshape\(-1\).*eye\(6\)"):
            refused(target)


def test_one_output_has_no_ambiguous_targets():
    kernel, target = Kernel(in_axes(1), X), X @ X.T
    assert kernel.alignment(target).value == pytest.approx(cosine(theta(in_axes(1)), target))


def test_targets_are_checked_before_other_metrics_are_computed(monkeypatch):
    kernel = Kernel(net(), X)
    monkeypatch.setattr(Kernel, "_estimates", lambda *given: pytest.fail("the target is checked first"))
    for wrong, says in ((Y.T, "like the outputs"), (0 * Y, "not zero"), (1j * Y, "real numbers")):
        with pytest.raises(BadInput, match=says):
            kernel.metrics(wrong)
    with pytest.raises(BadInput, match="omit method, passes and rtol"):
        kernel.metrics(torch.eye(6), passes=8)


def test_metrics_take_the_same_targets_as_an_alignment():
    kernel = Kernel(net(), X)
    for other in (Y, torch.eye(6), net(1), Kernel(net(1), X), net(1).state_dict()):
        found = kernel.metrics(other)
        assert list(found) == ["trace", "norm", "effective_rank", "alignment"]
        assert float(found["alignment"]) == pytest.approx(float(kernel.alignment(other)))
    assert float(ntkbench.metrics_of(net(), X, Y)["alignment"]) == pytest.approx(float(kernel.alignment(Y)))


def test_functions_in_jax_have_targets_in_their_precision():
    w = np.random.default_rng(0).standard_normal((4, O))
    kernel = Kernel(lambda params, x: x @ params, X.numpy(), params=w, dtype="float64")
    expected = cosine(torch.kron(X @ X.T, torch.eye(O, dtype=X.dtype)), Y.reshape(-1, 1) @ Y.reshape(1, -1))
    assert float(kernel.alignment(Y.numpy())) == pytest.approx(expected, rel=1e-13)
    with pytest.raises(BadInput, match="norm of Theta itself, which sum_of_logits does not compute"):
        kernel.alignment(Y.numpy(), method="sum_of_logits")
    with pytest.raises(BadInput, match="one backend"):
        kernel.alignment(Kernel(net(), X))
    for wrong in (None, lambda params, x: x):
        with pytest.raises(BadInput, match="a pytree of the function's parameters"):
            kernel.alignment(wrong)
    with pytest.raises(BadInput, match=r"follows a torch.nn.Module"):
        ntkbench.Tracker(lambda params, x: x @ params, X.numpy(), params=w)


@pytest.mark.parametrize("options", [{}, {"drop_last": True}, {"generator": True}])
def test_a_loader_that_shuffles_is_read_in_order_and_left_as_it_was(options):
    generator = torch.Generator().manual_seed(3)
    options = {**options, "generator": generator} if options.get("generator") else options
    loader = DataLoader(TensorDataset(X), batch_size=4, shuffle=True, **options)
    x = X[:4] if options.get("drop_last") else X
    call = lambda module, batch: module(batch[0])  # noqa: E731
    model = net()
    expected = theta(model, x)
    before, ambient = generator.get_state(), torch.get_rng_state()
    assert float(ntkbench.alignment(model, Y[: len(x)], loader, call=call)) == pytest.approx(
        cosine(expected, Y[: len(x)].reshape(-1, 1) @ Y[: len(x)].reshape(1, -1))
    )
    torch.testing.assert_close(Kernel(model, loader, call=call).ntk(), expected)
    assert torch.equal(generator.get_state(), before) and torch.equal(torch.get_rng_state(), ambient)


class Doubling(DataLoader):
    """Doubles the samples of its data set."""

    def __iter__(self):
        for (x,) in super().__iter__():
            yield (2 * x,)


def test_a_loader_that_shuffles_and_iterates_in_its_own_way_keeps_it():
    loader = Doubling(TensorDataset(X), batch_size=4, shuffle=True)
    expected = float(theta(net(), 2 * X).trace())
    assert float(Kernel(net(), loader).trace()) == pytest.approx(expected)
    assert float(ntkbench.trace(net(), loader)) == pytest.approx(expected)


def test_a_tracker_refuses_a_network_whose_function_has_changed():
    class Gained(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.network, self.gain = net(), 1.0

        def forward(self, x):
            return self.gain * self.network(x)

    module = Gained()
    tracker = ntkbench.Tracker(module, X, every=1, metrics=("trace",))
    assert float(tracker(0)["trace"]) == pytest.approx(float(theta(module).trace()))
    module.gain = 3.0
    with pytest.raises(BadInput, match="does not compute"):
        tracker(1)


def test_a_tracker_keeps_its_parameters_when_some_are_frozen():
    module = net()
    tracker = ntkbench.Tracker(module, X, every=1, metrics=("trace", "alignment"))
    expected = float(theta(module).trace())
    module[0].requires_grad_(False)
    found = tracker(0)
    assert float(found["trace"]) == pytest.approx(expected) and float(found["alignment"]) == pytest.approx(1)
    assert not module[0].weight.requires_grad


@pytest.mark.parametrize(
    ("keywords", "said"),
    [
        ({"method": "nope"}, "unknown method"),
        ({"rtol": -1}, "rtol must be"),
        ({"passes": 0}, "passes must be"),
        ({"log": 3}, "log must be"),
        ({"method": "one_sided_reverse"}, "one_sided_reverse computes the trace only, not the"),
        ({"metrics": 3}, "metrics must be"),
        ({"method": ["hutchpp"]}, "method must be a name"),
    ],
)
def test_a_tracker_refuses_before_training_starts(keywords, said):
    with pytest.raises(BadInput, match=said):
        ntkbench.Tracker(net(), X, **keywords)


def test_a_tracker_counts_in_whole_steps():
    with pytest.raises(BadInput, match="step must be a whole number"):
        ntkbench.Tracker(net(), X, metrics=("trace",))("a")


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda k: k.trace(foo=1), "unknown keyword 'foo'"),
        (lambda k: k.alignment(net(1), foo=1), "unknown keyword 'foo'"),
        (lambda k: k.ntk(kernel=["full"]), "unknown kernel"),
        (lambda k: k.trace(method={}), "method must be a name"),
        (lambda k: k.groups({0: "0.*", "0": "2.*"}), "names of groups must differ"),
        (lambda k: Kernel(net(), X, parameters=list(net().parameters())), "parameters must be a name"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(call, said):
    with pytest.raises(BadInput, match=said) as caught:
        call(Kernel(net(), X))
    assert "\n" not in str(caught.value)


def test_ten_eigenvalues_are_given_or_all_if_there_are_fewer():
    assert len(Kernel(net(), X[:2]).eigenvalues().values) == 2 * O
    assert len(Kernel(net(), X).eigenvalues().values) == 10


class Branching(nn.Module):
    """A network whose gradients a flag changes, but not its outputs."""

    def __init__(self, changed: str = "", seed: int = 0) -> None:
        super().__init__()
        torch.manual_seed(seed)
        self.inner, self.readout, self.changed = nn.Linear(4, 5).double(), nn.Linear(5, O).double(), changed

    def forward(self, x):
        h = torch.tanh(self.inner(x))
        h = h.detach() if self.changed == "detached" else h
        if self.changed == "truncated":
            h = torch.cat([h[:, :2], h[:, 2:].detach()], 1)
        if self.changed == "tensor hook" and h.requires_grad:
            h.register_hook(lambda g: g * (torch.arange(5) % 2))
        y = self.readout(h)
        return torch.where(x[:, :1] > 9, y.detach(), y) if self.changed == "some samples" else y


def changed(kind: str, seed: int = 0) -> nn.Module:
    made = Branching(kind, seed)
    if kind == "parameter hook":
        made.inner.weight.register_hook(lambda g: g * (torch.arange(4) % 2))
    if kind == "module hook":
        made.readout.register_full_backward_hook(lambda layer, given, got: (given[0] * 2,))
    return made


@pytest.mark.parametrize(
    "kind", ["detached", "truncated", "tensor hook", "parameter hook", "module hook", "some samples"]
)
def test_a_network_with_the_same_outputs_and_other_gradients_is_another_network(kind):
    x = torch.randn(130, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    x[1, 0] = 10  # not among the 64 whose outputs are compared
    x = x if kind == "some samples" else x[:6]
    for seed in (0, 1):  # at the same weights and at others
        one, other = changed(""), changed(kind, seed)
        assert one.state_dict().keys() == other.state_dict().keys()
        expected = cosine(theta(one, x), theta(other, x))
        assert expected < 1 - 1e-6
        found = ntkbench.alignment(one, other, x)
        assert float(found) == pytest.approx(expected, rel=1e-9)
        assert float(ntkbench.metrics_of(one, x, other)["alignment"]) == pytest.approx(expected, rel=1e-6)
        with pytest.raises(BadInput, match="does not compute the gradients"):
            Kernel(one, x).at(other)
    assert float(ntkbench.alignment(one, changed("", 1), x)) == pytest.approx(
        cosine(theta(one, x), theta(changed("", 1), x))
    )
    with pytest.raises(BadInput, match="does not compute the gradients"):
        ntkbench.from_module(one, x, other)


def test_a_tracker_refuses_a_network_that_begins_to_detach():
    module = Branching()
    tracker = ntkbench.Tracker(module, X, every=1, metrics=("trace",))
    assert float(tracker(0)["trace"]) == pytest.approx(float(theta(module).trace()))
    module.changed = "detached"
    with pytest.raises(BadInput, match="does not compute the gradients"):
        tracker(1)
