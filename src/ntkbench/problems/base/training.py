"""Training recipes: seeded gradient descent as data, so that what is run is what is recorded.

A problem is trained by an :class:`Adam` or :class:`OnTask`, or its trained weights are :class:`Given`. Studies that
look at weights on the way use :func:`course` and :func:`checkpoints`.
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
"""How recurrent networks are trained on tasks, unless it is said otherwise; see :class:`OnTask`."""
SHORTEST = 10
"""Steps of the shortest trials that come before longer ones."""


@dataclass(frozen=True, eq=False)
class Training(abc.ABC):
    """A training recipe: a frozen dataclass whose fields are all the values that training uses.

    Its printed form, with all fields but those of ``repr=False``, is part of a problem's identity, and so are
    :meth:`arrays` and what :meth:`objective` computes.

    Attributes:
        kept: whether trained weights are cached, and committed with exact values. They are not where making them again
            takes no time.
    """

    kept: ClassVar[bool] = True

    @abc.abstractmethod
    def train(self, module: nn.Module) -> None:
        """Train a module in place, the same way every time, and leave it in float32.

        Raises:
            DidNotTrain: training did not get where it was to get.
        """

    @abc.abstractmethod
    def arrays(self) -> Weights:
        """The data of training, by name."""

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

    Runs in float64, so that rounding differences between machines stay far below the float32 the weights are kept in.

    Attributes:
        x: inputs ``[N, ...]``, those of real numbers brought to float64 batch by batch.
        y: what the loss compares outputs with, ``[N, ...]``.
        loss: a named function of a batch's outputs and its ``y``.
        batch: samples a batch.
        epochs: passes over the data.
        lr: learning rate.
        seed: of the shuffling.
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
        """Train in place, in float64: steps taken and the loss of the next batch, before each step and after the last.

        After the last step the loss is that of the last batch. The caller may look at the weights in between.
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
        with torch.no_grad():
            yield steps, float(loss(chosen))

    def arrays(self) -> Weights:
        return {"x": self.x.numpy(), "y": self.y.numpy()}

    def objective(self, module: nn.Module) -> Tensor:
        return self.loss(module(_wide(self.x[:PROBED])), self.y[:PROBED])


@dataclass(frozen=True, eq=False)
class AdamInTrainMode(Adam):
    """:class:`Adam` on a network in train mode: BatchNorm normalises by each batch and keeps running statistics.

    The network is in eval mode afterwards.
    """

    def course(self, module: nn.Module) -> Iterator[tuple[int, float]]:
        module.train()
        try:
            yield from super().course(module)
        finally:
            module.eval()


def next_token(logits: Tensor, following: Tensor) -> Tensor:
    """Cross-entropy of logits ``[N, T, V]`` for the tokens that follow, ``[N, T]``, in nats a token."""
    import torch

    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), following.flatten())


def _wide(x: Tensor) -> Tensor:
    return x.double() if x.is_floating_point() else x


@dataclass(frozen=True, eq=False)
class Given(Training):
    """Weights that others have trained: they are put in place of the initial ones, buffers included.

    Attributes:
        source: whose they are.
        weights: parameters and buffers by their names in the state_dict, but for BatchNorm's counts of batches.
        digest: of the weights, which nobody gives.
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
    """Full-batch Adam with clipped gradients on trials of a task, of one length after another, each down to a loss.

    Attributes:
        task: a key of :data:`ntkbench.data.tasks.TASKS`.
        lengths: steps T of the trials, in turn; see :func:`curriculum`.
        trials: number of trials of each length.
        loss: the share of the targets' power at which to stop.
        steps: that may be taken at each length.
        learning_rate: of Adam.
        clip: norm that gradients are clipped to.
        seed: of the trials.
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
    """Lengths of trials that a network is trained on in turn: T, a third of it and so on, but for those below 10.

    Over dozens of steps gradients of a vanilla network vanish, and nothing is learned from long trials alone.
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
    """Train in place on all trials at once; see :func:`descent` for what comes out and when.

    In float64, so that rounding differences between machines stay far below the float32 that weights are kept in.

    Args:
        module: the network, in float64 until the end.
        trials: to train it on.
        loss: at which to stop.
        steps: that may be taken.
        optimizer: ``"adam"``, or ``"sgd"`` for gradient descent with a momentum of 0.9, which moves each weight by as
            much as its gradient says.
        learning_rate: of either.
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
    """Gradient descent until the loss is at most ``to``: steps taken and loss, before each step and at the end.

    The caller may look at the weights in between; nothing is kept.

    Args:
        loss: computes the loss at the present weights, differentiably.
        optimizer: of those weights.
        to: the loss to reach.
        most: steps that may be taken.

    Raises:
        DidNotTrain: the loss is not reached in so many steps, or is no number any more.
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
    """Steps, loss and weights along a :func:`descent` at log-spaced steps: 0, 1, and each some ratio later; the end.

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
