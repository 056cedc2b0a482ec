"""Data files: the places searched and their order, and an error of one line if files are missing."""

from __future__ import annotations

import gzip
import struct
import sys
import types

import numpy as np
import pytest

from ntkbench import problems
from ntkbench.data import images, pretrained, text
from ntkbench.data.files import DataFile
from ntkbench.errors import BadInput, Corrupt, Unavailable
from ntkbench.measure import fingerprints


@pytest.fixture
def places(tmp_path, monkeypatch):
    """The user's folder and the cache, both empty."""
    given, cache = tmp_path / "given", tmp_path / "cache" / "data"
    given.mkdir()
    cache.mkdir(parents=True)
    monkeypatch.setenv("NTKBENCH_DATA", str(given))
    monkeypatch.setenv("NTKBENCH_CACHE", str(tmp_path / "cache"))
    yield given, cache
    problems.load.cache_clear()


def put(folder, name, data):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(data)


def idx(array):
    return gzip.compress(struct.pack(f">HBB{array.ndim}I", 0, 8, array.ndim, *array.shape) + array.tobytes())


def digits(count=images.MNIST_TEST):
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (count, 28, 28), np.uint8), rng.integers(0, 10, count, np.uint8)


def test_the_users_folder_comes_first_then_the_cache_then_a_download(places, monkeypatch):
    given, cache = places
    file = DataFile("a/b.txt", "B", "a text", lambda folder: put(folder, "a/b.txt", b"fetched"))
    found = [file.here(), file.path().read_bytes()]
    assert found == [None, b"fetched"] and file.here() == cache / "a/b.txt"
    put(given, "a/b.txt", b"given")
    assert file.path() == given / "a/b.txt"
    monkeypatch.delenv("NTKBENCH_DATA")
    assert file.path() == cache / "a/b.txt"


@pytest.mark.parametrize("label", ["mnist_mlp", "resnet20_cifar", "resnet56_cifar", "transformer_small"])
def test_missing_data_are_one_line_that_says_how_to_provide_them(places, label, monkeypatch):
    monkeypatch.setitem(sys.modules, "torchvision", None)
    with pytest.raises(Unavailable, match=r"not found: there is no .* in \$NTKBENCH_DATA or .*cache/data") as error:
        problems.load(label)
    assert "provide it there" in str(error.value) and "\n" not in str(error.value)


def test_a_failed_download_is_reported_with_its_cause(places, monkeypatch):
    def refused(*_, **__):
        raise ValueError("the page says\n\n<html>")

    monkeypatch.setattr("sklearn.datasets.fetch_openml", refused)
    with pytest.raises(
        Unavailable, match=r"could not be fetched \(ValueError: the page says\); provide it there \(MNIST"
    ):
        images.mnist()


def test_a_variable_that_names_no_folder_is_refused(places, monkeypatch):
    monkeypatch.setenv("NTKBENCH_DATA", "/nowhere")
    with pytest.raises(BadInput, match=r"\$NTKBENCH_DATA must name a folder; got '/nowhere'"):
        text.characters()


@pytest.mark.parametrize(
    ("file", "read"),
    [
        (images.MNIST[0], images.mnist),
        (images.CIFAR10, lambda: images.cifar10("test")),
        (pretrained.RESNETS[20], lambda: pretrained.resnet(20)),
        (text.TINY_SHAKESPEARE, text.characters),
    ],
)
def test_a_damaged_file_is_one_line(places, file, read):
    put(places[0], file.name, b"\xff\x00")
    with pytest.raises(Corrupt, match=f"given/{file.name} is damaged, or is not ") as error:
        read()
    assert "\n" not in str(error.value)


def test_a_file_with_another_number_of_images_is_not_mnist(places):
    put(places[0], images.MNIST[0].name, idx(digits(60)[0]))
    with pytest.raises(Corrupt, match="it does not hold 10,000 entries of bytes"):
        images.mnist()


def test_mnist_is_its_test_file_and_a_download_gives_the_same(places, monkeypatch):
    pixels, labels = digits()
    given, cache = places
    for file, array in zip(images.MNIST, (pixels, labels), strict=True):
        put(given, file.name, idx(array))
    found = images.mnist()
    assert [array.shape for array in found] == [(9000, 784), (9000,), (1000, 784), (1000,)]
    np.testing.assert_array_equal(np.concatenate(found[::2]), pixels.reshape(-1, 784) / np.float32(255))
    np.testing.assert_array_equal(np.concatenate(found[1::2]), labels)
    definition = problems.define("mnist_mlp[N=5]")
    assert sum(w.numel() for w in definition.module.parameters()) == 269_322
    np.testing.assert_array_equal(definition.x, found[2][:5])
    np.testing.assert_array_equal(definition.training.arrays()["x"], found[0])

    first = np.zeros((30, 784))  # of the training file, which comes first
    data = types.SimpleNamespace(
        data=np.concatenate([first, pixels.reshape(-1, 784).astype(np.float64)]),
        target=np.array(["0"] * 30 + [str(label) for label in labels], "O"),
    )
    asked = []
    monkeypatch.setattr("sklearn.datasets.fetch_openml", lambda *args, **kwargs: asked.append((args, kwargs)) or data)
    monkeypatch.delenv("NTKBENCH_DATA")
    for one, other in zip(found, images.mnist(), strict=True):
        np.testing.assert_array_equal(one, other)
    ((name,), options) = asked[0]
    assert (name, options["version"], len(asked)) == ("mnist_784", 1, 1), "both files come from one download"
    assert images.MNIST[0].here() == cache / images.MNIST[0].name


def test_cifar_from_torchvision_has_the_first_images_of_each_class_in_turn(places, monkeypatch):
    def original(root, train, download):
        rng = np.random.default_rng(train)
        targets = rng.permutation(np.repeat(np.arange(10), 510 if train else 210))
        return types.SimpleNamespace(
            data=rng.integers(0, 256, (len(targets), 32, 32, 3), np.uint8), targets=list(targets)
        )

    module = types.SimpleNamespace(CIFAR10=original)
    monkeypatch.setitem(sys.modules, "torchvision", types.SimpleNamespace(datasets=module))
    monkeypatch.setitem(sys.modules, "torchvision.datasets", module)
    x, y = images.cifar10("test")
    assert x.shape == (2000, 3, 32, 32) and x.dtype == np.float32 and images.cifar10("train")[0].shape[0] == 5000
    np.testing.assert_array_equal(y, np.tile(np.arange(10), 200))
    whole = original("", False, True)
    third = whole.data[whole.targets.index(2)]
    red, blue = (third[..., c] / 255 for c in (0, 2))
    np.testing.assert_allclose(x[2, 0], (red - 0.485) / 0.229, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(x[2, 2], (blue - 0.406) / 0.225, rtol=1e-5, atol=1e-6)


def test_text_is_cut_into_windows_and_their_next_characters():
    pieces, after = text.windows(np.arange(10), 3)
    assert pieces.tolist() == [[0, 1, 2], [3, 4, 5], [6, 7, 8]] and (after == pieces + 1).all()
    assert len(text.windows(np.arange(9), 3)[0]) == 2  # nothing follows the last character


def test_text_is_encoded_as_places_in_its_alphabet(places):
    put(places[0], text.TINY_SHAKESPEARE.name, b"abac\nabcab")
    known, held_out, alphabet = text.characters()
    assert alphabet == "\nabc" and known.tolist() == [1, 2, 1, 3, 0, 1, 2, 3, 1] and held_out.tolist() == [2]


def test_a_download_of_text_is_checked_by_its_digest(places, monkeypatch):
    def download(url, target, hash_prefix, progress):
        assert hash_prefix == text.SHA256 and url.startswith("https://")
        put(places[1], text.TINY_SHAKESPEARE.name, b"ab")

    monkeypatch.setattr("torch.hub.download_url_to_file", download)
    assert text.characters()[2] == "ab"


def test_rows_are_measured_again_when_their_data_change(places):
    given, _ = places
    file, labels = images.MNIST[0], ("mnist_mlp", "digits_mlp")
    before = [fingerprints.problem(label) for label in labels]
    put(given, file.name, b"one")
    there = [fingerprints.problem(label) for label in labels]
    put(given, file.name, b"another")
    after = [fingerprints.problem(label) for label in labels]
    assert len({before[0], there[0], after[0]}) == 3 and len({before[1], there[1], after[1]}) == 1
