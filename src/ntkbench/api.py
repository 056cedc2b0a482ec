"""What a researcher types: the NTK of a network, or a metric of it with its error and its cost.

Each function makes a :class:`ntkbench.Kernel` and uses it once; make one yourself to use it many times.

>>> ntkbench.ntk(model, x)                                      # doctest: +SKIP
>>> ntkbench.trace(model, x)                                    # doctest: +SKIP
>>> ntkbench.alignment(model_0, model_f, x, passes=1024)        # doctest: +SKIP
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, Unpack, overload

from ntkbench import ladder, metrics, stream
from ntkbench.errors import BadInput, unknown
from ntkbench.estimate import Estimate, Estimates
from ntkbench.kernel import Kernel, Setup
from ntkbench.options import Options, Wishes

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


class Keywords(Setup, Wishes, total=False):
    """What the functions of this module take as keywords: how a kernel is set up, and what is asked of an estimate."""


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
    """The NTK between two sets of inputs, exact and without a Jacobian, or a kernel between samples that stands for it.

    ``kernel="full"`` is Theta itself, ``[N1 * O, N2 * O]`` with rows sample-major. The others are ``[N1, N2]`` matrices
    A, standing for Theta as A (x) I_O: ``sum_of_logits`` (the pNTK of Mohamadi et al. 2023), ``single_logit`` (the
    first output), ``random_vector`` (one random combination of outputs, drawn from ``seed``), ``trace``
    ((1/O) tr_O Theta, the best of them in the Frobenius norm) and ``last_layer`` (the trace kernel of the last layer's
    parameters).

    Cost: O backward passes over the inputs for ``full``, ``trace`` and ``last_layer``, one for the others, and for each
    layer a contraction; without ``x2`` half of that (see :mod:`ntkbench.layerwise`). The network is traced first, which
    takes from a tenth of a second to some seconds; a trace is kept for networks of the same structure. Where J has few
    entries it is written out instead. Parameters without a fast rule are named on the ``ntkbench`` logger.

    Where the network cannot be traced, or plain autograd contradicts its trace, rows of its Jacobian are written out in
    blocks: sample by sample, or else by products over the whole batch. Networks whose samples interact take the last
    way, and then there is no ``x2``. A JAX function's kernel is by neural-tangents, or else by rows of its Jacobian.

    With ``file`` a kernel may be larger than memory: it is written to the disk in rectangles, which take ``memory`` at
    most together with what they are computed from. The file has its full size from the start, so that the disk cannot
    become full on the way. An interrupted computation, in whatever way, goes on where it was when it is called again;
    what it is of and how far it is stands in ``<file>.progress``, which stays there. A file that is complete is opened
    at once, and one of another kernel is refused. All rows are certified in each run before the first of its
    rectangles, which takes O + 1 passes; every rectangle takes a run of its columns, and every row of rectangles one of
    its rows. To compute less often, give more ``memory``.

    >>> import torch, ntkbench
    >>> model, x = torch.nn.Linear(3, 2), torch.ones(4, 3)
    >>> ntkbench.ntk(model, x).shape
    torch.Size([8, 8])

    Args:
        model, x1: network and inputs of the rows; see :class:`ntkbench.Kernel`.
        x2: inputs of the columns, of the same structure; those of the rows if not given.
        kernel: one of the names above.
        seed: of ``random_vector``.
        file: a path, for a kernel in NumPy's npy format instead of memory.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a
            dict with a kernel for each group.

    Returns:
        The kernel, on the device and in the precision that were asked for; an array of JAX for a JAX function. With
        ``file`` it is a read-only ``numpy.memmap`` of the file.

    Raises:
        BadInput: an argument cannot be used, says what is allowed; or no way of computing the kernel works, says why;
            or the file holds something else, is damaged, cannot be written, or does not fit on the disk.
        NtkbenchError: writing the file failed on the way.
        OverMemory: the result itself would not fit in memory.
        Unavailable: the device is not there.
    """
    if file is not None and isinstance(setup.get("parameters"), Mapping):
        raise BadInput(
            "a file holds one kernel: with groups of parameters take ntkbench.Kernel(...).groups(...), and of each of "
            "these ntk(file=...) with a file of its own"
        )
    keywords = {"seed": seed, **setup}
    found: torch.Tensor = _use(model, x1, keywords, (), lambda k, _: k.ntk(x2, kernel=kernel, seed=seed, file=file))
    return found


def trace(model: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """tr Theta of a network at its present weights, Theta = J J^T with J the Jacobian of all outputs.

    ``method="auto"`` takes an exact method if that takes no more passes than the estimate would, in ``memory``, and
    otherwise the estimate. The exact methods are ``recurrent_exact_trace`` where the network declares its
    recurrence, ``wide_head`` for independent samples and a last linear layer of at least twice as many outputs as
    inputs (and different tokens, where it is the embedding as well), ``structured_derivatives`` and
    ``jacobian_contraction`` for independent samples, which take O passes, ``parameter_gram``, which comes first
    where there are fewer parameters than outputs, and ``batched_jacobian`` and ``naive_jacobian`` for interacting
    samples, which take the smaller of n and P, or n. The estimators are, where samples are independent,
    ``wide_head_u_statistics`` for such a last layer, ``structured_block_u_statistics`` (``per_sample_trace`` where
    the network cannot be traced) or, for the other metrics, block U-statistics (``group_u_statistics`` where the
    network declares its recurrence, else ``structured_block_u_statistics`` where it can be traced and
    ``block_u_statistics`` where not, if what they hold fits in ``memory``); otherwise ``hutchpp_adaptive`` or, for
    the other metrics, ``nystrom_loo`` (``hutchinson`` with ``rtol``, and where it does not fit), and
    ``gram_reverse``. Traces are estimated from the side of fewer dimensions, outputs or parameters. With ``rtol``
    an exact value is taken as soon as the probes that are still needed would bring the total above its passes.
    Methods are tried in turn: one that fails on the network for whatever reason is passed over. ``Estimate.method``
    says which it was, ``Estimate.notes`` why not by another.

    Every method is certified by plain ``backward`` of the network as it is, over the whole batch: a method whose
    gradients differ by more than the root of the machine epsilon is passed over. ``Estimate.certificate`` is the
    relative difference.

    The batches of a ``DataLoader`` are read one after another where samples do not interact, joined to 64 samples at
    least, and dropped. Each such part is estimated with probes of its own, and with ``rtol`` to that tolerance. Other
    metrics join all batches on the host.

    Cost: that of the method, after a few forward passes of checks, and one backward pass for the certificate of each
    parameter set.

    >>> import torch, ntkbench
    >>> ntkbench.trace(torch.nn.Linear(3, 2), torch.ones(4, 3)).value
    32.0

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        keywords: ``call``, ``output``, ``parameters``, ``params``, ``dtype``, ``device`` and ``memory``: see
            :class:`ntkbench.Kernel`; ``method``, ``passes``, ``rtol``, ``confidence`` and ``seed``: see
            :class:`ntkbench.options.Options`. Without ``passes`` the most is 256, or 4096 with ``rtol``. Block
            U-statistics do not spend more than max(16, 1024 / N) at each set of weights, those of groups not more than
            1024 / min(N, 24), unless asked for by name with ``passes``, or with ``rtol``. Exact and approximate methods
            asked for by name take none. With a
            mapping of names to patterns as ``parameters`` the result is a dict with an estimate for each group.

    Raises:
        BadInput: something about the arguments, says what is allowed; or no method serves this network, or not the one
            that was asked for, says why.
        OverMemory: the method would need more than ``memory`` at once.
        Unavailable: the device is not there.
    """
    found: Estimate = _use(model, x, keywords, ("trace",), lambda k, wishes: k.trace(**wishes), streamed=True)
    return found


def norm(model: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """||Theta||_F (not its square) of a network at its present weights. Arguments and errors as for :func:`trace`."""
    found: Estimate = _use(model, x, keywords, ("norm",), lambda k, wishes: k.norm(**wishes))
    return found


def effective_rank(model: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """(tr Theta)^2 / ||Theta||_F^2 of a network at its present weights. Arguments and errors as for :func:`trace`."""
    found: Estimate = _use(model, x, keywords, ("effective_rank",), lambda k, wishes: k.effective_rank(**wishes))
    return found


def alignment(model_0: Any, model_f: Any, x: Any, **keywords: Unpack[Keywords]) -> Estimate:
    """tr(Theta_0 Theta_f) / (||Theta_0||_F ||Theta_f||_F) of two networks, or of a network and a target kernel.

    ``model_f`` may be the same network with other weights (buffers, such as BatchNorm's running statistics, and frozen
    parameters may differ as well; each set of weights goes with its own), another network with as many outputs, values
    of the parameters by name, or a target: a tensor y like the outputs, which stands for the kernel y y^T, or a matrix
    ``[n, n]`` or ``[N, N]``. For a JAX function it is a pytree of parameters. Precision and device default to those of
    ``model_0``. Other arguments and errors as for :func:`trace`.
    """
    if model_f is None:
        raise BadInput("model_f must be a network, its weights or a target kernel, got None")
    found: Estimate = _use(model_0, x, keywords, ("alignment",), lambda k, wishes: k.alignment(model_f, **wishes))
    return found


def metrics_of(model: Any, x: Any, model_f: Any = None, **keywords: Unpack[Keywords]) -> Estimates:
    """Trace, norm and effective rank, and with ``model_f`` the alignment, by name, from one block of probes.

    Each has a standard error of its own; they are of the same probes and so not independent. With ``rtol`` probes are
    added until all of them are within it. ``Estimate.passes`` is what all together cost, except where an exact method
    gave each by itself. Arguments and errors as for :func:`trace` and :func:`alignment`.
    """
    names = metrics.METRICS if model_f is not None else tuple(m for m in metrics.METRICS if m != "alignment")
    found: Estimates = _use(model, x, keywords, names, lambda k, wishes: k.metrics(model_f, **wishes))
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
    """The spectrum of Theta = J J^T of a network at its present weights, with bounds on what it says.

    It has the largest eigenvalues and their eigenvectors, the condition number, the entropy effective rank
    exp(-sum_i p_i log p_i) with p_i = lambda_i / tr Theta, the spectral density with error bars
    (``density.shares(edges)``) and log det(Theta + ridge I) (``log_determinant(ridge)``). Take it for trainability (the
    largest learning rate is 2 / lambda_max, the slowest mode decays with lambda_min) and for feature learning (a few
    eigenvalues that grow out of the rest). The effective rank of :func:`effective_rank` needs no eigenvalues.

    Where Theta fits in ``memory`` as five matrices, up to 5000 outputs or so in 1 GiB, it is decomposed: all is exact
    up to rounding, and ``errors`` bound that. Where it does not, products do. Block Lanczos has the top eigenvalues,
    each within its residual of an eigenvalue. Stochastic Lanczos quadrature has the density, the entropy and the
    determinant. Ritz values bound the smallest eigenvalue from above, so that ``condition_bounds`` have a lower end
    alone. With fewer parameters than outputs Theta is singular, and the condition number infinite.

    Cost: that of :func:`ntk`, O(n^3) operations on the host and 2 passes; by products 2 (top + 4) passes for each step
    of block Lanczos, after at most 400 for the density.

    Source: block Lanczos: Golub, Underwood 1977; quadrature: Ubaru, Chen, Saad 2017, algorithm 1; entropy effective
    rank: Roy, Vetterli 2007, definition 1.

    >>> import torch, ntkbench
    >>> found = ntkbench.spectrum(torch.nn.Linear(3, 2), torch.eye(3), top=1)
    >>> round(found.largest, 4), round(found.condition_number, 4), round(float(found.entropy_effective_rank), 2)
    (4.0, 4.0, 4.76)

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        top: how many eigenvalues; 10, or all that there are, if not given.
        rtol: residual, relative to each of the largest eigenvalues, at which the iteration stops. What is decomposed
            does not need it.
        passes: the most that products may spend.
        seed: of the random vectors of products.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a spectrum for each group.

    Raises:
        BadInput: an argument cannot be used, says what is allowed; or no way of computing the kernel works.
        Unavailable: the device is not there.
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
    """(Theta + ridge I)^-1 y, as in kernel regression, uncertainties and natural gradients.

    Where Theta fits in ``memory`` as three matrices, up to 7000 outputs or so in 1 GiB, it is factored by Cholesky, and
    the solution refined by products, in float64 where the network runs in it. Where it does not fit, conjugate
    gradients on products with J J^T solve for y, preconditioned by a Nystrom approximation. Either way ``residual`` is
    that of products with J and J^T, not one that an iteration believes in, and a solution whose residual stays above
    ``rtol`` is refused. By conjugate gradients a residual cannot be smaller than the rounding of products, about
    machine epsilon times (lambda_max + ridge) / (lambda_min + ridge); for a factor that product must be below 1. Take
    ``dtype="float64"`` for small ridges. A ridge of 0 is refused where Theta is known to be singular. Predictions of
    other inputs are by :meth:`ntkbench.Kernel.regress`.

    Cost: that of :func:`ntk`, n^3 / 3 operations on the host and 2 to 20 passes; by products up to 64 passes for the
    preconditioner, and 2 for each iteration. Their number grows with the root of the condition number.

    Source: Hestenes, Stiefel 1952; the preconditioner: Frangella, Tropp, Udell 2023.

    >>> import torch, ntkbench
    >>> found = ntkbench.solve(torch.nn.Linear(3, 1), torch.eye(3), torch.tensor([3.0, 0.0, 0.0]), ridge=1.0)
    >>> found.values.round(4).tolist()
    [1.2, -0.3, -0.3]

    Args:
        model, x: network and inputs; see :class:`ntkbench.Kernel`.
        y: the right-hand side, like the outputs ``[N, ...outputs]``, or ``[N O]`` with outputs sample-major.
        ridge: what is added to the eigenvalues of Theta, in their units; 0 or more.
        rtol: ||(Theta + ridge I) x - y|| / ||y|| at which the iteration stops.
        passes: the most that products may spend.
        seed: of the preconditioner.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a solution for each group.

    Returns:
        ``values``, in the shape of y and in float64 on the host, ``residual``, ``error``, ``iterations``, ``passes``,
        ``method``.

    Raises:
        BadInput: an argument cannot be used, says what is allowed; or Theta + ridge I is singular up to rounding, says
            which ridge would do; or the residual stays above ``rtol``, says what helps.
        Unavailable: the device is not there.
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
    """What each method is predicted to take for a metric of a network: passes, seconds, bytes and error.

    Take it before a long computation, or to see what the choice of ``method="auto"`` leaves out. Prints as a table,
    with those methods first that reach ``rtol``, the fastest of them on top, and with the reason where a method does
    not serve.

    Seconds are those of an estimate once the network is checked, traced and certified. They add up the products with
    the Jacobian of this network, timed in a few sizes on this machine, and the method's other work, timed on a random
    Jacobian of the same sizes, or of smaller ones and extrapolated. Methods that trace or compile the network are timed
    on some of the samples. Bytes are those of the largest block of products, or what the method says that it holds.

    Errors of estimators are those on that random Jacobian. Its effective rank, that of a sample's own block, and the
    alignment are estimated by a pilot of 8 probes; its spectrum is a power law. So errors, and the passes that a
    tolerance takes, are rough. Where a spectrum has a cliff, methods that deflate it need fewer passes than predicted.
    Errors of approximate methods are their biases on some of the samples.

    Cost: a few seconds for small networks; the time of some dozens of passes and of a trace for large ones.

    >>> import torch, ntkbench
    >>> costs = ntkbench.recommend(torch.nn.Linear(3, 2), torch.ones(4, 3))
    >>> costs.best.kind, costs.best.error
    ('exact', 0.0)

    Args:
        model, inputs: see :class:`ntkbench.Kernel`.
        other: the other network or weights of an alignment; see :meth:`ntkbench.Kernel.alignment`.
        metric: trace, norm, effective_rank or alignment.
        rtol: how far the ends of the interval may be from the value, relative to it; for approximate methods the bias.
        confidence: of the interval.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a table for each group.

    Returns:
        A list of :class:`ntkbench.cost.Cost`, with ``best`` and, as a line of Python, ``code()``.

    Raises:
        BadInput: an argument cannot be used, says what is allowed; or products with the Jacobian are not right.
        Unavailable: the device is not there.
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
    """What methods give for a metric of a network and what they take, measured side by side.

    Take it to choose a method for many similar networks. Prints as a table, the fastest method first. A method that
    refuses the network, or fails, has a line that says why. Stochastic methods have the same budget or tolerance;
    look at their errors before their seconds.

    Cost: for each method a first call, which prepares it and is not timed, and ``calls`` timed ones, in turn. Seconds
    from a machine that does something else meanwhile are worth little.

    >>> import torch, ntkbench
    >>> methods = ["structured_derivatives", "hutchinson"]
    >>> found = ntkbench.compare(torch.nn.Linear(3, 2), torch.ones(4, 3), methods=methods)
    >>> sorted(one.method for one in found)
    ['hutchinson', 'structured_derivatives']

    Args:
        model, inputs: see :class:`ntkbench.Kernel`.
        other: the other network or weights of an alignment; see :meth:`ntkbench.Kernel.alignment`.
        metric: trace, norm, effective_rank or alignment.
        methods: names; by default ``auto``, the methods that it stands for, and those of the papers.
        passes, rtol: of stochastic methods, see :func:`ntkbench.trace`; 64 passes if neither is given. Those that take
            no tolerance refuse it.
        calls: timed ones of each method, each with a seed of its own.
        setup: see :class:`ntkbench.Kernel`. With a mapping of names to patterns as ``parameters`` the result is a dict
            with a table for each group.

    Returns:
        A list of :class:`ntkbench.trials.Trial`; ``csv()`` has all numbers.

    Raises:
        BadInput: an argument cannot be used, says what is allowed.
        Unavailable: the device is not there.
    """
    asked: dict[str, Any] = {"metric": metric, "methods": methods, "passes": passes, "rtol": rtol, "calls": calls}
    found: Trials = _use(model, inputs, setup, (), lambda k, _: k.compare(other, **asked), ())
    return found


SETUP = tuple(Setup.__annotations__)
WISHES = tuple(field.name for field in dataclasses.fields(Options))


def _use(
    model: Any,
    inputs: Any,
    keywords: Mapping[str, Any],
    names: tuple[str, ...],
    use: Callable[[Kernel, Wishes], Any],
    own: tuple[str, ...] = ("kernel", "seed", "file"),
    *,
    streamed: bool = False,
) -> Any:
    """What a use of a kernel gives; with groups of parameters, what it gives for each.

    Args:
        names: metrics that are wanted, none for a kernel; options that do not serve are refused before work starts.
        own: keywords of the function itself where no metrics are wanted.
        streamed: whether to take the batches of a loader one at a time, where samples do not interact.
    """
    allowed = (*SETUP, *(WISHES if names else own))
    for key in keywords:
        if key not in allowed:
            raise unknown("keyword", key, allowed)
    wishes: Any = {key: value for key, value in keywords.items() if key in WISHES}
    setup: Any = {key: value for key, value in keywords.items() if key in SETUP}
    asked = Options(**wishes)
    if names:
        ladder.check(names, asked)
    parameters = setup.get("parameters")
    if streamed and stream.applies(model, inputs):
        groups = parameters if isinstance(parameters, Mapping) else None
        kept: Any = {key: value for key, value in setup.items() if groups is None or key != "parameters"}
        return stream.trace(model, inputs, kept, groups, asked)
    setup.pop("parameters", None)
    if isinstance(parameters, Mapping):
        groups = Kernel(model, inputs, **setup).groups(parameters)
        return {name: use(kernel, wishes) for name, kernel in groups.items()}
    return use(Kernel(model, inputs, parameters=parameters, **setup), wishes)
