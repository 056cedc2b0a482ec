"""Handwritten digits: scikit-learn's small ones, which ship with it, and MNIST from OpenML.

Images are rows of pixels in [0, 1], float32; labels are the digits 0 to 9, int64. Both sets are split at random, with
the same seed every time: 512 held-out images, on which kernels are taken, and all others for training.
"""

from __future__ import annotations

import functools
import socket

import numpy as np

from ntkbench.errors import Unavailable, summary

HELD_OUT = 512
"""Images that no network is trained on."""


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 1797 images of 8x8 pixels of ``sklearn.datasets.load_digits`` (UCI's test set of optical recognition).

    Returns:
        Training images ``[1285, 64]``, training labels ``[1285]`` and held-out images ``[512, 64]``.
    """
    return digits_with_labels()[:3]


@functools.cache
def digits_with_labels() -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """:func:`digits`, and the labels ``[512]`` of the held-out images as a fourth array."""
    from sklearn.datasets import load_digits

    data = load_digits()
    return _split((data.data / 16).astype(np.float32), data.target.astype(np.int64))


@functools.cache
def mnist() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """MNIST's 70,000 images of 28x28 pixels, ``mnist_784`` of OpenML through ``sklearn.datasets.fetch_openml``.

    Returns:
        Training images ``[69488, 784]``, training labels ``[69488]`` and held-out images ``[512, 784]``.

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
            f"MNIST is not in scikit-learn's data folder and could not be fetched from OpenML ({summary(error)})"
        ) from error
    finally:
        socket.setdefaulttimeout(patience)
    return _split((data.data / 255).astype(np.float32), data.target.astype(np.int64))[:3]


def _split(images: np.ndarray, labels: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    shuffled = np.random.default_rng(0).permutation(len(images))
    held_out, training = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    return images[training], labels[training], images[held_out], labels[held_out]
