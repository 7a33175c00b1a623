"""events.jsonl: written as things happen, readable at any moment, cut where a run goes on."""

from pathlib import Path

from quickbloom.server_app.events.file import FILE, events_until, read_events, written
from quickbloom.server_app.events.kinds import Event, Failed, RoundEnded, Saved, Started, Stopped, Warned

STARTED = Started("/tmp/r", "maml", "digits", 0, 4)


def ended(number: int) -> RoundEnded:
    return RoundEnded(number, 4, 1.0, 3, 0.5)


def test_every_event_can_be_read_at_once(tmp_path: Path) -> None:
    with written(tmp_path) as tell:
        for number in (1, 2, 3):
            tell(ended(number))
            assert read_events(tmp_path) == [ended(n) for n in range(1, number + 1)]


def test_a_new_file_takes_the_place_of_the_old_one_and_begins_with_what_is_kept(tmp_path: Path) -> None:
    for kept in ([], [STARTED]):
        with written(tmp_path, kept) as tell:
            assert read_events(tmp_path) == kept
            tell(ended(1))
        assert read_events(tmp_path) == [*kept, ended(1)]


def test_what_is_damaged_or_half_written_is_left_out(tmp_path: Path) -> None:
    with written(tmp_path, [STARTED, ended(1), ended(2)]):
        pass
    lines = (tmp_path / FILE).read_bytes().splitlines()
    (tmp_path / FILE).write_bytes(b"\n".join([lines[0], b"\x00\x00", b'{"kind": "weather"}', lines[1], lines[2][:-3]]))
    assert read_events(tmp_path) == [STARTED, ended(1)]
    assert read_events(tmp_path / "none") == []


def test_of_a_run_that_was_cut_off_its_rounds_up_to_the_checkpoint_stay(tmp_path: Path) -> None:
    first: list[Event] = [STARTED, Warned("it rains"), ended(1), Saved(1, "x"), Failed("node 7", "odd", 2), ended(2)]
    lost: list[Event] = [Failed("node 7", "odd", 3), Warned("round 3", 3), ended(3), Stopped("no node")]
    with written(tmp_path, [*first, *lost]):
        pass
    assert events_until(tmp_path, 2) == first
    assert events_until(tmp_path, 0) == [STARTED, Warned("it rains")]
