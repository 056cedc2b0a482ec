"""The deep MLPs of Hazelden (arXiv 2511.10796, section 4): 15 layers of width 64, ReLU after every one."""

from __future__ import annotations

import functools

from ntkbench.problems.base import Definition, problem, training

WIDTH, DEPTH, INPUTS, SAMPLES = 64, 15, 100, 50


@problem
def mlp_hazelden(N: int = SAMPLES) -> Definition:
    """15 ReLU layers of width 64 at PyTorch's default initialisation, state = last layer (paper's MLP; collapsed)."""
    return _deep_relu(N, he=False)


@problem
def mlp_he(N: int = SAMPLES) -> Definition:
    """The same 15 ReLU layers of width 64 with He initialisation, which keeps the signal's scale (not collapsed)."""
    return _deep_relu(N, he=True)


def _deep_relu(N: int, he: bool) -> Definition:
    """Trained by 20 full-batch steps of regressing the state on a fixed random ReLU map of the inputs."""
    import torch
    from torch import nn

    from ntkbench.networks import fully_connected
    from ntkbench.networks.initialisation import scaled_normal

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(SAMPLES, INPUTS)
        module = fully_connected.network([INPUTS, *[WIDTH] * DEPTH], relu_at_end=True)
        module = scaled_normal(module) if he else module
    readout = torch.randn(INPUTS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    targets = torch.relu(x.double() @ readout / INPUTS**0.5)
    recipe = training.Adam(x, targets, nn.functional.mse_loss, batch=SAMPLES, epochs=20)
    forward = functools.partial(fully_connected.forward, relu_at_end=True)
    return Definition(module, x[:N].numpy(), recipe, jax_forward=forward, outputs="states")
