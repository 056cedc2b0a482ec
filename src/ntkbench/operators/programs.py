"""XLA programs whose operations and memory are known before they run, including neural-tangents' kernels.

A JAX function is lowered for the shapes of its arguments (:func:`lower`), which gives its operations (:func:`flops`),
and then compiled (:func:`compile_within`), which gives its memory (:func:`needed_bytes`). A program over its budget is
refused before it allocates anything. Only the functions import JAX.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkbench.ambient import own_jax_settings
from ntkbench.errors import Missing, OverMemory
from ntkbench.operators.neural_tangents import load
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    import jax

FREE_SHARE = 0.8
"""Share of a device's free memory that a program may take without a budget."""


def kernel_function(
    forward: Callable[[Any, Any], Any],
    implementation: str,
    trace_axes: tuple[int, ...] = (),
    diagonal_axes: tuple[int, ...] = (),
) -> Callable[..., Any]:
    """A kernel of a network by neural-tangents, ``(weights, x1, x2) -> [N1, N2, O, O]``; without x2 it is that of x1.

    Args:
        forward: the network, ``(weights, x) -> [N, ...outputs]``; samples must not interact.
        implementation: a name in ``neural_tangents.NtkImplementation``.
        trace_axes: axes of ``[N, O]`` over which the kernel is averaged; neural-tangents divides the trace by the size.
        diagonal_axes: axes of ``[N, O]`` of which only the diagonal is kept.

    Raises:
        Missing: neural-tangents is not installed.
    """
    neural_tangents = load()
    kernel = neural_tangents.empirical_ntk_fn(
        lambda weights, x: forward(weights, x).reshape(x.shape[0], -1),
        trace_axes=trace_axes,
        diagonal_axes=diagonal_axes,
        vmap_axes=0,
        implementation=neural_tangents.NtkImplementation[implementation],
    )
    return lambda weights, x1, x2=None: kernel(x1, x2, weights)


LONGEST_SCAN = 8
"""Steps of the longest recurrence for which structured derivatives are compiled; compiling takes O(T^2)."""


def scan_too_long(problem: Problem) -> str | None:
    """Why structured derivatives do not suit a JAX network with a long recurrence; ``None`` if they do."""
    steps = longest_scan(problem)
    if steps > LONGEST_SCAN:
        return f"unrolls lax.scan and compiles in O(T^2): T = {steps} here, at most {LONGEST_SCAN}"
    return None


def longest_scan(problem: Problem) -> int:
    """Steps of the longest ``lax.scan`` in a problem's JAX network (nested ones multiplied), 1 if there is none.

    From shapes alone: the network is traced, and nothing is computed. It is 1 if the network cannot be traced.
    """
    weights = {**problem.fixed_0, **problem.theta_0}
    shapes = tuple((key, w.shape, w.dtype.name) for key, w in weights.items())
    return _longest_scan(problem.jax_forward, shapes, (problem.x.shape, problem.x.dtype.name))


@functools.lru_cache(maxsize=64)
def _longest_scan(
    forward: Callable[[Mapping[str, Any], Any], Any], weights: tuple[Any, ...], x: tuple[Any, ...]
) -> int:
    import jax

    reals = [dtype for *_, dtype in weights if np.issubdtype(dtype, np.floating)]
    with own_jax_settings("float64" if "float64" in reals else "float32"):
        try:
            like = {key: jax.ShapeDtypeStruct(*array) for key, *array in weights}
            return _steps(jax.make_jaxpr(forward)(like, jax.ShapeDtypeStruct(*x)).jaxpr)
        except Exception:  # a method that cannot trace it either says why
            return 1


def _steps(jaxpr: Any) -> int:
    from jax.extend.core import jaxprs_in_params

    longest = 1
    for equation in jaxpr.eqns:
        inner = max(map(_steps, jaxprs_in_params(equation.params)), default=1)
        longest = max(longest, inner * (equation.params["length"] if equation.primitive.name == "scan" else 1))
    return longest


def lower(function: Callable[..., Any], *arguments: Any) -> jax.stages.Lowered:
    """The uncompiled program of a function for the shapes of its arguments; nothing is computed or allocated.

    Matrix products are in full float32, never in TF32.

    Args:
        function: a function of pytrees of JAX arrays.
        arguments: arrays, or ``jax.ShapeDtypeStruct`` in their place.
    """
    import jax

    with jax.default_matmul_precision("highest"), warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # neural-tangents is archived
        return jax.jit(function).lower(*arguments)


def flops(lowered: jax.stages.Lowered) -> float:
    """Floating-point operations of a lowered program, by XLA's cost analysis.

    Raises:
        Missing: this version of JAX gives no such analysis.
    """
    analysis = lowered.cost_analysis()
    analysis = analysis[0] if isinstance(analysis, list) and analysis else analysis  # a list in some versions of JAX
    if not analysis or "flops" not in analysis:
        raise Missing("XLA's cost analysis gives no floating-point operations for this program")
    return float(analysis["flops"])


def needed_bytes(compiled: jax.stages.Compiled) -> int:
    """Bytes that a compiled program takes: arguments, results and temporaries.

    Raises:
        Missing: the device's compiler gives no such analysis.
    """
    sizes = compiled.memory_analysis()
    if sizes is None:
        raise Missing("XLA's memory analysis gives no sizes for this program")
    return sizes.temp_size_in_bytes + sizes.argument_size_in_bytes + sizes.output_size_in_bytes


def memory_limit(device: jax.Device, target: Target, result: int = 0) -> int:
    """Bytes that one program may take: ``target.program_memory``, or 80 % of the free memory of the device.

    Args:
        device: where the program runs.
        target: the limit.
        result: bytes of a result that ``program_memory`` does not count.
    """
    if target.program_memory is not None:
        return target.program_memory + result
    statistics = device.memory_stats()
    if statistics is None:  # the CPU
        import psutil

        return int(FREE_SHARE * psutil.virtual_memory().available)
    return int(FREE_SHARE * (statistics["bytes_limit"] - statistics["bytes_in_use"]))


def compile_within(limit: int, lowered: jax.stages.Lowered, name: str) -> jax.stages.Compiled:
    """The compiled program, if it takes at most ``limit`` bytes.

    Args:
        limit: bytes, such as those of :func:`memory_limit`.
        lowered: the program.
        name: name of the program, for the error message.

    Raises:
        OverMemory: the program would take more.
    """
    made = compiled(lowered)
    check_bytes(needed_bytes(made), limit, name)
    return made


def compiled(lowered: jax.stages.Lowered) -> jax.stages.Compiled:
    """The compiled program, whatever its size; compiling allocates none of its arrays."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        return lowered.compile()


def check_bytes(needed: int, limit: int, name: str) -> None:
    """Check that a program takes at most ``limit`` bytes.

    Args:
        needed: bytes of the program, by :func:`needed_bytes`.
        limit: bytes.
        name: name of the program, for the error message.

    Raises:
        OverMemory: it takes more.
    """
    if needed > limit:
        raise OverMemory(f"{name} would need {needed / 2**30:.3g} GiB, over the budget of {limit / 2**30:.3g} GiB")
