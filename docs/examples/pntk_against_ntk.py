"""The pNTK against the NTK: how far the sum of logits is from the kernel that it approximates, by width.

The pNTK is an N x N kernel K that approximates Theta by K ⊗ I. The trace kernel is the best of these, and its distance
from Theta is the floor.

Run it with ``python docs/examples/pntk_against_ntk.py``; it takes a few seconds.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import ntkbench

SAMPLES, OUTPUTS, WIDTHS = 32, 10, (32, 128, 512)


def distance(theta: Tensor, kernel: Tensor) -> float:
    """||Theta - K ⊗ I||_F / ||Theta||_F."""
    return float((theta - torch.kron(kernel, torch.eye(OUTPUTS))).norm() / theta.norm())


def main() -> dict[int, tuple[float, float]]:
    """Print the distances of the pNTK and of the trace kernel from Theta by width, and return them."""
    found = {}
    for width in WIDTHS:
        torch.manual_seed(0)
        x = torch.randn(SAMPLES, 64)
        hidden = nn.Linear(64, width), nn.ReLU(), nn.Linear(width, width), nn.ReLU()
        model = nn.Sequential(*hidden, nn.Linear(width, OUTPUTS))
        theta = ntkbench.ntk(model, x)
        pntk, floor = (ntkbench.ntk(model, x, kernel=name) for name in ("sum_of_logits", "trace"))
        found[width] = distance(theta, pntk), distance(theta, floor)
        print(f"width {width}: the pNTK is {found[width][0]:.1%} from the NTK, the trace kernel {found[width][1]:.1%}")
    return found


if __name__ == "__main__":
    main()
