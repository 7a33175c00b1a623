"""`quickbloom secrets`: the files that a federation with TLS and authenticated nodes needs, one complete folder per machine.

    OUTPUT/ca/           ca.crt ca.key                                    stays where this command is used
    OUTPUT/superlink/    ca.crt server.crt server.key superexec.secret
    OUTPUT/superexec/    ca.crt superexec.secret
    OUTPUT/cli/          ca.crt                                           whoever starts runs
    OUTPUT/nodes/NAME/   ca.crt node.key node.key.pub

Directories have mode 0700, private files 0600, the others 0644. What is written appears whole or not at all.
"""

import os
import re
import secrets
from base64 import b64encode
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from rich.table import Table

from quickbloom.common.errors import ConfigError
from quickbloom.server_app.deployment.certificates import (
    CertificateError,
    all_hosts,
    check_certificate,
    hosts_of,
    issue,
    load_certificate,
    load_key,
    make_ca,
    node_key,
    pem,
    same_key,
)
from quickbloom.server_app.deployment.private_files import (
    alone_beside,
    check_owner,
    give,
    make_directory,
    owner_of,
    replace_all,
    write_whole,
)

_SHARED = {
    "ca": ("ca.crt", "ca.key"),
    "superlink": ("ca.crt", "server.crt", "server.key", "superexec.secret"),
    "superexec": ("ca.crt", "superexec.secret"),
    "cli": ("ca.crt",),
}
_NODE = ("ca.crt", "node.key", "node.key.pub")
_PRIVATE = {"ca.key", "server.key", "node.key", "superexec.secret"}
_ACTIONS = (("--nodes", "--if-missing"), ("--add-node",), ("--renew-server",))
_NODES = 3
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")


@dataclass(frozen=True)
class Request:
    """Request of the command; `__post_init__` refuses options that do not fit together."""

    output: Path
    nodes: int | None = None
    hosts: tuple[str, ...] = ()
    days: int = 365
    if_missing: bool = False
    new_nodes: tuple[str, ...] = ()
    renew: bool = False
    register: bool = False
    owner: int | None = None

    def __post_init__(self) -> None:
        asked = {"--nodes": self.nodes is not None, "--if-missing": self.if_missing}
        asked |= {"--add-node": bool(self.new_nodes), "--renew-server": self.renew}
        groups = [[name for name in names if asked[name]] for names in _ACTIONS]
        if len(first := [names[0] for names in groups if names]) > 1:
            raise ConfigError(f"`{first[0]}` and `{first[1]}` exclude each other: give them in two commands")
        if self.hosts and not (self.creates or self.renew):
            raise ConfigError("`--host` goes with the making of secrets or with `--renew-server`: leave it out, or add that")

    @property
    def creates(self) -> bool:
        """Return whether secrets are to be made: on request, or if nothing else is requested."""
        return self.nodes is not None or self.if_missing or not (self.new_nodes or self.renew or self.register)


def carry_out(request: Request) -> Iterator[Table | str]:
    """Do what is requested except for registering; yield what to show. Raises ConfigError or CertificateError."""
    output = request.output
    if request.creates:
        if request.if_missing:
            there, remarks = complete(output, request.hosts, request.nodes)
            if there:
                yield f"Secrets in {output}: already there."
                yield from (f"But {remark}." for remark in remarks)
                return
        names = default_names(_NODES if request.nodes is None else request.nodes)
        create(output, names, request.hosts, request.days, request.owner)
        yield describe(output)
        yield from next_steps(output)
    elif request.new_nodes:
        add_nodes(output, request.new_nodes, request.owner)
        yield from (
            f"{output / 'nodes' / name}: {' '.join(_NODE)}, for the SuperNode {name} alone." for name in request.new_nodes
        )
        if not request.register:
            yield f"Next: quickbloom secrets --output {output} --register CONNECTION"
    elif request.renew:
        renew_server(output, request.hosts, request.days, request.owner)
        yield f"{output / 'superlink'}: new server.crt and server.key. {_validity(output)}"
        yield "Next: copy the two to the SuperLink's machine and restart it; nothing changes for the nodes."


def default_names(nodes: int) -> list[str]:
    """Return node-1, node-2, .. for so many nodes."""
    return [f"node-{number}" for number in range(1, nodes + 1)]


def create(output: Path, names: Sequence[str], hosts: Iterable[str], days: int, owner: int | None = None) -> None:
    """Make everything in `output`, which must not exist yet or be empty.

    `names`: of the nodes. `hosts`: names of the SuperLink. `days`: validity of its certificate.
    `owner`: user id of the new owner of all files. Raises ConfigError if some of it exists already,
    and does not change it.
    """
    now = datetime.now(UTC)
    _check_names(names)
    check_owner(owner)
    certified = all_hosts(hosts)
    ca_key, ca = make_ca(now)
    key, certificate = issue(ca_key, ca, certified, days, now)
    content = {"ca.crt": pem(ca), "ca.key": pem(ca_key), "server.crt": pem(certificate), "server.key": pem(key)}
    content["superexec.secret"] = b64encode(secrets.token_bytes(32))
    files = {f"{folder}/{name}": content[name] for folder, shared in _SHARED.items() for name in shared}
    for name in names:
        files |= {f"nodes/{name}/{file}": data for file, data in _new_node(name, content["ca.crt"]).items()}
    output.absolute().parent.mkdir(parents=True, exist_ok=True)
    with alone_beside(output):
        if not _nothing_at(output):
            raise ConfigError(
                f"`--output` must be a directory that does not exist yet, and '{output}' does: choose another one, or "
                "change it with `--add-node` or `--renew-server`"
            )
        write_whole(output, files, _PRIVATE, owner)


def add_nodes(output: Path, names: Sequence[str], owner: int | None = None) -> None:
    """Make a key pair for each of `names`, which must be new. Nothing else changes, and the CA's key is not needed."""
    _check_names(names)
    with alone_beside(output):
        _check_there(output)
        check_owner(owner)
        if taken := [name for name in names if os.path.lexists(output / "nodes" / name)]:
            raise ConfigError(f"`--add-node` must be a new name, and there is a node {_listed(taken)} in '{output}' already")
        ca = (output / "cli" / "ca.crt").read_bytes()
        owner = owner_of(output) if owner is None else owner
        if not (output / "nodes").is_dir():
            make_directory(output / "nodes")
            give(output / "nodes", owner)
        for name in names:
            write_whole(output / "nodes" / name, _new_node(name, ca), _PRIVATE, owner)


def renew_server(output: Path, hosts: Sequence[str], days: int, owner: int | None = None) -> None:
    """Replace the SuperLink's key and certificate by new ones from the same CA.

    `hosts`: names of the SuperLink; if empty, those of the old certificate. Raises ConfigError or
    CertificateError.
    """
    now = datetime.now(UTC)
    with alone_beside(output):
        _check_there(output)
        check_owner(owner)
        ca_path, key_path = output / "ca" / "ca.crt", output / "ca" / "ca.key"
        if wrong := check_certificate(ca_path, ca_path, now=now):
            raise ConfigError(wrong)
        ca, ca_key = load_certificate(ca_path), load_key(key_path)
        if not same_key(ca_key, ca):
            raise ConfigError(
                f"the key '{key_path}' does not belong to the CA '{ca_path}': restore the two that were made together"
            )
        folder = output / "superlink"
        key, certificate = issue(ca_key, ca, hosts or _old_hosts(folder / "server.crt"), days, now)
        owner = owner_of(output) if owner is None else owner
        replace_all({folder / "server.key": pem(key), folder / "server.crt": pem(certificate)}, _PRIVATE, owner)


def complete(output: Path, hosts: Iterable[str], nodes: int | None) -> tuple[bool, list[str]]:
    """Return (whether `output` holds all that `create` makes, sentences about differences from this request).

    Raises ConfigError if `output` holds only some of it.
    """
    certified = all_hosts(hosts)
    if _nothing_at(output):
        return False, []
    _check_there(output)
    if lost := _missing(output):
        raise ConfigError(
            f"the secrets in '{output}' are not complete, {_listed(lost)} is missing: restore it, or remove the "
            "directory to make everything anew"
        )
    folder = output / "superlink"
    remarks = [check_certificate(folder / "server.crt", folder / "ca.crt", folder / "server.key")]
    if not remarks[0] and (absent := set(certified) - set(hosts_of(load_certificate(folder / "server.crt")))):
        remarks.append(f"its certificate does not name {_listed(sorted(absent))}: renew it with `--renew-server --host ..`")
    if nodes is not None and (absent := set(default_names(nodes)) - set(node_names(output))):
        remarks.append(f"there is no node {_listed(sorted(absent))}: make it with `--add-node`")
    return True, [remark for remark in remarks if remark]


def node_names(output: Path) -> list[str]:
    """Return the names of the nodes in `output`, in order: node-2 comes before node-10."""
    nodes = output / "nodes"
    found = [entry.name for entry in nodes.iterdir() if _NAME.fullmatch(entry.name)] if nodes.is_dir() else []
    return sorted(found, key=lambda name: [(part.isdigit(), int(part) if part.isdigit() else 0, part) for part in _parts(name)])


def public_keys(output: Path) -> dict[str, Path]:
    """Return the file with the public key of every node in `output`, by the node's name. Raises ConfigError without any."""
    _check_there(output)
    keys = {name: output / "nodes" / name / "node.key.pub" for name in node_names(output)}
    if not keys:
        raise ConfigError(f"there is no node in '{output}' to register: make one with `quickbloom secrets --add-node NAME`")
    return keys


def describe(output: Path) -> Table:
    """Return a table of the folders in `output`: their content, and who needs them."""
    table = Table(title=f"Secrets in {output}", title_justify="left")
    for heading in ("folder", "files", "who needs it"):
        table.add_column(heading, overflow="fold")
    for folder, reader in {
        "ca": "nobody but you: keep ca.key offline, with a backup",
        "superlink": "the SuperLink",
        "superexec": "the process that runs the ServerApp, beside the SuperLink",
        "cli": "whoever starts runs",
    }.items():
        table.add_row(f"{folder}/", " ".join(_SHARED[folder]), reader)
    for name in node_names(output):
        table.add_row(f"nodes/{name}/", " ".join(_NODE), f"the SuperNode {name} alone")
    return table


def next_steps(output: Path) -> list[str]:
    """Return what to do with the secrets, one line per step."""
    return [
        _validity(output),
        "Next:",
        "  1. copy each folder to its machine, and no other; docs/deployment.md has the commands that use them",
        '  2. in Flower\'s config.toml:  [superlink.NAME]  address = "HOST:PORT"  '
        f'root-certificates = "{output.absolute() / "cli" / "ca.crt"}"',
        f"  3. when the SuperLink runs:  quickbloom secrets --output {output} --register NAME",
    ]


def _old_hosts(path: Path) -> list[str]:
    try:
        return hosts_of(load_certificate(path))
    except CertificateError as error:
        raise ConfigError(f"{error}, or say with `--host` what the new one is for") from None


def _validity(output: Path) -> str:
    certificate = load_certificate(output / "superlink" / "server.crt")
    names = ", ".join(hosts_of(certificate))
    return f"The SuperLink's certificate is valid until {certificate.not_valid_after_utc:%Y-%m-%d}, for {names}."


def _new_node(name: str, ca: bytes) -> dict[str, bytes]:
    private, public = node_key()
    return {"ca.crt": ca, "node.key": private, "node.key.pub": public + f" {name}\n".encode()}


def _check_names(names: Sequence[str]) -> None:
    for name in names:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                "`--add-node` must be a name of up to 63 letters, digits, dots, hyphens and underscores that begins with a "
                f"letter or a digit, got '{name}'"
            )
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise ConfigError(f"`--add-node` must name each node once, got {_listed(repeated)} more than once")


def _nothing_at(output: Path) -> bool:
    try:
        return not os.path.lexists(output) or (output.is_dir() and not any(output.iterdir()))
    except PermissionError:
        return False


def _missing(output: Path) -> list[str]:
    # `ca` may be kept elsewhere, as it should be.
    wanted = [f"{folder}/{name}" for folder, names in _SHARED.items() if folder != "ca" for name in names]
    wanted += [f"nodes/{node}/{name}" for node in node_names(output) for name in _NODE]
    return [path for path in wanted if not (output / path).is_file()]


def _check_there(output: Path) -> None:
    try:
        there = (output / "cli" / "ca.crt").is_file() and (output / "superlink").is_dir()
    except PermissionError:
        raise ConfigError(
            f"`--output` must be a directory that this user may read, got '{output}' (Permission denied)"
        ) from None
    if not there:
        raise ConfigError(f"`--output` must be a directory with secrets, got '{output}': make them with `quickbloom secrets`")


def _parts(name: str) -> list[str]:
    return [part for part in re.split(r"(\d+)", name) if part]


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)
