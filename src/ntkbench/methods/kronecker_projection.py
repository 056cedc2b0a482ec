"""Two-sided projections of each layer's gradients by their factors, as in LoGra."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import TYPE_CHECKING, ClassVar

import numpy as np

from ntkbench.errors import Unavailable, Unsupported
from ntkbench.estimators import projections
from ntkbench.estimators.projections import Features
from ntkbench.methods.base.projected import Ledger, Projected
from ntkbench.operators import arrays
from ntkbench.options import Target
from ntkbench.problem import Problem

if TYPE_CHECKING:
    from torch import Generator, Tensor

    from ntkbench.layerwise.blocks import Block
    from ntkbench.layerwise.factors import GradientFactors
    from ntkbench.methods.base.layerwise import TracedNetwork, TracedProblem


class KroneckerProjection(Projected):
    """Features B G A^T of the gradient G = sum_s g_s a_s^T of each layer, with Gaussian A and B.

    A layer's inputs a_s and cotangents g_s are projected to d numbers each, so G is never formed. This takes d (C + D +
    d) multiplications per position for a layer of D inputs and C outputs, and O passes for each set of weights.
    Unbiased, as A and B are independent and E A^T A = E B^T B = I. There are d^2 features for each layer and replicate,
    but an additional feature on one side improves only that side. The relative error of the Gram matrix therefore falls
    only as 1 / sqrt(d), the inverse fourth root of k, where that of an unstructured projection falls as 1 / sqrt(k).
    Use this method for large layers, where it saves most of the time, and not for small errors.

    A side with at most d entries is not projected. The groups of a convolution have projections of their own, whose
    features are added up. A bias is the weight of a constant input of one. Scales, shifts, other parameters outside
    linear maps, and layers of which no side is projected have a dense projection if they have more than d^2 entries.
    ``replicates`` independent pairs of A and B for each layer give the standard error its degrees of freedom; LoGra has
    one pair.

    Attributes:
        replicates: R.
        few: d below which a note says that intervals may be too short. On a transformer 76 % of the 95 % intervals with
            d = 1 contained the norm.
    """

    title = "two-sided projection (LoGra)"
    source = "Choe et al. 2024 (LoGra, arXiv 2405.13954)"
    use_when = "layers are so large that their gradients are expensive, and errors need not be small"
    variance = "of order 1 / sqrt(k), where that of ``dense_jl`` is of order 1 / k"
    backends = ("torch",)
    needs_independent_samples = True
    prepares = "trace"
    replicates: ClassVar[int] = 8
    few: ClassVar[int] = 3
    fewest_probes = replicates

    def parts(self, k: int) -> int:
        return self.replicates

    def bytes_needed(self, problem: Problem, metric: str, target: Target, passes: int | None = None) -> int:
        """The features, and the projections of the largest layer on both sides."""
        from torch.nn.modules.conv import _ConvNd

        features = super().bytes_needed(problem, metric, target, passes)
        d = math.isqrt(self.probes(metric, self.default_passes if passes is None else passes) // self.replicates)
        layers = ((name, layer) for name, layer in problem.network.named_modules() if isinstance(layer, _ConvNd))
        groups = {f"{name}.weight".lstrip("."): layer.groups for name, layer in layers}
        weights = [(name, w) for name, w in problem.theta_0.items() if w.ndim > 1]
        sides = max((len(w) + groups.get(name, 1) * w.size // len(w) for name, w in weights), default=0)
        return features + self.replicates * d * sides * target.itemsize

    def unsupported_reason(
        self, problem: Problem, metric: str, target: Target, passes: int | None = None
    ) -> str | None:
        reason = super().unsupported_reason(problem, metric, target, passes)
        return reason or _not_covered(problem)

    def least_passes(self, problem: Problem, metric: str) -> int:
        """The passes of one feature for each parameter tensor and replicate; there are no more layers than tensors."""
        tensors = max(len(problem.theta_0), 1)
        return self.cost(metric, max(problem.O, self.replicates * tensors))

    def prepare(self, problem: Problem, target: Target) -> TracedProblem:
        """See :meth:`ntkbench.methods.base.layerwise.Layerwise.prepare`."""
        from ntkbench.methods.base.layerwise import TracedProblem

        return TracedProblem(problem, target)

    def rounding(self, prepared: TracedProblem, metric: str, certified: float | None) -> float:
        from ntkbench.methods.base.layerwise import rounding_of

        return rounding_of(prepared.ends(metric), metric, certified)

    def features(
        self, prepared: TracedProblem, metric: str, k: int, seed: int, *, replicates: int | None = None
    ) -> tuple[list[Features], Ledger]:
        from ntkbench.methods.base.layerwise import ledger_of

        ends, R = prepared.ends(metric), replicates or self.replicates
        d = math.isqrt(k // (R * len(ends[0].engine.layers)))
        if k < ends[0].engine.O or d == 0:
            least = max(ends[0].engine.O, R * len(ends[0].engine.layers))
            raise Unsupported(f"{self.name}: k must be at least {least} for this network; got {k}")
        ledger = ledger_of(ends)
        few = f"only {d} features on each side of a layer: their products have heavy tails, and intervals are too short"

        def counted() -> tuple[float, tuple[str, ...], float | None]:
            spent, notes, found = ledger()
            return spent, (*notes, *([few] if d < self.few else [])), found

        return [_Projections(end, R, d, seed).features() for end in ends], counted


def _not_covered(problem: Problem) -> str | None:
    """Why the factors of some layer are not those of a linear map; ``None`` if the module shows no reason."""
    names: dict[int, str] = {}
    for name, w in problem.network.named_parameters(remove_duplicate=False):
        if ".parametrizations." in name or name.startswith("parametrizations."):
            return f"projects layers by their weights, and that of {name} is computed from parameters"
        if names.setdefault(id(w), name) != name:
            return f"projects each layer separately, and {names[id(w)]} is also {name}"
    return None


class _Projections:
    """The projections of all layers of one network, and the features of its rows of J."""

    def __init__(self, end: TracedNetwork, replicates: int, d: int, seed: int) -> None:
        self._end, self._replicates, self._d, self._seed = end, replicates, d, seed

    def features(self) -> Features:
        """The features, ``[R, n, w]``."""
        return self._end.engine.certain(self._collected)

    def _collected(self) -> Features:
        end, found = self._end, dict[int, np.ndarray]()
        N, O = len(end.x), end.engine.O  # noqa: E741 - the field's symbol

        def take(block: Block, number: int, factors: GradientFactors) -> None:
            made = arrays.to_numpy(self._project(number, factors), np.float64)  # [R, N, K, w]
            whole = found.setdefault(number, np.empty((made.shape[0], N, O, made.shape[3])))
            whole[:, block.samples, block.directions] = made

        end.engine.visit(end.parameters, end.x, take)
        parts = [found[number].reshape(self._replicates, N * O, -1) for number in sorted(found)]
        return np.concatenate(parts, axis=2)

    def _project(self, number: int, factors: GradientFactors) -> Tensor:
        import torch

        from ntkbench.layerwise.factors import Lookups, Products, Rows

        if isinstance(factors, Products):
            _, _, _, C, D, _ = factors.sizes
            if max(C, D) <= self._d:
                return self._densely(number, factors.explicit(slice(None), slice(None)))
            a = self._side(number, 0, factors.a.shape[1:3], self._d, factors.a)
            b = self._side(number, 1, factors.g.shape[2:4], self._d, factors.g)

            def of_some(a: Tensor, b: Tensor) -> Tensor:
                inputs = torch.einsum("rgid,ngds->rngis", a, factors.a)
                cotangents = torch.einsum("rgjc,nkgcs->rnkgjs", b, factors.g)
                # The projections of the groups are independent, so their sum is unbiased.
                return torch.einsum("rnkgjs,rngis->rnkji", cotangents, inputs).flatten(3)

            return self._by_replicates(of_some, a, b, factors.a.nbytes + factors.g.nbytes)
        if isinstance(factors, Lookups):
            (layer,) = (layer for i, layer in enumerate(self._end.engine.layers) if i == number)
            entries = int(layer.uses[0].entries.shape[0])
            a = self._side(number, 0, (1, entries), self._d, factors.g)[:, 0]
            b = self._side(number, 1, (1, factors.g.shape[2]), self._d, factors.g)[:, 0]

            def of_looked_up(a: Tensor, b: Tensor) -> Tensor:
                inputs = a[:, :, factors.rows.clamp(min=0)] * (factors.rows >= 0)  # [R, d, N, S]
                cotangents = torch.einsum("rjc,nkcs->rnkjs", b, factors.g)
                return torch.einsum("rnkjs,rins->rnkji", cotangents, inputs).flatten(3)

            looked_up = a.shape[1] * factors.rows.numel() * a.element_size()
            return self._by_replicates(of_looked_up, a, b, looked_up + factors.g.nbytes)
        if isinstance(factors, Rows):
            return self._densely(number, factors.rows)
        names = ", ".join(self._end.engine.layers[number].parameters)
        raise Unavailable(f"projects linear maps only, and the gradient of {names} is not that of one")

    def _by_replicates(self, project: Callable[[Tensor, Tensor], Tensor], a: Tensor, b: Tensor, nbytes: int) -> Tensor:
        """Apply ``project`` to replicates of ``nbytes`` each, as many at a time as fit in a quarter of the memory."""
        import torch

        size = max(1, self._end.engine.memory // 4 // nbytes)
        return torch.cat([project(*some) for some in zip(a.split(size), b.split(size), strict=True)])

    def _densely(self, number: int, rows: Tensor) -> Tensor:
        """Dense projections of rows ``[N, K, entries]`` to ``[R, N, K, d^2]``; up to d^2 entries are kept as they are.

        The projections are drawn for a chunk of the entries at a time.
        """
        import torch

        if rows.shape[2] <= self._d**2:
            return rows.expand(self._replicates, -1, -1, -1)
        generator, shape = self._generator(number, 0, rows), (self._replicates, self._d**2)
        found = rows.new_zeros(self._replicates, *rows.shape[:2], self._d**2)
        for part in rows.split(max(1, projections.ENTRIES // math.prod(shape)), 2):
            p = torch.randn((*shape, part.shape[2]), generator=generator, dtype=rows.dtype, device=rows.device)
            found += torch.einsum("rip,nkp->rnki", p, part)
        return found / self._d

    def _generator(self, number: int, side: int, like: Tensor) -> Generator:
        """The random generator of one side of a layer, the same at all sets of weights."""
        import torch

        seeds = np.random.SeedSequence((self._seed, number, side)).generate_state(1, np.uint64)
        return torch.Generator(like.device).manual_seed(int(seeds[0] >> 1))

    def _side(self, number: int, side: int, sizes: tuple[int, ...], d: int, like: Tensor) -> Tensor:
        """Projections of one side of a layer, ``[R, groups, d, entries]``; the identity for up to d entries."""
        import torch

        groups, entries = sizes
        if entries <= d:
            return torch.eye(entries).to(like).expand(self._replicates, groups, -1, -1)
        shape, generator = (self._replicates, groups, d, entries), self._generator(number, side, like)
        return torch.randn(shape, generator=generator, dtype=like.dtype, device=like.device) / math.sqrt(d)
