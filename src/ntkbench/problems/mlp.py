"""The deep MLPs of Hazelden (arXiv 2511.10796, section 4): 15 layers of width 64, ReLU after every one."""

from __future__ import annotations

from ntkbench.networks.jax_layers import linear
from ntkbench.problems.base import Definition, problem, training

WIDTH, DEPTH, INPUTS = 64, 15, 100


@problem
def mlp_hazelden(N: int = 50) -> Definition:
    """15 ReLU layers of width 64 at PyTorch's default initialisation, state = last layer (paper's MLP; collapsed)."""
    return _deep_relu(N, he=False)


@problem
def mlp_he(N: int = 50) -> Definition:
    """The same 15 ReLU layers of width 64 with He initialisation, which keeps the signal's scale (not collapsed)."""
    return _deep_relu(N, he=True)


def _deep_relu(N: int, he: bool) -> Definition:
    import torch
    from torch import nn

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(50, INPUTS)
        linears = [nn.Linear(INPUTS if i == 0 else WIDTH, WIDTH) for i in range(DEPTH)]
        if he:
            for linear in linears:
                nn.init.kaiming_normal_(linear.weight, nonlinearity="relu")
                nn.init.zeros_(linear.bias)
        module = nn.Sequential(*(layer for linear in linears for layer in (linear, nn.ReLU())))

    def train(module: nn.Module) -> None:
        """20 full-batch steps of regressing the state on a fixed random ReLU map of the inputs."""
        readout = torch.randn(INPUTS, WIDTH, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
        training.adam(
            module, x, torch.relu(x.double() @ readout / INPUTS**0.5), nn.functional.mse_loss, batch=50, epochs=20
        )

    return Definition(module, x[:N].numpy(), train, jax_forward=_jax_forward)


def _jax_forward(weights, x):
    import jax

    for i in range(DEPTH):
        x = jax.nn.relu(linear(x, weights[f"{2 * i}.weight"], weights[f"{2 * i}.bias"]))
    return x
