"""A kernel in a file, written rectangle by rectangle, so that interrupted computations resume.

The file is in NumPy's npy format and has its full size from the start. Beside it, ``<name>.progress`` says which kernel
it holds and how many rectangles are complete. The progress file is replaced as a whole, after the data that it
describes are on disk. However the process ends, at most one rectangle is computed again.
"""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkbench import paths
from ntkbench.errors import BadInput, NtkbenchError, one_line
from ntkbench.operators.ranges import row_ranges

try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]

FORMAT = 1
"""Version of the progress file."""

SHARE = 8
"""A rectangle fills at most 1 / SHARE of the memory; the rest is for computing it."""

STRIP = 64
"""Rows of a rectangle that are copied to contiguous memory at a time."""

BINARY = getattr(os, "O_BINARY", 0)
"""Without it, Windows writes a line feed as two bytes."""

File = str | os.PathLike[str]
Rectangle = tuple[slice, slice]


class KernelFile:
    """A kernel ``[N1 * K, N2 * K]`` in a file, and its missing parts.

    Nothing is written before the first rectangle. The file then gets its full size, so that the disk cannot fill up
    later. Only one process at a time can write to it, except on systems without ``flock``, such as Windows, where
    nothing checks that.

    Args:
        file: the path.
        identity: what the kernel depends on, by name; a file with another kernel is refused.
        samples: N1 and N2.
        K: rows per sample.
        dtype: type of the entries.
        symmetric: whether the kernel is symmetric, so that rectangles above the diagonal mirror those below it.
        memory: available bytes; a rectangle takes a share of them.

    Raises:
        BadInput: the path cannot be used: it holds something else or is damaged, its folder cannot be written to, or
            the kernel does not fit on its disk.
    """

    def __init__(
        self,
        file: File,
        identity: Mapping[str, object],
        samples: tuple[int, int],
        K: int,
        dtype: str,
        *,
        symmetric: bool,
        memory: int,
    ) -> None:
        if not isinstance(file, str | os.PathLike) or not str(file):
            raise BadInput(f"file must be a path, got {one_line(repr(file))}")
        self.path = Path(file).absolute()
        self._progress = self.path.with_name(f"{self.path.name}.progress")
        self._identity: dict[str, object] = json.loads(json.dumps(identity))
        self._shape, self._dtype = (samples[0] * K, samples[1] * K), np.dtype(dtype)
        self._most = max(1, math.isqrt(memory // SHARE // self._dtype.itemsize))
        self._samples, self._K, self._symmetric = samples, K, symmetric
        self._done, self._parts = 0, self._rectangles()
        self._descriptor: int | None = None
        if self.path.exists() or self.path.is_symlink():
            self._resume(memory)
            if self._done < len(self._parts):
                self._descriptor = self._opened()
                try:
                    self._resume(memory)  # another process may have written to it before the lock
                except BaseException:
                    self.__exit__()
                    raise
        else:
            paths.writable(self.path.parent, f"the folder of file={str(file)!r},")
            self._check_space()

    def _rectangles(self) -> list[Rectangle]:
        rows, columns = (row_ranges(N, self._K, self._most) for N in self._samples)
        return [(r, c) for i, r in enumerate(rows) for c in (rows[: i + 1] if self._symmetric else columns)]

    def __enter__(self) -> KernelFile:
        return self

    def __exit__(self, *_: object) -> None:
        """Let other processes write to the file."""
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None

    def missing(self) -> Iterator[Rectangle]:
        """Rows and columns of the rectangles that are still to be written, in order."""
        yield from self._parts[self._done :]

    def write(self, rows: slice, columns: slice, part: np.ndarray) -> None:
        """Write the next rectangle of :meth:`missing`; it is on disk on return.

        Raises:
            BadInput: another process writes to the file.
            NtkbenchError: it cannot be written, as on a full disk.
        """
        assert (rows, columns) == self._parts[self._done]
        try:
            if self._descriptor is None:
                self._descriptor = self._created()
            self._put(self._descriptor, rows, columns, part)
            if self._symmetric and rows != columns:
                self._put(self._descriptor, columns, rows, part.T)
            os.fsync(self._descriptor)
        except OSError as error:
            raise NtkbenchError(
                f"{self.path} cannot be written: {error.strerror or error}; repeat the call to resume"
            ) from error
        self._note(self._done + 1)

    def result(self) -> np.memmap[Any, Any]:
        """The kernel as a read-only memory map."""
        return np.lib.format.open_memmap(self.path, mode="r")

    def _resume(self, memory: int) -> None:
        """Find out how much of the file is complete.

        Raises:
            BadInput: it is not a complete file of this kernel.
        """
        new = "name another file, or remove this one"
        try:
            noted = json.loads(self._progress.read_text(encoding="utf-8"))
            form, of, most, done = noted["format"], dict(noted["of"]), int(noted["most"]), int(noted["done"])
        except FileNotFoundError:
            raise BadInput(f"{self.path} already exists, but {self._progress.name} does not: {new}") from None
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise BadInput(f"{self._progress} cannot be read ({type(error).__name__}): {new}") from None
        if form != FORMAT:
            raise BadInput(f"{self.path} was begun by another version of ntkbench: {new}")
        if of != self._identity:
            key = next(key for key in {**self._identity, **of} if of.get(key) != self._identity.get(key))
            what = f"{key} {of.get(key)}, not {self._identity.get(key)}" if key in READABLE else f"other {key}"
            raise BadInput(f"{self.path} holds another kernel ({what}): {new}")
        if not self._is_whole():
            raise BadInput(f"{self.path} is damaged, or not the npy file that was begun: {new}")
        needed = most**2 * self._dtype.itemsize * SHARE // 2
        if memory < needed:
            raise BadInput(f"{self.path} was begun with more memory: give at least memory={needed}, or {new}")
        self._most, self._done = most, done
        self._parts = self._rectangles()
        if not 0 <= done <= len(self._parts):
            raise BadInput(f"{self._progress} cannot be read ({done} of {len(self._parts)} parts): {new}")

    def _is_whole(self) -> bool:
        try:
            mapped = np.lib.format.open_memmap(self.path, mode="r")
        except (OSError, ValueError):
            return False
        size = mapped.offset + mapped.nbytes
        found = mapped.shape, mapped.dtype, mapped.flags.c_contiguous, self.path.stat().st_size
        return found == (self._shape, self._dtype, True, size)

    def _check_space(self) -> None:
        needed, free = self._shape[0] * self._shape[1] * self._dtype.itemsize, shutil.disk_usage(self.path.parent).free
        if needed > free:
            raise BadInput(
                f"the kernel, {self._shape[0]} x {self._shape[1]} entries in {self._dtype}, takes "
                f"{needed / 2**30:.3g} GiB, but only {free / 2**30:.3g} GiB are free in {self.path.parent}: name a "
                "file on another disk"
            )

    def _created(self) -> int:
        """Create the file at its full size under a temporary name, then rename it."""
        half = self.path.with_name(f".{self.path.name}.half")
        descriptor = os.open(half, os.O_RDWR | os.O_CREAT | BINARY, 0o666)
        try:
            self._lock(descriptor)
            if self.path.exists():
                raise BadInput(f"{self.path} was created by another process in the meantime: name another file")
            try:
                os.ftruncate(descriptor, 0)
                header = {"descr": self._dtype.str, "fortran_order": False, "shape": self._shape}
                with open(os.dup(descriptor), "wb") as stream:
                    np.lib.format.write_array_header_1_0(stream, header)
                _reserve(descriptor, os.fstat(descriptor).st_size + math.prod(self._shape) * self._dtype.itemsize)
                os.fsync(descriptor)
                self._note(0)
                if fcntl is None:  # Windows does not rename open files
                    os.close(descriptor)
                    descriptor = -1
                os.rename(half, self.path)
                if fcntl is None:
                    descriptor = self._opened()
            except BaseException:
                half.unlink(missing_ok=True)
                raise
            paths.sync(self.path.parent)
        except BaseException:
            if descriptor != -1:
                os.close(descriptor)
            raise
        return descriptor

    def _opened(self) -> int:
        try:
            descriptor = os.open(self.path, os.O_RDWR | BINARY)
        except OSError as error:
            raise BadInput(f"{self.path} cannot be written to: {error.strerror}") from None
        try:
            self._lock(descriptor)
        except BaseException:
            os.close(descriptor)
            raise
        return descriptor

    def _lock(self, descriptor: int) -> None:
        """Keep other processes from writing; the lock is released when the process ends, for any reason."""
        if fcntl is None:
            return
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BadInput(
                f"{self.path} is being written by another process: wait for it, or name another file"
            ) from None
        except OSError:  # a file system without locks
            return

    def _put(self, descriptor: int, rows: slice, columns: slice, part: np.ndarray) -> None:
        item, width = self._dtype.itemsize, self._shape[1]
        header = os.fstat(descriptor).st_size - math.prod(self._shape) * item
        for first in range(0, len(part), STRIP):
            strip = np.ascontiguousarray(part[first : first + STRIP], self._dtype)
            for i, row in enumerate(strip, rows.start + first):
                _write_at(descriptor, memoryview(row).cast("B"), header + (i * width + columns.start) * item)

    def _note(self, done: int) -> None:
        record = {"format": FORMAT, "of": self._identity, "most": self._most, "done": done, "parts": len(self._parts)}
        paths.write_atomically(self._progress, json.dumps(record, indent=1) + "\n", synced=True)
        self._done = done


READABLE = ("kernel", "dtype", "samples", "outputs", "seed", "tf32")
"""Parts of an identity that messages show; the rest are hashes."""


def _reserve(descriptor: int, size: int) -> None:
    """Set the size of a file, and reserve space on disk if the system can do that."""
    os.ftruncate(descriptor, size)
    if hasattr(os, "posix_fallocate"):
        try:
            os.posix_fallocate(descriptor, 0, size)
        except OSError as error:
            if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
                raise


def _write_at(descriptor: int, data: memoryview, offset: int) -> None:
    while data:
        if hasattr(os, "pwrite"):
            count = os.pwrite(descriptor, data, offset)
        else:  # Windows
            os.lseek(descriptor, offset, os.SEEK_SET)
            count = os.write(descriptor, data)
        data, offset = data[count:], offset + count
