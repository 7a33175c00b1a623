"""Digits by device, checked against scikit-learn's own targets."""

import subprocess
import sys
import types
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from quickbloom.common.datasets.digits import Digits, DigitsOptions, _read
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import TaskData

UPRIGHT = {"rotation": 0, "shear": 0}


def build(**options: object) -> Digits:
    return Digits(DigitsOptions.model_validate({name.replace("_", "-"): value for name, value in options.items()}), Path())


def draws(dataset: Digits) -> list[TaskData]:
    return [dataset.test_draws(task.task_id)[0] for task in dataset.tasks()]


def images_and_labels(draw: TaskData) -> tuple[torch.Tensor, torch.Tensor]:
    parts = (draw.support, draw.query, draw.test)
    return torch.cat([part.x for part in parts]), torch.cat([part.y for part in parts])


def key(image: np.ndarray) -> bytes:
    """An image as whole numbers 0..16."""
    return bytes(np.rint(image).astype(np.uint8))


@pytest.fixture(scope="module")
def true_digit() -> dict[bytes, int]:
    """scikit-learn's target of every image; all 1,797 images differ."""
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    return {key(image): int(target) for image, target in zip(bunch.images, bunch.target, strict=True)}


def vocabulary(draw: TaskData, true_digit: dict[bytes, int]) -> dict[int, set[int]]:
    """Which true digits stand behind each label of an upright device."""
    x, y = images_and_labels(draw)
    found: dict[int, set[int]] = {}
    for image, label in zip(x, y, strict=True):
        found.setdefault(int(label), set()).add(true_digit[key(16 * image.numpy())])
    return found


def test_every_label_of_a_device_means_one_digit_in_all_parts(true_digit: dict[bytes, int]) -> None:
    for draw in draws(build(**UPRIGHT)):
        meaning = vocabulary(draw, true_digit)
        assert sorted(meaning) == [0, 1, 2, 3, 4]
        assert all(len(digits) == 1 for digits in meaning.values())
        assert len(set.union(*meaning.values())) == 5


def test_every_digit_is_in_the_vocabulary_of_28_devices(true_digit: dict[bytes, int]) -> None:
    known = [digit for draw in draws(build(**UPRIGHT)) for digit in set.union(*vocabulary(draw, true_digit).values())]
    assert np.bincount(known).tolist() == [28] * 10


def test_the_same_digit_has_different_labels_on_different_devices(true_digit: dict[bytes, int]) -> None:
    seven = {label for draw in draws(build(**UPRIGHT)) for label, digits in vocabulary(draw, true_digit).items() if 7 in digits}
    assert seven == {0, 1, 2, 3, 4}


def test_no_image_is_on_two_devices_or_twice_on_one() -> None:
    x = torch.cat([images_and_labels(draw)[0] for draw in draws(build(**UPRIGHT))])
    assert len({image.numpy().tobytes() for image in x}) == len(x) == 56 * 30


def test_every_part_has_two_images_per_class() -> None:
    for draw in draws(build()):
        for part in (draw.support, draw.query, draw.test):
            assert torch.bincount(part.y).tolist() == [2] * 5


def test_training_redraws_never_use_a_test_image() -> None:
    dataset = build()
    test = {image.numpy().tobytes() for image in dataset.test_draws("device-00")[0].test.x}
    for seed in range(20):
        draw = dataset.train_draw("device-00", np.random.default_rng(seed))
        assert torch.bincount(draw.support.y).tolist() == [2] * 5
        assert not test & {image.numpy().tobytes() for image in torch.cat([draw.support.x, draw.query.x])}


def test_a_device_turns_all_its_images_alike() -> None:
    """Undo the warp that maps the first upright image onto the first turned one: it must undo the others, too."""
    upright, turned = build(**UPRIGHT), build(shear=0)
    before, after = (images_and_labels(d.test_draws("device-03")[0])[0][:, 0].numpy() for d in (upright, turned))
    grid = np.stack(np.meshgrid(np.arange(8), np.arange(8), indexing="ij"), -1) - 3.5

    def error(degrees: float, image: int) -> float:
        """Distance between the turned image and the upright one read at turned coordinates, on the inner disc, bilinearly."""
        c, s = np.cos(np.deg2rad(degrees)), np.sin(np.deg2rad(degrees))
        at = grid @ np.array([[c, -s], [s, c]]).T + 3.5
        inside = (grid**2).sum(-1) < 3**2
        low = np.clip(np.floor(at).astype(int), 0, 6)
        (f, g), (i, j) = np.moveaxis(at - low, -1, 0), np.moveaxis(low, -1, 0)
        picture = before[image]
        top = (1 - g) * picture[i, j] + g * picture[i, j + 1]
        bottom = (1 - g) * picture[i + 1, j] + g * picture[i + 1, j + 1]
        return float(np.abs((1 - f) * top + f * bottom - after[image])[inside].max())

    angles = np.arange(-45, 45, 0.25)
    best = min(angles, key=lambda angle: error(angle, 0))
    assert abs(best) > 1
    assert max(error(best, image) for image in range(30)) < 0.02


def test_a_device_shears_all_its_images_alike() -> None:
    """A shear moves column j of every image down by s * (j - 3.5); linear between pixels, and empty beyond the edge."""
    before, after = (
        images_and_labels(d.test_draws("device-03")[0])[0][:, 0].numpy() for d in (build(**UPRIGHT), build(rotation=0))
    )

    def error(shear: float, image: int) -> float:
        rows = np.arange(8.0)
        columns = [np.interp(rows + shear * (j - 3.5), rows, before[image, :, j], left=0, right=0) for j in range(8)]
        return float(np.abs(np.stack(columns, axis=1) - after[image]).mean())

    best = min(np.arange(-0.3, 0.3, 0.001), key=lambda shear: error(shear, 0))
    assert abs(best) > 0.01
    assert max(error(best, image) for image in range(30)) < 0.005


def test_images_stay_within_zero_and_one() -> None:
    x = torch.cat([images_and_labels(draw)[0] for draw in draws(build(rotation=180, shear=1))])
    assert 0 <= x.min() <= x.max() <= 1


def test_a_missing_scikit_learn_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "sklearn", None)
    with pytest.raises(DataError, match=r"pip install 'quickbloom\[datasets\]'"):
        build()


def test_images_and_digits_are_those_of_scikit_learn_without_importing_it() -> None:
    code = "import sys; from quickbloom.common.datasets import digits; digits._read(); print('sklearn' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "False", done.stderr
    bunch = pytest.importorskip("sklearn.datasets").load_digits()
    images, digits = _read()
    assert images.dtype == np.float32
    assert np.array_equal(images, (bunch.images / 16).astype(np.float32))
    assert np.array_equal(digits, bunch.target)


def test_an_installation_without_the_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = types.SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr("importlib.util.find_spec", lambda name: found)
    with pytest.raises(DataError, match=r"digits.csv.gz' cannot be read .*: install scikit-learn anew"):
        build()


@pytest.mark.parametrize(("option", "value"), [("rotation", -1), ("rotation", 181), ("shear", 1.5), ("shear", float("nan"))])
def test_slants_out_of_bounds_are_refused(option: str, value: float) -> None:
    with pytest.raises(ValidationError, match=option):
        build(**{option: value})
