"""`quickbloom deploy`: begins a federation on machines of its own, and looks after one of docker-compose.yml."""

from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import typer

from quickbloom.common.system.terminal import FAILED, say_error

group = typer.Typer(no_args_is_help=True, pretty_exceptions_enable=False, add_completion=False)

Folder = Annotated[Path, typer.Option(help="The directory of docker-compose.yml.")]
Archive = Annotated[Path, typer.Argument(help="The file of the backup, such as monday.tgz.", show_default=False)]


@group.callback()
def deploy() -> None:
    """Begin a deployment, in containers or as systemd units; see what is up, back up, upgrade, renew the certificate.

    Exit code: 0 done, 1 Compose failed or a part did not come up, 2 wrong input.

    Example: quickbloom deploy init fl --host fl.example.org

    Example: quickbloom deploy status
    """


@group.command()
def init(
    folder: Annotated[Path, typer.Argument(help="A new or empty directory.", show_default=False)],
    host: Annotated[
        list[str] | None,
        typer.Option(help="DNS name or IP address of the SuperLink for nodes of other machines; repeat.", show_default=False),
    ] = None,
    systemd: Annotated[bool, typer.Option("--systemd", help="Units of systemd in place of containers.")] = False,
    nodes: Annotated[int | None, typer.Option(help="With --systemd: key pairs of nodes; 3 by default.", min=1)] = None,
) -> None:
    """Write what a deployment needs into a new directory, and say what to do with it. Nothing is written over.

    Example: quickbloom deploy init fl --host fl.example.org

    Example: quickbloom deploy init fl --systemd --host fl.example.org --nodes 5
    """
    from quickbloom.server_app.deployment.beginning import begin

    for line in begin(folder, host or (), systemd=systemd, nodes=nodes):
        print(line)


@group.command()
def status(folder: Folder = Path()) -> None:
    """Say what of a federation in containers is up, whether runs can be started, and when its certificate ends.

    Example: quickbloom deploy status
    """
    from quickbloom.server_app.deployment.compose import Compose, ComposeError, is_up
    from quickbloom.server_app.deployment.compose import status as found
    from quickbloom.server_app.deployment.renewing import told

    def say() -> None:
        compose = Compose(folder)
        for sentence in found(compose):
            print(sentence)
        if is_up(compose, "superlink"):
            try:
                print(told(compose))
            except ComposeError as error:
                print(f"When its certificate ends cannot be told: {error}")

    _done(say)


@group.command()
def backup(archive: Archive, folder: Folder = Path()) -> None:
    """Back up the keys and the SuperLink's database of a federation in containers, into a file for its owner alone.

    Example: quickbloom deploy backup monday.tgz
    """
    from quickbloom.server_app.deployment.compose import Compose
    from quickbloom.server_app.deployment.compose import backup as make

    def pack() -> None:
        made = make(Compose(folder), archive)
        print(f"{archive}: keys and database, of Flower {made['flower']}; keep it as you keep the keys.")

    _done(pack)


@group.command()
def restore(archive: Archive, folder: Folder = Path()) -> None:
    """Put a backup back, where no server is yet.

    Example: quickbloom deploy restore monday.tgz
    """
    from quickbloom.server_app.deployment.compose import Compose
    from quickbloom.server_app.deployment.compose import restore as put_back

    _done(lambda: print(f"Put back: the backup of {put_back(Compose(folder), archive)['made']}. Next: docker compose up -d"))


@group.command()
def renew(
    folder: Folder = Path(),
    host: Annotated[
        list[str] | None,
        typer.Option(help="A name of the SuperLink, all of them if any; by default those of the old certificate; repeat."),
    ] = None,
) -> None:
    """Make a new certificate for the SuperLink, from the same CA, and have it used while runs go on.

    Example: quickbloom deploy renew

    Example: quickbloom deploy renew --host superlink --host superlink-control --host fl.example.org
    """
    from quickbloom.server_app.deployment.compose import Compose
    from quickbloom.server_app.deployment.renewing import renew as make_new

    def say() -> None:
        for sentence in make_new(Compose(folder), host or ()):
            print(sentence, flush=True)

    _done(say)


@group.command()
def upgrade(
    version: Annotated[str, typer.Argument(help="Tag of the new image, such as 0.3.0.", show_default=False)],
    folder: Folder = Path(),
    archive: Annotated[
        Path | None, typer.Option("--backup", help="File of the backup; by default a new one in --folder.", show_default=False)
    ] = None,
    patience: Annotated[float, typer.Option(help="Seconds that each part has to be well again.", min=1)] = 300,
    anyway: Annotated[bool, typer.Option("--anyway", help="Although runs go on: they end, and can be resumed.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Look, and print the plan; change nothing.")] = False,
) -> None:
    """Replace the containers by those of another image: backup, SuperLink and SuperExec, then one node at a time.

    Stops where a part does not come up, and says how to go back. An image whose Flower cannot open the database is refused.

    Example: quickbloom deploy upgrade 0.3.0 --dry-run

    Example: quickbloom deploy upgrade 0.3.0
    """
    from quickbloom.server_app.deployment.upgrading import carry_out, plan

    def step_by_step() -> None:
        steps = plan(folder, version, archive, anyway=anyway)
        for line in steps.lines():
            print(line)
        for line in () if dry_run else carry_out(folder, steps, patience):
            print(line, flush=True)

    _done(step_by_step)


def _done(work: Callable[[], None]) -> None:
    """Do it. What Compose did not do ends in one sentence."""
    from quickbloom.server_app.deployment.compose import ComposeError

    try:
        work()
    except ComposeError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from None
