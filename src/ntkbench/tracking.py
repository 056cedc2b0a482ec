"""Metrics of a network's NTK along its training."""

from __future__ import annotations

import logging
import numbers
from collections.abc import Callable, Collection, Sequence
from typing import TYPE_CHECKING, Any, Unpack

from ntkbench import errors, ladder, metrics, options
from ntkbench.api import OPTIONS, SETUP
from ntkbench.errors import BadInput, unknown
from ntkbench.estimate import Estimate
from ntkbench.kernel import Kernel
from ntkbench.modules import copied
from ntkbench.options import positive
from ntkbench.problems.base.module import unwrapped

if TYPE_CHECKING:
    import pandas as pd
    from torch import nn

    from ntkbench.api import Keywords

Log = Callable[[int, dict[str, Estimate]], None]


class Tracker:
    """Metrics at regular steps of a training loop; the network is traced once, and all steps use the same probes.

    Call it in the loop: ``tracker(step)``. The alignment is with the network at the first measured step. The tracker
    fixes the mode (train or eval) and the set of trainable parameters when it is made; only the values of parameters
    and buffers change afterwards. Make the tracker after ``model.eval()`` if there is Dropout. The tracker does not
    change the state of the random generators, so that training proceeds as it would without a tracker.

    >>> import torch, ntkbench
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    >>> tracker = ntkbench.Tracker(model, x, every=10, metrics=("trace", "alignment"))
    >>> for step in range(21):
    ...     _ = tracker(step)
    >>> tracker.table()["step"].tolist()
    [0, 10, 20]

    Use it to follow the metrics of a network along its training; :meth:`ntkbench.Kernel.at` measures single sets of
    weights.

    Cost of each measured step: that of the metrics (see :func:`ntkbench.metrics_of`) and of the alignment, each within
    ``passes`` if given, at most seven forward and two backward passes for checks, and one plain backward pass for the
    certificate.

    Source: that of the method; see ``ntkbench list`` and the page of all methods.

    Args:
        model: the network that is trained; it is never changed.
        inputs: inputs of the NTK.
        every: steps between two measurements; the first call always measures.
        metrics: names; ``None`` for all. They are in the units of :func:`ntkbench.trace` and of the other functions.
        log: called with the step and the estimates by name.
        keywords: see :class:`ntkbench.Kernel` and :class:`ntkbench.options.Options`.

    Attributes:
        history: measured steps, each with its estimates by name; none where a measurement failed.
        failures: why measurements failed, by step: weights that are not finite, a kernel that is zero, or too little
            memory. A failure does not stop the training; it is logged as a warning.

    Raises:
        BadInput: an argument cannot be used; says what is allowed. A call raises it if the network no longer computes
            the same function of its parameters and buffers as when the tracker was made.
    """

    def __init__(
        self,
        model: nn.Module,
        inputs: Any,
        *,
        every: int = 100,
        metrics: Sequence[str] | None = None,
        log: Log | None = None,
        **keywords: Unpack[Keywords],
    ) -> None:
        for key in keywords:
            if key not in (*SETUP, *OPTIONS):
                raise unknown("keyword", key, ("every", "metrics", "log", *SETUP, *OPTIONS))
        if keywords.get("params") is not None:
            raise BadInput(
                "a tracker follows a torch.nn.Module; for a JAX function use Kernel(f, x, params=...).at(params)"
            )
        if log is not None and not callable(log):
            raise BadInput(f"log must be a function of the step and the estimates, got {log!r}")
        self._every = positive("every", every)
        self._names = _checked(metrics)
        self._log = log
        self._options: Any = {key: value for key, value in keywords.items() if key in OPTIONS}
        asked = options.asked(self._options)
        ladder.check(self._names, asked)
        self._kernel = Kernel(model, inputs, **{key: value for key, value in keywords.items() if key in SETUP})  # type: ignore[arg-type]
        self._model = unwrapped(model)
        network = self._network()
        self._modes = {name: layer.training for name, layer in network.named_modules()}
        self._trainable = {name: w.requires_grad for name, w in network.named_parameters()}
        self._first: Kernel | None = None
        self._last: int | None = None
        self.history: list[tuple[int, dict[str, Estimate]]] = []
        self.failures: dict[int, str] = {}

    def __call__(self, step: int) -> dict[str, Estimate] | None:
        """Measure if a measurement is due; returns the estimates by name, ``None`` between two measurements.

        If the measurement fails, there are no estimates, and :attr:`failures` has the reason.
        """
        if not isinstance(step, numbers.Integral):
            raise BadInput(f"step must be a whole number, got {step!r}")
        if self._last is not None and step < self._last:
            raise BadInput(f"steps must not go back, got {step} after {self._last}: count over all epochs")
        self._last = step
        if self.history and step < self.history[-1][0] + self._every:
            return None
        kernel = None
        try:
            kernel = self._kernel.at(self._present())
            found = self._measured(kernel)
            self._first = self._first or kernel
        except errors.NtkbenchError as error:
            transient = isinstance(error, (errors.NotFinite, errors.Undefined, errors.OverMemory))
            if not transient and (kernel is None or self._first is None):  # another function, or unsuitable options
                raise
            found, self.failures[step] = {}, errors.reason(error)
            logging.getLogger("ntkbench").warning("step %d was not measured: %s", step, self.failures[step])
        self.history.append((step, found))
        if found and self._log is not None:
            self._log(step, found)
        return found

    def _measured(self, kernel: Kernel) -> dict[str, Estimate]:
        found: dict[str, Estimate] = {}
        if rest := [name for name in self._names if name != "alignment"]:
            every = (
                kernel.metrics(**self._options)
                if len(rest) > 1
                else {rest[0]: getattr(kernel, rest[0])(**self._options)}
            )
            found = {name: every[name] for name in rest}
        if "alignment" in self._names:
            found["alignment"] = (self._first or kernel).alignment(kernel, **self._options)
        return found

    def _network(self) -> nn.Module:
        """The network as it is called, which includes modules that were given as ``call`` or ``output``."""
        found: nn.Module = self._kernel._source.alike(self._model)
        return found

    def _present(self) -> nn.Module:
        """A copy of the network, in its original mode and with its original set of trainable parameters."""
        model = copied(self._network())
        for name, layer in model.named_modules():
            layer.training = self._modes.get(name, layer.training)
        for name, w in model.named_parameters():
            w.requires_grad_(self._trainable.get(name, w.requires_grad))
        return model

    def table(self, confidence: float | None = None) -> pd.DataFrame:
        """One row for each measured step: ``step``, and for each metric its value and the ends of its interval.

        If a measurement failed, there is a column ``reason``.

        The confidence level is that of the tracker's estimates unless another is given.

        Raises:
            Unavailable: pandas is not installed.
        """
        errors.need("pandas", "Tracker.table", "pandas")
        import pandas as pd

        rows = []
        for step, found in self.history:
            row: dict[str, Any] = {"step": step}
            for name, estimate in found.items():
                low, high = estimate.interval(confidence)
                row |= {name: estimate.value, f"{name}_low": low, f"{name}_high": high}
            if self.failures:
                row["reason"] = self.failures.get(step, "")
            rows.append(row)
        return pd.DataFrame(rows)

    def trainer_callback(self) -> Any:
        """A callback for the ``Trainer`` of Hugging Face, which calls this tracker at the end of every step.

        Raises:
            Unavailable: transformers is not installed.
        """
        errors.need("transformers", "Tracker.trainer_callback", "transformers")
        from transformers import TrainerCallback

        tracker = self

        class Callback(TrainerCallback):
            def on_step_end(self, args: Any, state: Any, control: Any, **more: Any) -> None:
                tracker(state.global_step)

        return Callback()


def _checked(names: Sequence[str] | None) -> tuple[str, ...]:
    if names is not None and (isinstance(names, str) or not isinstance(names, Collection) or not names):
        raise BadInput(f"metrics must be one or more names in a sequence, got {names!r}")
    for name in names or ():
        metrics.check(name)
    return tuple(dict.fromkeys(names)) if names else metrics.METRICS
