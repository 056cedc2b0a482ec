"""Handwritten digits, from scikit-learn (ships with it) and from OpenML (MNIST)."""

from __future__ import annotations

import functools
import socket

import numpy as np

from ntkbench.errors import Unavailable

HELD_OUT = 512


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """scikit-learn's 1797 images of 8x8: training images, training labels, 512 held-out images, pixels in [0, 1]."""
    return digits_with_labels()[:3]


@functools.cache
def digits_with_labels() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """:func:`digits` and the labels of the held-out images."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _split((data.data / 16).astype(np.float32), data.target.astype(np.int64))


@functools.cache
def mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MNIST's 70,000 images of 28x28 through scikit-learn's OpenML loader, split as :func:`digits`.

    Raises:
        Unavailable: the images are neither in scikit-learn's data folder nor can they be fetched.
    """
    from sklearn.datasets import fetch_openml

    patience = socket.getdefaulttimeout()
    socket.setdefaulttimeout(10)
    try:
        data = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff", n_retries=1)
    except Exception as error:  # the loader lets URL, HTTP, socket and parser errors through as they are
        raise Unavailable(
            "MNIST is not in scikit-learn's data folder and could not be fetched from OpenML "
            f"({type(error).__name__}: {error})"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return _split((data.data / 255).astype(np.float32), data.target.astype(np.int64))[:3]


def _split(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shuffled = np.random.default_rng(0).permutation(len(images))
    held_out, training = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    return images[training], labels[training], images[held_out], labels[held_out]
