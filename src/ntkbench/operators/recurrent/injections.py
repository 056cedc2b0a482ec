"""The map S from parameters to injections, and its adjoint.

J = P S. S maps a tangent of the parameters to *injections*, perturbations of the gates before their nonlinearities (and
of the readout) at each step of each trial. P propagates injections along the trajectory. The injection of a weight at
trial b and step t is dW v_(bt), with v = phi(h_(t-1)), x_t or 1, so that S is one matrix product.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import array_api_compat

from ntkbench.operators.base import Array
from ntkbench.operators.recurrent.cells import GATES


class Injections(NamedTuple):
    """Injections of k probes, or cotangents of injections, time-major; ``None`` where theta injects nothing.

    Attributes:
        gates: into the gates that W_hh reaches, ``[T, B, k, G H]``.
        side: into a GRU's side gate, ``[T, B, k, H]``.
        readout: into the outputs, ``[T, B, k, O]``.
    """

    gates: Array
    side: Array | None
    readout: Array | None

    def part(self, trials: slice) -> Injections:
        """The injections of a slice of trials."""
        return Injections(*(None if a is None else a[:, trials] for a in self))


class InjectionFactors(NamedTuple):
    """The factors v of each kind of injection, stacked: ``[V, T, B]``; ``None`` where theta injects nothing."""

    gates: Array | None
    side: Array | None
    readout: Array | None


@dataclass(frozen=True)
class ParameterLayout:
    """Which parameters theta consists of, and in which order.

    Attributes:
        kind: kind of the cell.
        alpha: step of a ``ctrnn``.
        inputs: I.
        hidden: H.
        outputs: O of the readout, ``None`` without one.
        chosen: roles and sizes of the parameters in theta, in their order.
    """

    kind: str
    alpha: float | None
    inputs: int
    hidden: int
    outputs: int | None
    chosen: tuple[tuple[str, int], ...]

    @property
    def roles(self) -> frozenset[str]:
        """Roles of the parameters in theta."""
        return frozenset(role for role, _ in self.chosen)

    @property
    def P(self) -> int:
        """Number of parameters in theta."""
        return sum(size for _, size in self.chosen)

    @property
    def gates(self) -> int:
        """G, the gates that W_hh reaches."""
        return GATES[self.kind]

    @property
    def has_side(self) -> bool:
        """Whether theta has parameters that inject into a GRU's side gate."""
        return self.kind == "gru" and bool(self.roles & {"weight_ih", "bias_ih"})

    @property
    def injects_readout(self) -> bool:
        """Whether theta has parameters of a readout."""
        return bool(self.roles & {"readout_weight", "readout_bias"})

    @property
    def width(self) -> int:
        """E, the injections per trial and step: G H, plus H for a side gate, plus O for a readout in theta."""
        readout = self.outputs if self.injects_readout else None
        return (self.gates + self.has_side) * self.hidden + (readout or 0)

    def factors(self, sent: Array, x: Array, h: Array) -> InjectionFactors:
        """v from phi(h_(t-1)) ``[T, B, H]``, inputs ``[T, B, I]`` and h ``[T, B, H]``."""
        xp = array_api_compat.array_namespace(sent)
        made = {"h": sent, "x": x, "1": xp.ones_like(x[:, :, :1]), "read": h}

        def stacked(parts: tuple[str, ...]) -> Array | None:
            # Contiguous with long rows, as matrix products prefer.
            return xp.concat([xp.permute_dims(made[part], (2, 0, 1)) for part in parts]) if parts else None

        return InjectionFactors(
            stacked(self._parts("gates")), stacked(self._parts("side")), stacked(self._parts("readout"))
        )

    def _parts(self, where: str) -> tuple[str, ...]:
        """Names of the vectors that are stacked in v for one kind of injection."""
        takes = {
            "gates": {"h": {"weight_hh"}, "x": {"weight_ih"}, "1": {"bias_ih", "bias_hh"}},
            "side": {"x": {"weight_ih"}, "1": {"bias_ih"}} if self.has_side else {},
            "readout": {"read": {"readout_weight"}, "1": {"readout_bias"}},
        }
        return tuple(part for part, roles in takes[where].items() if roles & self.roles)

    def _rows(self, where: str, stacked: Array) -> dict[str, Array]:
        """Split a stack along its first axis into its named parts."""
        sizes = {"h": self.hidden, "x": self.inputs, "1": 1, "read": self.hidden}
        rows, start = {}, 0
        for part in self._parts(where):
            rows[part] = stacked[start : start + sizes[part]]
            start += sizes[part]
        return rows

    def gradient(self, factors: InjectionFactors, e: Injections) -> Array:
        """S^T e, ``[k, P]``: summed over trials and steps."""

        def outer(v: Array | None, e: Array | None) -> Array | None:
            if v is None or e is None:
                return None
            T, B, k, E = e.shape
            return (v.reshape(-1, T * B) @ e.reshape(T * B, k * E)).reshape(-1, k, E)

        return self._flat(Injections(*map(outer, factors, e)))

    def coordinates(self, factors: InjectionFactors, e: Injections) -> Array:
        """S^T e with its entries permuted, ``[k, P]``: cheaper than :meth:`gradient`, enough for inner products."""
        made = []
        for group in self.groups(factors):
            own = getattr(e, group.where)[..., group.columns]
            T, B, k, E = own.shape
            made.append((own.reshape(T * B, k * E).T @ group.v.reshape(-1, T * B).T).reshape(k, -1))
        return made[0] if len(made) == 1 else array_api_compat.array_namespace(made[0]).concat(made, axis=1)

    def gradient_by_trial(self, factors: InjectionFactors, e: Injections) -> Array:
        """S_b^T e_b per trial, ``[k, B, P]``."""

        def outer(v: Array | None, e: Array | None) -> Array | None:
            if v is None or e is None:
                return None
            xp = array_api_compat.array_namespace(v)
            T, B, k, E = e.shape
            each = xp.permute_dims(v, (2, 0, 1)) @ xp.permute_dims(e, (1, 0, 2, 3)).reshape(B, T, k * E)
            return xp.permute_dims(each.reshape(B, -1, k, E), (1, 2, 0, 3)).reshape(-1, k * B, E)

        k, B = e.gates.shape[2], e.gates.shape[1]
        return self._flat(Injections(*map(outer, factors, e))).reshape(k, B, -1)

    def _flat(self, products: Injections) -> Array:
        """Products of v and e, ``[V, k, E]``, as flat gradients ``[k, P]``."""
        gates, side, readout = (
            {} if made is None else self._rows(where, made)
            for where, made in zip(Injections._fields, products, strict=True)
        )
        found = next(made for made in products if made is not None)
        xp = array_api_compat.array_namespace(found)
        H = self.hidden

        def with_side(part: str) -> Array:
            # The inputs of a GRU feed the first two gates and the side gate.
            return xp.concat([gates[part][..., : 2 * H], side[part]], axis=-1) if side else gates[part]

        of_role = {
            "weight_ih": lambda: with_side("x"),
            "weight_hh": lambda: gates["h"],
            "bias_ih": lambda: with_side("1"),
            "bias_hh": lambda: gates["1"],
            "readout_weight": lambda: readout["read"],
            "readout_bias": lambda: readout["1"],
        }
        blocks = [xp.permute_dims(of_role[role](), (1, 2, 0)) for role, _ in self.chosen]
        return xp.concat([block.reshape(block.shape[0], -1) for block in blocks], axis=1)

    def inject(self, factors: InjectionFactors, w: Array) -> Injections:
        """S w from tangents ``[k, P]``; zeros for gates that no parameter in theta feeds."""
        xp = array_api_compat.array_namespace(w)
        k, H = w.shape[0], self.hidden
        tangents = {role: xp.permute_dims(part, (2, 0, 1)) for role, part in self._by_role(w).items()}
        side = {}
        if self.has_side:
            from_inputs = {"x": tangents.get("weight_ih"), "1": tangents.get("bias_ih")}
            side = {part: tangent[..., 2 * H :] for part, tangent in from_inputs.items() if tangent is not None}
            for role in ("weight_ih", "bias_ih"):
                if role in tangents:
                    kept = tangents[role][..., : 2 * H]
                    tangents[role] = xp.concat([kept, xp.zeros_like(kept[..., :H])], axis=-1)
        biases = [tangents[role] for role in ("bias_ih", "bias_hh") if role in tangents]
        of_part = {
            "gates": {"h": tangents.get("weight_hh"), "x": tangents.get("weight_ih"), "1": sum(biases)},
            "side": side,
            "readout": {"read": tangents.get("readout_weight"), "1": tangents.get("readout_bias")},
        }
        T, B = next(v for v in factors if v is not None).shape[1:]

        def product(where: str, v: Array | None) -> Array | None:
            if v is None:
                return None
            stacked = xp.concat([of_part[where][part] for part in self._parts(where)])
            return (v.reshape(-1, T * B).T @ stacked.reshape(len(stacked), -1)).reshape(T, B, k, -1)

        gates, *others = (product(where, v) for where, v in zip(Injections._fields, factors, strict=True))
        return Injections(self._or_zeros(gates, (T, B, k), w), *others)

    def inject_by_trial(self, factors: InjectionFactors, w: Array) -> Injections:
        """S_b w_b per trial, from tangents ``[k, B, P]``.

        One matrix product per trial and parameter, without copies of the tangents, which are as large as k B gradients.
        """
        xp = array_api_compat.array_namespace(w)
        T, B = next(v for v in factors if v is not None).shape[1:]
        H, sums = self.hidden, dict.fromkeys(Injections._fields)
        reaches = {"weight_hh": ("gates", "h"), "weight_ih": ("gates", "x"), "bias_hh": ("gates", "1")}
        reaches |= {"bias_ih": ("gates", "1"), "readout_weight": ("readout", "read"), "readout_bias": ("readout", "1")}

        def add(where: str, product: Array) -> None:
            sums[where] = product if sums[where] is None else sums[where] + product

        for role, tangent in self._by_role(w).items():
            where, part = reaches[role]
            v = xp.permute_dims(self._rows(where, getattr(factors, where))[part], (2, 1, 0))
            product = v @ xp.permute_dims(tangent, (0, 1, 3, 2))  # [k, B, T, rows]
            if self.has_side and role in ("weight_ih", "bias_ih"):
                add("side", product[..., 2 * H :])
                product = xp.concat([product[..., : 2 * H], xp.zeros_like(product[..., 2 * H :])], axis=-1)
            add(where, product)
        time_first = (None if made is None else xp.permute_dims(made, (2, 1, 0, 3)) for made in sums.values())
        gates, *others = time_first
        return Injections(self._or_zeros(gates, (T, B, w.shape[0]), w), *others)

    def _by_role(self, w: Array) -> dict[str, Array]:
        """Split tangents ``[..., P]`` by parameter, ``[..., rows, columns]`` each."""
        tangents, start = {}, 0
        for role, size in self.chosen:
            rows = self.outputs if role.startswith("readout") else self.gates * self.hidden
            tangents[role] = w[..., start : start + size].reshape(*w.shape[:-1], rows, -1)
            start += size
        return tangents

    def _or_zeros(self, gates: Array | None, sizes: tuple[int, ...], like: Array) -> Array:
        if gates is not None:
            return gates
        xp = array_api_compat.array_namespace(like)
        width = self.gates * self.hidden
        return xp.zeros((*sizes, width), dtype=like.dtype, device=array_api_compat.device(like))

    def groups(self, factors: InjectionFactors) -> list[InjectionGroup]:
        """Groups of injections with a common v: K = S S^T is the direct sum of (V V^T) ⊗ I over the groups."""
        H = self.hidden
        of_inputs = self._chosen_rows("gates", factors.gates, ("weight_ih", "bias_ih"))
        of_state = self._chosen_rows("gates", factors.gates, ("weight_hh", "bias_hh"))
        if self.has_side:
            groups = [
                ("gates", slice(2 * H), of_inputs + of_state),
                ("gates", slice(2 * H, 3 * H), of_state),
                ("side", slice(H), of_inputs),
            ]
        else:
            groups = [("gates", slice(self.gates * H), of_inputs + of_state)]
        if self.injects_readout:
            of_h = self._chosen_rows("readout", factors.readout, ("readout_weight", "readout_bias"))
            groups.append(("readout", slice(self.outputs), of_h))
        return [
            InjectionGroup(where, columns, array_api_compat.array_namespace(rows[0]).concat(rows))
            for where, columns, rows in groups
            if rows
        ]

    def _chosen_rows(self, where: str, v: Array | None, roles: tuple[str, ...]) -> list[Array]:
        """The vectors v of those of some roles that are in theta."""
        of_role = {"weight_ih": "x", "weight_hh": "h", "readout_weight": "read"}
        return [self._rows(where, v)[of_role.get(role, "1")] for role in roles if role in self.roles]

    def squares(self, factors: InjectionFactors, e: Injections) -> Array:
        """||S_b^T e_b||^2 per trial, ``[k, B]``, from inner products between steps and without gradients.

        ||sum_t e_t v_t^T||_F^2 = sum_(t, t') <e_t, e_t'> <v_t, v_t'> takes T^2 (E + V) multiplications, where the
        gradient takes T E V.
        """
        groups = self.groups(factors)
        return sum(_contracted(getattr(e, g.where)[..., g.columns], g.gram_by_trial()) for g in groups)


class InjectionGroup(NamedTuple):
    """Injections with a common v.

    Attributes:
        where: the field of :class:`Injections`.
        columns: which entries of that field.
        v: ``[V, T, B]``.
    """

    where: str
    columns: slice
    v: Array

    @property
    def width(self) -> int:
        """Number of columns."""
        return self.columns.stop - (self.columns.start or 0)

    def gram_by_trial(self) -> Array:
        """Inner products between the steps of each trial, ``[B, T, T]``."""
        xp = array_api_compat.array_namespace(self.v)
        by_trial = xp.permute_dims(self.v, (2, 1, 0))
        return by_trial @ xp.permute_dims(by_trial, (0, 2, 1))


def _contracted(e: Array, gram: Array) -> Array:
    """sum_(t, t') <e_t, e_t'> gram_tt', ``[T, B, k, E]`` and ``[B, T, T]`` to ``[k, B]``."""
    xp = array_api_compat.array_namespace(e)
    by_trial = xp.permute_dims(e, (1, 2, 0, 3))
    own = by_trial @ xp.permute_dims(by_trial, (0, 1, 3, 2))
    return (own * gram[:, None]).sum((-2, -1)).T
