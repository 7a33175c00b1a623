"""Data sets of the hub, read from local folders in its layout, and what is told where there is no network."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_hub

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.hub import Hub, HubOptions
from quickbloom.common.errors import DataError
from quickbloom.common.flower.partitioners import load
from quickbloom.common.maths.batch import Batch


def hub(folder: str, **settings: Any) -> Hub:
    small_hub.datasets()
    flat = {"dataset": f"hub:{folder}"} | {name.replace("__", ".").replace("_", "-"): value for name, value in settings.items()}
    options = parse_run_config(flat).table("hub")
    assert isinstance(options, HubOptions)
    return Hub(options, Path())


def parts_of(found: Hub, task_id: str) -> tuple[Batch, Batch, Batch]:
    data = found.test_draws(task_id)[0]
    return data.support, data.query, data.test


def test_users_are_those_of_a_federated_dataset_with_the_same_seed() -> None:
    found = hub(small_hub.images(), partition="dirichlet:0.5", users=6, partition_seed=8)
    partitioner = load("flwr_datasets.partitioner").DirichletPartitioner(
        num_partitions=6, partition_by="label", alpha=0.5, self_balancing=True, seed=8
    )
    federated = load("flwr_datasets").FederatedDataset(
        dataset=small_hub.images(),
        partitioners={"all": partitioner},
        preprocessor={"all": ("train", "test")},
        seed=8,
    )
    for user, task in enumerate(found.tasks()):
        expected = federated.partitioners["all"].load_partition(user)
        pixels = sorted(np.asarray(image).tobytes() for image in expected["image"][:])
        parts = parts_of(found, task.task_id)
        held = [np.rint((x.numpy() * 0.5 + 0.5) * 255).astype(np.uint8) for part in parts for x in part.x]
        assert sorted(image.tobytes() for image in held) == pixels
        assert sorted(int(y) for part in parts for y in part.y) == sorted(expected["label"][:])


def test_images_and_their_classes_are_found_by_their_declared_kinds() -> None:
    found = hub(small_hub.images())
    assert found.spec.input_shape == (1, 6, 5)
    holdings = found.holdings()
    assert holdings is not None
    assert holdings.classes == list(small_hub.CLASSES)
    assert holdings.counts.sum(axis=(0, 2)).tolist() == [200] * 4


def test_images_can_be_scaled_and_splits_chosen() -> None:
    found = hub(small_hub.images(), hub__image_side=8, hub__splits="test", partition="iid", users=4)
    assert found.spec.input_shape == (1, 8, 8)
    assert sum(task.num_support + task.num_query + task.num_test for task in found.tasks()) == 200


def test_natural_users_have_the_names_of_the_column() -> None:
    found = hub(small_hub.images(), partition="natural:writer")
    assert [task.task_id for task in found.tasks()] == [f"w{k}" for k in range(7)]
    assert sum(task.num_support + task.num_query + task.num_test for task in found.tasks()) == 800


def test_numbers_are_inputs_text_is_none_and_a_row_without_a_class_is_nobodys() -> None:
    found = hub(small_hub.numbers(), partition="iid", users=3, hub__label="kind")
    assert (found.spec.input_shape, found.spec.outputs) == ((2,), 3)
    rows = np.concatenate([part.x.numpy() for task in found.tasks() for part in parts_of(found, task.task_id)])
    assert sorted(rows[:, 1].tolist()) == list(range(1, 90))  # the first row has no class
    assert np.allclose(rows[:, 0] * 10, rows[:, 1])


@pytest.mark.parametrize(
    ("folder", "settings", "said"),
    [
        (
            "images",
            {"hub__label": "lable"},
            "`hub.label` must name a column of the data set, got 'lable': did you mean `label`?",
        ),
        (
            "images",
            {"partition": "natural:drawer"},
            "`partition = natural:COLUMN` must name a column of the data set, got 'drawer'",
        ),
        ("images", {"hub__splits": "dev"}, "`hub.splits` must be of train, test, got 'dev'"),
        ("images", {"hub__inputs": "writer"}, "`hub.inputs` must name a column of images or columns of numbers, got 'writer'"),
        ("numbers", {}, "`hub.label` must name the column of classes, one of a, b, said, kind"),
        ("numbers", {"hub__label": "a"}, "a column of classes, text or whole numbers, got 'a'"),
    ],
)
def test_columns_that_are_not_there_are_told_with_what_is(folder: str, settings: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError) as caught:
        hub(getattr(small_hub, folder)(), **settings)
    assert said in str(caught.value)


LABELS = [("x", "y")[k % 2] for k in range(12)]


@pytest.mark.parametrize(
    ("columns", "partition", "said"),
    [
        ({"a": [[1.0] * (k % 3 + 1) for k in range(12)], "label": LABELS}, "iid", "lists of numbers of one length"),
        ({"a": [None if k == 5 else [1.0, 2.0] for k in range(12)], "label": LABELS}, "iid", "lists of numbers of one length"),
        ({"a": [1.0] * 12, "label": [[1, 2]] * 12}, "iid", "a column of classes, text or whole numbers, got 'label'"),
        ({"image": [None] * 12, "label": [0, 1] * 6}, "iid", "must be there in every row, got an empty cell"),
        ({"a": [1.0] * 12, "who": ["u"] * 12, "label": [None] * 12}, "natural:who", "both a class and a value of 'who'"),
        ({"a": [1.0] * 12, "who": [["u"]] * 12, "label": LABELS}, "natural:who", "a column of single values, got 'who'"),
    ],
)
def test_cells_that_cannot_be_used_are_told_in_one_sentence(
    columns: dict[str, Any], partition: str, said: str, tmp_path: Path
) -> None:
    package = small_hub.datasets()
    form = {"image": package.Image(), "label": package.ClassLabel(names=["x", "y"])}
    features = package.Features(form) if "image" in columns else None
    package.Dataset.from_dict(columns, features=features).to_parquet(str(tmp_path / "train.parquet"))
    users = {} if partition.startswith("natural") else {"users": 2}

    def read() -> None:
        found = hub(str(tmp_path), partition=partition, **users)
        for task in found.tasks():
            found.test_draws(task.task_id)

    with pytest.raises(DataError) as caught:
        read()
    assert said in str(caught.value)


def test_without_a_network_the_sentence_says_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    package = small_hub.datasets()
    monkeypatch.setattr(package.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError) as caught:
        hub("nobody/nothing-of-this-name")
    assert "the data set 'hub:nobody/nothing-of-this-name' cannot be loaded" in str(caught.value)
    assert "without a network, name a folder that holds its files, hub:FOLDER" in str(caught.value)


def test_a_data_set_needs_a_name() -> None:
    with pytest.raises(DataError, match="use `--dataset hub:NAME`"):
        Hub(HubOptions(), Path())
