"""A module from one tensor to one tensor that wraps a model with another calling convention."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_unflatten

from ntkbench.errors import BadInput
from ntkbench.networks.recurrent import States


@dataclass(frozen=True)
class Structure:
    """The structure of a pytree; copies of a module share it."""

    spec: TreeSpec

    def __deepcopy__(self, memo: Any) -> Structure:
        return self


class Named(dict[str, Any]):
    """Inputs by name, as items and as attributes, like the batches of Hugging Face's tokenizers."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"the inputs have no {name!r}; available: {', '.join(map(str, self))}") from None


class Calling(nn.Module):
    """A model and its calling convention, as a module ``x -> [N, ...outputs]``.

    Without ``structure``, x is the single tensor that the model takes. With it, x holds sample indices ``[N]``: the
    inputs are buffers, and x selects their rows.

    Attributes:
        model: the wrapped model; its parameters keep their names after :data:`PREFIX`.

    Args:
        model: any module.
        call: ``(model, inputs) -> outputs``; ``None`` for ``model(*inputs)``, ``model(**inputs)`` or ``model(inputs)``,
            depending on what the inputs are.
        output: an index into the axes after the first, or a function of the outputs; ``None`` for all of them.
        leaves: leaves of the inputs: tensors with a row per sample, and constants (including 0-dimensional tensors).
        structure: pytree structure of the inputs.
        given: description of the inputs for messages.
    """

    PREFIX = "model."

    def __init__(
        self,
        model: nn.Module,
        call: Callable[[nn.Module, Any], Any] | None,
        output: Any = None,
        leaves: Sequence[Any] = (),
        structure: Structure | None = None,
        given: str = "",
    ) -> None:
        super().__init__()
        self.training = model.training
        self.model, self.call, self.output = model, call, output
        self.structure, self.given = structure, given
        self._constants = [None if isinstance(leaf, Tensor) else leaf for leaf in leaves]
        for i, leaf in enumerate(leaves):
            if isinstance(leaf, Tensor):
                self.register_buffer(f"input_{i}", leaf, persistent=False)

    @property
    def leaves(self) -> list[Any]:
        """The leaves of the inputs, in the precision and on the device of the module."""
        return [self._buffers.get(f"input_{i}", constant) for i, constant in enumerate(self._constants)]

    def forward(self, x: Tensor) -> Tensor:
        inputs: Any = x
        if self.structure is not None:
            rows = [leaf[x] if isinstance(leaf, Tensor) and leaf.ndim else leaf for leaf in self.leaves]
            inputs = tree_unflatten(rows, self.structure.spec)
            inputs = Named(inputs) if type(inputs) is dict else inputs
        return self._chosen(self._called(inputs) if self.call is None else self.call(self.model, inputs))

    def _called(self, inputs: Any) -> Any:
        if isinstance(inputs, tuple | list):
            return self.model(*inputs)
        return self.model(**inputs) if isinstance(inputs, Mapping) else self.model(inputs)

    def _chosen(self, outputs: Any) -> Tensor:
        outputs = self.output(outputs) if callable(self.output) else outputs
        if not isinstance(outputs, Tensor):
            raise BadInput(
                f"the model must return one tensor [N, ...outputs], got {_kind(outputs)}: select a part of it with "
                "call=, as in call=lambda model, inputs: model(**inputs).logits, or in a module around the model"
            )
        if self.output is None or callable(self.output):
            return outputs
        index = (slice(None), *(self.output if isinstance(self.output, tuple) else (self.output,)))
        try:
            np.broadcast_to(0, (1, *outputs.shape[1:]))[index]  # on a GPU a list out of range is a fatal error
        except IndexError as error:
            allowed = ", ".join(f"{-size} to {size - 1}" for size in outputs.shape[1:]) or "none"
            raise BadInput(
                f"output={self.output!r} is out of range for outputs {tuple(outputs.shape)}; the first axis, samples, "
                f"is not indexed: allowed are {allowed}"
            ) from error
        return outputs[index]


def own_name(module: nn.Module, key: str) -> str:
    """The name that a parameter of a module has in the user's model."""
    wraps = {Calling: Calling.PREFIX, States: "layer."}
    return key.removeprefix(wraps.get(type(module), ""))


def _kind(outputs: Any) -> str:
    """Description of a model's outputs, with the names of their parts."""
    name = type(outputs).__name__
    if isinstance(outputs, Mapping):
        return f"{name} with {', '.join(map(str, outputs))}"
    return f"{name} of {len(outputs)}" if isinstance(outputs, tuple | list) else name
