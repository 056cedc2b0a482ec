"""The public functions: the NTK of a network, or a metric of it with its error and its cost.

Each function makes a :class:`ntkbench.Kernel` and uses it once; make one yourself to use it many times.

>>> import torch, ntkbench
>>> model, x = torch.nn.Linear(3, 2), torch.eye(3)
>>> print(ntkbench.trace(model, x))
12 (structured_derivatives, 2 passes)
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from ntkbench import errors, ladder, metrics, stream
from ntkbench.errors import BadInput, unknown
from ntkbench.estimate import Estimate, Estimates
from ntkbench.kernel import Kernel, Setup
from ntkbench.options import OptionKeywords, Options

if TYPE_CHECKING:
    import numpy as np
    import torch

    from ntkbench.cost import Costs
    from ntkbench.estimators.solve import Solution
    from ntkbench.estimators.spectrum import Spectrum
    from ntkbench.kernel_file import File
    from ntkbench.trials import Trials

__all__ = [
    "alignment",
    "compare",
    "effective_rank",
    "metrics_of",
    "norm",
    "ntk",
    "recommend",
    "solve",
    "spectrum",
    "trace",
]


class Keywords(Setup, OptionKeywords, total=False):
    """Keywords of the functions of this module: the set-up of a kernel, and the options of an estimate."""


@overload
def ntk(
    model: Any, x1: Any, x2: Any = ..., *, kernel: str = ..., seed: int = ..., file: None = ..., **setup: Unpack[Setup]
) -> torch.Tensor: ...
@overload
def ntk(
    model: Any, x1: Any, x2: Any = ..., *, kernel: str = ..., seed: int = ..., file: File, **setup: Unpack[Setup]
) -> np.memmap[Any, Any]: ...
def ntk(
    model: Any,
    x1: Any,
    x2: Any = None,
    *,
    kernel: str = "full",
    seed: int = 0,
    file: File | None = None,
    **setup: Unpack[Setup],
) -> torch.Tensor | np.memmap[Any, Any]:
    """The exact NTK between two sets of inputs, or an N x N kernel that approximates it, layer by layer if possible.

    ``kernel="full"`` is Theta itself, ``[N1 * O, N2 * O]`` with rows sample-major. The others are ``[N1, N2]`` matrices
    A, which approximate Theta as A ⊗ I_O: ``sum_of_logits`` (the pNTK of Mohamadi et al. 2023), ``single_logit`` (the
    first output), ``random_vector`` (one random combination of outputs, drawn from ``seed``), ``trace`` ((1/O) tr_O
    Theta, the best of them in the Frobenius norm) and ``last_layer`` (the trace kernel of the last layer's parameters).

    Cost: O backward passes over each set of inputs for ``full``, ``trace`` and ``last_layer``, one for the others, and
    one contraction per layer, or half of one without ``x2`` (see :mod:`ntkbench.layerwise`). The network is traced
    first, which takes from 0.1 s to a few seconds; the trace is reused for networks of the same structure. If J has at
    most four million entries, the first use of a kernel writes it out instead. The ``ntkbench`` logger names parameters
    without a fast rule.

    If the network cannot be traced, or plain autograd contradicts its trace, rows of its Jacobian are written out in
    blocks: sample by sample, or else from products over the whole batch. Networks with interacting samples use products
    over the whole batch, and allow no ``x2``. The kernel of a JAX function is computed by neural-tangents, or else from
    rows of its Jacobian.

    With ``file`` a kernel may be larger than memory. It is written to disk in rectangles, each of which takes at most
    ``memory``, including intermediate results. The file has its full size from the start, so that the disk cannot fill
    up during the computation. An interrupted computation resumes when it is called again; ``<file>.progress`` records
    the kernel and the progress, and is kept. A complete file is opened at once, and a file with another kernel is
    refused. Each run certifies all rows before its first rectangle, which takes O + 1 passes. Each rectangle takes the
    passes of its columns, and each row of rectangles the passes of its rows. More ``memory`` means fewer repeated
    passes.

    Use it if you need the kernel itself. Metrics and eigenvalues cost less by their own functions, since they need no
    kernel in memory.

    Source: Novak, Sohl-Dickstein, Schoenholz 2022 (arXiv 2206.08720), section 3; the pNTK: Mohamadi, Bae, Sutherland
    2023 (arXiv 2206.12543).

    >>> import torch, ntkbench
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    >>> ntkbench.ntk(model, x).shape
    torch.Size([8, 8])

    Args:
        model, x1: network and inputs of the rows; see :class:`ntkbench.Kernel`.
        x2: inputs of the columns, of the same structure; those of the rows if not given.
        kernel: one of the names above.
        seed: seed of ``random_vector``.
        file: a path, for a kernel in NumPy's npy format instead of memory.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a
            dict with a kernel for each group.

    Returns:
        The kernel, ``[N1 * O, N2 * O]`` for ``full`` and ``[N1, N2]`` for the others, in units of a squared output per
        squared parameter, on the requested device and in the requested precision; a JAX array for a JAX function. With
        ``file`` it is a read-only ``numpy.memmap`` of the file.

    Raises:
        BadInput: an argument cannot be used, no method can compute the kernel, or the file holds something else, is
            damaged, cannot be written or does not fit on the disk; says why.
        NtkbenchError: writing the file failed.
        OverMemory: the result itself would not fit in memory.
        Unavailable: the device is not available.
    """
    if file is not None and isinstance(setup.get("parameters"), Mapping):
        raise BadInput(
            "a file holds one kernel: for groups of parameters use ntkbench.Kernel(...).groups(...), and call "
            "ntk(file=...) of each group with a file of its own"
        )
    keywords = {"seed": seed, **setup}
    found: torch.Tensor = _use(model, x1, keywords, (), lambda k, _: k.ntk(x2, kernel=kernel, seed=seed, file=file))
    return found


def trace(model: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """tr Theta of a network at its current weights, Theta = J J^T with J the Jacobian of all outputs.

    ``method="auto"`` uses an exact method if it takes no more passes and not clearly more operations than the estimate
    would, within ``memory``, and an estimator otherwise. Operations are counted on shapes and nothing is timed, so the
    choice is deterministic. The exact methods, tried in the order of their operations, are

    - ``recurrent_exact_trace``, if the network declares its recurrence;
    - ``wide_head``, for independent samples and a last linear layer from d to V outputs with V >= 2 d, or V >= 3 d for
      the alignment; if the layer is also the embedding and m distinct tokens occur, V >= 2 (m + d), or V >= 2 (m + 2
      d);
    - ``structured_derivatives`` and ``jacobian_contraction``, for independent samples, which take O passes;
    - ``parameter_gram``, for few parameters and many outputs;
    - ``batched_jacobian`` and ``naive_jacobian``, which also allow samples to interact, and take min(n, P) (min(n, 2 P)
      without forward mode) and n passes.

    The estimators for independent samples are

    - ``wide_head_u_statistics``, for a last layer as for ``wide_head``;
    - ``structured_block_u_statistics`` for the trace (``per_sample_trace`` if the network cannot be traced or declares
      its recurrence);
    - block U-statistics for the other metrics, if what they hold fits in ``memory``: ``group_u_statistics`` if the
      network declares its recurrence, else ``structured_block_u_statistics`` if it can be traced, else
      ``block_u_statistics``.

    For a JAX function, ``nt_structured_derivatives`` and ``nt_jacobian_contraction`` (if neural-tangents is installed)
    take the place of ``wide_head``, ``structured_derivatives`` and ``jacobian_contraction``, and ``per_sample_trace``
    and ``block_u_statistics`` that of the estimators.

    Otherwise the estimators are ``hutchpp_adaptive`` and ``one_sided_reverse`` for the trace, and ``nystrom_loo``
    (``hutchinson`` with ``rtol``, or if it does not fit) and ``gram_reverse`` for the other metrics. Traces are
    estimated on the side with fewer dimensions: outputs or parameters.

    With ``rtol`` an exact method takes over as soon as the remaining probes would cost more than half as much. It comes
    first if the estimate is expected to cost as much: if a batch is so small that a reliable standard error takes more
    passes, if the tolerance is tight, and for traces of small networks. Block U-statistics give way to ``hutchinson``
    if inner products of gradients would take most of the time, and are resumed if ``hutchinson`` turns out to need far
    more. On a recurrent network with few trials ``hutchinson`` comes first. Methods are tried in turn, and one that
    fails on the network is skipped. ``Estimate.method`` names the method that was used, and ``Estimate.notes`` says why
    others were not.

    Every method is certified by plain ``backward`` of the unmodified network over the whole batch. A method whose
    gradients differ by more than the square root of the machine epsilon is skipped by ``auto``, and refused if
    requested by name. ``Estimate.certificate`` is the relative difference.

    If samples do not interact, the batches of a ``DataLoader`` are read one after another, joined into parts of at
    least 64 samples, and dropped after use. Each part is estimated with its own probes, and with ``rtol`` to that
    tolerance. Other metrics join all batches on the host.

    Cost: that of the method, some passes for checks (see :func:`ntkbench.from_module`), and one backward pass at each
    set of weights for the certificate.

    Use it to follow the overall speed of training: the loss of a linearised network falls with the eigenvalues, of
    which this is the sum.

    Source: that of the method; see ``ntkbench list`` and the page of all methods.

    >>> import torch, ntkbench
    >>> ntkbench.trace(torch.nn.Linear(3, 2), torch.ones(4, 3)).value
    32.0

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        keywords: ``call``, ``output``, ``parameters``, ``params``, ``dtype``, ``device`` and ``memory``: see
            :class:`ntkbench.Kernel`; ``method``, ``passes``, ``rtol``, ``confidence`` and ``seed``: see
            :class:`ntkbench.options.Options`. Without ``passes`` the maximum is 256, or 4096 with ``rtol``. Block
            U-statistics spend at most max(16, 1024 / N) passes at each set of weights, those of groups at most 1024 /
            min(N, 24), unless requested by name with ``passes``, or with ``rtol``. Exact and approximate methods
            requested by name take no ``passes``. With a mapping of names to patterns as ``parameters`` the result is a
            dict with an estimate for each group.

    Returns:
        The trace, in units of a squared output per squared parameter, with its interval, its passes, the method and
        notes. It behaves like a number; see :class:`ntkbench.Estimate`.

    Raises:
        BadInput: an argument cannot be used, or no method applies to this network, or the requested one does not; says
            why. Its subclass ``NotFinite`` is raised if weights, outputs or gradients are not finite, and
            ``Uncertified`` if a requested method contradicts plain autograd.
        OverMemory: the method would need more than ``memory`` at once.
        Unavailable: the device is not available.
    """
    found: Estimate = _use(model, x, keywords, ("trace",), lambda k, chosen: k.trace(**chosen), streamed=True)
    return found


def norm(model: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """||Theta||_F (not its square) of a network at its current weights.

    Methods are those of :func:`trace` that compute the norm. Several, such as ``one_sided_reverse`` and
    ``recurrent_exact_trace``, compute the trace alone; ``ntkbench list --metric norm`` shows the others.

    Cost: that of :func:`trace`, and of the inner products between all gradients.

    Use it as the scale of a kernel, for example to compare it with a change of the kernel.

    Source: that of the method; see ``ntkbench list`` and the page of all methods.

    >>> import torch, ntkbench
    >>> print(ntkbench.norm(torch.nn.Linear(3, 2), torch.eye(3)))
    6 (structured_derivatives, 2 passes)

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        keywords: see :func:`trace`.

    Returns:
        The norm, in units of a squared output per squared parameter; see :class:`ntkbench.Estimate`.

    Raises:
        BadInput, OverMemory, Unavailable: see :func:`trace`.
    """
    found: Estimate = _use(model, x, keywords, ("norm",), lambda k, chosen: k.norm(**chosen))
    return found


def effective_rank(model: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """(tr Theta)^2 / ||Theta||_F^2 of a network at its current weights.

    Methods are those of :func:`norm`.

    Cost: that of :func:`norm`.

    Use it to see how many directions of output space training can change at once.

    Source: that of the method; see ``ntkbench list`` and the page of all methods.

    >>> import torch, ntkbench
    >>> print(ntkbench.effective_rank(torch.nn.Linear(3, 2), torch.eye(3)))
    4 (structured_derivatives, 2 passes)

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        keywords: see :func:`trace`.

    Returns:
        The effective rank, from 1 to n, without a unit; see :class:`ntkbench.Estimate`.

    Raises:
        BadInput, OverMemory, Unavailable: see :func:`trace`.
        Undefined: Theta is zero.
    """
    found: Estimate = _use(model, x, keywords, ("effective_rank",), lambda k, chosen: k.effective_rank(**chosen))
    return found


def alignment(model_0: Any, model_f: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """tr(Theta_0 Theta_f) / (||Theta_0||_F ||Theta_f||_F) of two networks, or of a network and a target kernel.

    The alignment with y y^T is y^T Theta y / ||Theta||_F for y of length 1. One pass computes the numerator exactly,
    and ``method`` computes the norm, which must be that of Theta itself: approximate methods are refused. The alignment
    is within ``rtol`` if the norm is, up to rounding. ``rounding`` includes that of the numerator, which is large if
    terms
    cancel, as for centred labels: choose ``dtype="float64"``. The alignment with a matrix is exact. It uses all of
    Theta, in blocks if it does not fit in ``memory``, and takes no ``method``, ``passes`` or ``rtol``.

    Cost: that of :func:`norm` at each of the two sets of weights; with ``wide_head`` three times that of :func:`norm`,
    or 2 (m + 2 d) / (m + d) times if the layer is also the embedding; with y y^T, that of :func:`norm` and one pass.

    Use it to tell lazy learning (an alignment near 1 with the kernel at initialisation) from rich learning, or how well
    a kernel fits labels.

    Source: that of the method; see ``ntkbench list`` and the page of all methods.

    >>> import torch, ntkbench
    >>> model, y = torch.nn.Linear(3, 2), torch.ones(3, 2)
    >>> round(float(ntkbench.alignment(model, y, torch.eye(3))), 4)
    0.6667

    Args:
        model_0: the network; see :class:`ntkbench.Kernel`. Precision and device default to its own.
        model_f: the same network with other weights, another network with as many outputs, values of the parameters by
            name (a pytree of them for a JAX function), or a target. Buffers, such as BatchNorm's running statistics,
            and frozen parameters may differ as well; each set of weights has its own. A target is a tensor y shaped
            like the outputs, ``[N, O]`` or ``[n]``, for the kernel y y^T, or a matrix ``[n, n]``, or ``[N, N]`` for A ⊗
            I_O. If N = O a target ``[N, N]`` is ambiguous, and refused.
        x: inputs of both networks.
        keywords: see :func:`trace`.

    Returns:
        The alignment, from 0 to 1, without a unit; see :class:`ntkbench.Estimate`.

    Raises:
        BadInput, OverMemory, Unavailable: see :func:`trace`.
        Undefined: one of the two kernels is zero.
    """
    if model_f is None:
        raise BadInput("model_f must be a network, its weights or a target kernel, got None")
    found: Estimate = _use(model_0, x, keywords, ("alignment",), lambda k, chosen: k.alignment(model_f, **chosen))
    return found


def metrics_of(model: Any, x: Any, model_f: Any = None, **keywords: Unpack[Keywords]) -> Estimates:
    """Trace, norm and effective rank, and with ``model_f`` the alignment, by name, from the same probes.

    Each has its own standard error. The errors are not independent, since the probes are shared. With ``rtol`` probes
    are added until all metrics are within it. ``passes`` is the budget of all metrics together: methods that cannot add
    probes split it, and ``notes`` say how. ``Estimate.passes`` is the total cost of all metrics, unless an exact
    method computed each separately.

    Cost: that of :func:`norm`, once for all metrics; with ``model_f``, that of :func:`alignment`.

    Use it if you need more than one metric.

    Source: that of the method; see ``ntkbench list`` and the page of all methods.

    >>> import torch, ntkbench
    >>> found = ntkbench.metrics_of(torch.nn.Linear(3, 2), torch.eye(3))
    >>> {name: round(float(value), 4) for name, value in found.items()}
    {'trace': 12.0, 'norm': 6.0, 'effective_rank': 4.0}

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        model_f: the other network or weights of the alignment; see :func:`alignment`.
        keywords: see :func:`trace`.

    Returns:
        A dict of :class:`ntkbench.Estimate` by name, in the units of each metric; it prints as a table.

    Raises:
        BadInput, OverMemory, Unavailable: see :func:`trace`.
        Undefined: a kernel is zero.
    """
    names = metrics.METRICS if model_f is not None else tuple(m for m in metrics.METRICS if m != "alignment")
    found: Estimates = _use(model, x, keywords, names, lambda k, chosen: k.metrics(model_f, **chosen))
    return found


def spectrum(
    model: Any,
    x: Any,
    top: int | None = None,
    *,
    rtol: float = 1e-3,
    passes: int = 4096,
    seed: int = 0,
    **setup: Unpack[Setup],
) -> Spectrum:
    """The spectrum of Theta = J J^T of a network at its current weights, with error bounds.

    It contains the largest eigenvalues and their eigenvectors, the condition number, the entropy effective rank
    exp(-sum_i p_i log p_i) with p_i = lambda_i / tr Theta, the spectral density with intervals
    (``density.shares(edges)``) and log det(Theta + ridge I) (``log_determinant(ridge)``). Use it to study trainability
    and feature learning (a few eigenvalues that grow out of the rest). For gradient descent on half the sum of squared
    errors, the largest stable learning rate is 2 / lambda_max, and the slowest mode decays with lambda_min. The
    effective rank of :func:`effective_rank` needs no eigenvalues.

    If five matrices of the size of Theta fit in ``memory`` (up to about 5000 outputs in 1 GiB), Theta is decomposed:
    everything is exact up to rounding, and ``errors`` bound the rounding. Otherwise products with J and J^T are used.
    Block Lanczos computes the top eigenvalues. Their errors exclude that larger ones are missing, except with a
    probability of 0.1 % each, or a note says that they may be. Stochastic Lanczos quadrature estimates the density, the
    entropy and the determinant. Ritz values bound the smallest eigenvalue only from above, so that ``condition_bounds``
    have only a lower end. With fewer parameters than outputs Theta is singular, and the condition number infinite.

    Cost: that of :func:`ntk`, O(n^3) operations on the host and 2 passes. If Theta does not fit, 2 (top + 4) passes for
    each step of block Lanczos, after at most 400 for the density.

    Source: block Lanczos: Golub, Underwood 1977; quadrature: Ubaru, Chen, Saad 2017 (doi 10.1137/16M1104974), algorithm
    1; entropy effective rank: Roy, Vetterli 2007, definition 1.

    >>> import torch, ntkbench
    >>> found = ntkbench.spectrum(torch.nn.Linear(3, 2), torch.eye(3), top=1)
    >>> round(found.largest, 4), round(found.condition_number, 4), round(float(found.entropy_effective_rank), 2)
    (4.0, 4.0, 4.76)

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        top: number of eigenvalues; by default 10, or fewer if there are fewer or memory holds fewer.
        rtol: error, relative to each of the largest eigenvalues, at which the iteration stops. Not used if Theta is
            decomposed.
        passes: maximum number of passes of products.
        seed: seed of the random vectors of products.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a spectrum for each group.

    Returns:
        Eigenvalues ``[top]`` in descending order, eigenvectors ``[top, n]``, and their errors, in float64 on the host,
        with the other quantities; see :class:`ntkbench.Spectrum`. Eigenvalues are in units of a squared output per
        squared parameter.

    Raises:
        BadInput: an argument cannot be used, or no method can compute the kernel; says why.
        OverMemory: ``memory`` does not hold so many eigenvectors.
        Unavailable: the device is not available.
    """
    found: Spectrum = _use(model, x, setup, (), lambda k, _: k.spectrum(top, rtol=rtol, passes=passes, seed=seed), ())
    return found


def solve(
    model: Any,
    x: Any,
    y: Any,
    *,
    ridge: float,
    rtol: float = 1e-5,
    passes: int = 4096,
    seed: int = 0,
    **setup: Unpack[Setup],
) -> Solution:
    """(Theta + ridge I)^-1 y.

    Use it for kernel regression, uncertainties and natural gradients.

    If three matrices of the size of Theta fit in ``memory`` (up to about 7000 outputs in 1 GiB), Theta is factored by
    Cholesky and the solution is refined with products, in float64 if the network runs in float64. Otherwise conjugate
    gradients, which use products with J J^T, solve the system, preconditioned by a Nystrom approximation. In both cases
    ``residual`` is computed from products with J and J^T, not by the recurrence of the iteration, and a solution whose
    residual stays above ``rtol`` is refused. With conjugate gradients the residual cannot be smaller than the rounding
    of products, about machine epsilon times (lambda_max + ridge) / (lambda_min + ridge); a Cholesky factor needs this
    number to be below 1. Use ``dtype="float64"`` for small ridges. A ridge of 0 is refused if Theta is known to be
    singular. :meth:`ntkbench.Kernel.regress` predicts at other inputs.

    Cost: that of :func:`ntk`, n^3 / 3 operations on the host and 2 to 20 passes. With conjugate gradients, up to 64
    passes for the preconditioner, and 2 for each iteration. Their number grows with the square root of the condition
    number.

    Source: Hestenes, Stiefel 1952 (doi 10.6028/jres.049.044); the preconditioner: Frangella, Tropp, Udell 2023
    (arXiv 2110.02820).

    >>> import torch, ntkbench
    >>> found = ntkbench.solve(torch.nn.Linear(3, 1), torch.eye(3), torch.tensor([3.0, 0.0, 0.0]), ridge=1.0)
    >>> found.values.round(4).tolist()
    [1.2, -0.3, -0.3]

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        y: the right-hand side, like the outputs ``[N, ...outputs]``, or ``[N, O]`` or ``[N O]`` with outputs
            sample-major.
        ridge: constant added to the eigenvalues of Theta, in their units; 0 or more.
        rtol: ||(Theta + ridge I) x - y|| / ||y|| at which the iteration stops.
        passes: maximum number of passes of products.
        seed: seed of the preconditioner.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a solution for each group.

    Returns:
        ``values``, in the shape of y and in float64 on the host, ``residual``, ``error``, ``iterations``, ``passes``
        and ``method``; see :class:`ntkbench.Solution`. Values are in units of y over those of ``ridge``.

    Raises:
        BadInput: an argument cannot be used, Theta + ridge I is singular up to rounding, or the residual stays above
            ``rtol``; says what is allowed, which ridge suffices or what helps.
        Unavailable: the device is not available.
    """
    found: Solution = _use(
        model, x, setup, (), lambda k, _: k.solve(y, ridge=ridge, rtol=rtol, passes=passes, seed=seed), ()
    )
    return found


def recommend(
    model: Any,
    inputs: Any,
    other: Any = None,
    *,
    metric: str = "trace",
    rtol: float = 0.01,
    confidence: float = 0.95,
    **setup: Unpack[Setup],
) -> Costs:
    """Predicted passes, operations, seconds, bytes and error of each method for a metric of a network.

    Use it before a long computation, or to see the alternatives to the choice of ``method="auto"``. The result prints
    as a table: methods that reach ``rtol`` come first, the fastest on top, and a method that does not apply has the
    reason.

    Seconds are those of an estimate after the network has been checked, traced and certified. They are the sum of the
    products with the Jacobian of this network, timed in a few sizes on this machine, and the method's other work, timed
    on a random Jacobian of the same sizes, or of smaller ones and extrapolated. Methods that trace or compile the
    network are timed on up to 128 samples, which may be all of them. Bytes are those of the largest block of products,
    or those that the method declares.

    Errors of estimators are those on that random Jacobian. Its effective rank, that of a sample's own block, and the
    alignment are estimated by a pilot of 8 probes; its spectrum is a power law. Errors, and the passes for a tolerance,
    are therefore rough. If a spectrum has a cliff, methods that deflate it need fewer passes than predicted. Errors of
    approximate methods are their biases on up to 128 samples.

    Cost: a few seconds for small networks; the time of some dozens of passes and of tracing for large ones.

    Source: this package; ``config/cost_model.yaml`` measures its errors.

    >>> import torch, ntkbench
    >>> costs = ntkbench.recommend(torch.nn.Linear(3, 2), torch.ones(4, 3))
    >>> costs.best.error <= 0.01
    True

    Args:
        model, inputs: see :class:`ntkbench.Kernel`.
        other: the other network or weights of an alignment; see :meth:`ntkbench.Kernel.alignment`.
        metric: trace, norm, effective_rank or alignment.
        rtol: how far the ends of the interval may be from the value, relative to it. Approximate methods never count as
            within it, as their bias is known on a few samples only.
        confidence: of the interval.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a table for each group.

    Returns:
        A list of :class:`ntkbench.cost.Cost`, one for each method, with passes, operations, seconds, bytes and relative
        errors. It has ``best`` and, as a line of Python, ``code()``.

    Raises:
        BadInput: an argument cannot be used, or products with the Jacobian are wrong; says why.
        Unavailable: the device is not available.
    """
    found: Costs = _use(
        model,
        inputs,
        setup,
        (),
        lambda k, _: k.recommend(other, metric=metric, rtol=rtol, confidence=confidence),
        (),
    )
    return found


def compare(
    model: Any,
    inputs: Any,
    other: Any = None,
    *,
    metric: str = "trace",
    methods: Sequence[str] | None = None,
    passes: int | None = None,
    rtol: float | None = None,
    calls: int = 5,
    **setup: Unpack[Setup],
) -> Trials:
    """Measured results and costs of methods for a metric of a network, side by side.

    Use it to choose a method for many similar networks. The result prints as a table, the fastest method first. A
    method that fails or refuses the network has a line with the reason. Stochastic methods have the same budget or
    tolerance; compare their errors before their seconds.

    Cost: for each method a first call, which prepares it and is not timed, and ``calls`` timed ones, which are
    interleaved with those of the other methods. Stochastic methods and ``auto`` make ``calls`` further untimed calls,
    since each seed may need another number of probes, for which programs are traced or compiled. Seconds are unreliable
    if the machine does other work at the same time.

    >>> import torch, ntkbench
    >>> methods = ["structured_derivatives", "hutchinson"]
    >>> found = ntkbench.compare(torch.nn.Linear(3, 2), torch.ones(4, 3), methods=methods)
    >>> sorted(one.method for one in found)
    ['hutchinson', 'structured_derivatives']

    Args:
        model, inputs: network and inputs; see :class:`ntkbench.Kernel`.
        other: the other network or weights of an alignment; see :meth:`ntkbench.Kernel.alignment`.
        metric: trace, norm, effective_rank or alignment.
        methods: names; by default ``auto``, the methods that it tries, ``hutchinson``, ``hutchpp`` and
            ``sum_of_logits``.
        passes, rtol: of stochastic methods, see :func:`ntkbench.trace`; 64 passes if neither is given. Those that take
            no tolerance refuse it.
        calls: number of timed calls of each method, each with its own seed.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a table for each group.

    Returns:
        A list of :class:`ntkbench.trials.Trial`, one for each method, with values, passes and seconds; ``csv()`` has
        all numbers.

    Raises:
        BadInput: an argument cannot be used; says what is allowed.
        Unavailable: the device is not available.
    """
    asked: dict[str, Any] = {"metric": metric, "methods": methods, "passes": passes, "rtol": rtol, "calls": calls}
    found: Trials = _use(model, inputs, setup, (), lambda k, _: k.compare(other, **asked), ())
    return found


SETUP = tuple(Setup.__annotations__)
OPTIONS = tuple(field.name for field in dataclasses.fields(Options))


def _use(
    model: Any,
    inputs: Any,
    keywords: Mapping[str, Any],
    names: tuple[str, ...],
    use: Callable[[Kernel, OptionKeywords], Any],
    own: tuple[str, ...] = ("kernel", "seed", "file"),
    *,
    streamed: bool = False,
) -> Any:
    """Apply ``use`` to a kernel; with groups of parameters, return a dict with a result for each.

    Args:
        names: requested metrics, none for a kernel; options that do not apply are refused before work starts.
        own: keywords of the function itself if no metrics are requested.
        streamed: whether to take the batches of a loader one at a time, if samples do not interact.
    """
    allowed = (*SETUP, *(OPTIONS if names else own))
    for key in keywords:
        if key not in allowed:
            raise unknown("keyword", key, allowed)
    chosen: Any = {key: value for key, value in keywords.items() if key in OPTIONS}
    setup: Any = {key: value for key, value in keywords.items() if key in SETUP}
    asked = Options(**chosen)
    if names:
        ladder.check(names, asked)
    parameters = setup.get("parameters")
    if streamed and stream.applies(model, inputs):
        groups = parameters if isinstance(parameters, Mapping) else None
        kept: Any = {key: value for key, value in setup.items() if groups is None or key != "parameters"}
        return stream.trace(model, inputs, kept, groups, asked)
    setup.pop("parameters", None)
    if isinstance(parameters, Mapping):
        groups = Kernel(model, inputs, parameters="*", **setup).groups(parameters)
        return errors.by_name("group", groups, lambda kernel: use(kernel, chosen))
    return use(Kernel(model, inputs, parameters=parameters, **setup), chosen)
