"""The NTK of a network on some inputs, prepared once and used many times."""

from __future__ import annotations

import contextlib
import copy
import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any, TypedDict, Unpack

import numpy as np

from ntkbench import ambient, errors, ladder, metrics, options, progress_bar
from ntkbench.errors import BadInput, Undefined
from ntkbench.estimate import Estimate, Estimates, rounding_bound, rounding_note
from ntkbench.methods import Method
from ntkbench.methods.base import Ledger
from ntkbench.operators.arrays import TF32, asarray_like, to_numpy
from ntkbench.operators.certificate import IN_PARTS
from ntkbench.operators.ranges import row_ranges
from ntkbench.options import OptionKeywords, Options, Target
from ntkbench.problem import Problem, hashed
from ntkbench.problems.base.source import source

if TYPE_CHECKING:
    import torch
    from torch import nn

    from ntkbench.cost import Costs
    from ntkbench.estimators.lanczos import Eigenvalues
    from ntkbench.estimators.solve import Regression, Solution
    from ntkbench.estimators.spectrum import Spectrum
    from ntkbench.kernel_file import File
    from ntkbench.layerwise.sample_kernels import SampleKernel
    from ntkbench.methods.base.factors import Factors
    from ntkbench.methods.base.layerwise import TracedProblem
    from ntkbench.operators import JacobianOperator
    from ntkbench.trials import Trials

Call = Callable[[Any, Any], Any]
Output = Any
Patterns = str | Sequence[str]
Part = Callable[..., Any]
"""A kernel as a function of rows and columns (see :mod:`ntkbench.operators.ranges`); without them, the whole kernel."""

Way = Callable[..., tuple[Part, Ledger]]
"""A function that prepares a kernel from a problem, inputs of the columns, a kind of kernel, a target and a seed."""

WRITTEN_OUT = 2**22
"""Entries of J up to which writing it out is faster than tracing the network, at the first use of a kernel."""

SMALL = 1024
"""Largest n for which :meth:`Kernel.eigenvalues` decomposes the whole matrix."""

STEPS = 8
"""Steps of block Lanczos whose passes :meth:`Kernel.eigenvalues` spends on the whole matrix at most."""

TOP = 10
"""Default number of eigenvalues."""

DECOMPOSED = 4
"""Number of float64 matrices that the eigenvalue decomposition of Theta holds, Theta included."""

FACTORED = 2
"""The same for its Cholesky factorisation."""

ALIGNED = 4
"""The same for the alignment with a matrix."""

NO_COLUMNS = (
    "samples interact in this network, so a kernel between two batches is not defined: omit the second inputs, or call "
    "model.eval() if it has BatchNorm in train mode"
)

SHARE = 8
"""If these do not fit, a block of Theta in float64 fills at most 1 / SHARE of the memory."""


class Setup(TypedDict, total=False):
    """What a :class:`Kernel` takes besides the network and its inputs, as keywords."""

    call: Call | None
    output: Output
    parameters: Patterns | None
    params: Any
    dtype: str | torch.dtype | None
    device: str | torch.device | None
    memory: int | None
    tf32: bool


class Kernel:
    """Theta = J J^T of a network on some inputs, with J the Jacobian of all outputs with respect to all parameters.

    The network is checked, copied and traced once for all kernels and metrics, also at other weights (:meth:`at`).
    theta is every parameter with ``requires_grad=True``, or those that ``parameters`` names; a tensor tied under
    several names counts once. The network is never changed, and is evaluated in its current mode: train-mode BatchNorm
    is allowed (its samples interact, which rules some methods out), train-mode Dropout is not.

    Use it instead of the functions of :mod:`ntkbench.api` if you need more than one result of a network.

    Cost: some passes for checks (see :func:`ntkbench.from_module`). The trace is made when it is first needed, and one
    plain backward pass certifies each new set of weights.

    >>> import torch, ntkbench
    >>> kernel = ntkbench.Kernel(torch.nn.Linear(3, 2), torch.eye(3))
    >>> kernel
    Kernel(Linear: N = 3, O = 2, P = 8, float32, torch)
    >>> print(kernel.trace())
    12 (structured_derivatives, 2 passes)

    Args:
        model: an ``nn.Module``, or a JAX function ``f(params, x)`` with ``params``. It returns ``[N, ...outputs]``;
            everything after the first axis counts as the O outputs of a sample.
        inputs: N samples: a tensor ``[N, ...]``, any pytree of tensors with a common first axis, or a ``DataLoader``,
            whose batches are joined on the host; one that shuffles is read in the order of its dataset, unless its
            class has an ``__iter__`` of its own.
        call: ``call(model, inputs)`` returns the outputs; by default ``model(inputs)``, ``model(*inputs)`` for a tuple
            or list, ``model(**inputs)`` for a mapping. Functions given here and as ``output`` are not copied: what they
            use besides their arguments must not change. A JAX function takes neither.
        output: which outputs count: an index into the axes after the first (``3`` for the class f[:, 3], ``-1`` for
            the last step f[:, -1], a tuple for several axes, a list for several classes), or a function of the outputs.
        parameters: which parameters count: names or patterns such as ``"layers.*.weight"``.
        params: the parameters of a JAX function, any pytree of arrays. For the variables of a Flax module with other
            collections than ``params``, ``parameters`` must say which count, as in ``parameters="params"``.
        dtype: ``"float32"`` or ``"float64"``; that of the parameters if not given.
        device: ``"cpu"``, ``"cuda"``, ``"cuda:1"`` or ``"auto"``; that of the parameters if not given. For a JAX
            function ``"cpu"``, ``"cuda"`` or ``"auto"``, which is the default.
        memory: bytes that everything except a result may use; by default 1 GiB, or half of the free memory on a GPU.
        tf32: whether torch may use TF32 for float32 products on a GPU; see :class:`ntkbench.options.Target`.

    Raises:
        BadInput: an argument cannot be used; says what is allowed.
        Unavailable: the device is not available.
    """

    def __init__(
        self,
        model: nn.Module | Callable[..., Any],
        inputs: Any,
        *,
        call: Call | None = None,
        output: Output = None,
        parameters: Patterns | None = None,
        params: Any = None,
        dtype: str | torch.dtype | None = None,
        device: str | torch.device | None = None,
        memory: int | None = None,
        tf32: bool = False,
    ) -> None:
        from ntkbench import operators

        if memory is not None:
            memory = options.positive("memory", memory, " of bytes")
        name = None if dtype is None else str(dtype).removeprefix("torch.")
        with ambient.own_settings():
            self._source = source(model, inputs, call, output, params, name, selected=parameters is not None)
            target, self._index = self._source.target(device)
            memory = memory or operators.working_memory(target)
            self._target = replace(target, tf32=tf32, memory=memory, program_memory=memory)
            self.problem = self._source.problem
            if parameters is not None:
                from ntkbench.problems.base.calls import restricted

                self.problem = restricted(self.problem, parameters)
        self._parameters = parameters
        self._prepared: dict[Any, Any] = {}
        self._used = False

    def __getstate__(self) -> dict[str, Any]:
        """The state for copies and pickles: all but prepared methods, which are prepared again at the next use."""
        return {**vars(self), "_prepared": {}, "_used": False}

    def __repr__(self) -> str:
        p = self.problem
        return f"Kernel({p.name}: N = {p.N}, O = {p.O}, P = {p.P}, {self._target.dtype}, {self._target.backend})"

    def trace(self, **keywords: Unpack[OptionKeywords]) -> Estimate:
        """tr Theta; methods, cost, units and errors are those of :func:`ntkbench.trace`."""
        return self._estimates(("trace",), options.asked(keywords))["trace"]

    def norm(self, **keywords: Unpack[OptionKeywords]) -> Estimate:
        """||Theta||_F, not its square; methods, cost, units and errors are those of :func:`ntkbench.norm`."""
        return self._estimates(("norm",), options.asked(keywords))["norm"]

    def effective_rank(self, **keywords: Unpack[OptionKeywords]) -> Estimate:
        """(tr Theta)^2 / ||Theta||_F^2; methods, cost and errors are those of :func:`ntkbench.effective_rank`."""
        return self._estimates(("effective_rank",), options.asked(keywords))["effective_rank"]

    def alignment(self, other: Any, **keywords: Unpack[OptionKeywords]) -> Estimate:
        """tr(Theta Theta') / (||Theta||_F ||Theta'||_F) with another kernel Theta'; see :func:`ntkbench.alignment`.

        Args:
            other: another :class:`Kernel` on as many samples and outputs; a network, evaluated on the same inputs;
                values of the parameters by name (a pytree, for a JAX function); or a target: a tensor y like the
                outputs, ``[N, O]`` or ``[n]``, for the kernel y y^T, or a matrix ``[n, n]``, or ``[N, N]`` for
                A ⊗ I_O. ``parameters`` selects from the other network as well. For y the method must give the
                norm of Theta itself. A matrix uses all of Theta, block by block, and takes no method, passes or rtol.
                If the parameters of a JAX function are one array, an array of its shape is parameters.
            keywords: see :class:`ntkbench.options.Options`.

        Returns:
            The alignment, from 0 to 1, without a unit; see :class:`ntkbench.Estimate`.

        Raises:
            BadInput: there are no such weights, or the two kernels are not of the same outputs; or an array may be
                either y or a matrix, as N = O, or a target or parameters; or as for :func:`ntkbench.trace`.
            OverMemory, Unavailable, Undefined: as for :func:`ntkbench.alignment`.
        """
        asked = options.asked(keywords)
        ladder.check(("alignment",), asked)
        if self._is_target(other):
            return self._alignment_with(self._checked_target(other, asked), asked)["alignment"]
        return self._beside(other)._estimates(("alignment",), asked)["alignment"]

    def metrics(self, other: Any = None, **keywords: Unpack[OptionKeywords]) -> Estimates:
        """All metrics by name, from the same probes; with ``other`` the alignment too.

        ``other`` is as for :meth:`alignment`. Cost, units and errors are those of :func:`ntkbench.metrics_of`.
        """
        asked = options.asked(keywords)
        own = tuple(name for name in metrics.METRICS if name != "alignment")
        if other is None:
            return self._estimates(own, asked)
        ladder.check(metrics.METRICS, asked)
        if self._is_target(other):
            return self._alignment_with(self._checked_target(other, asked), asked, own)
        return self._beside(other)._estimates(metrics.METRICS, asked)

    def factors(self, other: Any = None, *, probes: int = 32, seed: int = 0) -> Factors:
        """Metrics of the factors K and P of Theta = P K P*: of the layers' inputs, and of the Jacobians behind them.

        K is the kernel of the parameters' effect on the operations that use them, P the derivative of the outputs with
        respect to the results of these operations. Use them to tell whether a kernel changes with the representation
        (K) or with the dynamics (P). K is exact and takes a forward pass. P P* is estimated from ``probes`` passes and
        one for the certificate, twice that with ``other``, and exact where ``probes`` is at least O and memory allows.
        For a network that declares its recurrence it is always estimated, by two products with P or P* for each probe
        (one for the trace, four for the alignment). For other networks, some parameters are in neither factor: scales
        and shifts, weights that are computed from parameters, biases without their weight, and transposed convolutions.
        ``left_out`` names them.

        Args:
            other: another network or weights, as for :meth:`alignment`, with which K and P P* are aligned; no array.
            probes: random sign vectors, at least 4.
            seed: of the probes.

        Returns:
            :class:`ntkbench.methods.base.factors.Factors`: estimates of K and of P P*, by metric.

        Raises:
            BadInput: the network is a JAX function, its samples interact, it cannot be traced, or no parameter has
                factors.
            Undefined: all inputs of layers are zero.
            OverMemory: the inputs of layers, or the cotangents of four probes, do not fit in ``memory``.
            Uncertified: plain autograd gives other gradients.

        Source: Hazelden 2025 (arXiv 2511.10796) for recurrent networks.
        """
        from ntkbench import methods, operators
        from ntkbench.methods.base import factors

        probes, seed = options.positive("probes", probes), options.seed(seed)
        if self._target.backend == "jax":
            raise BadInput("a JAX function has no layers, and therefore no factors K and P")
        if probes < factors.LEAST:
            raise BadInput(f"probes must be at least {factors.LEAST} for a standard error, got {probes}")
        if other is not None and _is_array(other):
            raise BadInput("other must be a network or weights, got an array")
        names = metrics.METRICS if other is not None else tuple(n for n in metrics.METRICS if n != "alignment")
        kernel = self if other is None else self._beside(other)
        if kernel.problem.samples_interact:
            remedy = "call model.eval(), if this is due to BatchNorm in train mode"
            raise BadInput(f"samples interact, so Theta has no factors K and P: {remedy}")
        with self._settings():
            if operators.declares(kernel.problem.module):
                return factors.of_recurrence(kernel.problem, self._target, names, probes, seed)
            prepared = kernel._prepare(methods.get("structured_derivatives"))
            return factors.of_layers(prepared, names, probes, seed)

    def recommend(
        self, other: Any = None, *, metric: str = "trace", rtol: float = 0.01, confidence: float = 0.95
    ) -> Costs:
        """Predicted costs of each method for a metric to a tolerance; see :func:`ntkbench.recommend`.

        ``other`` is another kernel, network or set of weights, as for :meth:`alignment`. Cost and errors are those of
        :func:`ntkbench.recommend`.
        """
        from ntkbench import cost

        self._check_other(metric, other)
        kernel = self if other is None else self._beside(other)
        with self._settings():
            return cost.predict(kernel.problem, metric, self._target, rtol=rtol, confidence=confidence)

    def compare(
        self,
        other: Any = None,
        *,
        metric: str = "trace",
        methods: Sequence[str] | None = None,
        passes: int | None = None,
        rtol: float | None = None,
        calls: int = 5,
    ) -> Trials:
        """Measured results and costs of methods for a metric; see :func:`ntkbench.compare`.

        ``other`` is another kernel, network or set of weights, as for :meth:`alignment`. Cost and errors are those of
        :func:`ntkbench.compare`.
        """
        from ntkbench import trials

        self._check_other(metric, other)
        if passes is None and rtol is None:
            passes = trials.PASSES
        Options(passes=passes, rtol=rtol)
        calls = options.positive("calls", calls)
        names = None if methods is None else trials.chosen(methods)
        kernel = self if other is None else self._beside(other)
        if names is None:
            served = ladder.choices(kernel.problem, metric, self._target, passes, rtol)
            names = trials.chosen(["auto", *served, *trials.PUBLISHED])
        use = lambda **keywords: kernel._estimates((metric,), options.asked(keywords))[metric]  # noqa: E731
        return trials.run({name: trials.entry(use, name, passes=passes, rtol=rtol) for name in names}, metric, calls)

    def _check_other(self, metric: str, other: Any) -> None:
        """Check that there is another network if the metric is the alignment, and only then; an array is refused.

        Raises:
            BadInput: says what is allowed.
        """
        metrics.check(metric)
        if (other is None) == (metric == "alignment"):
            said = "needs a second network: give other" if other is None else "is of one network: omit other"
            raise BadInput(f"the {metric} {said}")
        if self._is_target(other):
            raise BadInput("this alignment is between two networks, got a target array")

    def ntk(self, inputs: Any = None, *, kernel: str = "full", seed: int = 0, file: File | None = None) -> Any:
        """Theta ``[N O, N O]``, or Theta between these inputs and others ``[N O, N2 O]``; see :func:`ntkbench.ntk`.

        Args:
            inputs: inputs of the columns, like those of the rows; by default those of the rows.
            kernel: ``"full"``, or the name of a kernel between samples.
            seed: seed of ``random_vector``.
            file: where to write the kernel, rectangle by rectangle within ``memory``; an interrupted computation
                resumes.

        Returns:
            The kernel, as :func:`ntkbench.ntk` returns it.

        Raises:
            BadInput, NtkbenchError, OverMemory, Unavailable: as for :func:`ntkbench.ntk`.
        """
        from ntkbench.layerwise import sample_kernels

        chosen, seed = sample_kernels.get(kernel), options.seed(seed)
        if chosen.last_layer and self._target.backend == "jax":
            raise BadInput(
                f"kernel={kernel!r} is for a torch.nn.Module; for a JAX function select the layer's parameters by "
                "parameters= and use kernel='trace'"
            )
        problem, columns = (self.problem, None) if inputs is None else self._columns(inputs)
        with self._settings():
            rows = 1 if chosen.between_samples else problem.O
            part, ledger = self._in_parts(problem, columns, chosen, seed)
            if file is not None:
                drawn = seed if kernel == "random_vector" else 0
                found = self._in_file(file, problem, columns, rows, part, {"kernel": kernel, "seed": drawn})
            else:
                found = self._at_once(part, problem, rows, None if columns is None else len(columns))
        for note in ledger()[1]:
            if note.startswith(IN_PARTS):  # an array has no notes
                logging.getLogger("ntkbench").warning("the kernel was %s", note)
        return found

    def _at_once(self, part: Part, problem: Problem, rows: int, N2: int | None = None) -> Any:
        """All of a kernel with this number of rows per sample; its columns are of N2 samples, or the same as its rows.

        Raises:
            OverMemory: the device cannot hold it.
        """
        from ntkbench import operators

        operators.check_result(problem.N * rows, (N2 or problem.N) * rows, self._target)
        with progress_bar.of_passes("kernel", problem.N, rows * (1 + (N2 or 0) / problem.N)):
            return part()

    def _in_file(
        self, file: File, problem: Problem, columns: Any, rows: int, part: Part, asked: Mapping[str, object]
    ) -> np.memmap[Any, Any]:
        """Write the missing parts of a kernel, with this number of rows per sample, to a file."""
        from ntkbench.kernel_file import KernelFile

        target, samples = self._target, (problem.N, problem.N if columns is None else len(columns))
        identity = {
            **asked,
            "dtype": target.dtype,
            "tf32": target.tf32,
            "samples": samples,
            "outputs": problem.O,
            **problem.identity(),
            "second inputs": None if columns is None else hashed({"x": to_numpy(columns)}),
        }
        symmetric = columns is None
        with KernelFile(
            file, identity, samples, rows, target.dtype, symmetric=symmetric, memory=target.memory
        ) as stored:
            with progress_bar.of_passes(f"kernel in {file}", problem.N):
                for where in stored.missing():
                    stored.write(*where, to_numpy(part(*where)))
            return stored.result()

    def _in_parts(self, problem: Problem, columns: Any, chosen: SampleKernel, seed: int) -> tuple[Part, Ledger]:
        """A kernel as a function of rows and columns, by the fastest method that works; without them, all of it.

        The ledger also counts the passes of the methods that failed, and notes why they did.
        """
        ways = self._ways(problem, columns)
        prepared: list[tuple[Part, Ledger]] = []
        reasons: list[str] = []
        lost = 0.0

        def part(*where: slice) -> Any:
            nonlocal lost
            while ways:
                try:
                    if not prepared:
                        prepared.append(ways[0](problem, columns, chosen, self._target, seed))
                    return self._checked(prepared[0][0](*where))
                except Exception as error:  # whatever the error, the next method may work
                    if ladder.concerns_all_methods(error):
                        raise
                    reasons.append(f"{_said(ways.pop(0))}: {errors.reason(error)}")
                    lost = ledger()[0]
                    prepared.clear()
            raise BadInput(f"no method can compute this kernel: {'; '.join(reasons)}")

        def ledger() -> tuple[float, tuple[str, ...], float | None]:
            spent, notes, certificate = prepared[0][1]() if prepared else (0.0, (), None)
            return lost + spent, (*(f"passed over {reason}" for reason in reasons), *notes), certificate

        return part, ledger

    def _checked(self, kernel: Any) -> Any:
        """A kernel, if its entries are neither too large nor too small for the precision."""
        largest = _largest(kernel)
        if not largest < math.inf:
            raise BadInput("the kernel has entries that are nan or infinite: gradients are not finite, or overflow")
        if not ladder.is_large(self.problem, self._target, largest):
            ladder.check_range(self.problem, ("trace",), self._target)
        return kernel

    def eigenvalues(
        self, top: int | None = None, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0
    ) -> Eigenvalues:
        """The largest eigenvalues of Theta, in descending order; a small Theta is decomposed as a whole.

        Cost: that of :meth:`ntk` and 2 passes if n and the outputs of a sample are few and the decomposition fits in
        memory (see :func:`ntkbench.estimators.spectrum.of_matrix`); else about 2 (top + 4) passes for each step of a
        block Krylov method (see :func:`ntkbench.estimators.lanczos.largest`).

        Args:
            top: number of eigenvalues; by default 10, or fewer if there are fewer or memory holds fewer.
            rtol: error, relative to each eigenvalue, at which the iteration stops.
            passes: maximum number of passes of products.
            seed: seed of the first block.

        Source: block Lanczos: Golub, Underwood 1977.

        Returns:
            ``values [top]``, ``errors [top]`` (each value is within that distance of the eigenvalue with the same
            index, including the expected rounding of the network's own passes; see
            :class:`ntkbench.estimators.lanczos.Eigenvalues`), ``passes``. Values and errors are in units of a squared
            output per squared parameter.

        Raises:
            BadInput: an argument cannot be used, such as ``top`` above n or fewer ``passes`` than the first step takes;
                or no method can compute the kernel.
            OverMemory: memory does not hold so many eigenvectors.
            Unavailable: the device is not available.
        """
        from ntkbench.estimators import lanczos
        from ntkbench.operators import linearise

        top, passes, seed = self._asked_spectrum(top, rtol, passes, seed)
        n, O = self.problem.n, self.problem.O  # noqa: E741 - the field's symbol
        few = n <= SMALL and min(O, self.problem.P) <= STEPS * 2 * (top + lanczos.EXTRA)
        if few and (found := self._decomposed(top)) is not None:
            return lanczos.Eigenvalues(found.values, found.errors, found.passes, found.notes)
        with self._settings():
            ladder.check_range(self.problem, ("norm",), self._target)
            j = linearise(self.problem, "theta_0", self._target)
            with progress_bar.of_passes("eigenvalues", self.problem.N):
                return lanczos.largest(j, top, rtol=rtol, passes=passes, seed=seed)

    def spectrum(self, top: int | None = None, *, rtol: float = 1e-3, passes: int = 4096, seed: int = 0) -> Spectrum:
        """Eigenvalues and eigenvectors, condition number, entropy effective rank and density of Theta, with bounds.

        Cost, units and errors are those of :func:`ntkbench.spectrum`. For the largest eigenvalues alone,
        :meth:`eigenvalues` costs less.
        """
        from ntkbench.estimators import spectrum
        from ntkbench.operators import linearise

        top, passes, seed = self._asked_spectrum(top, rtol, passes, seed)
        if (found := self._decomposed(top)) is not None:
            return found
        with self._settings():
            ladder.check_range(self.problem, ("norm",), self._target)
            j = linearise(self.problem, "theta_0", self._target)
            with progress_bar.of_passes("spectrum", self.problem.N):
                return spectrum.of_operator(j, top, rtol=rtol, passes=passes, seed=seed)

    def _decomposed(self, top: int) -> Spectrum | None:
        """The spectrum of all of Theta; ``None`` if its decomposition does not fit in memory."""
        from ntkbench.estimators import spectrum
        from ntkbench.operators import linearise

        if (whole := self._whole(DECOMPOSED)) is None:
            return None
        theta, spent, notes, certificate = whole
        with self._settings():
            j = linearise(self.problem, "theta_0", self._target)
            found = spectrum.of_matrix(theta, j, top, spent, certificate)
        return replace(found, notes=tuple(dict.fromkeys((*notes, *found.notes))))

    def _asked_spectrum(self, top: int | None, rtol: float, passes: int, seed: int) -> tuple[int, int, int]:
        """The number of eigenvalues, the passes and the seed, checked."""
        from ntkbench.estimators import lanczos

        most = max(lanczos.most(self.problem.n, self._target.memory), 1)
        top = min(TOP, self.problem.n, most) if top is None else options.positive("top", top)
        passes, seed = options.positive("passes", passes), options.seed(seed)
        Options(rtol=rtol)
        if top > self.problem.n:
            raise BadInput(f"top must be at most n = {self.problem.n}, the number of outputs, got {top}")
        return top, passes, seed

    def _whole(self, matrices: int) -> tuple[np.ndarray, float, tuple[str, ...], float | None] | None:
        """Theta in float64 on the host, the passes spent on it, notes, and its certificate.

        It is ``None`` if this number of float64 matrices does not fit in memory beside the kernel.
        """
        from ntkbench.layerwise import sample_kernels

        p = self.problem
        if p.n**2 * (self._target.itemsize + matrices * 8) > self._target.memory:
            return None
        with self._settings():
            part, ledger = self._in_parts(p, None, sample_kernels.get("full"), 0)
            theta = to_numpy(self._at_once(part, p, p.O), np.float64)
        return (theta, *ledger())

    def solve(self, y: Any, *, ridge: float, rtol: float = 1e-5, passes: int = 4096, seed: int = 0) -> Solution:
        """(Theta + ridge I)^-1 y with its residual; cost, units and errors are those of :func:`ntkbench.solve`."""
        from ntkbench.estimators import solve
        from ntkbench.operators import linearise

        passes, seed = options.positive("passes", passes), options.seed(seed)
        Options(rtol=rtol)
        ridge = options.not_negative("ridge", ridge)
        right = self._like_outputs(y)
        if ridge == 0 and self.problem.n > self.problem.P:
            raise BadInput(
                f"Theta is singular with {self.problem.P} parameters for {self.problem.n} outputs: use a ridge above 0"
            )
        size = _largest(right) or 1.0  # the squares of a norm may overflow or underflow
        unit = right.reshape(-1) / size
        if (whole := self._whole(FACTORED)) is not None:
            theta, spent, notes, _ = whole
            target = self._precise()
            with self._source.settings(target, self._index):
                j = linearise(self.problem, "theta_0", target)
                found = solve.of_matrix(theta, self._epsilon, j, unit, ridge, rtol=rtol, passes=spent)
            found = replace(found, notes=tuple(dict.fromkeys((*notes, *found.notes))))
        else:
            with self._settings():
                ladder.check_range(self.problem, ("norm",), self._target)
                j = linearise(self.problem, "theta_0", self._target)
                with progress_bar.of_passes("solution", self.problem.N):
                    found = solve.of_operator(j, unit, ridge, rtol=rtol, passes=passes, seed=seed)
        return replace(found, values=(found.values * size).reshape(right.shape), error=found.error * size)

    @property
    def _epsilon(self) -> float:
        """Machine epsilon of products."""
        return TF32 if self._target.tf32 else float(np.finfo(self._target.dtype).eps)

    def regress(
        self, inputs: Any, y: Any, *, ridge: float, rtol: float = 1e-5, passes: int = 4096, seed: int = 0
    ) -> Regression:
        """Kernel regression Theta(x', x) (Theta + ridge I)^-1 y at other inputs x', for targets y at its own inputs.

        It is the mean of a Gaussian process with covariance Theta and noise ``ridge``. The network, linearised at
        its weights and trained on y to convergence, predicts ``f(x') + regress(x', y - f(x))``.

        Cost: that of :meth:`solve`, two plain passes over each set of inputs to check that samples do not interact, one
        of them sample by sample, and one pass over each, in float64 if the network runs in float64. No kernel between
        the two is formed.

        Source: Jacot, Gabriel, Hongler 2018; Lee et al. 2019, equation 11.

        Args:
            inputs: x', like the kernel's own.
            y: targets of the kernel's own inputs, ``[N, ...outputs]``, ``[N, O]`` or ``[n]``.
            ridge, rtol, passes, seed: see :func:`ntkbench.solve`.

        Returns:
            ``values [N', ...outputs]``, ``solution``, ``passes`` and ``certificate``.

        Raises:
            BadInput: samples interact, so that no kernel between two batches exists; or as for :func:`ntkbench.solve`.
        """
        from ntkbench.estimators.solve import Regression
        from ntkbench.operators import interact, linearise

        problem, columns = self._columns(inputs)
        with self._settings():  # products over a whole batch do not show it
            if any(interact(each, self._target) for each in (self.problem, _on_columns(problem, columns))):
                raise BadInput(NO_COLUMNS)
        solution = self.solve(y, ridge=ridge, rtol=rtol, passes=passes, seed=seed)
        size = _largest(solution.values) or 1.0
        target = self._precise()
        with self._source.settings(target, self._index):
            own = linearise(self.problem, "theta_0", target)
            others = _on_columns(problem, columns)
            j = linearise(others, "theta_0", target)
            weights = own.vjp(asarray_like(solution.values.reshape(1, -1) / size, own.basis(0, 1)))
            predicted = to_numpy(j.jvp(weights), np.float64)[0] * size
        spent = solution.passes + own.passes + j.passes
        certificate = max((c for c in (own.certificate, j.certificate) if c is not None), default=None)
        return Regression(predicted.reshape(others.output_shape), solution, spent, certificate)

    def _precise(self) -> Target:
        """The target with the most precise products: float64 if the network is the same there; three passes to check.

        It may be another one, as ``jax.random`` draws other numbers from the same key, or as it branches on precision.
        """
        from ntkbench.operators import certificate, linearise

        if self._target.dtype == "float64":
            return self._target
        if "float64" not in self._prepared:
            target = replace(self._target, dtype="float64", tf32=False)
            products = []
            try:
                for each in (target, self._target):
                    with self._source.settings(each, self._index):
                        j = linearise(self.problem, "theta_0", each)
                        image = j.vjp(certificate.random_weights(j.n, j.basis(0, 1))[None])
                        products.append(to_numpy(image, np.float64))
                        if each is target:
                            j.jvp(image)
                certificate.check(certificate.distance(products[0], products[1]), self._epsilon)
            except Exception:  # a network that runs only in its own precision
                target = self._target
            self._prepared["float64"] = target
        found: Target = self._prepared["float64"]
        return found

    def _columns(self, inputs: Any) -> tuple[Problem, Any]:
        """A problem that also holds other inputs, and these inputs, for a kernel between the two.

        A batch of one sample does not show whether samples interact, so it is tested together with the other inputs.

        Raises:
            BadInput: the inputs are not like those of this kernel, or samples interact.
        """
        if not self.problem.samples_interact:
            with self._checks():
                problem, columns = self._source.columns(self.problem, inputs)
                if problem.N > 1 or not _interact(problem, columns):
                    return problem, columns
        raise BadInput(NO_COLUMNS)

    def _like_outputs(self, y: Any) -> np.ndarray:
        """The array y, shaped like the outputs, in float64.

        Raises:
            BadInput: it has another shape, or is not real and finite.
        """
        try:
            given = _dense(y)
        except ValueError as error:  # a list of lists of different lengths
            raise BadInput(f"y must be an array: {errors.reason(error)}") from None
        if given.dtype.kind not in "fiub":
            raise BadInput(f"y must hold real numbers, got {given.dtype}")
        if given.shape not in (shapes := self._shapes_of_outputs()):
            raise BadInput(f"y must be shaped like the outputs, {_one_of(shapes)}, got shape {given.shape}")
        if not np.isfinite(given).all():
            raise BadInput("y has nan or infinite entries: all must be finite")
        return given.astype(np.float64)

    def _shapes_of_outputs(self) -> list[tuple[int, ...]]:
        """The shapes that arrays like the outputs may have. In others the axes may be in another order."""
        p = self.problem
        return list(dict.fromkeys([p.output_shape, (p.N, p.O), (p.n,)]))

    def at(self, weights: Any) -> Kernel:
        """The kernel of the same network at other weights, which shares the trace; the same seed draws the same probes.

        Cost: for a network at most seven forward and two backward passes for checks, and none for values by name. A JAX
        function is traced again.

        Args:
            weights: a network with the same parameters, whose buffers and frozen parameters go with it; or values by
                name, such as a ``state_dict`` (a pytree, for a JAX function). Those that are not given stay the same.

        Returns:
            A new kernel; this one does not change.

        Raises:
            BadInput: there are no such parameters, they have other shapes, others are trainable, or with the same
                values the network computes other outputs or gradients.
        """
        with self._checks():
            return self._derived(self._source.at(self.problem, weights))

    def _on(self, inputs: Any) -> Kernel:
        """The kernel of the same module on other inputs, for its trace: the checks of the network are not repeated.

        Raises:
            BadInput: the inputs are not like those of this kernel.
        """
        from ntkbench.problems.base.module import on_inputs

        with self._checks():
            return self._derived(on_inputs(*self._source.columns(self.problem, inputs)))

    def groups(self, patterns: Mapping[str, Patterns]) -> dict[str, Kernel]:
        """A kernel for each group of parameters; kernels of groups that share no parameter add up.

        Args:
            patterns: by the group's name, names or patterns of parameters such as ``"*.attention.*"``.

        Cost: no passes.

        Returns:
            A kernel for each group, by its name. All have the sizes N and O of this one.

        Raises:
            BadInput: a pattern matches no trainable parameter, or the groups are not a dict with distinct names.
        """
        from ntkbench.problems.base.calls import groups

        found = {name: self._derived(problem) for name, problem in groups(self.problem, patterns).items()}
        for name, chosen in patterns.items():
            found[str(name)]._parameters = chosen
        return found

    def _derived(self, problem: Problem) -> Kernel:
        """A copy of this kernel with another problem."""
        made = copy.copy(self)
        made.problem = problem
        return made

    def _beside(self, other: Any) -> Kernel:
        """This kernel, paired with another one for an alignment."""
        from ntkbench.problems.base.module import paired

        if isinstance(other, Kernel) and other._target.backend != self._target.backend:
            raise BadInput("one kernel is of a torch.nn.Module, the other of a JAX function: use one backend for both")
        with self._checks():
            end = other.problem if isinstance(other, Kernel) else self._end(other)
            return self._derived(paired(self.problem, end))

    def _end(self, other: Any) -> Problem:
        """The problem of the same network at other weights, or else of another network, with the same parameters."""
        from ntkbench.problems.base.calls import restricted
        from ntkbench.problems.base.module import OtherTheta

        self._source.check_end(other)
        try:
            return self._source.at(self.problem, other)
        except OtherTheta:
            raise
        except BadInput:
            found = self._source.of(other)
            if found is None:
                raise
        return found if self._parameters is None else restricted(found, self._parameters)

    def _estimates(self, names: Sequence[str], asked: Options) -> Estimates:
        ladder.check(names, asked)
        with self._settings():
            found = ladder.estimates(self.problem, names, self._target, asked, self._prepare)
        with self._checks():
            if not (notes := self._source.notes):
                return found
        return Estimates({name: replace(each, notes=(*each.notes, *notes)) for name, each in found.items()})

    def _prepare(self, method: Method) -> Any:
        """A method ready for this kernel; methods that prepare the same thing share it, or its refusal."""
        key = method.prepares or method.name
        if key not in self._prepared:
            try:
                self._prepared[key] = method.prepare(self.problem, self._target)
            except BadInput as refusal:
                self._prepared[key] = refusal
        if isinstance(found := self._prepared[key], BadInput):
            raise found.with_traceback(None)
        return found

    def _is_target(self, other: Any) -> bool:
        """Whether an object is an array that is the target of an alignment, and not a network's parameters.

        Raises:
            BadInput: it may be either.
        """
        if not _is_array(other) or not self._source.takes_array(shape := tuple(other.shape)):
            return _is_array(other)
        p = self.problem
        targets = dict.fromkeys([*self._shapes_of_outputs(), (p.n, p.n), (p.N, p.N)])
        if shape in targets:
            raise BadInput(
                f"an array of shape {shape} may be the function's parameters or a target: give parameters as "
                f"Kernel(...).at(params), or a target as {_one_of([each for each in targets if each != shape])}"
            )
        return False

    def _checked_target(self, given: Any, asked: Options) -> np.ndarray:
        """The target of an alignment: an array like the outputs, ``[n]`` and of length 1, or a matrix of any scale.

        Raises:
            BadInput: it is neither, or may be both; or the options do not apply to it.
        """
        p, target = self.problem, _dense(given)
        if target.dtype.kind not in "fiub":
            raise BadInput(f"the target of an alignment must hold real numbers, got {target.dtype}")
        largest = _largest(target) if target.size else 0.0
        if not 0 < largest < math.inf:
            raise BadInput("the target of an alignment must be finite and not zero")
        like, kernels = self._shapes_of_outputs(), list(dict.fromkeys([(p.n, p.n), (p.N, p.N)]))
        if target.shape in like and target.shape in kernels and p.n > 1:
            raise BadInput(
                f"a target of shape {target.shape} may be y or a kernel between samples, as N = O = {p.N}: give y as "
                f"({p.n},), y.reshape(-1), or the kernel A as ({p.n}, {p.n}), kron(A, eye({p.O}))"
            )
        if target.shape in like:
            self._check_gives_norm(asked.method)
            y = target.reshape(-1).astype(np.float64) / largest  # the scale does not count, and must not overflow
            unit: np.ndarray = y / np.linalg.norm(y)
            return unit
        if target.shape not in kernels:
            raise BadInput(
                f"a target must be shaped like the outputs, {_one_of(like)}, or a kernel {_one_of(kernels)}; "
                f"got shape {target.shape}"
            )
        if replace(asked, seed=0, confidence=0.95) != Options():
            raise BadInput("the alignment with a matrix uses all of Theta: omit method, passes and rtol")
        return target

    def _check_gives_norm(self, name: str) -> None:
        """Refuse a method that does not give the norm of Theta itself, by which y^T Theta y is divided.

        Raises:
            BadInput: says what is allowed.
        """
        from ntkbench import methods

        def gives(method: Method) -> bool:
            return method.kind != "approximate" and "norm" in method.metrics

        if name != "auto" and not gives(methods.get(name)):
            every = map(methods.get, methods.names())
            able = (each.name for each in every if gives(each) and self._target.backend in each.backends)
            raise BadInput(
                f"the alignment with a target needs the norm of Theta itself, which {name} does not compute; "
                f"allowed: auto, {', '.join(able)}"
            )

    def _alignment_with(self, target: np.ndarray, asked: Options, own: Sequence[str] = ()) -> Estimates:
        """The alignment with a target, and metrics of this kernel.

        Args:
            target: y of length 1, or a matrix.
            asked: the requested options; ``passes`` is the total budget.
            own: metrics of this kernel that are computed as well, the norm among them.
        """
        return (self._with_labels if target.ndim == 1 else self._with_matrix)(target, asked, own)

    def _with_labels(self, y: np.ndarray, asked: Options, own: Sequence[str]) -> Estimates:
        """The alignment with y y^T, exact but for the norm: it is within a tolerance if the norm is."""
        from ntkbench.operators import linearise

        names = own or ("norm",)
        found = self._estimates(names, self._less_one_pass(asked, names))
        with self._settings():
            j = linearise(self.problem, "theta_0", self._target)
            image = j.vjp(asarray_like(y.reshape(1, -1), j.basis(0, 1)))
            square = float(np.linalg.norm(to_numpy(image, np.float64))) ** 2
        norm = found["norm"]
        aligned = _aligned(norm, square, j)
        aligned = replace(
            aligned, notes=tuple(dict.fromkeys((*aligned.notes, *_missed(aligned, asked, self._target.dtype))))
        )
        if norm.standard_error is None:  # each metric has its own cost
            return Estimates({**found, "alignment": _with_passes(aligned, j.passes)})
        return Estimates({name: _with_passes(e, j.passes) for name, e in {**found, "alignment": aligned}.items()})

    def _with_matrix(self, target: np.ndarray, asked: Options, own: Sequence[str]) -> Estimates:
        """The alignment with a matrix ``[n, n]``, or with A ⊗ I_O for A ``[N, N]``, by blocks of Theta.

        In the Frobenius norm, rounding changes Theta by at most a share of its trace.
        """
        from ntkbench.layerwise import sample_kernels

        p = self.problem
        found = self._estimates(own, asked) if own else Estimates()
        scale, trace, square, size, inner = _largest(target), 0.0, 0.0, 0.0, 0.0
        with self._settings():
            part, ledger = self._in_parts(p, None, sample_kernels.get("full"), 0)
            rectangles = self._rectangles()
            whole = len(rectangles) == 1
            with progress_bar.of_passes("alignment", p.N):
                for rows, columns in rectangles:
                    theta = to_numpy(self._at_once(part, p, p.O) if whole else part(rows, columns), np.float64)
                    trace += float(theta.trace()) if rows == columns else 0.0
                    mirrored = [(theta.T, columns, rows)] if rows != columns else []
                    for block, own_rows, own_columns in [(theta, rows, columns), *mirrored]:
                        entries = np.divide(_entries(target, own_rows, own_columns, p.n), scale, dtype=np.float64)
                        square += _inner(block, block)
                        size += _inner(entries, entries)
                        inner += _inner(block, entries)
            if square == 0:
                ladder.check_range(p, ("norm",), self._target)
                raise Undefined("the alignment is not defined where Theta is zero")
            if not square < math.inf:
                raise BadInput("the alignment is not finite, as squares of Theta overflow: scale the outputs")
        spent, notes, certificate = ledger()
        value = inner / math.sqrt(square) / math.sqrt(size)
        off = rounding_bound("norm", self._epsilon, max(p.n, p.P), certificate) * trace / math.sqrt(square)
        rounding = off * (1 + abs(value))
        known: dict[str, Any] = {"certificate": certificate, "rounding": rounding, "confidence": asked.confidence}
        aligned = Estimate(value, None, spent, "ntk", notes, "alignment", **known)
        return Estimates({**found, "alignment": aligned})

    def _rectangles(self) -> list[tuple[slice, slice]]:
        """Rows and columns of Theta on and below the diagonal: all of it, if the alignment then fits in memory."""
        p, memory = self.problem, self._target.memory
        fits = p.n**2 * (self._target.itemsize + ALIGNED * 8) <= memory
        ranges = row_ranges(p.N, p.O, p.n if fits else math.isqrt(memory // (8 * SHARE)))
        return [(rows, columns) for i, rows in enumerate(ranges) for columns in ranges[: i + 1]]

    def _less_one_pass(self, asked: Options, names: Sequence[str]) -> Options:
        """The options of some metrics, with one pass less in the budget.

        Raises:
            BadInput: the remaining budget is too small.
        """
        from ntkbench import methods

        if asked.passes is None:
            return asked
        least = 2
        if asked.method != "auto":
            least = 1 + ladder.least_passes(self.problem, names, methods.stochastic(asked.method))
        if asked.passes < least:
            said = f"the {metrics.words(*names)} by {asked.method}, and the alignment with a target,"
            raise BadInput(f"{said} take at least {least} passes together; got passes={asked.passes}")
        return replace(asked, passes=asked.passes - 1)

    def _ways(self, problem: Problem, columns: Any) -> list[Way]:
        """Functions that prepare a kernel, the fastest first."""
        if self._target.backend == "jax":
            return _in_jax(problem, columns)
        ways: list[Way] = []
        if not problem.samples_interact:
            ways = [self._layer_by_layer, _sample_by_sample]
            if not self._used and problem.n * problem.P <= WRITTEN_OUT:
                ways.reverse()
        self._used = True
        return ways + ([_row_by_row] if columns is None else [])

    def _layer_by_layer(
        self, problem: Problem, x2: torch.Tensor | None, kernel: SampleKernel, target: Target, seed: int
    ) -> tuple[Part, Ledger]:
        from ntkbench.methods.base.layerwise import ledger_of

        traced = self._traced() if problem is self.problem else _traced(problem, target)
        for name, why in traced.engine.fallbacks().items():
            logging.getLogger("ntkbench").warning("gradients of %s are written out: %s", name, why)
        (end,) = traced.ends("trace")
        arguments = end.engine, end.parameters, end.x, None if x2 is None else x2.to(end.x), seed
        in_parts = kernel.parts(*arguments)
        return lambda *where: in_parts(*where) if where else kernel.compute(*arguments), ledger_of([end])

    def _traced(self) -> TracedProblem:
        from ntkbench import methods

        traced: TracedProblem = self._prepare(methods.get("structured_derivatives"))
        return traced

    def _settings(self) -> contextlib.AbstractContextManager[object]:
        return self._source.settings(self._target, self._index)

    def _checks(self) -> contextlib.AbstractContextManager[object]:
        return self._source.checks(self._target, self._index)


def _dense(given: Any) -> np.ndarray:
    """An array of any library on the host, without zeros left out."""
    given = given.detach() if hasattr(given, "detach") else given
    for name in ("to_dense", "todense", "toarray"):  # of torch, JAX and SciPy
        if hasattr(given, name):
            given = getattr(given, name)()
            break
    return np.asarray(to_numpy(given))


def _in_jax(problem: Problem, columns: Any) -> list[Way]:
    from ntkbench.operators import jax_kernel

    def adapted(way: jax_kernel.Way) -> Way:
        @functools.wraps(way)
        def prepare(problem: Problem, x2: Any, kernel: SampleKernel, target: Target, seed: int) -> tuple[Part, Ledger]:
            directions = None if kernel.directions is None else kernel.directions(problem.O, seed)
            arguments = problem, x2, directions, kernel.averaged, target
            in_parts = functools.cache(lambda: jax_kernel.in_parts(way, *arguments))
            K, spent = problem.O if directions is None else len(directions), 0.0
            rows = problem.N * (1 if kernel.averaged else K)

            def part(*where: slice) -> Any:
                nonlocal spent
                found = in_parts()(*where) if where else way(*arguments)
                ends = where[:1] if where[:1] == where[1:] else where
                spent += K * (sum(each.stop - each.start for each in ends) / rows if where else 1)
                return found

            return part, lambda: (spent, (), None)  # neural-tangents counts no passes; these are of rows and columns

        return prepare

    own: dict[jax_kernel.Way, Way] = {
        jax_kernel.sample_by_sample: _sample_by_sample,
        jax_kernel.row_by_row: _row_by_row,
    }
    return [own[way] if way in own else adapted(way) for way in jax_kernel.ways(problem, columns)]


def _sample_by_sample(
    problem: Problem, x2: Any, kernel: SampleKernel, target: Target, seed: int, *, independent: bool = True
) -> tuple[Part, Ledger]:
    from ntkbench.operators import linearise
    from ntkbench.operators.explicit_kernel import explicit_kernel
    from ntkbench.problems.base.module import last_layer

    problem = last_layer(problem) if kernel.last_layer else problem
    left = linearise(problem, "theta_0", target)
    right = None if x2 is None else linearise(_on_columns(problem, x2), "theta_0", target)
    directions = kernel.drawn(problem.O, seed, left.basis(0, 1))
    part = functools.partial(
        explicit_kernel, left, right, directions, averaged=kernel.averaged, independent=independent
    )
    both = [left, *([right] if right else [])]

    def ledger() -> tuple[float, tuple[str, ...], float | None]:
        found = [j.certificate for j in both if j.certificate is not None]
        notes = dict.fromkeys(note for j in both for note in j.notes)
        return sum(j.passes for j in both), tuple(notes), max(found, default=None)

    return part, ledger


def _row_by_row(problem: Problem, x2: Any, kernel: SampleKernel, target: Target, seed: int) -> tuple[Part, Ledger]:
    """From products over the whole batch, which allows samples to interact."""
    return _sample_by_sample(problem, x2, kernel, target, seed, independent=False)


def _traced(problem: Problem, target: Target) -> TracedProblem:
    from ntkbench.methods.base.layerwise import TracedProblem

    return TracedProblem(problem, target)


def _on_columns(problem: Problem, columns: Any) -> Problem:
    """The problem on other inputs, a tensor or an array, whose samples must not interact."""
    from ntkbench.problems.base.module import on_inputs

    return problem.with_inputs(columns) if isinstance(columns, np.ndarray) else on_inputs(problem, columns)


def _interact(problem: Problem, columns: Any) -> bool:
    """Whether the only sample of a problem interacts with some of the other inputs."""
    from ntkbench.problems.base.function import from_function
    from ntkbench.problems.base.module import TOGETHER, from_module

    x = np.concatenate([problem.x, _on_columns(problem, columns).x[: TOGETHER - 1]])
    values = {**problem.fixed_0, **problem.theta_0}
    if problem.module is None:
        assert problem.jax_forward is not None
        return from_function(problem.jax_forward, x, values).samples_interact
    import torch

    from ntkbench.modules import copied, load

    return from_module(load(copied(problem.module), values), torch.from_numpy(x)).samples_interact


def _with_passes(estimate: Estimate, more: float) -> Estimate:
    """An estimate that took more passes."""
    return replace(estimate, passes=None if estimate.passes is None else estimate.passes + more)


def _aligned(norm: Estimate, square: float, j: JacobianOperator) -> Estimate:
    """The alignment with y y^T for y of length 1, from ||Theta||_F and y^T Theta y = ||J^T y||^2.

    Rounding changes row i of J by a share of its norm, and J^T y by at most that share of sum_i |y_i| ||J_i||, which is
    at most the square root of tr Theta <= min(n, P)^(1/2) ||Theta||_F. It is large if the rows cancel, as for centred
    y.

    Raises:
        Undefined: Theta is zero.
    """
    if norm.value == 0:
        raise Undefined("alignment is not defined where Theta is zero")
    value, rounding = square / norm.value, norm.rounding
    error = None if norm.standard_error is None else norm.standard_error / norm.value * value
    if value:
        share = rounding_bound("norm", j.epsilon, max(j.n, j.P), j.certificate)
        share *= (min(j.n, j.P) ** 0.5 / value) ** 0.5
        rounding = value * ((rounding or 0.0) + share * (2 + share))
    return replace(
        norm,
        value=min(value, 1.0) if error is None else value,
        standard_error=error,
        notes=tuple(dict.fromkeys((*norm.notes, *j.notes))),
        metric="alignment",
        logarithmic=True,
        certificate=max((c for c in (norm.certificate, j.certificate) if c is not None), default=None),
        rounding=rounding,
    )


def _missed(aligned: Estimate, asked: Options, dtype: str) -> tuple[str, ...]:
    """A note if an alignment is not within its tolerance."""
    if asked.rtol is None or (width := aligned.relative_width(asked.confidence)) <= asked.rtol:
        return ()
    if replace(aligned, rounding=None).relative_width(asked.confidence) <= asked.rtol:
        return (rounding_note(asked.rtol, dtype),)
    return (f"the alignment did not reach rtol={asked.rtol:g} at confidence {asked.confidence:g}: {width:.2g}",)


def _said(way: Callable[..., Any]) -> str:
    return way.__name__.strip("_").replace("_", " ")


def _largest(array: Any) -> float:
    """The largest absolute value in an array of any library, without a copy of it; ``nan`` if an entry is."""
    return max(abs(float(array.max())), abs(float(array.min())))


def _is_array(value: Any) -> bool:
    """Whether a value is one array, of any library, and not a tree of them."""
    return hasattr(value, "shape") and hasattr(value, "dtype") and not isinstance(value, Mapping)


def _one_of(shapes: Sequence[tuple[int, ...]]) -> str:
    return " or ".join(map(str, shapes))


def _entries(target: np.ndarray, rows: slice, columns: slice, n: int) -> np.ndarray:
    """Some entries of a matrix ``[n, n]``, or of A ⊗ I_O for A ``[N, N]``."""
    if len(target) == n:
        return target[rows, columns]
    (i, output), (j, other) = (divmod(np.arange(each.start, each.stop), n // len(target)) for each in (rows, columns))
    found: np.ndarray = target[np.ix_(i, j)] * (output[:, None] == other)
    return found


def _inner(one: np.ndarray, other: np.ndarray) -> float:
    """Sum of the products of corresponding entries, without storing the products."""
    return float(np.einsum("ij,ij->", one, other))
