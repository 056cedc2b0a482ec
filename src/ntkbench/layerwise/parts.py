"""Rectangles of a kernel that are requested one by one, for results that are larger than memory."""

from __future__ import annotations

from torch import Tensor

from ntkbench.layerwise.blocks import Block, Task
from ntkbench.layerwise.capture import LayerInputs, ParameterValues
from ntkbench.layerwise.kernel import LayerwiseKernel, mirror
from ntkbench.operators.ranges import rectangle


class KernelParts:
    """Rectangles of one kernel, all of whose rows are certified before the first one is computed.

    Cost: K + 1 passes for the certificate. Each rectangle then takes a run of its rows, one of its columns and the
    contractions between them. Further rectangles of the same rows share the run of the rows, if these fit in memory at
    once.

    Args:
        engine: engine of the network.
        parameters: values of the trainable parameters.
        x1: inputs of the rows.
        x2: inputs of the columns; ``None`` for those of the rows.
        directions: output directions ``[K, O]``; ``None`` for the O unit vectors.
        last_layer, fold: see :meth:`LayerwiseKernel.kernel`.
    """

    def __init__(
        self,
        engine: LayerwiseKernel,
        parameters: ParameterValues,
        x1: Tensor,
        x2: Tensor | None,
        directions: Tensor | None,
        *,
        last_layer: bool,
        fold: bool,
    ) -> None:
        self._engine, self._parameters, self._directions = engine, parameters, directions
        self._x1, self._x2, self._last_layer, self._fold = x1, x2, last_layer, fold
        self._task: Task | None = None
        self._kept: tuple[Block, dict[int, LayerInputs]] | None = None

    def __call__(self, rows: slice, columns: slice) -> Tensor:
        """The entries of some rows and columns, which are ranges of :mod:`ntkbench.operators.ranges`.

        Raises:
            Uncertified: plain autograd gives other gradients.
        """
        return self._engine.certain(lambda: self._part(rows, columns))

    def _part(self, rows: slice, columns: slice) -> Tensor:
        task, columns_of = self._certified_task(), self._x1 if self._x2 is None else self._x2
        symmetric = self._x2 is None and rows == columns
        row, column = self._block(task, rows), self._block(task, columns)
        if symmetric:
            lefts = rights = self._engine._blocks(task, [self._parameters], self._x1, whole=False, within=row)
        else:
            lefts, rights = self._engine._rectangle(task, [self._parameters], self._x1, columns_of, row, column)
        theta = None
        for i, left in enumerate(lefts):
            kept = self._collected(task, left, keep=len(lefts) == 1)
            for right in rights[: i + 1] if symmetric else rights:
                if self._fold and left.directions != right.directions:
                    continue  # a sum over directions pairs each direction with itself only
                if symmetric and left == right:
                    found = task.own(kept, self._parameters, left)
                    mirror(found, self._engine._tuning.tile)
                else:
                    found = task.between(kept, left, self._parameters, columns_of, right, again=True)
                if len(lefts) == len(rights) == 1:
                    return found.flatten(2).flatten(0, 1)
                theta = task.zeros(self._parameters, row, column) if theta is None else theta
                at, beside = self._place(left, row), self._place(right, column)
                theta[*at, *beside] += found
                if symmetric and left != right:
                    theta[*beside, *at] += found.permute(2, 3, 0, 1)
        assert theta is not None  # there is at least one block
        return theta.flatten(2).flatten(0, 1)

    def _certified_task(self) -> Task:
        """The task, made once its rows are certified, and again if the network was traced again."""
        engine = self._engine
        if self._task is None or self._task.programs is not engine._programs:
            self._task = self._kept = None
            inputs = [self._x1] if self._x2 is None else [self._x1, self._x2]
            engine.certify(self._parameters, inputs, self._directions, last_layer=self._last_layer)
            self._task = engine._task(self._directions, self._last_layer, self._fold)
        return self._task

    def _block(self, task: Task, rows: slice) -> Block:
        return Block(*((rows, slice(0, task.count)) if self._fold else rectangle(rows, task.count)))

    def _collected(self, task: Task, block: Block, *, keep: bool) -> dict[int, LayerInputs]:
        """The rows of a block, kept for the next rectangle if wanted."""
        if self._kept is not None and self._kept[0] == block:
            return self._kept[1]
        self._kept = None
        found = task.collected(self._parameters, self._x1, block)
        if keep:
            self._kept = block, found
        return found

    def _place(self, part: Block, whole: Block) -> tuple[slice, slice]:
        """The position of a part within a block."""
        samples, directions = (
            slice(some.start - all_.start, some.stop - all_.start)
            for some, all_ in ((part.samples, whole.samples), (part.directions, whole.directions))
        )
        return samples, slice(None) if self._fold else directions
