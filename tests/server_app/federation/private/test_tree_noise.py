"""Noise of a tree: its covariance is that of least squares, nobody is in a tree twice, and the account counts every tree."""

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from loopback import LoopbackGrid
from scipy.optimize import brentq
from scipy.stats import norm as normal_law

from quickbloom.common.config.privacy import PrivacyOptions
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params, norm
from quickbloom.common.personal.checkpoint import write
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.private.privacy import Ledger, TaskPrivacy
from quickbloom.server_app.federation.private.tree_noise import Epochs, Tree, epsilon, slot_of
from quickbloom.server_app.runs.checkpoints import load
from quickbloom.server_app.runs.directory import read_history
from quickbloom.server_app.runs.resume import noise_levels

pytest.importorskip("dp_accounting")

CLIP, DELTA = 0.5, 0.01
FLAT: dict[str, Any] = {"dataset": "gaussian", "gaussian.clients": 24, "model": "linear", "algorithm": "fedavg", "min-nodes": 1}
FLAT |= {"evaluate-every": 0, "adapt-steps": 1, "rounds": 8, "tasks-per-round": 4, "privacy.noise": "tree"}  # 17 / 4: E = 4
FLAT |= {"privacy.noise-multiplier": 2.0, "privacy.clip": CLIP, "privacy.delta": DELTA}


def gaussian_epsilon(mu: float, delta: float) -> float:
    """Epsilon of a mechanism that is mu-Gaussian private (Balle, Wang 2018, Theorem 8), by its definition."""

    def excess(eps: float) -> float:
        found = normal_law.cdf(mu / 2 - eps / mu) - math.exp(eps) * normal_law.cdf(-mu / 2 - eps / mu)
        return float(found) - delta

    return float(brentq(excess, 0.0, 200.0, xtol=1e-10))


# ---- the noise


def prefix_coefficients(leaves: int) -> np.ndarray[Any, Any]:
    """[leaves, nodes]: the prefix sums of a tree's noise, as sums of the noise of its nodes."""
    units = iter(np.eye(2 * leaves))
    tree = Tree(lambda: next(units))
    return np.cumsum([tree.leaf() for _ in range(leaves)], axis=0)


def full_nodes(leaves: int) -> list[range]:
    """The nodes of a binary tree that are full after so many leaves (from 0), each as the leaves under it."""
    sizes = [2**level for level in range(leaves.bit_length())]
    return [range(start, start + size) for size in sizes for start in range(0, leaves - size + 1, size)]


def least_squares(leaves: int, nodes: int) -> np.ndarray[Any, Any]:
    """The prefix sum after so many leaves as the best linear estimate from the nodes within each of its largest full nodes.

    Every node of the whole tree of `nodes` leaves is measured once, with noise of deviation 1. [nodes measured].
    """
    measured = full_nodes(nodes)
    weights = np.zeros(len(measured))
    start = 0
    for level in reversed(range(leaves.bit_length())):
        if not leaves >> level & 1:
            continue
        inside = range(start, start + 2**level)
        rows = [i for i, node in enumerate(measured) if set(node) <= set(inside)]
        design = np.array([[float(leaf in measured[i]) for leaf in inside] for i in rows])
        # The estimate of the sum of all unknowns: 1^T (A^T A)^-1 A^T y.
        weights[rows] = np.ones(len(inside)) @ np.linalg.solve(design.T @ design, design.T)
        start += 2**level
    return weights


@pytest.mark.parametrize("leaves", [1, 2, 3, 13, 16, 31])
def test_prefix_sums_have_the_covariance_of_least_squares_on_the_nodes(leaves: int) -> None:
    expected = np.array([least_squares(s, leaves) for s in range(1, leaves + 1)])
    ours = prefix_coefficients(leaves)
    np.testing.assert_allclose(ours @ ours.T, expected @ expected.T, atol=1e-12)


def test_variance_of_a_power_of_two_is_that_of_the_paper() -> None:
    # Kairouz et al. 2021, appendix B: 1 / (2 (1 - 2^-(l + 1))) of a node's for 2^l leaves, which is below 1.
    ours = prefix_coefficients(32)
    variance = (ours**2).sum(axis=1)
    for level in range(6):
        assert variance[2**level - 1] == pytest.approx(1 / (2 * (1 - 2.0 ** -(level + 1))))
    # Independent noise in every round would add up to the number of rounds.
    assert max(variance) < math.log2(32)


def test_every_node_has_noise_of_its_own_and_every_prefix_sum_has_noise() -> None:
    ours = prefix_coefficients(16)
    used = np.abs(ours).sum(axis=0) > 0
    assert used.sum() == 31  # 16 + 8 + 4 + 2 + 1 nodes
    assert np.linalg.matrix_rank(ours) == 16


def test_rounds_get_the_noise_of_the_tree_in_units_of_the_clip() -> None:
    size, like = 40_000, {"v": torch.zeros(40_000), "w": torch.zeros(40_000)}
    options = PrivacyOptions(noise_multiplier=1.5, clip=2.0, noise="tree", noise_seed=0)
    one = TaskPrivacy(options, 100, 25)  # E = 4
    reply = TrainReply({name: torch.full((size,), 0.3) for name in like}, 10.0, [0.1], 0.0)
    rounds = [one.mean([reply], like, number) for number in range(1, 9)]
    # The sum of a round is 3, over 25 expected tasks; a node's deviation 1.5 * 2 / 25.
    noise = np.array([(found[name].double().numpy() - 0.12) / 0.12 for name in like for found in rounds])
    prefix = np.concatenate([np.cumsum(noise[start : start + 4], axis=0) for start in range(0, 16, 4)])
    expected = prefix_coefficients(4)
    # Two trees for each of two tensors, which have nothing to do with each other.
    np.testing.assert_allclose(
        prefix @ prefix.T / size, np.kron(np.eye(4), expected @ expected.T), atol=6 * 2 / math.sqrt(size)
    )


# ---- whose turn it is


def test_a_task_takes_part_once_in_any_epoch_and_its_slot_is_its_own() -> None:
    names = [f"user-{i}" for i in range(4000)]
    epochs = Epochs(3, 16)
    turns = np.array([[epochs.turn(name, number) for name in names] for number in range(1, 49)])
    for start in range(33):
        assert (turns[start : start + 16].sum(axis=0) == 1).all()
    # Slots are drawn evenly: binomial counts of mean 250.
    counts = np.bincount([slot_of(3, name, 16) for name in names], minlength=16)
    assert ((counts - 250) ** 2 / 250).sum() < 37.7  # chi-square with 15 degrees of freedom, 0.1 %
    assert [slot_of(4, name, 16) for name in names] != [slot_of(3, name, 16) for name in names]


def most_levels(lives: list[list[int]], length: int) -> int:
    """The most nodes that any slot is in, over the trees of several processes that ran these rounds, by listing all nodes."""
    trees: list[list[int]] = []
    for rounds in lives:
        tree: list[int] = []
        for number in rounds:
            slot = (number - 1) % length
            if slot in tree:
                trees.append(tree)
                tree = []
            tree.append(slot)
        trees.append(tree)
    return max(
        sum(tree.index(slot) in node for tree in trees if slot in tree for node in full_nodes(len(tree)))
        for slot in range(length)
    )


@pytest.mark.parametrize(
    ("lives", "length", "exact"),
    [
        ([list(range(1, 49))], 16, True),
        ([list(range(1, 8))], 16, True),
        ([list(range(1, 31))], 15, True),
        ([list(range(1, 6))], 1, True),
        ([list(range(1, 11)), list(range(8, 40))], 16, True),  # cut off after round 10, gone on with after round 7
        ([[1, 2, 3, 5, 6, 9, 10, 11, 12, 13, 14, 17, 18]], 4, False),  # rounds were skipped
    ],
)
def test_levels_are_the_nodes_that_a_task_is_in(lives: list[list[int]], length: int, exact: bool) -> None:
    levels = 0
    for rounds in lives:
        epochs = Epochs(0, length, levels)
        predicted = epochs.levels_after(rounds[-1] - rounds[0] + 1)
        costs = [epochs.begin(number) for number in rounds]
        assert epochs.levels == levels + sum(costs) <= predicted
        levels = epochs.levels
    least = most_levels(lives, length)
    assert levels == least if exact else levels >= least


def test_levels_to_come_are_known_in_the_middle_of_a_tree() -> None:
    for done in range(20):
        for more in range(40):
            one, other = Epochs(0, 6), Epochs(0, 6)
            for number in range(1, done + 1):
                one.begin(number)
                other.begin(number)
            for number in range(done + 1, done + more + 1):
                other.begin(number)
            assert one.levels_after(more) == other.levels


# ---- the account


@pytest.mark.parametrize(("z", "levels", "delta"), [(5.0, 5, 1e-5), (10.0, 15, 1e-5), (1.0, 4, 1e-3), (20.0, 1, 1e-6)])
def test_epsilon_is_that_of_one_gaussian_mechanism(z: float, levels: int, delta: float) -> None:
    found = epsilon(z, levels, delta)
    assert found == pytest.approx(gaussian_epsilon(math.sqrt(levels) / z, delta), rel=1e-6, abs=1e-9)
    # Zero-concentrated privacy says a little more: rho + 2 sqrt(rho ln 1 / delta) (Bun, Steinke 2016, Proposition 1.3).
    rho = levels / (2 * z**2)
    assert 0.5 * found < found < rho + 2 * math.sqrt(rho * math.log(1 / delta))


def test_very_much_noise_is_no_warning() -> None:
    assert epsilon(1e5, 1, 1e-12) == pytest.approx(gaussian_epsilon(1e-5, 1e-12), rel=1e-3)  # a warning is an error in tests


def test_a_budget_below_one_round_is_told_without_advice_that_does_not_help(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"must be at least .* raise it or `privacy\.noise-multiplier`$"):
        run(tmp_path, privacy__epsilon=1e-3)


def test_epsilon_is_below_that_of_the_library_for_one_tree_and_near_it() -> None:
    import dp_accounting
    from dp_accounting.rdp import RdpAccountant

    for leaves in (1, 15, 16, 100):
        event = dp_accounting.SingleEpochTreeAggregationDpEvent(5.0, leaves)
        accountant = RdpAccountant(neighboring_relation=dp_accounting.NeighboringRelation.REPLACE_SPECIAL)
        theirs = accountant.compose(event).get_epsilon(1e-5)
        epochs = Epochs(0, leaves)
        for number in range(1, leaves + 1):
            epochs.begin(number)
        assert 0.85 * theirs < epsilon(5.0, epochs.levels, 1e-5) <= theirs


def test_the_mean_of_features_is_in_the_account() -> None:
    assert epsilon(2.0, 0, 1e-5) == 0.0
    assert epsilon(2.0, 8, 1e-5, centre=4.0) == pytest.approx(gaussian_epsilon(math.sqrt(8 / 4 + 1 / 16), 1e-5))


def test_budget_is_used_up_but_not_exceeded() -> None:
    options = PrivacyOptions(noise_multiplier=4.0, clip=1.0, noise="tree", noise_seed=0, epsilon=3.0)
    one, like = TaskPrivacy(options, 100, 10), {"w": torch.zeros(1)}
    steps = one.steps_within_budget(1000)
    for number in range(1, steps + 1):
        one.mean([], like, number)
    assert one.record()["epsilon"] <= 3.0
    assert one.steps_within_budget(10) == 0
    one.mean([], like, steps + 1)
    assert one.record()["epsilon"] > 3.0


def test_a_ledger_counts_levels_and_at_most_one_for_a_line_that_is_torn(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "l")
    for levels in (1, 1, 0):
        ledger.add(0.5, levels)
    assert (ledger.released(), ledger.levels()) == (3, 2)
    with (tmp_path / "l").open("a") as file:
        file.write('{"step": 4, "lev')
    assert (ledger.released(), ledger.levels()) == (4, 3)
    ledger.at_least(4, 3)
    assert (ledger.released(), ledger.levels()) == (4, 3)
    ledger.at_least(9, 7)
    assert (ledger.released(), ledger.levels()) == (9, 7)
    ledger.at_least(2, 8)
    assert ledger.levels() == 8
    (tmp_path / "l").write_text('{"step": 1, "levels": -5}\n{"step": 2, "levels": true}\n')
    assert ledger.levels() == 2


# ---- whole runs


def run(folder: Path, asked: list[tuple[int, list[str]]] | None = None, **settings: Any) -> dict[str, Any]:
    """Run a federation of three nodes. `asked` is filled with (round, tasks) of every request for training."""

    def watch(message: Message, answer: Any) -> Message:
        if asked is not None and message.metadata.message_type == TRAIN:
            request = TrainRequest.from_records(message.content)
            asked.append((request.round, request.task_ids))
        reply: Message = answer(message)
        return reply

    flat = {**FLAT, "output-dir": str(folder), **{key.replace("__", ".").replace("_", "-"): v for key, v in settings.items()}}
    config = parse_run_config(flat)
    return run_federation(LoopbackGrid(3, config.flat(), dict.fromkeys(range(3), watch)), config)


def cut(folder: Path, done: int) -> Path:
    """Make it a run whose server died after `done` rounds were written; returns its newest checkpoint."""
    (folder / "summary.json").unlink()
    for file in (folder / "checkpoints").glob("round-*"):
        if int(file.stem.removeprefix("round-")) > done:
            file.unlink()
    return folder / "checkpoints" / f"round-{done:06d}.safetensors"


def test_every_training_task_is_asked_once_an_epoch_and_the_account_says_what_that_costs(tmp_path: Path) -> None:
    asked: list[tuple[int, list[str]]] = []
    summary = run(tmp_path, asked)
    rounds: dict[str, list[int]] = {}
    for number, tasks in asked:
        for task in tasks:
            rounds.setdefault(task, []).append(number)
    assert len(rounds) == summary["tasks"]["train"] == 17
    assert all(len(numbers) == 2 and numbers[1] - numbers[0] == 4 for numbers in rounds.values())
    # A tree of 1, 2, 3, 4 leaves: a task may be in 1, 2, 2, 3 full nodes.
    levels = [1, 2, 2, 3, 4, 5, 5, 6]
    records = [record["privacy"] for record in read_history(tmp_path)]
    assert [record["levels"] for record in records] == levels
    for record in records:
        assert record["epsilon"] == pytest.approx(gaussian_epsilon(math.sqrt(record["levels"]) / 2.0, DELTA), rel=1e-6)
    assert summary["privacy"] == records[-1]
    assert (summary["privacy"]["epoch"], summary["privacy"]["sampling"]) == (4, 0.25)
    lines = [json.loads(line) for line in (tmp_path / "privacy.jsonl").read_text().splitlines()]
    assert [line["levels"] for line in lines] == [1, 1, 0, 1, 1, 1, 0, 1]
    assert [line["epsilon"] for line in lines] == [record["epsilon"] for record in records]


@pytest.mark.parametrize("secure", [False, True])
def test_one_task_more_moves_the_sum_of_one_round_of_an_epoch_by_at_most_the_clip(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, secure: bool
) -> None:
    seen: list[Params] = []
    real = TaskPrivacy.mean

    def watch(self: TaskPrivacy, replies: list[TrainReply], like: Params, server_round: int) -> Params:
        zero = {name: torch.zeros_like(value).double() for name, value in like.items()}
        seen.append({n: v + sum(r.gradient[n].double() * r.weight for r in replies) for n, v in zero.items()})
        return real(self, replies, like, server_round)

    monkeypatch.setattr(TaskPrivacy, "mean", watch)
    # The model stays where it is, so that all rounds can be compared.
    same: dict[str, Any] = {"fedavg__outer_lr": 1e-12, "seed": 3, "secure_aggregation": secure, "tasks_per_round": 5}
    trained = [run(tmp_path / str(n), gaussian__clients=n, **same)["tasks"]["train"] for n in (23, 24)]
    assert trained[1] == trained[0] + 1
    without, with_it = seen[: len(seen) // 2], seen[len(seen) // 2 :]
    moved = [norm({name: b[name] - a[name] for name in a}) for a, b in zip(without, with_it, strict=True)]
    epoch = round(trained[0] / 5)
    assert epoch == round(trained[1] / 5) > 1
    touched = [number for number, distance in enumerate(moved) if distance > 1e-5]
    assert touched == list(range(touched[0], 8, epoch))
    assert all(distance <= CLIP * (1 + 1e-5) for distance in moved)


def test_a_resumed_run_begins_a_new_tree_that_the_account_holds(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    import logging

    logging.getLogger("flwr").propagate = True
    run(tmp_path / "first", rounds=8)
    checkpoint = cut(tmp_path / "first", 6)  # rounds 7 and 8 were released, and are done again
    assert noise_levels(load(checkpoint)) == 5
    summary = run(tmp_path / "second", rounds=8, resume_from=str(checkpoint))
    assert "Privacy noise begins a new tree" in caplog.text
    # Trees of 4, 4 (with the rounds that were forgotten) and now 2 leaves: 3 + 3 + 2 levels, in ten steps.
    assert (summary["privacy"]["levels"], summary["privacy"]["steps"]) == (8, 10)
    assert summary["privacy"]["epsilon"] == pytest.approx(gaussian_epsilon(math.sqrt(8) / 2.0, DELTA), rel=1e-6)


def test_a_run_resumed_at_the_end_of_an_epoch_costs_no_more(tmp_path: Path) -> None:
    whole = run(tmp_path, rounds=5)
    cut(tmp_path, 4)
    (tmp_path / "privacy.jsonl").unlink()  # the checkpoint counts without its ledger
    summary = run(tmp_path, rounds=5, resume_from=str(tmp_path))
    assert summary["privacy"] == whole["privacy"]
    assert (summary["privacy"]["levels"], summary["privacy"]["steps"]) == (4, 5)


def test_a_checkpoint_that_does_not_count_levels_has_cost_its_steps(tmp_path: Path) -> None:
    run(tmp_path / "first", rounds=5)
    checkpoint = load(cut(tmp_path / "first", 4))
    so_far = {key: value for key, value in checkpoint.facts["so-far"].items() if key != "noise-levels"}
    alone = tmp_path / "alone.safetensors"
    write(alone, checkpoint.tensors, {**checkpoint.facts, "so-far": so_far}, wait=False)
    assert noise_levels(load(alone)) == 4
    assert run(tmp_path / "second", rounds=5, resume_from=str(alone))["privacy"]["levels"] == 5


def test_training_ends_at_the_budget(tmp_path: Path) -> None:
    summary = run(tmp_path, rounds=50, privacy__epsilon=gaussian_epsilon(math.sqrt(5) / 2.0, DELTA) + 1e-3)
    assert summary["rounds"] == 7  # the eighth would be in a sixth level
    assert summary["privacy"]["levels"] == 5


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"privacy.noise": "tree"}, "`privacy.noise` does nothing without noise"),
        ({**FLAT, "privacy.clip-quantile": 0.5}, '`privacy.clip-quantile` must be 0 with `privacy.noise = "tree"`'),
        ({**FLAT, "mode": "async"}, '`mode` must be "sync" with `privacy.noise-multiplier` above 0'),
        ({**FLAT, "privacy.noise": "bush"}, "`privacy.noise` must be"),
    ],
)
def test_settings_that_a_tree_cannot_keep_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_run_config(settings)
    assert words in str(caught.value)


def test_a_run_does_not_change_its_noise_on_the_way(tmp_path: Path) -> None:
    run(tmp_path / "first", rounds=3)
    last = cut(tmp_path / "first", 2)
    with pytest.raises(ConfigError, match=r"`privacy\.noise` must be 'tree' as in the run to go on from"):
        run(tmp_path / "second", rounds=3, resume_from=str(last), privacy__noise="independent")
