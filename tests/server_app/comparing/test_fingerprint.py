"""What a comparison stands on: any change of it is another run, and is named; another place of the same data is neither."""

import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.gaussian import Gaussian
from quickbloom.server_app.comparing.batch import Run
from quickbloom.server_app.comparing.fingerprint import changes, remember
from quickbloom.server_app.comparing.plan import Plan

FUNCTION = """
import numpy as np

def rows():
    x = np.arange({rows}.0)
    return {{"x": x, "target": np.where(x % 2 > 0, "a", "b"), "task": x.astype(int) // 20}}
"""


def plan(dataset: str, *settings: str) -> Plan:
    return Plan(("fedavg",), (0,), dataset, 2, (0.1,), settings)


def directory(what: Plan) -> str:
    return Run(what.candidates("fedavg")[0], 0, Path("x")).directory.name


def csv(path: Path, last: int = 1) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("task,x,target\n" + "".join(f"t{i % 8},{i},{i % 3}\n" for i in range(80)) + f"t0,1,{last}\n")
    return path


def test_another_file_is_another_run_and_another_place_is_not(tmp_path: Path) -> None:
    one, same, other = csv(tmp_path / "a" / "one.csv"), csv(tmp_path / "b" / "two.csv"), csv(tmp_path / "c" / "one.csv", 2)
    names = [directory(plan("own", f"own.path={path}", "own.task-column=task")) for path in (one, same, other)]
    assert names[0] == names[1] != names[2]


def images(folder: Path) -> Path:
    for task in ("u1", "u2"):
        for label in ("cat", "dog"):
            for number in range(4):
                place = folder / task / label
                place.mkdir(parents=True, exist_ok=True)
                Image.fromarray(np.full((28, 28), number, dtype=np.uint8)).save(place / f"{number}.png")
    return folder


def test_a_change_in_a_folder_of_images_is_another_run_and_is_named(tmp_path: Path) -> None:
    folder = images(tmp_path / "photos")
    first = plan("own", f"own.path={folder}")
    before, parts = directory(first), first.parts()
    assert remember(tmp_path, parts) == ""
    Image.fromarray(np.full((28, 28), 9, dtype=np.uint8)).save(folder / "u1" / "cat" / "0.png")
    (folder / "u2" / "dog" / "3.png").unlink()
    again = plan("own", f"own.path={folder}")
    assert directory(again) != before
    assert remember(tmp_path, again.parts()) == (
        "The data changed since this comparison was begun, 2 of 16 files of `photos` (u1/cat/0.png, u2/dog/3.png): the runs on "
        "them start anew"
    )
    assert remember(tmp_path, again.parts()) == ""


def test_a_functions_source_and_what_it_returns_decide(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(tmp_path))

    def now(text: str, **more: object) -> tuple[str, dict[str, dict[str, str]]]:
        (tmp_path / "made_up.py").write_text(text)
        monkeypatch.delitem(sys.modules, "made_up", raising=False)
        module = __import__("made_up")
        for name, value in more.items():
            monkeypatch.setattr(module, name, value)
        what = plan("own", "own.path=made_up:rows")
        return directory(what), what.parts()

    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    first = now(FUNCTION.format(rows=160))
    assert now(FUNCTION.format(rows=160)) == first
    comment = now(FUNCTION.format(rows=160) + "# more\n")
    assert comment[0] != first[0]
    assert changes(first[1], comment[1]) == ["the source made_up.py, of `made_up:rows`"]
    # The same source, and other values: as of a function that reads a table elsewhere.
    x = np.arange(160.0) + 1
    returns = {"x": x, "target": np.where(x % 2 > 0, "a", "b"), "task": x.astype(int) // 20}
    other = now(FUNCTION.format(rows=160), rows=lambda: returns)
    assert other[0] != first[0]
    assert changes(first[1], other[1]) == ["what it returns, of `made_up:rows`"]


def test_the_examples_of_a_registered_data_set_decide(monkeypatch: pytest.MonkeyPatch) -> None:
    class Mine(Gaussian):
        name = "mine"
        __module__ = __name__
        shift = 0.0

        def test_draws(self, task_id: str) -> list:  # type: ignore[type-arg]
            data = super().test_draws(task_id)
            return [replace(one, test=one.test._replace(x=one.test.x + self.shift)) for one in data]

    monkeypatch.setitem(DATASETS, "mine", Mine)
    before = plan("mine").parts()
    assert plan("mine").parts() == before
    monkeypatch.setattr(Mine, "shift", 1.0)
    assert changes(before, plan("mine").parts()) == ["what it returns, of `mine`"]


def test_data_of_this_project_have_a_hash_as_well() -> None:
    assert plan("gaussian").parts() == plan("gaussian").parts()
    assert plan("gaussian").parts() != plan("gaussian", "gaussian.clients=9").parts()
    assert plan("gaussian").candidates("fedavg")[0].data.digest  # type: ignore[union-attr]


def test_a_file_of_weights_is_part_of_it(tmp_path: Path) -> None:
    file = tmp_path / "start.safetensors"
    file.write_bytes(b"one")
    before = directory(plan("gaussian", f"weights={file}"))
    file.write_bytes(b"two")
    assert directory(plan("gaussian", f"weights={file}")) != before


def test_what_was_not_there_before_has_not_changed(tmp_path: Path) -> None:
    assert remember(tmp_path, {"a.csv": {"a.csv": "1"}}) == ""
    assert remember(tmp_path, {"b.csv": {"b.csv": "1"}}) == ""
    assert remember(tmp_path, {"a.csv": {"a.csv": "2"}, "b.csv": {"b.csv": "1"}}).startswith(
        "The data changed since this comparison was begun, `a.csv`:"
    )
