"""Where things lie: in a checkout, or in the user's folders where the package is installed from a wheel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import platformdirs

from ntkbench.errors import BadInput, NtkbenchError, Unavailable

ROOT = Path(__file__).resolve().parents[2]
"""The checkout that this package is imported from. Means nothing where it is not: see :func:`checkout`."""

IN_CHECKOUT = Path(__file__).resolve().parents[1].name == "src"
"""Whether this package lies in a checkout, and not among installed packages."""

REFERENCE = ROOT / "results" / "reference"
"""Committed: exact values, trained weights, published values, measured tables."""

PUBLISHED = REFERENCE / "published"
"""Values read off the papers' figures, with source and accuracy."""


def checkout(what: str) -> Path:
    """The checkout.

    Args:
        what: needs it, as the message begins.

    Raises:
        Unavailable: the package is installed without one.
    """
    if not IN_CHECKOUT:
        folder = Path(__file__).resolve().parent
        raise Unavailable(f"{what} needs a checkout of ntkbench's repository, and {folder} is not in one; run it there")
    return ROOT


def cache() -> Path:
    """Folder for what can be made again: ``$NTKBENCH_CACHE``, else ``results/cache`` in the checkout.

    Without a checkout it is ``ntkbench`` in the user's cache folder, such as ``~/.cache`` or ``~/Library/Caches``.
    """
    if given := os.environ.get("NTKBENCH_CACHE"):
        return Path(given)
    return ROOT / "results" / "cache" if IN_CHECKOUT else platformdirs.user_cache_path("ntkbench", appauthor=False)


def python_path(root: Path = ROOT) -> str:
    """``$PYTHONPATH`` for the processes of a checkout: its own folders, then those that this process was given."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(dict.fromkeys([str(root), str(root / "src"), *map(os.path.abspath, given)]))


def check_folder(folder: Path) -> None:
    """That a folder is there or can be made, as far as that shows without writing.

    Raises:
        BadInput: something that is no folder is in the way.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"the results folder {folder} cannot be written to: {there} is no folder")


def writable(folder: Path, name: str = "the results folder") -> Path:
    """The folder, made if need be.

    Raises:
        BadInput: nothing can be written there; calls it by ``name``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{name} {folder} cannot be written to: {error.strerror}") from None
    return folder


def git(*arguments: str) -> str | None:
    """What git prints about the checkout; ``None`` where there is no checkout, no git, no repository or no commit."""
    if not IN_CHECKOUT:  # an environment may lie in a repository of something else
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_atomically(path: Path, data: bytes | str, *, synced: bool = False) -> None:
    """Write ``path`` so that it is there whole or not at all, whatever interrupts.

    With ``synced`` it is on the disk at the return, so that a power failure leaves it there as well.

    Raises:
        NtkbenchError: it cannot be written, as on a full disk; names the path and the reason.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}.half")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        half.write_bytes(data.encode() if isinstance(data, str) else data)
        if synced:
            sync(half)
        os.replace(half, path)
        if synced:
            sync(path.parent)
    except OSError as error:
        raise NtkbenchError(f"{path} cannot be written: {error.strerror or error}") from error
    finally:
        with contextlib.suppress(OSError):
            half.unlink(missing_ok=True)


def sync(path: Path) -> None:
    """Wait until a file, or the names in a folder, are on the disk. Windows has no such wait for folders."""
    try:
        descriptor = os.open(path, os.O_RDWR if path.is_file() else os.O_RDONLY)
    except PermissionError:
        if path.is_dir() and not hasattr(os, "O_DIRECTORY"):
            return
        raise
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
