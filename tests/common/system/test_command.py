"""How a command ends: with which exit code, and which sentence."""

import pytest
from safetensors import SafetensorError

from quickbloom.common.errors import DataError, RunError
from quickbloom.common.system import command, surroundings


@pytest.fixture(autouse=True)
def called(monkeypatch: pytest.MonkeyPatch) -> None:
    """As `quickbloom-edge` alone, without what `begin` changes in this process."""
    monkeypatch.setattr(surroundings, "begin", lambda: None)
    monkeypatch.setattr("sys.argv", ["quickbloom-edge"])


def fails(error: BaseException) -> None:
    def run() -> None:
        raise error

    command.perform(run)


@pytest.mark.parametrize(
    ("error", "code", "said"),
    [
        (DataError("the file 'a.csv' is empty"), 2, "error: the file 'a.csv' is empty"),
        (RunError("round 2: no node sent a usable reply"), 1, "error: round 2: no node sent a usable reply"),
        (OSError(28, "No space left on device"), 1, "OSError: [Errno 28] No space left on device): free some space"),
        (SafetensorError("I/O error"), 1, "error: a file could not be read or written (SafetensorError: I/O error)"),
    ],
)
def test_what_a_user_can_mend_is_one_sentence(
    error: BaseException, code: int, said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        fails(error)
    assert ended.value.code == code
    (line,) = capsys.readouterr().err.splitlines()
    assert said in line


@pytest.mark.parametrize("error", [ConnectionRefusedError(111, "refused"), TimeoutError("late"), ValueError("a defect")])
def test_a_defect_keeps_its_traceback(error: BaseException) -> None:
    with pytest.raises(type(error)):
        fails(error)


def test_a_name_that_is_not_utf8_is_refused_before_the_command_begins(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("sys.argv", ["quickbloom-edge", "--data=d\udce9p"])
    with pytest.raises(SystemExit) as ended:
        command.perform(lambda: pytest.fail("the command has begun"))
    assert ended.value.code == 2
    assert "'--data=d\\xe9p' has a name that is not UTF-8" in capsys.readouterr().err
