"""Writes files that not everybody may read: each appears whole or not at all, with its mode and owner for any umask."""

import errno
import os
import shutil
from collections.abc import Iterator, Mapping, Set
from contextlib import ExitStack, contextmanager
from pathlib import Path

from quickbloom.common.errors import ConfigError
from quickbloom.common.system import locks
from quickbloom.common.system.processes import uninterrupted
from quickbloom.common.system.whole_files import new


@contextmanager
def alone_beside(output: Path) -> Iterator[None]:
    """Let one command at a time change the directory of `output`. Raises ConfigError if another one does."""
    parent = output.absolute().parent
    with ExitStack() as stack:
        try:
            stack.enter_context(locks.locked(parent))
        except BlockingIOError:
            raise ConfigError(f"another `quickbloom secrets` is at work in '{parent}': wait for it") from None
        except OSError as error:
            raise ConfigError(
                f"`--output` must lie in a directory that can be read, got '{output}' ({error.strerror})"
            ) from None
        yield


def write_whole(directory: Path, files: Mapping[str, bytes], private: Set[str], owner: int | None) -> None:
    """Write `files` (content by relative path) into a directory that appears under its name once it is complete on the disk.

    Files whose name is in `private`, and all directories, are for the owner alone. Raises
    ConfigError, which names `--output`.
    """
    directory = directory.absolute()
    partial = directory.with_name(f".{directory.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)  # of a command that was killed
        make_directory(partial)
        for name, content in files.items():
            path = partial / name
            for folder in reversed(path.relative_to(partial).parents[:-1]):
                if not (partial / folder).is_dir():
                    make_directory(partial / folder)
            write(path, content, path.name in private)
        for path in (*partial.rglob("*"), partial):
            give(path, owner)
        partial.rename(directory)
    except OSError as error:
        if error.errno == errno.EBUSY:
            raise ConfigError(
                f"`--output` must not be the place where a volume is mounted, got '{directory}': choose a directory in it, "
                f"such as '{directory / 'secrets'}'"
            ) from None
        raise ConfigError(
            f"`--output` must be a directory that can be written, got '{directory}' ({error.strerror or error})"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def replace_all(files: Mapping[Path, bytes], private: Set[str], owner: int | None) -> None:
    """Replace several files that belong together, once all new content is on the disk."""
    partial = {path: path.with_name(f".{path.name}.partial") for path in files}
    with ExitStack() as stack:
        for path, content in files.items():
            partial[path].unlink(missing_ok=True)
            stack.callback(partial[path].unlink, missing_ok=True)
            write(partial[path], content, path.name in private)
            give(partial[path], owner)
        with uninterrupted():
            for path in files:
                partial[path].replace(path)


def make_directory(path: Path) -> None:
    """Make a directory for its owner alone."""
    path.mkdir(mode=0o700)
    path.chmod(0o700)  # whatever the umask takes away


def write(path: Path, content: bytes, private: bool) -> None:
    """Write a new file, which is on the disk on return. If it is `private`, only its owner can read it at any moment."""
    mode = 0o600 if private else 0o644
    with os.fdopen(new(path, mode), "wb") as file:
        os.fchmod(file.fileno(), mode)  # whatever the umask says
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def give(path: Path, owner: int | None) -> None:
    """Make `path` the property of the user with this id; None: leave it."""
    if owner is not None:
        os.chown(path, owner, -1)


def check_owner(owner: int | None) -> None:
    """Raise ConfigError if this user cannot give files to that one."""
    if owner is not None and os.geteuid() not in (0, owner):
        raise ConfigError(f"`--owner` needs root, which alone can give files away, got {owner} as user {os.geteuid()}")


def owner_of(output: Path) -> int | None:
    """Return the owner of new files: root adds files under the owner of the existing ones."""
    return output.stat().st_uid if os.geteuid() == 0 else None
