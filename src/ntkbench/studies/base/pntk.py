"""How well kernels between samples approximate Theta: measures for the pNTK studies (Mohamadi et al. 2023)."""

from __future__ import annotations

import copy
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from ntkbench.data import images
from ntkbench.layerwise.kernel import LayerwiseKernel

KERNELS = {
    "sum_of_logits": "pNTK (sum of logits)",
    "single_logit": "single logit",
    "random_vector": "random vector",
    "trace": "trace kernel",
    "last_layer": "last layer",
}
"""Names for ``ntkbench.ntk`` and titles; the trace kernel is the best of all in the Frobenius norm."""
Data = Literal["digits", "cifar10"]
"""scikit-learn's digits, or the part of CIFAR-10."""
Pictures = tuple[Tensor, Tensor]
"""Images and their labels."""
RIDGE = 1e-8
"""Ridge of kernel regression, as a share of a kernel's mean diagonal."""


class Theta:
    """Theta of networks of one architecture on the same inputs, in float64; traced once, for all weights.

    Tracing a deep network takes seconds, as long as several kernels.
    """

    def __init__(self, network: nn.Module, x: Tensor, memory: int = 2**30) -> None:
        """Trace the network.

        Args:
            network: one with this architecture; its buffers, such as BatchNorm's statistics, are used for all networks.
            x: inputs ``[N, ...]``.
            memory: bytes that everything except the result may use.

        Raises:
            BadInput: the network cannot be traced.
        """
        network, self._x = copy.deepcopy(network).double(), x.double()
        self._kernel = LayerwiseKernel(network, dict(network.named_parameters()), self._x, memory)

    def __call__(self, network: nn.Module) -> Tensor:
        """``[N, O, N, O]`` at the current weights of a network."""
        made = self._kernel.kernel([w.detach().double() for w in network.parameters()], self._x)
        return made.reshape(len(self._x), self._kernel.O, len(self._x), self._kernel.O)


def features_and_outputs(network: nn.Sequential, x: Tensor) -> tuple[Tensor, Tensor]:
    """Inputs and outputs of the readout, a network's last layer, ``[N, W]`` and ``[N, O]``, in float64."""
    twin = copy.deepcopy(network).double()
    with torch.no_grad():
        features = twin[:-1](x.double())
        return features, twin[-1](features)


def standing_in(full: Tensor, features: Tensor, seed: int) -> dict[str, Tensor]:
    """The ``[N, N]`` kernels by name.

    All but that of the last layer are averages over Theta's blocks, and are computed from Theta. That of the last layer
    is the kernel of a linear readout with biases on its features.

    Args:
        full: Theta, ``[N, O, N, O]``.
        features: inputs of the readout, ``[N, W]``.
        seed: seed of the random vector.
    """
    outputs = full.shape[1]
    v = torch.from_numpy(np.random.default_rng(seed).standard_normal(outputs)).to(full)
    v = v / v.norm()
    return {
        "sum_of_logits": full.sum((1, 3)) / outputs,
        "single_logit": full[:, 0, :, 0].clone(),
        "random_vector": torch.einsum("aobp,o,p->ab", full, v, v),
        "trace": torch.einsum("aobo->ab", full) / outputs,
        "last_layer": features @ features.T + 1,
    }


def difference(full: Tensor, kernel: Tensor) -> float:
    """||A ⊗ I - Theta||_F / ||Theta||_F."""
    diagonal = torch.einsum("aobo->abo", full)
    # Only the blocks' diagonals differ from Theta's own: ||Theta||^2 - ||diagonals||^2 + ||diagonals - A||^2.
    squares = (full**2).sum() - (diagonal**2).sum() + ((diagonal - kernel[:, :, None]) ** 2).sum()
    return float((squares.clamp(min=0) / (full**2).sum()).sqrt())


def off_diagonal_mass(full: Tensor) -> float:
    """Mean |entry| off the diagonals of Theta's O x O blocks, over the mean |entry| on the diagonals."""
    outputs = full.shape[1]
    on = float(torch.einsum("aobo->abo", full).abs().sum())
    return (float(full.abs().sum()) - on) / on / max(1, outputs - 1)


def spectrum(matrix: Tensor) -> tuple[float, float]:
    """Largest eigenvalue and condition number of a symmetric matrix, by absolute values: some may round below 0."""
    values = torch.linalg.eigvalsh(matrix).abs()
    return float(values.max()), float(values.max() / values.min())


def predictions(kernel: Tensor, f: Tensor, targets: Tensor, train: int) -> Tensor:
    """Kernel regression f(x) + K(x, X) K(X, X)^-1 (Y - f(X)) on the samples after the first ``train``.

    Args:
        kernel: ``[N, N]``, the same for all outputs, or ``[N, O, N, O]``.
        f: outputs of the network ``[N, O]``.
        targets: targets of the training samples ``[train, O]``.
        train: number of training samples.
    """
    residual = targets - f[:train]
    if kernel.ndim == 2:
        weights = torch.linalg.solve(_ridged(kernel[:train, :train]), residual)
        return f[train:] + kernel[train:, :train] @ weights
    outputs = f.shape[1]
    among = kernel[:train, :, :train].reshape(train * outputs, -1)
    weights = torch.linalg.solve(_ridged(among), residual.reshape(-1))
    between = kernel[train:, :, :train].reshape(-1, train * outputs)
    return f[train:] + (between @ weights).reshape(-1, outputs)


def _ridged(matrix: Tensor) -> Tensor:
    return matrix + RIDGE * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)


def sum_direction(network: nn.Module) -> float:
    """||1^T V|| / ||V||_F for the readout V ``[O, W]``: about 1 where V is random, 0 where its rows sum to zero."""
    readout = [layer for layer in network.modules() if isinstance(layer, nn.Linear)][-1].weight.detach()
    return float(readout.sum(0).norm() / readout.norm())


def labelled(data: Data) -> tuple[Pictures, Pictures]:
    """Training images ``[N, channels, side, side]`` in float32 with their labels, and held-out ones, at most 512.

    Raises:
        BadInput, Unavailable, Corrupt: see :class:`ntkbench.data.files.DataFile`.
    """
    if data == "digits":
        return training_digits(), held_out_digits()
    training, held_out = ([torch.from_numpy(part) for part in images.cifar10(name)] for name in ("train", "test"))
    return (training[0], training[1]), (held_out[0][: images.HELD_OUT], held_out[1][: images.HELD_OUT])


def pictures(data: Data, train: int, test: int) -> dict[str, Tensor]:
    """The first training and held-out images as ``x``, and their ``labels``."""
    (x, labels), (held_x, held_labels) = labelled(data)
    return {"x": torch.cat([x[:train], held_x[:test]]), "labels": torch.cat([labels[:train], held_labels[:test]])}


def training_digits() -> Pictures:
    """All training images ``[N, 1, 8, 8]`` in float32 and their labels."""
    return _as_pictures(*images.digits_with_labels()[:2])


def held_out_digits() -> Pictures:
    """All held-out images ``[N, 1, 8, 8]`` in float32 and their labels."""
    return _as_pictures(*images.digits_with_labels()[2:])


def _as_pictures(images: np.ndarray, labels: np.ndarray) -> Pictures:
    return torch.from_numpy(images).reshape(-1, 1, 8, 8), torch.from_numpy(labels)
