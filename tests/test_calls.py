"""Models called on anything: pytrees, loaders, parts of the outputs and of the parameters, each against explicit J."""

from __future__ import annotations

import copy
import dataclasses
import random
from collections import OrderedDict, UserDict, namedtuple

import numpy as np
import pytest
import torch
from conftest import metrics_of, mostly_slow
from hypothesis import given
from hypothesis import strategies as st
from torch import nn
from torch.utils._pytree import register_dataclass, tree_map
from torch.utils.data import DataLoader, TensorDataset
from zoo.libraries import declare_operators

from ntkbench import BadInput
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.operators import linearise, torch_network
from ntkbench.operators.explicit_kernel import explicit_kernel
from ntkbench.options import Target
from ntkbench.problems.base.calls import alike, as_module, groups, restricted, with_more
from ntkbench.problems.base.module import from_module, on_inputs
from ntkbench.problems.base.sequences import wrapped

TARGET = Target("torch", "float64", "cpu")


def seeded(make, seed: int = 0):
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return make()


class Mixed(nn.Module):
    """A network on tokens and features, with an optional mask and constants."""

    def __init__(self):
        super().__init__()
        self.table, self.first, self.last = nn.Embedding(7, 5), nn.Linear(4, 5), nn.Linear(5, 3)

    def forward(self, tokens, features, mask=None, scale=1.0, kind="tanh"):
        states = self.table(tokens)
        states = states if mask is None else states * mask[..., None]
        hidden = states.mean(1) + scale * self.first(features)
        return self.last(hidden.tanh() if kind == "tanh" else hidden)


class Steps(nn.Module):
    """[N, T, 4] to [N, T, 3], in a dict with another entry."""

    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(4, 3)

    def forward(self, x):
        return {"logits": self.layer(x).tanh(), "states": x}


N = 5
TOKENS = seeded(lambda: torch.randint(0, 7, (N, 6)))
FEATURES = seeded(lambda: torch.randn(N, 4))
MASK = seeded(lambda: torch.rand(N, 6) > 0.4)
SEQUENCES = seeded(lambda: torch.randn(N, 6, 4))


def double(inputs):
    """Inputs in float64."""
    return tree_map(lambda t: t.double() if isinstance(t, torch.Tensor) and t.is_floating_point() else t, inputs)


def jacobian(model: nn.Module, function, only=lambda name: True) -> torch.Tensor:
    """J of the outputs of ``function(model)`` by plain autograd, in float64."""
    model = copy.deepcopy(model).double()
    theta = [w for name, w in model.named_parameters() if w.requires_grad and only(name)]
    rows = [torch.autograd.grad(y, theta, retain_graph=True, materialize_grads=True) for y in function(model).flatten()]
    return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])


def layer_by_layer(problem, x2=None):
    """Theta by the traced network."""
    module, parameters, x = torch_network(problem, "theta_0", TARGET)
    engine = LayerwiseKernel(module, parameters, x, TARGET.memory)
    return engine.kernel(list(parameters.values()), x, x2)


def by_vmap(problem, x2=None):
    """Theta by per-sample products of the network."""
    left = linearise(problem, "theta_0", TARGET)
    right = None if x2 is None else linearise(on_inputs(problem, x2), "theta_0", TARGET)
    theta = explicit_kernel(left, right, None, averaged=False, independent=True)
    assert not left.notes, "vmap does not do it"
    return theta


def agree(found: torch.Tensor, J: torch.Tensor, J2: torch.Tensor | None = None) -> None:
    theta = J @ (J if J2 is None else J2).T
    torch.testing.assert_close(found, theta, rtol=1e-9, atol=1e-9 * float(theta.abs().max()))


def check(model, inputs, function, call=None, output=None):
    """Check that both ways give the kernel of ``function(model, inputs)``, by an explicit J in float64."""
    problem = from_module(*as_module(model, inputs, call, output), dtype="float64")
    assert problem.name == type(model).__name__
    assert not problem.samples_interact
    J = jacobian(model, lambda model: function(model, double(inputs)))
    for way in (layer_by_layer, by_vmap):
        agree(way(problem), J)
    return problem


# Inputs


@dataclasses.dataclass
class Text:
    """A node of a pytree that is neither a tuple nor a mapping."""

    tokens: torch.Tensor
    features: torch.Tensor


register_dataclass(Text)
Pair = namedtuple("Pair", "tokens features")
BATCH = {"tokens": TOKENS, "features": FEATURES, "mask": MASK}

INPUTS = {
    "tuple": ((TOKENS, FEATURES), lambda m, b: m(*b)),
    "list": ([TOKENS, FEATURES, MASK], lambda m, b: m(*b)),
    "named tuple": (Pair(TOKENS, FEATURES), lambda m, b: m(*b)),
    "dict": (BATCH, lambda m, b: m(**b)),
    "ordered dict": (OrderedDict(BATCH), lambda m, b: m(**b)),
    "constants among them": (BATCH | {"scale": 0.5, "kind": "none"}, lambda m, b: m(**b)),
    "a tensor without axes": (BATCH | {"scale": torch.tensor(0.3)}, lambda m, b: m(**b)),
    "nothing for a mask": ((TOKENS, FEATURES, None), lambda m, b: m(*b)),
    "float32 masks": ((TOKENS, FEATURES, MASK.float()), lambda m, b: m(*b)),
    "narrow tokens": ((TOKENS.int(), FEATURES), lambda m, b: m(*b)),
}


@pytest.mark.parametrize("kind", INPUTS)
def test_several_inputs_are_arguments_of_the_model(kind):
    inputs, function = INPUTS[kind]
    check(seeded(Mixed), inputs, function)


@pytest.mark.parametrize("kind", ["user dict", "attributes", "nested", "registered", "call of a list"])
def test_pytrees_are_passed_unchanged_to_a_call(kind):
    model = seeded(Mixed)
    if kind == "user dict":  # as batches of tokenizers are
        problem = from_module(*as_module(model, UserDict(BATCH)), dtype="float64")
        agree(layer_by_layer(problem), jacobian(model, lambda m: m(**double(BATCH))))
    elif kind == "attributes":
        call = lambda m, b: m(b.tokens, b.features, mask=b["mask"])  # noqa: E731
        problem = from_module(*as_module(model, UserDict(BATCH), call), dtype="float64")
        agree(layer_by_layer(problem), jacobian(model, lambda m: m(**double(BATCH))))
        with pytest.raises(BadInput, match="no 'token'; available: tokens, features, mask"):
            from_module(*as_module(model, BATCH, lambda m, b: m(b.token)))
    elif kind == "nested":
        inputs = {"text": (TOKENS, {"mask": UserDict(at=MASK)}), "features": [FEATURES, None], "scale": 2}
        call = lambda m, b: m(b["text"][0], b["features"][0], b["text"][1]["mask"]["at"], b["scale"])  # noqa: E731
        problem = from_module(*as_module(model, inputs, call), dtype="float64")
        for way in (layer_by_layer, by_vmap):
            agree(way(problem), jacobian(model, lambda m: m(TOKENS, FEATURES.double(), MASK, 2)))
    elif kind == "registered":
        inputs = Text(TOKENS, FEATURES)
        call = lambda m, b: m(b.tokens, b.features)  # noqa: E731
        problem = from_module(*as_module(model, inputs, call), dtype="float64")
        agree(layer_by_layer(problem), jacobian(model, lambda m: m(TOKENS, FEATURES.double())))
    else:
        check(nn.Linear(4, 2), [FEATURES], lambda m, b: m(b[0]), call=lambda m, b: m(b[0]))


def test_a_single_tensor_is_not_wrapped():
    model = seeded(lambda: nn.Linear(4, 3))
    assert as_module(model, FEATURES) == (model, FEATURES)
    assert as_module(model, [FEATURES]) == (model, FEATURES)
    module, x = as_module(model, FEATURES, call=lambda m, x: m(x).exp())
    assert x is FEATURES
    torch.testing.assert_close(module(x), model(x).exp())
    layer = nn.GRU(4, 3, batch_first=True)
    assert wrapped(*as_module(layer, SEQUENCES)).output_shape == (N, 6, 3)


def test_the_model_and_the_inputs_are_copied():
    model, inputs = seeded(Mixed).eval(), {key: t.clone() for key, t in BATCH.items()}
    before = copy.deepcopy(model.state_dict())
    module, x = as_module(model, inputs)
    assert not module.training
    problem = from_module(module, x)
    for t in (*inputs.values(), *model.parameters()):
        t.data.zero_()
    J = jacobian(model, lambda m: m(**double(BATCH)))
    assert not torch.allclose(layer_by_layer(problem), J @ J.T)
    model.load_state_dict(before)
    J = jacobian(model, lambda m: m(**double(BATCH)))
    torch.testing.assert_close(layer_by_layer(problem), J @ J.T, rtol=1e-5, atol=1e-5)
    assert list(dict(model.named_buffers())) == []


def test_submodules_keep_their_own_modes():
    model = nn.ModuleDict({"norm": nn.BatchNorm1d(4), "layer": nn.Linear(4, 2)}).train()
    model["norm"].eval()
    problem = from_module(*as_module(model, FEATURES, call=lambda m, x: m["layer"](m["norm"](x))))
    assert not problem.samples_interact
    model["norm"].train()
    assert from_module(*as_module(model, FEATURES, call=lambda m, x: m["layer"](m["norm"](x)))).samples_interact


# Loaders


class Records(torch.utils.data.Dataset):
    """A dict for each sample."""

    def __len__(self):
        return N

    def __getitem__(self, i):
        return {key: t[i] for key, t in BATCH.items()}


def test_batches_of_a_loader_are_joined():
    check(seeded(Mixed), BATCH, lambda m, b: m(**b))
    module, x = as_module(seeded(Mixed), DataLoader(Records(), batch_size=2))
    assert [len(leaf) for leaf in module.leaves] == [N] * 3
    torch.testing.assert_close(module(x), seeded(Mixed)(**BATCH))
    swapped = [
        {key: BATCH[key][rows] for key in keys} for rows, keys in ((slice(2), BATCH), (slice(2, N), sorted(BATCH)))
    ]
    module, x = as_module(seeded(Mixed), DataLoader(swapped, batch_size=None))
    torch.testing.assert_close(module(x), seeded(Mixed)(**BATCH))


def test_a_loader_of_single_tensors_is_a_tensor():
    model = nn.Linear(4, 3)
    for loader in (DataLoader(FEATURES, batch_size=2), DataLoader(TensorDataset(FEATURES), batch_size=2)):
        module, x = as_module(model, loader)
        assert module is model
        assert torch.equal(x, FEATURES)


def test_labels_of_a_loader_are_left_to_the_call():
    loader = DataLoader(TensorDataset(FEATURES, torch.arange(N)), batch_size=2)
    model = seeded(lambda: nn.Linear(4, 3))
    module, x = as_module(model, loader, call=lambda m, b: m(b[0]))
    torch.testing.assert_close(module(x), model(FEATURES))


def test_both_parameter_sets_see_one_order_of_a_shuffling_loader():
    loader = DataLoader(Records(), batch_size=2, shuffle=True)
    ends = [seeded(Mixed, seed) for seed in range(2)]
    state, python = torch.get_rng_state(), random.getstate()
    module, x = as_module(ends[0], loader)
    assert torch.equal(torch.get_rng_state(), state)
    assert random.getstate() == python
    shuffled = dict(zip(BATCH, module.leaves, strict=True))
    assert sorted(map(tuple, shuffled["tokens"].tolist())) == sorted(map(tuple, TOKENS.tolist()))
    problem = from_module(module, x, alike(module, ends[1]), dtype="float64")
    thetas = [J @ J.T for J in (jacobian(m, lambda m: m(**double(shuffled))) for m in ends)]
    left, right = (linearise(problem, end, TARGET) for end in ("theta_0", "theta_f"))
    found = [explicit_kernel(j, None, None, averaged=False, independent=True) for j in (left, right)]
    for theta, one in zip(thetas, found, strict=True):
        torch.testing.assert_close(one, theta, rtol=1e-9, atol=1e-9)
    alignment = metrics_of(*(theta.numpy() for theta in thetas))["alignment"]
    assert metrics_of(*(theta.numpy() for theta in found))["alignment"] == pytest.approx(alignment)


BATCHES = {
    "other shapes": ([{"a": torch.ones(2, 3)}, {"a": torch.ones(2, 4)}], r"batch 1\['a'\] .*\[N, 3\] of .*\(2, 4\)"),
    "other types": ([torch.ones(2, 3), torch.ones(2, 3).long()], r"batch 1 .*\[N, 3\] of torch.float32"),
    "other constants, of tensors": (
        [(torch.ones(2), torch.tensor(1)), (torch.ones(2), torch.tensor(2))],
        "got tensor.2",
    ),
    "other structure": ([{"a": torch.ones(2, 3)}, {"b": torch.ones(2, 3)}], r"batch 1 .*structure"),
    "other constants": ([(torch.ones(2, 3), "a"), (torch.ones(2, 3), "b")], r"batch 1\[1\] .*'a', got 'b'"),
    "ragged": ([(torch.ones(2, 3), torch.ones(2)), (torch.ones(1, 3), torch.ones(2))], r"batch 1\[0\] has 1, batch 1"),
    "none": ([], "gives no batch"),
}


@pytest.mark.parametrize("kind", BATCHES)
def test_batches_that_do_not_fit_are_refused_with_their_number(kind):
    batches, says = BATCHES[kind]
    with pytest.raises(BadInput, match=says) as caught:
        as_module(seeded(Mixed), DataLoader(batches, batch_size=None))
    assert "\n" not in str(caught.value)


# Outputs


OUTPUTS = {
    "a class": (2, lambda y: y[:, 2]),
    "the last step": (-1, lambda y: y[:, -1]),
    "a class at the last step": ((-1, 1), lambda y: y[:, -1, 1]),
    "a class at all steps": ((..., 1), lambda y: y[..., 1]),
    "some steps": (slice(1, None, 2), lambda y: y[:, 1::2]),
    "some classes": ((-1, [2, 0]), lambda y: y[:, -1][:, [2, 0]]),
    "some classes of some steps": ((slice(2, 4), [2, 0]), lambda y: y[:, 2:4][:, :, [2, 0]]),
    "a function": (lambda y: y.square().sum((1, 2)), lambda y: y.square().sum((1, 2))),
}


@pytest.mark.parametrize("kind", OUTPUTS)
def test_selected_outputs_give_part_of_the_kernel(kind):
    output, chosen = OUTPUTS[kind]
    problem = check(
        seeded(Steps),
        SEQUENCES,
        lambda m, x: chosen(m(x)["logits"]),
        call=lambda m, x: m(x)["logits"],
        output=output,
    )
    assert problem.output_shape == tuple(chosen(torch.ones(N, 6, 3)).shape)


@st.composite
def indices(draw):
    """Sizes of the output axes, and an index for each of the first axes."""
    sizes = draw(st.lists(st.integers(1, 4), min_size=1, max_size=3))
    parts, lists = [], 0
    for size in sizes[: draw(st.integers(1, len(sizes)))]:
        number = st.integers(-size, size - 1)
        kinds = [number, st.just(slice(None)), number.map(lambda i: slice(i, None))]
        kinds += [st.lists(number, min_size=1, max_size=3)] if not lists else []
        parts.append(draw(st.one_of(kinds)))
        lists += isinstance(parts[-1], list)
    return sizes, parts


@given(indices())
def test_an_index_applies_to_each_axis_separately(sizes_and_parts):
    sizes, parts = sizes_and_parts
    outputs = torch.arange(2 * int(np.prod(sizes))).reshape(2, *sizes).double()
    expected = outputs
    for axis, part in reversed(list(enumerate(parts, 1))):
        expected = expected[(slice(None),) * axis + (part,)]
    for output in [tuple(parts), *(parts if len(parts) == 1 else [])]:
        module, x = as_module(nn.Identity(), outputs, output=output)
        found = module(x)
        assert found.shape == expected.shape
        assert torch.equal(found, expected)


WRONG_OUTPUTS = {
    "a class too many": (
        3,
        r"output=3 is out of range for outputs \(5, 3\); the first axis, samples, is not indexed: allowed are -3 to 2$",
    ),
    "from the end": (-4, "output=-4 is out of range"),
    "in a list": ([0, 3], r"output=\[0, 3\] is out of range"),
    "too many axes": ((0, 0), r"output=\(0, 0\) is out of range"),
    "nothing left": (slice(3, None), r"got shape \(5, 0\)"),
}


@pytest.mark.parametrize("kind", WRONG_OUTPUTS)
def test_outputs_out_of_range_are_refused_in_one_line(kind):
    output, says = WRONG_OUTPUTS[kind]
    with pytest.raises(BadInput, match=says) as caught:
        from_module(*as_module(seeded(Mixed), BATCH, output=output))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("output", [True, "logits", 1.5, (), (0, None), [0.5], ([0], [1]), slice(None, None, -1)])
def test_invalid_indices_are_refused(output):
    with pytest.raises(BadInput, match="output must be a whole number, a slice"):
        as_module(seeded(Mixed), BATCH, output=output)


@pytest.mark.parametrize("call", [None, lambda m, x: m(x)])
def test_non_tensor_outputs_are_not_guessed(call):
    inputs = SEQUENCES if call else {"x": SEQUENCES}
    with pytest.raises(BadInput, match=r"got dict with logits, states: .* call=.*\.logits"):
        from_module(*as_module(seeded(Steps), inputs, call))
    with pytest.raises(BadInput, match=r"got dict: .* call="):
        from_module(*as_module(seeded(Steps), SEQUENCES))
    problem = from_module(*as_module(seeded(Steps), inputs, call, output=lambda made: made["logits"]))
    assert problem.output_shape == (N, 6, 3)


@pytest.mark.parametrize("kind", mostly_slow([nn.RNN, nn.LSTM, nn.GRU], 2))
def test_recurrent_layers_are_called_as_specified(kind):
    layer = seeded(lambda: kind(4, 3, batch_first=True))
    problem = check(layer, SEQUENCES, lambda m, x: m(x)[0][:, -1], call=lambda m, x: m(x)[0][:, -1])
    assert problem.output_shape == (N, 3)
    with pytest.raises(BadInput, match="got tuple of 2"):
        from_module(*as_module(layer, SEQUENCES, output=-1))
    with pytest.raises(BadInput, match="needs batch_first=True"):
        as_module(kind(4, 3), DataLoader(SEQUENCES))


# What is refused


def test_a_call_that_uses_the_model_itself_is_refused():
    model = seeded(Mixed)
    for call in (lambda m, b: model(**b), lambda m, b: m.last(model.first(b["features"]))):
        with pytest.raises(BadInput, match="call= or a function in the model uses the model itself"):
            from_module(*as_module(model, BATCH, call))


WRONG = {
    "an array": (
        {"tokens": TOKENS, "features": FEATURES.numpy()},
        r"inputs\['features'\] .*got ndarray: use torch.from",
    ),
    "no tensor": ({"tokens": [1, 2]}, "inputs must hold at least one tensor"),
    "text": ("abc", "inputs must hold at least one tensor"),
    "other lengths": ((TOKENS, FEATURES[:3]), r"inputs\[0\] has 5, inputs\[1\] has 3"),
    "no sample": ((TOKENS[:0], FEATURES[:0]), r"at least one sample.*\(0, 6\)"),
    "sparse": ((TOKENS, FEATURES.to_sparse()), r"inputs\[1\] must be an ordinary dense tensor, got a sparse coo one"),
    "one too few": ((TOKENS,) * 1 + (None,), r"cannot be called on inputs\[0\] \(5, 6\) of torch.int64, in float32"),
}


@pytest.mark.parametrize("kind", WRONG)
def test_inputs_that_do_not_fit_are_refused_in_one_line(kind):
    inputs, says = WRONG[kind]
    with pytest.raises(BadInput, match=says) as caught:
        from_module(*as_module(seeded(Mixed), inputs))
    assert "\n" not in str(caught.value)


def test_invalid_models_and_calls_are_refused():
    with pytest.raises(BadInput, match=r"model must be a torch.nn.Module, got function"):
        as_module(lambda x: x, BATCH)
    with pytest.raises(BadInput, match="call must be a function"):
        as_module(seeded(Mixed), BATCH, call="logits")


# Two sets of inputs


@pytest.mark.parametrize("kind", ["dict", "loader", "user dict"])
def test_a_second_set_of_inputs_gives_the_kernel_between_both(kind):
    model = seeded(Mixed)
    second = {key: BATCH[key].flip(0)[:3] for key in reversed(BATCH)}
    second["features"] = seeded(lambda: torch.randn(3, 4), 1)
    given_as = {"dict": dict, "loader": lambda b: DataLoader([b], batch_size=None), "user dict": UserDict}[kind]
    module, x1, x2 = with_more(*as_module(model, BATCH), given_as(second))
    problem = from_module(module, x1, dtype="float64")
    assert (problem.N, len(x2)) == (N, 3)
    J1, J2 = (jacobian(model, lambda m, b=b: m(**double(b))) for b in (BATCH, second))
    for way in (layer_by_layer, by_vmap):
        agree(way(problem, x2), J1, J2)
        agree(way(problem), J1)


@pytest.mark.parametrize("call", [None, lambda m, x: m(x).tanh()])
def test_a_second_tensor_is_passed_on_unchanged(call):
    model, other = seeded(lambda: nn.Linear(4, 3)), FEATURES.flip(0)[:2]
    module, x1, x2 = with_more(*as_module(model, FEATURES, call), other)
    assert x2 is other
    with pytest.raises(BadInput, match="the second inputs must hold samples like the first"):
        with_more(module, x1, other[:, :3])


SECOND = {
    "another structure": (
        {"tokens": TOKENS, "features": FEATURES},
        "the second inputs must have the structure of the first",
    ),
    "another shape": (
        BATCH | {"tokens": TOKENS[:, :3]},
        r"second inputs\['tokens'\] .*\[N, 6\] of torch.int64, got shape \(5, 3\)",
    ),
    "another type": (BATCH | {"mask": MASK.int()}, r"\['mask'\] .*of torch.bool, got shape .* of torch.int32"),
    "other lengths": (BATCH | {"mask": MASK[:2]}, r"second inputs\['mask'\] has 2"),
    "no mask": (
        BATCH | {"mask": None},
        r"the second inputs\['mask'\] must be like that of the first: a tensor \(5, 6\), got None",
    ),
    "a tensor": (FEATURES, "the second inputs must have the structure of the first"),
}


@pytest.mark.parametrize("kind", SECOND)
def test_a_second_set_that_is_unlike_the_first_is_refused(kind):
    inputs, says = SECOND[kind]
    with pytest.raises(BadInput, match=says) as caught:
        with_more(*as_module(seeded(Mixed), BATCH), inputs)
    assert "\n" not in str(caught.value)


def test_constants_of_a_second_set_must_be_the_same():
    first = with_scale = {"tokens": TOKENS, "features": FEATURES, "scale": torch.tensor(0.5), "kind": "none"}
    module, x = as_module(seeded(Mixed), first)
    assert len(with_more(module, x, dict(with_scale))[2]) == N
    for other in ({"scale": torch.tensor(0.6)}, {"kind": "tanh"}):
        with pytest.raises(BadInput, match=f"second inputs\\['{next(iter(other))}'\\] must be like that of the first"):
            with_more(module, x, first | other)


# Parts of the parameters


def tied() -> nn.Module:
    model = seeded(lambda: nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 2)))
    model[2].weight = model[0].weight
    model[4].bias.requires_grad_(False)
    return model


@pytest.mark.parametrize("called", [False, True])
@pytest.mark.parametrize(
    ("patterns", "names"),
    [
        ("0.weight", {"0.weight"}),
        ("2.weight", {"0.weight"}),  # its other name
        ("*.bias", {"0.bias", "2.bias"}),
        ("2", {"0.weight", "2.bias"}),
        (["4.*", "0.bias"], {"0.bias", "4.weight"}),
        ("*", {"0.weight", "0.bias", "2.bias", "4.weight"}),
    ],
)
def test_selected_parameters_give_their_part_of_the_kernel(patterns, names, called):
    model = tied()
    problem = from_module(*as_module(model, FEATURES, (lambda m, x: m(x)) if called else None), dtype="float64")
    part = restricted(problem, patterns)
    assert {key.removeprefix("model.") if called else key for key in part.theta_0} == names
    J = jacobian(model, lambda m: m(FEATURES.double()), names.__contains__)
    assert J.shape[1] == part.P
    for way in (layer_by_layer, by_vmap):
        agree(way(part), J)


def test_parameters_of_a_recurrent_layer_keep_their_names():
    layer = seeded(lambda: nn.GRU(4, 3, batch_first=True))
    part = restricted(wrapped(*as_module(layer, SEQUENCES), dtype="float64"), "weight_hh*")
    J = jacobian(layer, lambda m: m(SEQUENCES.double())[0], "weight_hh_l0".__eq__)
    for way in (layer_by_layer, by_vmap):
        agree(way(part), J)


def test_groups_of_parameters_add_up_to_the_whole_kernel():
    model = seeded(Mixed)
    problem = from_module(*as_module(model, BATCH), dtype="float64")
    parts = groups(problem, {"table": "table", "biases": "*.bias", "weights": ("first.weight", "last.w*")})
    assert list(parts) == ["table", "biases", "weights"]
    agree(sum(layer_by_layer(part) for part in parts.values()), jacobian(model, lambda m: m(**double(BATCH))))


def test_both_parameter_sets_are_restricted():
    ends = [seeded(Mixed, seed) for seed in range(2)]
    module, x = as_module(ends[0], BATCH)
    part = restricted(from_module(module, x, alike(module, ends[1]), dtype="float64"), "first")
    for end, model in zip(("theta_0", "theta_f"), ends, strict=True):
        J = jacobian(model, lambda m: m(**double(BATCH)), lambda name: name.startswith("first"))
        agree(explicit_kernel(linearise(part, end, TARGET), None, None, averaged=False, independent=True), J)
    assert part.fixed_f["model.last.weight"].shape == (3, 5)


@pytest.mark.parametrize(
    ("patterns", "says"),
    [
        (
            "1.weight",
            r"parameters='1.weight' matches no parameter \(did you mean '\d.weight'\?\); names are 0.weight, 0.bias",
        ),
        ("wieght", r"did you mean '\*\.weight'\?"),
        ("weight", r"did you mean '\*\.weight'\?"),
        ("nothing like it", r"matches no parameter; names are 0.weight"),
        ("4.bias", "parameters='4.bias' matches only frozen parameters"),
        (["0.*", "Linear*"], r"parameters='Linear\*' matches no parameter"),
        ([], "parameters must be a name or a pattern"),
        (3, "parameters must be a name or a pattern"),
        ([0], "parameters must be a name or a pattern"),
    ],
)
def test_names_that_match_no_trainable_parameter_are_refused(patterns, says):
    problem = from_module(tied(), FEATURES)
    with pytest.raises(BadInput, match=says) as caught:
        restricted(problem, patterns)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("patterns", [{}, "*", ["0.*"]])
def test_groups_must_have_names(patterns):
    with pytest.raises(BadInput, match="groups of parameters must be a dict"):
        groups(from_module(tied(), FEATURES), patterns)


# Precision


@pytest.mark.parametrize("half", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("several", [False, True])
def test_models_and_inputs_in_half_precision_are_computed_in_the_requested_precision(half, several):
    model = seeded(Mixed).to(half) if several else seeded(lambda: nn.Linear(4, 3)).to(half)
    inputs = (
        BATCH | {"features": FEATURES.to(half), "scale": torch.tensor(0.3, dtype=half)}
        if several
        else FEATURES.to(half)
    )
    function = (lambda m, b: m(**b)) if several else (lambda m, b: m(b))
    check(model, inputs, function)
    with pytest.raises(BadInput, match="choose the precision to compute in"):
        from_module(*as_module(model, inputs))
    module, x1, x2 = with_more(*as_module(model, inputs), inputs)
    agree(by_vmap(from_module(module, x1, dtype="float64"), x2), jacobian(model, lambda m: function(m, double(inputs))))


def test_complex_parameters_are_refused_with_a_workaround():
    model = nn.Linear(4, 3, dtype=torch.complex64)
    with pytest.raises(BadInput, match=r"complex parameters, such as 'weight'.*torch\.view_as_complex"):
        from_module(*as_module(model, FEATURES, call=lambda m, x: torch.view_as_real(m(x + 0j))))

    class Complex(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 4, 2))

        def forward(self, x):
            return (torch.view_as_complex(self.weight) @ x.to(torch.view_as_complex(self.weight)).T).abs().T

    check(seeded(Complex), FEATURES, lambda m, x: m(x))


# Models of transformers


def bert():
    import transformers

    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = transformers.BertConfig(vocab_size=7, max_position_embeddings=8, num_labels=3, **sizes)
    return transformers.BertForSequenceClassification(config).eval()


def gpt2():
    import transformers

    config = transformers.GPT2Config(vocab_size=7, n_positions=8, n_embd=8, n_layer=1, n_head=2)
    return transformers.GPT2LMHeadModel(config).eval()


@pytest.mark.zoo
@pytest.mark.parametrize("padding", ["none", "some"])
@pytest.mark.parametrize(("make", "output"), [(bert, None), (gpt2, (-1, [0, 2]))])
def test_batches_of_a_tokenizer(make, output, padding):
    transformers = pytest.importorskip("transformers")
    declare_operators()
    model = seeded(make)
    mask = torch.ones(N, 6, dtype=torch.int64)
    if padding == "some":
        mask[1, :2] = mask[3, :4] = 0
    batch = transformers.BatchEncoding({"input_ids": TOKENS, "attention_mask": mask})
    problem = from_module(*as_module(model, batch, lambda m, b: m(**b).logits, output), dtype="float64")
    chosen = (slice(None), *(output or ()))
    J = jacobian(model, lambda m: m(**batch).logits[chosen])
    for way in (layer_by_layer, by_vmap):
        agree(way(problem), J)
