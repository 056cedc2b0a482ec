"""The whole kernel of a network in JAX by several methods, the fastest first; each is used if those before it fail.

Every method has the same arguments, raises if it cannot compute the kernel, and is certified by plain autograd.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ntkbench.errors import BadInput
from ntkbench.operators import arrays, certificate, linearise, programs
from ntkbench.operators.explicit_kernel import explicit_kernel
from ntkbench.operators.jax import device, network, plain_pullback
from ntkbench.options import Target
from ntkbench.problem import Problem

Way = Callable[[Problem, np.ndarray | None, np.ndarray | None, bool, Target], jax.Array]
"""Takes a problem, inputs of the columns, output directions, whether to average over them, and a target."""


def ways(problem: Problem, x2: np.ndarray | None = None) -> list[Way]:
    """The methods available for a problem, the fastest first.

    Each gives the kernel between the problem's inputs and ``x2 [N2, ...]``, which are its own inputs if not given. For
    directions ``[K, O]`` (the O unit vectors if not given) it is ``[N1 * K, N2 * K]`` with rows sample-major, or
    ``[N1, N2]``, the mean over directions, if averaged.

    Raises:
        BadInput: samples interact, so that there is no kernel between two sets of inputs.
    """
    if not problem.samples_interact:
        found: list[Way] = [structured_derivatives, jacobian_contraction, sample_by_sample]
        return found if x2 is not None else [*found, row_by_row]
    if x2 is not None:
        raise BadInput("samples interact, so a kernel between two batches is not defined: omit the second inputs")
    return [row_by_row]


def structured_derivatives(
    problem: Problem, x2: np.ndarray | None, directions: np.ndarray | None, averaged: bool, target: Target
) -> jax.Array:
    """The kernel by neural-tangents, equation by equation of the traced network; O or K backward passes.

    Certificates take a forward and a backward pass for each set of inputs; K backward passes if averaged.

    Raises:
        BadInput: the network has a long recurrence.
        Missing: neural-tangents is not installed.
        OverMemory: the program would take more than ``target.program_memory`` besides the kernel.
        Uncertified: plain autograd contradicts the kernel.
        Unavailable: the device is not available.
    """
    if reason := programs.scan_too_long(problem):
        raise BadInput(f"neural-tangents {reason}")
    return _by_neural_tangents("STRUCTURED_DERIVATIVES", problem, x2, directions, averaged, target)


def jacobian_contraction(
    problem: Problem, x2: np.ndarray | None, directions: np.ndarray | None, averaged: bool, target: Target
) -> jax.Array:
    """The kernel by neural-tangents, from explicit gradients; see :func:`structured_derivatives` for the rest."""
    return _by_neural_tangents("JACOBIAN_CONTRACTION", problem, x2, directions, averaged, target)


def sample_by_sample(
    problem: Problem, x2: np.ndarray | None, directions: np.ndarray | None, averaged: bool, target: Target
) -> jax.Array:
    """The kernel from rows of J, sample by sample; see :func:`ntkbench.operators.explicit_kernel.explicit_kernel`."""
    return _by_rows(problem, x2, directions, averaged, target, independent=True)


def row_by_row(
    problem: Problem, x2: np.ndarray | None, directions: np.ndarray | None, averaged: bool, target: Target
) -> jax.Array:
    """The kernel from rows of J, computed with products over the whole batch, which allows samples to interact."""
    return _by_rows(problem, x2, directions, averaged, target, independent=False)


def in_parts(
    way: Way, problem: Problem, x2: np.ndarray | None, directions: np.ndarray | None, averaged: bool, target: Target
) -> Callable[[slice, slice], jax.Array]:
    """The kernel by neural-tangents in rectangles: a function of rows and columns.

    These are ranges of :mod:`ntkbench.operators.ranges`. A program is compiled for each shape of a rectangle, and each
    rectangle is certified separately. ``target.program_memory`` includes the rectangle. Before the first one, the
    outputs of all samples together are compared with those of its samples, at the weights and at perturbed ones: four
    forward passes.

    Args:
        way: :func:`structured_derivatives` or :func:`jacobian_contraction`; the other arguments are those of ``way``.

    Raises:
        BadInput: raised by the function: a rectangle has only some outputs of a sample.
        Uncertified: raised by the function: samples of different rectangles interact.
    """
    K = 1 if averaged else problem.O if directions is None else len(directions)
    every = (problem, problem if x2 is None else problem.with_inputs(x2))
    compare = functools.cache(lambda end, samples: _compare(every[end], samples, target))

    def part(rows: slice, columns: slice) -> jax.Array:
        if any(bound % K for each in (rows, columns) for bound in (each.start, each.stop)):
            raise BadInput(
                "neural-tangents computes all outputs of a sample together, and there is too little memory for that"
            )
        left, right = (slice(each.start // K, each.stop // K) for each in (rows, columns))
        compare(0, left.stop - left.start)
        if x2 is not None:
            compare(1, right.stop - right.start)
        others = None if x2 is None and rows == columns else (problem.x if x2 is None else x2)[right]
        limit = target.program_memory
        if limit is not None:  # includes the rectangle
            limit -= (rows.stop - rows.start) * (columns.stop - columns.start) * target.itemsize
        within = dataclasses.replace(target, program_memory=limit)
        return way(problem.with_inputs(problem.x[left]), others, directions, averaged, within)

    return part


def _compare(problem: Problem, samples: int, target: Target) -> None:
    """Compare the outputs of the whole batch with those of its parts, at the weights and at perturbed ones.

    Raises:
        Uncertified: they differ, so samples interact.
    """
    forward, weights, x = network(problem, "theta_0", target)
    rng = np.random.default_rng(0)
    nudged = {key: jnp.asarray(certificate.perturbed(np.asarray(w), rng)) for key, w in weights.items()}
    wholes, differences = [], []
    for at in (weights, nudged) if samples < len(x) else ():
        whole = forward(at, x)
        if not bool(jnp.isfinite(whole).all()):
            break  # the function is not defined at such weights
        starts = range(0, len(x), samples)
        pairs = ((forward(at, x[i : i + samples]), whole[i : i + samples]) for i in starts)
        differences.append(certificate.difference_of_parts(pairs)[0])
        wholes.append(whole)
    if wholes:
        certificate.check_parts(wholes, differences, arrays.epsilon(wholes[0]), samples)


def _by_rows(
    problem: Problem,
    x2: np.ndarray | None,
    directions: np.ndarray | None,
    averaged: bool,
    target: Target,
    *,
    independent: bool,
) -> jax.Array:
    left = linearise(problem, "theta_0", target)
    right = None if x2 is None else linearise(problem.with_inputs(x2), "theta_0", target)
    u = None if directions is None else arrays.asarray_like(directions, left.basis(0, 1))
    found: jax.Array = explicit_kernel(left, right, u, averaged=averaged, independent=independent)
    return found


def _by_neural_tangents(
    implementation: str,
    problem: Problem,
    x2: np.ndarray | None,
    directions: np.ndarray | None,
    averaged: bool,
    target: Target,
) -> jax.Array:
    columns = problem if x2 is None else problem.with_inputs(x2)
    u = np.eye(problem.O, dtype=target.dtype) if directions is None else directions.astype(target.dtype)
    K = 1 if averaged else len(u)
    a = certificate.random_weights(problem.N * K, u)
    b = a if x2 is None else certificate.random_weights(columns.N * K, u, seed=1)
    forward, weights, x1 = network(problem, "theta_0", target)
    put = functools.partial(jax.device_put, device=device(target))
    inputs = (x1,) if x2 is None else (x1, network(columns, "theta_0", target)[2])
    arguments = (weights, None if directions is None else put(u), put(a), put(b), *inputs)
    leaves, structure = jax.tree.flatten(arguments)
    shapes = tuple(jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=leaf.sharding) for leaf in leaves)
    kernel, form, norm = _compiled(forward, implementation, averaged, shapes, structure, target)(*arguments)
    expected = _expected_form(problem, columns, _cotangents(a, u, averaged), _cotangents(b, u, averaged), target)
    size = max(float(norm), abs(expected))
    certificate.check(certificate.ratio(abs(float(form) - expected), size), arrays.epsilon(kernel))
    return kernel


@functools.lru_cache(maxsize=16)
def _compiled(
    forward: Callable[[Any, Any], Any],
    implementation: str,
    averaged: bool,
    shapes: tuple[jax.ShapeDtypeStruct, ...],
    structure: Any,
    target: Target,
) -> jax.stages.Compiled:
    """The program (weights, directions, vectors a and b, x1, x2) -> (Theta, a^T Theta b, norm) for some shapes."""

    def program(weights: Any, u: Any, a: Any, b: Any, x1: Any, x2: Any = None) -> Any:
        along = forward if u is None else lambda weights, x: forward(weights, x).reshape(len(x), -1) @ u.T
        trace_axes = (1,) if averaged else ()  # neural-tangents divides the trace by its size
        theta = programs.kernel_function(along, implementation, trace_axes)(weights, x1, x2)
        if not averaged:
            theta = theta.transpose(0, 2, 1, 3).reshape(len(a), len(b))
        return theta, a @ theta @ b, jnp.linalg.norm(theta)

    arguments = jax.tree.unflatten(structure, shapes)
    a, b = arguments[2:4]
    limit = programs.memory_limit(device(target), target, a.size * b.size * target.itemsize)
    lowered = programs.lower(program, *arguments)
    return programs.compile_within(limit, lowered, f"neural-tangents' {implementation}")


def _expected_form(
    rows: Problem, columns: Problem, left: Iterator[np.ndarray], right: Iterator[np.ndarray], target: Target
) -> float:
    """The mean of <J_1^T v, J_2^T w> over pairs of cotangents of the outputs of all samples, by plain autograd."""
    names, terms = list(rows.theta_0), []
    pull_1 = plain_pullback(rows, "theta_0", target, names)
    pull_2 = None if columns is rows else plain_pullback(columns, "theta_0", target, names)
    for v, w in zip(left, right, strict=True):
        g = np.asarray(pull_1(v), "float64")
        terms.append(g @ (np.asarray(pull_2(w), "float64") if pull_2 else g))
    return float(np.mean(terms))


def _cotangents(signs: np.ndarray, u: np.ndarray, averaged: bool) -> Iterator[np.ndarray]:
    """One cotangent that combines all directions, or one per direction for the mean over them."""
    if averaged:
        yield from (np.outer(signs, direction) for direction in u)
    else:
        yield signs.reshape(-1, len(u)) @ u
