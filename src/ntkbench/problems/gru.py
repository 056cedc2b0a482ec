"""The GRU of Hazelden (arXiv 2511.10796, section 4): the NTK of the whole hidden trajectory."""

from __future__ import annotations

from ntkbench.problems.base import Definition, problem, training

INPUTS, HIDDEN = 10, 64


@problem
def gru_hazelden(N: int = 15, T: int = 50) -> Definition:
    """GRU(10, 64) over T = 50 steps of N = 15 trials, all hidden states (the paper's GRU).

    The paper prints B=50, T=15; what it ran is T=50, B=15.
    """
    import torch
    from torch import nn

    from ntkbench.networks.recurrent import jax_forward
    from ntkbench.operators.recurrent.cells import Recurrence

    class States(nn.Module):
        """All hidden states ``[N, T, H]`` of a GRU fed ``[N, T, inputs]``."""

        def __init__(self) -> None:
            super().__init__()
            self.gru = nn.GRU(INPUTS, HIDDEN, batch_first=True)
            self.recurrence = Recurrence.of_layer("gru", "gru")

        def forward(self, x):
            return self.gru(x)[0]

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        x = torch.randn(50, 15, INPUTS).transpose(0, 1).contiguous()  # drawn time-first, as the paper's script does
        module = States()

    def train(module: nn.Module) -> None:
        """40 full-batch steps of holding the previous input in the first hidden units."""

        def loss(states, inputs):
            return nn.functional.mse_loss(states[:, 1:, :INPUTS], torch.tanh(inputs[:, :-1].double()))

        training.adam(module, x, x, loss, lr=3e-3, batch=15, epochs=40)

    return Definition(module, x[:N, :T].numpy().copy(), train, jax_forward=jax_forward(module))
