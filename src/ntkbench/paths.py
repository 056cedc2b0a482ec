"""Where things lie in a checkout."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

from ntkbench.errors import BadInput, NtkbenchError

ROOT = Path(__file__).resolve().parents[2]
"""The checkout that this package is installed from (editable)."""

REFERENCE = ROOT / "results" / "reference"
"""Committed: exact values, trained weights, published values, measured tables."""

PUBLISHED = REFERENCE / "published"
"""Values read off the papers' figures, with source and accuracy."""


def cache() -> Path:
    """Folder for what can be made again: ``$NTKBENCH_CACHE``, else ``results/cache`` in the checkout."""
    return Path(os.environ.get("NTKBENCH_CACHE") or ROOT / "results" / "cache")


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
    """What git prints about the checkout; ``None`` where there is no git, no repository or no commit."""
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
    """Wait until a file, or the names in a folder, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
