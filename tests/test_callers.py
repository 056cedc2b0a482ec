"""The caller's state does not change: gradients and graphs of other tensors, and the settings of all threads."""

from __future__ import annotations

import itertools
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import numpy as np
import pytest
import torch
import torch.utils.checkpoint
from conftest import Squared, mostly_slow
from torch import Tensor, nn

import ntkbench
from ntkbench.ambient import own_settings
from ntkbench.operators.plain import PlainNetwork, flat
from ntkbench.operators.plain_operations import plain_operations

X = torch.randn(5, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(1))


def head() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.Tanh(), nn.Linear(4, 2)).double()


def encoder() -> nn.Linear:
    torch.manual_seed(1)
    return nn.Linear(4, 3).double()


USES: dict[str, Callable[..., Any]] = {
    "trace": lambda *given, **more: ntkbench.trace(*given, **more).value,
    "trace by probes": lambda *given, **more: (
        ntkbench.trace(*given, method="one_sided_reverse", passes=8, **more).value
    ),
    "norm": lambda *given, **more: ntkbench.norm(*given, **more).value,
    "ntk": ntkbench.ntk,
    "ntk between two batches": lambda model, x, **more: ntkbench.ntk(model, x, x, **more),
    "ntk by layers": lambda *given, **more: [kernel.ntk() for kernel in 2 * [ntkbench.Kernel(*given, **more)]][-1],
    "spectrum": lambda *given, **more: ntkbench.spectrum(*given, **more).values,
    "solve": lambda model, x, **more: ntkbench.solve(model, x, torch.ones(5, 2), ridge=1.0, **more).values,
}

LATER: dict[str, Callable[[nn.Module, Tensor], Tensor]] = {
    "torch": lambda model, h: model(h.tanh()),
    "a custom function": lambda model, h: Squared.apply(model(h)),
}
"""What follows the caller's module."""


@pytest.mark.parametrize("later", LATER)
@pytest.mark.parametrize("use", USES)
def test_modules_that_a_function_uses_get_no_gradients(use, later):
    model, other, follow = head(), encoder(), LATER[later]
    before, hooked = torch.randn_like(other.weight), []
    other.weight.grad = before.clone()
    other.bias.register_post_accumulate_grad_hook(hooked.append)
    found = USES[use](model, X, call=lambda model, x: follow(model, other(x)))
    assert torch.equal(other.weight.grad, before) and other.bias.grad is None and not hooked
    assert all(w.grad is None for w in model.parameters())
    expected = USES[use](model, other(X).detach(), call=follow)
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("use", USES)
def test_graphs_of_the_caller_can_still_be_used(use):
    model, other = head(), encoder()
    features, scale = other(X).tanh(), other.weight.square().mean()
    found = USES[use](model, features, call=lambda model, x: model(x) * scale)
    assert all(w.grad is None for w in other.parameters())
    (features.sum() + scale).backward()
    assert all(w.grad is not None for w in other.parameters())
    expected = USES[use](model, features.detach(), call=lambda model, x: model(x) * scale.detach())
    np.testing.assert_allclose(np.asarray(found), np.asarray(expected), rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("use", USES)
def test_inputs_of_the_caller_get_no_gradients(use):
    x = X[:, :3].clone().requires_grad_()
    y = 2 * x
    found, scaled = USES[use](head(), x), USES[use](head(), y)
    assert x.grad is None and x.requires_grad
    y.sum().backward()
    assert torch.equal(x.grad, torch.full_like(x, 2.0))
    np.testing.assert_allclose(np.asarray(found), np.asarray(USES[use](head(), x.detach())))
    np.testing.assert_allclose(np.asarray(scaled), np.asarray(USES[use](head(), y.detach())))


def test_gradients_found_only_by_the_backward_pass_count():
    """With reentrant checkpointing the parameters are not in the graph; networks pass a dummy tensor that is."""

    class Checkpointed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = head()

        def forward(self, x):
            start = torch.ones(1, dtype=x.dtype, requires_grad=True)
            return torch.utils.checkpoint.checkpoint(lambda _, x: self.inner(x), start, x, use_reentrant=True)

    model, x, v = Checkpointed(), X[:, :3], torch.ones(5, 2, dtype=torch.float64)
    plain = PlainNetwork(model, {name: w.detach() for name, w in model.named_parameters()})
    expected = flat(list(torch.autograd.grad(model.inner(x), list(model.parameters()), v)))
    torch.testing.assert_close(flat(plain.gradient(x, v)), expected)
    torch.testing.assert_close(flat(plain.pullback(x)(v)), expected)


# Threads


class Watched(nn.Module):
    """Records calls, of copies too, in which the default precision is not that of the inputs."""

    wrong: ClassVar[list[torch.dtype]] = []

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.GRU(3, 2, batch_first=True)

    def forward(self, x):
        if torch.get_default_dtype() != x.dtype:
            self.wrong.append(torch.get_default_dtype())
        return self.layer(x)[0] + torch.linspace(0, 1, 2)


def settings() -> tuple[Any, ...]:
    return (
        torch.get_default_dtype(),
        torch.get_float32_matmul_precision(),
        torch.backends.mha.get_fastpath_enabled(),
        torch.backends.cudnn.enabled,
        torch._C._get_mkldnn_enabled(),
        torch.backends.cuda.flash_sdp_enabled(),
    )


@pytest.mark.parametrize("count", mostly_slow([2, 12], 1))
def test_concurrent_calls_equal_sequential_ones_and_restore_the_settings(count):
    torch.manual_seed(0)
    models = [Watched() for _ in range(count)]
    x, before = torch.randn(4, 2, 3), settings()
    jobs = list(zip(models, itertools.cycle(("float64", "float32"))))

    def values(job: tuple[nn.Module, str]) -> tuple[float, float, torch.dtype]:
        kernel = ntkbench.Kernel(job[0], x, dtype=job[1])
        return float(kernel.trace()), float(kernel.norm()), kernel.ntk().dtype

    Watched.wrong.clear()
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(values, jobs))
    assert settings() == before and not Watched.wrong
    for job, found in zip(jobs, together, strict=True):
        expected = values(job)
        assert found[:2] == pytest.approx(expected[:2], rel=1e-12 if job[1] == "float64" else 1e-5)
        assert found[2] == expected[2] == getattr(torch, job[1])


def test_settings_block_other_threads_and_can_be_nested():
    before, seen, entered = settings(), [], threading.Event()

    def other() -> None:
        with own_settings("float32"):
            entered.set()
            seen.append(torch.get_default_dtype())

    thread = threading.Thread(target=other)
    with own_settings("float64"):
        thread.start()
        assert not entered.wait(0.2)
        with own_settings("float32"):
            assert torch.get_default_dtype() == torch.float32
        assert torch.get_default_dtype() == torch.float64
    thread.join(60)
    assert seen == [torch.float32] and settings() == before


@pytest.mark.parametrize("recurrent", [False, True])
def test_plain_operations_end_with_their_last_user(recurrent):
    """As with two threads, of which the first to enter is the first to leave."""
    module, before = nn.GRU(3, 2) if recurrent else nn.Linear(3, 2), settings()
    first, second = plain_operations(module), plain_operations(module)
    first.__enter__()
    inside = settings()
    second.__enter__()
    first.__exit__(None, None, None)
    assert settings() == inside and not torch.backends.mha.get_fastpath_enabled()
    second.__exit__(None, None, None)
    assert settings() == before
