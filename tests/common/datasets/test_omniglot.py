"""Omniglot episodes, checked against the file's own arrays by looking images up."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from common.batch import Batch, TaskData
from common.datasets.omniglot import FILE, Omniglot, OmniglotOptions
from common.errors import DataError

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
