"""Folders and files of one user alone."""

import os
import stat
from pathlib import Path

import pytest
import torch

from quickbloom.common.engine import compiling
from quickbloom.common.personal import checkpoint
from quickbloom.common.system.private import folder, is_ours
from quickbloom.common.system.whole_files import write_private


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    return tmp_path / "cache" / "quickbloom"


def test_a_folder_is_made_for_its_owner_alone(cache: Path) -> None:
    made = folder("things")
    assert made == cache / "things"
    assert stat.S_IMODE(made.stat().st_mode) == 0o700


def test_where_others_could_take_a_folder_away_another_one_is_used(cache: Path, tmp_path: Path) -> None:
    folder("things")
    cache.chmod(0o777)  # whoever may rename `things` may put another one there
    assert folder("things") == tmp_path / f"quickbloom-things-{os.getuid()}"
    cache.chmod(0o1777)  # as /tmp is
    assert folder("things") == cache / "things"


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can give a folder away")
def test_a_folder_that_somebody_else_has_made_first_is_not_used(cache: Path, tmp_path: Path) -> None:
    (cache / "things").mkdir(parents=True, mode=0o700)
    os.chown(cache / "things", 65534, 65534)
    theirs = tmp_path / f"quickbloom-things-{os.getuid()}"
    theirs.mkdir(mode=0o700)
    os.chown(theirs, 65534, 65534)
    assert not is_ours(theirs)
    with pytest.raises(OSError, match="no folder that is this user's alone"):
        folder("things")


def test_torch_compiles_into_a_folder_of_this_user_alone(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.runtime.cache_dir_utils import cache_dir, default_cache_dir

    for before in (None, default_cache_dir()):  # the second is what torch writes down itself
        monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR", raising=False)
        if before:
            monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", before)
        compiling.use_private_cache()
        assert cache_dir() == str(cache / "compiled")
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "/one/of/mine")
    compiling.use_private_cache()
    assert os.environ["TORCHINDUCTOR_CACHE_DIR"] == "/one/of/mine"


@pytest.mark.parametrize("mask", [0o000, 0o022])
def test_private_files_and_their_partial_ones_can_be_read_by_their_owner_alone(
    tmp_path: Path, mask: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[int] = []
    replace = Path.replace

    def look_and_replace(partial: Path, target: Path) -> Path:
        seen.append(stat.S_IMODE(partial.lstat().st_mode))
        return replace(partial, target)

    monkeypatch.setattr(Path, "replace", look_and_replace)
    before = os.umask(mask)
    try:
        (tmp_path / "precious").write_text("kept")
        (tmp_path / "card.partial").symlink_to(tmp_path / "precious")
        (tmp_path / "card.json").write_text("old")
        write_private(tmp_path / "card.json", "new \u4eac")
        checkpoint.write(tmp_path / "model.safetensors", {"a": torch.zeros(2)}, {}, wait=False)
    finally:
        os.umask(before)
    assert (tmp_path / "precious").read_text() == "kept"
    assert (tmp_path / "card.json").read_bytes() == "new \u4eac".encode()
    assert seen == [0o600, 0o600]
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in ("card.json", "model.safetensors")} == {0o600}


def test_a_failure_leaves_the_old_file_and_nothing_beside_it(tmp_path: Path) -> None:
    write_private(tmp_path / "card.json", "old")
    with pytest.raises(UnicodeEncodeError):
        write_private(tmp_path / "card.json", "\udc80")
    assert [file.name for file in tmp_path.iterdir() if file.is_file()] == ["card.json"]
    assert (tmp_path / "card.json").read_text() == "old"
