"""Text as characters: Shakespeare's plays from Karpathy's char-rnn, 1.1 million characters, 65 of them distinct."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from ntkbench.data.files import DataFile

TRAINING_SHARE = 0.9
"""Share of the text, from its beginning, for training; the rest is held out."""
URL = "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt"
SHA256 = "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed"


def _fetch(folder: Path) -> None:
    from torch.hub import download_url_to_file

    file = folder / TINY_SHAKESPEARE.name
    file.parent.mkdir(parents=True, exist_ok=True)
    download_url_to_file(URL, str(file), hash_prefix=SHA256, progress=False)


TINY_SHAKESPEARE = DataFile("text/tinyshakespeare.txt", "The text tinyshakespeare", URL, _fetch)


@functools.cache
def _characters(file: Path, modified: int) -> tuple[np.ndarray, str]:
    text = file.read_text(encoding="utf-8")
    alphabet = "".join(sorted(set(text)))
    numbers = {character: i for i, character in enumerate(alphabet)}
    return np.array([numbers[character] for character in text]), alphabet


def characters() -> tuple[np.ndarray, np.ndarray, str]:
    """The text as int64 numbers of characters: the training part, the held-out part, and the alphabet.

    Returns:
        ``[1003854]``, ``[111540]`` and the 65 characters in the order of their numbers.

    Raises:
        BadInput, Unavailable, Corrupt: see :class:`ntkbench.data.files.DataFile`.
    """
    numbers, alphabet = TINY_SHAKESPEARE.read(lambda file: _characters(file, file.stat().st_mtime_ns))
    cut = int(TRAINING_SHARE * len(numbers))
    return numbers[:cut], numbers[cut:], alphabet


def windows(numbers: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
    """A text cut into pieces of T characters, ``[N, T]``, and for each character the one that follows, ``[N, T]``."""
    N = (len(numbers) - 1) // T
    return numbers[: N * T].reshape(N, T).copy(), numbers[1 : N * T + 1].reshape(N, T).copy()
