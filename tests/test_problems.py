"""Problems: one network in two backends, the same bits at every load, labels that say what is wrong with them."""

from __future__ import annotations

import copy
import subprocess
import sys
import types

import numpy as np
import pytest

from ntkbench import paths, problems
from ntkbench.data import images
from ntkbench.errors import BadInput, Unavailable
from ntkbench.problem import Problem
from ntkbench.problems import base
from ntkbench.problems.base import Definition, weights

SIZES = {  # N, O, P
    "mlp_hazelden": (50, 64, 64_704),
    "mlp_he": (50, 64, 64_704),
    "gru_hazelden": (15, 50 * 64, 14_592),
    "digits_mlp": (512, 10, 85_002),
    "digits_conv": (256, 10, 19_690),
}


@pytest.fixture
def mnist(monkeypatch):
    """A loader that returns 520 images of noise with MNIST's shapes and types."""
    rng = np.random.default_rng(0)
    data = types.SimpleNamespace(
        data=rng.integers(0, 256, (520, 784)).astype(np.float64),
        target=rng.integers(0, 10, 520).astype(str).astype("O"),
    )
    asked = []
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **kwargs: asked.append((args, kwargs)) or data)
    images.mnist.cache_clear()
    yield asked
    images.mnist.cache_clear()
    problems.load.cache_clear()


def load_or_skip(name: str, load) -> Problem:
    try:
        return load(name)
    except Unavailable as reason:
        pytest.skip(str(reason))


def outputs_in_torch(problem: Problem, end: str, dtype: str) -> np.ndarray:
    import torch

    module = copy.deepcopy(problem.module).to(getattr(torch, dtype))
    module.load_state_dict({key: torch.from_numpy(w) for key, w in problem.weights(end).items()}, strict=False)
    x = torch.from_numpy(problem.x)
    with torch.no_grad():
        return module(x.to(getattr(torch, dtype)) if x.is_floating_point() else x).numpy()


def outputs_in_jax(problem: Problem, end: str, dtype: str) -> np.ndarray:
    import jax
    import jax.numpy as jnp

    with jax.enable_x64(dtype == "float64"):
        weights = {key: jnp.asarray(w, dtype) for key, w in problem.weights(end).items()}
        x = jnp.asarray(problem.x, dtype if np.issubdtype(problem.x.dtype, np.floating) else None)
        return np.asarray(problem.jax_forward(weights, x))


@pytest.mark.parametrize("end", ["theta_0", "theta_f"])
@pytest.mark.parametrize("name", problems.names())
def test_both_backends_compute_the_same_network(name, end, load):
    problem = load_or_skip(name, load)
    if problem.jax_forward is None:
        pytest.skip("no network in JAX")
    for dtype, tolerance in (("float32", 1e-5), ("float64", 1e-11)):
        torch, jax = (f(problem, end, dtype) for f in (outputs_in_torch, outputs_in_jax))
        assert torch.dtype == jax.dtype == dtype
        assert torch.shape == jax.shape == problem.output_shape
        assert np.abs(torch - jax).max() <= tolerance * np.abs(torch).max()


@pytest.mark.parametrize(("name", "sizes"), SIZES.items())
def test_sizes_are_those_stated(name, sizes, load):
    N, O, P = sizes  # noqa: E741 - the field's symbol
    problem = load(name)
    assert (problem.N, problem.O) == (N, O)
    assert problem.n == N * O == {"mlp_hazelden": 3200, "gru_hazelden": 48_000, "digits_mlp": 5120}.get(name, N * O)
    assert problem.P == sum(w.size for w in problem.theta_f.values()) == P
    assert len(problem.x) == N


@pytest.mark.parametrize("name", problems.names())
def test_same_bits_at_every_load_and_none_of_the_users_randomness(name, load):
    import torch

    first = load_or_skip(name, load)
    torch.manual_seed(12345)
    state = torch.get_rng_state()
    problems.load.cache_clear()
    second = problems.load(name)
    assert second is not first
    assert second.digest() == first.digest()
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("name", problems.names())
def test_a_smaller_problem_is_a_cut_of_the_whole(name, load):
    whole = load_or_skip(name, load)
    part = problems.load(f"{name}[N=3]")
    assert part.name == f"{name}[N=3]"
    assert part.N == 3
    np.testing.assert_array_equal(part.x, whole.x[:3])
    for end in ("theta_0", "theta_f"):
        assert list(part.weights(end)) == list(whole.weights(end))
        for key, w in whole.weights(end).items():
            np.testing.assert_array_equal(part.weights(end)[key], w)


@pytest.mark.parametrize("name", problems.names())
def test_samples_interact_as_declared(name, load):
    load_or_skip(name, load)
    problem = problems.load(f"{name}[N=4]")
    together = outputs_in_torch(problem, "theta_0", "float64")
    alone = np.concatenate(
        [
            outputs_in_torch(Problem(name, problem.module, problem.x[i : i + 1], problem.theta_0), "theta_0", "float64")
            for i in range(problem.N)
        ]
    )
    interact = np.abs(together - alone).max() > 1e-9 * np.abs(together).max()
    assert interact == problem.samples_interact


@pytest.mark.parametrize("name", problems.names())
def test_training_moved_the_weights(name, load):
    problem = load_or_skip(name, load)
    for key, w in problem.theta_0.items():
        assert w.dtype == problem.theta_f[key].dtype == np.float32
        assert w.shape == problem.theta_f[key].shape
        assert not np.array_equal(w, problem.theta_f[key])
        assert np.isfinite(problem.theta_f[key]).all()


@pytest.mark.parametrize("name", problems.names())
def test_described_on_one_line_and_found_in_a_file(name):
    assert problems.describe(name).strip()
    assert problems.source_file(f"{name}[N=3]").endswith(".py")


def test_described_before_anything_else_was_asked():
    code = "from ntkbench import problems; print(problems.describe('digits_mlp'))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_mnist_is_unavailable_where_it_cannot_be_fetched():
    problems.load.cache_clear()
    with pytest.raises(Unavailable, match=r"MNIST.*OSError: there is no network in the tests"):
        problems.load("mnist_mlp")


def test_mnist_from_a_loader_that_has_it(mnist):
    problem = problems.load("mnist_mlp[N=5]")
    ((name,), options) = mnist[0]
    assert name == "mnist_784"
    assert options["version"] == 1
    assert options["as_frame"] is False
    assert problem.x.shape == (5, 784)
    assert 0 <= problem.x.min() < problem.x.max() <= 1
    assert (problem.N, problem.O, problem.P) == (5, 10, 269_322)
    torch, jax = (f(problem, "theta_f", "float64") for f in (outputs_in_torch, outputs_in_jax))
    np.testing.assert_allclose(torch, jax, rtol=0, atol=1e-11 * np.abs(torch).max())


@pytest.mark.parametrize(
    ("label", "says"),
    [
        ("digits_mpl", r"unknown problem 'digits_mpl' \(did you mean 'digits_mlp'\?\); allowed: .*gru_hazelden"),
        ("digits_mpl[N=4]", "did you mean 'digits_mlp'"),
        ("zzz", r"unknown problem 'zzz'; allowed: conv_relu, ctrnn_delayed_response, .*digits_conv"),
        ("digits_mlp[M=4]", r"'M=4' is no size of digits_mlp; allowed: N=<positive integer, 512 if not given>"),
        ("gru_hazelden[N=4,H=2]", "'H=2' is no size of gru_hazelden; allowed: N=.*, T="),
        ("digits_mlp[N=0]", "'N=0' is no size"),
        ("digits_mlp[N=-3]", "'N=-3' is no size"),
        ("digits_mlp[N=2.5]", "'N=2.5' is no size"),
        ("digits_mlp[N=]", "'N=' is no size"),
        ("digits_mlp[N]", "'N' is no size"),
        ("digits_mlp[4]", "'4' is no size"),
        ("digits_mlp[N=513]", "N can be at most 512"),
        ("gru_hazelden[T=51]", "T can be at most 50"),
        ("digits_mlp[N=4", "malformed problem"),
        ("digits_mlp N=4", "malformed problem"),
        ("digits_mlp[N=4][N=5]", "malformed problem"),
        ("../digits_mlp", "malformed problem"),
        ("", "malformed problem"),
        ("digits_mlp[N=\N{SUPERSCRIPT TWO}]", "is no size"),
        ("digits_mlp[N=4,N=8]", "N is given twice"),
        (
            "rnn_flipflop[read=states]",
            "'read=states' is no choice of rnn_flipflop; allowed: read=<state or out",
        ),
        ("rnn_flipflop[parameters=]", "allowed: parameters=<all or recurrent or inputs or readout, all if not given>"),
        (
            "rnn_flipflop[H=big]",
            "'H=big' is no size of rnn_flipflop; allowed: N=<positive integer, 20 .*read=<state",
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
        ("digits_mlp[]", "digits_mlp"),
        ("gru_hazelden[T=2,N=3]", "gru_hazelden[N=3,T=2]"),
        ("gru_hazelden[T=2,N=15]", "gru_hazelden[T=2]"),
    ],
)
def test_one_problem_has_one_name(label, name):
    assert problems.load(label).name == name


def test_committed_weights_are_those_that_training_gives():
    definition = base.REGISTRY["digits_mlp"](N=3)
    stored = np.load(weights.committed_file("digits_mlp"))
    theta_0, theta_f = weights.initial_and_trained("digits_mlp", definition)
    trained = weights.train(definition)
    for key in theta_0:
        np.testing.assert_array_equal(stored[f"theta_0/{key}"], theta_0[key])
        np.testing.assert_array_equal(stored[f"theta_f/{key}"], theta_f[key])
        np.testing.assert_allclose(trained[key], theta_f[key], rtol=0, atol=1e-4)


@pytest.fixture
def toy(monkeypatch, tmp_path):
    """A one-layer problem that counts how often it is trained, in a checkout without committed weights."""
    from torch import nn

    monkeypatch.setattr(paths, "REFERENCE", tmp_path / "reference")
    trained = []

    def train(module):
        trained.append(module)
        module.weight.data += 1

    def toy(N: int = 4) -> Definition:
        """A toy."""
        module = nn.Linear(3, 2, bias=False)
        module.weight.data.fill_(0.5)
        return Definition(module, np.ones((N, 3), np.float32), train)

    monkeypatch.setitem(base.REGISTRY, "toy", toy)
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    yield trained
    problems.load.cache_clear()


def test_a_dropped_in_problem_loads_and_trains_once(toy):
    for _ in range(2):
        problem = problems.load("toy[N=2]")
        np.testing.assert_array_equal(problem.theta_f["weight"], problem.theta_0["weight"] + 1)
        assert (problem.N, problem.O, problem.P) == (2, 2, 6)
        assert problem.jax_forward is None
        problems.load.cache_clear()
    assert len(toy) == 1
    assert "toy" in problems.names()


def test_weights_trained_from_other_initial_weights_are_not_used(toy):
    theta_0 = {"weight": np.full((2, 3), 0.25, np.float32)}
    committed = weights.committed_file("toy")
    paths.write_atomically(committed, weights.packed(theta_0, {"weight": theta_0["weight"] + 7}))
    np.testing.assert_array_equal(problems.load("toy").theta_f["weight"], np.full((2, 3), 1.5))
    assert len(toy) == 1


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


@pytest.mark.xfail(strict=True, reason="the digest is of inputs and weights only, and keys references and their cache")
def test_digest_sees_the_network(tiny):
    from torch import nn

    other = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    assert Problem(tiny.name, other, tiny.x, tiny.theta_0, tiny.theta_f).digest() != tiny.digest()
