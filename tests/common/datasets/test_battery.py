"""What every data set must do. It runs over the registry: a new entry is tested without touching this file."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_encoders
import small_hub
import torch
from pydantic import ValidationError

from quickbloom.common.datasets import DATASETS, Dataset, TaskInfo, load_dataset
from quickbloom.common.datasets.base import SPLITS, generator
from quickbloom.common.datasets.fashion_mnist import DEBIAN
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options


@pytest.fixture(scope="module", params=sorted(set(DATASETS) - {"own"}))  # own: needs a user's file, see test_own.py
def dataset(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Dataset:
    options = options_of(request.param)
    if request.param == "fashion-mnist" and not DEBIAN.is_dir():
        pytest.skip("needs the files of Fashion-MNIST: apt-get install dataset-fashion-mnist")
    try:
        return load_dataset(request.param, options, tmp_path_factory.mktemp("empty"))
    except DataError:  # it needs a file
        return load_dataset(request.param, options, request.getfixturevalue("data_dir"))


def options_of(name: str) -> Options:
    needed: dict[str, dict[str, Any]] = {
        "intents": {"tokenizer": small_encoders.characters(), "max_length": 150},
        "hub": {"name": small_hub.images()},
    }
    return DATASETS[name].Options.model_validate(needed.get(name, {}))


def some_tasks(dataset: Dataset) -> list[TaskInfo]:
    """The first, the last, and some between."""
    tasks = dataset.tasks()
    return [*tasks[:: max(1, len(tasks) // 8)], tasks[-1]]


def train_draw(dataset: Dataset, task_id: str, seed: int = 0) -> TaskData:
    return dataset.train_draw(task_id, generator(seed, "battery", task_id))


def all_draws(dataset: Dataset, task: TaskInfo) -> list[TaskData]:
    return [train_draw(dataset, task.task_id), *dataset.test_draws(task.task_id)]


def parts(data: TaskData) -> tuple[Batch, Batch, Batch]:
    return data.support, data.query, data.test


def same(one: TaskData, other: TaskData) -> bool:
    pairs = zip(parts(one), parts(other), strict=True)
    return all(torch.equal(a, b) for left, right in pairs for a, b in zip(left, right, strict=True))


def examples(batch: Batch) -> set[bytes]:
    return {row.numpy().tobytes() for row in batch.x}


def test_the_registry_key_is_the_name(dataset: Dataset) -> None:
    assert DATASETS[dataset.name] is type(dataset)


def test_task_ids_are_unique_plain_and_in_a_fixed_order(dataset: Dataset) -> None:
    names = [task.task_id for task in dataset.tasks()]
    assert names == [task.task_id for task in dataset.tasks()]
    assert len(set(names)) == len(names) >= 3
    assert all(name.isascii() and name.replace("-", "").isalnum() for name in names)


def test_splits_are_known_and_groups_stay_within_one_split(dataset: Dataset) -> None:
    split_of: dict[str, str] = {}
    for task in dataset.tasks():
        assert task.split in ("", *SPLITS)
        assert split_of.setdefault(task.group or task.task_id, task.split) == task.split


def test_announced_counts_agree_with_every_draw(dataset: Dataset) -> None:
    for task in some_tasks(dataset):
        announced = [task.num_support, task.num_query, task.num_test]
        assert min(announced) >= 1
        for draw in all_draws(dataset, task):
            assert [len(part.x) for part in parts(draw)] == announced


def test_shapes_and_types_agree_with_the_spec(dataset: Dataset) -> None:
    spec = dataset.spec
    for task in some_tasks(dataset):
        for part in (part for draw in all_draws(dataset, task) for part in parts(draw)):
            assert (part.x.dtype, part.x.shape[1:]) == (torch.int64 if spec.tokens else torch.float32, spec.input_shape)
            assert ((part.x >= 0) & (part.x < spec.tokens)).all() if spec.tokens else torch.isfinite(part.x).all()
            assert part.weight.dtype == torch.float32
            assert torch.equal(part.weight, torch.ones(len(part.x)))
            if spec.kind == "regression":
                assert (part.y.dtype, part.y.shape) == (torch.float32, (len(part.x), spec.outputs))
            else:
                assert (part.y.dtype, part.y.shape) == (torch.int64, (len(part.x),))


def test_labels_are_within_the_outputs_and_all_are_used(dataset: Dataset) -> None:
    if dataset.spec.kind == "regression":
        pytest.skip("regression has no labels")
    draws = [draw for task in some_tasks(dataset) for draw in all_draws(dataset, task)]
    for position in range(3):
        labels = set(torch.cat([parts(draw)[position].y for draw in draws]).tolist())
        assert labels <= set(range(dataset.spec.outputs))
        # Some characters are too rare to turn up in a few draws.
        assert len(labels) >= (dataset.spec.outputs // 4 if dataset.name == "shakespeare" else dataset.spec.outputs)


def test_support_shares_no_example_with_query_or_test(dataset: Dataset) -> None:
    for task in some_tasks(dataset):
        for draw in all_draws(dataset, task):
            assert len(examples(draw.support)) == len(draw.support.x)
            assert not examples(draw.support) & examples(draw.query)
            assert not examples(draw.support) & examples(draw.test)


def test_the_same_rng_gives_the_same_draw_and_another_rng_another(dataset: Dataset) -> None:
    for task in some_tasks(dataset):
        assert same(train_draw(dataset, task.task_id), train_draw(dataset, task.task_id))
        assert not same(train_draw(dataset, task.task_id, seed=0), train_draw(dataset, task.task_id, seed=1))


def test_draws_do_not_depend_on_the_order_of_calls(dataset: Dataset) -> None:
    names = sorted({task.task_id for task in some_tasks(dataset)})
    forwards = {name: (train_draw(dataset, name), dataset.test_draws(name)[0]) for name in names}
    backwards = {name: (dataset.test_draws(name)[0], train_draw(dataset, name)) for name in reversed(names)}
    for name in names:
        assert same(forwards[name][0], backwards[name][1])
        assert same(forwards[name][1], backwards[name][0])


def test_a_second_instance_has_the_same_tasks_and_test_draws(dataset: Dataset, request: pytest.FixtureRequest) -> None:
    options: Any = options_of(dataset.name)
    try:
        again = type(dataset)(options, Path("does-not-exist"))
    except DataError:
        again = type(dataset)(options, request.getfixturevalue("data_dir"))
    assert again.tasks() == dataset.tasks()
    for task in some_tasks(dataset):
        pairs = zip(dataset.test_draws(task.task_id), again.test_draws(task.task_id), strict=True)
        assert all(same(one, other) for one, other in pairs)


def test_test_draws_do_not_touch_the_global_random_state(dataset: Dataset) -> None:
    task_id = dataset.tasks()[0].task_id
    np.random.seed(1)
    torch.manual_seed(1)
    one = dataset.test_draws(task_id)[0]
    np.random.seed(2)
    torch.manual_seed(2)
    assert same(one, dataset.test_draws(task_id)[0])


def test_every_option_has_a_default_a_description_and_a_kebab_name(dataset: Dataset) -> None:
    for name, field in type(dataset).Options.model_fields.items():
        assert not field.is_required()
        assert field.description
        assert field.alias == name.replace("_", "-")


def test_an_unknown_option_is_refused(dataset: Dataset) -> None:
    with pytest.raises(ValidationError, match="no-such-option"):
        type(dataset).Options.model_validate({"no-such-option": 1})
