"""Speeds of a machine, measured once in about a second and kept in the cache folder.

They predict seconds from counted operations before the products of a network have been timed. Nothing else depends on
them: the choice of ``method="auto"`` follows from counts alone, so that the same seed gives the same numbers.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import platform
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ntkbench import operators, paths
from ntkbench.errors import NtkbenchError
from ntkbench.options import Target

if TYPE_CHECKING:
    import torch

SWITCH = "NTKBENCH_CALIBRATION"
"""Environment variable; nothing is measured or read if it is ``off``."""
FORMAT = 1
"""Format of the files; speeds in files of another format are measured again."""
SECONDS = 0.2
"""Duration of the measurement of each speed, after a first call."""
REPEATS = 200
"""Maximum number of calls for each speed."""
SIDE, ENTRIES, CALLS = {"cpu": 768, "cuda": 4096}, {"cpu": 2**23, "cuda": 2**26}, 500
"""Side of the matrices and number of copied entries, by type of device; number of timed calls."""


@dataclass(frozen=True)
class Machine:
    """Speeds of a device with a number of threads.

    Attributes:
        operations: per second, of products of large matrices; a multiplication with its addition counts as two.
        bandwidth: bytes per second that are read or written.
        call: seconds of an operation on few numbers.
    """

    operations: float
    bandwidth: float
    call: float

    def seconds(self, operations: float, moved: float = 0.0, calls: float = 0.0) -> float:
        """Seconds of operations with bytes moved at the same time, plus those of calls."""
        return max(operations / self.operations, moved / self.bandwidth) + calls * self.call


_known: dict[str, Machine] = {}


def speeds(target: Target, *, measured: bool = True, clock: Callable[[], float] = time.perf_counter) -> Machine | None:
    """Speeds of this machine for a target; those of torch, also for JAX.

    They are kept by host, processor, number of threads, device, precision and version of torch, in memory and in a file
    of :func:`ntkbench.paths.cache`. If that file is damaged or made for something else, the speeds are measured again;
    if it cannot be written, they are kept in memory only. Never call this within a timed region.

    Args:
        target: device and precision.
        measured: whether to measure speeds that are not known.
        clock: returns seconds.

    Returns:
        ``None`` if they are not known and not measured, torch does not see the device, or :data:`SWITCH` is ``off``.
    """
    if os.environ.get(SWITCH, "").lower() == "off":
        return None
    import torch

    device = torch.device("cpu" if operators.device_memory(target) is None else "cuda")
    if device.type == "cuda" and not torch.cuda.is_available():
        return None
    made_for = _made_for(target, device)
    text = json.dumps(made_for, sort_keys=True)
    if text not in _known:
        file = paths.cache() / "machine" / f"{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"
        found = _read(file, made_for)
        if found is None and measured:
            found = _measured(target, device, clock)
            _write(file, {"made_for": made_for, **asdict(found)})
        if found is None:
            return None
        _known[text] = found
    return _known[text]


def _made_for(target: Target, device: torch.device) -> dict[str, Any]:
    import torch

    return {
        "format": FORMAT,
        "host": platform.node(),
        "processor": f"{platform.machine()} {platform.processor()} {os.cpu_count()}",
        "threads": torch.get_num_threads(),
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else "cpu",
        "dtype": target.dtype,
        "tf32": target.tf32,
        "torch": torch.__version__,
    }


def _read(file: Path, made_for: dict[str, Any]) -> Machine | None:
    """The speeds of a file; ``None`` if it is missing, damaged, or made for something else."""
    try:
        record = json.loads(file.read_text(encoding="utf-8"))
        found = Machine(*(float(record[key]) for key in ("operations", "bandwidth", "call")))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    right = record["made_for"] == made_for if "made_for" in record else False
    return found if right and all(math.isfinite(each) and each > 0 for each in asdict(found).values()) else None


def _write(file: Path, record: dict[str, Any]) -> None:
    try:
        paths.write_atomically(file, json.dumps(record, indent=1))
    except NtkbenchError:  # such as a folder without permission to write
        return


def _measured(target: Target, device: torch.device, clock: Callable[[], float]) -> Machine:
    import torch

    dtype, side, entries = getattr(torch, target.dtype), SIDE[device.type], ENTRIES[device.type]
    generator = torch.Generator().manual_seed(0)  # not the user's own
    matrix = torch.rand(side, side, generator=generator, device="cpu").to(device, dtype)
    source = torch.ones(entries, device=device, dtype=dtype)
    copy, one = torch.empty_like(source), torch.ones(1, device=device, dtype=dtype)

    def product() -> object:
        return matrix @ matrix

    def calls() -> None:
        for _ in range(CALLS):
            one.mul_(1)

    def fastest(run: Callable[[], object]) -> float:
        times: list[float] = []
        run()
        while sum(times) < SECONDS and len(times) < REPEATS:
            _wait(device)
            start = clock()
            run()
            _wait(device)
            times.append(clock() - start)
        return max(min(times), 1e-9)

    moved = 2 * entries * source.element_size()
    return Machine(2 * side**3 / fastest(product), moved / fastest(lambda: copy.copy_(source)), fastest(calls) / CALLS)


def _wait(device: torch.device) -> None:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
