"""UJI digits by writer, checked against the file's own arrays."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickbloom.common.datasets.uji import FILE, Uji, UjiOptions
from quickbloom.common.errors import DataError


@pytest.fixture(scope="session")
def arrays(data_dir: Path) -> dict[str, np.ndarray]:
    with np.load(data_dir / FILE, allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def uji(data_dir: Path) -> Uji:
    return Uji(UjiOptions.model_validate({}), data_dir)


def test_support_is_the_first_repetition_and_query_the_second(uji: Uji, arrays: dict[str, np.ndarray]) -> None:
    assert len(uji.tasks()) == 60
    for writer in (0, 31, 59):
        (draw,) = uji.test_draws(f"writer-{writer:02d}")
        for repetition, part in enumerate((draw.support, draw.query)):
            for image, digit in zip(part.x[:, 0], part.y, strict=True):
                row = (arrays["writer"] == writer) & (arrays["repetition"] == repetition) & (arrays["label"] == int(digit))
                assert np.array_equal((image * 255).round().numpy(), arrays["images"][row][0])


def test_training_swaps_repetitions_and_keeps_one_image_per_digit(uji: Uji) -> None:
    (fixed,) = uji.test_draws("writer-07")
    swapped = 0
    for seed in range(10):
        draw = uji.train_draw("writer-07", np.random.default_rng(seed))
        support, query = (part.x[part.y.argsort()] for part in (draw.support, draw.query))
        assert sorted(draw.support.y.tolist()) == sorted(draw.query.y.tolist()) == list(range(10))
        stays = (support == fixed.support.x).all(dim=(1, 2, 3)) & (query == fixed.query.x).all(dim=(1, 2, 3))
        swaps = (support == fixed.query.x).all(dim=(1, 2, 3)) & (query == fixed.support.x).all(dim=(1, 2, 3))
        assert (stays ^ swaps).all()
        swapped += int(swaps.sum())
    assert 20 < swapped < 80


def test_the_test_part_is_the_query_part_of_every_draw(uji: Uji) -> None:
    draw = uji.train_draw("writer-07", np.random.default_rng(0))
    assert torch.equal(draw.test.x, draw.query.x)


def test_augmenting_warps_training_a_little_and_testing_never(uji: Uji, data_dir: Path) -> None:
    augmented = Uji(UjiOptions(augment=True), data_dir)
    plain, warped = (d.train_draw("writer-07", np.random.default_rng(3)) for d in (uji, augmented))
    for before, after in ((plain.support.x, warped.support.x), (plain.query.x, warped.query.x)):
        assert not torch.equal(before, after)
        assert after.sum().item() == pytest.approx(before.sum().item(), rel=0.25)
        assert 0 <= after.min() <= after.max() <= 1
    assert torch.equal(augmented.test_draws("writer-07")[0].support.x, uji.test_draws("writer-07")[0].support.x)


def test_augmenting_moves_support_and_query_of_a_draw_alike(data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    augmented = Uji(UjiOptions(augment=True), data_dir)
    (fixed,) = augmented.test_draws("writer-07")
    twin = torch.full_like(fixed.support.x, 0.0)
    twin[:, :, 5:20, 5:12] = 1.0
    batch = fixed.support._replace(x=twin)
    monkeypatch.setitem(augmented._data, "writer-07", type(fixed)(batch, batch, batch))
    draw = augmented.train_draw("writer-07", np.random.default_rng(0))
    assert torch.equal(draw.support.x, draw.query.x)
    assert torch.equal(draw.support.x[0], draw.support.x[9])


def fake_file(folder: Path, **changes: Any) -> Path:
    writer, label, repetition = (index.ravel().astype(np.uint8) for index in np.indices((60, 10, 2)))
    arrays: dict[str, Any] = {
        "images": np.zeros((1200, 28, 28), np.uint8),
        "writer": writer,
        "label": label,
        "repetition": repetition,
    }
    np.savez_compressed(folder / FILE, **{**arrays, **changes})
    return folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": np.zeros((1200, 27, 28), np.uint8)}, "`images`.*shape"),
        ({"images": np.zeros((1200, 28, 28), np.float32)}, "`images`.*dtype"),
        ({"label": np.full(1200, 10, np.uint8)}, r"`label`.*values 0\.\.9, got 10"),
        ({"writer": np.full(1200, 60, np.uint8)}, r"`writer`.*values 0\.\.59, got 60"),
        ({"repetition": np.zeros(1200, np.uint8)}, "got 2 images of digit 0 by writer 0 in repetition 0"),
        ({"label": np.array([{}] * 1200)}, "not a readable"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, changes: dict[str, Any], complaint: str) -> None:
    Uji(UjiOptions.model_validate({}), fake_file(tmp_path))
    with pytest.raises(DataError, match=complaint):
        Uji(UjiOptions.model_validate({}), fake_file(tmp_path, **changes))
