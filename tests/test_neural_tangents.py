"""neural-tangents on a newer jax: its kernels are right, jax is not changed, and limits are kept."""

from __future__ import annotations

import dataclasses
import functools
import subprocess
import sys
import types

import numpy as np
import pytest
from conftest import loaded, mostly_slow

from ntkbench import methods, problems
from ntkbench.errors import BadInput, OverMemory, Unavailable
from ntkbench.methods import base
from ntkbench.metrics import METRICS
from ntkbench.operators import programs
from ntkbench.operators.certificate import Uncertified
from ntkbench.operators.jax import network
from ntkbench.options import Target
from ntkbench.problem import Problem
from ntkbench.problems.base import reference

METHODS = ("nt_jacobian_contraction", "nt_ntk_vector_products", "nt_structured_derivatives")
LABELS = ("mlp_hazelden[N=2]", "digits_mlp[N=3]", "digits_conv[N=3]", "gru_hazelden[N=2,T=2]")

# An archived package uses deprecated functions; the methods silence the warnings while they compile.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def target(dtype: str = "float64") -> Target:
    return Target("jax", dtype, "cpu")


def jitted(function):
    """Compiled without optimisation, since it runs only once."""
    import jax

    return jax.jit(function, compiler_options={"xla_backend_optimization_level": 0})


def theta_of(forward, weights, x, implementation: str) -> np.ndarray:
    kernel = np.asarray(jitted(programs.kernel_function(forward, implementation))(weights, x))
    n = kernel.shape[0] * kernel.shape[2]
    return kernel.transpose(0, 2, 1, 3).reshape(n, n)


def theta_by_jacrev(forward, weights, x) -> np.ndarray:
    import jax

    blocks = jitted(jax.jacrev(lambda weights: forward(weights, x).reshape(-1)))(weights)
    J = np.concatenate([np.asarray(block).reshape(block.shape[0], -1) for block in blocks.values()], axis=1)
    return J @ J.T


@functools.cache
def jacrev_of(label: str) -> np.ndarray:
    return theta_by_jacrev(*network(loaded(label), "theta_0", target()))


@pytest.mark.parametrize("label", LABELS)
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_theta_matches_the_jacobian(label, name):
    forward, weights, x = network(loaded(label), "theta_0", target())
    theta = theta_of(forward, weights, x, methods.get(name).implementation)
    exact = jacrev_of(label)
    assert theta.dtype == exact.dtype == np.float64
    np.testing.assert_allclose(theta, exact, rtol=0, atol=1e-10 * abs(exact).max())


@pytest.mark.slow
def test_auto_chooses_an_implementation_by_its_operations(tiny, capsys):
    forward, weights, x = network(tiny, "theta_0", target())
    kernel = np.asarray(programs.kernel_function(forward, "AUTO")(weights, x))
    n = kernel.shape[0] * kernel.shape[2]
    exact = theta_by_jacrev(forward, weights, x)
    np.testing.assert_allclose(kernel.transpose(0, 2, 1, 3).reshape(n, n), exact, rtol=0, atol=1e-10 * exact.max())
    said = [line for line in capsys.readouterr().out.splitlines() if line.startswith("impl=")]
    assert len(said) == 3 and all(float(line.rpartition("=")[2]) > 0 for line in said)


@pytest.mark.parametrize("label", [*LABELS, "conv_relu[N=2,O=3,width=4]", "resnet18[N=2,O=2,width=2]"])
@pytest.mark.slow
def test_theta_by_layers_in_torch_matches_jax(label):
    prepared = methods.get("structured_derivatives").prepare(problems.load(label), Target("torch", "float64", "cpu"))
    (end,) = prepared.ends("norm")
    theta = end.engine.kernel(end.parameters, end.x).numpy()
    if label in LABELS:
        exact = jacrev_of(label)
    else:
        forward, weights, x = network(problems.load(label), "theta_0", target())
        exact = theta_of(forward, weights, x, "STRUCTURED_DERIVATIVES")
    np.testing.assert_allclose(theta, exact, rtol=0, atol=1e-10 * abs(exact).max())


@pytest.mark.parametrize(("label", "dtype"), [(LABELS[2], "float64"), (LABELS[3], "float64"), (LABELS[2], "float32")])
@pytest.mark.parametrize("name", METHODS)
@pytest.mark.slow
def test_moments_match_the_reference(label, dtype, name):
    """The program for alignment gives all moments at once, from which all metrics follow."""
    moments = methods.get(name).prepare(loaded(label), target(dtype)).moments("alignment")
    exact = reference.exact(loaded(label))
    assert {metric: moments.metric(metric) for metric in METRICS} == pytest.approx(
        exact, rel=1e-9 if dtype == "float64" else 1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dtype"), [*((name, "float64") for name in METHODS), (METHODS[0], "float32")])
def test_trace_has_a_program_of_its_own(name, dtype):
    method, problem = methods.get(name), loaded(LABELS[2])
    estimate = method.estimate(method.prepare(problem, target(dtype)), "trace")
    assert estimate.value == pytest.approx(reference.exact(problem)["trace"], rel=1e-9 if dtype == "float64" else 1e-4)
    assert (type(estimate.value), estimate.standard_error, estimate.passes) == (float, None, None)


@pytest.mark.parametrize(
    ("outputs", "name"), mostly_slow([(n, name) for n in (3, 64, 70) for name in METHODS], {(3, METHODS[2])})
)
def test_traces_are_certified_however_many_outputs_there_are(outputs, name, monkeypatch):
    problem = problems.load(f"fc_relu[N=3,O={outputs},width=8,depth=1]")
    prepared = methods.get(name).prepare(problem, target())
    assert methods.get(name).estimate(prepared, "trace").certificate < 1e-12
    made = programs.kernel_function

    def wrong(forward, implementation, trace_axes=(), diagonal_axes=()):
        kernel = made(forward, implementation, trace_axes, diagonal_axes)
        return (lambda *a: 1.001 * kernel(*a)) if trace_axes else kernel

    monkeypatch.setattr(programs, "kernel_function", wrong)
    base.neural_tangents._compiled.cache_clear()  # programs compiled before, and below those compiled here
    with pytest.raises(Uncertified):
        methods.get(name).estimate(methods.get(name).prepare(problem, target()), "trace")
    base.neural_tangents._compiled.cache_clear()


@pytest.mark.parametrize("outputs", mostly_slow([70, 1], 1))
def test_the_certificate_of_a_trace_covers_all_samples(outputs):
    """The programs take each sample alone, and the first ones do not show that another changes them."""
    import jax

    def forward(weights, x):
        return (x @ weights["p"]) * (1 + jax.nn.relu(-x).sum())

    x = np.ones((100, 1))
    weights, method = {"p": np.ones((1, outputs))}, methods.get(METHODS[0])
    problem = Problem("one sample changes the others", None, x, weights, jax_forward=forward)
    alone = method.estimate(method.prepare(problem, target()), "trace")
    assert alone.value == pytest.approx(100 * outputs) and alone.certificate < 1e-12
    x = x.copy()
    x[13] = -1
    prepared = method.prepare(dataclasses.replace(problem, x=x), target())
    for _ in range(2):
        with pytest.raises(Uncertified):
            method.estimate(prepared, "trace")


def test_float32_sums_are_precise():
    """The precision of a long float32 sum depends on its order."""
    import jax

    from ntkbench.methods.base.neural_tangents import moments

    entries = np.random.default_rng(0).standard_normal((2, 50, 50, 40, 40)).astype("float32") + 1
    sums = jax.jit(moments)(list(entries))
    theta, theta_f = entries.astype("float64")
    exact = {
        "trace": np.einsum("nnoo->", theta),
        "square": (theta**2).sum(),
        "square_f": (theta_f**2).sum(),
        "cross": (theta * theta_f).sum(),
    }
    assert {key: float(value) for key, value in sums.items()} == pytest.approx(exact, rel=1e-6)
    assert {value.dtype.name for value in sums.values()} == {"float32"}


def _attention(w, x):
    import jax
    import jax.numpy as jnp

    tokens = x.reshape(len(x), 2, 3) @ w["a"]
    query, key, value = jnp.split(tokens @ w["b"], 3, axis=-1)
    return (jax.nn.softmax(query @ jnp.swapaxes(key, 1, 2)) @ value).mean(1)


def _part_of_a_split(w, x):
    import jax.numpy as jnp

    return jnp.tanh(x @ jnp.split(w["a"], 3, axis=1)[1]) @ w["b"]


def _checkpointed(w, x):
    import jax
    import jax.numpy as jnp

    return jax.checkpoint(lambda x: jnp.tanh(x @ w["a"]))(x) @ w["b"]


def _constant_and_unused(w, x):
    import jax.numpy as jnp

    return jnp.concatenate([x @ w["a"], x[:, :2]], axis=1)


def _weights_as_outputs(w, x):
    import jax.numpy as jnp

    return jnp.broadcast_to(w["a"][0], (len(x), 4)) + x @ w["b"]


def _shared(w, x):
    import jax.numpy as jnp

    return jnp.tanh(jnp.tanh(x @ w["a"]) @ w["a"])


def _scan(w, x):
    import jax
    import jax.numpy as jnp

    def step(h, u):
        h = jnp.tanh(h @ w["a"] + u[:, None] * w["b"])
        return h, h

    return jax.lax.scan(step, jnp.zeros((len(x), 4), x.dtype), x.T)[0]


NETWORKS = {
    _attention: ((3, 4), (4, 12)),
    _part_of_a_split: ((6, 15), (5, 4)),
    _checkpointed: ((6, 5), (5, 4)),
    _constant_and_unused: ((6, 5), (5, 4)),
    _weights_as_outputs: ((2, 4), (6, 4)),
    _shared: ((6, 6), (1,)),
    _scan: ((4, 4), (4,)),
}
"""Networks, with the shapes of their weights, that use what is patched for structured derivatives."""


@pytest.mark.parametrize("forward", NETWORKS, ids=lambda f: f.__name__.strip("_"))
@pytest.mark.filterwarnings("ignore:No Jacobian rule found")
def test_patched_structured_derivatives_match_the_jacobian(forward):
    import jax

    jax.config.update("jax_enable_x64", True)
    rng = np.random.default_rng(0)
    weights = dict(zip("ab", map(jax.numpy.asarray, map(rng.standard_normal, NETWORKS[forward])), strict=True))
    x = jax.numpy.asarray(rng.standard_normal((3, 6)))
    exact = theta_by_jacrev(forward, weights, x)
    theta = theta_of(forward, weights, x, "STRUCTURED_DERIVATIVES")
    np.testing.assert_allclose(theta, exact, rtol=0, atol=1e-10 * abs(exact).max())


def test_long_scans_are_refused_with_the_reason():
    structured, *others = (methods.get(name) for name in reversed(METHODS))
    problem = loaded("gru_hazelden")
    reason = structured.unsupported_reason(problem, "norm", target())
    assert "lax.scan" in reason
    assert "T = 50" in reason
    assert [method.unsupported_reason(problem, "norm", target()) for method in others] == [None, None]
    assert structured.unsupported_reason(loaded("gru_hazelden[N=2,T=8]"), "norm", target()) is None
    assert structured.unsupported_reason(loaded("gru_hazelden[N=2,T=9]"), "norm", target()) is not None
    assert structured.unsupported_reason(problem, "norm", Target("torch")) == "runs on jax only"


def test_scans_are_found_wherever_they_are(tiny):
    import jax

    def steps(forward) -> int:
        return programs.longest_scan(dataclasses.replace(tiny, jax_forward=forward))

    def scan(body, x, length):
        return jax.lax.scan(lambda x, _: (body(x), None), x, length=length)[0]

    nested = jax.jit(lambda x: scan(lambda x: scan(jax.numpy.sin, x, 3), x, 4))
    assert steps(lambda w, x: x) == 1
    assert steps(lambda w, x: scan(jax.numpy.sin, x, 5) + scan(jax.numpy.cos, x, 7)) == 7
    assert steps(lambda w, x: nested(x)) == 12
    assert steps(lambda w, x: jax.lax.cond(x.sum() > 0, nested, lambda x: x, x)) == 12
    assert steps(jax.checkpoint(lambda w, x: nested(x))) == 12
    assert steps(lambda w, x: jax.lax.fori_loop(0, 6, lambda i, x: x * w["0.bias"][0], x)) == 6


@pytest.mark.parametrize("name", mostly_slow(METHODS, 1))
def test_a_program_over_the_memory_limit_is_not_run(tiny, name):
    method = methods.get(name)
    small, large = (dataclasses.replace(target(), program_memory=limit) for limit in (1000, 2**30))
    with pytest.raises(OverMemory, match=r"for tanh_net would need .* GiB, over the budget of 9\.31e-07 GiB"):
        method.estimate(method.prepare(tiny, small), "norm")
    assert method.estimate(method.prepare(tiny, large), "norm").value == pytest.approx(reference.exact(tiny)["norm"])


@pytest.mark.parametrize("slack", (-1, 0))
def test_a_program_runs_within_the_memory_that_it_needs_and_not_below(slack):
    import jax

    lowered = programs.lower(lambda x: x @ x.T, jax.ShapeDtypeStruct((16, 32), "float32"))
    assert programs.flops(lowered) == pytest.approx(2 * 16 * 16 * 32, rel=0.1)
    needed = programs.needed_bytes(lowered.compile())
    assert needed >= 4 * (16 * 32 + 16 * 16)  # argument and result
    if slack:
        with pytest.raises(OverMemory, match="product would need"):
            programs.compile_within(needed + slack, lowered, "product")
    else:
        x = np.arange(16 * 32, dtype="f4").reshape(16, 32) / 512
        np.testing.assert_allclose(programs.compile_within(needed, lowered, "product")(x), x @ x.T, rtol=1e-5)


@pytest.mark.parametrize("analysis", [{"flops": 7}, [{"flops": 7}]])
def test_operations_are_read_off_a_dict_or_a_list(analysis):
    assert programs.flops(types.SimpleNamespace(cost_analysis=lambda: analysis)) == 7.0


@pytest.mark.parametrize("analysis", [None, [], {"bytes accessed": 1.0}])
def test_operations_that_xla_does_not_count_are_reported_as_missing(analysis):
    with pytest.raises(Unavailable, match="no floating-point operations"):
        programs.flops(types.SimpleNamespace(cost_analysis=lambda: analysis))


def test_the_memory_limit_is_the_option_or_a_share_of_the_free_memory(monkeypatch):
    import jax
    import psutil

    device = jax.devices("cpu")[0]
    assert programs.memory_limit(device, dataclasses.replace(target(), program_memory=12345)) == 12345
    assert programs.memory_limit(device, dataclasses.replace(target(), program_memory=12345), result=5) == 12350
    monkeypatch.setattr(psutil, "virtual_memory", lambda: types.SimpleNamespace(available=1000))
    assert programs.memory_limit(device, target()) == 800
    gpu = types.SimpleNamespace(memory_stats=lambda: {"bytes_limit": 1000, "bytes_in_use": 500})
    assert programs.memory_limit(gpu, target()) == 400


def test_bytes_needed_are_those_of_the_kernels():
    problem, float32 = loaded("digits_conv[N=3]"), target("float32")
    needed = {name: [methods.get(name).bytes_needed(problem, m, float32) for m in METRICS] for name in METHODS}
    theta = 4 * 30**2
    assert needed["nt_jacobian_contraction"] == [4 * 3, theta, theta, 2 * theta]
    assert needed["nt_ntk_vector_products"] == [theta, theta, theta, 2 * theta]


def test_alignment_needs_trained_weights_and_a_metric_must_exist(tiny):
    method = methods.get(METHODS[0])
    untrained = method.prepare(dataclasses.replace(tiny, theta_f=None), target())
    with pytest.raises(BadInput, match="has no theta_f"):
        method.estimate(untrained, "alignment")
    with pytest.raises(BadInput, match="unknown metric"):
        method.estimate(untrained, "determinant")


def test_a_torch_only_problem_is_refused(tiny):
    torch_only: Problem = dataclasses.replace(tiny, jax_forward=None)
    assert [methods.get(name).unsupported_reason(torch_only, "trace", target()) for name in METHODS] == [
        "the problem has no network in JAX"
    ] * 3


IN_A_FRESH_PROCESS = """
import sys
from ntkbench import methods
assert methods.names() and not {"jax", "neural_tangents"} & set(sys.modules), "methods are to be listed without jax"
from ntkbench.operators.neural_tangents import load
import jax, jax.core, jax.interpreters.ad
before = {module: set(vars(module)) for module in (jax.core, jax.interpreters.ad)}
neural_tangents = load()
assert load() is neural_tangents is sys.modules["neural_tangents"]
assert {module: set(vars(module)) for module in before} == before, "jax was changed"
left = {"tensorflow", "jax.util", "neural_tangents.experimental"} & set(sys.modules)
assert not left, left
"""


def test_loading_neither_changes_jax_nor_imports_tensorflow():
    subprocess.run([sys.executable, "-c", IN_A_FRESH_PROCESS], check=True)
