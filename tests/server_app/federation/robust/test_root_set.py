"""FLTrust: its equation by hand and by loops, the root set against what a node would compute, and what cannot work."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from loopback import LoopbackGrid

from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import TrainReply
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.robust.aggregation import aggregate
from quickbloom.server_app.federation.robust.root_set import RootSet, root_set
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.runs.checkpoints import load


def vector(row: Any) -> Params:
    return {"a": torch.tensor(row[:1]), "b": torch.tensor(row[1:]).reshape(1, -1)}


def trusted(root: Any, *rows: Any) -> list[float]:
    replies = [TrainReply(vector(row), float(i + 1), [0.0]) for i, row in enumerate(rows)]
    found = aggregate("fltrust", 0.2, replies, root=vector(root))
    return [*found["a"].tolist(), *found["b"].flatten().tolist()]


def test_the_rule_by_hand() -> None:
    root = [2.0, 0.0]
    # Cosines 1, 3/5 and below 0; at length 2 the first two are (2, 0) and (6/5, 8/5). The weighted sum is (2 + 18/25, 24/25),
    # by 8/5: (1.7, 0.6).
    assert trusted(root, [9.0, 0.0], [3.0, 4.0], [-1.0, 5.0]) == pytest.approx([1.7, 0.6])
    # However long a reply is, and whatever it weighs.
    assert trusted(root, [1e-3, 0.0], [3e9, 4e9], [-1e12, 0.0]) == pytest.approx([1.7, 0.6])
    # A reply of zeros has no direction.
    assert trusted(root, [0.0, 0.0], [3.0, 4.0]) == pytest.approx([1.2, 1.6])
    # Nobody is trusted but the server.
    assert trusted(root, [-1.0, 0.0], [0.0, 3.0]) == [2.0, 0.0]
    assert trusted([0.0, 0.0], [-1.0, 0.0], [1.0, 3.0]) == [0.0, 0.0]


def by_loops(root: Any, rows: Any) -> Any:
    """Algorithm 2 of the paper, line by line."""
    total, trust = np.zeros_like(root), 0.0
    for g in rows:
        score = max(0.0, float(np.dot(g, root)) / float(np.linalg.norm(g) * np.linalg.norm(root)))
        total += score * np.linalg.norm(root) / np.linalg.norm(g) * g
        trust += score
    return total / trust


@pytest.mark.parametrize("seed", range(4))
def test_the_rule_agrees_with_loops(seed: int) -> None:
    rng = np.random.default_rng(seed)
    root, rows = rng.normal(size=6).astype(np.float32), rng.normal(size=(9, 6)).astype(np.float32)
    rows[:3] *= 1000
    assert trusted(root, *rows) == pytest.approx(by_loops(root.astype(float), rows.astype(float)), abs=1e-5)


def test_the_result_is_never_longer_than_the_servers_own() -> None:
    rng = np.random.default_rng(1)
    for _ in range(50):
        root, rows = rng.normal(size=5), rng.normal(size=(7, 5)) * 10.0 ** rng.integers(-6, 9, size=(7, 1))
        assert np.linalg.norm(trusted(root, *rows)) <= np.linalg.norm(root) * (1 + 1e-6)


def test_the_rule_without_a_root_set_is_a_defect() -> None:
    with pytest.raises(ValueError, match="needs the update of a root set"):
        aggregate("fltrust", 0.2, [TrainReply(vector([1.0, 2.0]), 1.0, [0.0])])


# ---- the root set


def settings(**changes: Any) -> RunConfig:
    flat: dict[str, Any] = {"algorithm": "maml", "dataset": "gaussian", "gaussian.clients": 12, "mlp.hidden": "4"}
    flat |= {"aggregate": "fltrust", "root-tasks": "any:2", "min-nodes": 1, "rounds": 2, "adapt-steps": 1, "seed": 4}
    changed = {key.replace("__", ".").replace("_", "-"): value for key, value in changes.items()}
    return parse_run_config({**flat, **changed}).resolved()


def root_of(config: RunConfig) -> tuple[RootSet, Params, dict[str, list[str]]]:
    population = call_roll(LoopbackGrid(2, config.flat()), config)
    algorithm = build_algorithm(config, population.spec)
    found = root_set(config, population, algorithm)
    assert found is not None
    return found, algorithm.init(), population.splits


def test_tasks_drawn_by_the_seed_are_training_tasks() -> None:
    drawn = []
    for seed in range(6):
        found, _, splits = root_of(settings(seed=seed, root_tasks="any:3"))
        assert len(set(found.task_ids)) == 3
        assert set(found.task_ids) <= set(splits["train"])
        drawn.append(tuple(found.task_ids))
    assert len(set(drawn)) > 1
    assert root_of(settings(seed=0, root_tasks="any:3"))[0].task_ids == list(drawn[0])


def test_the_contribution_is_the_mean_of_what_the_algorithm_gives_for_draws_of_its_own() -> None:
    config = settings(episodes=2)
    found, meta, _ = root_of(config)
    data = load_dataset("gaussian", config.table("gaussian"), resolve_data_dir(""))
    algorithm = build_algorithm(config, data.spec)
    parts = []
    for task_id in found.task_ids:
        for episode in range(2):
            rng = generator(4, "root", 7, task_id, episode)
            parts.append(run_round(algorithm, meta, [TaskWork(data.train_draw(task_id, rng), rng)], 1).gradient)
    mine = found.contribution(meta, 7, {})
    for name, value in mine.items():
        assert torch.allclose(value, torch.stack([part[name] for part in parts]).mean(0), rtol=0, atol=1e-6)
    assert not torch.equal(found.contribution(meta, 8, {})[name], mine[name])


def test_with_momentum_the_servers_own_contribution_is_an_average_as_well() -> None:
    plain, meta, _ = root_of(settings())
    averaged, _, _ = root_of(settings(node_momentum=0.75))
    first, second = plain.contribution(meta, 1, {}), plain.contribution(meta, 2, {})
    before = averaged.contribution(meta, 1, {})
    after = averaged.contribution(meta, 2, before)
    for name, value in after.items():
        assert torch.equal(before[name], first[name])
        assert torch.allclose(value, 0.25 * second[name] + 0.75 * first[name], rtol=0, atol=1e-7)


def held_out(split: str) -> str:
    return root_of(settings())[2][split][0]


@pytest.mark.parametrize("split", ["test", "validation"])
def test_a_task_that_is_held_out_cannot_be_a_root_task(split: str) -> None:
    name = held_out(split)
    with pytest.raises(ConfigError) as caught:
        root_of(settings(root_tasks=f"{held_out('train')},{name}"))
    assert str(caught.value) == (
        "`root-tasks` must be tasks that are not held out, because scores of what the server has seen say nothing, got "
        f"'{name}', which is a {split} task of this run: name another, or any:N for training tasks"
    )


def test_named_tasks_are_taken() -> None:
    name = held_out("train")
    assert root_of(settings(root_tasks=f" {name} "))[0].task_ids == [name]


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        (
            {"root_tasks": "client-01"},
            "`root-tasks` must name tasks that the server can read, got 'client-01'.*it has 12, such as",
        ),
        (
            {"root_tasks": "any:0"},
            "`root-tasks` must be any:1 to any:8, since the server has 8 tasks that may train, got 'any:0'",
        ),
        ({"root_tasks": "any:9"}, "`root-tasks` must be any:1 to any:8"),
        ({"root_tasks": "any:x"}, "`root-tasks` must be names of tasks, or any:N with a whole number N, got 'any:x'"),
        ({"root_tasks": " , "}, "`root-tasks` must be names of tasks, or any:N with a whole number N, got ' , '"),
        ({"root_tasks": ""}, '`root-tasks` must name tasks whose examples the server has, with `aggregate = "fltrust"`'),
        ({"root_tasks": " any:x"}, "`root-tasks` must be names of tasks, or any:N with a whole number N, got ' any:x'"),
        ({"algorithm": "local"}, '`algorithm` must be one whose tasks send something .* got "local": leave `aggregate` out'),
        ({"algorithm": "heads"}, '`algorithm` must be one whose tasks keep nothing on their nodes .* got "heads"'),
        ({"algorithm": "scaffold"}, "`aggregate` must be 'mean' with `algorithm = \"scaffold\"`"),
        ({"secure_aggregation": True}, "`aggregate` must be 'mean' with `secure-aggregation`"),
        (
            {"privacy__noise_multiplier": 1.0, "privacy__clip": 1.0},
            "`aggregate` must be 'mean' with `privacy.noise-multiplier`",
        ),
        (
            {"mode": "async"},
            "`mode` must be 'sync' with `aggregate = \"fltrust\"`, because it gives all replies the same length",
        ),
        ({"bucketing": 2}, '`bucketing` must be 1 with `aggregate = "fltrust"`'),
        ({"malicious": 0.1}, '`malicious` does nothing with `aggregate = "fltrust"`'),
        ({"aggregate": "median"}, '`root-tasks` does nothing with `aggregate = "median"`, which needs no root set'),
        (
            {"root_path": "root.csv"},
            "`root-path` is for the data set `own` with users of its own, got 'root.csv' for 'gaussian'",
        ),
        ({"aggregate": "mean", "root_tasks": "", "root_path": "a"}, '`root-path` does nothing with `aggregate = "mean"`'),
    ],
)
def test_what_cannot_work_is_refused_in_one_sentence(changes: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        root_of(settings(**changes))


def table(path: Path, names: list[str], seed: int, columns: str = "user,x1,x2,label") -> str:
    rng = np.random.default_rng(seed)
    rows = [
        f"{name},{rng.normal() + label:.3f},{rng.normal():.3f},{'yes' if label else 'no'}"
        for name in names
        for label in [0, 1] * 12
    ]
    path.write_text("\n".join([columns, *rows]) + "\n")
    return str(path)


def own(tmp_path: Path, **changes: Any) -> RunConfig:
    flat: dict[str, Any] = {"dataset": "own", "own__path": table(tmp_path / "users.csv", [f"user{i}" for i in range(9)], 0)}
    flat |= {"own__task_column": "user", "own__target_column": "label", "own__kind": "classification"}
    flat |= {"root_tasks": "", "root_path": table(tmp_path / "root.csv", ["public-a", "public-b"], 1)}
    return settings(**{**flat, **changes})


def test_a_file_on_the_server_is_the_root_set_of_ones_own_data(tmp_path: Path) -> None:
    found, meta, splits = root_of(own(tmp_path))
    assert found.task_ids == ["public-a", "public-b"]
    assert not set(found.task_ids) & {name for names in splits.values() for name in names}
    assert any(value.any() for value in found.contribution(meta, 1, {}).values())
    assert root_of(own(tmp_path, root_tasks="public-b"))[0].task_ids == ["public-b"]
    assert len(root_of(own(tmp_path, root_tasks="any:1"))[0].task_ids) == 1


def test_a_file_that_the_server_cannot_read_or_that_is_another_is_refused(tmp_path: Path) -> None:
    with pytest.raises(
        ConfigError, match=r"^`root-path` \('/nowhere/root.csv'\) must be data that the server can read, because"
    ):
        root_of(own(tmp_path, root_path="/nowhere/root.csv"))
    other = table(tmp_path / "other.csv", ["public"], 2, "user,y1,y2,label")
    with pytest.raises(ConfigError, match=r"`root-path` .* must be data that the server can read"):
        root_of(own(tmp_path, root_path=other))
    split = root_of(own(tmp_path))[2]
    mine = table(tmp_path / "mine.csv", split["test"][:1], 3)
    with pytest.raises(ConfigError, match=f"got '{split['test'][0]}', which is a test task of this run"):
        root_of(own(tmp_path, root_path=mine))


def test_a_run_with_a_root_set_takes_the_steps_of_the_rule(tmp_path: Path) -> None:
    """One round of SGD at rate 1 from the same model: what is left of it is the meta-gradient."""
    more: dict[str, Any] = {"maml__outer_optimizer": "sgd", "maml__outer_lr": 1.0, "maml__zero_head": False, "rounds": 1}
    config = settings(output_dir=str(tmp_path), personal=False, **more)
    found, meta, splits = root_of(config)
    run_federation(LoopbackGrid(12, config.flat()), config)
    tensors = load(tmp_path).tensors
    data = load_dataset("gaussian", config.table("gaussian"), resolve_data_dir(""))
    algorithm = build_algorithm(config, data.spec)
    sent = []
    for task_id in splits["train"]:
        rng = generator(4, "train", 1, task_id, 0)
        sent.append(run_round(algorithm, meta, [TaskWork(data.train_draw(task_id, rng), rng)], 1).gradient)
    names = sorted(meta)

    def flat(params: Params) -> Any:
        return np.concatenate([params[name].numpy().ravel() for name in names]).astype(float)

    step = flat(meta) - flat({name: tensors[f"meta/{name}"] for name in names})
    expected = by_loops(flat(found.contribution(meta, 1, {})), np.array([flat(one) for one in sent]))
    assert step == pytest.approx(expected, abs=1e-6)
    assert np.linalg.norm(step - np.mean([flat(one) for one in sent], axis=0)) > 1e-3


def test_an_algorithm_whose_head_never_travels_trains_with_a_root_set(tmp_path: Path) -> None:
    config = settings(algorithm="fedbabu", output_dir=str(tmp_path), personal=False)
    summary = run_federation(LoopbackGrid(12, config.flat()), config)
    assert summary["failures"] == 0
    assert summary["test"]["accuracy"]["mean"]


def test_a_root_set_that_gives_zeros_alone_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    real = RootSet.contribution

    def at_last(self: RootSet, meta: Params, number: int, before: Params) -> Params:
        found = real(self, meta, number, before)
        return {name: value * (number - 1) for name, value in found.items()}

    monkeypatch.setattr(RootSet, "contribution", at_last)
    config = settings(output_dir=str(tmp_path), personal=False)
    run_federation(LoopbackGrid(12, config.flat()), config)
    told = [record.getMessage() for record in caplog.records if "the root set" in record.getMessage()]
    assert told == ["Round 1: the root set contributes nothing but zeros, so no reply counts"]
