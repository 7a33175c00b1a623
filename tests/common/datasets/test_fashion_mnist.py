"""Fashion-MNIST from its own files, of Debian where they are installed, and the reader of their format."""

import gzip
from pathlib import Path

import numpy as np
import pytest

from quickbloom.common.datasets.fashion_mnist import CLASSES, DEBIAN, FashionMnist, FashionMnistOptions, find, parse_idx
from quickbloom.common.errors import DataError
from quickbloom.common.partition import Partition

FILE = Path("x")


def idx(array: np.ndarray) -> bytes:
    """The format as http://yann.lecun.com/exdb/mnist says it: 0, 0, 8 for bytes, the axes, their lengths, the bytes."""
    header = bytes([0, 0, 8, array.ndim]) + b"".join(length.to_bytes(4, "big") for length in array.shape)
    return header + array.astype(np.uint8).tobytes()


def write(folder: Path, *, packed: bool = True) -> np.ndarray:
    """Write 200 training and 100 test images; the first pixel says which image it is, the second its class."""
    folder.mkdir()
    images, labels = np.zeros((300, 28, 28), dtype=np.uint8), np.arange(300) % 10
    images[:, 0, 0], images[:, 0, 1], images[:, 0, 2] = np.arange(300) % 256, labels, np.arange(300) // 256
    for part, rows in (("train", slice(200)), ("t10k", slice(200, 300))):
        for name, array in (("images-idx3", images[rows]), ("labels-idx1", labels[rows])):
            content = idx(array)
            (folder / f"{part}-{name}-ubyte{'.gz' if packed else ''}").write_bytes(
                gzip.compress(content) if packed else content
            )
    return images


def dataset(folder: Path, text: str = "iid", users: int = 5) -> FashionMnist:
    options = FashionMnistOptions().spread_by(Partition(text, users))
    assert isinstance(options, FashionMnistOptions)
    return FashionMnist(options, folder)


@pytest.mark.parametrize("packed", [True, False])
def test_all_images_of_both_files_are_with_one_user_each(tmp_path: Path, packed: bool) -> None:
    images = write(tmp_path / "fashion-mnist", packed=packed)
    found = dataset(tmp_path)
    seen = []
    for task in found.tasks():
        data = found.test_draws(task.task_id)[0]
        for part in (data.support, data.query, data.test):
            pixels = (part.x.numpy() * 0.5 + 0.5) * 255
            seen += np.rint(pixels[:, 0, 0, 0] + 256 * pixels[:, 0, 0, 2]).astype(int).tolist()
            assert np.array_equal(np.rint(pixels[:, 0, 0, 1]), part.y.numpy())  # the label stays with its image
    assert sorted(seen) == list(range(len(images)))


def test_pixels_are_between_minus_one_and_one(tmp_path: Path) -> None:
    write(tmp_path / "fashion-mnist")
    x = dataset(tmp_path).test_draws("user-00")[0].support.x
    assert x.min() == -1
    assert abs(float(x[:, 0, 0, 1].max()) - (9 / 255 - 0.5) / 0.5) < 1e-6


def test_files_in_the_data_directory_come_before_those_of_debian(tmp_path: Path) -> None:
    write(tmp_path / "fashion-mnist")
    assert find(tmp_path) == tmp_path / "fashion-mnist"


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0\0\x08",
        idx(np.zeros((2, 3)))[:-1],
        idx(np.zeros((2, 3))) + b"\0",
        b"\0\0\x0d" + idx(np.zeros((2, 3)))[3:],
        idx(np.zeros(6)),
    ],
    ids=["empty", "cut header", "cut", "longer", "floats", "other axes"],
)
def test_a_damaged_file_is_refused(content: bytes) -> None:
    with pytest.raises(DataError, match="must be in idx format with 2 axes of bytes, and is not"):
        parse_idx(content, 2, FILE)


def test_a_huge_claim_costs_no_memory() -> None:
    with pytest.raises(DataError, match="idx format"):
        parse_idx(bytes([0, 0, 8, 2]) + b"\xff" * 8, 2, FILE)


def test_labels_that_do_not_belong_to_the_images_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "fashion-mnist")
    labels = tmp_path / "fashion-mnist" / "train-labels-idx1-ubyte.gz"
    labels.write_bytes(gzip.compress(idx(np.zeros(7))))
    with pytest.raises(DataError, match=r"must be \[7, 28, 28\], one for each label, got \[200, 28, 28\]"):
        dataset(tmp_path)
    labels.write_bytes(gzip.compress(idx(np.full(200, 10))))
    with pytest.raises(DataError, match=r"must be 0\.\.9, got 10"):
        dataset(tmp_path)
    labels.write_bytes(b"no gzip")
    with pytest.raises(DataError, match="cannot be read"):
        dataset(tmp_path)


def test_missing_files_are_told_with_what_to_install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("quickbloom.common.datasets.fashion_mnist.DEBIAN", tmp_path / "debian")
    with pytest.raises(DataError, match="apt-get install dataset-fashion-mnist"):
        dataset(tmp_path)


@pytest.mark.skipif(not DEBIAN.is_dir(), reason="needs the package dataset-fashion-mnist")
def test_the_published_images_are_7000_of_each_class() -> None:
    found = dataset(Path("does-not-exist"), "dirichlet:0.1", 20).holdings()
    assert found is not None
    assert found.counts.sum(axis=(0, 2)).tolist() == [7000] * len(CLASSES)
    assert found.classes[9] == "ankle-boot"
