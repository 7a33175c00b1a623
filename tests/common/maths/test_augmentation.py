"""Images that vary in training: what a shift and a mirror do, who is told that there are no images, and what never varies."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.augmentation import Augmentation, read_augmentation, turned
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.messaging.in_process_grid import InlineGrid


def images(number: int, seed: int = 0) -> Tensor:
    return torch.rand(number, 2, 5, 4, generator=torch.Generator().manual_seed(seed))


def draw(*sizes: int) -> TaskData:
    return TaskData(*(Batch.of(images(size, seed), torch.arange(size)) for seed, size in enumerate(sizes)))


def moved(image: Tensor, down: int, right: int, *, mirrored: bool) -> Tensor:
    """One image [channels, height, width], pixel by pixel: first mirrored, as one that looks at it would, then shifted."""
    channels, height, width = image.shape
    found = torch.empty_like(image)
    for row in range(height):
        for column in range(width):
            from_row, from_column = min(max(row - down, 0), height - 1), min(max(column - right, 0), width - 1)
            found[:, row, column] = image[:, from_row, width - 1 - from_column if mirrored else from_column]
    assert channels == 2
    return found


@pytest.mark.parametrize(("shift", "flip"), [(2, True), (3, False), (0, True)])
def test_every_image_is_one_of_those_that_it_may_be(shift: int, flip: bool) -> None:
    data = draw(40, 9, 3)
    found = Augmentation(shift, flip).of(data, np.random.default_rng(1))
    seen = set()
    for before, after in ((data.support, found.support), (data.query, found.query)):
        assert torch.equal(before.y, after.y)
        assert torch.equal(before.weight, after.weight)
        assert (after.x.shape, after.x.dtype, after.x.is_contiguous()) == (before.x.shape, before.x.dtype, True)
        for image, other in zip(before.x, after.x, strict=True):
            every = [
                (down, right, mirrored)
                for down in range(-shift, shift + 1)
                for right in range(-shift, shift + 1)
                for mirrored in ((False, True) if flip else (False,))
            ]
            alike = [how for how in every if torch.equal(moved(image, *how[:2], mirrored=how[2]), other)]
            assert alike
            seen.add(alike[0])
    assert {mirrored for _, _, mirrored in seen} == ({False, True} if flip else {False})
    assert min(down for down, _, _ in seen) == -shift
    assert max(right for _, right, _ in seen) == shift
    assert found.test is data.test
    assert torch.equal(data.support.x, images(40, 0))


def test_a_shift_repeats_the_border_by_hand() -> None:
    class Fixed:
        """Down by one and left by two, and no mirror."""

        def integers(self, low: int, high: int, size: tuple[int, ...]) -> Any:
            return np.array([1, -2]).reshape(2, 1, 1)

    image = torch.arange(12.0).reshape(1, 1, 3, 4)
    data = TaskData(*(Batch.of(image, torch.zeros(1)) for _ in range(3)))
    found = Augmentation(2).of(data, Fixed()).support.x  # type: ignore[arg-type]
    assert found[0, 0].tolist() == [[2, 3, 3, 3], [2, 3, 3, 3], [6, 7, 7, 7]]


def test_an_empty_task_stays_empty() -> None:
    assert Augmentation(1, True, 5).of(draw(0, 0, 1), np.random.default_rng(0)).support.x.shape == (0, 2, 5, 4)


def test_a_quarter_turn_is_anticlockwise_and_exact() -> None:
    image = images(1)[:, :, :4]
    assert turned(image, torch.tensor([0.0])).sub(image).abs().max() < 1e-6
    for quarters in (1, 2, 3):
        expected = torch.rot90(image, quarters, (2, 3))
        assert turned(image, torch.tensor([90.0 * quarters])).sub(expected).abs().max() < 1e-5


@pytest.mark.parametrize("degrees", [7.0, -31.0, 120.0])
def test_a_turn_is_that_of_scipy(degrees: float) -> None:
    """scipy maps every pixel [row, column] to matrix @ pixel + offset; the centre is to stay."""
    ndimage = pytest.importorskip("scipy.ndimage")
    picture = images(2, 5)
    angle = np.deg2rad(degrees)
    matrix = np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    centre = np.array([2.0, 1.5])  # of 5 rows and 4 columns
    found = turned(picture, torch.tensor([0.0, degrees]))
    for channel in range(2):
        expected = ndimage.affine_transform(
            picture[1, channel].numpy(), matrix, centre - matrix @ centre, order=1, mode="nearest", output=np.float64
        )
        np.testing.assert_allclose(found[1, channel].numpy(), expected, atol=1e-5)


def test_turned_images_are_the_others_turned_by_different_angles() -> None:
    """The same draws without turning come first, so that the images are those of a setting without it, then turned."""
    data = draw(30, 30, 3)
    rng = np.random.default_rng(4)
    found = Augmentation(2, True, 20).of(data, rng)
    again = np.random.default_rng(4)
    straight = Augmentation(2, True)._varied(data.support, again).x
    angles = again.uniform(-20, 20, size=30)
    assert angles.std() > 5
    torch.testing.assert_close(found.support.x, turned(straight, torch.from_numpy(angles)))
    assert found.support.x.dtype == torch.float32
    assert found.test is data.test


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("shift:2,flip", Augmentation(2, True)),
        ("flip", Augmentation(0, True)),
        ("flip, shift:10", Augmentation(10, True)),
        ("rotate:10", Augmentation(0, False, 10)),
        ("rotate:180,shift:1,flip", Augmentation(1, True, 180)),
    ],
)
def test_what_the_setting_says(text: str, expected: Augmentation) -> None:
    assert read_augmentation(text) == expected
    assert parse_run_config({"augment": text}).augment == text


@pytest.mark.parametrize(
    "text", ["shift", "shift:0", "shift:-1", "shift:2.5", "shift:2,shift:3", "flip,flip", "rotate:0", "turn:5", ","]
)
def test_another_setting_is_refused(text: str) -> None:
    assert read_augmentation("") is None
    with pytest.raises(ConfigError, match='`augment` must be "", "shift:2" for'):
        parse_run_config({"augment": text})


def test_more_than_half_a_turn_is_refused() -> None:
    with pytest.raises(ConfigError, match="the turn of `augment` must be at most 180 degrees either way, got 181"):
        parse_run_config({"augment": "rotate:181"})


SMALL: dict[str, Any] = {
    "dataset": "digits",
    "min-nodes": 1,
    "rounds": 2,
    "evaluate-every": 1,
    "adapt-steps": 1,
    "adapt-lrs": "0.1",
    "personal": False,
}


def run(path: Path, nodes: int = 1, **settings: Any) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """History and summary."""
    config = parse_run_config({**SMALL, "output-dir": str(path), **{k.replace("_", "-"): v for k, v in settings.items()}})
    run_federation(InlineGrid(nodes, config.flat(), {}), config)
    lines = (path / "history.jsonl").read_text().splitlines()
    return [json.loads(line) for line in lines], json.loads((path / "summary.json").read_text())


def test_training_alone_sees_it_and_does_not_depend_on_nodes(tmp_path: Path) -> None:
    """The server's steps are so small that the model stays: scores are then those of the images as they are."""
    still: dict[str, Any] = {"algorithm": "fedavg", "fedavg.outer-lr": 1e-30}
    plain, as_they_are = run(tmp_path / "plain", **still)
    one, varied = run(tmp_path / "one", **still, augment="shift:2,flip,rotate:10")
    four, _ = run(tmp_path / "four", 4, **still, augment="shift:2,flip,rotate:10")
    for part in ("test", "validation", "seen", "baselines"):
        assert varied[part] == as_they_are[part]
    losses = [[line["train"]["loss"] for line in lines] for lines in (plain, one, four)]
    assert losses[1] == pytest.approx(losses[2], abs=1e-6)
    assert all(abs(a - b) > 1e-4 for a, b in zip(losses[0], losses[1], strict=True))


@pytest.mark.parametrize(
    ("settings", "said"),
    [
        (
            {"dataset": "gaussian", "augment": "flip"},
            r"`augment` must be \"\" for examples of shape \(.*,\), which are no images",
        ),
        ({"augment": "shift:8"}, "the shift of `augment` must be below 8, the shorter side of these images, got 8"),
    ],
)
def test_data_that_it_does_not_fit_are_refused(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=said):
        run(tmp_path / "run", **settings)
