"""`quickbloom deploy init`: a new directory with what a deployment needs, in containers or as systemd units.

    docker-compose.yml docker/..  as in the project's repository, byte by byte
    .env                          settings of Compose

or, for systemd:

    secrets/                      as `quickbloom secrets` makes it
    flower/config.toml            FLWR_HOME of whoever starts runs on the server's machine
    server/                       units of SuperLink and SuperExec, and their users
    node/                         unit of a node, its user and its settings
"""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

import tomli_w

from quickbloom import __version__
from quickbloom.common.errors import ConfigError
from quickbloom.common.flower import transport
from quickbloom.common.system.package import folders
from quickbloom.server_app.deployment import secrets
from quickbloom.server_app.deployment.certificates import all_hosts

PLACED = ("docker-compose.yml", "docker/scale.yml", "docker/monitor.yml", "docker/metrics.yml", "docker/metrics")
"""What of the repository Compose needs; the image is built, or fetched, elsewhere."""
UNITS = {
    "server": ("quickbloom-superlink.service", "quickbloom-superexec.service", "quickbloom-server.conf"),
    "node": ("quickbloom-node.service", "quickbloom-node.conf"),
}
"""Files for each kind of machine. The .conf name the users, for systemd-sysusers."""
_NODES = 3
_PLACE = "fl.example.org"
_AT_HOME = "localhost"


def begin(folder: Path, hosts: Sequence[str], *, systemd: bool, nodes: int | None) -> Iterator[str]:
    """Write a deployment into `folder`, which must not exist yet or be empty; yield what is placed, and the next commands.

    `hosts`: names of the SuperLink for nodes of other machines; none: they are all on this one. `nodes`: key pairs, for
    systemd; None: 3. Raises ConfigError before anything is written.
    """
    if nodes is not None and not systemd:
        raise ConfigError("`--nodes` is for `--systemd`, in containers there are three nodes to begin with: leave it out")
    all_hosts(hosts)
    _check_empty(folder)
    try:
        yield from _units(folder, hosts, _NODES if nodes is None else nodes) if systemd else _containers(folder, hosts)
    except OSError as error:
        raise ConfigError(
            f"FOLDER must be a directory that can be written, got '{folder}' ({error.strerror or error})"
        ) from None


def _check_empty(folder: Path) -> None:
    try:
        if not folder.exists() or not any(folder.iterdir()):
            return
    except OSError as error:
        raise ConfigError(f"FOLDER must be a new or empty directory, got '{folder}' ({error.strerror})") from None
    raise ConfigError(
        f"FOLDER must be a new or empty directory, and there is something in '{folder}', which stays as it is: choose another"
    )


def _containers(folder: Path, hosts: Sequence[str]) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    for name in PLACED:
        target, source = folder / name, repository_file(name)
        target.parent.mkdir(exist_ok=True)
        shutil.copytree(source, target) if source.is_dir() else shutil.copyfile(source, target)
    fleet = "0.0.0.0:9092" if hosts else "127.0.0.1:9092"
    settings = {"QUICKBLOOM_VERSION": __version__, "QUICKBLOOM_HOSTS": " ".join(hosts), "QUICKBLOOM_FLEET": fleet}
    # Quotes are no quotes to docker-compose 1.29, and no value needs them.
    (folder / ".env").write_text("".join(f"{name}={value}\n" for name, value in settings.items()), encoding="utf-8")
    yield f"{folder}/docker-compose.yml, docker/: the services, as in the repository of this release."
    yield f"{folder}/.env: the release, the names in the certificate ({', '.join(all_hosts(hosts))}), and where nodes connect."
    yield "The CA, its keys and those of nodes are made when the services start, in a volume that no other service sees."
    yield "Next:"
    yield f"  1. the image quickbloom:{__version__} must be here: docker compose build superlink, in a checkout of the release"
    yield f"  2. cd {folder}"
    if hosts:
        yield "  3. docker compose up -d superlink superexec"
        yield "  4. a key for every device: docs/deployment.md, several hosts"
    else:
        yield "  3. docker compose up -d"
        yield "  4. docker compose run --rm cli quickbloom run --algorithm fomaml --set min-nodes=3"
    yield "  5. quickbloom deploy status"


def repository_file(name: str) -> Path:
    """Return a file or folder of the repository's top level, which an installed package brings along."""
    found = folders()
    if found["common"].parent == found["quickbloom"]:  # installed
        return found["server_app"] / "deployment" / "files" / name
    return found["quickbloom"].parent / name


def _units(folder: Path, hosts: Sequence[str], nodes: int) -> Iterator[str]:
    folder.mkdir(parents=True, exist_ok=True)
    secrets.create(folder / "secrets", secrets.default_names(nodes), hosts, 365)
    for part, names in UNITS.items():
        (folder / part).mkdir()
        for name in names:
            shutil.copyfile(Path(__file__).parent / "units" / name, folder / part / name)
    host, port = hosts[0] if hosts else _AT_HOME, 9092 if transport.spoken() == transport.GRPC else 8000
    server = f"[{host}]:{port}" if ":" in host else f"{host}:{port}"
    (folder / "node" / "node.env").write_text(_NODE_SETTINGS.format(server=server), encoding="utf-8")
    (folder / "flower").mkdir()
    connection = {"address": "localhost:8000", "root-certificates": str((folder / "secrets" / "cli" / "ca.crt").absolute())}
    (folder / "flower" / "config.toml").write_text(tomli_w.dumps({"superlink": {"server": connection}}), encoding="utf-8")
    yield f"{folder}/secrets/: CA, the SuperLink's certificate ({', '.join(all_hosts(hosts))}), keys of {nodes} nodes; keep it."
    yield f"{folder}/server/: units of SuperLink and SuperExec, and their users."
    yield f"{folder}/node/: unit of a node, its user, and its settings in node.env."
    yield f"{folder}/flower/: the connection `server` for whoever starts runs on the SuperLink's machine."
    home = f"FLWR_HOME={folder.absolute()}/flower /opt/quickbloom/bin/quickbloom"
    yield "Next, as root on the server:"
    yield from _numbered(
        "python3 -m venv /opt/quickbloom",
        f"/opt/quickbloom/bin/pip install 'quickbloom=={__version__}'",
        f"install -m 644 {folder}/server/*.conf -Dt /etc/sysusers.d && systemd-sysusers",
        f"install -m 644 {folder}/server/*.service -t /etc/systemd/system && systemctl daemon-reload",
        *_handed(folder / "secrets" / "superlink", "superlink"),
        *_handed(folder / "secrets" / "superexec", "superexec"),
        "systemctl enable --now quickbloom-superlink quickbloom-superexec",
        f"{home} secrets --output {folder}/secrets --register server",
    )
    yield f"Then, as root on the machine of each node, with {folder}/node/ and its folder of {folder}/secrets/nodes/ alone:"
    yield from _numbered(
        "python3 -m venv /opt/quickbloom",
        f"/opt/quickbloom/bin/pip install 'quickbloom=={__version__}'",
        "install -m 644 node/*.conf -Dt /etc/sysusers.d && systemd-sysusers",
        "install -m 644 node/*.service -t /etc/systemd/system && systemctl daemon-reload",
        *_handed(Path("node-1"), "node"),
        "install -m 640 -g quickbloom-node node/node.env -t /etc/quickbloom   # after a look at it",
        "systemctl enable --now quickbloom-node",
    )
    yield f"A run: {home} run --connection server --algorithm fomaml"


def _numbered(*commands: str) -> Iterator[str]:
    yield from (f"  {number}. {command}" for number, command in enumerate(commands, 1))


def _handed(folder: Path, service: str) -> tuple[str, ...]:
    """Return the commands that give a service its secrets."""
    user = f"quickbloom-{service}"
    return (
        f"install -d -o {user} -m 700 /etc/quickbloom/{service}",
        f"install -o {user} -m 400 {folder}/* -t /etc/quickbloom/{service}",
    )


_NODE_SETTINGS = """\
# Settings of quickbloom-node.service.
SERVER={server}
# More options of `quickbloom-edge join`. Files of the node must be readable for the user quickbloom-node, and lie in
# /var/lib/quickbloom-node, say; nothing in /home is seen.
#OPTIONS=--data /var/lib/quickbloom-node/ward.csv --task ward --target outcome
OPTIONS=
"""
