"""Anyone's own ``nn.Module`` and inputs as a problem, with what a problem promises checked rather than believed."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.modules.batchnorm import _NormBase
from torch.nn.modules.dropout import _DropoutNd

from ntkbench.errors import BadInput, unknown
from ntkbench.layerwise.layers import owner
from ntkbench.options import DTYPES
from ntkbench.problem import PROBED, Problem

ALONE = 8
"""Samples, evenly spaced, whose outputs alone are compared with their outputs in the batch."""


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
    tensor tied under several names counts once. Everything is copied: training ``model`` further changes nothing, and
    the wrapping changes neither the model nor torch's random state. Norm layers in train mode keep using the batch's
    statistics, without updating their running ones.

    Whether samples interact is measured: f(x) is compared with f of up to 8 samples alone, so train-mode BatchNorm
    counts as interacting and so does a network that cannot take one sample alone.

    Cost: three forward passes at most, and two more for ``model_f``.

    Args:
        model: ``x -> [N, ...outputs]`` with its weights theta_0, in the mode (``train`` or ``eval``) that is meant.
        x: inputs ``[N, ...]``, real or integer; real ones are brought to ``dtype``.
        model_f: the same network with the weights theta_f, for alignment.
        name: of the problem; the class of the model if not given.
        dtype: ``"float32"`` or ``"float64"``, what weights and inputs are kept in; that of the parameters if not given.

    Raises:
        BadInput: the model has no trainable parameters, is random (train-mode Dropout) or changes its buffers when it
            is called, gives anything but finite real outputs with N rows, or ``model_f`` differs from it in more than
            the values of its trainable parameters.
    """
    _check_inputs(x)
    dtype = _dtype(model, dtype)
    net = _snapshot(model, "model", dtype)
    theta_0 = _trainable(net)
    x = x.detach().to(device=_device(theta_0), dtype=getattr(torch, dtype) if x.is_floating_point() else x.dtype)
    outputs = _outputs(net, x)

    weights_f = None
    if model_f is not None:
        net_f = _snapshot(model_f, "model_f", dtype).to(x.device)
        _check_same(net, net_f)
        theta_f = _trainable(net_f)
        with torch.no_grad():
            swapped = functional_call(net, theta_f, (x,))
        if not _close(_outputs(net_f, x), swapped):
            raise BadInput(
                "model_0 with the trainable parameters of model_f does not compute what model_f computes: they must be "
                "one network, in one mode (train or eval)"
            )
        weights_f = _on_host({key: theta_f[key] for key in theta_0})

    return Problem(
        name=name or type(model).__name__,
        module=net,
        x=x.cpu().numpy().copy(),
        theta_0=_on_host(theta_0),
        theta_f=weights_f,
        samples_interact=_interact(net, x, outputs),
        # Known by now; the usual way, meta tensors, is not for networks that make tensors of their own on a device.
        _shape=[tuple(outputs.shape)],
    )


def same_inputs(x1: Tensor, x2: Tensor) -> Tensor:
    """``x2``, if it holds samples of the same kind as ``x1``.

    Raises:
        BadInput: it does not; says in what.
    """
    _check_inputs(x2, "x2")
    if x2.shape[1:] != x1.shape[1:] or x2.is_floating_point() != x1.is_floating_point():
        raise BadInput(
            f"x2 must hold samples like those of x1, [N, {', '.join(map(str, x1.shape[1:]))}] of {x1.dtype}; "
            f"got shape {tuple(x2.shape)} of {x2.dtype}"
        )
    return x2


def on_inputs(problem: Problem, x: Tensor) -> Problem:
    """The same network and weights on other inputs, whose samples must not interact."""
    shape = (len(x), *problem.output_shape[1:])
    return dataclasses.replace(problem, x=x.detach().cpu().numpy(), _shape=[shape])


def last_layer(problem: Problem) -> Problem:
    """The problem with theta the parameters of the module that is called last; all others are frozen at theta_0."""
    net = copy.deepcopy(problem.module)
    own = dict(net.named_parameters())
    with torch.no_grad():
        for key, w in problem.theta_0.items():
            own[key].copy_(torch.from_numpy(w))
    owners: dict[str, list[str]] = {}
    for key in problem.theta_0:
        owners.setdefault(owner(key), []).append(key)
    called: list[str] = []
    for name in owners:
        net.get_submodule(name).register_forward_hook(lambda *_, name=name: called.append(name))
    net(torch.from_numpy(problem.x[:PROBED]).to(next(iter(own.values())).device))
    chosen = owners[called[-1]] if called else []
    fixed = {key: w for key, w in problem.theta_0.items() if key not in chosen}
    theta_0 = {key: problem.theta_0[key] for key in chosen}
    return dataclasses.replace(problem, theta_0=theta_0, theta_f=None, fixed_0={**problem.fixed_0, **fixed}, fixed_f={})


def _check_inputs(x: Tensor, name: str = "x") -> None:
    if not isinstance(x, Tensor):
        raise BadInput(f"{name} must be a torch tensor of inputs [N, ...], got {type(x).__name__}")
    if x.ndim == 0 or x.numel() == 0:
        raise BadInput(f"{name} must hold at least one sample, [N, ...] with N > 0; got shape {tuple(x.shape)}")
    if x.is_complex():
        raise BadInput(f"{name} must be real or integer, got {x.dtype}")


def _dtype(model: nn.Module, dtype: str | None) -> str:
    """The precision to work in, after a look at what kind of thing the model is."""
    if not isinstance(model, nn.Module):
        raise BadInput(f"model must be a torch.nn.Module, got {type(model).__name__}")
    if any(nn.parameter.is_lazy(w) for w in model.parameters()):
        raise BadInput("model has lazy parameters without a shape yet; call it once on the inputs")
    found = sorted({str(w.dtype).removeprefix("torch.") for w in model.parameters() if w.requires_grad})
    if not found:
        raise BadInput("model has no parameters with requires_grad=True, so there is nothing to differentiate by")
    if any(w.is_complex() for w in model.parameters()):
        raise BadInput("model has complex parameters; the NTK here is that of real ones")
    if dtype is not None:
        if dtype not in DTYPES:
            raise unknown("dtype", dtype, DTYPES)
        return dtype
    if len(found) > 1 or found[0] not in DTYPES:
        raise BadInput(
            f"parameters are {', '.join(found)}; choose the precision to compute in, dtype='float32' or 'float64'"
        )
    return found[0]


def _snapshot(model: nn.Module, role: str, dtype: str) -> nn.Module:
    """A copy of the model that is a function of its parameters and inputs alone.

    Raises:
        BadInput: the model cannot be copied, or has train-mode Dropout.
    """
    if not isinstance(model, nn.Module):
        raise BadInput(f"{role} must be a torch.nn.Module, got {type(model).__name__}")
    for where, layer in model.named_modules():
        if isinstance(layer, _DropoutNd) and layer.training and layer.p > 0:
            raise BadInput(f"{role} has Dropout in train mode ({where or 'the model itself'}): call model.eval() first")
    try:
        net = copy.deepcopy(model)
    except RuntimeError as error:  # non-leaf tensors as attributes, as old-style weight_norm leaves them
        raise BadInput(f"{role} cannot be copied: {error}") from error
    net.to(getattr(torch, dtype))
    for layer in net.modules():
        if isinstance(layer, _NormBase) and layer.training and layer.track_running_stats:
            # Updates in place are no part of the function, and torch.func refuses them.
            layer.track_running_stats = False
            layer.running_mean = layer.running_var = layer.num_batches_tracked = None
    return net


def _trainable(net: nn.Module) -> dict[str, Tensor]:
    return {key: w.detach() for key, w in net.named_parameters() if w.requires_grad}


def _device(theta: dict[str, Tensor]) -> torch.device:
    devices = {w.device for w in theta.values()}
    if len(devices) > 1:
        raise BadInput(f"model is spread over {', '.join(sorted(map(str, devices)))}; it must be on one device")
    return devices.pop()


def _outputs(net: nn.Module, x: Tensor) -> Tensor:
    """f(x), checked to be a function of x and to have a row a sample.

    Raises:
        BadInput: it is not, or has not.
    """
    before = {key: b.clone() for key, b in net.named_buffers()}
    outputs, again = (_seeded(net, x, seed) for seed in (0, 1))
    if not isinstance(outputs, Tensor):
        raise BadInput(f"the model must return one tensor [N, ...outputs], got {type(outputs).__name__}")
    if outputs.ndim == 0 or outputs.shape[0] != x.shape[0] or outputs.numel() == 0:
        raise BadInput(
            f"the model must return [N, ...outputs] with a row for each of the N = {x.shape[0]} samples, "
            f"got shape {tuple(outputs.shape)}"
        )
    if not outputs.is_floating_point():
        raise BadInput(f"the model must return real numbers, got {outputs.dtype}")
    if not outputs.isfinite().all():
        raise BadInput("the model returns nan or infinite outputs for these inputs")
    moved = [key for key, b in net.named_buffers() if not torch.equal(b, before[key])]
    if moved or again.shape != outputs.shape or not _close(again, outputs):
        what = f"changes its buffer {moved[0]!r} when it is called" if moved else "is random"
        raise BadInput(f"the model {what} (Dropout or spectral normalisation in train mode?): call model.eval() first")
    return outputs


def _seeded(net: nn.Module, x: Tensor, seed: int) -> Tensor:
    with torch.no_grad(), torch.random.fork_rng(devices=[x.device] if x.is_cuda else []):
        torch.manual_seed(seed)
        return net(x)


def _close(a: Tensor, b: Tensor) -> bool:
    """Equal but for rounding, measured by the largest output: kernels round differently for other batch sizes."""
    return bool((a - b).abs().max() <= torch.finfo(b.dtype).eps ** 0.5 * b.abs().max())


def _interact(net: nn.Module, x: Tensor, outputs: Tensor) -> bool:
    """Whether some sample's outputs are others in the batch than alone."""
    N = len(x)
    if N == 1:
        return False
    for i in sorted({int(i) for i in np.linspace(0, N - 1, min(N, ALONE))}):
        try:
            alone = _seeded(net, x[i : i + 1], 0)
        except (RuntimeError, ValueError, IndexError, AssertionError):
            return True  # it cannot take one sample alone, as train-mode BatchNorm cannot
        if alone.shape != outputs[i : i + 1].shape or not (alone - outputs[i]).isfinite().all():
            return True
        if (alone - outputs[i]).abs().max() > torch.finfo(outputs.dtype).eps ** 0.5 * outputs.abs().max():
            return True
    return False


def _check_same(net: nn.Module, net_f: nn.Module) -> None:
    """Refuse two networks that differ in more than the values of their trainable parameters."""
    shapes, shapes_f = ({k: tuple(w.shape) for k, w in _trainable(m).items()} for m in (net, net_f))
    for key in [*shapes, *shapes_f]:
        if shapes.get(key) != shapes_f.get(key):
            raise BadInput(
                f"model_0 and model_f must have the same trainable parameters; {key!r} is "
                f"{shapes.get(key, 'missing')} in model_0 and {shapes_f.get(key, 'missing')} in model_f"
            )
    fixed, fixed_f = dict(_fixed(net)), dict(_fixed(net_f))
    for key in [*fixed, *fixed_f]:
        if key not in fixed or key not in fixed_f or not torch.equal(fixed[key], fixed_f[key].to(fixed[key].device)):
            raise BadInput(
                f"model_0 and model_f must differ in nothing but trainable parameters, and {key!r} (a buffer, such as "
                "BatchNorm's running statistics, or a frozen parameter) differs"
            )


def _fixed(net: nn.Module) -> Iterator[tuple[str, Tensor]]:
    yield from net.named_buffers()
    yield from ((key, w.detach()) for key, w in net.named_parameters() if not w.requires_grad)


def _on_host(theta: dict[str, Tensor]) -> dict[str, np.ndarray]:
    return {key: w.cpu().numpy().copy() for key, w in theta.items()}
