"""neural-tangents' programs and ours, and their costs: operations (counted without running), seconds, memory."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from ntkbench import operators
from ntkbench.errors import OverMemory, Unavailable
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.layerwise.tuning import Tuning
from ntkbench.measure import outcomes, timing
from ntkbench.measure.limits import Limits
from ntkbench.operators import torch_network
from ntkbench.operators.programs import check_bytes, compiled, kernel_function, lower, needed_bytes
from ntkbench.operators.programs import flops as flops
from ntkbench.options import Target
from ntkbench.problem import Problem

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

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

Forward = Callable[[Mapping[str, Any], Any], Any]


def program(name: str, forward: Forward) -> Callable[[Any, Any], Any]:
    """The whole kernel ``[N, N, O, O]`` by an implementation, or the Jacobian alone, as a function of weights and x."""
    import jax

    if name == "jacobian":

        def of_one(weights: Any, x: Any) -> Any:
            return jax.jacrev(lambda w: forward(w, x[None])[0])(weights)

        return lambda weights, x: jax.vmap(of_one, in_axes=(None, 0))(weights, x)
    return kernel_function(forward, IMPLEMENTATIONS[name])


def lowered(name: str, forward: Forward, weights: Mapping[str, tuple[int, ...]], x: tuple[int, ...]) -> Any:
    """The uncompiled program for these shapes, in float32 throughout; nothing is computed or allocated."""
    import jax

    shapes = {key: jax.ShapeDtypeStruct(shape, "float32") for key, shape in weights.items()}
    return lower(program(name, forward), shapes, jax.ShapeDtypeStruct(x, "float32"))


def torch_flops(call: Callable[[], Any]) -> float:
    """Floating-point operations of matrix products and convolutions in a call, by torch's counter."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        call()
    return float(counter.get_total_flops())


def engine_flops(module: nn.Module, x: np.ndarray) -> float:
    """Operations of matrix products and convolutions of our whole layerwise kernel, as one block of rows.

    One sample's forward pass is run to trace the network; the kernel itself is not, and nothing of its size is
    allocated: its program runs on torch's fake tensors, which have shapes and no entries. As for the lowered programs,
    there is no memory limit; a kernel in blocks would repeat the passes of its columns for each block.
    """
    from torch._subclasses.fake_tensor import FakeTensorMode

    target = Target("torch", device="cpu", memory=sys.maxsize)
    kernel, parameters, inputs = engine(module, x, target, Tuning(certified=False, columns=sys.maxsize))
    kernel.passes([parameters], inputs)  # traces the program here, so that the counter does not count it
    mode = FakeTensorMode(allow_non_fake_inputs=True)  # buffers that the traced graph refers to
    shapes, inputs = [mode.from_tensor(w) for w in parameters], mode.from_tensor(inputs)
    with mode:
        return torch_flops(lambda: kernel.kernel(shapes, inputs))


def engine(
    module: nn.Module, x: np.ndarray, target: Target, tuning: Tuning | None = None
) -> tuple[Any, list[Any], Any]:
    """Our layerwise kernel of a network, its parameters and inputs, on the target's device."""
    weights = {name: w.detach().numpy() for name, w in module.named_parameters()}
    module, parameters, inputs = torch_network(Problem("network", module, x, weights), "theta_0", target)
    kernel = LayerwiseKernel(module, parameters, inputs, target.memory, tuning)
    return kernel, list(parameters.values()), inputs


def timed_program(
    made: Any, weights: Mapping[str, np.ndarray], x: np.ndarray, target: Target, limits: Limits, calls: int
) -> dict[str, Any]:
    """Columns of seconds (without compiling) and ``memory_bytes`` of a lowered program.

    The program is compiled, which gives its memory, before its memory and its operations are compared with the limits.
    If it is over one of them, it is not run: its columns are ``memory_bytes``, ``status`` and ``reason``.
    """
    import jax

    from ntkbench.operators import jax as backend

    executable = compiled(made)
    needed = needed_bytes(executable)
    memory = {"memory_bytes": float(needed)}
    try:
        check_bytes(needed, limits.memory_bytes, "the program")
        limits.check_operations(flops(made))
    except (OverMemory, Unavailable) as error:
        return memory | outcomes.of_exception(error).columns()
    weights, x = jax.device_put((weights, x), backend.device(target))

    def call() -> None:
        jax.block_until_ready(executable(weights, x))

    return {**timing.timed(call, calls).columns(), **memory}


def timed_engine(module: nn.Module, x: np.ndarray, target: Target, calls: int) -> dict[str, Any]:
    """The same columns for our layerwise kernel; memory is the peak increase of a call plus its arguments.

    On a GPU, memory is the peak of all allocations there, among them the arguments.
    """
    kernel, parameters, inputs = engine(module, x, target)

    def call() -> float:
        return float(kernel.kernel(parameters, inputs).sum())

    columns = timing.timed(call, calls).columns()
    memory = timing.peak_bytes_on(target, call)  # not of the first call: tracing takes more
    if memory is not None and operators.device_memory(target) is None:
        memory += sum(w.numel() * w.element_size() for w in (*parameters, inputs))
    return columns | {"memory_bytes": memory}
