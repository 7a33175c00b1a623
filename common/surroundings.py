"""What our commands, and the processes that they start, find around them: the locale, proxies, and other people's packages."""

import os
import sys
from collections.abc import Mapping
from pathlib import Path

from common import loopback, temporary
from common.files import check_name

PACKAGES = ("common", "server_app", "client_app")
_ROOT = Path(__file__).resolve().parent.parent
_UTF8 = {"PYTHONUTF8": "1", "PYTHONIOENCODING": "utf-8:backslashreplace"}


def for_processes(environ: Mapping[str, str] | None = None) -> dict[str, str]:
    """What `environ` lacks for processes that we start: UTF-8, loopback without a proxy, our packages before others."""
    environ = os.environ if environ is None else environ
    return {**_lasting(environ), **loopback.without_socks(environ)}


def _lasting(environ: Mapping[str, str]) -> dict[str, str]:
    path = environ.get("PYTHONPATH", "")
    ours_first = {"PYTHONPATH": os.pathsep.join([str(_ROOT), path])} if _has_foreign(path) else {}
    return {**_UTF8, **loopback.direct(environ), **temporary.absolute(environ), **ours_first}


def _has_foreign(path: str) -> bool:
    """Whether a directory of the PYTHONPATH holds a package or a module that is called like one of ours, and none before it."""
    for folder in filter(None, path.split(os.pathsep)):
        if Path(folder).resolve() == _ROOT:
            return False
        if any((Path(folder) / name / "__init__.py").is_file() or (Path(folder) / f"{name}.py").is_file() for name in PACKAGES):
            return True
    return False


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
