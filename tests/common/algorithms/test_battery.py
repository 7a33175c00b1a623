"""What every algorithm must do. It runs over the registry: a new entry is tested without touching this file."""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from fitting import SETTINGS, activation
from loopback import LoopbackGrid
from torch import nn

from quickbloom.common.algorithms import ALGORITHMS, Algorithm
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import RoundResult, TaskWork, evaluate, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, Minibatches, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import to_arrays
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy

RAGGED = [(3, 7), (9, 2), (5, 5), (4, 3), (9, 7), (3, 2), (7, 6)]
"""(support, query) sizes of the tasks."""
TOLERANCE = {torch.float32: 1e-6, torch.float64: 1e-10}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """`name` is every algorithm; `name` and `kind` together are the pairs that go together."""
    if "kind" in metafunc.fixturenames:
        metafunc.parametrize(("name", "kind"), [(name, kind) for name in sorted(ALGORITHMS) for kind in ALGORITHMS[name].kinds])
    elif "name" in metafunc.fixturenames:
        metafunc.parametrize("name", sorted(ALGORITHMS))


@pytest.fixture(params=[torch.float32, torch.float64], ids=str)
def dtype(request: pytest.FixtureRequest) -> torch.dtype:
    assert isinstance(request.param, torch.dtype)
    return request.param


def build(name: str, kind: str, dtype: torch.dtype = torch.float64) -> Algorithm:
    """On 3 inputs, 5 tanh units and 4 outputs, with its default settings."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(11)
        options = ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1})
        outputs = ALGORITHMS[name].model_outputs(options, 4)
        module = nn.Sequential(nn.Linear(3, 5), activation(name, 5), nn.Linear(5, outputs)).to(dtype)
    return ALGORITHMS[name](options, Learner(module, kind, 4))


def draw(kind: str, dtype: torch.dtype, support: int, query: int, seed: int) -> TaskData:
    source = torch.Generator().manual_seed(seed)

    def batch(size: int) -> Batch:
        x = torch.randn(size, 3, generator=source, dtype=torch.float64).to(dtype)
        y = torch.randn(size, 4, generator=source, dtype=torch.float64).to(dtype)
        return Batch.of(x, torch.randint(4, (size,), generator=source) if kind == "classification" else y)

    return TaskData(batch(support), batch(query), batch(query + 1))


def ragged(kind: str, dtype: torch.dtype = torch.float64) -> list[TaskWork]:
    """Fresh work: the generators inside are used up by a round."""
    return [
        TaskWork(draw(kind, dtype, support, query, seed), generator(0, "battery", seed))
        for seed, (support, query) in enumerate(RAGGED)
    ]


def alone(algorithm: Algorithm, meta: Params, work: TaskWork) -> tuple[Params, float, float]:
    """(g, loss, weight) of one task by itself: no stacking, no padding, no vmap."""
    rows = algorithm.minibatch_indices(work.num_examples, work.rng)
    index = torch.zeros(0, 0, dtype=torch.int64) if rows is None else torch.from_numpy(np.asarray(rows, dtype=np.int64))
    minibatches = Minibatches(index, torch.ones(index.shape, dtype=work.data.support.x.dtype))
    gradient, loss = algorithm.meta_gradient(meta, Episode(work.data.support, work.data.query), minibatches)
    return gradient, float(loss), algorithm.weight(work.num_examples)


def plain_mean(parts: Sequence[tuple[Params, float, float]]) -> Params:
    total = sum(weight for _, _, weight in parts)
    return {key: sum(weight * g[key].double() for g, _, weight in parts) / total for key in parts[0][0]}  # type: ignore[misc]


def assert_close(found: Params, expected: Params, atol: float) -> None:
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        size = max(1.0, float(value.abs().max())) if value.numel() else 1.0  # rounding is relative
        assert torch.allclose(found[key].double(), value.double(), rtol=0, atol=atol * size), key


def assert_same(one: RoundResult, other: RoundResult, atol: float) -> None:
    assert_close(one.gradient, other.gradient, atol)
    assert one.weight == pytest.approx(other.weight)
    assert one.losses == pytest.approx(other.losses, rel=atol, abs=atol)


def test_the_rate_of_adaptation_matters_where_the_algorithm_says_so(name: str, kind: str) -> None:
    algorithm, support = build(name, kind), draw(kind, torch.float64, 6, 4, 0).support
    meta = algorithm.init()
    # Two steps, since the first one of some computes prototypes, at no rate.
    low, high = (list(algorithm.adaptation_path(meta, support, lr, 2))[-1] for lr in (0.1, 0.2))
    same = all(torch.equal(low[key], high[key]) for key in low)
    assert same is not algorithm.uses_adapt_lr


def test_registry_key_is_the_name_and_no_two_algorithms_share_it(name: str) -> None:
    assert ALGORITHMS[name].name == name


def test_gradient_has_the_keys_shapes_and_dtype_of_the_parameters(name: str, kind: str, dtype: torch.dtype) -> None:
    algorithm = build(name, kind, dtype)
    meta = algorithm.init()
    gradient, loss, _ = alone(algorithm, meta, ragged(kind, dtype)[0])
    assert {key: (value.shape, value.dtype) for key, value in gradient.items()} == {
        key: (value.shape, value.dtype) for key, value in meta.items()
    }
    assert np.isfinite(loss)


def test_init_hands_out_copies(name: str) -> None:
    algorithm = build(name, ALGORITHMS[name].kinds[0])
    for value in algorithm.init().values():
        value.fill_(7.0)
    assert not any((value == 7.0).all() for value in algorithm.init().values())


def test_mapping_over_ragged_tasks_equals_a_loop_over_unpadded_tasks(name: str, kind: str, dtype: torch.dtype) -> None:
    algorithm = build(name, kind, dtype)
    meta = algorithm.init()
    result = run_round(algorithm, meta, ragged(kind, dtype), chunk_size=64)
    parts = [alone(algorithm, meta, work) for work in ragged(kind, dtype)]
    assert_close(result.gradient, plain_mean(parts), TOLERANCE[dtype])
    assert result.losses == pytest.approx([loss for _, loss, _ in parts], abs=10 * TOLERANCE[dtype])
    assert result.weight == pytest.approx(sum(weight for _, _, weight in parts))


@pytest.mark.parametrize("chunk_size", [1, 2, 3])
def test_result_does_not_depend_on_the_chunk_size(name: str, kind: str, dtype: torch.dtype, chunk_size: int) -> None:
    algorithm = build(name, kind, dtype)
    whole = run_round(algorithm, algorithm.init(), ragged(kind, dtype), chunk_size=64)
    assert_same(run_round(algorithm, algorithm.init(), ragged(kind, dtype), chunk_size), whole, TOLERANCE[dtype])


def test_result_does_not_depend_on_the_order_of_the_tasks(name: str, kind: str) -> None:
    algorithm = build(name, kind)
    straight = run_round(algorithm, algorithm.init(), ragged(kind), chunk_size=3)
    turned = run_round(algorithm, algorithm.init(), ragged(kind)[::-1], chunk_size=3)
    turned.losses.reverse()
    assert_same(turned, straight, 1e-12)


def test_same_generators_give_the_same_bits(name: str, kind: str) -> None:
    algorithm = build(name, kind, torch.float32)
    one, other = (run_round(algorithm, algorithm.init(), ragged(kind, torch.float32), chunk_size=64) for _ in range(2))
    assert one.losses == other.losses
    assert all(torch.equal(value, other.gradient[key]) for key, value in one.gradient.items())


def test_a_round_changes_neither_parameters_nor_data(name: str, kind: str) -> None:
    algorithm = build(name, kind)
    meta, work = algorithm.init(), ragged(kind)
    run_round(algorithm, meta, work, chunk_size=64)
    assert all(torch.equal(value, meta[key]) for key, value in algorithm.init().items())
    for used, fresh in zip(work, ragged(kind), strict=True):
        assert all(torch.equal(a, b) for a, b in zip(used.data.support, fresh.data.support, strict=True))


@pytest.mark.parametrize("poison", [float("nan"), float("inf")])
@pytest.mark.parametrize("chunk_size", [1, 64])
def test_a_task_with_broken_numbers_contributes_nothing(name: str, kind: str, poison: float, chunk_size: int) -> None:
    algorithm = build(name, kind)
    work = ragged(kind)
    for part in (work[2].data.support, work[2].data.query):
        part.x[:] = poison
    result = run_round(algorithm, algorithm.init(), work, chunk_size)
    others = [alone(algorithm, algorithm.init(), w) for i, w in enumerate(ragged(kind)) if i != 2]
    assert_close(result.gradient, plain_mean(others), 1e-12)
    assert [np.isnan(loss) for loss in result.losses] == [i == 2 for i in range(len(RAGGED))]
    assert result.weight == pytest.approx(sum(weight for _, _, weight in others))


def test_only_broken_tasks_give_weight_zero_and_a_zero_gradient(name: str, kind: str) -> None:
    algorithm = build(name, kind)
    work = ragged(kind)[:2]
    for w in work:
        w.data.support.x[:] = w.data.query.x[:] = float("nan")
    result = run_round(algorithm, algorithm.init(), work, chunk_size=64)
    assert result.weight == 0.0
    assert all(not value.any() for value in result.gradient.values())
    assert np.isnan(result.losses).all()


@pytest.mark.parametrize("steps", [0, 1, 4])
def test_adaptation_path_starts_at_the_parameters_and_has_one_entry_per_step(name: str, kind: str, steps: int) -> None:
    algorithm = build(name, kind)
    meta = algorithm.init()
    support = draw(kind, torch.float64, 6, 2, seed=0).support
    before = [value.clone() for value in support]
    path = list(algorithm.adaptation_path(meta, support, 0.1, steps))
    assert len(path) == steps + 1
    assert all(torch.equal(value, meta[key]) for key, value in algorithm.init().items())
    assert all(torch.equal(a, b) for a, b in zip(support, before, strict=True))
    assert all(np.isfinite([float(v) for v in algorithm.score(phi, support)]).all() for phi in path)


def test_evaluation_of_ragged_tasks_equals_each_task_by_itself(name: str, kind: str) -> None:
    algorithm = build(name, kind)
    meta, lrs = algorithm.init(), [0.05, 0.5]
    tasks = [[work.data] for work in ragged(kind)]
    losses, metrics = evaluate(algorithm, meta, tasks, lrs, steps=3, chunk_size=64)
    assert losses.shape == metrics.shape == (len(tasks), 2, 4)
    for t, (data,) in enumerate(tasks):
        for r, lr in enumerate(lrs):
            for step, phi in enumerate(algorithm.adaptation_path(meta, data.support, lr, 3)):
                loss, metric = algorithm.score(phi, data.test)
                assert losses[t, r, step] == pytest.approx(float(loss), abs=1e-10)
                assert metrics[t, r, step] == pytest.approx(float(metric), abs=1e-10)


@pytest.mark.parametrize("num_examples", [2, 3, 10, 100_000])
def test_weight_is_positive(name: str, num_examples: int) -> None:
    assert build(name, ALGORITHMS[name].kinds[0]).weight(num_examples) > 0


@pytest.mark.parametrize("num_examples", [2, 9, 10, 11, 57])
def test_minibatches_if_any_name_existing_examples_once_per_batch(name: str, num_examples: int) -> None:
    rows = build(name, ALGORITHMS[name].kinds[0]).minibatch_indices(num_examples, np.random.default_rng(1))
    for batch in [] if rows is None else rows.tolist():
        assert len(set(batch)) == len(batch) > 0
        assert min(batch) >= 0
        assert max(batch) < num_examples


def outer_step(theta: Params, gradient: Params, options: dict[str, object]) -> Params:
    """The first step of SGD, or of Adam: its bias-corrected moments after one gradient are g and g^2, so it moves by
    lr * g / (|g| + 1e-8)."""
    rate = float(str(options["outer-lr"]))
    if options["outer-optimizer"] == "sgd":
        return {key: value - rate * gradient[key] for key, value in theta.items()}
    return {key: value - rate * gradient[key] / (gradient[key].abs() + 1e-8) for key, value in theta.items()}


def federation(name: str, kind: str) -> RunConfig:
    dataset_name = {"classification": "digits", "regression": "sinusoid"}[kind]
    run = {"algorithm": name, "dataset": dataset_name, "rounds": 3, "tasks-per-round": 9, "seed": 5}
    return parse_run_config(
        {**run, **SETTINGS.get(name, {}), "mlp.hidden": "6", "sinusoid.clients": 30, f"{name}.inner-lr": 0.01}
    ).resolved()


def test_a_federated_round_equals_the_centralised_step(name: str, kind: str) -> None:
    config = federation(name, kind)
    grid = LoopbackGrid(4, config.flat())
    population = call_roll(grid, config)
    algorithm = build_algorithm(config, population.spec)
    theta = algorithm.init()
    strategy = MetaStrategy(config, population, algorithm, OuterOptimizer(algorithm.options, theta, 3))
    strategy.aggregate_train(1, grid.send_and_receive(strategy.configure_train(1, to_arrays(theta), None, grid)))  # type: ignore[arg-type]

    def parts() -> Iterator[tuple[Params, float, float]]:
        dataset = load_dataset(config.dataset, config.table(config.dataset), Path())
        for task_id in strategy.choose_tasks(1):
            rng = generator(5, "train", 1, task_id, 0)
            yield alone(algorithm, theta, TaskWork(dataset.train_draw(task_id, rng), rng))

    options = algorithm.options.model_dump(by_alias=True)
    mean = {key: value.float() for key, value in plain_mean(list(parts())).items()}
    share = len(strategy.choose_tasks(1)) / len(population.splits["train"])
    rule = algorithm.server_step(theta, algorithm.server_state(), mean, share)  # its own test says whether it is the paper's
    expected = outer_step({key: theta[key] for key in rule.gradient}, rule.gradient, options) | rule.placed
    assert expected.keys() == theta.keys()
    for key, value in expected.items():
        # Adam's first step is lr g / (|g| + 1e-8): next to 0 it makes much of what float32 rounds off, here 1e-7.
        steepness = (
            options["outer-lr"] * 1e-8 / (mean[key].abs().double() + 1e-8) ** 2 if options["outer-optimizer"] == "adam" else 0
        )
        assert ((strategy.outer.meta[key].double() - value.double()).abs() <= 2e-6 + 1e-7 * steepness).all(), key


def test_the_result_does_not_depend_on_how_tasks_are_spread_over_nodes(name: str, kind: str, tmp_path: Path) -> None:
    def result(nodes: int) -> list[float]:
        more = {"min-nodes": nodes, "output-dir": str(tmp_path / f"{nodes}"), "adapt-steps": 2}
        config = parse_run_config({**federation(name, kind).flat(), **more})
        summary = run_federation(LoopbackGrid(nodes, config.flat()), config)
        return [value for scores in ("test", "validation") for value in summary[scores]["loss"]["mean"]]

    assert result(1) == pytest.approx(result(7), rel=2e-4)


def test_a_run_goes_on_from_saved_state_as_if_it_had_not_stopped(name: str) -> None:
    algorithm = build(name, ALGORITHMS[name].kinds[0], torch.float32)
    work = [ragged(ALGORITHMS[name].kinds[0], torch.float32)[:count] for count in (2, 5)]
    gradients = [run_round(algorithm, algorithm.init(), part, 64).gradient for part in work]
    straight, stopped = (OuterOptimizer(algorithm.options, algorithm.init(), 3) for _ in range(2))
    for number, gradient in enumerate(gradients, 1):
        straight.step(gradient, number)
    stopped.step(gradients[0], 1)
    resumed = OuterOptimizer(algorithm.options, algorithm.init(), 3)
    resumed.restore(stopped.state())
    resumed.step(gradients[1], 2)
    assert resumed.meta.keys() == straight.meta.keys()
    assert all(torch.equal(value, straight.meta[key]) for key, value in resumed.meta.items())


def test_data_of_another_kind_are_refused_in_one_sentence() -> None:
    kinds = ("classification", "regression")
    others = [(name, kind) for name in ALGORITHMS for kind in kinds if kind not in ALGORITHMS[name].kinds]
    assert ("protonet", "regression") in others
    for name, kind in others:
        with pytest.raises(ConfigError, match=f'`algorithm = "{name}"` is defined for'):
            build(name, kind)
