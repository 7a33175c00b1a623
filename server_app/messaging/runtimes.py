"""Where the nodes of a run are: in the server's process, in Flower's simulation, or on devices of their own."""

from flwr.serverapp import Grid

from quickbloom.server_app.messaging.in_process_grid import InlineGrid
from quickbloom.server_app.messaging.polling_grid import PollingGrid
from quickbloom.server_app.messaging.virtual_grid import VirtualGrid

IN_PROCESS, SIMULATION, DEPLOYMENT = "in-process", "simulation", "deployment"
LOCAL = (IN_PROCESS, SIMULATION)
"""Runtimes that need no SuperLink of the user's."""


def within(grid: Grid) -> Grid:
    """Return the grid that carries the messages, without the virtual time around it."""
    return grid.inner if isinstance(grid, VirtualGrid) else grid


def runtime_of(grid: Grid) -> str:
    """Return the runtime of the nodes that this grid reaches."""
    inner = within(grid)
    if isinstance(inner, InlineGrid):
        return IN_PROCESS
    return SIMULATION if isinstance(inner, PollingGrid) and inner.stays_here else DEPLOYMENT


def workers_of(grid: Grid) -> int | None:
    """Return how many processes have computed the nodes of a run in process; None for other runtimes."""
    inner = within(grid)
    return inner.processes if isinstance(inner, InlineGrid) else None


def cpu_of(grid: Grid) -> float:
    """Return the processor seconds of the processes that compute nodes beside the server's; 0 for other runtimes."""
    inner = within(grid)
    return inner.cpu_seconds if isinstance(inner, InlineGrid) else 0.0
