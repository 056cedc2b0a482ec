"""A user's ``nn.Module`` and inputs as a problem; the properties that a problem needs are checked."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import itertools
import logging
import pickle
import random
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from ntkbench.ambient import own_settings
from ntkbench.errors import BadInput, NotFinite, OverMemory, summary, unknown
from ntkbench.layerwise.layers import of_last_module
from ntkbench.modules import cast, copied, frozen, load
from ntkbench.operators import certificate
from ntkbench.operators.arrays import epsilon, to_numpy
from ntkbench.operators.plain import PlainNetwork, flat, leaves, nudged
from ntkbench.options import DTYPES
from ntkbench.problem import PROBED, Problem
from ntkbench.problems.base import captured
from ntkbench.problems.base.adapter import Calling, own_name

TOGETHER, ALONE = 64, 8
"""Numbers of evenly spaced samples: in the batch that tests whether samples interact, and those also taken alone."""

INTERACTION = 1e-6
"""Relative difference of gradients above which samples interact; larger than the error of float32 inside a network."""

CALLS = 8
"""Calls that must agree for a network in eval mode that draws random numbers."""

ROUNDINGS = 64
"""Machine epsilons by which a conversion of inputs, buffers and frozen parameters may change a gradient."""

SPARSE = (torch.sparse_coo, torch.sparse_csr, torch.sparse_csc, torch.sparse_bsr, torch.sparse_bsc)

WRAP = (
    "wrap the model in a module that takes one tensor and returns one tensor, or pass call= for a tuple or a "
    "dict of inputs, as in call=lambda model, inputs: model(**inputs).logits"
)


class OtherTheta(BadInput):
    """A network of the same kind in which other parameters are trainable."""


def from_module(
    model: nn.Module,
    x: Tensor,
    model_f: nn.Module | None = None,
    *,
    name: str | None = None,
    dtype: str | None = None,
) -> Problem:
    """Wrap a network and its inputs as a :class:`ntkbench.problem.Problem`.

    theta is every parameter with ``requires_grad=True``; frozen parameters and buffers are part of the function, and a
    tensor tied under several names counts once. Everything is copied: further training of ``model`` does not affect the
    problem, and wrapping changes neither the model nor the states of the random generators of torch, Python and NumPy.
    Norm layers in train mode keep using the batch's statistics, without updating their running ones. J is what a
    backward pass computes before it accumulates gradients: hooks of ``register_hook`` count, and those of
    ``register_post_accumulate_grad_hook`` do not; a warning is logged if there are any.

    Whether samples interact is measured: the gradient of a random combination of the outputs of up to 8 samples, taken
    in a batch of up to 64, is compared with the gradient of the same samples taken alone. This is done in float64 if
    the network supports it, at the given weights and at perturbed ones, since a readout that starts at zero hides the
    layers before it. Train-mode BatchNorm counts as interacting, and so does a network that does not accept a single
    sample.

    Use it to call methods and operators yourself; the functions of :mod:`ntkbench.api` and :class:`ntkbench.Kernel`
    call it for you.

    Cost: four forward and two backward passes over 64 samples, two backward passes over 8 samples alone, and a forward
    pass over all samples, 64 at a time. If samples interact, or the network accepts no other number of them, forward
    passes are over all samples at once. For ``model_f`` see :func:`at`. A network that draws random numbers in eval
    mode takes ten forward passes instead of four. Norm layers in train mode take four forward and two backward passes
    more over all samples, to check that no code reads their running statistics. Parts of another precision than
    ``dtype`` take two forward and two backward passes more over all samples, and a forward pass over 64.

    >>> import torch, ntkbench
    >>> problem = ntkbench.from_module(torch.nn.Linear(3, 2), torch.ones(4, 3))
    >>> problem.N, problem.O, problem.P, problem.samples_interact
    (4, 2, 8, False)

    Args:
        model: ``x -> [N, ...outputs]`` with its weights theta_0, in the intended mode (``train`` or ``eval``).
        x: inputs ``[N, ...]``, real or integer. Real ones, buffers and frozen parameters are converted to ``dtype``.
            They keep their own precision if the parameters are of ``dtype`` and the conversion changes a gradient by
            more than a few roundings, as for time stamps in float64 or a frozen backbone in half precision.
        model_f: the same network with the weights theta_f, for alignment. Frozen parameters and buffers, such as
            BatchNorm's running statistics, may differ as well; each set of weights keeps its own.
        name: name of the problem; by default the class of the model.
        dtype: precision of weights and inputs, ``"float32"`` or ``"float64"``; by default that of the parameters.

    Returns:
        The problem, with copies of the network, its weights and its inputs on the CPU.

    Raises:
        BadInput: the model has no trainable parameters, is random or keeps a state from call to call; one of its hooks
            uses the model instead of its arguments; rounding to a coarser ``dtype`` changes its gradients by more than
            rounding errors; its outputs are not N rows of finite real numbers that depend on its parameters; or
            ``model_f`` differs from it in more than values.
    """
    _check_inputs(x)
    dtype = _dtype(model, dtype)
    with own_settings(dtype):
        net, x, mixed = _in_precision(_snapshot(model, "model"), x, dtype, "model")
        theta_0 = _trainable(net)
        _note_late_hooks(model)
        net = _without_unused_statistics(net, x)
        shape, interact = _behaviour(net, x, model, mixed=mixed)
        problem = Problem(
            name=name or type(model.model if isinstance(model, Calling) else model).__name__,
            module=net,
            x=x.detach().cpu().numpy().copy(),
            theta_0=_on_host(theta_0),
            samples_interact=interact,
            mixed=mixed,
            # Already known; the usual method, meta tensors, fails for networks that create tensors on a device.
            _shape=[shape],
        )
        return problem if model_f is None else paired(problem, at(problem, model_f, "model_f"))


def at(problem: Problem, weights: nn.Module | Mapping[str, Any], role: str = "the other network") -> Problem:
    """The same network and inputs at other weights; theta_f is dropped.

    Cost: for a network, four forward passes (over 64 samples if samples do not interact), one over all samples if there
    are more, and a forward and a backward pass of both networks over all samples; none for values by name.

    Args:
        problem: of a module.
        weights: the same network with other values of parameters and buffers; or such values by name. Values that are
            not given stay the same.
        role: name of the network in messages.

    Raises:
        BadInput: a name or a shape does not match, or values are not finite; other parameters are trainable; or the
            network does not compute the same outputs and gradients as the problem's network with the same values.
    """
    if isinstance(weights, nn.Module):
        values = _values_of_same(problem, weights, role)
    elif isinstance(weights, Mapping):
        values = {str(key): as_value(key, w) for key, w in weights.items()}
    else:
        raise BadInput(f"weights must be a torch.nn.Module or values by name, got {type(weights).__name__}")
    present = {**_on_host(_values(problem.network)), **problem.fixed_0, **problem.theta_0}
    found: dict[str, np.ndarray] = {}
    for key, value in values.items():
        if key not in present:
            raise unknown("parameter or buffer", key, present)
        if tuple(value.shape) != present[key].shape:
            raise BadInput(f"{key!r} must be of shape {present[key].shape}, got {tuple(value.shape)}")
        if key in problem.theta_0 and not value.isfinite().all():
            raise NotFinite(f"{role} has nan or infinite weights: {key!r}")
        if value.is_complex() and present[key].dtype.kind != "c":
            raise BadInput(f"{key!r} must be real, got {value.dtype}")
        found[key] = to_numpy(value).astype(present[key].dtype)
    theta_0 = {key: found.get(key, w) for key, w in problem.theta_0.items()}
    changed = {
        key: w
        for key, w in found.items()
        if key not in theta_0 and not np.array_equal(w, present[key], equal_nan=w.dtype.kind in "fc")
    }
    fixed_0 = {**problem.fixed_0, **changed}
    return dataclasses.replace(problem, theta_0=theta_0, fixed_0=fixed_0, theta_f=None, fixed_f={}, other=None)


def as_value(key: object, value: Any) -> Tensor:
    """A value of a parameter or buffer, as a tensor on the host.

    Raises:
        BadInput: it cannot be converted.
    """
    try:
        return torch.as_tensor(value).detach().cpu()
    except Exception:  # a value of another kind may raise anything
        raise BadInput(f"the value of {key!r} must be a tensor, got {type(value).__name__}") from None


def _values_of_same(problem: Problem, model: nn.Module, role: str) -> dict[str, Tensor]:
    """Parameters and buffers of a network, which is checked to be the problem's up to their values."""
    dtype = str(next(iter(problem.theta_0.values())).dtype)
    net, x, mixed = _in_precision(_snapshot(model, role), torch.from_numpy(problem.x), dtype, role, kept=problem.mixed)
    if mixed != problem.mixed:
        raise BadInput(f"{role} has parts of other precisions than the first network: give both the same ones")
    present, values = _values(problem.network), _values(net)
    if present.keys() != values.keys():
        values = _values(_without_statistics(net))
    _check_same(present, values)
    theta, own, first = problem.theta_0.keys(), _trainable(net).keys(), _trainable(problem.network).keys()
    if others := theta - own or (own - first if theta == first else set()):  # else theta is what the caller selected
        flag, known = ("False", "trainable") if min(others) in theta else ("True", "frozen")
        raise OtherTheta(
            f"{role} has requires_grad={flag} for {own_name(net, min(others))!r}, which is {known} in the first "
            "network: give both the same trainable parameters, or select some by parameters=..."
        )
    swapped = load(copied(problem.network).to(x.device), values)
    some, outputs = (
        (x, _outputs(net, x, role, model)) if problem.samples_interact else _some_outputs(net, x, role, model)
    )
    _check_finite(net, x, some, outputs, role, model)
    if not _close(outputs, _Call(swapped, some, 0).outputs):
        raise BadInput(
            f"the first network with the values of {role} does not compute what {role} computes: they must be the "
            "same network, in the same mode (train or eval)"
        )
    together = problem.samples_interact or len(some) == len(x)
    found = _gradient(net, problem.theta_0, x, outputs, role, together=together)
    if not _agree(found, _gradient(swapped, problem.theta_0, x, outputs, "the first network", together=together)):
        raise BadInput(
            f"the first network with the values of {role} does not compute the gradients that {role} computes: they "
            "must be the same network, with the same tensors detached and the same hooks"
        )
    return {key: w.cpu() for key, w in values.items()}


def _gradient(
    net: nn.Module, names: Collection[str], x: Tensor, outputs: Tensor, role: str, *, together: bool
) -> Tensor:
    """The gradient ``[P]`` of a random combination of the outputs of all samples, by plain autograd of a copy; 1 pass.

    ``outputs`` are those of some samples. Samples are taken 64 at a time if they need not stay together.

    Raises:
        BadInput: the network cannot be differentiated.
    """
    own = dict(net.named_parameters())
    plain = PlainNetwork(net, {name: own[name].detach() for name in names})
    v = certificate.random_weights(len(x) * outputs[0].numel(), outputs).reshape(len(x), -1)
    for size in (len(x),) if together else (TOGETHER, len(x)):
        try:
            with _seeded(0, x):
                parts = zip(x.clone().split(size), v.split(size), strict=True)
                return sum(flat(plain.gradient(*part)) for part in parts)  # type: ignore[return-value]
        except Exception as error:  # it may accept no other number of samples
            failed = error
    raise BadInput(f"{role} cannot be differentiated: {summary(failed)}")


def _agree(found: Tensor, expected: Tensor) -> bool:
    """Whether two gradients are equal up to rounding, as certificates allow it, where either is finite."""
    known = found.isfinite() | expected.isfinite()
    return certificate.distance(found[known], expected[known]) <= certificate.tolerance(epsilon(expected))


def paired(problem: Problem, other: Problem) -> Problem:
    """A problem whose theta_f is another one's theta_0: of the same network, or of another one with the same outputs.

    Raises:
        BadInput: the two have different numbers of samples or outputs.
    """
    if not _are_one_network(problem, other) or list(problem.theta_0) != list(other.theta_0):
        return dataclasses.replace(problem, other=other)
    present = {} if problem.module is None else _on_host(_values(problem.module))
    names = dict.fromkeys((*problem.fixed_0, *other.fixed_0))
    fixed_0, fixed_f = ({key: {**present, **each.fixed_0}[key] for key in names} for each in (problem, other))
    interact = problem.samples_interact or other.samples_interact
    return dataclasses.replace(
        problem, theta_f=other.theta_0, fixed_0=fixed_0, fixed_f=fixed_f, samples_interact=interact
    )


def _are_one_network(problem: Problem, other: Problem) -> bool:
    """Whether two problems have the same network or JAX function and the same inputs."""
    if problem.module is None:
        return other.jax_forward == problem.jax_forward and np.array_equal(problem.x, other.x)
    return problem.module is other.module and problem.x is other.x


SECOND = "the second inputs"
"""How messages name inputs that are compared with those of a kernel; functions name the argument differently."""


def same_samples(x1: Tensor, x2: Tensor) -> Tensor:
    """``x2``, if it holds samples of the same kind as ``x1``.

    Raises:
        BadInput: it does not; says how it differs.
    """
    _check_inputs(x2, SECOND)
    if x2.shape[1:] != x1.shape[1:] or x2.is_floating_point() != x1.is_floating_point():
        raise BadInput(
            f"{SECOND} must hold samples like the first, [N, {', '.join(map(str, x1.shape[1:]))}] of {x1.dtype}; "
            f"got shape {tuple(x2.shape)} of {x2.dtype}"
        )
    return x2


def on_inputs(problem: Problem, x: Tensor) -> Problem:
    """The same network and weights on other inputs, whose samples must not interact."""
    x = x.detach().cpu()
    return problem.with_inputs((x.to(torch.from_numpy(problem.x[:0]).dtype) if x.is_floating_point() else x).numpy())


def last_layer(problem: Problem) -> Problem:
    """The problem with theta restricted to the module whose parameters are used last; all others are frozen.

    Parameters that no output depends on, such as those of another head, do not count.

    Raises:
        BadInput: the problem is a function, which has no modules; or no output depends on a parameter.
    """
    if problem.module is None:
        raise BadInput(
            f"{problem.name} is a function whose last layer is not known: put that layer's parameters alone in params, "
            "close over the others, and use kernel='trace'"
        )
    dtype, where = next(iter(problem.theta_0.values())).dtype, next(problem.network.parameters()).device
    reached: dict[str, Tensor] = {}
    with own_settings(str(dtype), str(where)):
        net = load(copied(problem.network), {**problem.fixed_0, **problem.theta_0})
        own = dict(net.named_parameters())
        theta = {key: own[key] for key in problem.theta_0}
        x = torch.from_numpy(problem.x if problem.samples_interact else problem.x[:PROBED]).to(where)
        with _Uses(net, theta) as uses:
            outputs = net(x)
        plain = PlainNetwork(net, theta, owned=True)
        for key, w in theta.items():  # not by the graph: reentrant checkpointing hides parameters from it
            w.register_hook(functools.partial(reached.__setitem__, key))
        plain.gradient(x, torch.ones_like(outputs))
    if not (last := [key for key in uses.order(outputs) if key in reached]):
        raise BadInput(f"no output of {problem.name} depends on a parameter of theta, so none is in its last layer")
    of_last = of_last_module(net, {key: i for i, key in enumerate(last)})
    chosen = [key for key in problem.theta_0 if key in of_last]
    fixed = {key: w for key, w in problem.theta_0.items() if key not in chosen}
    theta_0 = {key: problem.theta_0[key] for key in chosen}
    return dataclasses.replace(
        problem, theta_0=theta_0, theta_f=None, other=None, fixed_0={**problem.fixed_0, **fixed}, fixed_f={}
    )


class _Uses(TorchFunctionMode):
    """The order in which operations use parameters.

    A result of parameters and constants alone, such as a transposed weight, is used where its parameters are.
    """

    def __init__(self, net: nn.Module, parameters: Mapping[str, Tensor]) -> None:
        super().__init__()
        self._parameters = tuple(parameters)
        self._made: list[tuple[Iterable[str], list[Any]]] = []
        names = {id(w): (key,) for key, w in parameters.items()}
        fixed = (*net.parameters(), *net.buffers())
        # Tensors that do not depend on x, with the names of their parameters, by id; holding them keeps ids unique.
        self._fixed: dict[int, tuple[Tensor, Iterable[str]]] = {id(t): (t, names.get(id(t), ())) for t in fixed}

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        given = [t for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        known = [self._fixed[id(t)] for t in given if id(t) in self._fixed]
        names = dict.fromkeys(name for _, each in known for name in each)
        results = [t for t in tree_leaves(made) if isinstance(t, Tensor)]  # none if an attribute is read
        if results and names:
            self._made.append((names, [t.grad_fn for t in results]))
        for t in results:
            if len(known) == len(given):
                self._fixed[id(t)] = t, names
            else:
                self._fixed.pop(id(t), None)
        return made

    def order(self, outputs: Tensor) -> list[str]:
        """The parameters by their last uses on which the outputs depend, after those without one, as in compiled code.

        Uses without a gradient, of a detached value, or whose result is discarded do not count, unless a parameter has
        no others: reentrant checkpointing hides its uses from the graph.
        """
        reached: set[Any] = set()
        ahead = [outputs.grad_fn]
        while ahead:
            node = ahead.pop()
            if node is not None and node not in reached:
                reached.add(node)
                ahead += [before for before, _ in node.next_functions]
        of_any, of_outputs = dict.fromkeys(self._parameters, -1), dict[str, int]()
        for i, (names, made) in enumerate(self._made):
            of_any |= dict.fromkeys(names, i)
            if not reached.isdisjoint(made):
                of_outputs |= dict.fromkeys(names, i)
        return sorted(self._parameters, key=(of_any | of_outputs).__getitem__)


def _check_inputs(x: Tensor, name: str = "x") -> None:
    if isinstance(x, np.ndarray):
        raise BadInput(f"{name} must be a torch tensor of inputs [N, ...], got ndarray: use torch.from_numpy")
    if not isinstance(x, Tensor):
        raise BadInput(f"{name} must be a torch tensor of inputs [N, ...], got {type(x).__name__}: {WRAP}")
    if wrong := unusual(x):
        raise BadInput(f"{name} must be an ordinary dense tensor, got a {wrong} one: pad or convert it first")
    if x.ndim == 0 or x.numel() == 0:
        raise BadInput(f"{name} must hold at least one sample, [N, ...] with N > 0; got shape {tuple(x.shape)}")
    if x.is_complex():
        raise BadInput(f"{name} must be real or integer, got {x.dtype}: give its real and imaginary parts instead")


def unusual(x: Tensor) -> str:
    """The kind of a tensor that is not ordinary and dense, as a word; empty for an ordinary dense tensor."""
    if isinstance(x, FakeTensor):
        return "fake"
    if x.is_nested:
        return "nested"
    if x.is_quantized:
        return "quantised"
    if x.is_meta:
        return "meta"
    return "" if x.layout is torch.strided else str(x.layout).removeprefix("torch.").replace("_", " ")


def _dtype(model: nn.Module, dtype: str | None) -> str:
    """The precision to compute in; checks the types of the model and its parameters."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(nn.parameter.is_lazy(w) for w in model.parameters()):
        raise BadInput("model has lazy parameters without a shape yet; call it once on the inputs")
    found = sorted({str(w.dtype).removeprefix("torch.") for w in model.parameters() if w.requires_grad and w.numel()})
    if not found:
        raise BadInput("model has no parameters with requires_grad=True, so there is nothing to differentiate by")
    if named := [key for key, w in model.named_parameters() if w.requires_grad and w.is_complex()]:
        raise BadInput(
            f"model has complex parameters, such as {own_name(model, named[0])!r}, but the NTK needs real ones: hold "
            "real and imaginary parts in one real parameter [..., 2], with torch.view_as_complex in forward"
        )
    if dtype is not None:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return dtype
    if len(found) > 1 or found[0] not in DTYPES:
        raise BadInput(
            f"parameters are {', '.join(found)}; choose the precision to compute in, dtype='float32' or 'float64'"
        )
    return found[0]


def _snapshot(model: nn.Module, role: str) -> nn.Module:
    """A copy of the model that is a function of its parameters and inputs alone.

    Raises:
        BadInput: the model is not an ordinary one, cannot be copied, or has train-mode Dropout; or a function in it
            uses the model instead of its copy.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
    model = unwrapped(model)
    own = model.model if isinstance(model, Calling) else model
    tensors = (*own.named_parameters(), *own.named_buffers())
    for key, w in tensors:
        # A sparse constant, such as the adjacency of a graph, is part of the function.
        if (wrong := unusual(w)) and (w.requires_grad or w.layout not in SPARSE):
            raise BadInput(f"{role} must consist of ordinary dense tensors, but {key!r} is a {wrong} one")
    if len(devices := {str(w.device) for _, w in tensors}) > 1:
        raise BadInput(f"{role} is spread over {', '.join(sorted(devices))}; it must be on one device")
    for key, w in own.named_parameters():
        if w.requires_grad and not w.detach().isfinite().all():
            raise NotFinite(f"{role} has nan or infinite weights: {key!r}")
    for where, layer in own.named_modules():
        if isinstance(layer, _DropoutNd) and layer.training and layer.p > 0:
            raise BadInput(f"{role} has Dropout in train mode ({where or 'the model itself'}): call model.eval() first")
    net = copied(model, role)
    if where := captured.shared(net.model if isinstance(net, Calling) else net, own):
        raise BadInput(
            f"{role} has a function that uses {role} itself ({where}), or a weak reference to it, which copies would "
            "share: use self or the function's arguments instead"
        )
    return net


def _without_statistics(net: nn.Module) -> nn.Module:
    """A copy whose norm layers in train mode have no running statistics, as torch.func refuses updates in place."""
    net = copied(net)
    for layer in net.modules():
        if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats:
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return net


def _without_unused_statistics(net: nn.Module, x: Tensor) -> nn.Module:
    """:func:`_without_statistics` if the network computes the same without them; it may read them in its own code."""
    bare = _without_statistics(net)
    if len(list(bare.buffers())) == len(list(net.buffers())):
        return net
    theta, other = _trainable(net), copied(net)
    with torch.no_grad():
        for key, b in other.named_buffers():
            if key not in dict(bare.named_buffers()):  # statistics of a new layer, 0 and 1, may have no effect
                b.mul_(2).add_(1)
    try:
        outputs = _Call(copied(other), x, 0).outputs
        expected = _gradient(other, theta, x, outputs, "the model", together=False)
    except Exception:  # a later check reports it
        return net
    try:
        same = _close(_Call(copied(bare), x, 0).outputs, outputs)
        return bare if same and _agree(_gradient(bare, theta, x, outputs, "", together=False), expected) else net
    except Exception:  # a network that reads its statistics may raise anything without them
        return net


def _note_late_hooks(model: nn.Module) -> None:
    """Log which parameters have hooks that run after their gradient is computed."""
    late = [name for name, w in model.named_parameters() if w.requires_grad and w._post_accumulate_grad_hooks]
    if late:
        logging.getLogger("ntkbench").warning(
            "hooks of register_post_accumulate_grad_hook (of %s) are no part of the NTK, as they run after a backward "
            "pass has computed gradients: those of register_hook are",
            own_name(model, late[0]),
        )


def unwrapped(model: nn.Module) -> nn.Module:
    """The network without wrappers for several devices or compilation."""
    if isinstance(model, nn.DataParallel | nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    inner = getattr(model, "_orig_mod", None)  # of torch.compile
    return unwrapped(inner) if isinstance(inner, nn.Module) else model


def _trainable(net: nn.Module) -> dict[str, Tensor]:
    return {key: w.detach() for key, w in net.named_parameters() if w.requires_grad}


def _in_precision(
    net: nn.Module, x: Tensor, dtype: str, role: str, *, kept: bool = False
) -> tuple[nn.Module, Tensor, bool]:
    """The network in a precision, a copy of its inputs on its device, and whether parts keep precisions of their own.

    A network computes another function if code in it counts on the precision of inputs, buffers or frozen parameters,
    such as time stamps in float64. This is tested by the gradient of a random combination of all outputs before and
    after the conversion. If theta has this precision already, more than a few roundings mean that the other parts keep
    theirs.

    Args:
        kept: keep the precisions of a network whose theta has this precision, without a test.

    Raises:
        BadInput: the conversion to another precision changes the gradient by more than rounding.
    """
    real = getattr(torch, dtype)
    x = x.detach().clone().to(next(net.parameters()).device)
    own = {w.dtype for w in _trainable(net).values()}
    if kept and own == {real}:
        return net, x, True
    made, converted = cast(copied(net), real), x.to(real) if x.is_floating_point() else x
    same = own == {real}
    if not any(same or torch.finfo(other).eps < torch.finfo(real).eps for other in _others(net, x, real)):
        return made, converted, False
    for given, inputs in ((net, x), (_with_converted_inputs(net, real), converted)):
        if not _others(given, inputs, real):
            break
        try:
            with own_settings(str(next(iter(own)) if len(own) == 1 else real).removeprefix("torch.")):
                outputs = _few_outputs(given, inputs)
                expected = _gradient(given, _trainable(given), inputs, outputs, role, together=False).to(real)
        except Exception:  # it does not take inputs of this precision, or a later check reports what is wrong
            continue
        if not expected.isfinite().all():  # shows nothing
            continue
        try:
            off = certificate.distance(
                _gradient(made, _trainable(made), converted, outputs, role, together=False), expected
            )
        except Exception:  # code in it does not run in this precision
            off = np.inf
        if same and off <= ROUNDINGS * torch.finfo(real).eps:
            return made, converted, False
        if same and inputs.dtype == torch.bfloat16:
            raise BadInput(
                f"{role} counts on inputs in bfloat16, which NumPy lacks: pass float32, and convert in forward"
            )
        if same:
            return given, inputs, True
        if not off <= max(*map(_eps, _trainable(net).values()), torch.finfo(real).eps) ** 0.5:
            how = "it fails or overflows there" if off == np.inf else f"they differ by {off:.1e} of their norm"
            raise BadInput(
                f"{role} has other gradients in {dtype} than in its own precision ({how}): compute in that one"
            )
        break
    return made, converted, False


def _others(net: nn.Module, x: Tensor, real: torch.dtype) -> set[torch.dtype]:
    """Precisions of a network and its inputs, except one."""
    tensors = (x, *net.parameters(), *net.buffers())
    return {t.dtype.to_real() for t in tensors if t.is_floating_point() or t.is_complex()} - {real}


def _few_outputs(net: nn.Module, x: Tensor) -> Tensor:
    """f of 64 samples, or of all if the network accepts no fewer."""
    with torch.no_grad():
        with contextlib.suppress(Exception):
            return _Call(copied(net), x[:TOGETHER], 0).outputs
        return _Call(copied(net), x, 0).outputs


def _eps(t: Tensor) -> float:
    """Machine epsilon of a real or complex tensor; ``nan`` of others, which compares as neither finer nor coarser."""
    return torch.finfo(t.dtype).eps if t.is_floating_point() or t.is_complex() else np.nan


def _with_converted_inputs(net: nn.Module, real: torch.dtype) -> nn.Module:
    """A copy of a network whose inputs are in another precision, if it holds inputs."""
    net = copied(net)
    if isinstance(net, Calling):
        for key, b in net._buffers.items():
            if b is not None and b.is_floating_point():
                net._buffers[key] = b.to(real)
    return net


class _Call:
    """One call of a network with all random generators seeded; their states are restored.

    Attributes:
        outputs: f(x), which may be of any type; detached if it is a tensor.
        differentiable: whether f(x) depends on a parameter, as far as autograd knows.
        leaves: the tensors that f(x) is differentiated by.
        before, after: states of the global generators, and of those given.
    """

    def __init__(self, net: nn.Module, x: Tensor, seed: int, generators: Sequence[Any] = ()) -> None:
        with _seeded(seed, x):
            self.before = _states(generators, x)
            outputs = net(x)
            self.after = _states(generators, x)
        self.differentiable = isinstance(outputs, Tensor) and outputs.requires_grad
        self.leaves = leaves(outputs) if self.differentiable else []
        self.outputs = outputs.detach().clone() if isinstance(outputs, Tensor) else outputs


@contextlib.contextmanager
def generators_restored(devices: Sequence[torch.device] = ()) -> Iterator[None]:
    """Leave the random generators of torch (on the CPU and on ``devices``), Python and NumPy as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng(devices):
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)


@contextlib.contextmanager
def _seeded(seed: int, x: Tensor) -> Iterator[None]:
    with generators_restored([x.device] if x.is_cuda else []):
        torch.default_generator.manual_seed(seed)  # torch.manual_seed seeds the generators of all devices
        if x.is_cuda:
            torch.cuda.manual_seed(seed)
        random.seed(seed)
        np.random.seed(seed)
        yield


def _states(generators: Sequence[Any], x: Tensor) -> list[bytes]:
    """States of the global random generators, and of others."""
    states: list[Any] = [random.getstate(), np.random.get_state(), torch.get_rng_state().numpy()]
    if x.is_cuda:
        states.append(torch.cuda.get_rng_state(x.device).numpy())
    for generator in generators:
        if isinstance(generator, random.Random):
            states.append(generator.getstate())
        elif isinstance(generator, np.random.Generator):
            states.append(generator.bit_generator.state)
        else:
            state = generator.get_state()
            states.append(state.numpy() if isinstance(state, Tensor) else state)
    return [pickle.dumps(state) for state in states]


def _outputs(net: nn.Module, x: Tensor, role: str, original: nn.Module) -> Tensor:
    """f(x), checked to be a function of x and the network's own parameters only, with one row per sample.

    Raises:
        BadInput: a check fails.
        OverMemory: the network does not fit in memory with these inputs.
    """
    _check_signature(net, role)
    trial, before = copied(net), x.clone()
    call = functools.partial(_Call, trial, x, generators=captured.generators(trial))
    try:
        first = call(0)
    except BadInput:
        raise
    except Exception as error:  # a network may raise anything
        kind = OverMemory if isinstance(error, MemoryError) or "out of memory" in summary(error) else BadInput
        given = (isinstance(net, Calling) and net.given) or f"x, {tuple(x.shape)} of {x.dtype}"
        raise kind(f"{role} cannot be called on {given}, in {_precision(net)}: {summary(error)}") from error
    if not _same(x, before):
        raise BadInput(f"{role} writes into its input: let it write into a copy, x.clone()")
    outputs = first.outputs
    if not isinstance(outputs, Tensor):
        raise BadInput(f"{role} must return one tensor [N, ...outputs], got {type(outputs).__name__}: {WRAP}")
    if wrong := unusual(outputs):
        raise BadInput(f"{role} must return an ordinary dense tensor, got a {wrong} one")
    if outputs.ndim == 0 or outputs.shape[0] != x.shape[0] or outputs.numel() == 0:
        raise BadInput(
            f"{role} must return [N, ...outputs] with a row for each of the N = {x.shape[0]} samples, "
            f"got shape {tuple(outputs.shape)}"
        )
    if not outputs.is_floating_point():
        raise BadInput(f"{role} must return real numbers, got {outputs.dtype}")
    if not outputs.isfinite().all():
        raise NotFinite(f"{role} returns nan or infinite outputs for these inputs")
    if not first.differentiable:
        raise BadInput(
            f"no output of {role} depends on a trainable parameter: are they detached, or computed without gradients?"
        )
    computed = {id(w): key for key, w in _computed(unwrapped(original), trial)}
    if constant := [computed[id(w)] for w in first.leaves if id(w) in computed]:
        raise BadInput(
            f"{role} uses its attribute {own_name(net, constant[0])!r}, which was computed from parameters earlier and "
            "is no longer a function of them: compute it in forward"
        )
    outside = {id(w) for w in original.parameters()}
    if any(id(w) in outside for w in first.leaves):
        raise BadInput(f"call= or a function in {role} uses {role} itself; it must use the copy that it is given")
    later, again = _later(net, x) or (trial, call(1))
    buffers, parameters = dict(net.named_buffers()), dict(net.named_parameters())
    if started := [key for key, w in later.named_parameters() if not _same(w.detach(), parameters[key].detach())]:
        raise BadInput(f"{role} sets its parameter {own_name(net, started[0])!r} when it is called: call it once first")
    moved = [
        key
        for key, b in later.named_buffers()
        if key in buffers and b.layout not in SPARSE and not _same(b.detach(), buffers[key])
    ]
    # A network that seeds a generator itself always leaves it in the same state.
    states = zip(first.before, first.after, again.after, strict=False)  # the first call may make a generator
    drew = any(a != b and b != c for a, b, c in states)
    if drew and any(layer.training for layer in net.modules()):
        raise BadInput(f"{role} is random: it draws random numbers in train mode: call model.eval() first")
    calls = [again, *(call(seed) for seed in range(2, CALLS))] if drew else [again]
    if any(not _same_outputs(each.outputs, outputs, exactly=bool(moved)) for each in calls):
        if not drew and _same_outputs(call(1).outputs, outputs, exactly=bool(moved)):
            raise BadInput(f"{role} keeps a state that its first call fits to the inputs: call it once first")
        what = (
            f"changes its buffer {own_name(net, moved[0])!r} when it is called"
            if moved
            else "is random or keeps a state"
        )
        raise BadInput(f"{role} {what} (Dropout or spectral normalisation in train mode?): call model.eval() first")
    return outputs


def _later(net: nn.Module, x: Tensor) -> tuple[nn.Module, _Call] | None:
    """A copy of a network and its call on x, after a first call on copies of one sample.

    ``None`` if it does not accept these. A state that is fitted at the first call, as in data-dependent initialisation,
    is fitted to them, and the outputs differ from those of a first call on x.
    """
    copy = copied(net)
    call = functools.partial(_Call, copy, generators=captured.generators(copy))
    try:
        call(x.detach()[:1].expand_as(x).clone(), 0)
        return copy, call(x, 1)
    except Exception:  # a network may raise anything
        return None


def _behaviour(net: nn.Module, x: Tensor, original: nn.Module, *, mixed: bool) -> tuple[tuple[int, ...], bool]:
    """The shape of f(x), after the checks of :func:`_outputs`, and whether samples interact.

    Raises:
        BadInput, OverMemory: as :func:`_outputs`; or the network cannot be differentiated.
    """
    some, outputs = _some_outputs(net, x, "the model", original)
    interact = _interact(net, x, mixed=mixed)
    if interact and len(some) < len(x):
        outputs = _outputs(net, x, "the model", original)
    elif not interact:
        _check_finite(net, x, some, outputs, "the model", original)
    return (len(x), *outputs.shape[1:]), interact


def _some_outputs(net: nn.Module, x: Tensor, role: str, original: nn.Module) -> tuple[Tensor, Tensor]:
    """Some of the samples and f of them, checked by :func:`_outputs`; all samples if the network accepts no fewer.

    Checking only a few bounds the memory.
    """
    few = x[_spread(len(x), TOGETHER)]
    if len(few) < len(x):
        with contextlib.suppress(BadInput):
            return few, _outputs(net, few, role, original)
    return x, _outputs(net, x, role, original)


def _check_finite(net: nn.Module, x: Tensor, some: Tensor, outputs: Tensor, role: str, original: nn.Module) -> None:
    """Check the outputs of all samples after those of ``some``; samples must not interact.

    Raises:
        BadInput: they are not finite, or their shapes differ.
    """
    if len(some) == len(x):
        return
    trial = frozen(copied(net))
    for part in x.split(len(some)):
        try:
            with _seeded(0, x), torch.no_grad():
                found = trial(part.clone())
        except Exception:  # it does not accept this number of samples
            found = None
        if not isinstance(found, Tensor) or found.shape != (len(part), *outputs.shape[1:]):
            _outputs(net, x, role, original)
            return
        if not found.isfinite().all():
            raise NotFinite(f"{role} returns nan or infinite outputs for these inputs")


def _computed(original: nn.Module, copy: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Attributes and buffers of a copy, with their names, that belong to an autograd graph in the original."""
    for (path, layer), own in zip(original.named_modules(), copy.modules(), strict=False):
        for attribute, value in vars(layer).items():
            if attribute not in ("_parameters", "_modules"):
                names = value if attribute == "_buffers" and isinstance(value, dict) else itertools.repeat(attribute)
                others = _tensors(vars(own).get(attribute))
                for name, one, other in zip(names, _tensors(value), others, strict=False):
                    if isinstance(one, Tensor) and isinstance(other, Tensor) and one.grad_fn is not None:
                        yield f"{path}.{name}".lstrip("."), other


def _tensors(value: Any) -> list[Any]:
    return list(value.values()) if isinstance(value, dict) else tree_leaves(value)


def _check_signature(net: nn.Module, role: str) -> None:
    """Refuse a forward that needs more than one input."""
    try:
        taken = inspect.signature(net.forward).parameters.values()
    except (TypeError, ValueError):
        return  # compiled, with a signature that Python does not see
    needed = [p.name for p in taken if p.default is p.empty and p.kind not in (p.VAR_POSITIONAL, p.VAR_KEYWORD)]
    if len(needed) > 1:
        raise BadInput(f"{role} takes {len(needed)} inputs, forward({', '.join(needed)}), but x is one tensor: {WRAP}")


def _precision(net: nn.Module) -> str:
    return str(next(iter(_trainable(net).values())).dtype).removeprefix("torch.")


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal up to rounding, relative to the largest output: kernels round differently for other batch sizes."""
    return a.shape == b.shape and bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** 0.5 * b.abs().max())


def _same_outputs(a: Tensor, b: Tensor, *, exactly: bool) -> bool:
    """Whether two calls agree; ``exactly`` allows only a few roundings, to tell a drifting state from a fixed one."""
    if exactly:
        return a.shape == b.shape and bool((a - b).abs().max() <= 8 * torch.finfo(b.dtype).eps * b.abs().max())
    return _close(a, b)


def _same(a: Tensor, b: Tensor) -> bool:
    """Whether all entries are equal; nan is equal to nan."""
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    a = a.to(b.device)
    return bool(((a == b) | ((a != a) & (b != b))).all())


def _interact(net: nn.Module, x: Tensor, *, mixed: bool) -> bool:
    """Whether some sample's gradients in the batch differ from those of the sample alone.

    A network of mixed precisions is not tested in float64. Gradients that are not finite show nothing: in float64 they
    may be so only there, and certificates refuse others.

    Raises:
        BadInput: the network cannot be differentiated.
    """
    if len(x) == 1:
        return False
    few = x[_spread(len(x), TOGETHER)]
    trials = itertools.product((few, x) if len(few) < len(x) else (x,), (None,) if mixed else (torch.float64, None))
    finite = True
    for inputs, dtype in trials:
        wide = dtype if dtype is not None else next(iter(_trainable(net).values())).dtype
        try:
            with own_settings(str(wide).removeprefix("torch.")), _seeded(0, x):
                at = inputs.to(dtype) if dtype is not None and inputs.is_floating_point() else inputs
                return _gradients_differ(cast(copied(net), dtype), at)
        except Exception as error:  # it may accept no other number of samples, or no other precision
            failed, finite = error, finite and not isinstance(error, NotFinite)
    if not finite:
        return False
    raise BadInput(f"the model cannot be differentiated: {summary(failed)}")


def _gradients_differ(net: nn.Module, x: Tensor) -> bool:
    """Whether gradients in the batch and alone differ; changes the network.

    Raises:
        NotFinite: those in the batch are not finite.
    """
    theta = _trainable(net)
    plain = PlainNetwork(net, theta, owned=True)
    generator = torch.Generator(x.device).manual_seed(0)
    outputs = net(x)
    chosen = _spread(len(x), ALONE)
    v = torch.zeros_like(outputs)
    v[chosen] = certificate.random_weights(v[chosen].numel(), v).reshape(v[chosen].shape)
    eps = max(map(_eps, (outputs, *theta.values())))
    tolerance = max(INTERACTION, eps**0.5)
    for perturbed in (False, True):
        if perturbed:
            plain.load(nudged(w, generator) for w in theta.values())
        try:
            together = flat(plain.gradient(x, v))
        except Exception:
            if perturbed:
                break  # the network is not defined at such weights
            raise
        if not together.isfinite().all():
            if perturbed:
                break
            raise NotFinite("gradients are nan or infinite")
        try:
            alone = sum(flat(plain.gradient(x[i : i + 1], v[i : i + 1])) for i in chosen)
        except Exception:  # it does not accept a single sample, like train-mode BatchNorm
            return True
        if not (together - alone).norm() <= tolerance * together.norm():
            return True
    return False


def _spread(N: int, most: int) -> list[int]:
    """At most ``most`` evenly spaced indices of samples."""
    return sorted({int(i) for i in np.linspace(0, N - 1, min(N, most))})


def _check_same(values: Mapping[str, Tensor], others: Mapping[str, Tensor]) -> None:
    """Refuse a network whose tensors have other names or shapes."""
    shapes, shapes_f = ({k: tuple(w.shape) for k, w in each.items()} for each in (values, others))
    for key in [*shapes, *shapes_f]:
        if shapes.get(key) != shapes_f.get(key):
            raise BadInput(
                f"the two networks must have the same parameters and buffers; {key!r} is "
                f"{shapes.get(key, 'missing')} in the first and {shapes_f.get(key, 'missing')} in the other"
            )


def _values(net: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers except sparse ones, which are constants."""
    found = (*net.named_parameters(), *net.named_buffers())
    return {key: w.detach() for key, w in found if w.layout not in SPARSE}


def _on_host(theta: Mapping[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: to_numpy(w).copy() for key, w in theta.items()}
