"""Distillation with the alignment of kernels as a regulariser, on scikit-learn's digits."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.func import functional_call, grad_and_value, jvp, vjp, vmap

from ntkbench.studies.base import pntk


def product(network: nn.Module, theta: Mapping[str, Tensor], x: Tensor, u: Tensor) -> Tensor:
    """Theta u for probes u ``[k, N, O]``, differentiable in theta; one VJP and one JVP per probe."""

    def outputs(theta: dict[str, Tensor]) -> Tensor:
        found: Tensor = functional_call(network, theta, (x,))
        return found

    def one(u: Tensor) -> Tensor:
        (g,) = vjp(outputs, dict(theta))[1](u)
        return jvp(outputs, (dict(theta),), (g,))[1]

    return vmap(one)(u)


def alignment(one: Tensor, other: Tensor) -> Tensor:
    """The alignment of two kernels, or its estimate from their products with the same probes."""
    return (one * other).sum() / (one.norm() * other.norm())


def distilled(
    student: nn.Module,
    teacher: nn.Module,
    x: Tensor,
    *,
    weight: float,
    steps: int,
    batch: int,
    probes: int,
    rate: float,
    seed: int,
) -> None:
    """Train a student in place on a teacher's outputs by Adam, in the precision of the student.

    The loss is the cross-entropy with the teacher's probabilities, plus ``weight`` times 1 - A on the same batch. A is
    the shared-probe estimate of the alignment of the two kernels, from new random signs at each step. A probe takes 2
    passes of the teacher and 2 of the student, and the backward pass through the latter.

    Args:
        student, teacher: ``[N, 1, 8, 8] -> [N, O]``.
        x: images to train on.
        weight: weight of the regulariser; with 0 it is left out.
        steps, batch, rate: number of steps, batch size and learning rate of Adam.
        probes: number of probes of the estimate at each step.
        seed: seed of batches and probes.
    """
    random = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(student.parameters(), lr=rate)
    fixed = {name: w.detach() for name, w in teacher.named_parameters()}
    own = dict(student.named_parameters())
    for _ in range(steps):
        some = x[torch.randperm(len(x), generator=random)[:batch]]
        with torch.no_grad():
            wanted = teacher(some)
        u = torch.randint(2, (probes, *wanted.shape), generator=random).to(x) * 2 - 1
        there = product(teacher, fixed, some, u) if weight else u

        def loss(theta: dict[str, Tensor], some: Tensor, wanted: Tensor, u: Tensor, there: Tensor) -> Tensor:
            outputs = functional_call(student, theta, (some,))
            value = nn.functional.cross_entropy(outputs, wanted.softmax(1))
            return value + weight * (1 - alignment(product(student, theta, some, u), there)) if weight else value

        values = {name: w.detach() for name, w in own.items()}
        gradients, _ = grad_and_value(loss)(values, some, wanted, u, there)
        for name, w in own.items():
            w.grad = gradients[name]
        optimizer.step()


class Judge:
    """The evaluation of students, on held-out digits."""

    def __init__(self, teacher: nn.Module, student: nn.Module, images: int) -> None:
        """Trace the networks.

        Args:
            teacher: the trained teacher.
            student: any student; all have the same architecture.
            images: number of images that kernels are computed on.
        """
        self._x, self._labels = pntk.held_out_digits()
        seen = self._x[:images]
        self._theta = pntk.Theta(student, seen)
        self._there = pntk.Theta(teacher, seen)(teacher)
        with torch.no_grad():
            self._wanted = teacher(self._x)

    def __call__(self, student: nn.Module) -> dict[str, float]:
        """Loss, accuracy, agreement with the teacher, and the exact alignment with its kernel."""
        with torch.no_grad():
            outputs = student(self._x)
        chosen = outputs.argmax(1)
        return {
            "loss": float(nn.functional.cross_entropy(outputs, self._labels)),
            "accuracy": float((chosen == self._labels).double().mean()),
            "agreement": float((chosen == self._wanted.argmax(1)).double().mean()),
            "alignment": float(alignment(self._theta(student), self._there)),
        }
