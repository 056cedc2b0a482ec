"""K-FAC: J^T J by one Kronecker product for each layer, through curvlinops."""

from __future__ import annotations

import collections
import functools
import importlib.util
from typing import Any

from ntkbench import errors, metrics
from ntkbench.estimate import Estimate
from ntkbench.methods.base import Method, kronecker
from ntkbench.operators import torch_network
from ntkbench.options import Target
from ntkbench.problem import Problem

INSTALL = "einconv einops linear_operator opt-einsum && pip install --no-deps curvlinops-for-pytorch"
"""Packages to install. BackPACK is left out: only curvlinops' experimental module uses it, and it needs torchvision."""


class KFAC(Method):
    """The metrics of ⊕_l A_l ⊗ B_l, which approximates J^T J; trace and norm of J^T J are those of Theta.

    A_l = (1 / (N S)) sum a a^T is the mean over samples and the S positions of a layer's inputs a, with a one appended
    for the bias. B_l = sum g g^T is the sum over samples, positions and outputs of its cotangents g. This is
    K-FAC-expand for the type-2 Fisher matrix of half the squared error. K-FAC treats A_l and B_l as independent and
    different layers as orthogonal, so every metric is biased, including the trace if the norms of inputs and of
    cotangents are correlated. The alignment is that of the two approximations. Only Linear and Conv2d layers are
    supported. Each must be called once, with the samples along the first axis of its input.

    O passes for each set of weights.
    """

    title = "K-FAC"
    kind = "approximate"
    computes = "K-FAC's approximation of J^T J"
    source = (
        "Martens and Grosse 2015 (arXiv 1503.05671); Grosse and Martens 2016 (arXiv 1602.01407); curvlinops 3 (Dangel "
        "et al. 2025, arXiv 2501.19183)"
    )
    use_when = "you study K-FAC itself, or have the factors anyway, and a bias is acceptable"
    passes_formula = "O"
    backends = ("torch",)
    needs_independent_samples = True
    needs_one_network = True
    prepares = ""

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        if reason is None and importlib.util.find_spec("curvlinops") is None:
            return "curvlinops is not installed"
        return reason or _not_covered(problem)

    def passes_needed(self, problem: Problem, metric: str, target: Target) -> float:
        return problem.output_shape[-1] * len(metrics.parameter_sets(metric))

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The factors, in their own precision and in float64."""
        return len(metrics.parameter_sets(metric)) * (target.itemsize + 8) * kronecker.entries(problem.theta_0)

    def prepare(self, problem: Problem, target: Target) -> dict[str, Any]:
        """The network at each set of weights with its inputs.

        Raises:
            Unavailable: curvlinops is not installed, or the device is not available.
            Unsupported: a layer is not called once, with the samples along the first axis of its input.
        """
        errors.need("curvlinops", "kfac", INSTALL)
        names = ("theta_0",) if problem.theta_f is None else ("theta_0", "theta_f")
        return {name: _network(problem, name, target) for name in names}

    def estimate(self, prepared: dict[str, Any], metric: str, passes: int | None = None, seed: int = 0) -> Estimate:
        names = metrics.parameter_sets(metric)
        factors = [_factors(*prepared[name]) for name in names]
        moments = kronecker.moments(factors[0], factors[-1])
        outputs = prepared["theta_0"][2]
        return Estimate.of_moments(metric, moments, float(outputs * len(names)), self.name, kernel=self.computes)


def _not_covered(problem: Problem) -> str | None:
    """Why K-FAC has no rule for a problem's network; ``None`` if it has one."""
    from torch import nn

    if len(problem.output_shape) != 2:
        return f"takes one vector of outputs per sample, and these are {list(problem.output_shape[1:])}"
    names: dict[int, str] = {}
    for name, w in problem.network.named_parameters(remove_duplicate=False):
        first = names.setdefault(id(w), name)
        if first != name and first in problem.theta_0:
            return f"treats each layer separately, and {first} is also {name}"
    for name, module in problem.network.named_modules():
        own = [f"{name}.{key}" if name else key for key, _ in module.named_parameters(recurse=False)]
        trained = [key for key in own if key in problem.theta_0]
        grouped = isinstance(module, nn.Conv2d) and module.groups > 1
        if trained and (grouped or type(module) not in (nn.Linear, nn.Conv2d)):
            return f"has rules for Linear and ungrouped Conv2d only, and {trained[0]} is of {type(module).__name__}"
        if trained and isinstance(module, nn.Conv2d) and module.padding_mode != "zeros":
            return f"has a rule for padding with zeros only, and that of {trained[0]} is {module.padding_mode}"
        for key in trained:
            if key.rpartition(".")[2] not in ("weight", "bias"):
                return f"has rules for weights and biases only, and {key} is neither"
    return None


def _network(problem: Problem, weights: str, target: Target) -> tuple[Any, Any, int]:
    """The module with its values, its inputs and O.

    Raises:
        Unsupported: see :func:`_check_calls`.
    """
    from ntkbench.modules import copied, load  # imports torch

    module, values, x = torch_network(problem, weights, target)
    module = load(copied(module), values).requires_grad_(False)
    for name, w in module.named_parameters():
        w.requires_grad_(name in values)
    _check_calls(module, x)
    return module, x, problem.output_shape[-1]


def _check_calls(module: Any, x: Any) -> None:
    """Run a network once to see how it uses its layers.

    Raises:
        Unsupported: a layer is not called once, with the samples along the first axis of its input, or its parameters
            have another use.
    """
    import torch

    calls: dict[str, list[int]] = {}
    own: dict[str, list[Any]] = {}
    hooks: list[Any] = []

    def noted(name: str, layer: Any, inputs: tuple[Any, ...]) -> None:
        calls[name].append(len(inputs[0]) if inputs else 0)

    for name, layer in module.named_modules():
        if trained := [w for w in layer.parameters(recurse=False) if w.requires_grad]:
            own[name], calls[name] = trained, []
            hooks.append(layer.register_forward_pre_hook(functools.partial(noted, name)))
    with torch.enable_grad():
        uses = _uses(module(x).grad_fn)
    for hook in hooks:
        hook.remove()
    for name, trained in own.items():
        if calls[name] != [len(x)] or any(uses[id(w)] != 1 for w in trained):
            raise errors.Unsupported(
                f"takes layers that are used in one call, with the samples along the first axis; {name or 'this one'} "
                "is not"
            )


def _uses(last: Any) -> collections.Counter[int]:
    """How often each parameter, by its id, is used in a graph of autograd."""
    found, nodes, left = collections.Counter[int](), set[Any](), [last]
    while left:
        node = left.pop()
        if node is not None and node not in nodes:
            nodes.add(node)
            before = [each for each, _ in node.next_functions]
            found.update(id(each.variable) for each in before if hasattr(each, "variable"))
            left.extend(before)
    return found


def _factors(module: Any, x: Any, outputs: int) -> list[kronecker.Factors]:
    """A_l and B_l of each layer, in float64."""
    import torch
    from curvlinops import FisherType, KFACLinearOperator

    parameters = [w for w in module.parameters() if w.requires_grad]
    operator = KFACLinearOperator(
        module,
        torch.nn.MSELoss(reduction="sum"),
        parameters,
        [(x, x.new_zeros(len(x), outputs))],
        check_deterministic=False,
        fisher_type=FisherType.TYPE2,
        num_per_example_loss_terms=1,
        separate_weight_and_bias=False,
        num_data=len(x),
    )
    operator.compute_kronecker_factors()
    state = operator.state_dict()
    inputs, cotangents = state["input_covariances"], state["gradient_covariances"]
    one = x.new_ones(1, 1, dtype=torch.float64)  # the input of a bias without a weight
    # The Hessian of the squared error is 2.
    return [(inputs.get(name, one).double(), cotangents[name].double() / 2) for name in sorted(cotangents)]
