"""Locations of files: in a checkout, or in the user's folders if the package is installed from a wheel."""

from __future__ import annotations

import contextlib
import os
import subprocess
import tempfile
from pathlib import Path

import platformdirs

from ntkbench.errors import BadInput, NtkbenchError, Unavailable

ROOT = Path(__file__).resolve().parents[2]
"""The checkout that this package is imported from. Meaningless without one, see :func:`checkout`."""

IN_CHECKOUT = Path(__file__).resolve().parents[1].name == "src"
"""Whether this package lies in a checkout, not among installed packages."""

REFERENCE = ROOT / "results" / "reference"
"""Committed: exact values, trained weights, published values, measured tables."""

PUBLISHED = REFERENCE / "published"
"""Values read off the papers' figures, with source and accuracy."""

VARIABLE = "NTKBENCH_CACHE"
"""The environment variable that names the folder of :func:`cache`."""


def checkout(what: str) -> Path:
    """The checkout.

    Args:
        what: what needs the checkout; begins the message.

    Raises:
        Unavailable: the package is installed without one.
    """
    if not IN_CHECKOUT:
        folder = Path(__file__).resolve().parent
        raise Unavailable(f"{what} needs a checkout of ntkbench's repository, and {folder} is not in one; run it there")
    return ROOT


def cache() -> Path:
    """Folder for files that can be recreated: ``$NTKBENCH_CACHE``, else ``results/cache`` in the checkout.

    Without a checkout it is ``ntkbench`` in the user's cache folder, such as ``~/.cache`` or ``~/Library/Caches``. The
    path is absolute, so that processes in other folders can be given it.
    """
    if given := os.environ.get(VARIABLE):
        return Path(given).absolute()
    return ROOT / "results" / "cache" if IN_CHECKOUT else platformdirs.user_cache_path("ntkbench", appauthor=False)


def python_path(root: Path = ROOT) -> str:
    """``$PYTHONPATH`` for processes of a checkout: its own folders, then those in this process's ``$PYTHONPATH``."""
    given = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    return os.pathsep.join(dict.fromkeys([str(root), str(root / "src"), *map(os.path.abspath, given)]))


def check_folder(folder: Path) -> None:
    """Check that a folder exists or can be created, as far as possible without writing.

    Raises:
        BadInput: its path, or a parent of it, is not a folder.
    """
    there = next(path for path in (folder, *folder.parents) if path.exists())
    if not there.is_dir():
        raise BadInput(f"the results folder {folder} cannot be written to: {there} is not a folder")


def writable(folder: Path, name: str = "the results folder") -> Path:
    """The folder, created if it does not exist, and checked to be writable.

    Raises:
        BadInput: it cannot be written to; the message calls it ``name``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        raise BadInput(f"{name} {folder} cannot be written to: {error.strerror}") from None
    return folder


def check_output(path: Path, *, folder: bool = False) -> None:
    """Check that a file, or with ``folder`` the files of a folder, can be written; leaves nothing behind.

    Raises:
        BadInput: they cannot be written.
    """
    above = [*([path] if folder else []), *path.absolute().parents]
    there = next((each for each in above if os.path.exists(each)), path)
    try:
        with tempfile.TemporaryFile(dir=there):
            pass
    except OSError as error:
        raise BadInput(f"{path} cannot be written: {error.strerror}: {there}") from None


def git(*arguments: str) -> str | None:
    """Output of git for the checkout; ``None`` if there is no checkout, no git, no repository or no commit."""
    if not IN_CHECKOUT:  # an environment may lie in another repository
        return None
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return None
    return done.stdout.strip()


def write_atomically(path: Path, data: bytes | str, *, synced: bool = False) -> None:
    """Write ``path`` completely or not at all, even if the process is interrupted.

    With ``synced`` the file is on disk on return, so that it also survives a power failure.

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
    """Wait until a file, or the names in a folder, are on disk. Windows cannot wait for folders."""
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
