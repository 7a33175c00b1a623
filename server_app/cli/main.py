"""The `quickbloom` command: its parts put together, and how each ends."""

import signal

import typer

from quickbloom.common.system.command import perform
from quickbloom.common.system.processes import ENDINGS
from quickbloom.server_app.cli import advise, compare, deployment, doctor, inspect, run

cli = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)


@cli.callback()
def _commands() -> None:
    """Few-shot personalisation for Flower federations: learn a starting point that every device makes its own.

    Example: quickbloom run --algorithm maml --dataset digits
    """


for command in (
    run.run,
    compare.compare,
    advise.advise,
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
    """Entry point of `quickbloom`."""
    # Ended from outside (a time limit, a closed terminal) is like Ctrl-C: what was started must be ended, too.
    for ending in ENDINGS:
        if ending != signal.SIGINT and signal.getsignal(ending) != signal.SIG_IGN:  # as under nohup
            signal.signal(ending, signal.default_int_handler)
    perform(cli)


if __name__ == "__main__":
    main()
