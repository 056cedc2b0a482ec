"""ResNets for CIFAR-10 with given weights: torch against JAX, statistics at each end, accuracy."""

from __future__ import annotations

import functools

import numpy as np
import pytest
import torch

from ntkbench import problems, testing
from ntkbench.data import images, pretrained
from ntkbench.errors import DidNotTrain, Unavailable
from ntkbench.networks import cifar_residual
from ntkbench.networks.initialisation import seeded
from ntkbench.problem import split
from ntkbench.problems import base
from ntkbench.problems.base import Definition, reference, training, weights


@functools.cache
def drawn() -> torch.nn.Module:
    """ResNet-8 with no parameter or statistic left at 0 or 1, in float64."""
    network = seeded(lambda: cifar_residual.ResNet(8), 0).double()
    random = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for w in (*network.parameters(), *(b for b in network.buffers() if b.is_floating_point())):
            w += 0.1 * torch.rand(w.shape, generator=random, dtype=w.dtype)
    return network


def arrays(network):
    return {key: w.detach().numpy() for key, w in network.state_dict().items() if w.is_floating_point()}


def test_values_and_gradients_are_the_same_in_jax():
    import jax
    import jax.numpy as jnp

    network, forward = drawn(), cifar_residual.jax_forward(8)
    x = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    outputs, theta = network(x), dict(network.named_parameters())
    v = torch.tensor([[1.0, -2, 3, 0, 1, 1, 2, -1, 1, 5], [2.0, 1, 1, -3, 1, 0, 1, 2, -1, 1]], dtype=torch.float64)
    gradients = torch.autograd.grad((v * outputs).sum(), list(theta.values()))
    with jax.enable_x64(True):
        values = {key: jnp.asarray(w) for key, w in arrays(network).items()}

        def projected(w):
            outputs = forward({**values, **w}, jnp.asarray(x.numpy()))
            return (jnp.asarray(v.numpy()) * outputs).sum(), outputs

        twin = jax.jit(jax.value_and_grad(projected, has_aux=True))
        (_, found), pulled = twin({key: values[key] for key in theta})
    np.testing.assert_allclose(found, outputs.detach(), rtol=0, atol=1e-11 * float(outputs.abs().max()))
    for name, gradient in zip(theta, gradients, strict=True):
        np.testing.assert_allclose(pulled[name], gradient, rtol=0, atol=1e-11 * float(gradient.abs().max()))


def test_shortcuts_stride_and_pad_with_zeros():
    block = cifar_residual.Block(2, 4).eval()
    torch.nn.init.zeros_(block.bn2.weight)  # leaves only the shortcut
    x = torch.rand(1, 2, 4, 4)
    found = block(x)[0]
    assert not found[[0, 3]].any() and torch.equal(found[1:3], x[0, :, ::2, ::2])


@pytest.mark.parametrize(("depth", "parameters"), [(20, 269_722), (56, 853_018)])
def test_depths_have_the_expected_number_of_parameters(depth, parameters):
    with torch.device("meta"):
        assert sum(w.numel() for w in cifar_residual.ResNet(depth).parameters()) == parameters


@pytest.fixture
def small(monkeypatch, tmp_path):
    """A problem with given weights and statistics."""
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    given = {key: w.astype(np.float32) for key, w in arrays(drawn()).items()}

    def small(N: int = 3) -> Definition:
        """ResNet-8 with given weights."""
        module = seeded(lambda: cifar_residual.ResNet(8), 0)
        x = np.random.default_rng(0).standard_normal((3, 3, 32, 32)).astype(np.float32)
        return Definition(module, x[:N], training.Given("somebody", given), cifar_residual.jax_forward(8))

    monkeypatch.setitem(base.REGISTRY, "small", small)
    yield given
    problems.load.cache_clear()


def test_given_weights_and_statistics_are_those_of_theta_f(small, tmp_path):
    problem = problems.load("small[N=1]")
    start = seeded(lambda: cifar_residual.ResNet(8), 0)
    for end, expected in (("theta_0", arrays(start)), ("theta_f", small)):
        found = {**problem.weights(end), **problem.fixed(end)}
        assert found.keys() == expected.keys()
        for key, w in expected.items():
            np.testing.assert_array_equal(found[key], w)
        assert all(key.endswith(("running_mean", "running_var")) for key in problem.fixed(end))
    x = torch.from_numpy(problem.x).double()
    outputs = testing.outputs_in_torch(problem, "theta_f", "float64")
    np.testing.assert_allclose(outputs, drawn()(x).detach(), rtol=1e-5, atol=1e-5 * np.abs(outputs).max())
    in_jax = testing.outputs_in_jax(problem, "theta_f", "float64")
    np.testing.assert_allclose(in_jax, outputs, rtol=0, atol=1e-11 * np.abs(outputs).max())
    assert not list((tmp_path / "cache").rglob("*.npz")), "others' weights are copied"


def test_exact_values_use_the_statistics_of_each_end(small):
    problem = problems.load("small[N=1]")
    J, J_f = (testing.explicit_jacobian(problem, end) for end in ("theta_0", "theta_f"))
    found = reference.compute(problem)["metrics"]
    for metric, value in testing.metrics_of(J @ J.T, J_f @ J_f.T).items():
        assert found[metric] == pytest.approx(value, rel=1e-8)
    bare = problems.define("small").module
    assert split(bare, {"bn1.running_mean": np.zeros(16)}) == ({}, {"bn1.running_mean": pytest.approx(np.zeros(16))})


def test_given_weights_are_never_committed(small, monkeypatch, tmp_path):
    monkeypatch.setattr("ntkbench.paths.REFERENCE", tmp_path / "reference")
    reference.commit(["small[N=1]"])
    assert [path.name for path in tmp_path.rglob("reference/**/*") if path.is_file()] == ["small[N=1].json"]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda w: w.pop("conv1.weight"), r"'conv1.weight' is missing there and \(16, 3, 3, 3\) here"),
        (lambda w: w.update(more=np.zeros(2)), r"'more' is \(2,\) there and missing here"),
        (lambda w: w.update({"linear.bias": np.zeros(3)}), r"'linear.bias' is \(3,\) there and \(10,\) here"),
    ],
)
def test_weights_of_another_network_are_refused_in_one_line(change, says):
    given = arrays(drawn())
    change(given)
    definition = Definition(cifar_residual.ResNet(8), np.zeros(1), training.Given("somebody", given))
    with pytest.raises(DidNotTrain, match=f"net: the weights of somebody are not this network's: {says}"):
        weights.train("net", definition)


def test_given_weights_with_another_bit_are_another_recipe():
    one, other = (training.Given("somebody", {"w": np.array([1.0, end])}) for end in (2.0, 2.0 + 1e-15))
    assert str(one) != str(other)


@pytest.mark.parametrize(("depth", "share"), [(20, 0.813), (56, 0.831)])
def test_pretrained_networks_have_their_stated_accuracy(depth, share):
    try:
        values, (x, y) = pretrained.resnet(depth), images.cifar10("test")
    except Unavailable as reason:
        pytest.skip(str(reason))
    network = cifar_residual.ResNet(depth)
    training.Given("akamaster", values).train(network)
    with torch.no_grad():
        right = network(torch.from_numpy(x[:200])).argmax(1).numpy() == y[:200]
    assert abs(right.mean() - share) < 3 * (share * (1 - share) / 200) ** 0.5
