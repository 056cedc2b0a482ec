"""Memory that is free on the host."""

from __future__ import annotations

import contextlib
from pathlib import Path

import psutil

try:
    import resource
except ImportError:  # Windows has no limits of this kind
    resource = None  # type: ignore[assignment]


def free_on_host() -> int:
    """Bytes that this process may still allocate."""
    free = min([psutil.virtual_memory().available, *_free_of_groups()])
    if resource is None:
        return free
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if limit == resource.RLIM_INFINITY else min(free, limit - psutil.Process().memory_info().vms)


GROUPS = Path("/sys/fs/cgroup")
OF_PROCESS = Path("/proc/self/cgroup")
NAMES = {
    "": ("memory.max", "memory.current", "inactive_file"),
    "memory": ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
}
"""Files of the limit and of the memory in use, and the name of the part that is freed on demand, by controllers: those
of version 2 have no name."""


def _free_of_groups() -> list[int]:
    """Bytes that each limited control group of this process still allows, as in a container or a job of Slurm."""
    found = []
    with contextlib.suppress(OSError, ValueError):  # another system, or one that hides its groups
        for line in OF_PROCESS.read_text(encoding="utf-8").splitlines():
            _, controllers, path = line.split(":", 2)
            for name in set(controllers.split(",")) & NAMES.keys():
                root = GROUPS / name
                own = root / path.lstrip("/")
                # A container sees its own group as the root, under another path.
                for folder in dict.fromkeys([own, *own.parents, root]):
                    if folder.is_relative_to(root):
                        found += _free_of_group(folder, *NAMES[name])
    return found


def _free_of_group(folder: Path, limit: str, used: str, reclaimed: str) -> list[int]:
    with contextlib.suppress(OSError, ValueError):  # no such group, or no limit ("max")
        allowed, taken = (int((folder / name).read_text(encoding="utf-8")) for name in (limit, used))
        parts = dict(line.split() for line in (folder / "memory.stat").read_text(encoding="utf-8").splitlines())
        return [max(0, allowed - taken + int(parts.get(reclaimed, 0)))]
    return []
