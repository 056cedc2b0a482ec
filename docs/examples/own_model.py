"""Metrics of your own model: a small ConvNet on images, whole and layer by layer.

Run it with ``python docs/examples/own_model.py``; it takes a few seconds.
"""

from __future__ import annotations

import torch
from torch import nn

import ntkbench


def main() -> dict[str, ntkbench.Estimate]:
    """Print all metrics, the share of each layer in the trace, and the largest eigenvalues; return the metrics."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.ReLU(),
        nn.Conv2d(16, 32, 3, stride=2, padding=1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(32 * 8 * 8, 10),
    ).eval()
    x = torch.randn(32, 3, 16, 16)

    kernel = ntkbench.Kernel(model, x)  # checked and traced once
    print(kernel)
    metrics = kernel.metrics()
    for name, estimate in metrics.items():
        print(f"{name}: {estimate}")

    layers = kernel.groups({"first convolution": "0.*", "second convolution": "2.*", "head": "5.*"})
    for name, group in layers.items():
        print(f"{name}: {float(group.trace() / metrics['trace']):.0%} of the trace")

    largest = kernel.eigenvalues(top=5).values
    print("largest eigenvalues:", ", ".join(f"{float(value):.0f}" for value in largest))
    return metrics


if __name__ == "__main__":
    main()
