"""Networks for images: their sizes, torch against JAX, their kernels in several ways, and rows of a study on them."""

from __future__ import annotations

import dataclasses
import functools
import typing

import numpy as np
import pytest
import torch

from ntkbench.networks import convolutional, fully_connected, mixer, residual, transformer
from ntkbench.networks.architecture import Architecture
from ntkbench.networks.initialisation import scaled_normal, seeded
from ntkbench.options import Target
from ntkbench.studies import novak_images
from ntkbench.studies.base import programs

# neural-tangents is archived and uses deprecated functions.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")

SIDE, OUTPUTS = 32, 3
RESIDUAL = (residual.resnet(18, 2, SIDE), residual.resnet(50, 2, SIDE), residual.wide_resnet(2, SIDE))


def of_patches(layers: int) -> tuple[Architecture, Architecture]:
    return (
        transformer.of_size("ViT", transformer.Size(patch=16, width=8, layers=layers, heads=2, hidden=12), SIDE),
        mixer.of_size("Mixer", mixer.Size(16, width=8, layers=layers, across_tokens=5, across_channels=12), SIDE),
    )


PATCHES, ONE_LAYER = of_patches(2), of_patches(1)
title = pytest.mark.parametrize("architecture", PATCHES, ids=lambda architecture: architecture.title)
shallow = pytest.mark.parametrize("architecture", ONE_LAYER, ids=lambda architecture: architecture.title)
"""For programs that take seconds to compile; :data:`PATCHES` compares the networks themselves."""


@functools.cache
def drawn(architecture) -> tuple[torch.nn.Module, torch.Tensor, dict[str, np.ndarray]]:
    """The network with no parameter left at 0 or 1, two images, and its weights by name, all in float64."""
    network = seeded(lambda: architecture.make(OUTPUTS), 0).double()
    random = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for w in network.parameters():
            w += 0.1 * torch.randn(w.shape, generator=random)
    x = torch.randn(2, 3, SIDE, SIDE, generator=random, dtype=torch.float64)
    return network, x, {name: w.detach().numpy() for name, w in network.named_parameters()}


@functools.cache
def dense(architecture) -> np.ndarray:
    """Theta from a Jacobian by plain autograd."""
    network, x, _ = drawn(architecture)
    theta = list(network.parameters())
    rows = [torch.autograd.grad(f, theta, retain_graph=True) for f in network(x).reshape(-1)]
    J = torch.stack([torch.cat([g.reshape(-1) for g in row]) for row in rows])
    return (J @ J.T).numpy()


def close(found: np.ndarray, expected: np.ndarray) -> None:
    np.testing.assert_allclose(found, expected, rtol=0, atol=1e-10 * abs(expected).max())


@pytest.mark.parametrize(
    ("make", "parameters"),
    [
        (functools.partial(transformer.vision_transformer, "Ti/16"), 5_717_416),
        (functools.partial(transformer.vision_transformer, "S/16"), 22_050_664),
        (functools.partial(transformer.vision_transformer, "B/16"), 86_567_656),
        (functools.partial(mixer.mlp_mixer, "S/32"), 19_104_624),
        (functools.partial(mixer.mlp_mixer, "S/16"), 18_528_264),
        (functools.partial(mixer.mlp_mixer, "B/16"), 59_880_472),
    ],
)
def test_standard_sizes_have_the_parameters_that_timm_counts(make, parameters):
    with torch.device("meta"):
        network = make(side=224).make(1000)
        assert network(torch.empty(2, 3, 224, 224)).shape == (2, 1000)
    assert sum(w.numel() for w in network.parameters()) == parameters


@pytest.mark.parametrize(("setting", "family"), [("transformers", transformer), ("mixers", mixer)])
def test_every_size_is_a_setting_of_the_study(setting, family):
    (names,) = typing.get_args(novak_images.Settings.model_fields[setting].annotation)
    assert set(typing.get_args(names)) == set(family.SIZES)


@pytest.mark.parametrize("architecture", RESIDUAL + PATCHES, ids=lambda architecture: architecture.title)
@pytest.mark.slow
def test_networks_are_the_same_in_jax(architecture):
    import jax

    network, x, weights = drawn(architecture)
    with jax.enable_x64(True):
        close(np.asarray(architecture.forward(weights, x.numpy())), network(x).detach().numpy())


@pytest.mark.parametrize(
    ("network", "forward", "shape"),
    [
        (fully_connected.network([6, 5, 3]), fully_connected.forward, (2, 6)),
        (fully_connected.network([6, 5, 5, 3], flatten=True), fully_connected.forward, (2, 1, 2, 3)),
        (
            fully_connected.network([6, 5, 3], relu_at_end=True),
            functools.partial(fully_connected.forward, relu_at_end=True),
            (2, 6),
        ),
        (
            fully_connected.network([4] * 13),  # names with one and two digits, which sort differently as strings
            fully_connected.forward,
            (2, 4),
        ),
        (
            convolutional.network((2, 4, 5), 3, strides=(1, 2)),
            functools.partial(convolutional.forward, strides=(1, 2)),
            (2, 2, 8, 8),
        ),
        (
            convolutional.network((2, 4, 5), 3, strides=(2, 1), features=5 * 4 * 4),
            functools.partial(convolutional.forward, strides=(2, 1), average=False),
            (2, 2, 8, 8),
        ),
        (
            residual.network(18, 3, 4, channels=1).eval(),
            functools.partial(residual.forward, *residual.RESNETS[18], False),
            (2, 1, 8, 8),
        ),
    ],
)
def test_families_are_the_same_in_jax(network, forward, shape):
    import jax

    network = network.double()
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    weights = {name: w.detach().numpy() for name, w in network.named_parameters()}
    shuffled = {name: weights[name] for name in sorted(weights)}  # as JAX orders a dictionary
    with jax.enable_x64(True):
        close(np.asarray(jax.jit(forward)(shuffled, x.numpy())), network(x).detach().numpy())


@pytest.mark.parametrize(("nonlinearity", "power"), [("relu", 2), ("linear", 1)])
def test_scaled_normal_weights_have_the_variance_stated(nonlinearity, power):
    network = torch.nn.Sequential(torch.nn.Linear(300, 200), torch.nn.Conv2d(8, 60, 3, bias=False))
    assert scaled_normal(network, nonlinearity) is network
    assert not network[0].bias.any()
    assert float(network[0].weight.var() * 300) == pytest.approx(power, rel=0.05)
    assert float(network[1].weight.var() * 72) == pytest.approx(power, rel=0.1)


def test_networks_from_a_seed_do_not_change_torchs_random_state():
    state = torch.get_rng_state()
    first, again, other = (seeded(lambda: torch.nn.Linear(3, 2), seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(first.weight, again.weight) and not torch.equal(first.weight, other.weight)
    assert not first.training


@title
def test_kernels_by_layers_have_a_rule_for_every_matrix(architecture):
    network, x, _ = drawn(architecture)
    target = Target("torch", "float64", "cpu", 2**30)
    kernel, parameters, inputs = programs.engine(network, x.numpy(), target)
    assert not kernel.fallbacks()
    close(kernel.kernel(parameters, inputs).numpy(), dense(architecture))
    ruled = {name for layer in kernel.layers if layer.uses for name in layer.parameters}
    embeddings = {"token", "position"}  # each entry is used at one place: its gradients are the cotangents themselves
    assert {n for n, w in network.named_parameters() if w.ndim > 1} - ruled <= embeddings


@pytest.mark.slow
@shallow
def test_structured_derivatives_of_neural_tangents_give_the_kernel(architecture):
    import jax

    _, x, weights = drawn(architecture)
    with jax.enable_x64(True):
        program = programs.program("nt_structured_derivatives", architecture.forward)
        hurried = {"xla_backend_optimization_level": 0}  # it runs only once
        theta = np.asarray(jax.jit(program, compiler_options=hurried)(weights, x.numpy()))
    close(theta.transpose(0, 2, 1, 3).reshape(2 * OUTPUTS, -1), dense(architecture))


@shallow
@pytest.mark.slow
def test_operations_of_every_program_are_counted(architecture):
    settings = novak_images.Settings(threads=1, samples=2, side=SIDE, limits={"gigaflop": 1e-6})
    rows = novak_images.Case(settings, architecture, OUTPUTS).rows()
    counted = {row["method"]: row for row in rows if row["quantity"] == "flops"}
    assert set(counted) == set(programs.TITLES)
    assert all(row["status"] == "ok" and row["flops"] > 0 for row in counted.values())
    assert counted["jacobian"]["flops"] < counted["nt_jacobian_contraction"]["flops"]
    assert {row["P"] for row in counted.values()} == {sum(w.numel() for w in drawn(architecture)[0].parameters())}
    left = [row for row in rows if row["quantity"] == "seconds"]
    assert len(left) == len(counted) - 1 and {row["status"] for row in left} == {"skipped"}


def test_a_program_that_cannot_be_built_is_a_row_with_the_reason():
    def broken(weights, x):
        raise NotImplementedError("no rule for it")

    settings = novak_images.Settings(threads=1, side=SIDE, limits={"gigaflop": 1e-6})
    rows = novak_images.Case(settings, dataclasses.replace(ONE_LAYER[1], forward=broken), 1).rows()
    ends = {row["method"]: (row["status"], row["reason"]) for row in rows if row["quantity"] == "flops"}
    assert ends.pop("structured_derivatives") == ("ok", "")
    assert set(ends.values()) == {("failed", "NotImplementedError: no rule for it")}
