"""What tasks keep on their node: over rounds, over restarts with `state-dir`, and never from another training."""

import logging
from pathlib import Path

import pytest
import torch
from flwr.app import Message, RecordDict
from loopback import LoopbackGrid
from safetensors.torch import save_file

from quickbloom.client_app.task_state import KeptState
from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.maths.batch import Episode, Minibatches
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest, error_reason
from quickbloom.server_app.app import run_federation

TASK = "device-00"
FRESH = {"w": torch.zeros(2), "b": torch.zeros(1)}
KEPT = {"w": torch.tensor([1.0, -2.0]), "b": torch.tensor([0.5])}


def same(found: Params | None, expected: Params) -> bool:
    return found is not None and found.keys() == expected.keys() and all(torch.equal(found[k], v) for k, v in expected.items())


def saved(folder: Path, lineage: str = "first") -> Path:
    """The file in which a node's task "a/b" has kept KEPT."""
    KeptState(RecordDict(), str(folder), lineage).save("a/b", KEPT)
    (file,) = folder.rglob("*.safetensors")
    return file


def test_a_task_finds_what_it_kept_and_another_task_nothing() -> None:
    store = KeptState(RecordDict(), "", "first")
    assert store.load("a", FRESH) is None
    store.save("a", KEPT)
    assert same(store.load("a", FRESH), KEPT)
    assert store.load("b", FRESH) is None


def test_without_a_state_dir_nothing_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    KeptState(RecordDict(), "", "first").save("a", KEPT)
    assert list(tmp_path.iterdir()) == []


def test_a_state_dir_keeps_it_over_a_restart_of_the_node(tmp_path: Path) -> None:
    saved(tmp_path)
    assert same(KeptState(RecordDict(), str(tmp_path), "first").load("a/b", FRESH), KEPT)
    assert KeptState(RecordDict(), str(tmp_path), "first").load("a", FRESH) is None


def test_another_training_starts_afresh_in_memory_and_on_disk(tmp_path: Path) -> None:
    records = RecordDict()
    KeptState(records, str(tmp_path), "first").save("a", KEPT)
    assert same(KeptState(records, str(tmp_path), "first").load("a", FRESH), KEPT)
    assert KeptState(records, str(tmp_path), "second").load("a", FRESH) is None


@pytest.mark.parametrize("lineage", ["..", ".", "a/../..", "/tmp", ""])
def test_no_name_of_a_training_leads_out_of_the_state_dir(tmp_path: Path, lineage: str) -> None:
    folder = tmp_path / "outer" / "state"
    KeptState(RecordDict(), str(folder), lineage).save("../x", KEPT)
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert len(files) == 1
    assert folder in files[0].parents
    assert same(KeptState(RecordDict(), str(folder), lineage).load("../x", FRESH), KEPT)


@pytest.mark.parametrize("damage", [b"", b"\x07", b"\xff" * 64, b'{"a": 1}' * 10])
def test_a_damaged_file_starts_afresh_with_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture, damage: bytes) -> None:
    saved(tmp_path).write_bytes(damage)
    assert warned(tmp_path, caplog).startswith("The state of task a/b on this node cannot be used, it starts afresh: ")


@pytest.mark.parametrize(
    ("foreign", "reason"),
    [
        ({"w": torch.zeros(2)}, "the tensor `b` is missing"),
        ({**KEPT, "more": torch.zeros(1)}, "there is an unexpected tensor `more`"),
        ({**KEPT, "w": torch.zeros(3)}, "the tensor `w` has shape (3,), expected (2,)"),
        ({**KEPT, "w": torch.zeros(2, dtype=torch.float64)}, "the tensor `w` has dtype float64, expected float32"),
    ],
)
def test_a_file_of_another_model_starts_afresh_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, foreign: Params, reason: str
) -> None:
    save_file(foreign, saved(tmp_path))
    assert warned(tmp_path, caplog).endswith(f"it starts afresh: {reason}")


def warned(folder: Path, caplog: pytest.LogCaptureFixture) -> str:
    """Load from the folder, expect nothing, no stack, and one warning; returns it."""
    logger = logging.getLogger("flwr")
    logger.addHandler(caplog.handler)
    try:
        assert KeptState(RecordDict(), str(folder), "first").load("a/b", FRESH) is None
    finally:
        logger.removeHandler(caplog.handler)
    (record,) = {id(record): record for record in caplog.records}.values()
    assert (record.levelno, record.exc_info) == (logging.WARNING, None)
    return record.getMessage()


def test_numbers_that_are_not_finite_start_afresh(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    save_file({**KEPT, "b": torch.tensor([float("nan")])}, saved(tmp_path))
    assert "it starts afresh" in warned(tmp_path, caplog)


def test_a_half_written_file_never_stands_in_for_a_whole_one(tmp_path: Path) -> None:
    file = saved(tmp_path)
    file.with_suffix(".partial").write_bytes(b"cut o")
    assert same(KeptState(RecordDict(), str(tmp_path), "first").load("a/b", FRESH), KEPT)


# ---- on a node


def config(**more: object) -> RunConfig:
    flat = {"algorithm": "heads", "mlp.hidden": "6", "heads.inner-lr": 0.1, "heads.inner-steps": 4, "heads.batch-size": 5}
    return parse_run_config({**flat, **more}).resolved()


def node(folder: Path | str = "", **more: object) -> LoopbackGrid:
    return LoopbackGrid(1, config(**more).flat(), node_configs={0: {"state-dir": str(folder)}})


def train(grid: LoopbackGrid, number: int, lineage: str = "first", **more: object) -> list[float]:
    """One round of two tasks from the initial body; returns their losses after it."""
    dataset = load_dataset("digits", config().table("digits"), Path())
    meta = build_algorithm(config(**more), dataset.spec).init()
    request = TrainRequest(meta, number, 0, [TASK, "device-01"], lineage)
    (reply,) = grid.send_and_receive([Message(request.to_records(), 100, TRAIN)])
    assert error_reason(reply.content) is None
    return TrainReply.from_records(reply.content, 2).losses


def test_the_second_round_goes_on_from_the_heads_of_the_first() -> None:
    grid = node()
    first, second = train(grid, 1), train(grid, 1)
    assert all(after < before for before, after in zip(first, second, strict=True))
    assert train(node(), 1) == first


def test_a_restarted_node_goes_on_with_a_state_dir_and_starts_afresh_without(tmp_path: Path) -> None:
    uninterrupted = node()
    expected = [train(uninterrupted, number) for number in (1, 2)]
    assert train(node(tmp_path), 1) == expected[0]
    assert train(node(tmp_path), 2) == expected[1]
    assert train(node(), 2) != expected[1]


def test_another_training_on_the_same_node_starts_afresh(tmp_path: Path) -> None:
    for folder in (tmp_path, ""):
        grid = node(folder)
        first = train(grid, 1, lineage="first")
        assert train(grid, 1, lineage="second") == first
        assert train(grid, 1, lineage="first") != first


def test_a_damaged_file_costs_its_task_the_head_and_nobody_else_anything(tmp_path: Path) -> None:
    first = train(node(tmp_path), 1)
    (tmp_path / "first" / f"{TASK}.safetensors").write_bytes(b"damaged")
    again = train(node(tmp_path), 1)
    assert again[0] == pytest.approx(first[0], abs=1e-6)
    assert again[1] < first[1]


def test_a_state_dir_that_cannot_be_written_is_answered_with_one_sentence(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    dataset = load_dataset("digits", config().table("digits"), Path())
    request = TrainRequest(build_algorithm(config(), dataset.spec).init(), 1, 0, [TASK], "first")
    (reply,) = node(tmp_path / "file").send_and_receive([Message(request.to_records(), 100, TRAIN)])
    assert not reply.has_error()
    reason = error_reason(reply.content)
    assert reason is not None
    assert "`state-dir` must be a directory that can be written" in reason


def one_episode(algorithm: Algorithm, kept: Params, episode: int) -> Params:
    """The head after one episode of round 1, by itself."""
    rng = generator(0, "train", 1, TASK, episode)
    data = load_dataset("digits", config().table("digits"), Path()).train_draw(TASK, rng)
    rows = torch.from_numpy(algorithm.minibatch_indices(len(data.support.x) + len(data.query.x), rng))
    minibatches = Minibatches(rows, torch.ones(rows.shape))
    return algorithm.contribute(algorithm.init(), kept, Episode(data.support, data.query), minibatches)[2]


def test_several_episodes_start_from_the_same_head_and_their_mean_is_kept() -> None:
    grid = node(episodes=3)
    train(grid, 1, episodes=3)
    algorithm = build_algorithm(config(), load_dataset("digits", config().table("digits"), Path()).spec)
    ends = [one_episode(algorithm, algorithm.fresh(), episode) for episode in range(3)]
    found = KeptState(grid._contexts[100].state, "", "first").load(TASK, algorithm.fresh())
    assert found is not None
    for name, value in found.items():
        assert torch.allclose(value, torch.stack([end[name] for end in ends]).mean(0), rtol=0, atol=1e-6)


class Cut(BaseException):
    """The end of the server in the middle of a run."""


def test_a_run_that_goes_on_on_restarted_nodes_ends_like_one_that_was_never_cut_off(tmp_path: Path) -> None:
    def settings(name: str, **more: object) -> RunConfig:
        run = {"rounds": 4, "checkpoint-every": 1, "min-nodes": 1, "adapt-steps": 2, "output-dir": str(tmp_path / name)}
        return config(**run, **more)

    def cut(message: Message, answer: object) -> Message:
        if message.metadata.message_type == TRAIN and message.metadata.group_id == "3":
            raise Cut
        return answer(message)  # type: ignore[no-any-return, operator]

    whole = run_federation(node(tmp_path / "a"), settings("whole"))
    grid = LoopbackGrid(1, settings("cut").flat(), {0: cut}, {0: {"state-dir": str(tmp_path / "b")}})
    with pytest.raises(Cut):
        run_federation(grid, settings("cut"))
    rest = run_federation(node(tmp_path / "b"), settings("rest", **{"resume-from": str(tmp_path / "cut")}))
    assert rest["test"] == whole["test"]
    assert rest["validation"] == whole["validation"]
    afresh = run_federation(node(), settings("afresh", **{"resume-from": str(tmp_path / "cut")}))
    assert afresh["test"] != whole["test"]
