"""Training recipes: seeded gradient descent as data, so that the recorded recipe is the one that runs.

A problem is trained by an :class:`Adam` or :class:`OnTask`, or its trained weights are :class:`Given`. Studies that
need weights during training use :func:`course` and :func:`checkpoints`.
"""

from __future__ import annotations

import abc
import dataclasses
import functools
import hashlib
import itertools
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, ClassVar

from ntkbench.data import tasks
from ntkbench.errors import DidNotTrain
from ntkbench.problem import PROBED, Weights, hash_arrays

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer

TRIALS, LOSS, STEPS, LEARNING_RATE, CLIP = 128, 0.1, 2000, 5e-3, 1.0
"""Defaults for training recurrent networks on tasks; see :class:`OnTask`."""
SHORTEST = 10
"""Fewest steps of the shorter trials that precede longer ones."""


@dataclass(frozen=True, eq=False)
class Training(abc.ABC):
    """A training recipe: a frozen dataclass whose fields are all the values that training uses.

    Its printed form, with all fields except those of ``repr=False``, is part of a problem's identity, and so are
    :meth:`arrays` and what :meth:`objective` computes.

    Attributes:
        kept: whether trained weights are cached, and committed with exact values; false if it takes no time to
            regenerate them.
    """

    kept: ClassVar[bool] = True

    @abc.abstractmethod
    def train(self, module: nn.Module) -> None:
        """Train a module in place, the same way every time, and leave it in float32.

        Raises:
            DidNotTrain: training did not reach its goal.
        """

    @abc.abstractmethod
    def arrays(self) -> Weights:
        """The training data, by name."""

    @abc.abstractmethod
    def objective(self, module: nn.Module) -> Tensor:
        """The loss of a module in float64 on some of the data, differentiable."""

    def __str__(self) -> str:
        shown = [(f.name, getattr(self, f.name)) for f in dataclasses.fields(self) if f.repr]
        values = (f"{name}={value.__name__ if callable(value) else repr(value)}" for name, value in shown)
        return f"{type(self).__name__}({', '.join(values)})"


@dataclass(frozen=True, eq=False)
class Adam(Training):
    """Adam on shuffled mini-batches, for a number of epochs.

    Runs in float64, so that rounding differences between machines stay far below the float32 precision of the result.

    Attributes:
        x: inputs ``[N, ...]``; real ones are converted to float64 batch by batch.
        y: targets of the loss, ``[N, ...]``.
        loss: a named function of a batch's outputs and its ``y``.
        batch: samples per batch.
        epochs: passes over the data.
        lr: learning rate.
        seed: random seed of the shuffling.
    """

    x: Tensor = field(repr=False)
    y: Tensor = field(repr=False)
    loss: Callable[[Tensor, Tensor], Tensor]
    batch: int
    epochs: int
    lr: float = 1e-3
    seed: int = 0

    def train(self, module: nn.Module) -> None:
        for _ in self.course(module):
            pass
        module.float()

    def course(self, module: nn.Module) -> Iterator[tuple[int, float]]:
        """Train in place, in float64; yield the steps taken and the loss of the next batch, before each step.

        After the last step it yields the loss of the last batch. The caller may read the weights in between.
        """
        import torch

        module.double()
        optimizer = torch.optim.Adam(module.parameters(), lr=self.lr)
        shuffle = torch.Generator().manual_seed(self.seed)
        batches = (torch.randperm(len(self.x), generator=shuffle).split(self.batch) for _ in range(self.epochs))
        steps, loss = 0, lambda chosen: self.loss(module(_wide(self.x[chosen])), self.y[chosen])
        for chosen in itertools.chain.from_iterable(batches):
            optimizer.zero_grad()
            value = loss(chosen)
            yield steps, float(value.detach())
            value.backward()
            optimizer.step()
            steps += 1
        self._finish(module)
        with torch.no_grad():
            yield steps, float(loss(chosen))

    def _finish(self, module: nn.Module) -> None:
        """Called after the last step, before the last loss."""

    def arrays(self) -> Weights:
        return {"x": self.x.numpy(), "y": self.y.numpy()}

    def objective(self, module: nn.Module) -> Tensor:
        return self.loss(module(_wide(self.x[:PROBED])), self.y[:PROBED])


@dataclass(frozen=True, eq=False)
class AdamInTrainMode(Adam):
    """:class:`Adam` on a network in train mode: BatchNorm normalises by each batch and keeps running statistics.

    The network is in eval mode before and after, also for the last loss. No batch may have a single sample, for which
    BatchNorm has no statistics.
    """

    def course(self, module: nn.Module) -> Iterator[tuple[int, float]]:
        module.train()
        try:
            yield from super().course(module)
        finally:
            module.eval()

    def _finish(self, module: nn.Module) -> None:
        module.eval()


def next_token(logits: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of logits ``[N, T, V]`` for the tokens that follow, ``[N, T]``, in nats per token."""
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@dataclass(frozen=True, eq=False)
class Given(Training):
    """Weights trained by others, which replace the initial ones, including buffers.

    Attributes:
        source: origin of the weights.
        weights: parameters and buffers by their names in the state_dict, except BatchNorm's counts of batches.
        digest: hash of the weights, which is computed and not an argument.
    """

    kept: ClassVar[bool] = False

    source: str
    weights: Weights = field(repr=False)
    digest: str = field(init=False)

    def __post_init__(self) -> None:
        digest = hashlib.sha256()
        hash_arrays(digest, self.weights)
        object.__setattr__(self, "digest", digest.hexdigest()[:16])

    def train(self, module: nn.Module) -> None:
        import torch

        own = {key: tuple(w.shape) for key, w in module.state_dict().items() if w.is_floating_point()}
        given = {key: w.shape for key, w in self.weights.items()}
        if wrong := sorted(key for key in own.keys() | given.keys() if own.get(key) != given.get(key)):
            key = wrong[0]
            raise DidNotTrain(
                f"the weights of {self.source} are not this network's: {key!r} is {given.get(key, 'missing')} there "
                f"and {own.get(key, 'missing')} here"
            )
        module.load_state_dict({key: torch.from_numpy(w) for key, w in self.weights.items()}, strict=False)
        module.float()

    def arrays(self) -> Weights:
        return self.weights

    def objective(self, module: nn.Module) -> Tensor:
        """The squared distance of the parameters from the given ones."""
        import torch

        own = module.named_parameters()
        return torch.stack([(w - torch.from_numpy(self.weights[key]).to(w)).square().sum() for key, w in own]).sum()


@dataclass(frozen=True)
class OnTask(Training):
    """Full-batch Adam with clipped gradients on trials of a task, one length after another, each until ``loss``.

    Attributes:
        task: a key of :data:`ntkbench.data.tasks.TASKS`.
        lengths: steps T of the trials, in turn; see :func:`curriculum`.
        trials: number of trials of each length.
        loss: the share of the targets' power at which to stop.
        steps: maximum number of steps at each length.
        learning_rate: learning rate of Adam.
        clip: norm that gradients are clipped to.
        seed: random seed of the trials.
    """

    task: str
    lengths: tuple[int, ...]
    trials: int = TRIALS
    loss: float = LOSS
    steps: int = STEPS
    learning_rate: float = LEARNING_RATE
    clip: float = CLIP
    seed: int = 1

    def train(self, module: nn.Module) -> None:
        for T in self.lengths:
            for _ in course(
                module,
                self._trials(T),
                loss=self.loss,
                steps=self.steps,
                learning_rate=self.learning_rate,
                clip=self.clip,
            ):
                pass

    def arrays(self) -> Weights:
        return {f"{name}[T={T}]": array for T in self.lengths for name, array in vars(self._trials(T)).items()}

    def objective(self, module: nn.Module) -> Tensor:
        import torch

        first = self._trials(self.lengths[0])
        return first.loss()(module(torch.from_numpy(first.inputs).double()))

    def _trials(self, T: int) -> tasks.Trials:
        return tasks.trials(self.task, self.trials, T, seed=self.seed)


def curriculum(T: int) -> tuple[int, ...]:
    """Lengths of trials to train on in turn: T, preceded by a third of it and so on, without lengths below 10.

    Gradients of a vanilla network vanish over dozens of steps, so it learns nothing from long trials alone.
    """
    lengths = [T]
    while lengths[0] // 3 >= SHORTEST:
        lengths.insert(0, lengths[0] // 3)
    return tuple(lengths)


def course(
    module: nn.Module,
    trials: tasks.Trials,
    *,
    loss: float = LOSS,
    steps: int = STEPS,
    optimizer: str = "adam",
    learning_rate: float = LEARNING_RATE,
    clip: float = CLIP,
) -> Iterator[tuple[int, float]]:
    """Train in place on all trials at once; yields steps and losses like :func:`descent`.

    Runs in float64, so that rounding differences between machines stay far below the float32 precision of the result.

    Args:
        module: the network, in float64 until the end.
        trials: the training trials.
        loss: the loss at which to stop.
        steps: maximum number of steps.
        optimizer: ``"adam"``, or ``"sgd"`` for gradient descent with a momentum of 0.9, which moves each weight in
            proportion to its gradient.
        learning_rate: learning rate of the optimizer.
        clip: norm that gradients are clipped to.
    """
    import torch

    module.double()
    x, missed = torch.from_numpy(trials.inputs).double(), trials.loss()
    makers: dict[str, Callable[..., Optimizer]] = {
        "adam": torch.optim.Adam,
        "sgd": functools.partial(torch.optim.SGD, momentum=0.9),
    }
    chosen = makers[optimizer](module.parameters(), lr=learning_rate)

    def clipped(*_: object) -> None:
        torch.nn.utils.clip_grad_norm_(module.parameters(), clip)

    chosen.register_step_pre_hook(clipped)
    yield from descent(lambda: missed(module(x)), chosen, to=loss, most=steps)
    module.float()


def descent(loss: Callable[[], Tensor], optimizer: Optimizer, *, to: float, most: int) -> Iterator[tuple[int, float]]:
    """Gradient descent until the loss is at most ``to``; yields steps taken and loss, before each step and at the end.

    The caller may read the weights in between; none are kept.

    Args:
        loss: computes the loss at the present weights, differentiably.
        optimizer: optimizer of those weights.
        to: the loss to reach.
        most: maximum number of steps.

    Raises:
        DidNotTrain: the loss is not reached within ``most`` steps, or is not finite.
    """
    for step in itertools.count():
        value = loss()
        now = float(value.detach())
        yield step, now
        if now <= to:
            return
        if step == most or not math.isfinite(now):
            raise DidNotTrain(f"training did not reach a loss of {to:g}: it is {now:.3g} after {step} steps")
        optimizer.zero_grad()
        value.backward()
        optimizer.step()


def checkpoints(
    module: nn.Module, course: Iterator[tuple[int, float]], ratio: float = 2**0.5
) -> Iterator[tuple[int, float, Weights]]:
    """Steps, loss and weights along a :func:`descent` at log-spaced steps: 0, 1, each ``ratio`` later, and the end.

    Weights are copies, in float32, by parameter name.
    """
    due, last, kept = 0.0, None, None
    for step, loss in course:
        last = step, loss
        if step >= due:
            kept = step
            yield step, loss, _copied(module)
            due = max(step + 1, step * ratio)
    if last is not None and kept != last[0]:
        yield *last, _copied(module)


def _copied(module: nn.Module) -> Weights:
    return {key: w.detach().cpu().float().numpy().copy() for key, w in module.named_parameters()}
