"""Momentum on the nodes: the averages of the paper by hand, over rounds that were left out, repeated, taken back or spoilt."""

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from loopback import LoopbackGrid
from torch import Tensor, nn

from quickbloom.common.algorithms.base import Algorithm, AlgorithmOptions
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.datasets.gaussian import Gaussian
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.momentum import Momentum
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Episode, Minibatches, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest, error_reason
from quickbloom.server_app.app import run_federation

META = {"w": torch.zeros(2), "s": torch.zeros(())}


class Given(Algorithm):
    """g is what stands in the first support example: two numbers for `w`, one for `s`; a count is kept as state."""

    name = "given"
    Options = AlgorithmOptions

    def init(self) -> Params:
        return dict(META)

    def fresh(self) -> Params:
        return {"count": torch.zeros(())}

    def meta_gradient(self, meta: Params, episode: Episode, minibatches: Minibatches) -> tuple[Params, Tensor]:
        numbers = episode.support.x[0]
        return {"w": numbers[:2], "s": numbers[2]}, numbers.sum() * 0

    def contribute(
        self, meta: Params, kept: Params, episode: Episode, minibatches: Minibatches
    ) -> tuple[Params, Tensor, Params]:
        return *self.meta_gradient(meta, episode, minibatches), {"count": kept["count"] + 1}


class Tasks:
    """Tasks with momentum `beta`, and what they keep from round to round."""

    def __init__(self, beta: float) -> None:
        given = Given(AlgorithmOptions(inner_lr=0.1), Learner(nn.Linear(3, 1), "regression"))
        self.momentum = Momentum(given, beta)
        self.kept: dict[int, Params] = {}
        self.memory: dict[int, Params] = {}

    def round(self, number: int, rows: dict[int, list[float]], clip: float = 0.0) -> list[list[float]]:
        """What each task sends alone in a round, by the g that it has."""
        sent = []
        for task, row in rows.items():
            batch = Batch.of(torch.tensor([row]), torch.zeros(1, 1))
            state = self.momentum.before(self.kept.get(task), self.memory.get(task), number)
            work = TaskWork(TaskData(batch, batch, batch), np.random.default_rng(0), state)
            result = run_round(self.momentum, META, [work], 8, clip=clip)
            self.kept[task], memory = self.momentum.after(result.kept[0])
            if memory:
                self.memory[task] = memory
            sent.append([*result.gradient["w"].tolist(), float(result.gradient["s"])])
        return sent


def test_the_average_by_hand() -> None:
    tasks = Tasks(0.75)
    assert tasks.round(1, {0: [4.0, 0.0, 8.0]}) == [[4.0, 0.0, 8.0]]
    # 1/4 of the new one and 3/4 of the old: (0 + 3, 2 + 0, 0 + 6), then (1 + 9/4, 0 + 3/2, 0 + 9/2).
    assert tasks.round(2, {0: [0.0, 8.0, 0.0]}) == [[3.0, 2.0, 6.0]]
    assert tasks.round(3, {0: [4.0, 0.0, 0.0]}) == [[3.25, 1.5, 4.5]]
    assert float(tasks.kept[0]["count"]) == 3


def test_a_memory_fades_with_the_rounds_in_which_a_task_is_not_asked() -> None:
    tasks = Tasks(0.5)
    tasks.round(1, {0: [8.0, 0.0, 0.0], 1: [1.0, 1.0, 1.0]})
    # Three rounds later 1/8 of it is left.
    assert tasks.round(4, {0: [0.0, 8.0, 0.0]}) == [[1.0, 7.0, 0.0]]
    # The other task had no part in it.
    assert tasks.round(2, {1: [3.0, 3.0, 3.0]}) == [[2.0, 2.0, 2.0]]


def test_a_repeated_round_sends_the_same_again_and_one_before_the_memory_starts_afresh() -> None:
    tasks = Tasks(0.5)
    tasks.round(1, {0: [8.0, 0.0, 0.0]})
    second = tasks.round(2, {0: [0.0, 8.0, 0.0]})
    assert second == tasks.round(2, {0: [0.0, 8.0, 0.0]}) == [[4.0, 4.0, 0.0]]
    assert tasks.round(1, {0: [0.0, 0.0, 2.0]}) == [[0.0, 0.0, 2.0]]


def test_what_is_sent_is_clipped_and_what_is_kept_is_not() -> None:
    tasks = Tasks(0.5)
    assert tasks.round(1, {0: [30.0, 40.0, 0.0]}, clip=5.0) == [[3.0, 4.0, 0.0]]
    assert tasks.round(2, {0: [-30.0, -40.0, 0.0]}, clip=5.0) == [[0.0, 0.0, 0.0]]


def test_a_contribution_that_is_not_finite_leaves_the_memory_as_it_was() -> None:
    tasks = Tasks(0.5)
    tasks.round(1, {0: [math.nan, 0.0, 0.0]})
    assert tasks.memory == {}
    tasks.round(2, {0: [8.0, 0.0, 0.0]})
    tasks.round(3, {0: [math.inf, 0.0, 0.0]})
    # Two rounds since the last that counted.
    assert tasks.round(4, {0: [0.0, 8.0, 0.0]}) == [[2.0, 6.0, 0.0]]


# ---- on a node

NAMES = ["client-000", "client-001"]


class OnNode:
    """One node with two tasks of generated data, asked at one model that never changes."""

    def __init__(self, **more: Any) -> None:
        flat = {"algorithm": "maml", "dataset": "gaussian", "gaussian.clients": 2, "mlp.hidden": "4", "maml.inner-steps": 1}
        state = more.pop("state_dir", "")
        config = parse_run_config({**flat, **{key.replace("_", "-"): value for key, value in more.items()}}).resolved()
        self.grid = LoopbackGrid(1, config.flat(), node_configs={0: {"state-dir": str(state)}})
        spec = load_dataset("gaussian", config.table("gaussian"), resolve_data_dir("")).spec
        self.meta = build_algorithm(config, spec).init()

    def sends(self, number: int, names: list[str] = NAMES[:1], clip: float = 0.0) -> np.ndarray[Any, Any]:
        request = TrainRequest(self.meta, number, 0, names, "first", clip)
        (reply,) = self.grid.send_and_receive([Message(request.to_records(), 100, TRAIN)])
        assert error_reason(reply.content) is None
        gradient = TrainReply.from_records(reply.content, len(names)).gradient
        return np.concatenate([gradient[name].numpy().ravel() for name in sorted(gradient)]).astype(np.float64)


def test_a_node_sends_averages_of_what_it_would_send_and_keeps_them_task_by_task() -> None:
    plain, averaged = OnNode(), OnNode(node_momentum=0.5)
    g = {number: plain.sends(number) for number in (1, 2, 5)}
    m = {1: g[1], 2: 0.5 * g[2] + 0.5 * g[1]}
    m[5] = 0.875 * g[5] + 0.125 * m[2]
    for number, expected in m.items():
        assert averaged.sends(number) == pytest.approx(expected, abs=1e-6)
    assert np.abs(m[5] - g[5]).max() > 1e-3
    # The other task comes in new, and the mean of both is sent: that of round 6 alone, and half of this one's memory.
    both = (plain.sends(6, NAMES[1:]) + 0.5 * plain.sends(6) + 0.5 * m[5]) / 2
    assert averaged.sends(6, NAMES) == pytest.approx(both, abs=1e-6)


def test_a_restarted_node_goes_on_from_its_state_dir(tmp_path: Path) -> None:
    whole = OnNode(node_momentum=0.9)
    expected = [whole.sends(number, NAMES).tolist() for number in (1, 2)]
    assert OnNode(node_momentum=0.9, state_dir=tmp_path).sends(1, NAMES).tolist() == expected[0]
    assert OnNode(node_momentum=0.9, state_dir=tmp_path).sends(2, NAMES).tolist() == expected[1]
    assert OnNode(node_momentum=0.9).sends(2, NAMES).tolist() != expected[1]


def test_with_heads_each_has_a_place_of_its_own() -> None:
    heads: dict[str, Any] = {"algorithm": "heads", "maml.inner-steps": 5, "heads.inner-steps": 2, "seed": 3}
    plain, averaged = OnNode(**heads), OnNode(node_momentum=0.5, **heads)
    g = [plain.sends(number) for number in (1, 2)]
    assert averaged.sends(1) == pytest.approx(g[0], abs=1e-6)
    assert averaged.sends(2) == pytest.approx(0.5 * g[0] + 0.5 * g[1], abs=1e-6)
    kept = {str(name) for name in averaged.grid._contexts[100].state if str(name).startswith("kept/")}
    assert len(kept) == 2


def test_no_task_sends_more_than_the_clip_in_any_round() -> None:
    node = OnNode(node_momentum=0.9)
    full = [np.linalg.norm(OnNode(node_momentum=0.9).sends(number)) for number in (1, 2)]
    for number in (1, 2, 3):
        assert np.linalg.norm(node.sends(number, clip=0.01)) <= 0.01 * (1 + 1e-6)
    assert min(full) > 0.02


def test_a_draw_that_is_not_finite_is_no_part_of_what_a_task_keeps(monkeypatch: pytest.MonkeyPatch) -> None:
    drawn = Gaussian.train_draw

    def every_second(self: Gaussian, task_id: str, rng: np.random.Generator) -> TaskData:
        data = drawn(self, task_id, rng)
        count[0] += 1
        support = data.support._replace(x=data.support.x * (math.nan if count[0] % 2 == 0 else 1))
        return TaskData(support, data.query, data.test)

    count = [0]
    monkeypatch.setattr(Gaussian, "train_draw", every_second)
    plain, averaged = OnNode(episodes=2), OnNode(node_momentum=0.5, episodes=2)
    g = {number: plain.sends(number) for number in (1, 2, 4)}
    assert averaged.sends(1) == pytest.approx(g[1], abs=1e-6)
    assert averaged.sends(2) == pytest.approx(0.5 * g[2] + 0.5 * g[1], abs=1e-6)
    assert averaged.sends(4) == pytest.approx(0.75 * g[4] + 0.25 * (0.5 * g[2] + 0.5 * g[1]), abs=1e-6)


def test_what_is_written_out_is_not_compiled_for_its_averages(monkeypatch: pytest.MonkeyPatch) -> None:
    def compiles(*_: Any, **__: Any) -> None:
        raise AssertionError("torch.compile is asked for work that has no use for it")

    monkeypatch.setattr(torch, "compile", compiles)
    node = OnNode(algorithm="fomaml", node_momentum=0.5, compile=True)
    assert np.abs(node.sends(1)).max() > 0


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        (
            {"algorithm": "scaffold"},
            r"`node-momentum` must be 0.0 with `algorithm = \"scaffold\"`, because the server's control",
        ),
        ({"algorithm": "fedproto"}, "`node-momentum` must be 0.0 .* because prototypes are quotients"),
        ({"node-momentum": 1.0}, "`node-momentum` must be less than 1"),
        ({"node-momentum": -0.1}, "`node-momentum` must be"),
    ],
)
def test_what_cannot_work_is_refused(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ConfigError, match=sentence):
        parse_run_config({"node-momentum": 0.9, **settings})


def test_averages_scatter_less_than_single_contributions() -> None:
    tasks = Tasks(0.9)
    rng = np.random.default_rng(0)
    rows = rng.normal(size=(200, 3))
    sent = np.array([tasks.round(number + 1, {0: row.tolist()})[0] for number, row in enumerate(rows)])
    # The variance of an average of independent draws is (1 - beta) / (1 + beta) of theirs, 1/19.
    assert sent[50:].var() == pytest.approx(1 / 19, rel=0.4)


# ---- in whole runs


def scored(folder: Path, nodes: int = 4, **more: Any) -> list[float]:
    """The test losses of a run that asks for half of its training tasks in every round."""
    flat: dict[str, Any] = {
        "algorithm": "fedavg",
        "dataset": "gaussian",
        "gaussian.clients": 16,
        "model": "linear",
        "rounds": 4,
    }
    flat |= {"min-nodes": 1, "adapt-steps": 1, "fraction": 0.5, "evaluate-every": 0, "output-dir": str(folder)}
    config = parse_run_config({**flat, **{key.replace("_", "-"): value for key, value in more.items()}})
    summary = run_federation(LoopbackGrid(nodes, config.flat()), config)
    assert summary["failures"] == 0
    losses: list[float] = summary["test"]["loss"]["mean"]
    return losses


def test_under_the_mean_it_does_not_matter_which_node_has_which_task(tmp_path: Path) -> None:
    expected = scored(tmp_path / "four", node_momentum=0.8)
    assert scored(tmp_path / "one", nodes=1, node_momentum=0.8) == pytest.approx(expected, abs=1e-5)
    assert scored(tmp_path / "without") != pytest.approx(expected, abs=1e-3)


def test_secure_sums_are_of_averages_as_well(tmp_path: Path) -> None:
    plain = scored(tmp_path / "plain", node_momentum=0.8, fraction=1.0)
    masked = scored(tmp_path / "masked", node_momentum=0.8, fraction=1.0, secure_aggregation=True)
    assert masked == pytest.approx(plain, abs=1e-5)


def test_without_waiting_and_with_coding_it_trains(tmp_path: Path) -> None:
    assert math.isfinite(scored(tmp_path / "async", node_momentum=0.8, mode="async")[-1])
    assert math.isfinite(scored(tmp_path / "coded", node_momentum=0.8, update_dtype="int8")[-1])
