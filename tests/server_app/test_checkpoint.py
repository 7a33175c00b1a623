"""Checkpoints: written whole or not at all, and never read wrongly."""

from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from common.errors import DataError
from server_app import checkpoint

TENSORS = {"meta/w": torch.arange(6.0).reshape(2, 3), "outer/step/w": torch.tensor(3.0), "meta/empty": torch.zeros(0, 2)}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_tensors_and_facts_come_back(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path / "new" / "folder", 7, TENSORS, {"config": {"seed": 1}})
    tensors, facts = checkpoint.load(path)
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(value, TENSORS[name]) and value.dtype == TENSORS[name].dtype for name, value in tensors.items())
    assert facts == {"config": {"seed": 1}, "round": 7}


def test_tensors_that_are_not_contiguous_can_be_written(tmp_path: Path) -> None:
    tensors, _ = checkpoint.load(checkpoint.save(tmp_path, 1, {"meta/w": TENSORS["meta/w"].T}, {}))
    assert torch.equal(tensors["meta/w"], TENSORS["meta/w"].T)


def test_only_the_newest_few_are_kept(tmp_path: Path) -> None:
    for number in (1, 2, 9, 10, 100):
        checkpoint.save(tmp_path, number, TENSORS, {})
    assert names(tmp_path) == [f"round-{number:06d}.safetensors" for number in (9, 10, 100)]


@pytest.mark.parametrize("within", ["checkpoints", "."])
def test_a_directory_stands_for_its_newest_checkpoint(tmp_path: Path, within: str) -> None:
    for number in (8, 20, 9):
        checkpoint.save(tmp_path / within, number, TENSORS, {})
    assert checkpoint.load(tmp_path)[1]["round"] == 20


@pytest.mark.parametrize("moment", ["save_file", "os.fsync"])
def test_a_failing_write_leaves_the_older_checkpoint_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    checkpoint.save(tmp_path, 1, TENSORS, {"seed": 5})

    def fail(*args: Any, **_: Any) -> None:
        if moment == "save_file":
            args[1].write_bytes(b"half of it")
        raise OSError("the disk is full")

    monkeypatch.setattr(f"server_app.checkpoint.{moment}", fail)
    for number in (1, 2):
        with pytest.raises(OSError, match="the disk is full"):
            checkpoint.save(tmp_path, number, {"meta/w": torch.zeros(1)}, {})
    tensors, facts = checkpoint.load(tmp_path)
    assert facts == {"seed": 5, "round": 1}
    assert torch.equal(tensors["meta/w"], TENSORS["meta/w"])


def test_a_damaged_file_is_refused(tmp_path: Path) -> None:
    path = checkpoint.save(tmp_path, 1, TENSORS, {})
    whole = path.read_bytes()
    for damaged in (b"", whole[:-1], whole[: len(whole) // 2], b"\xff" * 40, b"PK" + whole):
        path.write_bytes(damaged)
        with pytest.raises(DataError, match="cannot be read"):
            checkpoint.load(path)


@pytest.mark.parametrize(
    "metadata", [None, {}, {"format": "pt"}, {"format": "quickbloom-1"}, {"format": "quickbloom-1", "facts": "{"}]
)
def test_a_foreign_file_is_refused(tmp_path: Path, metadata: dict[str, str] | None) -> None:
    save_file(TENSORS, tmp_path / "x.safetensors", metadata=metadata)
    with pytest.raises(DataError, match="is no checkpoint of this program"):
        checkpoint.load(tmp_path / "x.safetensors")


def test_what_is_not_there_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="cannot be read"):
        checkpoint.load(tmp_path / "none.safetensors")
    with pytest.raises(DataError, match="holds no checkpoint"):
        checkpoint.load(tmp_path)


def test_facts_that_are_no_json_are_an_error_before_anything_is_written(tmp_path: Path) -> None:
    with pytest.raises(TypeError):
        checkpoint.save(tmp_path, 1, TENSORS, {"x": object()})
    assert names(tmp_path) == []
