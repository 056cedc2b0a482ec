"""Kernels, metrics, a spectrum and a solution by an installed ntkbench with only its declared dependencies."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import nn

import ntkbench


def main() -> None:
    """Print the version, its folder and the metrics, and compare the kernel with plain autograd."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 16), nn.Tanh(), nn.Linear(16, 2)).double()
    x = torch.randn(8, 3, dtype=torch.float64)
    theta = ntkbench.ntk(net, x)
    outputs = net(x).reshape(-1)
    rows = [torch.autograd.grad(y, [*net.parameters()], retain_graph=True) for y in outputs]
    J = torch.stack([torch.cat([part.reshape(-1) for part in row]) for row in rows])
    torch.testing.assert_close(theta, J @ J.T)
    print(f"ntkbench {ntkbench.__version__} in {Path(ntkbench.__file__).parent}")
    for name, estimate in ntkbench.metrics_of(net, x).items():
        print(f"{name}: {estimate}")
    print(f"estimated trace: {ntkbench.trace(net, x, method='hutchpp', passes=12)}")
    print(f"largest eigenvalue: {ntkbench.spectrum(net, x).largest}")
    print(ntkbench.solve(net, x, outputs.detach().reshape(8, 2), ridge=0.1))


if __name__ == "__main__":
    main()
