"""Networks that end with a wide linear layer: their kernel from that of the network in front of it.

The layer gives f_t = W h_t + b at T positions of a sample, with V outputs each, from hidden vectors h_t of length
d < V. With W = U R, where U has d orthonormal columns, the network g_t = R h_t with a fixed R has T d outputs in place
of T V, and

    Theta = (I ⊗ U) Theta_g (I ⊗ U^T) + G ⊗ I_V,    G_ts = h_t . h_s (+ 1 with a bias),

with t and s the positions of all samples: the first term is the contribution of the parameters in front of the layer,
the second that of the layer. All moments of Theta therefore follow from Theta_g and G:

    tr Theta = tr Theta_g + V tr G
    ||Theta||^2 = ||Theta_g||^2 + V ||G||^2 + 2 sum_ts G_ts tr Theta_g,ts

and tr(Theta Theta_f) = tr(Theta_g Theta_e) + V sum G G_f + sum_ts (G_ts tr Theta_gf,ts + G_f,ts tr Theta_g,ts), where
e_t is U^T W_f h_t at the other weights.

Estimators run on a network f' with a head whose parameters count. Let Q, ``[V, r]``, have orthonormal columns that span
those of W, or those of W and W_f: r = d or 2 d. With the head Q^T W, f' has T r outputs, and

    Theta = (I ⊗ Q) Theta' (I ⊗ Q^T) + G ⊗ (I_V - Q Q^T)

as for tied heads (see :mod:`ntkbench.methods.base.tied_head`). The second term is exact; probes estimate the first one.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from ntkbench import metrics
from ntkbench.errors import Unsupported
from ntkbench.methods.base.gram import Gram, moments_of_grams
from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem, blocks_of
from ntkbench.metrics import Moments
from ntkbench.operators import arrays, certificate, torch_network
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ntkbench.layerwise.blocks import Block


def candidates(problem: Problem) -> list[nn.Linear]:
    """Layers of a network that may be its wide head, by their sizes; other parameters must count as well.

    A layer that shares its weight with another layer is excluded; see :mod:`ntkbench.methods.base.tied_head`.
    """
    from torch import nn

    if problem.module is None:
        return []
    found = []
    used = collections.Counter(id(w) for _, w in problem.module.named_parameters(remove_duplicate=False))
    for name, layer in problem.module.named_modules():
        own = {f"{name}.{key}".lstrip(".") for key in ("weight", "bias")}
        wide = type(layer) is nn.Linear and layer.in_features < layer.out_features
        alone = wide and used[id(layer.weight)] == 1
        if alone and problem.O % layer.out_features == 0 and set(problem.theta_0) - own:
            found.append(layer)
    return found


class HeadedNetwork:
    """A network at one set of weights, split in front of its wide head.

    Attributes:
        T, d, V: positions of a sample, inputs of the head, and its outputs.
        W: the head's weight, ``[V, d]``.
        G: see :class:`Gram`.

    Args:
        problem: the problem of the network.
        which: ``"theta_0"`` or ``"theta_f"``.
        target: where to compute.

    Raises:
        Unsupported: the network does not end with a linear layer that is wider than its inputs and used once, or no
            parameter in front of it counts.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, which: str, target: Target) -> None:
        from ntkbench.modules import copied, load

        self._problem, self._which, self._target = problem, which, target
        module, self._parameters, self._x = torch_network(problem, which, target)
        self._module = load(copied(module), self._parameters)
        self._name, layer, self._positions = _head(self._module, self._x)
        self._weight, self._bias = f"{self._name}.weight", f"{self._name}.bias"
        self.V, self.d = layer.out_features, layer.in_features
        self.T = problem.O // self.V
        self.W = layer.weight.detach()
        if not set(self._parameters) - {self._weight, self._bias}:
            raise Unsupported("no parameter in front of its last linear layer counts")
        self._traced: list[TracedProblem] = []
        self._hidden = self._inputs_of_head()
        self.G = self._gram()

    @functools.cached_property
    def _factors(self) -> tuple[Tensor, Tensor]:
        import torch

        U, R = torch.linalg.qr(self.W)
        return U, R

    @property
    def U(self) -> Tensor:
        """The orthonormal factor of the head's weight, ``[V, d]``."""
        return self._factors[0]

    @functools.cached_property
    def _g(self) -> Problem:
        return self._with_head(self._factors[1])

    @functools.cached_property
    def inner(self) -> TracedNetwork:
        """The network g, traced."""
        return self._trace(self._g)

    def replaced(self, matrix: Tensor) -> TracedNetwork:
        """The network with a fixed matrix ``[d, d]`` in place of its head, traced."""
        return self._trace(self._with_head(matrix))

    def shortened(self, Q: Tensor) -> tuple[Problem, TracedNetwork]:
        """The problem whose head is Q^T W and Q^T b, which count as W and b do, and its network, traced."""
        short = self._with_head(Q.T @ self.W, counted=True)
        return short, self._trace(short)

    def _trace(self, problem: Problem) -> TracedNetwork:
        self._traced.append(TracedProblem(problem, self._target))
        (network,) = self._traced[-1].ends("trace")
        return network

    def certify(self) -> float:
        """Compare a gradient of the network with that of g and the head's; see :meth:`compare`."""
        return self.compare(self._g, self.U)

    def compare(self, other: Problem, Q: Tensor) -> float:
        """Compare a gradient of the network with that of another head; 2 plain backward passes.

        With a cotangent c at the outputs, parameters in front of the head have the gradient that they have in the other
        network with Q^T c. The head's weight has c h^T. If the other network's head counts as well, it has the part
        within the span of Q, and so does its bias.

        Args:
            other: the problem with another head, ``[r, d]``.
            Q: orthonormal columns, ``[V, r]``.

        Returns:
            The relative difference.

        Raises:
            Uncertified: they differ.
        """
        from ntkbench.operators.plain import PlainNetwork

        names, memory = list(self._parameters), self._target.memory
        like = self._parameters[names[0]]
        c = certificate.random_signs(len(self._hidden) * self.V, like).reshape(-1, self.V)
        Q = Q.to(c.dtype)
        plain = PlainNetwork(self._module, self._parameters, owned=True).gradient(self._x, c, memory)
        module, parameters, x = torch_network(other, "theta_0", self._target)
        inner = PlainNetwork(module, parameters).gradient(x, c @ Q, memory)
        found = dict(zip(parameters, inner, strict=True))
        for name, whole in {self._weight: c.T @ self._hidden.to(c.dtype), self._bias: c.sum(0)}.items():
            found[name] = Q @ found[name] + (whole - Q @ (Q.T @ whole)) if name in found else whole
        off = certificate.distance_of_parts(zip((found[name] for name in names), plain, strict=True))
        certificate.check(off, arrays.epsilon(like))
        return off

    def forget(self) -> None:
        """Certify the next kernels of g even if they were certified before."""
        for traced in self._traced:
            traced.certify_again()

    def _with_head(self, matrix: Tensor, *, counted: bool = False) -> Problem:
        """The problem at only this set of weights, with another head.

        Args:
            matrix: ``[r, d]``.
            counted: whether its parameters count as those of the head do. It then also has the head's bias, set to
                zero, since no gradient depends on its value.
        """
        from torch import nn

        from ntkbench.modules import copied

        owner, _ = self._problem.end(self._which)
        module = copied(owner.network)
        parent, _, leaf = self._name.rpartition(".")
        layer = module.get_submodule(self._name)
        bias = counted and layer.bias is not None
        short = nn.Linear(self.d, len(matrix), bias=bias)
        values = {self._weight: matrix.cpu().numpy()}
        if bias:
            values[self._bias] = np.zeros(len(matrix))
        for key, parameter in short.named_parameters():
            parameter.requires_grad_(counted and getattr(layer, key).requires_grad)
        setattr(module.get_submodule(parent), leaf, short)
        of_head = (self._weight, self._bias)
        theta = {key: w for key, w in self._problem.weights(self._which).items() if key not in of_head}
        fixed = {key: w for key, w in self._problem.fixed(self._which).items() if key not in of_head}
        own = {key: w for key, w in values.items() if counted and key in self._parameters}
        return dataclasses.replace(
            owner,
            module=module,
            theta_0={**theta, **own},
            theta_f=None,
            fixed_0={**fixed, **{key: w for key, w in values.items() if key not in own}},
            fixed_f={},
            other=None,
            jax_forward=None,
            _shape=[(self._problem.N, self.T * len(matrix))],
        )

    def _inputs_of_head(self) -> Tensor:
        """``[N T, d]`` in float64; the network itself may have more outputs than fit in memory."""
        import torch

        from ntkbench.modules import copied, load

        short = self._with_head(self.W.new_zeros(1, self.d))
        module, parameters, x = torch_network(short, "theta_0", self._target)
        module = load(copied(module), parameters)
        seen: list[Tensor] = []
        module.get_submodule(self._name).register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
        with torch.no_grad():
            module(x)
        return seen[-1].reshape(len(x), -1, self.d)[:, self._positions].reshape(-1, self.d).double()

    def _gram(self) -> Gram:
        return Gram(self._hidden * (self._weight in self._parameters), self._bias in self._parameters)


def _head(module: nn.Module, x: Tensor) -> tuple[str, nn.Linear, Tensor]:
    """The linear layer whose results are the outputs of a network: its name, itself, and the positions that count.

    It is the layer that is called last. Its results on two samples are replaced by indices of positions and of outputs,
    which shows which of them are the outputs; the certificate covers the gradients of all samples.
    """
    import torch
    from torch import nn

    x, calls = x[:2], []
    layers = {name: layer for name, layer in module.named_modules() if type(layer) is nn.Linear}
    note = lambda name: lambda _, __, made: calls.append((name, made.shape))  # noqa: E731
    _outputs(module, x, {layer: note(name) for name, layer in layers.items()})
    if not calls:
        raise Unsupported("the network has no linear layer")
    name, shape = calls[-1]
    layer, V = layers[name], shape[-1]
    used = collections.Counter(id(w) for _, w in module.named_parameters(remove_duplicate=False))
    if layer.in_features >= V:
        raise Unsupported(f"its last linear layer, {name}, is no wider than its inputs")
    if [each for each, _ in calls].count(name) > 1 or any(used[id(w)] > 1 for w in layer.parameters()):
        raise Unsupported(f"its last linear layer, {name}, is used more than once")
    numbers = torch.arange(shape[:-1].numel(), device=x.device).reshape(*shape[:-1], 1)
    give = lambda values: lambda _, __, made: values.expand(shape).to(made)  # noqa: E731
    positions = _outputs(module, x, {layer: give(numbers)})
    # Of both signs and unsorted, so that a ReLU or a sort behind the layer is detected.
    expected = torch.randperm(V, generator=torch.Generator().manual_seed(0)).to(x.device) - V // 2
    units = _outputs(module, x, {layer: give(expected)})
    of_sample = len(numbers.reshape(-1)) // len(x)
    fits = positions.numel() % (len(x) * V) == 0 and bool((units.reshape(-1, V) == expected.to(units)).all())
    if fits:
        rows = positions.reshape(len(x), -1, V) - of_sample * torch.arange(len(x)).to(positions)[:, None, None]
        found = rows[0, :, 0].long()
        fits = bool((rows == found[:, None]).all()) and bool((found >= 0).all()) and bool((found < of_sample).all())
    if not fits:
        raise Unsupported(f"its outputs are not the unchanged results of its last linear layer, {name}")
    return name, layer, found


def _outputs(module: nn.Module, x: Tensor, hooks: Mapping[nn.Module, Callable[..., Any]]) -> Tensor:
    """The outputs of a network with hooks on some of its layers."""
    import torch

    handles = [layer.register_forward_hook(hook) for layer, hook in hooks.items()]
    try:
        with torch.no_grad():
            made: Tensor = module(x)
            return made
    finally:
        for handle in handles:
            handle.remove()


class HeadedProblem:
    """A problem on the device, with its networks split in front of their heads.

    Attributes:
        short: its networks with heads of fewer outputs, for estimators.

    Raises:
        Unsupported: see :class:`HeadedNetwork`.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, target: Target) -> None:
        self._problem, self._target = problem, target
        self._ends: dict[str, HeadedNetwork] = {"theta_0": HeadedNetwork(problem, "theta_0", target)}
        self._between: TracedNetwork | None = None
        self._certified: dict[str, float] = {}
        self.short = ShortHeads(self)

    def ends(self, metric: str) -> list[HeadedNetwork]:
        """The networks of a metric.

        Raises:
            Unsupported: there are no such weights, or a network has no head, or another one.
        """
        names = metrics.parameter_sets(metric)
        for name in names:
            if name not in self._ends:
                self._ends[name] = HeadedNetwork(self._problem, name, self._target)
        found = [self._ends[name] for name in names]
        if len({(end.T, end.d, end.V) for end in found}) > 1:
            raise Unsupported("the two networks have heads of different sizes")
        return found

    def networks(self, metric: str) -> list[TracedNetwork]:
        """The networks of the kernels: g at each set of weights, and for alignment e at theta_f."""
        ends = self.ends(metric)
        found = [end.inner for end in ends]
        if metric == "alignment":
            if self._between is None:
                self._between = ends[1].replaced(ends[0].U.T @ ends[1].W)
            found.append(self._between)
        return found

    def certificate(self, metric: str) -> float:
        """The largest relative difference from plain autograd; see :meth:`HeadedNetwork.certify`."""
        for name, end in zip(metrics.parameter_sets(metric), self.ends(metric), strict=True):
            if name not in self._certified:
                self._certified[name] = end.certify()
        return max(self._certified[name] for name in metrics.parameter_sets(metric))

    def certify_again(self) -> None:
        """Compare with plain autograd again, even after an earlier comparison."""
        self._certified.clear()
        self.short.certify_again()
        for end in self._ends.values():
            end.forget()

    def moments(self, metric: str) -> Moments:
        """The moments that a metric depends on."""
        from ntkbench.layerwise.kernel import mirror

        ends = self.ends(metric)
        if metric == "trace":
            (end,) = ends
            inner = end.inner
            own = inner.engine.diagonal(inner.parameters, inner.x).double().sum()
            return Moments(trace=float(own) + end.V * end.G.trace())
        grams = [end.G for end in ends]
        of_head = moments_of_grams(*grams).times(ends[0].V)
        sums = _Sums(grams, ends[0].T, ends[0].d)
        for left, right, parts in blocks_of(self.networks(metric)):
            if left == right:
                for part in parts:
                    mirror(part, TILE)
            sums.add(left, right, parts)
        trace = sums.trace + of_head.trace
        square = sums.squares[0] + of_head.square + 2 * sums.crossed[0, 0]
        if metric != "alignment":
            return Moments(trace, square)
        square_f = sums.squares[1] + of_head.square_f + 2 * sums.crossed[1, 1]
        cross = sums.cross + of_head.cross + sums.crossed[0, 1] + sums.crossed[1, 0]
        return Moments(trace, square, square_f, cross)


class ShortHeads:
    """The networks of a problem with heads of fewer outputs, which count: f' in this module's docstring.

    Args:
        headed: the problem.
    """

    def __init__(self, headed: HeadedProblem) -> None:
        self._headed = headed
        self._made: dict[tuple[str, ...], tuple[Tensor, list[tuple[Problem, TracedNetwork]]]] = {}
        self._certified: dict[tuple[str, ...], float] = {}

    def networks(self, metric: str) -> list[TracedNetwork]:
        """f' at each set of weights.

        Raises:
            Unsupported: the weights span no fewer dimensions than there are outputs; or as :meth:`HeadedProblem.ends`.
        """
        return [network for _, network in self._of(metric)[1]]

    def known(self, metric: str) -> Moments:
        """The moments of G ⊗ (I_V - Q Q^T)."""
        V, r = self._of(metric)[0].shape
        ends = self._headed.ends(metric)
        return moments_of_grams(*(end.G for end in ends)).times(V - r)

    def certificate(self, metric: str) -> float:
        """The largest relative difference from plain autograd; see :meth:`HeadedNetwork.compare`."""
        names = metrics.parameter_sets(metric)
        if names not in self._certified:
            Q, made = self._of(metric)
            ends = self._headed.ends(metric)
            self._certified[names] = max(end.compare(short, Q) for end, (short, _) in zip(ends, made, strict=True))
        return self._certified[names]

    def certify_again(self) -> None:
        """Compare with plain autograd again, even after an earlier comparison."""
        self._certified.clear()

    def _of(self, metric: str) -> tuple[Tensor, list[tuple[Problem, TracedNetwork]]]:
        import torch

        names = metrics.parameter_sets(metric)
        if names not in self._made:
            ends = self._headed.ends(metric)
            V, r = ends[0].V, sum(end.d for end in ends)
            if r >= V:
                raise Unsupported(f"its {V} outputs are no more than the {r} dimensions that its heads' weights span")
            Q = ends[0].U if len(ends) == 1 else torch.linalg.qr(torch.cat([end.W for end in ends], 1))[0]
            self._made[names] = Q, [end.shortened(Q) for end in ends]
        return self._made[names]


TILE = 512
"""Rows and columns that are mirrored at a time."""


class _Sums:
    """Sums over the entries of Theta_g at one or two sets of weights.

    Attributes:
        trace: tr Theta_g of the first kernel.
        squares: ||Theta_g||^2 of each.
        cross: tr(Theta_g Theta_e).
        crossed: sum_ts G_ts tr Theta_g,ts, by the indices of G and of Theta_g.
    """

    def __init__(self, grams: Sequence[Gram], T: int, d: int) -> None:
        self._grams, self._T, self._d = grams, T, d
        self.trace, self.squares, self.cross = 0.0, [0.0] * len(grams), 0.0
        self.crossed = {(i, j): 0.0 for i in range(len(grams)) for j in range(len(grams))}

    def add(self, left: Block, right: Block, parts: list[Tensor]) -> None:
        """Add a block ``[N1, K1, N2, K2]`` of each kernel; one that is not on the diagonal counts twice."""
        copies = 1 if left == right else 2
        if left == right:
            self.trace += float(parts[0].flatten(2).flatten(0, 1).diagonal().double().sum())
        for i, part in enumerate(parts[: len(self._grams)]):
            self.squares[i] += copies * float(metrics.squared_norm(part.flatten(1)).double())
            for j, gram in enumerate(self._grams):
                self.crossed[j, i] += copies * self._with_gram(gram, left, right, part)
        if len(parts) > len(self._grams):
            self.cross += copies * float(metrics.inner_product(parts[0].flatten(1), parts[-1].flatten(1)).double())

    def _with_gram(self, gram: Gram, left: Block, right: Block, part: Tensor) -> float:
        """sum over the entries of a block whose hidden units are equal, times G at their positions."""
        found = 0.0
        rows = np.arange(left.samples.start, left.samples.stop) * self._T
        columns = np.arange(right.samples.start, right.samples.stop) * self._T
        for k in range(part.shape[1]):
            t, unit = divmod(left.directions.start + k, self._d)
            first = (unit - right.directions.start) % self._d
            numbers = np.arange(right.directions.start + first, right.directions.stop, self._d)
            at = (columns[:, None] + numbers // self._d).reshape(-1)
            weights = gram.part(rows + t, at).reshape(len(rows), len(columns), len(numbers))
            found += float((part[:, k, :, first :: self._d].double() * weights).sum())
        return found


def passes(problem: Problem, metric: str) -> dict[int, float]:
    """Passes that the moments take, by a candidate's V: T d of g at each set of weights, and those of e."""
    found: dict[int, float] = {}
    for layer in candidates(problem):
        needed = problem.O / layer.out_features * layer.in_features * (3 if metric == "alignment" else 1)
        found[layer.out_features] = min(needed, found.get(layer.out_features, needed))
    return found
