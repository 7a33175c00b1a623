"""Environment of our commands and of the processes they start: locale, proxies, temporary files."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from quickbloom.common.files import check_name
from quickbloom.common.system import loopback, temporary

_UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}


def for_processes(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """Return the variables that `environ` lacks for our child processes.

    They select UTF-8, exempt loopback from proxies and turn off unusable SOCKS proxies.
    """
    environ = os.environ if environ is None else environ
    return {**_lasting(environ), **loopback.without_socks(environ)}


def _lasting(environ: Mapping[str, str]) -> dict[str, str]:
    return {**_UTF8, **loopback.direct(environ), **temporary.absolute(environ)}


def begin() -> None:
    """Prepare the process of a command. This may restart Python in the same process.

    Files and output use UTF-8 whatever the locale. If file names are decoded in another encoding,
    only a restart of Python changes that.
    """
    if not sys.flags.utf8_mode and sys.getfilesystemencoding().lower() not in ("utf-8", "utf8"):
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, "-X", "utf8", *sys.orig_argv[1:]])
    speak_utf8()
    os.environ.update(_lasting(os.environ))


def speak_utf8() -> None:
    """Make this process print in UTF-8, with escapes for characters that cannot be encoded."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="backslashreplace")


def check_names(arguments: list[str]) -> None:
    """Raise ConfigError for an argument or a current directory whose name is not UTF-8.

    Such a name could not be recorded: settings and results are JSON, TOML and messages, which are
    text.
    """
    for argument in arguments:
        check_name("the file or folder", argument)
    if arguments and "--help" not in arguments:
        check_name("the current directory", str(Path.cwd()))
