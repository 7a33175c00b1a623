"""The tutorial's generator: sizes, statistics, parts."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError

from quickbloom.common.datasets.gaussian import Gaussian, GaussianOptions
from quickbloom.common.maths.batch import Batch, TaskData


def build(**options: object) -> Gaussian:
    return Gaussian(GaussianOptions.model_validate({name.replace("_", "-"): value for name, value in options.items()}), Path())


def all_parts(dataset: Gaussian) -> list[tuple[Batch, Batch, Batch]]:
    draws: list[TaskData] = [dataset.test_draws(task.task_id)[0] for task in dataset.tasks()]
    return [(draw.support, draw.query, draw.test) for draw in draws]


def test_there_are_thirty_clients_of_50_to_149_rows() -> None:
    tasks = build().tasks()
    rows = [task.num_support + task.num_query + task.num_test for task in tasks]
    assert [tasks[0].task_id, tasks[-1].task_id] == ["client-000", "client-029"]
    assert 50 <= min(rows) < max(rows) <= 149


def test_both_ends_of_the_range_of_rows_occur() -> None:
    rows = [task.num_support + task.num_query + task.num_test for task in build(clients=3000).tasks()]
    assert (min(rows), max(rows)) == (50, 149)


def test_only_the_feature_of_the_true_class_is_shifted_by_two() -> None:
    batches = [part for parts in all_parts(build(clients=300)) for part in parts]
    x, y = torch.cat([part.x for part in batches]), torch.cat([part.y for part in batches])
    own = x[torch.arange(len(x)), y]
    # About 30,000 rows: the standard error of `own.mean()` is 0.006, that of the mean of the other features 0.001.
    assert own.mean().item() == pytest.approx(2.0, abs=0.03)
    assert ((x.sum(1) - own) / 31).mean().item() == pytest.approx(0.0, abs=0.005)
    assert torch.bincount(y).float().div(len(y)).sub(0.1).abs().max() < 0.01


def test_the_parts_of_a_client_are_disjoint_and_have_the_asked_fractions() -> None:
    for support, query, test in all_parts(build(support_fraction=0.5, query_fraction=0.2)):
        rows = torch.cat([support.x, query.x, test.x])
        assert len(torch.unique(rows, dim=0)) == len(rows)
        assert len(support.x) == int(0.5 * len(rows))
        assert len(query.x) == int(0.2 * len(rows))


def test_the_smallest_fractions_leave_no_part_empty() -> None:
    for parts in all_parts(build(clients=300, support_fraction=0.02, query_fraction=0.96)):
        assert min(len(part.x) for part in parts) >= 1


def test_a_client_does_not_depend_on_how_many_there_are() -> None:
    few, many = build(clients=2), build(clients=40)
    assert torch.equal(few.test_draws("client-001")[0].test.x, many.test_draws("client-001")[0].test.x)


def test_another_data_seed_gives_other_data() -> None:
    assert build().tasks() != build(data_seed=1).tasks()


def test_fractions_that_leave_no_test_rows_are_refused() -> None:
    with pytest.raises(ValidationError, match=r"must be at most 0\.98, which leaves test rows, got 1"):
        build(support_fraction=0.6, query_fraction=0.4)
