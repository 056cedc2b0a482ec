"""Networks that end with a wide linear layer: their kernel from that of the network in front of it.

The layer gives f_t = W h_t + b at T positions of a sample, with V outputs each, from hidden vectors h_t of length
d < V. With W = U R, where U has d orthonormal columns, the network g_t = R h_t with a fixed R has T d outputs instead
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
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from ntkbench import metrics, operations
from ntkbench.errors import Unsupported, summary
from ntkbench.methods.base.gram import Gram, moments_of_grams
from ntkbench.methods.base.layerwise import Blocks, TracedNetwork, TracedProblem, over_blocks
from ntkbench.metrics import Moments
from ntkbench.operators import arrays, certificate, torch_network
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Tensor, nn

    from ntkbench.layerwise.blocks import Block
    from ntkbench.layerwise.last_product import LastProduct


def candidates(problem: Problem) -> list[tuple[int, int]]:
    """V and d of the weights that may be a network's wide head, by the sizes of the last matrix product.

    If these are not known, the sizes of its linear layers are used. Other parameters must count as well. A weight with
    several names is excluded; see :mod:`ntkbench.methods.base.tied_head`.
    """
    from torch import nn

    if problem.module is None:
        return []
    found, last = [], operations.count(problem).last
    used = collections.Counter(id(w) for _, w in problem.module.named_parameters(remove_duplicate=False))
    for name, layer in problem.module.named_modules():
        own = dict(layer.named_parameters(name, recurse=False))
        for key, w in own.items():
            if w.ndim != 2 or used[id(w)] > 1 or isinstance(layer, nn.Embedding):
                continue
            d, V = sorted(w.shape)
            if last is None:
                fits = isinstance(layer, nn.Linear) and w.shape == (V, d)
            else:
                fits = last[:1] == ((V, d),) or last[1:] == ((d, V),)
            in_front = set(problem.theta_0) - {key, *(other for other, b in own.items() if b.shape == (V,))}
            if fits and d < V and problem.O % V == 0 and in_front:
                found.append((V, d))
    return found


class HeadedNetwork:
    """A network at one set of weights, split in front of its wide head.

    Attributes:
        layer: the head.
        T, d, V: positions of a sample, inputs of the head, and its outputs.
        W: the head's weight, ``[V, d]``.
        G: see :class:`Gram`.
        note: what comparisons with plain autograd leave open; see :class:`ntkbench.operators.plain.PlainNetwork`.

    Args:
        problem: the problem of the network.
        which: ``"theta_0"`` or ``"theta_f"``.
        target: where to compute.
        layer: the head, if it is known; ``None`` to read it from the graph.

    Raises:
        Unsupported: the network does not end with a linear layer that is wider than its inputs and used once, or no
            parameter in front of it counts.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, which: str, target: Target, layer: LastProduct | None = None) -> None:
        from ntkbench.modules import copied, load

        self._problem, self._which, self._target, self.note = problem, which, target, ""
        module, self._parameters, self._x = torch_network(problem, which, target)
        self._module = load(copied(module), self._parameters)
        self.layer = layer or _last_layer(self._module, self._x)
        self.V, self.d, self.T = self.layer.V, self.layer.d, problem.O // self.layer.V
        own = dict(self._module.named_parameters())
        self.W = self._turned(own[self.layer.weight].detach())
        if not set(self._parameters) - {self.layer.weight, self.layer.bias}:
            raise Unsupported("no parameter in front of its last linear layer counts")
        self._traced: list[TracedProblem] = []
        self._hidden = self._inputs_of_head(own[self.layer.bias].detach() if self.layer.bias else 0)
        self.G = self._gram()

    def _turned(self, t: Tensor) -> Tensor:
        """Convert a weight from the module's layout to ``[V, d]``, or back."""
        return t.T if self.layer.turned else t

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
        """The network with a fixed matrix ``[d, d]`` instead of its head, traced."""
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
        """Compare a gradient of the network with that of the network with another head; 2 plain backward passes.

        With a cotangent c at the outputs, parameters in front of the head have the gradient that they have in the other
        network with Q^T c. The gradient of the head's weight is c h^T. If the other network's head counts as well, its
        weight and bias give the part within the span of Q.

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
        c = certificate.random_weights(len(self._hidden) * self.V, like).reshape(-1, self.V)
        Q = Q.to(c.dtype)
        whole_network = PlainNetwork(self._module, self._parameters, owned=True)
        plain = whole_network.gradient(self._x, c, memory)
        self.note = whole_network.note
        module, parameters, x = torch_network(other, "theta_0", self._target)
        inner = PlainNetwork(module, parameters).gradient(x, c @ Q, memory)
        found = dict(zip(parameters, inner, strict=True))
        for name, whole in {self.layer.weight: c.T @ self._hidden.to(c.dtype), self.layer.bias: c.sum(0)}.items():
            turned = self._turned if name == self.layer.weight else lambda t: t
            if name in found:
                whole = Q @ turned(found[name]) + (whole - Q @ (Q.T @ whole))
            found[name] = turned(whole)
        off = certificate.distance_of_parts(zip((found[name] for name in names), plain, strict=True))
        certificate.check(off, arrays.epsilon(like))
        return off

    def forget(self) -> None:
        """Certify the next kernels of g even if they were certified before."""
        for traced in self._traced:
            traced.certify_again()

    def _with_head(self, matrix: Tensor, *, counted: bool = False) -> Problem:
        """The problem at only this set of weights, with another head.

        Integer attributes of the layer's module that equal V, such as its number of outputs, are set to r.

        Args:
            matrix: ``[r, d]``.
            counted: whether its parameters count as those of the head do. Its bias is zero, since no gradient depends
                on its value.
        """
        from torch import nn

        from ntkbench.modules import copied

        owner, _ = self._problem.end(self._which)
        module, r = copied(owner.network), len(matrix)
        values = {self.layer.weight: self._turned(matrix).cpu().numpy()}
        if self.layer.bias:
            values[self.layer.bias] = np.zeros(r)
        for name, value in values.items():
            parent, _, leaf = name.rpartition(".")
            layer = module.get_submodule(parent)
            old = layer.get_parameter(leaf)
            made = nn.Parameter(old.new_empty(value.shape), counted and old.requires_grad)
            setattr(layer, leaf, made)
            sizes = {key: r for key, size in vars(layer).items() if type(size) is int and size == self.V}
            vars(layer).update(sizes)
        theta = {key: w for key, w in self._problem.weights(self._which).items() if key not in values}
        fixed = {key: w for key, w in self._problem.fixed(self._which).items() if key not in values}
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
            _shape=[(self._problem.N, self.T * r)],
        )

    def _inputs_of_head(self, bias: Tensor | int) -> Tensor:
        """The head's inputs ``[N T, d]`` in float64: outputs of the network with the identity as head and no bias.

        The original network runs on one sample only, since all outputs together may not fit in memory.

        Raises:
            Unsupported: the network with another head fails, or its results give other outputs of the first sample.
        """
        import torch

        from ntkbench.modules import called, copied, load

        short = self._with_head(torch.eye(self.d))
        module, parameters, x = torch_network(short, "theta_0", self._target)
        module = load(copied(module), parameters)
        with torch.no_grad():
            try:
                hidden = called(module, x).reshape(len(x), self.T, self.d)
            except Exception as error:  # the network may depend on the size of its head in any way
                reason = f"its last linear layer cannot be replaced by a shorter one: {summary(error)}"
                raise Unsupported(reason) from error
            outputs = called(self._module, self._x[:1]).reshape(self.T, self.V)
            made = hidden[0] @ self.W.T + bias
        if not certificate.distance(made, outputs) <= certificate.tolerance(arrays.epsilon(outputs)):
            raise Unsupported("with a shorter last linear layer, the inputs of that layer differ")
        return hidden.flatten(0, 1).double()

    def _gram(self) -> Gram:
        return Gram(self._hidden * (self.layer.weight in self._parameters), self.layer.bias in self._parameters)


def _last_layer(module: nn.Module, x: Tensor) -> LastProduct:
    """The wide linear layer that a network ends with, from its trace with all weights as parameters."""
    import torch

    from ntkbench.layerwise.last_product import last_product
    from ntkbench.layerwise.trace import trace

    weights = {name: w for name, w in module.named_parameters() if w.is_floating_point()}
    graph = trace(module, weights, x)
    return last_product(graph, graph.bind(module, torch.device("cpu")))


class HeadedProblem:
    """A problem on the device, with its networks split in front of their heads.

    Attributes:
        problem, target: the problem, and how it is computed.
        short: the networks with heads of fewer outputs that estimators run on.

    Raises:
        Unsupported: see :class:`HeadedNetwork`.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.target = problem, target
        self._ends: dict[str, HeadedNetwork] = {"theta_0": HeadedNetwork(problem, "theta_0", target)}
        self._between: TracedNetwork | None = None
        self._certified: dict[str, float] = {}
        self.short = ShortHeads(self)

    def ends(self, metric: str) -> list[HeadedNetwork]:
        """The networks of a metric.

        Raises:
            Unsupported: there are no such weights, a network has no wide head, or the heads differ in size.
        """
        names = metrics.parameter_sets(metric)
        for name in names:
            if name not in self._ends:
                own = self.problem.end(name)[0] is self.problem
                layer = self._ends["theta_0"].layer if own else None
                self._ends[name] = HeadedNetwork(self.problem, name, self.target, layer)
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

    def notes(self, metric: str) -> tuple[str, ...]:
        """What certificates leave open."""
        return tuple(end.note for end in self.ends(metric) if end.note)

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

        def summed(blocks: Blocks) -> _Sums:
            sums = _Sums(grams, ends[0].T, ends[0].d)
            for left, right, parts in blocks:
                if left == right:
                    for part in parts:
                        mirror(part, TILE)
                sums.add(left, right, parts)
            return sums

        sums = over_blocks(self.networks(metric), summed)
        trace = sums.trace + of_head.trace
        square = sums.squares[0] + of_head.square + 2 * sums.crossed[0, 0]
        if metric != "alignment":
            return Moments(trace, square)
        square_f = sums.squares[1] + of_head.square_f + 2 * sums.crossed[1, 1]
        cross = sums.cross + of_head.cross + sums.crossed[0, 1] + sums.crossed[1, 0]
        return Moments(trace, square, square_f, cross)


class ShortHeads:
    """A problem's networks with shorter heads whose parameters count: f' in this module's docstring.

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

    def notes(self, metric: str) -> tuple[str, ...]:
        """What certificates leave open."""
        return self._headed.notes(metric)

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
        """Sum over the entries of a block whose hidden units are equal, weighted by G at their positions."""
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
    """Passes that the moments take, by the V of each candidate: T d for g at each set of weights, and for e."""
    found: dict[int, float] = {}
    for V, d in candidates(problem):
        needed = problem.O / V * d * (3 if metric == "alignment" else 1)
        found[V] = min(needed, found.get(V, needed))
    return found
