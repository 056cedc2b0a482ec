"""Generated, seeded tasks for recurrent networks: inputs, targets, and a mask of the targets that count.

All arrays are float32, ``[N, T, channels]``. Trials for training and for kernels differ in their seed.
Trial i of a seed is the same for any number of trials, so a smaller set of trials is the beginning of a larger one.
Networks are scored by the share of the targets' power that they miss, so that losses are comparable across tasks.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from ntkbench.errors import BadInput, unknown

if TYPE_CHECKING:
    from torch import Tensor

PULSES = 0.2
"""Probability of a flip-flop's pulse per step and channel."""

ANGLES = 8
NOISE = 0.1
"""Standard deviation of the noise on the inputs of the tasks with few distinct trials."""


@dataclass(frozen=True)
class Trials:
    """Trials of a task.

    Attributes:
        inputs: ``[N, T, I]``.
        targets: ``[N, T, O]``.
        mask: ``[N, T, O]``, 1 where the target counts and 0 elsewhere.
    """

    inputs: np.ndarray
    targets: np.ndarray
    mask: np.ndarray

    def loss(self) -> Callable[[Tensor], Tensor]:
        """The share of the targets' power that outputs ``[N, T, O]`` miss: 0 for the targets, 1 for no output at all.

        sum(mask (f - y)^2) / sum(mask y^2), in the precision of the outputs.
        """
        import torch

        targets, mask = torch.from_numpy(self.targets), torch.from_numpy(self.mask)
        power = float((mask * targets**2).sum())
        return lambda outputs: (mask.to(outputs) * (outputs - targets.to(outputs)) ** 2).sum() / power


def flipflop(rng: np.random.Generator, T: int) -> tuple[np.ndarray, ...]:
    """3-bit flip-flop: each output holds the sign of the last pulse in its channel (Sussillo and Barak 2013).

    Pulses of +-1 come independently with probability 0.2 in each step and channel. A bit counts from its first pulse.
    """
    pulses = rng.choice([-1.0, 1.0], (T, 3)) * (rng.random((T, 3)) < PULSES)
    last = np.maximum.accumulate(np.where(pulses != 0, np.arange(T)[:, None], -1), axis=0)
    return pulses, np.where(last >= 0, np.take_along_axis(pulses, np.maximum(last, 0), 0), 0), last >= 0


def delayed_response(rng: np.random.Generator, T: int) -> tuple[np.ndarray, ...]:
    """Delayed response: a cue at one of 8 angles, a delay, and the angle's cosine and sine at the go signal.

    Cue and response take a fifth of the trial each. Inputs are cosine, sine and go signal, with noise of 0.1; targets
    are 0 until the go signal.
    """
    epoch = T // 5
    angle = 2 * np.pi * rng.integers(ANGLES) / ANGLES
    direction = [np.cos(angle), np.sin(angle)]
    inputs, targets = np.zeros((T, 3)), np.zeros((T, 2))
    inputs[:epoch, :2] = direction
    inputs[-epoch:, 2] = 1
    targets[-epoch:] = direction
    return inputs + NOISE * rng.standard_normal(inputs.shape), targets, np.ones_like(targets)


def match_to_sample(rng: np.random.Generator, T: int) -> tuple[np.ndarray, ...]:
    """Delayed match to sample: two stimuli with a delay between them, then a choice between match and non-match.

    Sample, test and response take a fifth of the trial each. There is one input channel per stimulus, with noise of
    0.1, and one output per choice. Targets are 1 for the right choice and 0 for the other, and count in the response
    only.
    """
    epoch = T // 5
    sample, test = rng.integers(2, size=2)
    inputs, targets = np.zeros((T, 2)), np.zeros((T, 2))
    inputs[:epoch, sample] = 1
    inputs[-2 * epoch : -epoch, test] = 1
    targets[-epoch:, int(sample != test)] = 1
    mask = np.zeros_like(targets)
    mask[-epoch:] = 1
    return inputs + NOISE * rng.standard_normal(inputs.shape), targets, mask


TASKS: dict[str, tuple[Callable[..., tuple[np.ndarray, ...]], int]] = {
    "flipflop": (flipflop, 2),
    "delayed_response": (delayed_response, 5),
    "match_to_sample": (match_to_sample, 5),
}
"""Generator of one trial of each task, and the minimum number of steps with something to remember."""


def channels(task: str) -> tuple[int, int]:
    """Inputs and outputs of a task.

    Raises:
        BadInput: no such task.
    """
    one = trials(task, 1, TASKS[task][1] if task in TASKS else 1)
    return one.inputs.shape[-1], one.targets.shape[-1]


def check(task: str, T: int, N: int = 1) -> None:
    """Check that a task has trials of T steps.

    Raises:
        BadInput: no such task, no trials, or too few steps for it.
    """
    if task not in TASKS:
        raise unknown("task", task, TASKS)
    if (shortest := TASKS[task][1]) > T or N < 1:
        raise BadInput(f"task {task} needs N of at least 1 and T of at least {shortest}; got N={N}, T={T}")


def trials(task: str, N: int, T: int, seed: int = 0) -> Trials:
    """N trials of T steps, in float32.

    Raises:
        BadInput: no such task, no trials, or too few steps for it.
    """
    check(task, T, N)
    one = TASKS[task][0]
    drawn = [one(np.random.default_rng([seed, i]), T) for i in range(N)]
    return Trials(*(np.stack(arrays).astype(np.float32) for arrays in zip(*drawn, strict=True)))
