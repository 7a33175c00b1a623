"""The `quickbloom` command: its parts put together, and how each ends."""

import signal
import sys

import typer
from safetensors import SafetensorError

from quickbloom.common.errors import FILE_TROUBLE, QuickbloomError, RunError, in_one_line
from quickbloom.common.system import surroundings
from quickbloom.common.system.processes import ENDINGS
from quickbloom.common.system.terminal import FAILED, WRONG_INPUT, say_error
from quickbloom.server_app.cli import compare, deployment, doctor, inspect, run

cli = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)


@cli.callback()
def _commands() -> None:
    """Few-shot personalisation for Flower federations: learn a starting point that every device makes its own.

    Example: quickbloom run --algorithm maml --dataset digits
    """


for command in (
    run.run,
    compare.compare,
    deployment.superlink,
    deployment.superexec,
    inspect.report,
    inspect.settings,
    inspect.watch,
    deployment.secrets,
    doctor.doctor,
):
    cli.command()(command)


def main() -> None:
    """Entry point: a mistake in the input ends in one sentence on stderr and exit code 2, a full disk in one and code 1."""
    surroundings.begin()
    # Ended from outside (a time limit, a closed terminal) is like Ctrl-C: what was started must be ended, too.
    for ending in ENDINGS:
        if ending != signal.SIGINT and signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    try:
        surroundings.check_names(sys.argv[1:])
        cli()
    except QuickbloomError as error:
        say_error(str(error))
        sys.exit(FAILED if isinstance(error, RunError) else WRONG_INPUT)
    except (ConnectionError, TimeoutError):
        raise  # not about files, and a defect
    except (OSError, SafetensorError) as error:
        say_error(f"{FILE_TROUBLE} ({in_one_line(error)}): free some space, or choose another `--output`")
        sys.exit(FAILED)


if __name__ == "__main__":
    main()
