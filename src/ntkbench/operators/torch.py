"""The Jacobian operator in PyTorch: products by ``torch.func``, probes batched with ``vmap``."""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.func import jvp, vjp, vmap
from torch.overrides import TorchFunctionMode

from ntkbench.errors import BadInput, NoSecondPass, NotFinite, Unavailable
from ntkbench.modules import cast, copied, frozen, load, with_values
from ntkbench.operators import arrays, certificate
from ntkbench.operators.base import JacobianOperator, Rng
from ntkbench.operators.memory import free_on_host
from ntkbench.operators.plain import PlainNetwork, flat, saved_bytes
from ntkbench.operators.plain_operations import plain_operations, without_shortcuts
from ntkbench.options import Target
from ntkbench.problem import Problem


def linearise(problem: Problem, weights: str, target: Target) -> TorchJacobian:
    """See :func:`ntkbench.operators.linearise`."""
    return TorchJacobian(*network(problem, weights, target), problem.output_shape, target.memory)


def network(problem: Problem, weights: str, target: Target) -> tuple[nn.Module, dict[str, Tensor], Tensor]:
    """The problem's module, its trainable parameters by name and its inputs, on the target's device.

    Raises:
        BadInput: no such weights, the problem has no network in torch, or the network does not run in this precision.
        Unavailable: the device is not present.
    """
    if problem.module is None:
        raise BadInput(f"{problem.name} has no network in torch; allowed backends for it: jax")
    where, dtype = device(target), _conversion(problem, target)
    own = getattr(torch, target.dtype)
    parameters = {key: torch.from_numpy(w).to(where, own) for key, w in problem.weights(weights).items()}
    x = torch.from_numpy(problem.x).to(where)
    x = x.to(dtype) if x.is_floating_point() and dtype is not None else x
    module = _module_on(problem.module, where, dtype)
    if fixed := problem.fixed(weights):
        module = load(copied(module), fixed)
    return module, parameters, x


def _conversion(problem: Problem, target: Target) -> torch.dtype | None:
    """See :meth:`ntkbench.problem.Problem.conversion`."""
    to = problem.conversion(target.dtype)
    return None if to is None else getattr(torch, to)


def plain_gradient(problem: Problem, weights: str, target: Target, names: Sequence[str]) -> PlainGradient:
    """v ``[n]``, an array of any library, -> J^T v ``[P]`` by plain autograd, parameters in the order of ``names``."""
    return PlainGradient(*_plain(problem, weights, target, names))


class PlainGradient:
    """See :class:`ntkbench.operators.certificate.PlainGradient`."""

    def __init__(self, plain: PlainNetwork, x: Tensor) -> None:
        self._plain, self._x = plain, x

    @property
    def note(self) -> str:
        return self._plain.note

    def __call__(self, v: Any, memory: int | None = None) -> Tensor:
        v = v if isinstance(v, Tensor) else torch.from_numpy(np.array(v)).to(self._x.device)
        return flat(self._plain.gradient(self._x, v, memory))


def _plain(problem: Problem, weights: str, target: Target, names: Sequence[str]) -> tuple[PlainNetwork, Tensor]:
    _, parameters, x = network(problem, weights, target)
    # Not a copy of the module that products call, because a transform may leave its tensors in that one's attributes.
    module = cast(copied(problem.network), _conversion(problem, target), x.device)
    values = {name: parameters[name] for name in names}
    return PlainNetwork(load(module, problem.fixed(weights)), values, owned=True), x


def interact(problem: Problem, target: Target) -> bool:
    """Whether the gradients of samples alone do not add up to that over the whole batch.

    Raises:
        NotFinite: the latter is not finite, which shows nothing.
    """
    plain, x = _plain(problem, "theta_0", target, list(problem.theta_0))
    v = certificate.random_weights(problem.n, x.new_empty(0, dtype=getattr(torch, target.dtype)))
    whole = flat(plain.gradient(x, v))
    if not whole.isfinite().all():
        raise NotFinite("gradients are nan or infinite")
    try:
        alone = flat(plain.gradient(x, v, samples=1))
    except NoSecondPass:
        raise
    except Exception:  # a layer that takes no single sample
        return True
    return not certificate.distance(alone, whole) <= certificate.tolerance(arrays.epsilon(whole))


def is_split(problem: Problem, target: Target) -> bool:
    """Whether a plain pass over all samples takes more than the target's memory, and is split."""
    plain, x = _plain(problem, "theta_0", target, list(problem.theta_0))
    return plain.together(x, target.memory) < len(x)


def device(target: Target) -> torch.device:
    """The device of :func:`place`. On a GPU, TF32 is turned on or off as the target says.

    Raises:
        Unavailable: ``cuda`` was requested and torch sees none.
    """
    where = place(target)
    if where.type == "cuda":
        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = target.tf32
    return where


def place(target: Target) -> torch.device:
    """The device of a target on this machine; of several GPUs the current one.

    Raises:
        Unavailable: ``cuda`` was requested and torch sees none.
    """
    check_device(target)
    if target.device == "cpu" or not torch.cuda.is_available():
        return torch.device("cpu")
    return torch.device("cuda", torch.cuda.current_device())


def check_device(target: Target) -> None:
    """See :func:`ntkbench.operators.check_device`."""
    if target.device == "cuda" and not torch.cuda.is_available():
        raise Unavailable("device='cuda' was requested, but torch sees no CUDA device; allowed here: auto, cpu")


def device_name(target: Target) -> str:
    """See :func:`ntkbench.operators.device_name`."""
    where = device(target)
    return torch.cuda.get_device_name(where) if where.type == "cuda" else "cpu"


def device_memory(target: Target) -> int | None:
    """See :func:`ntkbench.operators.device_memory`."""
    where = device(target)
    return torch.cuda.max_memory_allocated(where) if where.type == "cuda" else None


def reset_device_memory(target: Target) -> None:
    """See :func:`ntkbench.operators.reset_device_memory`."""
    where = device(target)
    if where.type == "cuda":
        torch.cuda.reset_peak_memory_stats(where)


def free_memory(target: Target) -> int:
    """Bytes that a tensor on the device may take."""
    where = device(target)
    if where.type == "cuda":
        # Memory that torch caches after tensors are freed is free as well.
        kept = torch.cuda.memory_reserved(where) - torch.cuda.memory_allocated(where)
        return int(torch.cuda.mem_get_info(where)[0]) + kept
    return free_on_host()


Pushforward = Callable[[Tensor], Callable[[Tensor], Tensor]]
"""Takes inputs ``[samples, ...]`` and returns w -> J w, ``[P] -> [samples, O]``."""

REVERSE, FORWARD, TWICE, PLAIN = "reverse mode", "forward mode", "two reverse passes", "plain autograd"
WAYS = {
    "vjp": (REVERSE, PLAIN),
    "row": (PLAIN,),
    "sample_vjp": (REVERSE, PLAIN),
    "jvp": (FORWARD, TWICE, PLAIN),
    "sample_jvp": (FORWARD, TWICE, PLAIN),
}
"""Methods for each kind of product, the fastest first. All but plain autograd batch probes with ``vmap``."""
SAID = {"vjp": "VJP", "jvp": "JVP", "sample_vjp": "per-sample VJP", "sample_jvp": "per-sample JVP"}


class TorchJacobian(JacobianOperator):
    """J of a module at given parameters; see :class:`ntkbench.operators.base.JacobianOperator`.

    Args:
        module: ``x -> [N, ...outputs]``, on the device and in the precision of ``parameters``.
        parameters: trainable parameters by name.
        x: inputs ``[N, ...]``.
        shape: shape of the outputs, ``(N, ...outputs)``.
        memory: bytes that one block of probes may use.
    """

    COMPUTED: tuple[str, ...] = ("_pullback", "_plain_pullback")

    def __init__(
        self, module: nn.Module, parameters: Mapping[str, Tensor], x: Tensor, shape: tuple[int, ...], memory: int
    ) -> None:
        self.N, self.O = shape[0], int(np.prod(shape[1:]))
        self.P = sum(w.numel() for w in parameters.values())
        self.memory = memory
        self.itemsize = next(iter(parameters.values())).element_size()
        self._module, self._parameters, self._x = module, dict(parameters), x
        self._passed_over: dict[str, list[str]] = {}  # shared with copies, so that each method is tried once

    @property
    def epsilon(self) -> float:
        return arrays.epsilon(next(iter(self._parameters.values())))

    def _forward(self, parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        network = lambda: with_values(self._module, parameters, (x,)).reshape(x.shape[0], -1)  # noqa: E731
        with _differentiable_kernels(self._module):
            try:
                return network()
            except RuntimeError as error:
                if "data-dependent control flow" not in str(error):
                    raise
                with without_shortcuts(self._module):
                    return network()

    @functools.cached_property
    def _pullback(self) -> Callable[[Tensor], tuple[dict[str, Tensor]]]:
        """The VJP of the forward pass, which runs once for all probes."""
        return vjp(lambda parameters: self._forward(parameters, self._x), self._parameters)[1]

    @functools.cached_property
    def _plain(self) -> PlainNetwork:
        return PlainNetwork(self._module, self._parameters)

    @functools.cached_property
    def _plain_pullback(self) -> Callable[[Tensor], list[Tensor]]:
        """The same VJP by plain ``backward``, one cotangent at a time."""
        return self._plain.pullback(self._x)

    def _next_way(self, kind: str, reason: str) -> bool:
        """See :data:`WAYS`."""
        passed_over = self._passed_over.setdefault(kind, [])
        if len(passed_over) + 1 == len(WAYS[kind]):
            return False
        passed_over.append(reason)
        return True

    def _is_plain(self, kind: str) -> bool:
        return kind in ("vjp", "row") and self._way(kind) == PLAIN

    def passes_per_jvp(self, by_sample: bool = False) -> int:
        kind = "sample_jvp" if by_sample else "jvp"
        self._settle(kind)
        return 1 if self._way(kind) == FORWARD else 2

    def _way(self, kind: str) -> str:
        return WAYS[kind][len(self._passed_over.get(kind, ()))]

    @property
    def _remarks(self) -> tuple[str, ...]:
        return tuple(
            f"each {SAID[kind]} is computed by {self._way(kind)}: {'; '.join(dict.fromkeys(reasons))}"
            for kind, reasons in self._passed_over.items()
            if reasons
        )

    @torch.no_grad()
    def _vjp(self, u: Tensor) -> Tensor:
        if self._way("vjp") == PLAIN:
            return torch.stack([flat(self._plain_pullback(each)) for each in u])
        return _flat(vmap(self._pullback)(u.reshape(-1, self.N, self.O))[0])

    @torch.no_grad()
    def _jvp(self, w: Tensor) -> Tensor:
        way = self._way("jvp")
        if way != FORWARD:  # see passes_per_jvp
            self._sample_passes += len(w) * self.N
        if way == PLAIN:
            push = self._plain.pushforward(self._x)
            return torch.stack([push(each) for each in w])
        # The primal does not depend on the probe, so vmap runs it once per block.
        return vmap(self._push(way)(self._x))(w).reshape(-1, self.n)

    @torch.no_grad()
    def _sample_jvp(self, samples: slice, w: Tensor) -> Tensor:
        way, xs = self._way("sample_jvp"), self._x[samples]
        if way != FORWARD:
            self._sample_passes += w.shape[0] * w.shape[1]
        if way == PLAIN:
            pushes = [self._plain.pushforward(x[None]) for x in xs]
            return torch.stack([torch.stack([push(each) for push, each in zip(pushes, row, strict=True)]) for row in w])
        by_sample = lambda x, w: vmap(self._push(way)(x[None]))(w)[:, 0]  # noqa: E731
        return vmap(by_sample, in_dims=(0, 1), out_dims=1)(xs, w)

    def _push(self, way: str) -> Pushforward:
        return self._push_forward if way == FORWARD else self._push_by_reverse

    def _push_forward(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        forward = lambda parameters: self._forward(parameters, x)  # noqa: E731
        return lambda w: jvp(forward, (self._parameters,), (self._unflat(w),))[1]

    def _push_by_reverse(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """J w as the derivative of v -> <J^T v, w>, which is linear in v."""
        forward = lambda parameters: self._forward(parameters, x)  # noqa: E731

        def push(w: Tensor) -> Tensor:
            back = lambda v: vjp(forward, self._parameters)[1](v)[0]  # noqa: E731
            return vjp(back, w.new_zeros(len(x), self.O))[1](self._unflat(w))[0]

        return push

    def _row(self, i: int) -> Tensor:
        return flat(self._plain_pullback(self.basis(i, i + 1)[0]))

    def _sample_vjp(self, samples: slice, v: Tensor) -> Tensor:
        return self._by_sample(_flat, samples, v)

    def _sample_squares(self, samples: slice, v: Tensor) -> Tensor:
        return self._by_sample(_squares, samples, v)

    @torch.no_grad()
    def _by_sample(self, reduce: Callable[[Mapping[Any, Tensor]], Tensor], samples: slice, v: Tensor) -> Tensor:
        """``reduce`` of each sample's gradients (by parameter, ``[k, ...]`` each), ``[k, samples, ...]``."""

        if self._way("sample_vjp") == PLAIN:
            return torch.stack([self._plainly(reduce, x, v[:, b]) for b, x in enumerate(self._x[samples])], 1)

        def one(x: Tensor, v: Tensor) -> Tensor:
            pullback = vjp(lambda parameters: self._forward(parameters, x[None])[0], self._parameters)[1]
            return reduce(vmap(pullback)(v)[0])

        return vmap(one, in_dims=(0, 1), out_dims=1)(self._x[samples], v)

    def _plainly(self, reduce: Callable[[Mapping[Any, Tensor]], Tensor], x: Tensor, v: Tensor) -> Tensor:
        pull = self._plain.pullback(x[None])
        return torch.cat([reduce(dict(enumerate(g[None] for g in pull(each)))) for each in v])

    def _eye(self, size: int, start: int, stop: int) -> Tensor:
        like = next(iter(self._parameters.values()))
        eye = torch.zeros(stop - start, size, dtype=like.dtype, device=like.device)
        eye[:, start:stop].fill_diagonal_(1)
        return eye

    @property
    def names(self) -> list[str]:
        return list(self._parameters)

    def rng(self, seed: int) -> TorchRng:
        like = next(iter(self._parameters.values()))
        return TorchRng(seed, like.dtype, like.device)

    def bytes_per_probe(self) -> int:
        return self._bytes_per_probe

    @functools.cached_property
    def _bytes_per_probe(self) -> int:
        # Twice what autograd saves in a forward pass (values and cotangents), three gradients (a sum, its next term and
        # the flat copy), and two vectors of outputs (the probe, and its image).
        leaves = {key: w.detach().requires_grad_() for key, w in self._parameters.items()}
        saved = self._saved_bytes(lambda x: self._forward(leaves, x))
        if saved is None:  # a network that accepts no other parameters than its own
            saved = saved_bytes(lambda: self._plain.pullback(self._x)) or 0
        return 2 * saved + (3 * self.P + 2 * self.n) * self.itemsize

    def _saved_bytes(self, forward: Callable[[Tensor], Tensor]) -> int | None:
        """Bytes that autograd saves; those of many samples may not fit in memory, and are extrapolated from three.

        They grow quadratically where samples interact, as in attention over the batch.
        """
        if self.N > 3:
            one, two, three = (saved_bytes(lambda k=k: forward(self._x[:k])) for k in (1, 2, 3))  # type: ignore[misc]
            if one is not None and two is not None and three is not None and two >= one:
                steps = self.N - 1
                return one + steps * (two - one) + max(0, three - 2 * two + one) * steps * (steps - 1) // 2
        return saved_bytes(lambda: forward(self._x))

    def _unflat(self, flat: Tensor) -> dict[str, Tensor]:
        parts = flat.split([w.numel() for w in self._parameters.values()])
        return {key: part.reshape(w.shape) for (key, w), part in zip(self._parameters.items(), parts, strict=True)}


class TorchRng(Rng):
    """Probes from a ``torch.Generator`` on the given device."""

    def __init__(self, seed: int, dtype: torch.dtype, device: torch.device) -> None:
        self._dtype, self._device = dtype, device
        self._generator = torch.Generator(device).manual_seed(seed)

    def normal(self, k: int, dim: int) -> Tensor:
        return torch.randn(k, dim, generator=self._generator, dtype=self._dtype, device=self._device)

    def sign(self, k: int, dim: int) -> Tensor:
        # Rows do not depend on the split into blocks, which depends on the free memory.
        if self._device.type == "cuda":
            signs = torch.empty(k, dim, dtype=self._dtype, device=self._device)
            for row in signs:
                row.random_(0, 2, generator=self._generator)
            return signs.mul_(2).sub_(1)
        # A generator takes as long for a bit as for a byte. Each row starts with a new byte.
        size = (k, -(-dim // 8))
        drawn = torch.randint(0, 256, size, generator=self._generator, dtype=torch.int32, device=self._device)
        signs = _signs_of_bytes(self._dtype, self._device).index_select(0, drawn.view(-1)).view(k, -1)
        return signs[:, :dim].contiguous()


@functools.cache
def _signs_of_bytes(dtype: torch.dtype, device: torch.device) -> Tensor:
    """The eight signs that each byte encodes, ``[256, 8]``."""
    bits = torch.arange(256, device=device)[:, None] >> torch.arange(8, device=device) & 1
    return bits.to(dtype).mul_(2).sub_(1)


def _flat(blocks: Mapping[Any, Tensor]) -> Tensor:
    """Gradients by parameter, each ``[k, ...]``, concatenated: ``[k, P]``."""
    return torch.cat([block.reshape(block.shape[0], -1) for block in blocks.values()], dim=1)


def _squares(blocks: Mapping[Any, Tensor]) -> Tensor:
    """Squared norms of gradients by parameter, each ``[k, ...]``: ``[k]``."""
    flat = (block.reshape(block.shape[0], -1) for block in blocks.values())
    return sum(map(arrays.squared_norms, flat))


_COPIES: weakref.WeakKeyDictionary[nn.Module, dict[tuple[torch.device, torch.dtype | None], nn.Module]]
_COPIES = weakref.WeakKeyDictionary()


def _module_on(module: nn.Module, where: torch.device, dtype: torch.dtype | None) -> nn.Module:
    """A copy of the module on a device and in a precision, made once and kept as long as the module itself."""
    copies = _COPIES.setdefault(module, {})
    if (where, dtype) not in copies:
        copies[where, dtype] = frozen(cast(copied(module), dtype, where))
    return copies[where, dtype]


class _BatchedState(TorchFunctionMode):
    """Gives recurrent layers an initial state that carries vmap's batch dimension.

    Their kernels add the projected input to the projected state in place, which vmap refuses if only the input is
    batched.
    """

    LAYERS = frozenset({"rnn_tanh", "rnn_relu", "gru", "lstm"})

    def __torch_function__(
        self, function: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if getattr(function, "__name__", None) in self.LAYERS:
            x, state, *rest = args
            zero = torch.zeros_like(x).sum()
            state = tuple(s + zero for s in state) if isinstance(state, tuple) else state + zero
            args = (x, state, *rest)
        return function(*args, **(kwargs or {}))


@contextlib.contextmanager
def _differentiable_kernels(module: nn.Module) -> Iterator[None]:
    """Restrict operations to those with both forward mode and a vmap rule."""
    recurrent = any(isinstance(layer, nn.RNNBase) for layer in module.modules())
    with plain_operations(module), _BatchedState() if recurrent else contextlib.nullcontext():
        yield
