"""Labelled images: the handwritten digits that ship with scikit-learn, MNIST's test file, and a part of CIFAR-10.

Labels are int64 numbers from 0; images are float32. Networks are trained on some images, and kernels are computed on
others, which are held out.
"""

from __future__ import annotations

import functools
import gzip
import io
import struct
from pathlib import Path
from typing import Literal

import numpy as np

from ntkbench import paths
from ntkbench.data.files import DataFile

HELD_OUT = 512
"""Images of scikit-learn's digits that no network is trained on."""
MNIST_TRAINING = 9_000
"""Images of MNIST's test file that networks are trained on; the last 1,000 are held out."""
MNIST_TEST = 10_000
CIFAR_SIZES = {"train": 500, "test": 200}
"""Images of each class in the part of CIFAR-10."""
MEAN, DEVIATION = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
"""Mean and standard deviation that normalise CIFAR-10's channels in [0, 1], as in the training of its networks."""

Labelled = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
"""Training images and labels, held-out images and labels."""


@functools.cache
def digits() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The 1797 images of 8x8 pixels of ``sklearn.datasets.load_digits`` (UCI's test set of optical recognition).

    They are split at random with a fixed seed.

    Returns:
        Training images ``[1285, 64]``, training labels ``[1285]`` and held-out images ``[512, 64]``, in [0, 1].
    """
    return digits_with_labels()[:3]


@functools.cache
def digits_with_labels() -> Labelled:
    """:func:`digits`, and the labels ``[512]`` of the held-out images as a fourth array."""
    from sklearn.datasets import load_digits

    data = load_digits()
    images, labels = (data.data / 16).astype(np.float32), data.target.astype(np.int64)
    shuffled = np.random.default_rng(0).permutation(len(images))
    held_out, training = shuffled[:HELD_OUT], shuffled[HELD_OUT:]
    return images[training], labels[training], images[held_out], labels[held_out]


def mnist() -> Labelled:
    """The 10,000 images of 28x28 pixels of MNIST's test file (LeCun et al. 1998), in its order.

    The training file is not used, so that the problem only needs the small test file. A download has the same images:
    the last 10,000 of OpenML's ``mnist_784``, through ``sklearn.datasets.fetch_openml``.

    Returns:
        Training images ``[9000, 784]`` in [0, 1] and labels ``[9000]``; held-out images ``[1000, 784]`` and labels.

    Raises:
        BadInput, Unavailable, Corrupt: see :class:`ntkbench.data.files.DataFile`.
    """
    pixels, labels = (file.read(_idx) for file in MNIST)
    images = (pixels.reshape(MNIST_TEST, -1) / 255).astype(np.float32)
    labels, cut = labels.astype(np.int64), MNIST_TRAINING
    return images[:cut], labels[:cut], images[cut:], labels[cut:]


def _idx(file: Path) -> np.ndarray:
    """An array of bytes in MNIST's own format: two zeros, the type, the number of axes, their sizes, the entries."""
    data = gzip.decompress(file.read_bytes())
    zeros, kind, axes = struct.unpack(">HBB", data[:4])
    shape = struct.unpack(f">{axes}I", data[4 : 4 + 4 * axes])
    if (zeros, kind) != (0, 8) or shape[0] != MNIST_TEST:
        raise ValueError(f"it does not hold {MNIST_TEST:,} entries of bytes")
    return np.frombuffer(data, np.uint8, offset=4 + 4 * axes).reshape(shape)


def _fetch_mnist(folder: Path) -> None:
    from sklearn.datasets import fetch_openml

    data = fetch_openml("mnist_784", version=1, as_frame=False, parser="liac-arff", n_retries=1)
    pixels, labels = data.data[-MNIST_TEST:].reshape(-1, 28, 28), data.target[-MNIST_TEST:]
    for file, array in zip(MNIST, (pixels, labels), strict=True):
        header = struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape)
        entries = header + array.astype(np.uint8).tobytes()
        paths.write_atomically(folder / file.name, gzip.compress(entries, mtime=0))


MNIST = (
    DataFile("mnist/t10k-images-idx3-ubyte.gz", "MNIST", "MNIST's test images, gzipped idx", _fetch_mnist),
    DataFile(
        "mnist/t10k-labels-idx1-ubyte.gz", "MNIST", "the labels of MNIST's test images, gzipped idx", _fetch_mnist
    ),
)
"""MNIST's test file: images and labels."""


def cifar10(part: Literal["train", "test"]) -> tuple[np.ndarray, np.ndarray]:
    """Images of CIFAR-10 (Krizhevsky 2009), 32x32 pixels, classes in turn: 500 per class for training, or 200 held out.

    If the file was made from JPEG copies, pixels differ slightly from those of the original. torchvision fetches the
    original, whose digest makes it another problem.

    Returns:
        Images ``[5000, 3, 32, 32]`` or ``[2000, 3, 32, 32]``, channels in [0, 1] minus :data:`MEAN`, divided by
        :data:`DEVIATION`; labels.

    Raises:
        BadInput, Unavailable, Corrupt: see :class:`ntkbench.data.files.DataFile`.
    """
    pixels, labels = CIFAR10.read(functools.partial(_cifar_arrays, part))
    return normalised(pixels), labels.astype(np.int64)


def normalised(pixels: np.ndarray) -> np.ndarray:
    """Bytes ``[N, 32, 32, 3]`` as the float32 images ``[N, 3, 32, 32]`` that networks take."""
    images = (pixels / 255 - np.array(MEAN)) / np.array(DEVIATION)
    return np.ascontiguousarray(images.transpose(0, 3, 1, 2), np.float32)


def _cifar_arrays(part: str, file: Path) -> tuple[np.ndarray, np.ndarray]:
    N = 10 * CIFAR_SIZES[part]
    with np.load(file) as stored:
        pixels, labels = stored[f"x_{part}"], stored[f"y_{part}"]
    if (pixels.shape, pixels.dtype, labels.shape) != ((N, 32, 32, 3), np.uint8, (N,)):
        raise ValueError(f"x_{part} is not [{N}, 32, 32, 3] of bytes with as many labels")
    return pixels, labels


def _fetch_cifar10(folder: Path) -> None:
    """The first images of each class, from the files that torchvision fetches."""
    from torchvision.datasets import CIFAR10 as Original  # noqa: N811

    arrays: dict[str, np.ndarray] = {}
    for part, each in CIFAR_SIZES.items():
        data = Original(str(folder / "cifar10" / "original"), train=part == "train", download=True)
        labels = np.array(data.targets)
        chosen = np.stack([np.flatnonzero(labels == label)[:each] for label in range(10)], 1).ravel()
        arrays |= {f"x_{part}": data.data[chosen], f"y_{part}": labels[chosen].astype(np.uint8)}
    made = io.BytesIO()
    np.savez_compressed(made, allow_pickle=False, **arrays)
    paths.write_atomically(folder / CIFAR10.name, made.getvalue())


CIFAR10 = DataFile(
    "cifar10/cifar10_subset.npz",
    "CIFAR-10",
    "x_train [5000, 32, 32, 3], y_train, x_test [2000, 32, 32, 3] and y_test in bytes, classes in turn; or install "
    "torchvision, which fetches it",
    _fetch_cifar10,
)
"""The part of CIFAR-10."""
