"""Omniglot episodes, checked against the file's own arrays by looking images up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from quickbloom.common.datasets.omniglot import FILE, Omniglot, OmniglotOptions, distorted, fitted, warped
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData

Arrays = dict[str, np.ndarray]
Origin = dict[bytes, tuple[int, int]]


@pytest.fixture(scope="session")
def arrays(data_dir: Path) -> Arrays:
    with np.load(data_dir / FILE, allow_pickle=False) as archive:
        return dict(archive)


@pytest.fixture(scope="session")
def origin(arrays: Arrays) -> Origin:
    """(character, drawer) of every image; of the one duplicate the later."""
    return {image.tobytes(): (c, d) for c, drawn in enumerate(arrays["images"]) for d, image in enumerate(drawn)}


def build(data_dir: Path, **options: Any) -> Omniglot:
    return Omniglot(
        OmniglotOptions.model_validate({name.replace("_", "-"): value for name, value in options.items()}), data_dir
    )


def ink(batch: Batch) -> np.ndarray:
    return (batch.x[:, 0] * 255).round().to(torch.uint8).numpy()


def sources(batch: Batch, origin: Origin) -> list[tuple[int, int]]:
    return [origin[image.tobytes()] for image in ink(batch)]


def train_draws(dataset: Omniglot, task_id: str, count: int) -> list[TaskData]:
    return [dataset.train_draw(task_id, np.random.default_rng(seed)) for seed in range(count)]


def test_a_label_is_one_character_in_support_and_query_by_different_drawers(data_dir: Path, origin: Origin) -> None:
    dataset = build(data_dir, shots=2, query_shots=3)
    for draw in (*train_draws(dataset, "korean", 5), *dataset.test_draws("korean")):
        support, query = sources(draw.support, origin), sources(draw.query, origin)
        assert not set(support) & set(query)
        assert len({*support, *query}) == 5 * 5
        characters: dict[int, set[int]] = {}
        for label, (character, _) in zip([*draw.support.y.tolist(), *draw.query.y.tolist()], [*support, *query], strict=True):
            characters.setdefault(label, set()).add(character)
        assert sorted(map(len, characters.values())) == [1] * 5
        assert len(set.union(*characters.values())) == 5


def test_an_alphabet_task_draws_from_its_alphabet_only(data_dir: Path, arrays: Arrays, origin: Origin) -> None:
    dataset = build(data_dir)
    tasks = dataset.tasks()
    assert len(tasks) == 50
    for index in (0, 16, 49):
        for draw in train_draws(dataset, tasks[index].task_id, 3):
            assert {int(arrays["alphabet"][c]) for c, _ in sources(draw.support, origin)} == {index}


def test_labels_are_random_so_a_character_gets_several(data_dir: Path, origin: Origin) -> None:
    draws = train_draws(build(data_dir), "tagalog", 60)
    labels: dict[int, set[int]] = {}
    for draw in draws:
        for label, (character, _) in zip(draw.support.y.tolist(), sources(draw.support, origin), strict=True):
            labels.setdefault(character, set()).add(label)
    assert len(labels) == 17
    assert max(map(len, labels.values())) == 5


def test_drawer_groups_are_disjoint_and_grouped_by_alphabet(data_dir: Path, origin: Origin) -> None:
    dataset = build(data_dir, clients="alphabet-drawers", query_shots=4)
    tasks = dataset.tasks()
    assert len(tasks) == 200
    drawers = []
    for task in tasks[4:8]:
        assert task.group == tasks[4].group
        seen = [s for draw in train_draws(dataset, task.task_id, 4) for s in sources(draw.support, origin)]
        drawers.append({drawer for _, drawer in seen})
    assert [sorted(group) for group in drawers] == np.arange(20).reshape(4, 5).tolist()


def test_the_official_split_trains_on_background_alphabets(data_dir: Path) -> None:
    splits = [task.split for task in build(data_dir, official_split=True).tasks()]
    assert splits == ["train"] * 30 + ["test"] * 20
    assert {task.split for task in build(data_dir).tasks()} == {""}


def test_unstructured_clients_keep_to_their_part_of_the_published_split(data_dir: Path, arrays: Arrays, origin: Origin) -> None:
    dataset = build(data_dir, clients="unstructured", ways=20, validation_clients=3)
    counts: dict[str, int] = {}
    for task in dataset.tasks():
        counts[task.split] = counts.get(task.split, 0) + 1
    assert counts == {"train": 100, "validation": 3, "test": 50}
    for part, task_id in enumerate(["train-000", "validation-000", "test-000"]):
        for draw in dataset.test_draws(task_id):
            assert {int(arrays["vinyals_split"][c]) for c, _ in sources(draw.support, origin)} == {part}


def test_training_turns_whole_characters_and_testing_none(data_dir: Path, origin: Origin) -> None:
    dataset = build(data_dir, clients="unstructured", query_shots=2)
    seen = set()
    for draw in train_draws(dataset, "train-000", 20):
        images, labels = np.concatenate([ink(draw.support), ink(draw.query)]), torch.cat([draw.support.y, draw.query.y])
        for label in range(5):
            turns = {
                next(k for k in range(4) if np.rot90(image, -k).tobytes() in origin)
                for image in images[(labels == label).numpy()]
            }
            assert len(turns) == 1
            seen |= turns
    assert seen == {0, 1, 2, 3}
    assert all(sources(draw.support, origin) for draw in dataset.test_draws("test-000"))


def test_rotations_can_be_switched_off(data_dir: Path, origin: Origin) -> None:
    dataset = build(data_dir, clients="unstructured", rotations="off")
    assert all(sources(draw.support, origin) for draw in train_draws(dataset, "train-000", 20))


def test_an_episode_turned_together_is_one_alphabet_in_one_position(data_dir: Path, origin: Origin) -> None:
    dataset = build(data_dir, clients="alphabet", rotations="together", ways=10)
    seen = set()
    for draw in train_draws(dataset, "korean", 60):
        images = ink(draw.support)
        # Some characters look the same in two positions, ten never all do.
        fits = {
            (k, mirrored)
            for k in range(4)
            for mirrored in (False, True)
            if all(np.rot90(image[:, ::-1] if mirrored else image, -k).tobytes() in origin for image in images)
        }
        assert len(fits) == 1
        seen |= fits
    assert len(seen) == 8
    assert all(sources(draw.support, origin) for draw in dataset.test_draws("korean"))


def test_a_distorted_image_is_ink_between_zero_and_one_and_every_copy_differs(data_dir: Path) -> None:
    plain = build(data_dir).test_draws("latin")[0].support
    copies = Batch.of(plain.x[:1].expand(50, -1, -1, -1), plain.y[:1].expand(50))
    images = distorted(copies, np.random.default_rng(0)).x
    assert images.shape == copies.x.shape
    assert images.min() >= 0
    assert images.max() <= 1
    assert len({image.numpy().tobytes() for image in images}) == 50
    # Nothing of the character is lost: ink changes with its area alone, by at most 1 / 0.85 ** 2 and a little for the edges.
    share = images.sum(dim=(1, 2, 3)) / copies.x[0].sum()
    assert 0.6 < share.min() < share.max() < 1.5


def fixed(angle: float = 0, shear: float = 0, width: float = 1, height: float = 1, right: float = 0, down: float = 0) -> Any:
    """A "random" generator that draws these parameters for every image."""

    class Fixed:
        def uniform(self, low: Any, high: Any, size: tuple[int, int]) -> np.ndarray:
            return np.tile([angle, shear, width, height, right, down], (size[0], 1))

    return Fixed()


def test_distortion_by_nothing_keeps_the_images(data_dir: Path) -> None:
    batch = build(data_dir).test_draws("latin")[0].support
    same = distorted(batch, fixed())
    torch.testing.assert_close(same.x, batch.x, atol=1e-4, rtol=0)
    assert torch.equal(same.y, batch.y)


def test_distortion_moves_pixels_as_worked_out_by_hand() -> None:
    x = torch.zeros(1, 1, 28, 28)
    x[0, 0, 10, 20] = 1
    batch = Batch.of(x, torch.zeros(1, dtype=torch.int64))

    def ink_at(**parameters: float) -> tuple[int, int]:
        moved = distorted(batch, fixed(**parameters)).x[0, 0]
        return divmod(int(moved.argmax()), 28)

    # The new image is read two pixels further right and one further down: the ink goes left and up.
    assert ink_at(right=2, down=1) == (9, 18)
    # (10, 20) is 3.5 above and 6.5 right of the middle at (13.5, 13.5); a quarter turn takes it to 6.5 above and 3.5 left.
    assert ink_at(angle=np.pi / 2) == (7, 10)
    # Read at half the distance from the middle, the ink is at twice the distance: 6.5 * 2 = 13 right, at 26.5.
    assert ink_at(width=0.5) in {(10, 26), (10, 27)}


def test_distorted_draws_depend_on_the_generator_alone_and_leave_testing_alone(data_dir: Path) -> None:
    plain, dataset = build(data_dir), build(data_dir, distort=True)
    first, again = (dataset.train_draw("latin", np.random.default_rng(3)) for _ in range(2))
    other = dataset.train_draw("latin", np.random.default_rng(4))
    undistorted = plain.train_draw("latin", np.random.default_rng(3))
    for part in ("support", "query"):
        assert torch.equal(getattr(first, part).x, getattr(again, part).x)
        assert not torch.equal(getattr(first, part).x, getattr(other, part).x)
        # The same characters by the same drawers, moved a little: no pixel of ink is far from where it was.
        near = torch.nn.functional.max_pool2d(getattr(undistorted, part).x, 13, stride=1, padding=6)
        assert bool((near[getattr(first, part).x > 0.5] > 0).all())
    for a, b in zip(dataset.test_draws("latin"), plain.test_draws("latin"), strict=True):
        assert torch.equal(a.support.x, b.support.x)
        assert torch.equal(a.test.x, b.test.x)


def test_training_episodes_may_have_more_classes_than_testing_ones(data_dir: Path, origin: Origin) -> None:
    dataset = build(data_dir, clients="unstructured", rotations="off", ways=5, train_ways=12, query_shots=2)
    assert dataset.spec.outputs == 12
    draw = dataset.train_draw("train-000", np.random.default_rng(0))
    assert len({character for character, _ in sources(draw.support, origin)}) == 12
    assert set(draw.query.y.tolist()) == set(range(12))
    for held_out in dataset.test_draws("test-000"):
        assert held_out.support.y.tolist() == list(range(5))
        assert len(held_out.test.x) == 10


def test_announced_counts_are_those_of_the_draws(data_dir: Path) -> None:
    dataset = build(data_dir, clients="unstructured", train_ways=12, shots=2, query_shots=3)
    for task in dataset.tasks():
        train = dataset.train_draw(task.task_id, np.random.default_rng(0)) if task.split == "train" else None
        draw = train or dataset.test_draws(task.task_id)[0]
        assert (task.num_support, task.num_query) == (len(draw.support.x), len(draw.query.x))
        assert task.num_test == 15


def test_the_second_copy_of_the_duplicate_is_never_drawn(data_dir: Path, arrays: Arrays) -> None:
    images = arrays["images"]
    assert np.array_equal(images[191, 2], images[191, 18])
    name = build(data_dir).tasks()[int(arrays["alphabet"][191])].task_id
    dataset = build(data_dir, shots=1, query_shots=18)  # 19 images per character: all that character 191 has
    copies = 0
    for draw in train_draws(dataset, name, 40):
        found = [image.tobytes() for image in (*ink(draw.support), *ink(draw.query))]
        assert len(set(found)) == len(found)
        copies += images[191, 2].tobytes() in found
    assert copies > 0


def test_episodes_of_all_drawers_leave_out_the_character_with_a_copy(data_dir: Path, arrays: Arrays, origin: Origin) -> None:
    dataset = build(data_dir, shots=10, query_shots=10)
    name = dataset.tasks()[int(arrays["alphabet"][191])].task_id
    assert 191 not in {c for draw in train_draws(dataset, name, 40) for c, _ in sources(draw.support, origin)}


def test_images_are_ink_one_on_paper_zero(data_dir: Path) -> None:
    x = build(data_dir).test_draws("latin")[0].support.x
    assert (x.min().item(), x.max().item()) == (0.0, 1.0)
    assert x.mean() < 0.3


def test_more_ways_than_the_smallest_alphabet_has_characters_are_refused(data_dir: Path) -> None:
    build(data_dir, ways=14)
    with pytest.raises(DataError, match=r"`ways` must be at most 14.*got 15"):
        build(data_dir, ways=15)


def test_more_training_ways_than_the_smallest_training_alphabet_has_classes_are_refused(data_dir: Path) -> None:
    build(data_dir, ways=5, train_ways=14)
    with pytest.raises(DataError, match=r"`train-ways` must be at most 14.*got 15"):
        build(data_dir, ways=5, train_ways=15)
    build(data_dir, ways=5, train_ways=56, rotations="on")
    with pytest.raises(DataError, match=r"`train-ways` must be at most 56.*got 57"):
        build(data_dir, ways=5, train_ways=57, rotations="on")
    with pytest.raises(DataError, match=r"`ways` must be at most 14.*got 15"):
        build(data_dir, ways=15, train_ways=5)


def test_held_out_alphabets_need_not_have_the_training_ways(data_dir: Path) -> None:
    # Of the 30 background alphabets 6 have more than 40 characters; every evaluation alphabet has at least 20.
    splits = [t.split for t in build(data_dir, ways=5, train_ways=41, official_split=True, leave_out_small=True).tasks()]
    assert splits.count("test") == 20
    assert 0 < splits.count("train") < 30


def test_alphabets_that_are_too_small_are_left_out_if_asked(data_dir: Path) -> None:
    # 14, 14, 16 and 17 characters are the four alphabets below 20, all of them background alphabets.
    dataset = build(data_dir, ways=20, leave_out_small=True, official_split=True)
    splits = [task.split for task in dataset.tasks()]
    assert (splits.count("train"), splits.count("test")) == (26, 20)
    with pytest.raises(DataError, match=r"`ways` must be at most 14.*got 56"):
        build(data_dir, ways=56, leave_out_small=True)


@pytest.mark.parametrize(("clients", "most"), [("alphabet", 20), ("alphabet-drawers", 5), ("unstructured", 20)])
def test_more_shots_than_drawers_are_refused(data_dir: Path, clients: str, most: int) -> None:
    build(data_dir, clients=clients, query_shots=most - 1)
    with pytest.raises(DataError, match=rf"must be at most {most}.*got {most + 1}"):
        build(data_dir, clients=clients, shots=2, query_shots=most - 1)


def fake_file(folder: Path, **changes: Any) -> Path:
    """A file of the right form, all zero, with some arrays changed."""
    arrays: dict[str, Any] = {
        "images": np.zeros((1623, 20, 28, 28), np.uint8),
        "alphabet": np.zeros(1623, np.uint8),
        "alphabet_names": np.full(50, "x", "<U41"),
        "alphabet_is_background": np.zeros(50, bool),
        "vinyals_split": np.zeros(1623, np.uint8),
    }
    np.savez_compressed(folder / FILE, **{**arrays, **changes})
    return folder


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"images": np.zeros((10, 20, 28, 28), np.uint8)}, "`images`.*shape"),
        ({"images": np.zeros((1623, 20, 28, 28), np.float16)}, "`images`.*dtype"),
        ({"alphabet": np.full(1623, 50, np.uint8)}, r"`alphabet`.*values 0\.\.49, got 50"),
        ({"vinyals_split": np.full(1623, 3, np.uint8)}, r"`vinyals_split`.*values 0\.\.2, got 3"),
        ({"alphabet_names": np.array([None] * 50)}, "not a readable"),
    ],
)
def test_a_file_of_another_form_is_refused(tmp_path: Path, changes: Any, complaint: str) -> None:
    with pytest.raises(DataError, match=complaint):
        build(fake_file(tmp_path, **changes))


def test_a_missing_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"omniglot_28\.npz' does not exist"):
        build(tmp_path)


def test_warped_images_differ_are_ink_between_zero_and_one_and_keep_most_of_it(data_dir: Path) -> None:
    plain = build(data_dir).test_draws("latin")[0].support
    copies = Batch.of(plain.x[:1].expand(200, -1, -1, -1), plain.y[:1].expand(200))
    images = warped(copies, np.random.default_rng(0)).x
    assert images.min() >= 0
    assert images.max() <= 1
    assert len({image.numpy().tobytes() for image in images}) == 200
    share = images.sum(dim=(1, 2, 3)) / copies.x[0].sum()
    assert 0.2 < share.min() < 0.7
    assert 1.4 < share.max() < 3


class Drawn:
    """A "random" generator that draws these affine parameters, a net of shifts and a pen for every image."""

    def __init__(
        self, moves: tuple[float, ...] = (0,) * 6, net: np.ndarray | None = None, bend: float = 0, pen: float = 0
    ) -> None:
        self.moves, self.net, self.bend, self.pen = moves, net, bend, pen

    def uniform(self, low: Any, high: Any, size: tuple[int, ...]) -> np.ndarray:
        if len(size) == 2:
            return np.tile(self.moves, (size[0], 1))
        return np.full(size, self.pen if low < 0 else self.bend)

    def standard_normal(self, size: tuple[int, ...]) -> np.ndarray:
        return np.zeros(size) if self.net is None else np.broadcast_to(self.net, size)


def one_pixel(row: int, column: int) -> Batch:
    x = torch.zeros(1, 1, 28, 28)
    x[0, 0, row, column] = 1
    return Batch.of(x, torch.zeros(1, dtype=torch.int64))


def test_warping_by_nothing_keeps_the_images(data_dir: Path) -> None:
    batch = build(data_dir).test_draws("latin")[0].support
    torch.testing.assert_close(warped(batch, Drawn()).x, batch.x, atol=1e-4, rtol=0)  # type: ignore[arg-type]


def test_a_pen_goes_half_the_way_to_a_stroke_of_a_pixel_more_or_less() -> None:
    # A pixel of ink: with a pixel more on each side it is a square of nine, with one less it is gone.
    thick, thin = (warped(one_pixel(10, 20), Drawn(pen=pen)).x[0, 0] for pen in (0.5, -0.5))  # type: ignore[arg-type]
    expected = torch.zeros(28, 28)
    expected[9:12, 19:22] = 0.5
    expected[10, 20] = 1
    torch.testing.assert_close(thick, expected, atol=1e-4, rtol=0)
    torch.testing.assert_close(thin, one_pixel(10, 20).x[0, 0] / 2, atol=1e-4, rtol=0)


def test_bending_reads_pixels_where_the_net_was_moved_to() -> None:
    # All points of the net three pixels to the right and none down; a pixel is 2 / 28 of the image's width 2.
    net = np.stack([np.full((5, 5), 3.0), np.zeros((5, 5))])
    bent = warped(one_pixel(10, 20), Drawn(net=net, bend=2 / 28)).x[0, 0]  # type: ignore[arg-type]
    torch.testing.assert_close(bent, one_pixel(10, 17).x[0, 0], atol=1e-4, rtol=0)


def test_warped_draws_depend_on_the_generator_alone_and_leave_testing_alone(data_dir: Path) -> None:
    plain, dataset = build(data_dir), build(data_dir, warp=True)
    first, again = (dataset.train_draw("latin", np.random.default_rng(3)) for _ in range(2))
    assert torch.equal(first.support.x, again.support.x)
    assert torch.equal(first.query.x, again.query.x)
    assert not torch.equal(first.support.x, plain.train_draw("latin", np.random.default_rng(3)).support.x)
    for a, b in zip(dataset.test_draws("latin"), plain.test_draws("latin"), strict=True):
        assert torch.equal(a.support.x, b.support.x)


def box(image: np.ndarray) -> tuple[int, int, int, int]:
    """Top, bottom, left, right of what is darker than 0.3."""
    rows, columns = (np.flatnonzero((image > 76).any(axis=axis)) for axis in (1, 0))
    return rows[0], rows[-1], columns[0], columns[-1]


def test_fitted_ink_is_in_the_middle_and_as_large_as_it_may_be(arrays: Arrays) -> None:
    images = arrays["images"][::40].reshape(-1, 28, 28)
    for before, after in zip(images, fitted(images), strict=True):
        top, bottom, left, right = box(before)
        height, width = bottom - top + 1, right - left + 1
        scale = np.clip(24 / max(height, width), 0.8, 1.6)
        new = box(after)
        # Interpolation makes an edge lighter: it may end a pixel or two earlier or later.
        assert abs((new[0] + new[1]) / 2 - 13.5) <= 1.5
        assert abs((new[2] + new[3]) / 2 - 13.5) <= 1.5
        assert abs(new[1] - new[0] + 1 - height * scale * min(max(1, (width / height) ** 0.5), 1.5)) <= 3
        assert abs(new[3] - new[2] + 1 - width * scale * min(max(1, (height / width) ** 0.5), 1.5)) <= 3


def test_an_image_that_fits_stays_and_one_without_ink_does_too() -> None:
    square = np.zeros((2, 28, 28), dtype=np.uint8)
    square[0, 2:26, 2:26] = 255
    assert np.array_equal(fitted(square), square)


def test_fitted_episodes_are_of_the_same_characters_and_drawers(data_dir: Path, arrays: Arrays, origin: Origin) -> None:
    plain, fit = build(data_dir), build(data_dir, fit=True)
    all_fitted = fitted(arrays["images"])
    for a, b in zip(plain.test_draws("latin"), fit.test_draws("latin"), strict=True):
        expected = [all_fitted[source] for source in sources(a.support, origin)]
        assert np.array_equal(ink(b.support), np.stack(expected))
