"""Networks whose wide head is also their embedding: their kernel from that of one with a shorter vocabulary.

W, ``[V, d]``, is both the table in which tokens are looked up and the head, f_t = W h_t + b at T positions of a sample.
A gradient with respect to W has two parts: that of the head, h_t in the row of the output, and that of the table,
through the hidden vectors, in the rows of the tokens that occur. Theta has both, and the cross terms between them.

Let Q, ``[V, r]``, have orthonormal columns that span those of W and the unit vectors of all tokens that occur:
Q = [I, U] with U from the QR factorisation of the other rows of W. Then W' = Q^T W with b' = Q^T b is table and head of
a network f' with r outputs instead of V, whose tokens have the same rows, so that h' = h and f = Q f'. A change Q A of
W is a change A of W', in either part. A change orthogonal to Q moves no h, since it is zero in the rows of tokens, and
no output within the span of Q. So

    Theta = (I ⊗ Q) Theta' (I ⊗ Q^T) + G ⊗ (I_V - Q Q^T),    G_ts = h_t . h_s (+ 1 with a bias),

with t and s the positions of all samples. The cross terms are within Theta', only in the rows of tokens. The two terms
act on orthogonal spaces, so their moments add up:

    tr Theta = tr Theta' + (V - r) tr G
    ||Theta||^2 = ||Theta'||^2 + (V - r) ||G||^2
    tr(Theta Theta_f) = tr(Theta' Theta'_f) + (V - r) tr(G G_f)

the last with one Q for both weights, which spans the columns of W and of W_f. With m distinct tokens, r is m + d, or
m + 2 d for alignment. This takes T r passes instead of T V; no matrix is larger than ``[N T r, N T r]`` or W.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from ntkbench import metrics
from ntkbench.errors import Unsupported
from ntkbench.layerwise import last_product
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.layerwise.layers import Layer
from ntkbench.layerwise.rules import Use
from ntkbench.layerwise.trace import aten
from ntkbench.methods.base.gram import Gram, moments_of_grams
from ntkbench.methods.base.layerwise import Blocks, TracedNetwork, TracedProblem, over_blocks
from ntkbench.metrics import Moments
from ntkbench.modules import copied, load
from ntkbench.operators import arrays, certificate, torch_network
from ntkbench.operators.plain import PlainNetwork
from ntkbench.options import Target
from ntkbench.problem import Problem


def tables(problem: Problem) -> list[str]:
    """Embeddings that may also be the wide head of a network, by their sizes."""
    if problem.module is None:
        return []
    return [
        name
        for name, layer in problem.module.named_modules()
        if type(layer) is nn.Embedding
        and layer.embedding_dim < layer.num_embeddings
        and problem.O % layer.num_embeddings == 0
    ]


def passes(problem: Problem, metric: str) -> dict[int, float]:
    """Passes that the moments take, by the V of each candidate; if x is not tokens, all tokens count as distinct."""
    assert problem.module is not None
    ends = len(metrics.parameter_sets(metric))
    found: dict[int, float] = {}
    for name in tables(problem):
        layer = problem.module.get_submodule(name)
        assert isinstance(layer, nn.Embedding)
        V, T = layer.num_embeddings, problem.O // layer.num_embeddings
        tokens = len(np.unique(problem.x)) if problem.x.dtype.kind in "iu" and problem.x.ndim > 1 else problem.N * T
        needed = float(ends * T * (min(tokens, V) + ends * layer.embedding_dim))
        found[V] = min(needed, found.get(V, needed))
    return found


@dataclass(frozen=True)
class Basis:
    """Orthonormal columns Q ``[V, r]``: the unit vectors of some tokens, and others that are zero in these rows.

    Attributes:
        tokens, others: numbers of these tokens and of all others, ascending.
        U: the other columns in the other rows, ``[V - m, r - m]``.
    """

    tokens: Tensor
    others: Tensor
    U: Tensor

    @classmethod
    def of(cls, tokens: Tensor, weights: Sequence[Tensor]) -> Basis:
        """Columns that span those of some weights ``[V, d]`` and the unit vectors of tokens.

        Raises:
            Unsupported: they are no fewer than V.
        """
        V, wide = len(weights[0]), sum(w.shape[1] for w in weights)
        if len(tokens) + wide >= V:
            raise Unsupported(
                f"its vocabulary of {V} is not larger than its {len(tokens)} different tokens and {wide} hidden units "
                "together"
            )
        is_other = torch.ones(V, dtype=torch.bool, device=tokens.device)
        is_other[tokens] = False
        U, _ = torch.linalg.qr(torch.cat([w.detach()[is_other] for w in weights], 1))
        return cls(tokens, is_other.nonzero()[:, 0], U)

    @property
    def shape(self) -> tuple[int, int]:
        """V, r."""
        return len(self.tokens) + len(self.others), len(self.tokens) + self.U.shape[1]

    def down(self, t: Tensor) -> Tensor:
        """Q^T t for t ``[V, ...]``."""
        return torch.cat([t[self.tokens], self.U.T.to(t.dtype) @ t[self.others]])

    def up(self, t: Tensor) -> Tensor:
        """Q t for t ``[r, ...]``."""
        found = t.new_empty(self.shape[0], *t.shape[1:])
        found[self.tokens] = t[: len(self.tokens)]
        found[self.others] = self.U.to(t.dtype) @ t[len(self.tokens) :]
        return found

    def outside(self, t: Tensor) -> Tensor:
        """(I - Q Q^T) t for t ``[V, ...]``."""
        return t - self.up(self.down(t))


class Renumbered(nn.Embedding):
    """An embedding of the tokens of a basis, by their numbers in the whole vocabulary; other tokens get wrong rows.

    Args:
        table: embedding of the whole vocabulary.
        weight: ``[r, d]``.
        basis: basis of the tokens, which have the first rows.
    """

    numbers: Tensor

    def __init__(self, table: nn.Embedding, weight: nn.Parameter, basis: Basis) -> None:
        tokens, padding, place = basis.tokens.cpu(), table.padding_idx, None
        if padding is not None and padding in tokens:
            place = int((tokens < padding).sum())
        super().__init__(weight.shape[0], weight.shape[1], place, _weight=weight.detach())
        self.weight = weight
        numbers = torch.zeros(basis.shape[0], dtype=torch.long)
        numbers[tokens] = torch.arange(len(tokens))
        self.register_buffer("numbers", numbers, persistent=False)

    def forward(self, tokens: Tensor) -> Tensor:
        return super().forward(self.numbers[tokens])


class Whole:
    """A network at one set of weights, whose embedding may be its head.

    Attributes:
        problem, which: the problem and the weights of the network.
        module, parameters, x: the network with its weights, those that count by name, and the inputs, on the device.
        table: the name of the embedding.
        weight: the name of its weight W.
        bias: the name of the head's bias; ``None`` if it has none.
        tokens: numbers of the tokens that occur, ascending.

    Raises:
        Unsupported: no tokens are looked up in the embedding, or its weight is frozen or not selected.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, which: str, target: Target, table: str) -> None:
        self.problem, self.which = problem, which
        module, self.parameters, self.x = torch_network(problem, which, target)
        self.module = load(copied(module), self.parameters)
        self.table, layer = table, self.module.get_submodule(table)
        assert isinstance(layer, nn.Embedding)
        self.weight, self.bias = _name(self.module, layer.weight), None
        for other in self.module.modules():
            if type(other) is nn.Linear and other.weight is layer.weight and other.bias is not None:
                self.bias = _name(self.module, other.bias)
        if self.weight not in self.parameters:
            raise Unsupported(f"the weight of its embedding, {table}, is frozen or not selected")
        if layer.max_norm is not None or layer.scale_grad_by_freq:
            raise Unsupported(f"its embedding, {table}, changes its weight or its gradient")
        self.tokens = self._looked_up(layer)

    @property
    def W(self) -> Tensor:
        """The weight, ``[V, d]``."""
        return self.parameters[self.weight]

    def shortened(self, basis: Basis) -> Problem:
        """The problem of f' at only this set of weights, for a basis that spans W and the tokens."""
        problem, (owner, _), (V, r) = self.problem, self.problem.end(self.which), basis.shape
        own = dict(self.module.named_parameters())
        changed = {name: basis.down(own[name].detach()) for name in (self.weight, self.bias) if name}
        module = copied(owner.network)
        theirs, table = dict(module.named_parameters()), module.get_submodule(self.table)
        assert isinstance(table, nn.Embedding)
        made = {
            id(theirs[name]): nn.Parameter(w.to(theirs[name]), theirs[name].requires_grad)
            for name, w in changed.items()
        }
        short = Renumbered(table, made[id(table.weight)], basis)
        for layer in list(module.modules()):
            layer._parameters.update({key: made.get(id(w), w) for key, w in layer._parameters.items()})
            layer._modules.update({key: short if child is table else child for key, child in layer._modules.items()})
            if isinstance(layer, nn.Linear) and layer.weight is short.weight:
                layer.out_features = r
        values = {name: w.cpu().numpy() for name, w in changed.items()}
        return dataclasses.replace(
            owner,
            module=module,
            theta_0={name: values.get(name, w) for name, w in problem.weights(self.which).items()},
            theta_f=None,
            fixed_0=dict(problem.fixed(self.which))
            | {name: value for name, value in values.items() if name not in self.parameters},
            fixed_f={},
            other=None,
            jax_forward=None,
            _shape=[(problem.N, problem.O // V * r)],
        )

    def _looked_up(self, layer: nn.Embedding) -> Tensor:
        """The tokens of all samples; one runs at a time, since all outputs together may not fit in memory."""
        seen: list[Tensor] = []
        handle = layer.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0].reshape(-1)))
        try:
            with torch.no_grad():
                for i in range(len(self.x)):
                    self.module(self.x[i : i + 1])
        finally:
            handle.remove()
        if not seen:
            raise Unsupported(f"no tokens are looked up in its embedding, {self.table}")
        return torch.cat(seen).unique()


def _name(module: nn.Module, parameter: Tensor) -> str:
    return next(name for name, w in module.named_parameters() if w is parameter)


class TiedNetwork:
    """A network at one set of weights, replaced by one with a shorter vocabulary.

    Attributes:
        inner: the network f', traced.
        G: see :class:`ntkbench.methods.base.gram.Gram`.
        note: what comparisons with plain autograd leave open; see :class:`ntkbench.operators.plain.PlainNetwork`.

    Args:
        whole: the network itself.
        basis: basis of the shorter vocabulary.
        target: where to compute.

    Raises:
        Unsupported: its embedding is not its head, or is used for something else as well.
        Unavailable: the device is not present.
    """

    def __init__(self, whole: Whole, basis: Basis, target: Target) -> None:
        self._whole, self._basis, self._target, self.note = whole, basis, target, ""
        self._short = whole.shortened(basis)
        self._traced = TracedProblem(self._short, target)
        (self.inner,) = self._traced.ends("trace")
        engine = self.inner.engine
        use = self._head(engine)
        product = last_product.numbers(use.node.meta["val"].shape)
        entries = last_product.moved(last_product.output(engine.trace.graph.graph), {use.node: product})
        positions = last_product.rows(entries, basis.shape[1])
        (h,) = engine.operands([use], self.inner.parameters, self.inner.x)
        self._h = h[:, positions.to(h.device)].flatten(0, 1).double()
        self.G = Gram(self._h, whole.bias in whole.parameters)

    def certify(self) -> float:
        """Compare a gradient of the network with that of f' and the head's; 2 plain backward passes.

        With a cotangent c at the outputs, all parameters except W and b have the gradient that f' has with Q^T c. The
        gradient of W is Q times that of W' in f', and outside the span of Q it is that of the head, c h^T.

        Returns:
            The relative difference.

        Raises:
            Uncertified: they differ.
        """
        whole, basis, memory = self._whole, self._basis, self._target.memory
        c = certificate.random_weights(len(self._h) * basis.shape[0], whole.W).reshape(len(self._h), -1)
        whole_network = PlainNetwork(whole.module, whole.parameters, owned=True)
        plain = whole_network.gradient(whole.x, c, memory)
        self.note = whole_network.note
        module, parameters, x = torch_network(self._short, "theta_0", self._target)
        inner = PlainNetwork(module, parameters).gradient(x, basis.down(c.T).T, memory)
        found = dict(zip(parameters, inner, strict=True))
        of_head = {whole.weight: c.T @ self._h.to(c.dtype), whole.bias: c.sum(0)}
        for name in of_head.keys() & found.keys():
            found[name] = basis.up(found[name]) + basis.outside(of_head[name])
        off = certificate.distance_of_parts(zip((found[name] for name in whole.parameters), plain, strict=True))
        certificate.check(off, arrays.epsilon(c))
        return off

    def forget(self) -> None:
        """Certify the next kernels of f' even if they were certified before."""
        self._traced.certify_again()

    def _head(self, engine: LayerwiseKernel) -> Use:
        """The use of W as the head, which is one of its two uses."""
        whole = self._whole
        layers = [each for each in engine.layers if isinstance(each, Layer) and whole.weight in each.parameters]
        uses = [use for layer in layers for use in layer.uses]
        operations = tuple(use.node.target for use in uses)
        if operations not in {(aten.embedding.default, product) for product in PRODUCTS}:
            raise Unsupported(
                f"the weight of its embedding, {whole.table}, must be used exactly twice, there and as the head"
            )
        return uses[1]


PRODUCTS = (aten.mm.default, aten.addmm.default)


class TiedProblem:
    """A problem on the device, with networks of shorter vocabularies.

    Attributes:
        problem, target: the problem, and how it is computed.

    Raises:
        Unsupported: no embedding is the head of the network; see :class:`Whole` and :class:`TiedNetwork`.
        Unavailable: the device is not present.
    """

    def __init__(self, problem: Problem, target: Target) -> None:
        self.problem, self.target = problem, target
        self._wholes: dict[str, Whole] = {}
        self._ends: dict[tuple[str, ...], list[TiedNetwork]] = {}
        self._certified: dict[tuple[str, ...], float] = {}
        refused: list[Unsupported] = []
        for table in tables(problem):
            self._table = table
            try:
                self.ends("trace")
                return
            except Unsupported as error:
                refused.append(error)
                self._wholes.clear()
        raise refused[0] if refused else Unsupported("no embedding of the network has as many tokens as it has outputs")

    def ends(self, metric: str) -> list[TiedNetwork]:
        """The networks of a metric, with one vocabulary.

        Raises:
            Unsupported: there are no such weights, a network has no such head, or the heads differ in size.
        """
        names = metrics.parameter_sets(metric)
        if names not in self._ends:
            wholes = [self._whole(name) for name in names]
            if len({len(whole.W) for whole in wholes}) > 1:
                raise Unsupported("the two networks have heads of different sizes")
            tokens = torch.cat([whole.tokens for whole in wholes]).unique()
            basis = Basis.of(tokens, [whole.W for whole in wholes])
            self._ends[names] = [TiedNetwork(whole, basis, self.target) for whole in wholes]
        return self._ends[names]

    def networks(self, metric: str) -> list[TracedNetwork]:
        """The networks of the kernels: f' at each set of weights."""
        return [end.inner for end in self.ends(metric)]

    def certificate(self, metric: str) -> float:
        """The largest relative difference from plain autograd; see :meth:`TiedNetwork.certify`."""
        names = metrics.parameter_sets(metric)
        if names not in self._certified:
            self._certified[names] = max(end.certify() for end in self.ends(metric))
        return self._certified[names]

    def notes(self, metric: str) -> tuple[str, ...]:
        """What certificates leave open."""
        return tuple(end.note for end in self.ends(metric) if end.note)

    def certify_again(self) -> None:
        """Compare with plain autograd again, even after an earlier comparison."""
        self._certified.clear()
        for ends in self._ends.values():
            for end in ends:
                end.forget()

    @property
    def short(self) -> TiedProblem:
        """The networks that estimators run on: the same ones."""
        return self

    def known(self, metric: str) -> Moments:
        """The moments of G ⊗ (I_V - Q Q^T)."""
        ends = self.ends(metric)
        V, r = ends[0]._basis.shape
        return moments_of_grams(*(end.G for end in ends)).times(V - r)

    def moments(self, metric: str) -> Moments:
        """The moments that a metric depends on."""
        outside = self.known(metric)
        if metric == "trace":
            (inner,) = self.networks(metric)
            own = inner.engine.diagonal(inner.parameters, inner.x).double().sum()
            return Moments(trace=float(own) + outside.trace)

        def summed(blocks: Blocks) -> Moments:
            return metrics.from_blocks_of_theta(
                (left == right, [part.flatten(0, 1).flatten(1) for part in parts]) for left, right, parts in blocks
            )

        return over_blocks(self.networks(metric), summed).plus(outside)

    def _whole(self, which: str) -> Whole:
        if which not in self._wholes:
            owner, _ = self.problem.end(which)
            names = [self._table] if owner is self.problem else tables(owner)
            if not names:
                raise Unsupported("the other network has no embedding with as many tokens as it has outputs")
            self._wholes[which] = Whole(self.problem, which, self.target, names[0])
        return self._wholes[which]
