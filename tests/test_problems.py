"""Problems: one network in two backends, the same bits at every load, and errors for bad labels."""

from __future__ import annotations

import copy
import dataclasses
import functools
import subprocess
import sys
from dataclasses import dataclass, field, replace

import numpy as np
import pytest
import torch

import ntkbench
from ntkbench import paths, problems, testing
from ntkbench.data import images, tasks, text
from ntkbench.errors import BadInput, Corrupt, DidNotTrain, Unavailable
from ntkbench.modules import copied
from ntkbench.modules import load as load_values
from ntkbench.networks import recurrent
from ntkbench.problem import Problem
from ntkbench.problems import base
from ntkbench.problems.base import Definition, reference, storage, training, weights
from ntkbench.problems.base.calls import as_module

SIZES = {  # N, O, P
    "mlp_hazelden": (50, 64, 64_704),
    "mlp_he": (50, 64, 64_704),
    "gru_hazelden": (15, 50 * 64, 14_592),
    "digits_mlp": (512, 10, 85_002),
    "digits_conv": (256, 10, 19_690),
}


REDUCED = {
    **{name: f"{name}[N=4,T=8,V=50,d=128,L=2]" for name in ("gpt2_small", "gpt2_410m")},
    "transformer_small": "transformer_small[N=4]",
    "resnet18": "resnet18[width=16]",
}
"""Sizes for the tests, where a problem is too large or has fewer than three samples."""


@pytest.mark.parametrize("name", problems.names())
@pytest.mark.slow
def test_problems_keep_their_contract(name):
    try:
        testing.check_problem(REDUCED.get(name, name))
    except Unavailable as reason:
        pytest.skip(str(reason))


@pytest.mark.parametrize(("name", "sizes"), SIZES.items())
def test_sizes_are_those_stated(name, sizes, load):
    N, O, P = sizes  # noqa: E741 - the field's symbol
    problem = load(name)
    assert (problem.N, problem.O) == (N, O)
    assert problem.n == N * O == {"mlp_hazelden": 3200, "gru_hazelden": 48_000, "digits_mlp": 5120}.get(name, N * O)
    assert problem.P == sum(w.size for w in problem.theta_f.values()) == P
    assert len(problem.x) == N


def trained(label: str) -> torch.nn.Module:
    """The network of a problem at its trained weights; skips where its data are missing."""
    try:
        problem = problems.load(label)
    except Unavailable as reason:
        pytest.skip(str(reason))
    return load_values(copied(problem.network), {**problem.weights("theta_f"), **problem.fixed("theta_f")}).eval()


@pytest.mark.slow
def test_the_small_transformer_has_the_stated_loss():
    network = trained("transformer_small")
    tokens, following = (torch.from_numpy(pieces) for pieces in text.windows(text.characters()[1], 64))
    with torch.no_grad():
        loss = training.next_token(network(tokens[:400]), following[:400])
    assert float(loss) == pytest.approx(2.1, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize(("label", "stated"), [("vit_cifar", 0.45), ("resnet18_cifar", 0.41)])
def test_networks_on_images_have_the_stated_accuracy(label, stated):
    network = trained(label)
    pixels, labels = (torch.from_numpy(array) for array in images.cifar10("test"))
    with torch.no_grad():
        chosen = torch.cat([network(some).argmax(1) for some in pixels.split(200)])
    assert float((chosen == labels).double().mean()) == pytest.approx(stated, abs=0.006)


def test_describe_works_in_a_fresh_process():
    code = "from ntkbench import problems; print(problems.describe('digits_mlp'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("digits_mpl", r"unknown problem 'digits_mpl' \(did you mean 'digits_mlp'\?\); allowed: .*gru_hazelden"),
        ("digits_mpl[N=4]", "did you mean 'digits_mlp'"),
        ("zzz", r"unknown problem 'zzz'; allowed: conv_relu, ctrnn_delayed_response, .*digits_conv"),
        ("digits_mlp[M=4]", r"'M=4' is not a size of digits_mlp; allowed: N=<positive integer, 512 if not given>"),
        ("gru_hazelden[N=4,H=2]", "'H=2' is not a size of gru_hazelden; allowed: N=.*, T="),
        ("digits_mlp[N=0]", "'N=0' is not a size"),
        ("digits_mlp[N=-3]", "'N=-3' is not a size"),
        ("digits_mlp[N=2.5]", "'N=2.5' is not a size"),
        ("digits_mlp[N=]", "'N=' is not a size"),
        ("digits_mlp[N]", "'N' is not a size"),
        ("digits_mlp[]", "'' is not a size"),
        ("digits_mlp[4]", "'4' is not a size"),
        ("digits_mlp[N=513]", "N can be at most 512"),
        ("gru_hazelden[T=51]", "T can be at most 50"),
        ("digits_mlp[N=4", "malformed problem"),
        ("digits_mlp N=4", "malformed problem"),
        ("digits_mlp[N=4][N=5]", "malformed problem"),
        ("../digits_mlp", "malformed problem"),
        ("", "malformed problem"),
        ("digits_mlp[N=\N{SUPERSCRIPT TWO}]", "is not a size"),
        ("digits_mlp[N=4,N=8]", "N is given twice"),
        (
            "rnn_flipflop[read=states]",
            "'read=states' is not a choice of rnn_flipflop; allowed: read=<state or out",
        ),
        ("rnn_flipflop[parameters=]", "allowed: parameters=<all or recurrent or inputs or readout, all if not given>"),
        (
            "rnn_flipflop[H=big]",
            "'H=big' is not a size of rnn_flipflop; allowed: N=<positive integer, 20 .*read=<state",
        ),
    ],
)
def test_bad_labels_are_refused(label, says):
    with pytest.raises(BadInput, match=says):
        problems.check(label)
    with pytest.raises(BadInput, match=says):
        problems.load(label)


@pytest.mark.parametrize(
    ("label", "name"),
    [
        (" digits_mlp[ N = 4 ] ", "digits_mlp[N=4]"),
        ("digits_mlp[N=512]", "digits_mlp"),
        ("gru_hazelden[T=2,N=3]", "gru_hazelden[N=3,T=2]"),
        ("gru_hazelden[T=2,N=15]", "gru_hazelden[T=2]"),
    ],
)
def test_one_problem_has_one_name(label, name):
    assert problems.load(label).name == name


def test_committed_weights_are_those_that_training_gives():
    definition = problems.define("digits_mlp[N=3]")
    stored = storage.read(weights.committed_file("digits_mlp"))
    theta_0, theta_f = weights.initial_and_trained("digits_mlp", definition)
    trained = weights.train("digits_mlp", definition)
    for key in theta_0:
        np.testing.assert_array_equal(stored[f"theta_0/{key}"], theta_0[key])
        np.testing.assert_array_equal(stored[f"theta_f/{key}"], theta_f[key])
        np.testing.assert_allclose(trained[key], theta_f[key], rtol=0, atol=1e-4)


@pytest.mark.parametrize("name", sorted(path.stem for path in (paths.REFERENCE / "weights").glob("*.npz")))
def test_committed_weights_match_todays_networks_data_and_recipes(name):
    stored = storage.read(weights.committed_file(name))
    try:
        definition = problems.define(name)
    except Unavailable as reason:
        pytest.skip(str(reason))
    assert str(stored["recipe"]) == str(definition.training)
    assert str(stored["origin"]) == weights.origin(name, definition)


@dataclass(frozen=True, eq=False)
class Shift(training.Training):
    """Adds a number to all weights and counts its runs; has data and a loss."""

    by: float = 1.0
    data: float = field(default=0.0, repr=False)
    scale: float = field(default=1.0, repr=False)
    runs: list = field(default_factory=list, repr=False)

    def train(self, module):
        self.runs.append(module)
        for w in module.parameters():
            w.data += self.by

    def arrays(self):
        return {"data": np.array([self.data])}

    def objective(self, module):
        return self.scale * (module(module.weight.new_ones(2, 3)) ** 2).sum()


class Toy:
    """A one-layer problem with exchangeable parts, in a checkout without committed weights."""

    def __init__(self):
        self.training, self.start, self.N, self.wrap = Shift(), 0.5, 4, lambda layer: layer

    def define(self, N: int = 4) -> Definition:
        """A toy."""
        from torch import nn

        layer = nn.Linear(3, 2, bias=False)
        layer.weight.data.fill_(self.start)
        return Definition(self.wrap(layer), np.ones((N, 3), np.float32), self.training)

    def load(self, label: str = "toy") -> Problem:
        problems.load.cache_clear()
        return problems.load(label)

    @property
    def runs(self) -> int:
        return len(self.training.runs)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    toy = Toy()
    monkeypatch.setitem(base.REGISTRY, "toy", toy.define)
    yield toy
    problems.load.cache_clear()


def test_a_dropped_in_problem_loads_and_trains_once(toy):
    for _ in range(2):
        problem = toy.load("toy[N=2]")
        np.testing.assert_array_equal(problem.theta_f["weight"], problem.theta_0["weight"] + 1)
        assert (problem.N, problem.O, problem.P) == (2, 2, 6)
        assert problem.jax_forward is None
        assert problem.recipe == "Shift(by=1.0)"
    assert toy.runs == 1
    assert "toy" in problems.names()


@pytest.mark.parametrize(
    "change",
    [
        {"training": Shift(by=2.0)},
        {"training": Shift(data=1.0)},
        {"training": Shift(scale=2.0)},  # the loss's code, which no printed field shows
        {"start": 0.25},
        {"wrap": lambda layer: _Doubled(layer)},  # the network's code, at the same weights
    ],
    ids=lambda change: str(next(iter(change))),
)
def test_weights_of_another_recipe_data_loss_start_or_network_are_not_used(toy, change):
    """Neither committed nor cached ones. The earlier ones are used again once the change is undone."""
    first = toy.load()
    storage.write(
        weights.committed_file("toy"),
        weights.packed(toy.define(), weights.origin("toy", toy.define()), first.theta_f),
    )
    before = vars(toy) | {"training": Shift()}
    vars(toy).update(change)
    toy.training.runs.clear()
    changed = [toy.load(), toy.load()]
    assert toy.runs == 1
    expected = changed[0].theta_0["weight"] + toy.training.by
    for problem in changed:
        np.testing.assert_array_equal(problem.theta_f["weight"], expected)
    vars(toy).update(before)
    np.testing.assert_array_equal(toy.load().theta_f["weight"], first.theta_f["weight"])
    assert toy.runs == 0


def test_last_bits_of_data_do_not_change_the_origin(toy):
    """They differ from machine to machine where data are computed."""
    origins = []
    for data in (1.0, 1.0 + 2e-15, 1.0 + 1e-6):
        toy.training = Shift(data=data)
        origins.append(weights.origin("toy", toy.define()))
    assert origins[0] == origins[1] != origins[2]


def _Doubled(layer):
    from torch import nn

    class Doubled(nn.Linear):
        def forward(self, x):
            return 2 * super().forward(x)

    layer.__class__ = Doubled
    return layer


def test_a_problem_may_have_several_inputs(toy, monkeypatch):
    """It is trained and reduced by sample indices, and every entry of its inputs is part of its identity."""
    numbers = torch.Generator().manual_seed(0)
    tokens, features = torch.randint(0, 5, (6, 3), generator=numbers), torch.randn(6, 4, generator=numbers)

    class Both(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.table, self.layer = torch.nn.Embedding(5, 4), torch.nn.Linear(4, 2)

        def forward(self, tokens, features):
            return {"logits": self.layer(self.table(tokens).mean(1) * features)}

    def several(N: int = 6) -> Definition:
        """Tokens and features."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(1)
            model = Both()
        batch = {"tokens": tokens, "features": features}
        module, x = as_module(model, batch, lambda m, b: m(**b)["logits"])
        recipe = training.Adam(x, torch.ones(6, 2).double(), torch.nn.functional.mse_loss, batch=4, epochs=2)
        return Definition(module, x[:N].numpy(), recipe)

    monkeypatch.setitem(base.REGISTRY, "toy", several)
    first = toy.load("toy[N=5]")
    assert (first.N, first.O) == (5, 2)
    for which in ("theta_0", "theta_f"):
        model = Both().double()
        found = {key.removeprefix("model."): torch.from_numpy(w) for key, w in first.weights(which).items()}
        model.load_state_dict(found)
        outputs = model(tokens, features.double())["logits"][:5].flatten()
        rows = [torch.autograd.grad(f, list(model.parameters()), retain_graph=True) for f in outputs]
        J = torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])
        kernel = ntkbench.Kernel(model, (tokens[:5], features[:5]), call=lambda m, b: m(*b)["logits"], dtype="float64")
        torch.testing.assert_close(kernel.ntk(), J @ J.T)
        exact = reference.exact(dataclasses.replace(first, theta_0=first.weights(which), theta_f=None))
        assert exact["trace"] == pytest.approx(float(J.square().sum()), rel=1e-9)
    origins = {first.digest(), weights.origin("toy", several())}
    features[5, 3] += 1  # of a sample that neither a check of two samples nor a problem of five uses
    tokens[4, 0] = (tokens[4, 0] + 1) % 5
    changed = toy.load("toy[N=5]")
    assert origins.isdisjoint({changed.digest(), weights.origin("toy", several())})


def test_only_weights_of_the_default_sizes_are_committed(toy, monkeypatch):
    def any_size(N: int = 4, T: int = 3) -> Definition:
        """A toy whose training depends on a size that its initial weights do not show."""
        return dataclasses.replace(toy.define(N), training=Shift(by=float(T)))

    monkeypatch.setitem(base.REGISTRY, "toy", base.problem(any_size, any_size=True))
    reference.commit(["toy[N=1]"])
    committed = weights.committed_file("toy").read_bytes()
    assert toy.load().theta_f["weight"][0, 0] == 3.5
    assert toy.load("toy[T=7]").theta_f["weight"][0, 0] == 7.5
    reference.commit(["toy[T=7]"])
    assert weights.committed_file("toy").read_bytes() == committed
    assert toy.load("toy[T=7]").theta_f["weight"][0, 0] == 7.5, "the cache mixes recipes up"
    assert toy.load().theta_f["weight"][0, 0] == 3.5


def test_a_damaged_cache_of_weights_is_recreated(toy, tmp_path, caplog):
    toy.load()
    (file,) = (tmp_path / "cache" / "weights").iterdir()
    whole = file.read_bytes()
    file.write_bytes(whole[:-10])
    assert toy.load().theta_f["weight"][0, 0] == 1.5
    assert toy.runs == 2
    assert file.read_bytes() == whole
    assert [record.getMessage().partition(":")[0] for record in caplog.records] == [f"{file} is damaged"]


def test_damaged_committed_weights_are_an_error_and_never_replaced(toy):
    paths.write_atomically(weights.committed_file("toy"), b"PK")
    with pytest.raises(Corrupt, match=r"reference/weights/toy\.npz is damaged: .*; restore the committed file"):
        toy.load()
    assert toy.runs == 0


@dataclass(frozen=True, eq=False)
class Failing(Shift):
    """A recipe that fails in one of several ways."""

    how: str = "raises"

    def train(self, module):
        if self.how == "raises":
            raise RuntimeError("no such optimiser\nat line 3")
        module.weight.data[0, 0] = float("nan")

    def objective(self, module):
        if self.how == "has no loss":
            raise ValueError("shapes do not match")
        return super().objective(module)


@pytest.mark.parametrize(
    ("how", "says"),
    [
        ("raises", "toy: training failed: RuntimeError: no such optimiser"),
        ("diverges", r"toy: training gave weights that are not finite \(weight\)"),
        ("has no loss", "toy: the training loss cannot be computed: ValueError: shapes do not match"),
    ],
)
def test_failed_training_is_one_line_and_leaves_no_file(toy, tmp_path, how, says):
    toy.training = Failing(how=how)
    with pytest.raises(DidNotTrain, match=f"^{says}$"):
        toy.load()
    assert not [path for path in tmp_path.rglob("*") if path.is_file()]


def test_a_recipe_that_cannot_be_recorded_is_refused(toy):
    toy.training = lambda module: None
    with pytest.raises(BadInput, match=r"recipe that can be recorded, such as .*Adam.*got <function"):
        toy.load()


def test_recipes_record_everything_that_they_use():
    """Every field of a recipe is in its ``repr`` or in its arrays."""

    x = torch.ones(4, 2)
    adam = training.Adam(x, x[:, :1], torch.nn.functional.mse_loss, batch=2, epochs=3)
    assert str(adam) == "Adam(loss=mse_loss, batch=2, epochs=3, lr=0.001, seed=0)"
    assert list(adam.arrays()) == ["x", "y"]
    task = training.OnTask("flipflop", (4, 12), trials=3)
    assert str(task) == (
        "OnTask(task='flipflop', lengths=(4, 12), trials=3, loss=0.1, steps=2000, learning_rate=0.005, clip=1.0, "
        "seed=1)"
    )
    assert {name: array.shape for name, array in task.arrays().items() if "inputs" in name} == {
        "inputs[T=4]": (3, 4, 3),
        "inputs[T=12]": (3, 12, 3),
    }
    given = training.Given("somebody", {"weight": np.ones((1, 2), np.float32)})
    assert str(given) == f"Given(source='somebody', digest='{given.digest}')" and list(given.arrays()) == ["weight"]
    for recipe in (adam, task):
        shown = {f.name for f in dataclasses.fields(recipe) if f.repr}
        assert {f.name for f in dataclasses.fields(recipe)} == shown | ({"x", "y"} if recipe is adam else set())


@pytest.mark.parametrize("change", [{"lr": 2e-3}, {"batch": 3}, {"epochs": 2}, {"seed": 1}])
def test_every_setting_of_adam_is_used(change):
    """Changing a setting changes both the recipe's text and the trained weights."""

    def trained(**settings):
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(0)
            x, y, module = torch.randn(6, 2), torch.randn(6, 1).double(), torch.nn.Linear(2, 1)
        recipe = training.Adam(x, y, torch.nn.functional.mse_loss, **{"batch": 2, "epochs": 1} | settings)
        recipe.train(module)
        assert module.weight.dtype == torch.float32
        return str(recipe), module.weight.detach()

    (first, w), (other, v) = trained(), trained(**change)
    assert first != other
    assert not torch.equal(w, v)
    assert torch.equal(w, trained()[1])


@functools.cache
def trained_on_a_task(**settings):
    """A recipe of a small recurrent network as text, and the weights after training."""
    module = recurrent.initialised("rnn", tasks.channels("match_to_sample"), 12)
    recipe = training.OnTask("match_to_sample", (5,), **{"trials": 16, "loss": 0.3} | settings)
    recipe.train(module)
    return str(recipe), module.weight_hh.detach()


@pytest.mark.parametrize("change", [{"loss": 0.2}, {"learning_rate": 1e-2}, {"clip": 1e-3}, {"seed": 2}, {"trials": 9}])
def test_every_setting_of_training_on_a_task_is_used(change):
    (first, w), (other, v) = trained_on_a_task(), trained_on_a_task(**change)
    assert first != other
    assert not torch.equal(w, v)


def test_alignment_needs_trained_weights(tiny):
    with pytest.raises(BadInput, match="tanh_net has no theta_f"):
        Problem(tiny.name, tiny.module, tiny.x, tiny.theta_0).weights("theta_f")


def test_digest_sees_every_bit_of_inputs_and_weights(tiny):
    def changed(array):
        other = array.copy()
        other.flat[-1] = np.nextafter(other.flat[-1], np.float32(9))
        return other

    key = list(tiny.theta_0)[-1]
    others = [
        Problem(tiny.name, tiny.module, changed(tiny.x), tiny.theta_0, tiny.theta_f),
        Problem(tiny.name, tiny.module, tiny.x, {**tiny.theta_0, key: changed(tiny.theta_0[key])}, tiny.theta_f),
        Problem(tiny.name, tiny.module, tiny.x, tiny.theta_0, {**tiny.theta_f, key: changed(tiny.theta_f[key])}),
        Problem(tiny.name, tiny.module, tiny.x, tiny.theta_0),
    ]
    assert len({problem.digest() for problem in [tiny, *others]}) == 5


def test_digest_sees_the_network_and_the_recipe(tiny):
    from torch import nn

    class Detached(nn.Sequential):
        """The same outputs with another Jacobian."""

        def forward(self, x):
            hidden = self[1](self[0](x))
            return self[2](hidden) + (hidden - hidden.detach()).sum(1, keepdim=True)

    linears = tiny.module[0], tiny.module[2]
    others = [
        replace(tiny, module=nn.Sequential(linears[0], nn.ReLU(), linears[1])),
        replace(tiny, module=nn.Sequential(linears[0], nn.Hardtanh(-2, 2), linears[1])),
        replace(tiny, module=Detached(*tiny.module)),
        replace(tiny, recipe="Adam(epochs=5)"),
        replace(tiny, recipe="Adam(epochs=1)"),
    ]
    assert len({problem.digest() for problem in [tiny, *others]}) == 6


def test_digest_sees_a_change_that_acts_on_the_last_sample_only(tiny):
    from torch import nn

    class Scaled(nn.Module):
        def __init__(self, network, factor):
            super().__init__()
            self.network, self.factor = network, [factor]

        def forward(self, x):
            y = self.network(x)
            return torch.where((x == last).all(1, keepdim=True), self.factor[0] * y, y)

    x = np.random.default_rng(0).standard_normal((150, *tiny.x.shape[1:])).astype(tiny.x.dtype)
    last = torch.from_numpy(x[-1]).double()
    theta = {f"network.{key}": w for key, w in tiny.theta_0.items()}
    one, same, other = (
        Problem("scaled", Scaled(copy.deepcopy(tiny.module), factor), x, theta) for factor in (1.0, 1.0, 2.0)
    )
    assert one.digest() == same.digest() != other.digest()
    assert {key for key, value in one.identity().items() if other.identity()[key] != value} == {"network"}
    two = [replace(each, x=x[:2]) for each in (one, other)]
    assert two[0].digest() == two[1].digest()  # the function of these samples is the same


def test_digest_depends_on_the_function_of_a_network_and_not_on_its_code(tiny):
    from torch import nn

    class Rewritten(nn.Sequential):
        def forward(self, x):
            first, _, last = self
            return (2 * (2 * (x @ first.weight.T + first.bias)).sigmoid() - 1) @ last.weight.T + last.bias

    assert replace(tiny, module=Rewritten(*tiny.module)).digest() == tiny.digest()


def test_digest_changes_neither_the_module_nor_torchs_randomness(tiny):

    weights = {key: w.clone() for key, w in tiny.module.state_dict().items()}
    state = torch.get_rng_state()
    assert tiny.digest() == tiny.digest()
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(w, weights[key]) for key, w in tiny.module.state_dict().items())
    assert all(w.grad is None for w in tiny.module.parameters())


def test_digest_sees_buffers_and_frozen_parameters(tiny):
    from torch import nn

    def problem(mean: float, fixed: float | None = None) -> Problem:
        module = nn.Sequential(copy.deepcopy(tiny.module[0]), nn.BatchNorm1d(4), copy.deepcopy(tiny.module[2])).eval()
        module[1].running_mean.fill_(mean)
        module[1].weight.requires_grad_(False)
        frozen = {} if fixed is None else {"1.weight": np.full(4, fixed, np.float32)}
        theta = {key: w.detach().numpy() for key, w in module.named_parameters() if w.requires_grad}
        return Problem("normed", module, tiny.x, theta, fixed_0=frozen)

    digests = [problem(*args).digest() for args in ((0.0,), (0.1,), (0.0, 2.0), (0.1, 2.0))]
    assert len(set(digests)) == 4
