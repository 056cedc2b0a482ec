"""Memory that is free on the host."""

from __future__ import annotations

import psutil

try:
    import resource
except ImportError:  # Windows has no limits of this kind
    resource = None  # type: ignore[assignment]


def free_on_host() -> int:
    """Bytes that this process may still allocate."""
    free = psutil.virtual_memory().available
    if resource is None:
        return free
    limit, _ = resource.getrlimit(resource.RLIMIT_AS)
    return free if limit == resource.RLIM_INFINITY else min(free, limit - psutil.Process().memory_info().vms)
