"""Plain automatic differentiation: ``backward`` of an unmodified module, without functional calls, vmap or a trace.

It is what training computes. Certificates compare with it, and products fall back on it if no faster method agrees.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from ntkbench.errors import NoSecondPass
from ntkbench.modules import called, copied, frozen
from ntkbench.operators import arrays, certificate
from ntkbench.operators.plain_operations import plain_operations

HELD = 3
"""Assumed number of values that a pass holds at a time, besides saved ones: as large as the outputs, or as the largest
value if nothing is saved."""


class PlainNetwork:
    """A copy of a module with its own trainable parameters.

    Attributes:
        note: what comparisons with gradients in parts leave open; empty if nothing.

    Args:
        module: ``x -> [N, ...outputs]``, on the device and in the precision of ``parameters``.
        parameters: values of the trainable parameters by name.
        owned: whether the module has no other user, and need not be copied.
    """

    def __init__(self, module: nn.Module, parameters: Mapping[str, Tensor], *, owned: bool = False) -> None:
        self._module = frozen(module if owned else copied(module))
        self._sizes: tuple[int, int, int] | None = None
        self._compared: Tensor | None = None
        self.note = ""
        own = dict(self._module.named_parameters())
        self._leaves = [own[name].requires_grad_() for name in parameters]
        self.load(parameters.values())

    def load(self, values: Iterable[Tensor]) -> None:
        """Set the parameters, in the constructor's order."""
        self._compared = None
        with torch.no_grad():
            for leaf, value in zip(self._leaves, values, strict=True):
                leaf.copy_(value)

    @torch.enable_grad()
    def gradient(self, x: Tensor, v: Tensor, memory: int | None = None, *, samples: int | None = None) -> list[Tensor]:
        """The gradient of <v, f(x)> with respect to each parameter; 1 pass.

        Args:
            x: inputs ``[N, ...]``.
            v: cotangent with ``N O`` entries, sample-major.
            memory: bytes of the values that autograd saves, of outputs and cotangents, and of this network's parameters
                and their gradients. A batch that takes more is split into parts of at least two samples. Its samples
                must not interact, which is tested once for each x and set of weights: four forward passes without a
                graph, see :attr:`note`.
            samples: number of samples of a part, instead of what the memory allows; nothing is tested.

        Raises:
            Uncertified: samples of different parts interact.
        """
        if samples is None:
            samples = self.together(x, memory)
            if memory is not None and samples < len(x) and self._compared is not x:
                self._compare(x, samples, memory)
                self._compared = x
        self._clear()
        v = v.reshape(len(x), -1)
        for start in range(0, len(x), samples):
            where = slice(start, start + samples)
            self._accumulate(*self._called(x[where]), v[where], retain=False)
        return self._accumulated()

    def together(self, x: Tensor, memory: int | None) -> int:
        """Number of samples of a part in :meth:`gradient`."""
        if memory is None or len(x) <= 2:
            return len(x)
        saved, _, outputs = self._bytes_of(x[:1].clone())
        return max(2, min(len(x), (memory - self._own_bytes()) // max(1, saved + HELD * outputs)))

    def _own_bytes(self) -> int:
        """Bytes of the parameters and their gradients."""
        return 2 * sum(leaf.nbytes for leaf in self._leaves)

    def _bytes_of(self, x: Tensor) -> tuple[int, int, int]:
        """Bytes of the values that autograd saves for one sample, of the largest of them, and of the outputs.

        Parameters do not count. All are 0 if they cannot be counted: transforms of torch.func inside a network do not
        allow hooks on saved tensors.
        """
        if self._sizes is None:
            parameters = {w.untyped_storage().data_ptr() for w in self._module.parameters()}
            try:
                with saved_values() as kept:
                    outputs = called(self._module, x).nbytes
                own = [size for where, size in kept.items() if where not in parameters]
                self._sizes = sum(own), max(own, default=0), outputs
            except Exception:
                self._sizes = 0, 0, 0
        return self._sizes

    @torch.no_grad()
    def _compare(self, x: Tensor, samples: int, memory: int) -> None:
        """Compare the outputs of the whole batch with those of its parts, at these weights and at perturbed ones.

        A readout that starts at zero hides the layers before it, as in :func:`ntkbench.from_module`. The note says if
        the whole batch does not run within the memory.

        Raises:
            Uncertified: they differ, so samples interact.
        """
        _, largest, outputs = self._bytes_of(x[:1].clone())
        if self._own_bytes() + len(x) * max(HELD * outputs, outputs + HELD * largest) > memory:
            self.note = self.note or certificate.unseen(samples)
            return
        given = [leaf.clone() for leaf in self._leaves]
        wholes: list[Tensor] = []
        differences: list[float] = []
        try:
            for perturb in (False, True):
                if perturb:
                    generator = torch.Generator(x.device).manual_seed(0)
                    for leaf in self._leaves:
                        leaf.copy_(nudged(leaf, generator))
                try:
                    whole = called(self._module, x)
                except Exception:  # it accepts no such number of samples, or is not defined at such weights
                    break
                if not whole.isfinite().all():
                    break
                parts = zip(x.split(samples), whole.split(samples), strict=True)
                pairs = ((called(self._module, part), own) for part, own in parts)
                differences.append(certificate.difference_of_parts(pairs)[0])
                wholes.append(whole)
        finally:
            for leaf, value in zip(self._leaves, given, strict=True):
                leaf.copy_(value)
        if wholes:
            certificate.check_parts(wholes, differences, arrays.epsilon(wholes[0]), samples)
        else:
            self.note = self.note or certificate.unseen(samples)

    def pullback(self, x: Tensor) -> Callable[[Tensor], list[Tensor]]:
        """:meth:`gradient` at ``x`` as a function of v, which shares the forward pass if its graph allows that."""
        with torch.enable_grad():
            made = self._called(x)

        @torch.enable_grad()
        def pull(v: Tensor) -> list[Tensor]:
            nonlocal made
            self._clear()
            try:
                self._accumulate(*made, v, retain=True)
            except (RuntimeError, NoSecondPass):  # a graph that can be used once
                self._clear()
                made = self._called(x)
                self._accumulate(*made, v, retain=True)
            return self._accumulated()

        return pull

    def pushforward(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        """w -> J w, ``[P] -> [N O]``, as the derivative of v -> <J^T v, w>, which is linear in v; 2 passes each."""
        with torch.enable_grad(), plain_operations(self._module):
            outputs = called(self._module, x)
            v = torch.zeros_like(outputs, requires_grad=True)
            gradients = torch.autograd.grad(
                outputs, self._leaves, v, create_graph=True, allow_unused=True, materialize_grads=True
            )
            flat = torch.cat([g.reshape(-1) for g in gradients])

        def push(w: Tensor) -> Tensor:
            (image,) = torch.autograd.grad(flat, v, w, retain_graph=True, allow_unused=True, materialize_grads=True)
            return image.reshape(-1)

        return push

    def _called(self, x: Tensor) -> tuple[Tensor, list[Tensor] | None]:
        """f(x), and the leaves of its graph that the backward pass may write to; ``None`` for all of them.

        Functions of the user, such as ``call=``, may use tensors of the user, whose gradients and graphs must stay as
        they are. The graphs of a network and of its copy share these tensors, and no others. If there are none, all
        leaves are allowed, because some are only found during the backward pass, as in reentrant checkpointing.
        """
        outputs = called(self._module, x)
        found, own = leaves(outputs), {id(w) for w in (*self._leaves, x)}
        if all(id(w) in own for w in found):
            return outputs, None
        others = leaves(called(copied(self._module), x.detach().clone()))
        shared = {id(w) for w in others}
        into = [w for w in found if id(w) not in shared]
        return outputs, None if len(into) == len(found) else into

    def _clear(self) -> None:
        for leaf in self._leaves:
            leaf.grad = None

    def _accumulate(self, outputs: Tensor, into: list[Tensor] | None, v: Tensor, *, retain: bool) -> None:
        """Add to the gradients that the leaves hold.

        Raises:
            NoSecondPass: an earlier backward pass has freed a part of the graph.
        """
        if not outputs.requires_grad or (into is not None and not into):
            return
        try:
            outputs.backward(v.reshape(outputs.shape).to(outputs.dtype), retain_graph=retain, inputs=into)
        except RuntimeError as error:
            if "through the graph a second time" not in str(error):
                raise
            raise NoSecondPass(
                "the network keeps a tensor that its first call computed from parameters, so a second backward pass is "
                "impossible: compute it in each call"
            ) from error

    def _accumulated(self) -> list[Tensor]:
        """Take the gradients from the leaves and clear them."""
        found = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in self._leaves]
        self._clear()
        return [g.to_dense() if g.is_sparse else g for g in found]


def leaves(outputs: Tensor) -> list[Tensor]:
    """The leaf tensors of a graph."""
    if outputs.grad_fn is None:
        return [outputs] if outputs.requires_grad else []
    found: list[Tensor] = []
    seen: set[Any] = set()
    left: list[Any] = [outputs.grad_fn]
    while left:
        node = left.pop()
        if node is not None and node not in seen:
            seen.add(node)
            found += [node.variable] if hasattr(node, "variable") else []
            left.extend(before for before, _ in node.next_functions)
    return found


def saved_bytes(forward: Callable[[], object], without: Collection[int] = ()) -> int | None:
    """Bytes of the values that autograd saves in a forward pass; ``None`` if they cannot be counted.

    Args:
        forward: the forward pass.
        without: addresses of storages that do not count.
    """
    try:
        with saved_values() as kept:
            forward()
    except Exception:  # transforms of torch.func inside a network do not allow hooks on saved tensors
        return None
    return sum(size for where, size in kept.items() if where not in without)


@contextlib.contextmanager
def saved_values() -> Iterator[dict[int, int]]:
    """Bytes of the values that autograd saves inside this context, by address."""
    kept: dict[int, int] = {}

    def note(tensor: Tensor) -> Tensor:
        if tensor.layout is not torch.strided:  # sparse: entries and about as many bytes of indices
            kept[-id(tensor)] = 2 * tensor._nnz() * tensor.element_size()
        else:
            try:
                storage = tensor.untyped_storage()
                kept[storage.data_ptr()] = storage.nbytes()
            except (RuntimeError, NotImplementedError):  # inside a transform of torch.func
                kept[-id(tensor)] = tensor.numel() * tensor.element_size()
        return tensor.detach()  # the tensor itself would form a cycle with the node that holds it

    with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
        yield kept


def nudged(w: Tensor, generator: torch.Generator) -> Tensor:
    """A parameter plus noise, relative to its root mean square; if that is zero, to the usual scale for its fan-in."""
    size = float(w.square().mean().sqrt()) or max(1, w[0].numel() if w.ndim else 1) ** -0.5
    noise = torch.randn(w.shape, generator=generator, dtype=w.dtype, device=w.device)
    return noise.mul_(certificate.NUDGE * size).add_(w)


def flat(gradients: list[Tensor]) -> Tensor:
    """Gradients by parameter as one vector ``[P]``."""
    return torch.cat([g.reshape(-1) for g in gradients])
