"""The GRU of Hazelden (arXiv 2511.10796, section 4): the NTK of the whole hidden trajectory."""

from __future__ import annotations

from typing import TYPE_CHECKING

from ntkbench.problems.base import Definition, problem, training

if TYPE_CHECKING:
    from torch import Tensor

INPUTS, HIDDEN = 10, 64
SAMPLES, STEPS = 15, 50


@problem
def gru_hazelden(N: int = SAMPLES, T: int = STEPS) -> Definition:
    """GRU(10, 64) over T = 50 steps of N = 15 trials, all hidden states (the paper's GRU).

    The paper prints B=50, T=15, but it ran T=50, B=15. Trained by 40 full-batch steps.
    """
    import torch
    from torch import nn

    from ntkbench.networks.recurrent import States, jax_forward

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        # Drawn time-first, as in the paper's script.
        x = torch.randn(STEPS, SAMPLES, INPUTS).transpose(0, 1).contiguous()
        module = States(nn.GRU(INPUTS, HIDDEN, batch_first=True))
    recipe = training.Adam(x, x, held_input, lr=3e-3, batch=SAMPLES, epochs=40)
    return Definition(module, x[:N, :T].numpy().copy(), recipe, jax_forward(module), outputs="states")


def held_input(states: Tensor, inputs: Tensor) -> Tensor:
    """Mean squared error of holding the previous input in the first hidden units."""
    import torch

    return torch.nn.functional.mse_loss(states[:, 1:, :INPUTS], torch.tanh(inputs[:, :-1].double()))
