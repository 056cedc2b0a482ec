"""Files of weights and exact values, with a checksum, so that a damaged file is detected and never used.

Committed files are below ``results/reference``; everything else is a cache, and can be regenerated.
"""

from __future__ import annotations

import hashlib
import io
import json
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from ntkbench import paths
from ntkbench.errors import Corrupt, summary
from ntkbench.problem import hash_arrays


def write(path: Path, content: Mapping[str, Any]) -> None:
    """Write a record (``.json``) or arrays by name (``.npz``), atomically and with a checksum.

    Raises:
        NtkbenchError: the file cannot be written.
    """
    if path.suffix == ".json":
        record = {**content, "checksum": _checksum_of_record(content)}
        paths.write_atomically(path, json.dumps(record, indent=1) + "\n")
    else:
        file = io.BytesIO()
        np.savez_compressed(file, **content, checksum=np.array(_checksum_of_arrays(content)))
        paths.write_atomically(path, file.getvalue())


def read(path: Path) -> dict[str, Any] | None:
    """The content of a file, or ``None`` if there is none. A damaged cache file is logged and counts as none.

    Raises:
        Corrupt: the file is committed and damaged.
    """
    if not path.exists():
        return None
    try:
        return parse(path)
    except Corrupt as error:
        if path.is_relative_to(paths.REFERENCE):
            raise Corrupt(f"{error}; restore the committed file, or delete it to recreate it") from error
        logging.getLogger("ntkbench").warning("%s; it is recreated", error)
        return None


def parse(path: Path) -> dict[str, Any]:
    """The content of an existing file.

    Raises:
        Corrupt: it cannot be read, has another format, or its content does not match its checksum.
    """
    try:
        content = _record(path) if path.suffix == ".json" else _arrays(path)
        checksum = str(content.pop("checksum", "missing"))
        whole = checksum == (_checksum_of_record if path.suffix == ".json" else _checksum_of_arrays)(content)
    except Exception as error:  # the parsers of both formats raise nearly every kind of exception
        raise Corrupt(f"{path} is damaged: {summary(error)}") from error
    if not whole:
        raise Corrupt(f"{path} is damaged: its content does not match its checksum")
    return content


def _record(path: Path) -> dict[str, Any]:
    record = json.loads(path.read_bytes())
    if not isinstance(record, dict):
        raise ValueError(f"it holds a {type(record).__name__}, not a record")
    return record


def _arrays(path: Path) -> dict[str, np.ndarray]:
    with np.load(io.BytesIO(path.read_bytes())) as arrays:
        return {name: arrays[name] for name in arrays.files}


def _checksum_of_record(record: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()[:16]


def _checksum_of_arrays(arrays: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    hash_arrays(digest, arrays)
    return digest.hexdigest()[:16]
