"""Robust aggregation in whole rounds: with every algorithm, against lying nodes, and refused where it cannot work."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from fitting import SETTINGS
from flwr.app import Message, RecordDict
from loopback import Fault, LoopbackGrid

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.maths.params import Params, all_finite, norm, subtract
from quickbloom.common.wire.messages import TRAIN, from_arrays, to_arrays
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.robust.aggregation import RULES
from quickbloom.server_app.federation.robust.root_set import root_set
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy


class Run:
    """Nodes with two tasks each on generated data; all train but for three test tasks."""

    def __init__(self, nodes: int = 10, faults: dict[int, Fault] | None = None, **settings: Any) -> None:
        flat: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 2 * nodes, "mlp.hidden": "4", "algorithm": "reptile"}
        flat |= {"validation-tasks": 0, "test-tasks": 1, "rounds": 2, "adapt-steps": 1, "evaluate-every": 0, "min-nodes": 1}
        config = parse_run_config({**flat, **{key.replace("_", "-"): value for key, value in settings.items()}}).resolved()
        self.grid = LoopbackGrid(nodes, config.flat(), faults)
        population = call_roll(LoopbackGrid(nodes, config.flat()), config)
        algorithm = build_algorithm(config, population.spec)
        self.records: list[dict[str, Any]] = []
        outer = OuterOptimizer(algorithm.options, algorithm.init(), config.rounds)
        root = root_set(config, population, algorithm)
        self.strategy = MetaStrategy(config, population, algorithm, outer, self.records.append, root=root)
        self.before = self.strategy.outer.meta

    def start(self) -> Params:
        config = self.strategy.config
        self.strategy.start(self.grid, to_arrays(self.before), num_rounds=config.rounds, timeout=1.0)
        return self.strategy.outer.meta


def liar(lie: Callable[[torch.Tensor], torch.Tensor]) -> Fault:
    """A node that changes its meta-gradient and nothing else."""

    def fault(message: Message, answer: Callable[[Message], Message]) -> Message:
        reply = answer(message)
        if message.metadata.message_type != TRAIN:
            return reply
        gradient = from_arrays(reply.content.array_records["gradient"])
        records = {**reply.content, "gradient": to_arrays({name: lie(value) for name, value in gradient.items()})}
        return Message(RecordDict(records), reply_to=message)

    return fault


def distance(one: Params, other: Params) -> float:
    return norm(subtract(one, other))


@pytest.mark.parametrize("rule", sorted(RULES))
def test_two_liars_of_ten_move_the_mean_and_hardly_the_rule(rule: str) -> None:
    lies = {3: liar(lambda value: 1000 * torch.ones_like(value)), 7: liar(lambda value: 1000 * torch.ones_like(value))}
    honest = Run().start()
    moved = distance(honest, Run().before)
    more: dict[str, Any] = {"root_tasks": "any:6"} if rule == "fltrust" else {}
    # Of 100 and more times for the mean. Krum takes the meta-gradient of a single node, so it is noisier than the others.
    assert distance(Run(faults=lies, aggregate=rule, **more).start(), honest) < (2 if rule == "krum" else 0.75) * moved
    assert distance(Run(faults=lies).start(), honest) > 100 * moved


@pytest.mark.parametrize("algorithm", sorted(name for name, one in ALGORITHMS.items() if not one.needs_mean))
def test_every_algorithm_trains_with_a_robust_rule(algorithm: str) -> None:
    more: dict[str, Any] = (
        {} if "classification" in ALGORITHMS[algorithm].kinds else {"dataset": "sinusoid", "sinusoid.clients": 12}
    )
    more |= SETTINGS.get(algorithm, {})
    run = Run(nodes=6, aggregate="geometric-median", algorithm=algorithm, rounds=1, **more)
    after = run.start()
    assert all_finite(after)
    assert algorithm == "local" or distance(after, run.before) > 0
    assert run.records[0]["failures"] == []


def test_a_rule_that_would_have_too_few_nodes_is_refused_before_anything_is_trained() -> None:
    with pytest.raises(ConfigError) as caught:
        Run(nodes=4, aggregate="krum")
    assert str(caught.value) == (
        '`aggregate = "krum"` cannot work in round 1: with 4 nodes `malicious = 0.2` means 1, and `krum` then needs at least 5 '
        "nodes, since every node is one vote; connect more nodes, let more tasks take part, or lower `malicious`"
    )
    assert Run(nodes=4, aggregate="median").strategy.config.aggregate == "median"
    with pytest.raises(ConfigError, match="`multi-krum` then needs at least 5 nodes"):
        Run(aggregate="multi-krum", tasks_per_round=2, malicious=0.1)


def test_a_round_with_too_few_replies_for_its_rule_is_treated_as_the_settings_say() -> None:
    silent: dict[int, Fault] = {i: lambda message, _: None for i in range(7)}
    with pytest.raises(RunError, match=r"round 1: with 3 nodes `malicious = 0.2` means 1, and `krum` then needs at least 5"):
        Run(faults=silent, aggregate="krum").start()
    run = Run(faults=silent, aggregate="krum", on_too_few="skip", node_deadline=0.1, rounds=1)
    assert distance(run.start(), run.before) == 0
    assert "`krum` then needs at least 5 nodes" in run.records[0]["skipped"]


def test_a_round_that_would_have_too_few_buckets_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"needs at least 7 buckets, since .*, or lower `malicious` or `bucketing`$"):
        Run(aggregate="krum", bucketing=2)


def test_liars_that_share_buckets_with_honest_nodes_move_a_rule_hardly() -> None:
    lies = {3: liar(lambda value: 1000 * torch.ones_like(value)), 7: liar(lambda value: 1000 * torch.ones_like(value))}
    honest = Run().start()
    found = Run(faults=lies, aggregate="median", bucketing=2).start()
    assert distance(found, honest) < 0.75 * distance(honest, Run().before)


def test_centered_clipping_starts_where_the_round_before_ended() -> None:
    """With so small a tau a round stays where it starts; the step of Reptile is then what the rule returned."""
    settings: dict[str, Any] = {
        "aggregate": "centered-clip",
        "clip_radius": 1e-6,
        "clip_steps": 1,
        "reptile.outer_decay": False,
    }
    before, first, second = Run().before, Run(rounds=1, **settings).start(), Run(rounds=2, **settings).start()
    assert distance(first, before) > 0.01
    assert distance(subtract(second, first), subtract(first, before)) < 1e-4


def test_half_or_more_liars_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"`malicious` must be less than 0.5"):
        parse_run_config({"malicious": 0.5})


def test_a_reply_above_the_largest_norm_is_dropped_and_named() -> None:
    run = Run(faults={3: liar(lambda value: 1000 * value)}, max_update_norm=20.0, rounds=1)
    run.start()
    ((failure,),) = [record["failures"] for record in run.records]
    assert failure["who"] == "node 103"
    assert "its meta-gradient has norm" in failure["reason"]
    assert "above the 20 that is allowed" in failure["reason"]
