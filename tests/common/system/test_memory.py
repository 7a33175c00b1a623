"""The memory that there is: of the machine, of a container, and of a service in a group with a limit."""

import math
from pathlib import Path

import pytest

from quickbloom.common.system import memory


@pytest.fixture
def system(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with 9 MB, of which 4 are free, whose files lie in `proc` and `cgroup`."""
    monkeypatch.setattr(memory, "PROC", tmp_path / "proc")
    monkeypatch.setattr(memory, "CGROUP", tmp_path / "cgroup")
    write(tmp_path / "proc" / "meminfo", "MemTotal: 9000 kB\nMemAvailable: 4000 kB\n")
    return tmp_path


def write(file: Path, text: str) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(text)


def test_without_a_limit_it_is_the_machines(system: Path) -> None:
    write(system / "proc" / "self" / "cgroup", "0::/user.slice\n")
    write(system / "cgroup" / "user.slice" / "memory.max", "max\n")
    write(system / "cgroup" / "user.slice" / "memory.current", "1000\n")
    assert (memory.total(), memory.free()) == (9000 * 1024, 4000 * 1024)


def test_in_a_container_it_is_the_containers_and_files_that_were_read_give_way(system: Path) -> None:
    write(system / "cgroup" / "memory.max", "1500\n")
    write(system / "cgroup" / "memory.current", "1000\n")
    assert (memory.total(), memory.free()) == (1500, 500)
    write(system / "cgroup" / "memory.stat", "anon 300\ninactive_file 600\nactive_file 100\n")
    assert memory.free() == 1100
    write(system / "cgroup" / "memory.max", "300\n")
    assert memory.free() == 0


@pytest.mark.parametrize("version", [1, 2])
def test_a_service_has_the_least_limit_of_all_groups_that_it_lies_in(system: Path, version: int) -> None:
    root, line = (system / "cgroup" / "memory", "4:cpu,memory:/a/b") if version == 1 else (system / "cgroup", "0::/a/b")
    limit, used = ("memory.limit_in_bytes", "memory.usage_in_bytes") if version == 1 else ("memory.max", "memory.current")
    write(system / "proc" / "self" / "cgroup", f"9:pids:/other\n{line}\n")
    for group, most, taken in (("a/b", 5000, 100), ("a", 2000, 1900), ("", 9223372036854771712, 5)):
        write(root / group / limit, f"{most}\n")
        write(root / group / used, f"{taken}\n")
    assert (memory.total(), memory.free()) == (2000, 100)


def test_where_nothing_is_told_there_is_no_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "PROC", tmp_path)
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    assert (memory.total(), memory.free()) == (math.inf, math.inf)


def test_what_this_process_holds_is_read_from_its_status(system: Path) -> None:
    write(system / "proc" / "self" / "status", "Name:\tVmRSS\nVmHWM:\t  650 kB\nVmRSS:\t  612 kB\nThreads:\t1\n")
    assert memory.held() == {"resident": 612 * 1024, "peak": 650 * 1024}
    (system / "proc" / "self" / "status").unlink()
    assert memory.held() == {}


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs /proc")
def test_what_is_taken_is_held_and_the_peak_stays_when_it_is_given_back() -> None:
    before, size = memory.held(), 2**26
    block = bytearray(b"1") * size
    assert len(block) == size
    assert memory.held()["resident"] > before["resident"] + size // 2
    del block
    assert memory.held()["peak"] > before["resident"] + size // 2
