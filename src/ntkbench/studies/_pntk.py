"""How well kernels between samples stand for Theta: what the studies of the pNTK measure (Mohamadi et al. 2023)."""

from __future__ import annotations

import copy
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

import ntkbench

KERNELS = {
    "sum_of_logits": "pNTK (sum of logits)",
    "single_logit": "single logit",
    "random_vector": "random vector",
    "trace": "trace kernel",
    "last_layer": "last layer",
}
"""Names for ``ntkbench.ntk`` and titles; the trace kernel is the best of all in the Frobenius norm."""
RIDGE = 1e-8
"""Of kernel regression, as a share of a kernel's mean diagonal."""


def theta(network: nn.Module, x: Tensor) -> Tensor:
    """Theta as ``[N, O, N, O]`` in float64, from the whole kernel."""
    made = ntkbench.ntk(network, x, dtype="float64")
    outputs = len(made) // len(x)
    return made.reshape(len(x), outputs, len(x), outputs)


def standing_in(network: nn.Sequential, x: Tensor, full: Tensor, seed: int) -> dict[str, Tensor]:
    """The ``[N, N]`` kernels by name.

    All but the last layer's are averages over Theta's blocks, and are read off it instead of computed anew. The last
    layer's is that of the readout on its features, so that the network is not traced once more.

    Args:
        network: the network, a readout last.
        x: its inputs ``[N, ...]``.
        full: its Theta on them, ``[N, O, N, O]``.
        seed: of the random vector.
    """
    outputs = full.shape[1]
    v = torch.from_numpy(np.random.default_rng(seed).standard_normal(outputs)).to(full)
    v = v / v.norm()
    with torch.no_grad():
        features = copy.deepcopy(network[:-1]).double()(x.double())
    return {
        "sum_of_logits": full.sum((1, 3)) / outputs,
        "single_logit": full[:, 0, :, 0].clone(),
        "random_vector": torch.einsum("aobp,o,p->ab", full, v, v),
        "trace": torch.einsum("aobo->ab", full) / outputs,
        "last_layer": ntkbench.ntk(network[-1], features, kernel="trace", dtype="float64"),
    }


def difference(full: Tensor, kernel: Tensor) -> float:
    """||A (x) I - Theta||_F / ||Theta||_F."""
    diagonal = torch.einsum("aobo->abo", full)
    # Only the blocks' diagonals differ from Theta's own: ||Theta||^2 - ||diagonals||^2 + ||diagonals - A||^2.
    squares = (full**2).sum() - (diagonal**2).sum() + ((diagonal - kernel[:, :, None]) ** 2).sum()
    return float((squares.clamp(min=0) / (full**2).sum()).sqrt())


def off_diagonal_mass(full: Tensor) -> float:
    """Sum of |entries| off the diagonals of Theta's O x O blocks over that of those on them, per entry."""
    outputs = full.shape[1]
    on = float(torch.einsum("aobo->abo", full).abs().sum())
    return (float(full.abs().sum()) - on) / on / max(1, outputs - 1)


def spectrum(matrix: Tensor) -> tuple[float, float]:
    """Largest eigenvalue and condition number of a symmetric matrix; eigenvalues that round to less by their size."""
    values = torch.linalg.eigvalsh(matrix).abs()
    return float(values.max()), float(values.max() / values.min())


def predictions(kernel: Tensor, at_0: Tensor, targets: Tensor, train: int) -> Tensor:
    """Kernel regression f_0(x) + K(x, X) K(X, X)^-1 (Y - f_0(X)) on the samples after the first ``train``.

    Args:
        kernel: ``[N, N]`` for every output alike, or ``[N, O, N, O]``.
        at_0: outputs of the network ``[N, O]``.
        targets: of the training samples ``[train, O]``.
        train: how many samples are trained on.
    """
    residual = targets - at_0[:train]
    if kernel.ndim == 2:
        weights = torch.linalg.solve(_ridged(kernel[:train, :train]), residual)
        return at_0[train:] + kernel[train:, :train] @ weights
    outputs = at_0.shape[1]
    among = kernel[:train, :, :train].reshape(train * outputs, -1)
    weights = torch.linalg.solve(_ridged(among), residual.reshape(-1))
    between = kernel[train:, :, :train].reshape(-1, train * outputs)
    return at_0[train:] + (between @ weights).reshape(-1, outputs)


def _ridged(matrix: Tensor) -> Tensor:
    return matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)


def sum_direction(network: nn.Module) -> float:
    """||1^T V|| / ||V||_F for the readout V ``[O, W]``: about 1 where V is random, 0 where its rows sum to zero."""
    readout = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].weight.detach()
    return float(readout.sum(0).norm() / readout.norm())


def digits(train: int, test: int) -> dict[str, Any]:
    """scikit-learn's digits as ``[N, 1, 8, 8]`` in float32: the first training and held-out images and labels."""
    from ntkbench.problems import _images

    images, labels, held_out, held_labels = _images.digits_with_labels()
    x = torch.from_numpy(np.concatenate([images[:train], held_out[:test]])).reshape(-1, 1, 8, 8)
    return {"x": x, "labels": torch.from_numpy(np.concatenate([labels[:train], held_labels[:test]]))}
