"""The input of all methods: a network, its inputs, and two sets of weights."""

from __future__ import annotations

import contextlib
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from ntkbench.ambient import own_jax_settings, own_settings
from ntkbench.errors import BadInput

if TYPE_CHECKING:
    from torch import Tensor, nn

Weights = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Problem:
    """A network with inputs and two sets of weights, on which NTK metrics are defined.

    Arrays are NumPy arrays on the host. The Jacobian operators copy them to a device in the precision of their target,
    so that all backends start from the same numbers.

    Attributes:
        name: label with sizes, such as ``"digits_mlp[N=64]"``.
        module: ``x -> [N, ...outputs]``; ``theta_0`` or ``theta_f`` replace its own weights. ``None`` for a function in
            JAX (see :func:`ntkbench.problems.base.function.from_function`).
        x: inputs ``[N, ...]``.
        theta_0: weights at initialisation by parameter name. All other parameters of the module are frozen.
        theta_f: weights after training, for alignment; ``None`` if there are none.
        jax_forward: the same network as a pure function ``(weights, x) -> [N, ...outputs]`` on JAX arrays, or ``None``.
        samples_interact: whether an output of one sample depends on another sample.
        outputs: kind of a sample's outputs: ``logits``, of a readout with a unit for each; or ``states``, hidden units
            or outputs of many time steps.
        fixed_0, fixed_f: values of frozen parameters and buffers that go with ``theta_0`` and ``theta_f``. All others
            keep the module's values.
        recipe: how ``theta_f`` was trained; empty if that is not known.
        other: another network on inputs of its own, with the same N and O, for the alignment of its kernel with that of
            this one. ``theta_f`` is then its ``theta_0``, and samples interact if they do in either network.
        mixed: whether the precisions of inputs, buffers and frozen parameters are part of the function. They are then
            kept, and the network is only run in the precision of its theta.

    Raises:
        BadInput: N or O of the other network differ.
    """

    name: str
    module: nn.Module | None
    x: np.ndarray
    theta_0: Weights
    theta_f: Weights | None = None
    jax_forward: Callable[[Mapping[str, Any], Any], Any] | None = None
    samples_interact: bool = False
    outputs: Literal["logits", "states"] = "logits"
    fixed_0: Weights = field(default_factory=dict)
    fixed_f: Weights = field(default_factory=dict)
    recipe: str = ""
    other: Problem | None = None
    mixed: bool = False
    _shape: list[tuple[int, ...]] = field(default_factory=list, repr=False, compare=False)
    _row_norms: dict[str, float] = field(default_factory=dict, init=False, repr=False, compare=False)
    _operations: list[Any] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        if self.other is not None:
            if (self.N, self.O) != (self.other.N, self.other.O):
                raise BadInput(
                    f"kernels are aligned entry by entry, but {self.name} has {self.N} samples of {self.O} outputs and "
                    f"{self.other.name} has {self.other.N} of {self.other.O}: N and O must be equal"
                )
            object.__setattr__(self, "theta_f", self.other.theta_0)
            object.__setattr__(self, "samples_interact", self.samples_interact or self.other.samples_interact)

    @property
    def output_shape(self) -> tuple[int, ...]:
        """``(N, ...outputs)``, from a forward pass on shapes, or on a few samples if the network needs values."""
        if not self._shape:
            self._shape.append(_output_shape(self))
        return self._shape[0]

    @property
    def N(self) -> int:
        """Number of samples."""
        return self.output_shape[0]

    @property
    def O(self) -> int:  # noqa: E743 - the field's symbol
        """Outputs per sample."""
        return int(np.prod(self.output_shape[1:]))

    @property
    def n(self) -> int:
        """Outputs of the whole batch, N O; Theta is n x n."""
        return self.N * self.O

    @property
    def P(self) -> int:
        """Number of parameters, of the larger network if there are two."""
        own = sum(w.size for w in self.theta_0.values())
        return own if self.other is None else max(own, self.other.P)

    def end(self, which: str) -> tuple[Problem, str]:
        """The problem whose network ``"theta_0"`` or ``"theta_f"`` belongs to, and its name there."""
        return (self, which) if self.other is None or which == "theta_0" else (self.other, "theta_0")

    def weights(self, which: str) -> Weights:
        """The weights named ``"theta_0"`` or ``"theta_f"``.

        Raises:
            BadInput: the problem has no trained weights.
        """
        weights = getattr(self, which)
        if weights is None:
            raise BadInput(f"{self.name} has no {which}, so alignment is not defined for it")
        return weights

    def conversion(self, dtype: str) -> str | None:
        """The precision that real inputs, buffers and frozen parameters are converted to, to compute in ``dtype``.

        ``None`` if they keep theirs.

        Raises:
            BadInput: they do, and ``dtype`` is not the precision of theta.
        """
        own = str(next(iter(self.theta_0.values())).dtype)
        if self.mixed and dtype != own:
            raise BadInput(
                f"{self.name} computes in {own} only, as it depends on the precision of its inputs, buffers or frozen "
                "parameters"
            )
        return None if self.mixed else dtype

    def fixed(self, which: str) -> Weights:
        """Values of frozen parameters and buffers that go with ``"theta_0"`` or ``"theta_f"``; often none."""
        problem, name = self.end(which)
        return problem.fixed_0 if name == "theta_0" else problem.fixed_f

    def with_inputs(self, x: np.ndarray) -> Problem:
        """The same network at theta_0 on other inputs ``[N, ...]``; samples must not interact."""
        shape = (len(x), *self.output_shape[1:])
        return replace(self, x=x, theta_f=None, fixed_f={}, other=None, _shape=[shape])

    @property
    def network(self) -> nn.Module:
        """The module.

        Raises:
            BadInput: the problem is a JAX function.
        """
        if self.module is None:
            raise BadInput(f"{self.name} has no network in torch")
        return self.module

    def digest(self) -> str:
        """Hash of the problem's identity: network, training recipe, inputs and weights.

        Inputs, weights and all other tensors of the network are hashed exactly. The network is hashed by its behaviour
        in float64, or in its own precision if it runs only in that: a projection of its outputs and one of their
        gradient, at each set of weights, rounded to 7 digits. A change of code that changes the NTK therefore changes
        the digest. A new version of PyTorch or another machine does not.

        Cost: one forward and one backward pass over all samples per set of weights, 64 samples at a time if samples do
        not interact.
        """
        digest = hashlib.sha256(self.recipe.encode())
        hash_arrays(digest, {"x": self.x})
        for which in ("theta_0", "theta_f"):
            weights = getattr(self, which)
            if weights is not None:
                problem, name = self.end(which)
                hash_arrays(digest, weights)
                hash_arrays(digest, self.fixed(which))
                hash_arrays(digest, problem._others(name))
                digest.update(problem._behaviour(name).encode())
        if self.other is not None:
            hash_arrays(digest, {"x": self.other.x})
        return digest.hexdigest()[:16]

    def contents(self) -> str:
        """Hash of inputs, weights and all other tensors of the network, which is not run."""
        digest = hashlib.sha256()
        hash_arrays(digest, {"x": self.x})
        for which in ("theta_0", "theta_f"):
            if getattr(self, which) is not None:
                problem, name = self.end(which)
                for arrays in (problem.weights(name), problem.fixed(name), problem._others(name)):
                    hash_arrays(digest, arrays)
        if self.other is not None:
            hash_arrays(digest, {"x": self.other.x})
        return digest.hexdigest()[:16]

    def identity(self) -> dict[str, str]:
        """What the kernel at theta_0 depends on, as hashes by name.

        The names say in what two problems may differ: the inputs, the set of parameters, their values, those that are
        not trained (including inputs of several kinds), and what the network computes with all of them.

        Cost: that of :meth:`digest` at theta_0.
        """
        return {
            "inputs": hashed({"x": self.x}),
            "parameters": hashlib.sha256(repr(sorted(self.theta_0)).encode()).hexdigest()[:16],
            "weights": hashed(self.theta_0),
            "frozen parameters, buffers or inputs": hashed({**self.fixed_0, **self._others("theta_0")}),
            "network": hashlib.sha256(self._behaviour("theta_0").encode()).hexdigest()[:16],
        }

    def _others(self, which: str) -> Weights:
        """What the network holds besides the values of a set of weights: tables, masks, inputs of several kinds."""
        if self.module is None:
            return {}
        from ntkbench.modules import values

        return values(self.module, set(self.weights(which)) | set(self.fixed(which)))

    def _behaviour(self, which: str) -> str:
        own = str(next(iter(self.weights(which).values())).dtype)
        try:
            return self._behaviour_in("float64", which)
        except Exception:  # a network that runs only in its own precision
            if own == "float64":
                raise
        return self._behaviour_in(own, which)

    def _behaviour_in(self, dtype: str, which: str) -> str:
        size = len(self.x) if self.samples_interact else PART
        parts = [self.x[start : start + size] for start in range(0, len(self.x), size)]
        if self.module is None:
            return _behaviour_in_jax(self, which, parts, dtype)
        return self._of_module(self.module, which, parts, dtype)

    def _of_module(self, module: nn.Module, which: str, parts: Sequence[np.ndarray], dtype: str) -> str:
        import torch

        from ntkbench.modules import called, cast, copied, load

        to = self.conversion(dtype)
        real = None if to is None else getattr(torch, to)
        with own_settings(dtype):
            network = cast(copied(module), real)
            load(network, {**self.fixed(which), **self.weights(which)})
            own = dict(network.named_parameters())
            theta = [own[key].requires_grad_() for key in self.weights(which)]

            def values() -> Iterator[Tensor]:
                done = 0
                for part in parts:
                    x = torch.from_numpy(part).to(theta[0].device)
                    outputs = called(network, x.to(real) if x.is_floating_point() and real is not None else x)
                    yield (_projection(outputs, done) * outputs).sum()
                    done += outputs.numel()

            return signature(values(), theta)


PART = 64
"""Samples at a time on which a network is run for its identity."""

PROBED = 2
"""Number of samples on which a network is run to see which parameters, or which objective, it has."""


def signature(values: Iterable[Tensor], parameters: Sequence[Tensor]) -> str:
    """A sum and a projection of its gradient in ``parameters``, to 7 digits, on which machines agree in float64."""
    import torch

    total = along = 0.0
    for value in values:
        gradients = torch.autograd.grad(value, parameters, materialize_grads=True, allow_unused=True)
        total += float(value.detach())
        along += sum(float((_projection(g) * g).sum()) for g in gradients)
    return _to_seven_digits(total, along)


def _behaviour_in_jax(problem: Problem, which: str, parts: Sequence[np.ndarray], dtype: str) -> str:
    import jax
    import jax.numpy as jnp

    assert problem.jax_forward is not None
    forward = problem.jax_forward
    with own_jax_settings(dtype):
        theta = {key: jnp.asarray(_in(dtype, w)) for key, w in problem.weights(which).items()}
        fixed = {key: jnp.asarray(_in(dtype, w)) for key, w in problem.fixed(which).items()}

        @jax.jit  # else loops are compiled again for each part
        @jax.value_and_grad
        def value(theta: Mapping[str, Any], x: Any, done: Any) -> Any:
            outputs = forward({**fixed, **theta}, x).reshape(-1)
            return (jnp.cos(jnp.arange(1, outputs.size + 1) + done) * outputs).sum()

        total, along, done = 0.0, 0.0, 0
        for part in parts:
            found, gradients = value(theta, jnp.asarray(_in(dtype, part)), done)
            total, done = total + float(found), done + len(part) * problem.O
            along += sum(
                float(np.cos(np.arange(1, g.size + 1)) @ np.asarray(g).reshape(-1)) for g in gradients.values()
            )
        return _to_seven_digits(total, along)


def _in(dtype: str, array: np.ndarray) -> np.ndarray:
    return array.astype(dtype) if np.issubdtype(array.dtype, np.floating) else array


def _to_seven_digits(*numbers: float) -> str:
    return " ".join(f"{number + 0.0:.6e}" for number in numbers)


def _projection(like: Tensor, done: int = 0) -> Tensor:
    """Fixed coefficients in [-1, 1] after the first ``done`` ones, as many as ``like`` has entries and none zero."""
    import torch

    numbers = torch.arange(done + 1, done + like.numel() + 1, dtype=torch.float64, device=like.device)
    return numbers.cos().reshape(like.shape)


def hashed(arrays: Weights) -> str:
    """A hash of arrays, with their names, types and shapes."""
    digest = hashlib.sha256()
    hash_arrays(digest, arrays)
    return digest.hexdigest()[:16]


def hash_arrays(digest: Any, arrays: Weights) -> None:
    """Put arrays into a hash, with their names, types and shapes."""
    for name, array in arrays.items():
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def _output_shape(problem: Problem) -> tuple[int, ...]:
    if problem.module is None:
        import jax

        assert problem.jax_forward is not None
        return tuple(jax.eval_shape(problem.jax_forward, {**problem.fixed_0, **problem.theta_0}, problem.x).shape)
    try:
        return tuple(on_shapes(problem, problem.module).shape)
    except Exception:  # a network may hold tensors besides its buffers, or read values
        return _on_values(problem, problem.module)


def _on_values(problem: Problem, module: nn.Module) -> tuple[int, ...]:
    """The shape of the outputs, from a forward pass on a few samples, or on all if the network accepts no fewer."""
    import torch

    from ntkbench.modules import called, copied

    weight = next(module.parameters())
    x = torch.from_numpy(problem.x).to(weight.device)
    x = x.to(weight.dtype) if x.is_floating_point() else x
    with own_settings(str(weight.dtype).removeprefix("torch.")), torch.no_grad():
        if not problem.samples_interact:
            with contextlib.suppress(Exception):
                return (len(x), *called(copied(module), x[:PROBED]).shape[1:])
        return tuple(called(copied(module), x).shape)


def on_shapes(problem: Problem, module: nn.Module) -> Tensor:
    """Outputs without values of a problem's module, from a forward pass on shapes, which computes nothing.

    The precision is torch's default. The call does not change the module.
    """
    import torch

    from ntkbench.modules import beside, with_values

    def empty(like: Tensor) -> Tensor:
        dtype = torch.get_default_dtype() if like.is_floating_point() else like.dtype
        return torch.empty(like.shape, dtype=dtype, device="meta")

    module, weights, x = beside(module), problem.theta_0, problem.x
    arrays = {key: torch.empty(w.shape, device="meta") for key, w in weights.items()}
    fixed = (*module.named_buffers(), *((key, w) for key, w in module.named_parameters() if key not in arrays))
    arrays |= {key: empty(b) for key, b in fixed}
    return with_values(module, arrays, (empty(torch.from_numpy(x)),))


def split(network: nn.Module, weights: Weights) -> tuple[Weights, Weights]:
    """A network's weights, split into those with ``requires_grad`` and the others: frozen ones, and buffers."""
    own = (*network.named_parameters(), *network.named_buffers())
    by = {key: w.requires_grad for key, w in own if key in weights}
    return {key: weights[key] for key in by if by[key]}, {key: weights[key] for key in by if not by[key]}
