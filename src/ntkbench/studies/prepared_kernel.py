"""The cost of a kernel through the public API: first, later and prepared calls, in turn with the computation inside.

A first call checks, copies and traces the network; a later call reuses the trace of an equal network; a prepared call
is one of a :class:`ntkbench.Kernel`. All of them run the same engine. The alternatives are what a user would write
instead: the contraction of per-sample Jacobians from torch.func's tutorial, and, for fully connected networks, products
of the layers' inputs, recorded by hooks, with the gradients of their outputs.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from pydantic import Field, PositiveInt

from ntkbench import methods, operators, problems
from ntkbench.api import ntk
from ntkbench.kernel import Kernel
from ntkbench.measure import timing
from ntkbench.measure.schema import ProblemLabel, Strict
from ntkbench.options import Target
from ntkbench.studies import base

if TYPE_CHECKING:
    from torch import Tensor, nn

TIMED = True
PLUGINS = (
    methods.REGISTRY.module("structured_derivatives"),
    *sorted({problems.REGISTRY.module(name) for name in problems.REGISTRY.found()}),
)
RATIOS = {
    "prepared": ("engine",),
    "first": ("textbook", "hooks"),
    "later": ("textbook", "hooks"),
}
"""The functions that each kind of call is compared with."""


class Case(Strict):
    """A network and its inputs.

    Attributes:
        problem: its label.
        calls: calls of each function, instead of the study's.
    """

    problem: ProblemLabel
    calls: PositiveInt | None = None


# Not validated while this file is imported: that would import all problems.
CASES = [
    Case.model_construct(problem="fc_relu[N=16,O=1,width=32,depth=2]", calls=None),
    Case.model_construct(problem="digits_mlp[N=64]", calls=None),
    Case.model_construct(problem="fc_relu[N=64,width=256,depth=2]", calls=None),
    Case.model_construct(problem="mlp_hazelden[N=16]", calls=None),
    Case.model_construct(problem="digits_conv[N=64]", calls=None),
    Case.model_construct(problem="resnet18", calls=5),
]


class Settings(base.Settings):
    """The networks, and the number of calls.

    Attributes:
        cases: networks with their inputs.
        calls: calls of each function, made in turn.
    """

    USES = (*base.OF_TARGET, "calls")

    calls: PositiveInt = 20
    cases: list[Case] = Field(default=CASES, min_length=1)


def run(settings: Settings) -> pd.DataFrame:
    """One row for each network: seconds of each function that computes its kernel, and their ratios."""
    return base.table(
        base.row({"problem": case.problem}, functools.partial(_measure, settings, case)) for case in settings.cases
    )


def _measure(settings: Settings, case: Case) -> dict[str, Any]:
    problem, target, rounds = problems.load(case.problem), settings.target(), case.calls or settings.calls
    settings.limits.check_memory(2 * problem.n * problem.P * target.itemsize)  # the textbook function materialises J
    network, parameters, x = operators.torch_network(problem, "theta_0", target)
    ways = _ways(_with_values(network, parameters), x, target)
    # The first call of each is a warm-up, and gives its result.
    made = {name: way().double().cpu().numpy() for name, way in ways.items()}
    calls = [functools.partial(_finished, way) for way in ways.values()]
    seconds = dict(zip(ways, timing.in_turn(calls, rounds), strict=True))
    columns: dict[str, Any] = {}
    for name, own in seconds.items():
        columns |= timing.quartiles(f"{name}_seconds", own)
    for name, rivals in RATIOS.items():
        for rival in rivals:
            if rival in seconds:
                ratios = [a / b for a, b in zip(seconds[name], seconds[rival], strict=True)]
                columns |= timing.quartiles(f"{name}_over_{rival}", ratios)
    exact = made["textbook"]
    difference = max(np.linalg.norm(each - exact) for each in made.values()) / np.linalg.norm(exact)
    return {**base.sizes(problem), **columns, "difference": difference, "calls": rounds}


def _ways(network: nn.Module, x: Tensor, target: Target) -> dict[str, Callable[[], Tensor]]:
    """Functions that compute Theta ``[n, n]`` of a network, by name."""
    from ntkbench.layerwise import reuse

    kernel = Kernel(network, x, memory=target.memory)
    later = functools.partial(ntk, network, x, memory=target.memory)

    def first() -> Tensor:
        reuse.forget()
        return later()

    (traced,) = methods.get("structured_derivatives").prepare(kernel.problem, target).ends("trace")
    ways: dict[str, Callable[[], Tensor]] = {
        "engine": functools.partial(traced.engine.kernel, traced.parameters, traced.x),
        "prepared": kernel.ntk,
        "later": later,
        "first": first,
        "textbook": functools.partial(by_contraction, network, x),
    }
    if _is_fully_connected(network):
        ways["hooks"] = functools.partial(by_hooks, network, x)
    return ways


def by_contraction(network: nn.Module, x: Tensor) -> Tensor:
    """Theta ``[n, n]`` as torch.func's tutorial on NTKs computes it: J of every sample, contracted."""
    import torch
    from torch.func import functional_call, jacrev, vmap

    parameters = {name: w.detach() for name, w in network.named_parameters()}
    jacobian = jacrev(lambda w, one: functional_call(network, w, (one[None],)).reshape(-1))
    rows = [j.flatten(2) for j in vmap(jacobian, (None, 0))(parameters, x).values()]
    return torch.stack([torch.einsum("aif,bjf->aibj", j, j) for j in rows]).sum(0).flatten(2).flatten(0, 1)


def by_hooks(network: nn.Module, x: Tensor) -> Tensor:
    """Theta ``[n, n]`` of linear layers and elementwise functions: gradients times inputs recorded by hooks."""
    import torch
    from torch import nn

    taken: list[tuple[nn.Linear, Tensor, Tensor]] = []

    def take(layer: nn.Module, given: tuple[Tensor, ...], made: Tensor) -> None:
        assert isinstance(layer, nn.Linear)
        taken.append((layer, given[0].detach(), made))

    hooks = [layer.register_forward_hook(take) for layer in network.modules() if isinstance(layer, nn.Linear)]
    try:
        outputs = network(x)
    finally:
        for hook in hooks:
            hook.remove()
    n = outputs.numel()
    total = outputs.new_zeros(n, n)
    made = [after for _, _, after in taken]
    # Samples are independent, so that the gradient of a sum over samples contains the gradient of each one.
    back = [torch.autograd.grad(column.sum(), made, retain_graph=True) for column in outputs.T]
    for (layer, before, _), gradients in zip(taken, zip(*back, strict=True), strict=True):
        rows = torch.stack(gradients, 1).flatten(0, 1)
        inner = before @ before.T + (layer.bias is not None)
        outer = (rows @ rows.T).reshape(len(x), -1, len(x), outputs.shape[1])
        total += (outer * inner[:, None, :, None]).reshape(n, n)
    return total


def _with_values(network: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a network with the given values of its parameters."""
    network = copy.deepcopy(network)
    own = dict(network.named_parameters())
    for name, value in parameters.items():
        own[name].requires_grad_().data.copy_(value)
    return network


def _is_fully_connected(network: nn.Module) -> bool:
    from torch import nn

    return all(isinstance(layer, nn.Linear | nn.Sequential | nn.ReLU) for layer in network.modules())


def _finished(way: Callable[[], Tensor]) -> float:
    return float(way()[-1, -1])
