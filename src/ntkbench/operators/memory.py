"""Memory that is free on the host."""

from __future__ import annotations

import resource

import psutil


def free_on_host() -> int:
    """Bytes that this process may still take."""
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    free = psutil.virtual_memory().available
    return free if limit == resource.RLIM_INFINITY else min(free, limit - psutil.Process().memory_info().vms)
