"""Kernels in files: equal to those in memory, resumed wherever they were interrupted, and never mixed up."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from conftest import mostly_slow
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn.utils import parametrizations

import ntkbench
from ntkbench.errors import BadInput, NtkbenchError
from ntkbench.kernel import Kernel
from ntkbench.layerwise.certificate import Certificate
from ntkbench.layerwise.kernel import LayerwiseKernel
from ntkbench.layerwise.parts import KernelParts
from ntkbench.operators.ranges import rectangle, row_ranges, within
from ntkbench.problem import Problem

D = 4
KERNELS = ("full", "sum_of_logits", "single_logit", "random_vector", "trace", "last_layer")


def net(O: int = 3, seed: int = 0, activation: type[nn.Module] = nn.Tanh) -> nn.Sequential:  # noqa: E741
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(D, 6), activation(), nn.Linear(6, O)).double()


def inputs(N: int, seed: int = 1) -> torch.Tensor:
    return torch.randn(N, D, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def traced(kernel: Kernel) -> Kernel:
    """The kernel as at its second use, which is traced."""
    kernel._used = True
    return kernel


@pytest.fixture
def computed(monkeypatch) -> list[tuple[int, ...]]:
    """Shapes of the rectangles that were computed."""
    found: list[tuple[int, ...]] = []
    checked = Kernel._checked
    monkeypatch.setattr(Kernel, "_checked", lambda self, part: found.append(tuple(part.shape)) or checked(self, part))
    return found


@given(st.integers(1, 9), st.integers(1, 7), st.integers(1, 40), st.data())
def test_ranges_are_whole_samples_or_directions_of_one_sample(N, K, most, data):
    ranges = row_ranges(N, K, most)
    assert [i for r in ranges for i in range(r.start, r.stop)] == list(range(N * K))
    for r in ranges:
        samples, directions = rectangle(r, K)
        rows = [b * K + k for b in range(*samples.indices(N)) for k in range(*directions.indices(K))]
        assert rows == list(range(r.start, r.stop)) and len(rows) <= most
        parts = within(r, K, data.draw(st.integers(1, most)))
        assert [i for part in parts for i in range(part.start, part.stop)] == rows


@settings(deadline=None, max_examples=12, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    N=st.integers(1, 7),
    O=st.integers(1, 4),
    N2=st.integers(0, 5),
    memory=st.sampled_from([64, 300, 2000, 9000, 10**6]),
    name=st.sampled_from(KERNELS),
    as_traced=st.booleans(),
)
def test_equal_to_the_kernel_in_memory(tmp_path_factory, N, O, N2, memory, name, as_traced):  # noqa: E741
    model, x, x2 = net(O), inputs(N), inputs(N2, 2) if N2 else None
    file = tmp_path_factory.mktemp("file") / "theta.npy"
    kernel = Kernel(model, x, memory=memory)
    found = (traced(kernel) if as_traced else kernel).ntk(x2, kernel=name, seed=5, file=file)
    expected = Kernel(model, x).ntk(x2, kernel=name, seed=5).numpy()
    np.testing.assert_allclose(found, expected, rtol=1e-12, atol=1e-12)
    assert isinstance(found, np.memmap) and not found.flags.writeable
    np.testing.assert_array_equal(np.load(file), found)
    if x2 is None:
        np.testing.assert_array_equal(found, found.T)


def test_rows_and_columns_of_a_sum_over_directions_are_cut_into_the_same_directions():
    """The normalised weight takes memory that does not grow with the samples, of which rows have more than columns."""
    model, x, x2 = net(), inputs(7), inputs(1, 2)
    parametrizations.weight_norm(model[2])
    parameters = {key: w.detach() for key, w in model.named_parameters()}
    values = list(parameters.values())
    engine = LayerwiseKernel(model, parameters, x, 2**20)
    theta = engine.kernel(values, x, x2).view(7, 3, 1, 3)
    expected = theta.diagonal(dim1=1, dim2=3).sum(-1)
    different = []
    for engine.memory in range(250, 4000, 8):
        task = engine._task(None, fold=True)
        cuts = [engine._blocks(task, [values], each, whole=False) for each in (x, x2)]
        rows, columns = ({block.directions.start for block in blocks} for blocks in cuts)
        if rows != columns:
            different.append(engine.memory)
    assert different
    for engine.memory in (different[0], different[-1]):
        torch.testing.assert_close(engine.kernel(values, x, x2, fold=True), expected)
        part = KernelParts(engine, values, x, x2, None, last_layer=False, fold=True)
        torch.testing.assert_close(part(slice(0, 7), slice(0, 1)), expected)


def test_no_rectangle_is_larger_than_its_share_of_memory(tmp_path, computed):
    traced(Kernel(net(), inputs(20), memory=8 * 8 * 100)).ntk(file=tmp_path / "theta.npy")
    assert max(a * b for a, b in computed) <= 100 and len(computed) == 7 * 8 / 2


def test_a_complete_file_is_opened_and_not_computed(tmp_path, computed, monkeypatch):
    file = str(tmp_path / "theta.npy")
    first = np.array(ntkbench.ntk(net(), inputs(6), kernel="trace", file=file, memory=500))
    assert computed
    computed.clear()
    monkeypatch.setattr(os, "open", None)  # nothing is opened for writing
    np.testing.assert_array_equal(ntkbench.ntk(net(), inputs(6), kernel="trace", file=file, memory=500), first)
    assert computed == []


def test_interacting_samples_give_the_kernel_in_memory(tmp_path):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(D, 6), nn.BatchNorm1d(6), nn.Tanh(), nn.Linear(6, 2)).double(), inputs(7)
    for memory in (8 * 8 * 9, 8 * 8):
        found = ntkbench.ntk(model, x, file=tmp_path / f"{memory}.npy", memory=memory)
        np.testing.assert_allclose(found, ntkbench.ntk(model, x).numpy(), rtol=1e-9, atol=1e-12)


def test_several_inputs_and_a_network_in_float32_only_give_the_kernel_in_memory(tmp_path):
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(D, 3)

        def forward(self, a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
            return self.layer(a.to(torch.float32)) * b.to(torch.float32).sum(-1, keepdim=True)

    torch.manual_seed(0)
    model, both = Two(), (inputs(5).float(), inputs(5, 2).float())
    file = tmp_path / "theta.npy"
    found = traced(Kernel(model, both, memory=1000)).ntk(file=file)
    np.testing.assert_allclose(found, ntkbench.ntk(model, both).numpy(), rtol=1e-5)
    with pytest.raises(BadInput, match=r"another kernel \(other frozen parameters, buffers or inputs\)"):
        Kernel(model, (both[0], both[1] + 1), memory=1000).ntk(file=file)


class Killed(BaseException):
    """An exception that nothing in the package catches."""


CALLS = ("pwrite", "fsync", "replace", "rename", "posix_fallocate", "ftruncate")


class Bomb:
    """Ends a computation in its k-th system call; a write is then half done."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, k: int) -> None:
        self.left = k
        for name in CALLS:
            monkeypatch.setattr(os, name, self.wrapped(name, getattr(os, name)))

    def wrapped(self, name: str, call: Any) -> Any:
        def counted(*arguments: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                if name == "pwrite":
                    call(arguments[0], arguments[1][: len(arguments[1]) // 2], arguments[2])
                raise Killed
            return call(*arguments)

        return counted


@pytest.mark.parametrize(("x2", "step"), [(None, 1), (inputs(3, 2), 4)], ids=["symmetric", "two inputs"])
def test_resumes_after_every_system_call(tmp_path, computed, x2, step):
    expected = Kernel(net(), inputs(4)).ntk(x2).numpy()
    kernel = Kernel(net(), inputs(4), memory=8 * 8 * 36)
    ends, parts = 0, 0
    for k in range(1, 1000, step):
        file = tmp_path / f"{k}.npy"
        computed.clear()
        with pytest.MonkeyPatch.context() as patch:
            Bomb(patch, k)
            try:
                kernel.ntk(x2, file=file)
                ends += 1
            except Killed:
                pass
        before = len(computed)
        note = file.with_name(f"{file.name}.progress")
        done = json.loads(note.read_text())["done"] if file.exists() else 0
        computed.clear()
        np.testing.assert_allclose(kernel.ntk(x2, file=file), expected, rtol=1e-12)
        parts = parts or len(computed) + done
        assert before - 1 <= done <= before and len(computed) == parts - done
        if ends:
            break
    assert ends and k > 20 and parts == (3 if x2 is None else 4)
    assert not [path for path in os.listdir(tmp_path) if path.startswith(".") and ".progress." not in path]


KILLED_CHILD = """
import json, os, pathlib, signal, sys
import numpy as np, torch, ntkbench
from ntkbench.kernel import Kernel
from torch import nn
folder, log = pathlib.Path(sys.argv[1]), os.open(sys.argv[2], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double()
x = torch.randn(5, 4, dtype=torch.float64)
checked, pwrite, rename = Kernel._checked, os.pwrite, os.rename
file = folder / "theta.npy"

def run(k):
    left = k
    def counted(call):
        def wrapped(*arguments):
            nonlocal left
            left -= 1
            if left == 0:
                os.kill(os.getpid(), signal.SIGKILL)
            return call(*arguments)
        return wrapped
    os.pwrite, os.rename = counted(pwrite), counted(rename)
    Kernel._checked = lambda self, part: os.write(log, b"computed\\n") and checked(self, part)
    Kernel(net, x, memory=8 * 8 * 36).ntk(file=file)

Kernel(net, x + 1, memory=8 * 8 * 36).ntk(file=folder / "warm.npy")  # what is imported here is not in every child
kills = 0
for k in (1, 2, 5, 9, 13, 17, 19, 10**6):
    child = os.fork()
    if child == 0:
        run(k)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    kills += status == -signal.SIGKILL
    assert status in (0, -signal.SIGKILL)
np.save(folder / "expected.npy", Kernel(net, x).ntk().numpy())
print(kills)
"""


@pytest.mark.slow
def test_resumes_after_kills(tmp_path):
    log = tmp_path / "log"
    command = [sys.executable, "-c", KILLED_CHILD, str(tmp_path), str(log)]
    kills = int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    np.testing.assert_allclose(np.load(tmp_path / "theta.npy"), np.load(tmp_path / "expected.npy"), rtol=1e-12)
    parts = json.loads((tmp_path / "theta.npy.progress").read_text())["parts"]
    assert kills >= 4 and log.read_text().count("computed") <= parts + kills
    assert not (tmp_path / ".theta.npy.half").exists()


def begun(file: Path, **setup: Any) -> None:
    """A file of which two rectangles are complete."""
    with pytest.MonkeyPatch.context() as patch:
        checked, count = Kernel._checked, iter(range(100))

        def two(self: Kernel, part: Any) -> Any:
            if next(count) == 2:
                raise Killed
            return checked(self, part)

        patch.setattr(Kernel, "_checked", two)
        with pytest.raises(Killed):
            ntkbench.ntk(net(), inputs(5), file=file, memory=8 * 8 * 36, **setup)
    assert json.loads(file.with_name(f"{file.name}.progress").read_text())["done"] == 2


def frozen() -> nn.Sequential:
    model = net()
    model[0].bias.requires_grad_(False)
    return model


OTHERS: dict[str, tuple[str, dict[str, Any]]] = {
    "weights": ("other weights", {"model": net(seed=1)}),
    "inputs": ("other inputs", {"x": inputs(5, 7)}),
    "order": ("other inputs", {"x": inputs(5).flip(0)}),
    "more inputs": (r"samples \[5, 5\], not \[6, 6\]", {"x": inputs(6)}),
    "columns": ("other second inputs", {"x2": inputs(5, 3)}),
    "network": ("other network", {"model": net(activation=nn.Sigmoid)}),
    "frozen": ("other parameters", {"model": frozen()}),
    "some parameters": ("other parameters", {"parameters": "0.*"}),
    "kernel": ("kernel full, not trace", {"kernel": "trace"}),
    "output": ("outputs 3, not 1", {"output": 1}),
    "precision": ("dtype float64, not float32", {"dtype": "float32"}),
}


STATES = [(case, state) for case in OTHERS for state in ("begun", "complete")]


@pytest.mark.parametrize(
    ("case", "state"),
    mostly_slow(STATES, [each for each in STATES if each[1] == "begun" or each[0] in ("weights", "kernel")]),
)
def test_a_file_of_another_kernel_is_refused_and_left_alone(tmp_path, case, state):
    says, given = OTHERS[case]
    file = tmp_path / "theta.npy"
    begun(file)
    if state == "complete":
        ntkbench.ntk(net(), inputs(5), file=file, memory=8 * 8 * 36)
    before = file.read_bytes()
    arguments = {"model": net(), "x1": given.get("x", inputs(5))} | {k: v for k, v in given.items() if k != "x"}
    with pytest.raises(BadInput, match=f"^{file} holds another kernel \\({says}\\): name another file, or remove"):
        ntkbench.ntk(**arguments, file=file)
    assert file.read_bytes() == before


def test_outputs_in_another_order_are_another_kernel(tmp_path):
    file = tmp_path / "theta.npy"
    ntkbench.ntk(net(), inputs(5), output=[0, 1], file=file)
    with pytest.raises(BadInput, match="other network"):
        ntkbench.ntk(net(), inputs(5), output=[1, 0], file=file)


@pytest.mark.parametrize("last", [2, 99])
def test_a_call_that_changes_on_one_later_sample_is_another_kernel(tmp_path, last):
    x, labels = inputs(100), torch.zeros(100, dtype=torch.int64)
    labels[last] = 2

    def weighted(*weights):
        loss = nn.CrossEntropyLoss(torch.tensor(weights).to(x), reduction="none")
        return lambda model, batch: loss(model(batch[0]), batch[1])

    file = tmp_path / "k.npy"
    ntkbench.ntk(net(), (x, labels), call=weighted(1.0, 1.0, 1.0), file=file)
    ntkbench.ntk(net(), (x, labels), call=weighted(1.0, 1.0, 1.0), file=file)
    with pytest.raises(ntkbench.BadInput, match="another kernel \\(other network\\)"):
        ntkbench.ntk(net(), (x, labels), call=weighted(1.0, 1.0, 5.0), file=file)


def test_the_seed_matters_only_to_kernels_that_use_it(tmp_path):
    file = tmp_path / "theta.npy"
    ntkbench.ntk(net(), inputs(5), kernel="random_vector", seed=1, file=file)
    with pytest.raises(BadInput, match="seed 1, not 2"):
        ntkbench.ntk(net(), inputs(5), kernel="random_vector", seed=2, file=file)
    ntkbench.ntk(net(), inputs(5), kernel="trace", seed=1, file=tmp_path / "trace.npy")
    ntkbench.ntk(net(), inputs(5), kernel="trace", seed=2, file=tmp_path / "trace.npy")


def cut(file: Path) -> None:
    os.truncate(file, file.stat().st_size - 1)


def longer(file: Path) -> None:
    with file.open("ab") as stream:
        stream.write(b"x")


def other_array(file: Path) -> None:
    np.save(file, np.zeros((15, 15), "float32"))


def no_note(file: Path) -> None:
    file.with_name(f"{file.name}.progress").unlink()


def other_note(text: str) -> Any:
    return lambda file: file.with_name(f"{file.name}.progress").write_text(text)


DAMAGES = {
    "cut": (cut, "is damaged"),
    "longer": (longer, "is damaged"),
    "other array": (other_array, "is damaged"),
    "empty": (lambda file: file.write_bytes(b""), "is damaged"),
    "no note": (no_note, r"already exists, but theta\.npy\.progress does not"),
    "empty note": (other_note(""), "cannot be read"),
    "other note": (other_note("[1]"), "cannot be read"),
    "later note": (other_note('{"format": 2, "of": {}, "most": 1, "done": 1}'), "another version"),
}


def impossible_note(file: Path) -> None:
    note = file.with_name(f"{file.name}.progress")
    note.write_text(json.dumps(json.loads(note.read_text()) | {"done": 99}))


DAMAGES["impossible note"] = impossible_note, "cannot be read"


@pytest.mark.parametrize("case", DAMAGES)
def test_a_damaged_file_is_refused(tmp_path, case):
    damage, says = DAMAGES[case]
    file = tmp_path / "theta.npy"
    begun(file)
    damage(file)
    with pytest.raises(BadInput, match=f"{says}.*: name another file, or remove this one$"):
        ntkbench.ntk(net(), inputs(5), file=file, memory=8 * 8 * 36)
    file.unlink()
    found = ntkbench.ntk(net(), inputs(5), file=file, memory=8 * 8 * 36)
    np.testing.assert_allclose(found, ntkbench.ntk(net(), inputs(5)).numpy(), rtol=1e-12)


def test_a_file_resumes_with_more_memory_but_not_with_too_little(tmp_path, computed):
    file = tmp_path / "theta.npy"
    begun(file)
    with pytest.raises(BadInput, match=r"was begun with more memory: give at least memory=1152"):
        ntkbench.ntk(net(), inputs(5), file=file, memory=1151)
    computed.clear()
    found = ntkbench.ntk(net(), inputs(5), file=file, memory=10**6)
    np.testing.assert_allclose(found, ntkbench.ntk(net(), inputs(5)).numpy(), rtol=1e-12)
    assert len(computed) == 5, "four rectangles of the size that they were begun in, and the kernel in memory"


def test_a_full_disk_is_reported_before_work_starts(tmp_path, monkeypatch, computed):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=15 * 15 * 8 - 1))
    with pytest.raises(BadInput, match=r"15 x 15 entries in float64, takes 1\.68e-06 GiB, but only 1\.68e-06 GiB are"):
        ntkbench.ntk(net(), inputs(5), file=tmp_path / "theta.npy")
    assert computed == [] and os.listdir(tmp_path) == []


@pytest.mark.parametrize("call", ["pwrite", "posix_fallocate", "fsync"])
def test_a_disk_error_is_reported_and_the_file_resumes(tmp_path, monkeypatch, call):
    file = tmp_path / "theta.npy"

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, call, full)
        with pytest.raises(NtkbenchError, match="cannot be written: No space left on device; repeat the call"):
            ntkbench.ntk(net(), inputs(5), file=file)
    found = ntkbench.ntk(net(), inputs(5), file=file)
    np.testing.assert_allclose(found, ntkbench.ntk(net(), inputs(5)).numpy(), rtol=1e-12)


@pytest.mark.parametrize("code", [errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS])
def test_systems_that_cannot_reserve_space_are_supported(tmp_path, monkeypatch, code):
    def unsupported(*_: Any) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(os, "posix_fallocate", unsupported)
    ntkbench.ntk(net(), inputs(5), file=tmp_path / "theta.npy")


def test_unusable_paths_are_refused_and_missing_folders_are_made(tmp_path, computed):
    for file in (3, "", b"theta.npy"):
        with pytest.raises(BadInput, match="file must be a path, got"):
            ntkbench.ntk(net(), inputs(5), file=file)
    with pytest.raises(BadInput, match=r"the folder of file='/proc/theta\.npy', /proc cannot be written to"):
        ntkbench.ntk(net(), inputs(5), file="/proc/theta.npy")
    with pytest.raises(BadInput, match="already exists"):
        ntkbench.ntk(net(), inputs(5), file=tmp_path)
    with pytest.raises(BadInput, match=r"a file holds one kernel: for groups of parameters use ntkbench\.Kernel"):
        ntkbench.ntk(net(), inputs(5), parameters={"first": "0.*"}, file=tmp_path / "theta.npy")
    assert computed == []
    ntkbench.ntk(net(), inputs(5), file=tmp_path / "new" / "folder" / "theta.npy")


def test_one_process_writes_at_a_time(tmp_path, computed):
    file = tmp_path / "theta.npy"
    begun(file)
    computed.clear()
    with file.open() as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="is being written by another process"):
            ntkbench.ntk(net(), inputs(5), file=file)
    assert computed == []
    half = tmp_path / ".other.npy.half"
    with half.open("w") as held:
        fcntl.flock(held, fcntl.LOCK_EX)
        with pytest.raises(BadInput, match="is being written by another process"):
            ntkbench.ntk(net(), inputs(5), file=tmp_path / "other.npy")
        assert half.exists(), "which is the other's"
    ntkbench.ntk(net(), inputs(5), file=tmp_path / "other.npy")
    assert not half.exists()


def test_every_run_is_certified_once_before_its_first_rectangle(tmp_path, monkeypatch):
    events: list[str] = []
    difference, checked = Certificate.difference, Kernel._checked
    monkeypatch.setattr(Certificate, "difference", lambda *a: events.append("certified") or difference(*a))
    monkeypatch.setattr(Kernel, "_checked", lambda *a: events.append("computed") or checked(*a))
    file, memory = tmp_path / "theta.npy", 8 * 8 * 36
    with pytest.MonkeyPatch.context() as patch:
        Bomb(patch, 30)
        with pytest.raises(Killed):
            traced(Kernel(net(), inputs(5), memory=memory)).ntk(file=file)
    assert events == ["certified"] + 3 * ["computed"]
    events.clear()
    traced(Kernel(net(), inputs(5), memory=memory)).ntk(file=file)
    assert events == ["certified"] + 4 * ["computed"]
    events.clear()
    traced(Kernel(net(), inputs(5), memory=memory)).ntk(inputs(4, 2), file=tmp_path / "two.npy")
    assert events[:3] == ["certified", "certified", "computed"] and events.count("certified") == 2


def test_a_method_that_its_certificate_contradicts_is_passed_over(tmp_path, monkeypatch):
    monkeypatch.setattr(Certificate, "difference", lambda *_: 1.0)
    found = traced(Kernel(net(), inputs(5), memory=8 * 8 * 36)).ntk(file=tmp_path / "theta.npy")
    np.testing.assert_allclose(found, Kernel(net(), inputs(5)).ntk().numpy(), rtol=1e-12)


def test_no_file_is_left_where_no_method_works(tmp_path, monkeypatch):
    def broken(*_: Any) -> None:
        raise RuntimeError("broken")

    monkeypatch.setattr(Kernel, "_checked", broken)
    with pytest.raises(BadInput, match=r"no method can compute this kernel: .*RuntimeError: broken"):
        ntkbench.ntk(net(), inputs(5), file=tmp_path / "theta.npy")
    assert os.listdir(tmp_path) == []


def test_overflow_is_not_written(tmp_path):
    model = net().float()
    with torch.no_grad():
        model[2].weight.fill_(1e30)
    with pytest.raises(BadInput, match="gradient is not finite"):
        ntkbench.ntk(model, inputs(5).float() * 1e-3, file=tmp_path / "theta.npy")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("name", ["full", "trace"])
@pytest.mark.slow
def test_functions_in_jax_give_the_kernel_in_memory(tmp_path, name, computed):
    jnp = pytest.importorskip("jax.numpy")
    params = {"w": np.random.default_rng(0).standard_normal((D, 5)), "v": np.ones((5, 2))}

    def f(params: Any, x: Any) -> Any:
        return jnp.tanh(x @ params["w"]) @ params["v"]

    x, x2 = inputs(4).numpy(), inputs(2, 2).numpy()
    # A rectangle holds two samples with both outputs, or one of the outputs, which neural-tangents does not support.
    for i, (other, rows) in enumerate([(None, 4), (None, 1)] if name == "full" else [(None, 4), (x2, 1)]):
        expected = np.asarray(ntkbench.ntk(f, x, other, kernel=name, params=params))
        computed.clear()
        file, memory = tmp_path / f"{i}.npy", 8 * 8 * rows**2
        found = ntkbench.ntk(f, x, other, kernel=name, params=params, file=file, memory=memory)
        np.testing.assert_allclose(found, expected, rtol=1e-9)
        assert len(computed) > 1 or name != "full"
    with pytest.raises(BadInput, match="other weights"):
        ntkbench.ntk(f, x, kernel=name, params={**params, "v": params["v"] + 1}, file=tmp_path / "0.npy")


@pytest.mark.slow
def test_interacting_samples_in_jax_give_the_explicit_kernel(tmp_path):
    jnp = pytest.importorskip("jax.numpy")
    params = {"w": np.random.default_rng(0).standard_normal((D, 3))}

    def f(params: Any, x: Any) -> Any:
        h = x @ params["w"]
        return jnp.tanh(h - h.mean(0))

    x = inputs(5).numpy()
    found = ntkbench.ntk(f, x, params=params, file=tmp_path / "theta.npy", memory=8 * 8 * 16)
    w = torch.from_numpy(params["w"])

    def same(w: torch.Tensor) -> torch.Tensor:
        h = torch.from_numpy(x) @ w
        return torch.tanh(h - h.mean(0)).reshape(-1)

    J = torch.autograd.functional.jacobian(same, w).flatten(1)
    np.testing.assert_allclose(found, (J @ J.T).numpy(), rtol=1e-9, atol=1e-12)
    assert ntkbench.spectrum(f, x, params=params).passes == 15 + 2, "a pass for each row"


def test_the_identity_of_a_problem_names_what_differs():
    def problem(**changes: Any) -> Problem:
        given = {"name": "p", "module": net(), "x": inputs(3).numpy()} | changes
        theta = {key: w.detach().numpy() for key, w in given["module"].named_parameters()}
        return Problem(theta_0=theta, **given)

    one = problem().identity()
    assert one == problem().identity()
    other = problem(module=net(activation=nn.ReLU)).identity()
    assert {key for key in one if one[key] != other[key]} == {"network"}


MEMORY = """
import resource, sys, torch, ntkbench
from ntkbench.kernel import Kernel
from torch import nn
torch.manual_seed(0)
net = nn.Sequential(nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 10))
x, memory = torch.randn(400, 16), 2**24
peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
def run(x, file, memory):
    kernel = Kernel(net, x, memory=memory)
    kernel._used = True
    return kernel.ntk(file=file)
run(x[:20], sys.argv[1] + "/small.npy", 2**16)
before = peak()
theta = run(x, sys.argv[1] + "/large.npy", memory)
print(peak() - before, theta.nbytes, memory)
"""


@pytest.mark.slow
def test_memory_is_bounded(tmp_path):
    done = subprocess.run([sys.executable, "-c", MEMORY, str(tmp_path)], check=True, capture_output=True, text=True)
    taken, size, memory = map(int, done.stdout.split())
    assert size == 4 * 4000**2 > memory + 2**24 > taken
    theta = np.load(tmp_path / "large.npy", mmap_mode="r")
    some = np.random.default_rng(0).integers(0, 4000, 50)
    np.testing.assert_array_equal(theta[some][:, some], theta[some][:, some].T)
