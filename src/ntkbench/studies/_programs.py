"""neural-tangents' programs and ours, and what they take: operations and memory by the compiler, without running."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

from ntkbench.jacobian import torch_network
from ntkbench.neural_tangents.compat import load
from ntkbench.problems.base import Definition, Problem
from ntkbench.structured.kernel import LayerwiseKernel
from ntkbench.target import Target

IMPLEMENTATIONS = {
    "nt_jacobian_contraction": "JACOBIAN_CONTRACTION",
    "nt_ntk_vector_products": "NTK_VECTOR_PRODUCTS",
    "nt_structured_derivatives": "STRUCTURED_DERIVATIVES",
}
TITLES = {
    "nt_jacobian_contraction": "neural-tangents Jacobian contraction",
    "nt_ntk_vector_products": "neural-tangents NTK-vector products",
    "nt_structured_derivatives": "neural-tangents structured derivatives",
    "structured_derivatives": "structured derivatives",
    "jacobian": "Jacobian alone",
}
PLUGINS = ("ntkbench.methods.structured_derivatives",)

Forward = Callable[[Mapping[str, Any], Any], Any]


def program(name: str, forward: Forward) -> Callable[[Any, Any], Any]:
    """The whole kernel ``[N, N, O, O]`` by an implementation, or the Jacobian alone, as a function of weights and x."""
    import jax

    if name == "jacobian":

        def of_one(weights: Any, x: Any) -> Any:
            return jax.jacrev(lambda w: forward(w, x[None])[0])(weights)

        return lambda weights, x: jax.vmap(of_one, in_axes=(None, 0))(weights, x)
    nt = load()
    kernel = nt.empirical_ntk_fn(
        forward, trace_axes=(), vmap_axes=0, implementation=nt.NtkImplementation[IMPLEMENTATIONS[name]]
    )
    return lambda weights, x: kernel(x, None, weights)


def lowered(name: str, forward: Forward, weights: Mapping[str, tuple[int, ...]], x: tuple[int, ...]) -> Any:
    """The uncompiled program for these shapes, in float32; nothing is computed or allocated."""
    import jax

    shapes = {key: jax.ShapeDtypeStruct(shape, "float32") for key, shape in weights.items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # deprecations in an archived package
        return jax.jit(program(name, forward)).lower(shapes, jax.ShapeDtypeStruct(x, "float32"))


def flops(made: Any) -> float:
    """Floating-point operations of a lowered program, by XLA's cost analysis."""
    analysis = made.cost_analysis()
    return float((analysis[0] if isinstance(analysis, list) else analysis)["flops"])


def torch_flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions in a call, by torch's counter; the call is run."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def needed_bytes(compiled: Any) -> float:
    """Bytes that a compiled program takes: arguments, results and what it holds in between."""
    sizes = compiled.memory_analysis()
    return float(sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes)


def engine(definition: Definition, target: Target) -> tuple[Any, list[Any], Any]:
    """Our kernel of a network by layers, its parameters and inputs, on the target's device."""
    weights = {name: w.detach().numpy() for name, w in definition.module.named_parameters()}
    problem = Problem("network", definition.module, definition.x, weights)
    module, parameters, x = torch_network(problem, "theta_0", target)
    return LayerwiseKernel(module, parameters, x, target.memory), list(parameters.values()), x
