"""A user's recurrent network and sequences as a problem; the properties that a problem needs are checked."""

from __future__ import annotations

import operator
from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence

from ntkbench.ambient import own_settings
from ntkbench.errors import BadInput, summary
from ntkbench.modules import called, copied, frozen
from ntkbench.networks.recurrent import States
from ntkbench.operators import declares
from ntkbench.operators.recurrent.cells import declared
from ntkbench.operators.recurrent.torch_trajectory import trajectory
from ntkbench.problem import Problem
from ntkbench.problems.base.module import from_module, same_samples


def wrapped(model: nn.Module, x: Tensor, model_f: nn.Module | None = None, *, dtype: str | None = None) -> Problem:
    """:func:`from_recurrent` for a network that declares a recurrence, else ``from_module``.

    Torch's other recurrent layers give their outputs at all steps.
    """
    network, network_f, sequences = by_trial(model, x, model_f)
    if isinstance(network, nn.Module) and declares(network):
        return from_recurrent(model, x, model_f, dtype=dtype)
    name = type(model).__name__ if isinstance(model, nn.RNNBase) else None
    return from_module(network, sequences, network_f, name=name, dtype=dtype)


def by_trial(
    model: nn.Module, x: Tensor, model_f: nn.Module | None = None
) -> tuple[nn.Module, nn.Module | None, Tensor]:
    """Recurrent layers of torch as networks ``[N, T, ...] -> [N, T, ...]``, and their inputs; other networks unchanged.

    Raises:
        BadInput: inputs of a layer are not sequences, or the two layers take them in different layouts.
    """
    if not isinstance(model, nn.RNNBase):
        return model, model_f, x
    _check_sequences(model, x)
    if isinstance(model_f, nn.RNNBase) and model_f.batch_first != model.batch_first:
        raise BadInput("model_0 and model_f must take their inputs in the same layout; batch_first differs")
    network_f = States(model_f) if isinstance(model_f, nn.RNNBase) else model_f
    return States(model), network_f, x if model.batch_first else x.transpose(0, 1)


def _check_sequences(model: nn.Module, x: Tensor) -> None:
    if isinstance(x, PackedSequence) or not isinstance(x, Tensor) or x.is_nested:
        raise BadInput(f"sequences must be a tensor [N, T, ...] of one length T; got {_lengths(x)}")
    time_first = isinstance(model, nn.RNNBase) and not model.batch_first
    if x.ndim < 3 or x.shape[not time_first] == 0:
        layout = "[T, N, ...], since batch_first is False," if time_first else "[N, T, ...]"
        raise BadInput(f"sequences must be a tensor {layout} with T > 0; got shape {tuple(x.shape)}")


def same_inputs(model: nn.Module, x1: Tensor, x2: Tensor) -> Tensor:
    """``x2 [N, ...]``, if it holds samples of the same kind as ``x1``; both are in the model's own layout.

    Raises:
        BadInput: it does not; says how it differs.
    """
    time_first = isinstance(model, nn.RNNBase) and not model.batch_first
    by_sample = [x.transpose(0, 1) if time_first and isinstance(x, Tensor) and x.ndim > 1 else x for x in (x1, x2)]
    return same_samples(*by_sample)


def from_recurrent(
    model: nn.Module,
    x: Tensor,
    model_f: nn.Module | None = None,
    *,
    name: str | None = None,
    dtype: str | None = None,
) -> Problem:
    """Wrap a recurrent network and sequences; see :func:`ntkbench.problems.base.module.from_module` for the rest.

    The outputs of an ``nn.RNN``, ``nn.GRU`` or ``nn.LSTM`` are those at all steps, and ``x`` has the layer's own
    layout: ``[T, N, inputs]`` unless it is ``batch_first``. The samples are the N trials in either layout, and outputs
    are ordered by trial. A module that declares a ``recurrence`` (see
    :class:`ntkbench.operators.recurrent.cells.Recurrence`) gets hand-written derivatives, and its declaration is
    checked on ``x``. Any other module from ``[N, T, ...]`` to ``[N, T, ...]`` works as well, and is differentiated by
    its backend.

    Use it to call methods and operators yourself on a network whose outputs are the states or readouts at all steps.

    Cost: five forward passes and one backward pass more than ``from_module``.

    >>> import torch, ntkbench
    >>> problem = ntkbench.from_recurrent(torch.nn.GRU(3, 5), torch.zeros(7, 2, 3))
    >>> problem.output_shape  # 2 trials, 7 steps, 5 units
    (2, 7, 5)

    Args:
        model: ``[N, T, inputs] -> [N, T, ...]``, or a recurrent layer.
        x: sequences of one length, ``[N, T, ...]``, or ``[T, N, ...]`` for a recurrent layer with that layout.
        model_f: the same network with other weights, for alignment.
        name: name of the problem.
        dtype: see ``from_module``.

    Returns:
        The problem; its outputs are ``[N, T, ...]``.

    Raises:
        BadInput: sequences are of different lengths; an output depends on later inputs; no output depends on a
            trainable parameter; the module does not compute the recurrence that it declares; or as ``from_module``.
    """
    _check_sequences(model, x)
    network, network_f, x = by_trial(model, x, model_f)
    problem = from_module(network, x, network_f, name=name or type(model).__name__, dtype=dtype)
    if len(problem.output_shape) < 3 or problem.output_shape[1] != x.shape[1]:
        raise BadInput(f"the model must give [N, T, ...] with T = {x.shape[1]}, got shape {problem.output_shape}")
    with own_settings(str(problem.theta_0[next(iter(problem.theta_0))].dtype)):
        _check(problem)
    return problem


def _check(problem: Problem) -> None:
    assert problem.module is not None  # set by from_module
    net = frozen(copied(problem.module))
    theta = [w.requires_grad_(True) for key, w in net.named_parameters() if key in problem.theta_0]
    inputs = torch.from_numpy(problem.x).to(theta[0].device)
    outputs = called(net, inputs)
    _check_causal(net, inputs, outputs.detach())
    _check_comes_from(outputs, theta)
    if declares(net):
        _check_declared(net, inputs, outputs.detach())


def _lengths(x: object) -> str:
    if isinstance(x, PackedSequence):
        return "a PackedSequence, as for sequences of different lengths"
    if isinstance(x, Sequence) and all(isinstance(part, Tensor) for part in x):
        return f"{len(x)} sequences of lengths {', '.join(str(len(part)) for part in x[:4])}{', ...' * (len(x) > 4)}"
    return "a nested tensor" if isinstance(x, Tensor) else type(x).__name__


def _check_causal(net: nn.Module, x: Tensor, outputs: Tensor) -> None:
    T = x.shape[1]
    for t in sorted({1, T // 2, T - 1} - {0, T}):
        other = torch.cat([x[:, :t], x[:, t:].flip(0, 1) + 1], 1)
        try:
            changed = net(other)[:, :t].detach() - outputs[:, :t]
        except (IndexError, RuntimeError):  # integers out of an embedding's range
            changed = net(torch.cat([x[:, :t], x[:, t:].flip(0, 1)], 1))[:, :t].detach() - outputs[:, :t]
        if changed.abs().max() > torch.finfo(outputs.dtype).eps ** 0.5 * outputs.abs().max():
            raise BadInput(f"the network is not causal: its outputs before step {t} depend on inputs from step {t} on")


def _check_comes_from(outputs: Tensor, theta: list[Tensor]) -> None:
    if outputs.requires_grad:
        weights = torch.linspace(1, 2, outputs.numel(), dtype=outputs.dtype, device=outputs.device)
        grads = torch.autograd.grad((outputs.reshape(-1) * weights).sum(), theta, allow_unused=True)
        if any(g is not None and g.abs().max() > 0 for g in grads):
            return
    raise BadInput("the states do not come from the parameters: no output depends on a trainable parameter")


@torch.no_grad()
def _check_declared(net: nn.Module, x: Tensor, outputs: Tensor) -> None:
    recurrence = declared(net)
    try:
        w = {role: operator.attrgetter(name)(net) for role, name in recurrence.names.items()}
        states = trajectory(recurrence.kind, recurrence.alpha, w, x)[0]
        if "readout_weight" in w:
            states = nn.functional.linear(states, w["readout_weight"], w.get("readout_bias"))
    except Exception as error:  # unknown names and kinds may raise anything
        raise BadInput(f"the module declares a recurrence that cannot be computed: {summary(error)}") from error
    off = torch.inf if states.shape != outputs.shape else (states - outputs).abs().max()
    if off > torch.finfo(outputs.dtype).eps ** 0.5 * outputs.abs().max():
        raise BadInput(
            f"the module declares a recurrence of kind {recurrence.kind!r}, but its outputs are not the trajectory of "
            f"such a recurrence from a zero state with the parameters {', '.join(recurrence.names.values())}"
        )
