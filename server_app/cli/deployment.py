"""`quickbloom secrets`, `superlink`, `superexec` and `metrics`: a federation of machines, and who looks after it."""

import signal
import threading
from pathlib import Path
from typing import Annotated

import typer

from quickbloom.common.errors import ConfigError
from quickbloom.common.system import logs
from quickbloom.common.system.extras import needs
from quickbloom.common.system.terminal import FAILED, STOPPED, paper, say, say_error
from quickbloom.server_app.launch.connection import SuperLinkError, connection_exists


def secrets(
    output: Annotated[Path, typer.Option(help="Directory of the secrets.")] = Path("secrets"),
    nodes: Annotated[int | None, typer.Option(help="Key pairs: node-1, node-2, ..; 3 by default.", min=0)] = None,
    host: Annotated[list[str] | None, typer.Option(help="DNS name or IP address of the SuperLink; repeat.")] = None,
    days: Annotated[int, typer.Option(help="Validity of the server certificate; the CA's: 10 years.", min=1, max=3650)] = 365,
    if_missing: Annotated[bool, typer.Option("--if-missing", help="Make them unless they are there: no error then.")] = False,
    add_node: Annotated[list[str] | None, typer.Option(metavar="NAME", help="One more key pair; repeat.")] = None,
    renew_server: Annotated[
        bool, typer.Option("--renew-server", help="New server certificate of the same CA; without --host for the same names.")
    ] = False,
    register: Annotated[
        str | None, typer.Option(metavar="CONNECTION", help="Register the public keys of all nodes with this SuperLink.")
    ] = None,
    owner: Annotated[
        int | None, typer.Option(metavar="UID", help="Give what is written to this user; needs root.", min=0)
    ] = None,
) -> None:
    """Make what TLS and node authentication need: CA, server certificate, a key pair per node, the SuperExec's secret.

    One folder for each machine. What is there stays as it is, but for --renew-server.
    Exit code: 0 done, 1 the SuperLink did not take a key, 2 wrong input.

    Example: quickbloom secrets --nodes 3 --host superlink --host fl.example.org --host 203.0.113.5

    Later: quickbloom secrets --add-node ward-7; quickbloom secrets --renew-server; quickbloom secrets --register CONNECTION
    """
    from quickbloom.server_app.deployment.registration import register as register_keys
    from quickbloom.server_app.deployment.secrets import Request, carry_out, public_keys

    request = Request(
        output, nodes, tuple(host or ()), days, if_missing, tuple(add_node or ()), renew_server, bool(register), owner
    )
    if register and not connection_exists(register):
        raise ConfigError(f"`--register` must be a [superlink.NAME] of Flower's config.toml, got '{register}'")
    page = paper()
    for item in carry_out(request):
        page.print(item, markup=False, highlight=False, soft_wrap=isinstance(item, str))
    try:
        for line in register_keys(register, public_keys(output)) if register else ():
            page.print(line, markup=False, highlight=False, soft_wrap=True)
    except SuperLinkError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from None


def superlink(
    secrets: Annotated[Path, typer.Option(help="The folder `superlink` of `quickbloom secrets`.", readable=False)],
    state: Annotated[Path, typer.Option(help="Directory of the SuperLink's database.", readable=False)],
    host: Annotated[str, typer.Option(help="Where runs are started; whoever reaches it can start one.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="The same, its port.", min=1, max=65535)] = 8000,
    fleet_host: Annotated[
        str | None, typer.Option(help="Where nodes connect, with Flower 1.39; by default 0.0.0.0.", show_default=False)
    ] = None,
    fleet_port: Annotated[
        int | None, typer.Option(help="The same, its port; by default 9092.", min=1, max=65535, show_default=False)
    ] = None,
    log_format: logs.FormatOption = logs.Format.TEXT,
    log_file: logs.FileOption = None,
    log_size: logs.SizeOption = 10.0,
) -> None:
    """Run a SuperLink with TLS and authenticated nodes, whose runs survive its restart; it needs a `superexec` beside it.

    Example: quickbloom superlink --secrets secrets/superlink --state state

    Example: quickbloom superlink --secrets secrets/superlink --state state --log-format json --log-file superlink.log
    """
    from quickbloom.server_app.deployment.serve import superlink as become_superlink

    become_superlink(secrets, state, host, port, fleet_host, fleet_port, logs.Settings(log_format, log_file, log_size))


def superexec(
    secrets: Annotated[Path, typer.Option(help="The folder `superexec` of `quickbloom secrets`.", readable=False)],
    address: Annotated[str, typer.Option("--superlink", metavar="HOST:PORT", help="Where the SuperLink starts runs.")],
    runs: Annotated[Path, typer.Option(help="A directory that it can write, for those of runs.", readable=False)] = Path(
        "runs"
    ),
) -> None:
    """Run the ServerApps of a SuperLink, in processes of their own: the server's half that computes.

    Example: quickbloom superexec --secrets secrets/superexec --superlink 127.0.0.1:8000
    """
    from quickbloom.server_app.deployment.serve import superexec as become_superexec

    become_superexec(secrets, address, runs)


def metrics(
    runs: Annotated[Path, typer.Argument(help="Directory of runs.")] = Path("runs"),
    host: Annotated[str, typer.Option(help="Address to listen on; 0.0.0.0: all of this machine's.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="Port.", min=1, max=65535)] = 9464,
    newest: Annotated[int, typer.Option(help="How many runs, those that were written to last.", min=1)] = 20,
    server: Annotated[
        str, typer.Option(metavar="HOST:PORT", help="A SuperLink's port for nodes: how long its certificate lasts.")
    ] = "",
) -> None:
    """Serve figures of runs to Prometheus, while they go on and afterwards: /metrics, and /healthz and /readyz.

    Exit code: 0 ended by SIGTERM, 2 wrong input, 130 Ctrl-C.

    Example: quickbloom metrics runs --port 9464 --server fl.example.org:9092
    """
    needs("metrics", "prometheus_client", "`quickbloom metrics`")
    from quickbloom.server_app.deployment.metrics_server import serving

    with serving(runs, host, port, newest, server) as answering:
        say(f"Serving the runs in '{runs}' at http://{host}:{port}/metrics")
        signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=answering.shutdown).start())
        try:
            answering.serve_forever()
        except KeyboardInterrupt:
            raise typer.Exit(STOPPED) from None
