"""Checks whether the patches of `common.flower.registry` are in effect in this process, by what Flower itself would use."""

import importlib
import itertools
from typing import Any

from quickbloom.common.flower import message_assembly, simulation, upload_deadline, workers
from quickbloom.common.flower.states import absence, empty_looks, killed_workers, lost_messages, one_writer, repeated_pushes


def _module(name: str) -> Any:
    return importlib.import_module(f"flwr.{name}")


def node_polls_by_pace() -> bool:
    """Return whether a SuperNode of this process sleeps by our pace."""
    return isinstance(_module("supernode.start_client_internal").time, workers.Pace)


def superexec_is_warm() -> bool:
    """Return whether a SuperNode of this process starts our SuperExec."""
    return bool(_module("supernode.start_client_internal").subprocess.Popen.__module__ == workers.__name__)


def superexec_polls_by_pace() -> bool:
    """Return whether a SuperExec of this process sleeps by our pace."""
    return isinstance(_module("supercore.superexec.run_superexec").time, workers.Pace)


def workers_are_forked() -> bool:
    """Return whether a SuperExec of this process forks its tasks."""
    executor = _module("supercore.superexec.executor.subprocess_executor")
    return bool(executor.subprocess.Popen.__module__ == workers.__name__)


def channels_have_options() -> bool:
    """Return whether a SuperNode's gRPC channels, opened by Flower's own function, have our options."""
    node, grpc = _module("supernode.start_client_internal"), _module("supercore.grpc")
    return hasattr(node, "grpc_request_response") and isinstance(grpc.grpc, workers.Connecting)


def retries_are_quick() -> bool:
    """Return whether no pause between two attempts of Flower's HTTP clients is longer than ours."""
    invoker = _module("supercore.retry").make_simple_http_retry_invoker()
    return bool(max(itertools.islice(invoker.wait_gen_factory(), 20)) <= workers.LONGEST_RETRY)


def asks_soon() -> bool:
    """Return whether the functions with which a worker and a node pull ask again soon."""
    pulls = (_module("supernode.start_client_internal").pull_objects, _worker().pull_and_inflate_object_from_tree)
    return all(pull.__kwdefaults__["initial_backoff"] < 1 for pull in pulls)


def assembles_by_parts() -> bool:
    """Return whether workers and a run's server assemble messages part by part."""
    places = (_module("supercore.inflatable.inflatable_utils"), _module("superlink.grid.http_grid"))
    return all(hasattr(place.inflate_object_from_contents, "by_parts") for place in places)


def gives_memory_back() -> bool:
    """Return whether a worker of this process tunes its memory once its message is there."""
    return bool(_worker().pull_task_input.__module__ == message_assembly.__name__)


def app_is_preloaded() -> bool:
    """Return whether a worker of this process decides, when it unpacks a bundle, whether to use the imported app."""
    return hasattr(_worker().install_from_fab, "__wrapped__")


def requests_go_past() -> bool:
    """Return whether requests bypass the layers of Flower's SuperLink."""
    http = importlib.import_module("quickbloom.common.flower.http")
    layers = _module("superlink.routers.control.middlewares")
    return all(getattr(layers, name).__call__.__module__ == http.__name__ for name in http.LAYERS)


def looks_up_at_once() -> bool:
    """Return whether FastAPI calls through our function."""
    solving: Any = importlib.import_module("fastapi.dependencies.utils")
    return bool(solving.run_in_threadpool.__module__ == "quickbloom.common.flower.http")


def looks_seldom() -> bool:
    """Return whether states look for lost tasks by our function."""
    look = _module("supercore.corestate.sql_corestate").SqlCoreState._cleanup_expired_task_tokens
    return bool(look.__module__ == "quickbloom.common.flower.superlink")


def answers_for_restarted_nodes() -> bool:
    """Return whether states answer for the messages of a node that has started again."""
    states = (_module(f"server.superlink.linkstate.{name}_linkstate") for name in ("in_memory", "sql"))
    kinds = zip(states, ("InMemoryLinkState", "SqlLinkState"), strict=True)
    return all(getattr(state, name).activate_node.__module__ == lost_messages.__name__ for state, name in kinds)


def accepts_repeated_pushes() -> bool:
    """Return whether states accept a part of a message that they hold already."""
    return all(state.store_object.__module__ == repeated_pushes.__name__ for state in repeated_pushes.states())


def writers_wait_in_line() -> bool:
    """Return whether those who write to a database wait for each other."""
    return bool(_module("supercore.sql_mixin").SqlMixin.initialize.__module__ == one_writer.__name__)


def empty_looks_are_skipped() -> bool:
    """Return whether states in databases answer a look without a search that can find nothing."""
    return _closes_over(_sql_state().get_message_ins, empty_looks.__name__)


def keys_are_remembered() -> bool:
    """Return whether states in databases remember whose a public key is."""
    return bool(_sql_state().get_node_id_by_public_key.__module__ == empty_looks.__name__)


def _sql_state() -> Any:
    return _module("server.superlink.linkstate.sql_linkstate").SqlLinkState


def _closes_over(method: Any, module: str) -> bool:
    """Return whether a method, or one that it wraps, is of `module`."""
    inner = [cell.cell_contents for cell in method.__closure__ or () if callable(cell.cell_contents)]
    return bool(method.__module__ == module or any(_closes_over(one, module) for one in inner if hasattr(one, "__closure__")))


def absence_is_forgiven() -> bool:
    """Return whether states in databases forgive who was not heard while nobody was."""
    return bool(_module("server.superlink.linkstate.sql_linkstate").SqlLinkState.initialize.__module__ == absence.__name__)


def killed_workers_are_followed() -> bool:
    """Return whether a SuperNode of this process hands the message of a killed worker to another one."""
    handlers = _module("supernode.servicer.runtime.runtime_handlers")
    return bool(handlers.confirm_message_received.__module__ == killed_workers.__name__)


def databases_are_left_out() -> bool:
    """Return whether this process has none of the tables in which servers keep messages."""
    return not hasattr(_module("server.superlink.linkstate.sql_linkstate"), "NodeModel")


def messages_are_told_of() -> bool:
    """Whether a simulation of this process hands messages over by our loop."""
    return bool(_module("server.superlink.fleet.vce.vce_api").add_messages_to_queue.__module__ == simulation.__name__)


def app_is_sent_once() -> bool:
    """Whether a simulation of this process leaves the ClientApp with Ray."""
    return bool(_ray().RayBackend.build.__module__ == simulation.__name__)


def nodes_stay() -> bool:
    """Whether a simulation of this process chooses actors by our two methods."""
    pool = _ray().BasicActorPool
    methods = pool.submit, pool.fetch_result_and_return_actor_to_pool
    return all(method.__module__ == simulation.__name__ for method in methods)


def uploads_are_limited() -> bool:
    """Whether grids of this process fetch what nodes upload through our function."""
    return isinstance(_module("superlink.grid.http_grid").pull_objects, upload_deadline.Limited)


def _ray() -> Any:
    return _module("server.superlink.fleet.vce.backend.raybackend")


def _worker() -> Any:
    return _module("supernode.runtime.run_clientapp")
