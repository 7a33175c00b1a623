"""Starts child processes, and ends them together with everything that they started."""

import ctypes
import os
import signal
import subprocess
import sys
import time
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

ENDINGS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name))  # Windows has two
"""Signals that end a command; each raises KeyboardInterrupt in it."""
_PR_SET_PDEATHSIG = 1


def cores() -> int:
    """Return the number of CPU cores that this process may use; on macOS and Windows those of the machine."""
    affinity = getattr(os, "sched_getaffinity", None)
    return len(affinity(0)) if affinity else os.cpu_count() or 1


@contextmanager
def uninterrupted() -> Iterator[None]:
    """Ignore the signals that end this process: a second Ctrl-C during clean-up would leave children behind."""
    before = {number: signal.signal(number, signal.SIG_IGN) for number in ENDINGS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def start(
    command: Sequence[str], environment: Mapping[str, str], output: int | IO[Any] = subprocess.PIPE, folder: Path | None = None
) -> subprocess.Popen[str]:
    """Start a program whose output, errors among it, is text to read from `stdout`, or goes to the file `output`.

    It leads a session of its own: Ctrl-C reaches this process alone, which then ends it in order (`end_group`). It has no
    input. `environment`: the whole of its variables; `folder`: its working directory, by default this one.
    """
    return subprocess.Popen(
        command,
        env=environment,
        cwd=folder,
        stdin=subprocess.DEVNULL,
        stdout=output,
        stderr=subprocess.STDOUT,
        text=True,
        encoding="utf-8",
        errors="replace",
        start_new_session=True,
    )


def end_with_parent(wish: int) -> None:
    """Ask for the signal `wish` when the thread that started this process ends, however it ends. Does nothing outside Linux."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, wish)


def end_group(process: subprocess.Popen[Any], patience: float = 10.0) -> None:
    """End a process that leads a session, and its children there: SIGTERM, then SIGKILL. Does nothing if it has ended.

    `patience`: seconds between the two.
    """
    for wish, seconds in ((signal.SIGTERM, patience), (signal.SIGKILL, 5.0)):
        if process.poll() is not None:
            break
        try:
            os.killpg(process.pid, wish)
            process.wait(seconds)
        except (ProcessLookupError, subprocess.TimeoutExpired):
            continue
    if process.stdout is not None:
        process.stdout.close()


def end_all_with(variable: str, sessions: Collection[int] = ()) -> None:
    """End every process whose environment holds `variable` ("NAME=value"). Raises TimeoutError if one does not end.

    Flower's SuperLink starts its workers in their own sessions, so ending its process group is not
    enough. `sessions`, from `sessions_with`, are ended as a whole: Ray's agents overwrite their
    environment with their titles.
    """
    seen_without = 0
    sessions = set(sessions)
    for wish in (signal.SIGTERM, signal.SIGKILL):
        deadline = time.monotonic() + 8
        while time.monotonic() < deadline:
            found = processes_with(variable)
            sessions |= sessions_with(variable)
            found += [pid for pid in living() if pid not in found and session_of(pid) in sessions]
            # A process that is just starting shows no environment yet, so look twice.
            seen_without = 0 if found else seen_without + 1
            if seen_without == 2:
                return
            for pid in found:
                try:
                    os.kill(pid, wish)
                except (ProcessLookupError, PermissionError):
                    continue
            time.sleep(0.2)
    raise TimeoutError(f"these processes do not end: {found}")


def sessions_with(variable: str) -> set[int]:
    """Return the sessions led by a process whose environment holds `variable`, without this process's own."""
    return {pid for pid in processes_with(variable) if session_of(pid) == pid} - {os.getsid(0)}


def processes_with(variable: str) -> list[int]:
    """Return the ids of other living processes whose environment holds `variable`. Empty if there is no /proc."""
    found = []
    for pid in living():
        try:
            if variable.encode() in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(pid)
        except OSError:
            continue
    return found


def living() -> list[int]:
    """Return the ids of the other processes that have not ended. Empty if there is no /proc."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            alive = (entry / "stat").read_text(encoding="utf-8").rpartition(")")[2].split()[0] != "Z"
        except OSError:
            continue
        if alive and int(entry.name) != os.getpid():
            found.append(int(entry.name))
    return found


def session_of(pid: int) -> int:
    """Return the session of a process; 0 if there is no such process."""
    try:
        return os.getsid(pid)
    except OSError:
        return 0
