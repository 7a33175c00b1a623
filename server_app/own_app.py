"""`own_server` makes the ServerApp of a Flower app whose nodes train with code of their own (`client_app.own_app`)."""

import sys
from collections.abc import Callable

from flwr.app import Context
from flwr.serverapp import Grid, ServerApp
from torch import nn

from quickbloom.common.config.own_app import remarks_on, settings_of
from quickbloom.common.errors import QuickbloomError
from quickbloom.common.flower import registry
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.events.channel import Events, into_log
from quickbloom.server_app.messaging.polling_grid import PollingGrid, hands_over


def own_server(model: Callable[[], nn.Module]) -> ServerApp:
    """Return a ServerApp that trains and personalises the network that `model()` makes, with nodes of `own_trainer`.

    Settings stand in `[tool.flwr.app.config]`: `algorithm` (fedavg, reptile, fedprox or ditto), `rounds` or
    `num-server-rounds`, and any other of this project; those of your own are left to your functions. The run directory is as
    of any run.

    Example: `app = own_server(Net)`
    """
    app = ServerApp()

    @app.main()
    def main(grid: Grid, context: Context) -> None:
        registry.apply("pull-soon", "assembly-by-parts")
        events = Events(into_log)
        try:
            config = settings_of(context.run_config, model)
            for remark in remarks_on(context.run_config):
                events.warn(remark)
            run_federation(PollingGrid(grid, packs=not hands_over(grid)), config, events)
        except QuickbloomError as error:
            events.stop(str(error))
            # Flower logs the exception; the sentence is complete, and the stack does not help a user.
            sys.tracebacklimit = 0
            raise

    return app
