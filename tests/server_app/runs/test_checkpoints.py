"""Checkpoints: written whole or not at all, and never read wrongly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from quickbloom.common.errors import DataError
from quickbloom.server_app.runs import checkpoints
from quickbloom.server_app.runs.checkpoints import CheckpointWriter

TENSORS = {"meta/w": torch.arange(6.0).reshape(2, 3), "outer/step/w": torch.tensor(3.0), "meta/empty": torch.zeros(0, 2)}


def save(folder: Path, number: int, tensors: dict[str, torch.Tensor], facts: dict[str, Any], **more: Any) -> Path:
    return CheckpointWriter(folder, facts).write(number, tensors, {}, **more)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    path = save(tmp_path / "new" / "folder", 7, TENSORS, {"config": {"seed": 1}})
    found = checkpoints.load(path)
    tensors, facts = found.tensors, found.facts
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(value, TENSORS[name]) and value.dtype == TENSORS[name].dtype for name, value in tensors.items())
    assert facts == {"config": {"seed": 1}, "round": 7}


def test_tensors_that_are_not_contiguous_can_be_written(tmp_path: Path) -> None:
    tensors = checkpoints.load(save(tmp_path, 1, {"meta/w": TENSORS["meta/w"].T}, {})).tensors
    assert torch.equal(tensors["meta/w"], TENSORS["meta/w"].T)


def test_only_the_newest_few_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 100):
        save(tmp_path, number, TENSORS, {}, last=True)
    assert names(tmp_path) == [f"round-{number:06d}.safetensors" for number in (9, 10, 100)]


def test_the_newest_one_that_is_surely_on_the_disk_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [100.0]
    synced: list[int] = []
    monkeypatch.setattr("quickbloom.server_app.runs.checkpoints.time.monotonic", lambda: now[0])
    monkeypatch.setattr("os.fsync", synced.append)
    writer = CheckpointWriter(tmp_path, {})
    for number in range(1, 8):  # 0.4 s apart: the 1st, 4th and 7th are waited for, each with its name
        writer.write(number, TENSORS, {})
        assert len(synced) == 2 * (1 + (number - 1) // 3)
        now[0] += 0.4
    now[0] -= 0.4  # from here on no time passes
    for number in range(8, 12):
        writer.write(number, TENSORS, {})
    assert names(tmp_path) == [f"round-{number:06d}.safetensors" for number in (7, 9, 10, 11)]


@pytest.mark.parametrize("within", ["checkpoints", "."])
def test_a_directory_stands_for_its_newest_checkpoint(tmp_path: Path, within: str) -> None:
    for number in (8, 20, 9):
        save(tmp_path / within, number, TENSORS, {})
    assert checkpoints.load(tmp_path).facts["round"] == 20


@pytest.mark.parametrize("moment", ["quickbloom.common.personal.checkpoint.save_file", "os.fsync"])
def test_a_failing_write_leaves_the_older_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    save(tmp_path, 1, TENSORS, {"seed": 5})

    def fail(*args: Any, **_: Any) -> None:
        if moment != "os.fsync":
            args[1].write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(moment, fail)
    for number in (1, 2):
        with pytest.raises(OSError, match="the disk is full"):
            save(tmp_path, number, {"meta/w": torch.zeros(1)}, {})
    tensors, facts = checkpoints.load(tmp_path).tensors, checkpoints.load(tmp_path).facts
    assert facts == {"seed": 5, "round": 1}
    assert torch.equal(tensors["meta/w"], TENSORS["meta/w"])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = save(tmp_path, 1, TENSORS, {})
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], b"\xff" * 40, b"PK" + whole):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            checkpoints.load(path)


def flip(path: Path, at: int) -> None:
    content = bytearray(path.read_bytes())
    content[at] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("harm", ["cut", "tensor", "facts", "empty", "one bit anywhere"])
def test_a_damaged_newest_file_gives_way_to_the_one_before_it_with_a_warning(tmp_path: Path, harm: str) -> None:
    older, newer = (save(tmp_path / "checkpoints", n, {"meta/w": torch.full((4,), float(n))}, {"seed": 77}) for n in (1, 2))
    whole = newer.read_bytes()
    places = range(0, len(whole), 3) if harm == "one bit anywhere" else [len(whole) - 1]
    for place in places:
        newer.write_bytes({"cut": whole[:-3], "facts": whole.replace(b"77", b"78"), "empty": b""}.get(harm, whole))
        if harm in ("tensor", "one bit anywhere"):
            flip(newer, place)
        said: list[str] = []
        found = checkpoints.load(tmp_path, said.append)
        if found.path == newer:  # a bit that says nothing, such as one of the padding
            assert harm == "one bit anywhere"
            assert (found.tensors["meta/w"].tolist(), found.facts) == ([2.0] * 4, {"seed": 77, "round": 2})
        else:
            assert found.tensors["meta/w"].tolist() == [1.0] * 4
            assert len(said) == 1
            assert str(older) in said[0]
            assert str(newer) in said[0]


def test_no_usable_file_is_one_sentence(tmp_path: Path) -> None:
    for number in (1, 2):
        flip(save(tmp_path, number, TENSORS, {}), -1)
    with pytest.raises(DataError, match=r"no checkpoint in .* can be used: .*round-000002.* is damaged.*round-000001"):
        checkpoints.load(tmp_path)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"format": "quickbloom-2"}, {"format": "quickbloom-2", "facts": "{"}]
)
def test_a_foreign_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(DataError, match="is no checkpoint of this version"):
        checkpoints.load(tmp_path / "x.safetensors")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        checkpoints.load(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="holds no checkpoint"):
        checkpoints.load(tmp_path)


def test_facts_that_are_no_json_are_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        save(tmp_path, 1, TENSORS, {"x": object()})
    assert names(tmp_path) == []
