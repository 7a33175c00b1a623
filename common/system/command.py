"""How every command ends: a mistake in the input, or trouble with a file, in one sentence."""

import sys
from collections.abc import Callable

from safetensors import SafetensorError

from quickbloom.common.errors import FILE_TROUBLE, QuickbloomError, RunError, in_one_line
from quickbloom.common.system import surroundings
from quickbloom.common.system.terminal import FAILED, WRONG_INPUT, say_error


def perform(command: Callable[[], object]) -> None:
    """Run a command: a mistake in the input ends in one sentence on stderr and exit code 2.

    A run that cannot go on, and a full disk, end in one sentence and exit code 1.
    """
    surroundings.begin()
    try:
        surroundings.check_names(sys.argv[1:])
        command()
    except QuickbloomError as error:
        say_error(str(error))
        sys.exit(FAILED if isinstance(error, RunError) else WRONG_INPUT)
    except (ConnectionError, TimeoutError):
        raise  # not about files, and a defect
    except (OSError, SafetensorError) as error:
        say_error(f"{FILE_TROUBLE} ({in_one_line(error)}): free some space, or choose another `--output`")
        sys.exit(FAILED)
