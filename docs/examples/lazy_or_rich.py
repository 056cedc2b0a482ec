"""Lazy or rich learning: the alignment of a recurrent network's kernel with that at initialisation.

The same RNN learns the same task from small and from large initial weights. An alignment near 1 means that the kernel,
and so the features, hardly change (lazy); a low one means that they do (rich).

Run it with ``python docs/examples/lazy_or_rich.py``; it takes less than a minute.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ntkbench

TRIALS, STEPS, UNITS, EPOCHS = 32, 12, 48, 300


class Network(nn.Module):
    """An RNN with a linear readout at its last step."""

    def __init__(self, gain: float) -> None:
        super().__init__()
        self.rnn = nn.RNN(1, UNITS, batch_first=True)
        self.readout = nn.Linear(UNITS, 1)
        nn.init.normal_(self.rnn.weight_hh_l0, std=gain / UNITS**0.5)

    def forward(self, x: Tensor) -> Tensor:
        """Inputs ``[N, T, 1]`` -> outputs ``[N, 1]``."""
        return self.readout(self.rnn(x)[0][:, -1])


def trained(gain: float) -> tuple[ntkbench.Estimate, float]:
    """The alignment and the loss after training."""
    torch.manual_seed(1)
    model = Network(gain)
    x = torch.randint(2, (TRIALS, STEPS, 1)).float() * 2 - 1
    y = x[:, :3].prod(1)  # the parity of the first three steps
    tracker = ntkbench.Tracker(model, x, every=100, metrics=("alignment",))
    optimizer = torch.optim.Adam(model.parameters(), lr=3e-3)
    for step in range(EPOCHS + 1):
        tracker(step)
        loss = nn.functional.mse_loss(model(x), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return tracker.history[-1][1]["alignment"], float(loss.detach())


def main() -> dict[float, ntkbench.Estimate]:
    """Print the alignment by the gain of the recurrent weights, and return it."""
    found = {}
    for gain in (0.5, 1.0, 1.5):
        found[gain], loss = trained(gain)
        print(f"gain {gain}: alignment with initialisation {found[gain]}, loss {loss:.3f}")
    return found


if __name__ == "__main__":
    main()
