"""Several views of a picture behind an encoder: what they show, who sees them, and that each is encoded once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_encoders
from PIL import Image

from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.datasets.own.files.pictures import Cuts, Picture, PictureFiles
from quickbloom.common.encoders import load_encoder
from quickbloom.common.encoders.onnx_file import OnnxEncoder
from quickbloom.common.errors import DataError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_encoder.cache_clear()


def halves(folder: Path, side: int = 40) -> Path:
    """Pictures of two tasks and classes: red on the left and blue on the right, or the other way round; each is unique."""
    for task in "AB":
        for label in ("left", "right"):
            for number in range(6):
                pixels = np.zeros((side, side, 3), dtype=np.uint8)
                red, blue = (0, 2) if label == "left" else (2, 0)
                pixels[:, : side // 2, red], pixels[:, side // 2 :, blue] = 255, 255
                pixels[0, 0, 1] = 10 * number + (100 if task == "B" else 0)
                place = folder / task / label / f"{number}.png"
                place.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels).save(place)
    return folder


def own(folder: Path, encoder: Path, **options: Any) -> Own:
    return Own(OwnOptions(path=str(folder), encoder=f"onnx:{encoder}", **options), Path())


@pytest.fixture
def encoder(tmp_path: Path) -> Path:
    return small_encoders.picture_onnx(tmp_path / "colours.onnx")


def test_training_draws_among_views_and_tests_see_the_picture(tmp_path: Path, encoder: Path) -> None:
    folder = halves(tmp_path / "pictures")
    plain, found = own(folder, encoder), own(folder, encoder, encoder_views=4)
    for part in ("support", "query", "test"):
        theirs, ours = getattr(plain.test_draws("A")[0], part), getattr(found.test_draws("A")[0], part)
        assert theirs.x.equal(ours.x)
    rows = []
    for seed in range(20):
        draw, before = (one.train_draw("A", np.random.default_rng(seed)) for one in (found, plain))
        assert draw.support.y.tolist() == before.support.y.tolist() or len(draw.support.y) == len(before.support.y)
        assert draw.test.x.equal(before.test.x)
        rows += [draw.support.x.numpy(), draw.query.x.numpy()]
    x = np.concatenate(rows)
    # A share r of red gives the mean (2 r - 1, -1, 1 - 2 r) after normalising. A side of at least sqrt(1/2) shows a share of
    # red between (0.707 - 0.5) / 0.707 and 0.5 / 0.707, so |2 r - 1| <= 0.414; scaling to eight pixels moves that a little.
    np.testing.assert_allclose(x[:, 0], -x[:, 2], atol=0.05)
    moved = np.abs(x[:, 0] / x[:, 1])
    assert moved.max() <= 0.5
    assert 0.1 < (moved < 0.02).mean() < 0.9  # the picture itself, about once in four


def test_a_draw_is_that_of_its_seed_on_every_machine(tmp_path: Path, encoder: Path) -> None:
    folder = halves(tmp_path / "pictures")
    one, other = (own(folder, encoder, encoder_views=3) for _ in range(2))
    draws = [each.train_draw("B", np.random.default_rng(7)) for each in (one, other)]
    assert draws[0].support.x.equal(draws[1].support.x)
    assert draws[0].query.x.equal(draws[1].query.x)


def test_each_view_of_a_training_task_is_encoded_once_and_of_others_none(
    tmp_path: Path, encoder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = halves(tmp_path / "pictures")
    seen: list[int] = []
    plain = OnnxEncoder.encode

    def noted(self: OnnxEncoder, examples: Any) -> Any:
        seen.extend(range(len(examples)))
        return plain(self, examples)

    first = own(folder, encoder, encoder_views=4)
    union = len(np.concatenate(first.rows["A"][:2]))
    monkeypatch.setattr(OnnxEncoder, "encode", noted)
    first.train_draw("A", np.random.default_rng(0))
    assert len(seen) == 3 * union  # three cuts each; the pictures themselves were encoded when they were read
    first.train_draw("A", np.random.default_rng(1))
    again = own(folder, encoder, encoder_views=4)
    again.train_draw("A", np.random.default_rng(0))
    assert len(seen) == 3 * union


class Noise(PictureFiles):
    """Pictures of noise, of which a part can be found again."""

    def __init__(self) -> None:
        self.picture: Picture = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        self.asked = 0

    def __len__(self) -> int:
        return 1

    def key(self, at: int) -> bytes:
        return b"0123456789abcdef"

    def get(self, at: int, shorter: int) -> Picture:
        self.asked = shorter
        return self.picture


def is_part(cut: Picture, of: Picture) -> bool:
    height, width = cut.shape[:2]
    places = ((top, left) for top in range(of.shape[0] - height + 1) for left in range(of.shape[1] - width + 1))
    return any(np.array_equal(of[top : top + height, left : left + width], cut) for top, left in places)


def test_a_cut_is_a_part_of_the_picture_in_its_shape_and_half_are_mirrored_if_that_is_wanted() -> None:
    noise = Noise()
    upright = [Cuts(noise, 10, view, flips=False).get(0) for view in range(1, 21)]
    assert all(is_part(cut, noise.picture) for cut in upright)
    assert all(cut.shape[0] * cut.shape[1] >= 0.5 * 600 - 20 for cut in upright)  # whole pixels
    assert all(abs(cut.shape[1] / cut.shape[0] - 1.5) < 0.1 for cut in upright)
    assert len({cut.tobytes() for cut in upright}) > 15
    assert noise.asked == 15  # a half of it has still 10 pixels
    either = [Cuts(noise, 10, view, flips=True).get(0) for view in range(1, 21)]
    mirrored = [is_part(cut[:, ::-1], noise.picture) and not is_part(cut, noise.picture) for cut in either]
    assert 4 <= sum(mirrored) <= 16
    assert all(is_part(cut, noise.picture) for cut, turned in zip(either, mirrored, strict=True) if not turned)


def test_views_are_kept_in_the_order_of_time(tmp_path: Path, encoder: Path) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (24, 9, 9, 3), dtype=np.uint8)
    path = tmp_path / "pictures.npz"
    np.savez(path, image=pixels, task=["A"] * 12 + ["B"] * 12, label=["x", "y"] * 12, when=np.arange(24.0))
    found = own(path, encoder, encoder_views=3, time_column="when", features="image")
    plain = own(path, encoder, time_column="when", features="image")
    draw, fixed = (one.train_draw("A", np.random.default_rng(0)) for one in (found, plain))
    assert draw.support.y.equal(fixed.support.y)
    assert draw.query.y.equal(fixed.query.y)
    assert not draw.support.x.equal(fixed.support.x)


@pytest.mark.parametrize(("encoded", "said"), [(True, "reads no pictures"), (False, "there is no encoder")])
def test_views_of_what_is_no_picture_are_refused(tmp_path: Path, encoded: bool, said: str) -> None:
    path = small_encoders.sentences(tmp_path / "said.csv", "AB")
    options: dict[str, Any] = {"path": str(path), "task_column": "user", "encoder_views": 2}
    if encoded:
        options |= {"encoder": f"onnx:{small_encoders.text_onnx(tmp_path / 'words.onnx')[0]}", "text": "said"}
    with pytest.raises(DataError, match=rf"`own\.encoder-views` must be 1 here, where .*{said}.*got 2"):
        Own(OwnOptions(**options), Path())
