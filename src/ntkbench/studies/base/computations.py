"""Computations other than methods that are compared: blocks of products with the Jacobian, and a blog's recipe."""

from __future__ import annotations

import functools
from collections.abc import Callable

from ntkbench import methods
from ntkbench.operators import JacobianOperator, linearise, torch_network
from ntkbench.operators.recurrent.cells import declared
from ntkbench.options import Target
from ntkbench.problems import Problem

BLOCK, PROBES = 64, 50


def _block(
    problem: Problem, target: Target, product: str, linearised: Callable[..., JacobianOperator]
) -> Callable[[], float]:
    """A block of products with the Jacobian, after the forward pass."""
    j = linearised(problem, "theta_0", target)
    rows = j.rng(0).sign(BLOCK, j.n if product == "vjp" else j.P)
    return lambda: float(getattr(j, product)(rows)[-1, -1])


def _block_by_trial(problem: Problem, target: Target) -> Callable[[], float]:
    """A block of JVPs, each with a separate tangent for each trial."""
    j = linearise(problem, "theta_0", target)
    tangents = j.rng(0).sign(BLOCK * j.N, j.P).reshape(BLOCK, j.N, j.P)
    return lambda: float(j.sample_jvp(slice(0, j.N), tangents)[-1, -1, -1])


def _by_torch_func(problem: Problem, weights: str, target: Target) -> JacobianOperator:
    """J by automatic differentiation, even if the network has explicit derivatives."""
    from ntkbench.operators import torch as autodiff

    return autodiff.linearise(problem, weights, target)


def _alignment(problem: Problem, target: Target) -> Callable[[], float]:
    """The alignment that the blog on recurrent models computes, by ntkbench."""
    method = methods.get("shared_probe_alignment")
    prepared = method.prepare(problem, target)
    return lambda: float(method.estimate(prepared, "alignment", 4 * PROBES))


def _alignment_by_torch_func(problem: Problem, target: Target) -> Callable[[], float]:
    """The same recipe as its authors run it: vmapped VJPs and JVPs of the states of torch's own layer."""
    import torch
    from torch.func import functional_call, jvp, vjp, vmap

    recurrence = declared(problem.module)
    (_, theta_0, x), (_, theta_f, _) = (torch_network(problem, end, target) for end in ("theta_0", "theta_f"))
    kind = {"rnn": torch.nn.RNN, "gru": torch.nn.GRU}[recurrence.kind]
    layer = kind(x.shape[-1], problem.output_shape[-1], batch_first=True).to(x)

    def theta(u: torch.Tensor, parameters: dict[str, torch.Tensor]) -> torch.Tensor:
        weights = {f"{role}_l0": parameters[name] for role, name in recurrence.names.items()}
        forward = lambda weights: functional_call(layer, weights, (x,))[0]  # noqa: E731
        pullback = vjp(forward, weights)[1]
        return vmap(lambda probe: jvp(forward, (weights,), pullback(probe))[1])(u)

    @torch.backends.cudnn.flags(enabled=False, allow_tf32=False)  # cuDNN has no forward mode
    def run() -> float:
        generator = torch.Generator(x.device).manual_seed(0)
        drawn = torch.randn(problem.n, PROBES, generator=generator, dtype=x.dtype, device=x.device)
        u = torch.linalg.qr(drawn)[0].T.reshape(PROBES, *problem.output_shape)
        theta_u, theta_f_u = theta(u, theta_0), theta(u, theta_f)
        return float((theta_u * theta_f_u).sum() / (theta_u.norm() * theta_f_u.norm()))

    return run


COMPUTATIONS: dict[str, Callable[[Problem, Target], Callable[[], float]]] = {
    "64 VJPs": functools.partial(_block, product="vjp", linearised=linearise),
    "64 JVPs": functools.partial(_block, product="jvp", linearised=linearise),
    "64 JVPs, a tangent for each trial": _block_by_trial,
    "64 VJPs by torch.func": functools.partial(_block, product="vjp", linearised=_by_torch_func),
    "64 JVPs by torch.func": functools.partial(_block, product="jvp", linearised=_by_torch_func),
    "alignment by 50 probes": _alignment,
    "alignment by 50 probes by torch.func": _alignment_by_torch_func,
}
"""Functions from a problem and a target to the timed region, by name."""
