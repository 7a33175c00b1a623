"""What our commands, and the processes that they start, find around them: the locale, proxies, temporary files."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from quickbloom.common.files import check_name
from quickbloom.common.system import loopback, temporary

_UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}


def for_processes(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What `environ` lacks for processes that we start: UTF-8, loopback without a proxy."""
    environ = os.environ if environ is None else environ
    return {**_lasting(environ), **loopback.without_socks(environ)}


def _lasting(environ: Mapping[str, str]) -> dict[str, str]:
    return {**_UTF8, **loopback.direct(environ), **temporary.absolute(environ)}


def begin() -> None:
    """What a command does before anything else. It may start the command anew, as the same process.

    Files and output are in UTF-8 whatever the locale says: where even the names of files are read in another encoding, only
    another start of Python changes that.
    """
    if not sys.flags.utf8_mode and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    speak_utf8()
    os.environ.update(_lasting(os.environ))


def speak_utf8() -> None:
    """Let this process print in UTF-8, with an escape for what that has no place for."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def check_names(arguments: list[str]) -> None:
    """Raise ConfigError for a file or a folder on the command line, or the current directory, whose name is not UTF-8.

    It could not be written down: settings and results are JSON, TOML and messages, which are text.
    """
    for argument in arguments:
        check_name("the file or folder", argument)
    if arguments and "--help" not in arguments:
        check_name("the current directory", str(Path.cwd()))
