"""`quickbloom deploy`: looks after a federation of docker-compose.yml."""

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from quickbloom.common.errors import ConfigError
from quickbloom.common.system.terminal import FAILED, say_error


class Action(StrEnum):
    """What can be done."""

    STATUS = "status"
    BACKUP = "backup"
    RESTORE = "restore"


def deploy(
    action: Annotated[Action, typer.Argument(help="What to do.", show_default=False)],
    archive: Annotated[Path | None, typer.Argument(metavar="[ARCHIVE]", help="The file of the backup.")] = None,
    folder: Annotated[Path, typer.Option(help="The directory of docker-compose.yml.")] = Path(),
) -> None:
    """Say what of a federation in containers is up, back up its keys and the SuperLink's database, or put them back.

    The backup holds every private key, in a file for its owner alone. It is put back where no server is yet.
    Exit code: 0 done, 1 Compose failed, 2 wrong input.

    Example: quickbloom deploy status

    Example: quickbloom deploy backup monday.tgz

    Example: quickbloom deploy restore monday.tgz
    """
    from quickbloom.server_app.deployment.compose import Compose, ComposeError, backup, restore, status

    if (archive is None) != (action == Action.STATUS):
        raise ConfigError(
            f"`quickbloom deploy {action}` takes no ARCHIVE: leave it out"
            if archive
            else f"`quickbloom deploy {action}` needs the ARCHIVE as well, such as monday.tgz"
        )
    try:
        compose = Compose(folder)
        if archive is None:
            for sentence in status(compose):
                print(sentence)
        elif action == Action.BACKUP:
            print(
                f"{archive}: keys and database, of Flower {backup(compose, archive)['flower']}; keep it as you keep the keys."
            )
        else:
            print(f"Put back: the backup of {restore(compose, archive)['made']}. Next: docker compose up -d")
    except ComposeError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from None
