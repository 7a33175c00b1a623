"""`.csv.gz` is the `.csv` that it holds: the same columns, the same name of a task, the same limits."""

import gzip
import tracemalloc
from pathlib import Path

import pytest
from typer.testing import CliRunner

from quickbloom.client_app.check_data import describe
from quickbloom.client_app.cli import cli
from quickbloom.common.datasets.own import Own, OwnOptions, task_of_file
from quickbloom.common.errors import DataError
from quickbloom.common.system.whole_files import whole

TEXT = "sep=;\n# a comment\nx;y;Ort\n" + "".join(f"{i},5;{'ab'[i % 2]};Köln\n" for i in range(12))


def packed(path: Path, text: str = TEXT) -> Path:
    path.write_bytes(gzip.compress(text.encode(), mtime=0))
    return path


@pytest.mark.parametrize("name", ["ward-7.csv.gz", "ward-7.CSV.GZ"])
def test_a_packed_file_says_what_the_plain_one_says(tmp_path: Path, name: str) -> None:
    plain = tmp_path / "plain" / "ward-7.csv"
    plain.parent.mkdir()
    plain.write_text(TEXT)
    file = packed(tmp_path / name)
    lines = [line.replace(str(file), str(plain)) for line in describe(str(file), "", "y", show=12)]
    assert lines == list(describe(str(plain), "", "y", show=12))
    assert task_of_file(str(file)) == "ward-7"
    done = CliRunner().invoke(cli, ["check-data", str(file), "--target", "y"])
    assert (done.exit_code, done.stdout.splitlines()) == (0, [line for line in lines if not line.startswith("row ")])
    own = [Own(OwnOptions(path=str(path), task_name="t", target_column="y"), Path()) for path in (file, plain)]
    assert all((a == b).all() for a, b in zip(own[0].rows["t"], own[1].rows["t"], strict=True))


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"x,y\n1,a\n", "cannot be read .*[Nn]ot a gzipped file"),
        (gzip.compress(TEXT.encode(), mtime=0)[:-12], "cannot be read .*ended before the end-of-stream marker"),
        (gzip.compress(b"x,y\n1,\xff\n", mtime=0), r"not in UTF-8 \(line 2\)"),
        (gzip.compress(b"", mtime=0), "hold no rows"),
        (b"", "is empty"),
    ],
)
def test_damaged_ones_are_refused_in_one_sentence(tmp_path: Path, content: bytes, words: str) -> None:
    (tmp_path / "a.csv.gz").write_bytes(content)
    with pytest.raises(DataError, match=words) as caught:
        list(describe(str(tmp_path / "a.csv.gz"), "", "y"))
    assert "\n" not in str(caught.value)


def test_a_small_file_that_unpacks_to_too_much_is_refused_without_taking_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("quickbloom.common.datasets.own.files.tables.LIMIT", 60_000_000)
    with gzip.open(tmp_path / "bomb.csv.gz", "wb") as file:
        for _ in range(100):
            file.write(b"0" * 2**20)
    assert (tmp_path / "bomb.csv.gz").stat().st_size < 200_000
    tracemalloc.start()
    with pytest.raises(DataError, match=r"hold more than 0.1 GB of text, the most that is read"):
        list(describe(str(tmp_path / "bomb.csv.gz"), "", "y"))
    assert tracemalloc.get_traced_memory()[1] < 20_000_000
    tracemalloc.stop()


def test_what_is_written_packed_is_whole_or_as_it_was(tmp_path: Path) -> None:
    path = tmp_path / "out.csv.gz"
    with whole(path, newline="", packed=True) as file:
        file.write("a,b\r\nä,1\r\n")
    first = path.read_bytes()
    assert gzip.decompress(first).decode() == "a,b\r\nä,1\r\n"
    with pytest.raises(ZeroDivisionError), whole(path, newline="", packed=True) as file:
        file.write(f"other{1 / 0}")
    assert [entry.read_bytes() for entry in tmp_path.iterdir()] == [first]
    with whole(tmp_path / "again.gz", newline="", packed=True) as file:
        file.write("a,b\r\nä,1\r\n")
    assert (tmp_path / "again.gz").read_bytes() == first  # no time of writing, no name
