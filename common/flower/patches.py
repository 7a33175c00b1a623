"""Patches of Flower: what each replaces, why, and what it gains. `common.flower.registry` guards and applies them."""

from dataclasses import dataclass

_HERE = "quickbloom.common.flower"


@dataclass(frozen=True)
class Patch:
    """A replaced part of Flower.

    `sources`: functions and classes of Flower as "module:Name", the replaced ones and their
    callers. With "|" between several, the first that exists counts; one that ends in "?" may be
    missing. `apply`: our function "module:name"; "" if the caller applies the patch. `effect`: our
    function that tells whether the patch is in effect in this process. `needless_with`: a module of
    Flower that makes the patch needless, with the reason.
    """

    name: str
    why: str
    gain: str
    sources: tuple[str, ...]
    apply: str = ""
    effect: str = ""
    needless_with: tuple[str, str] | None = None
    forks: bool = False
    """True if it needs the standard library's fork server."""


_NODE = "flwr.supernode.start_client_internal"
_PULL = "flwr.supercore.inflatable.inflatable_utils"
_WORKER = "flwr.supernode.runtime.run_clientapp"
_GRID = "flwr.superlink.grid.http_grid"
_SQL = "flwr.supercore.corestate.sql_corestate:SqlCoreState"
_VCE = "flwr.server.superlink.fleet.vce"
_POOL = "flwr.simulation.ray_transport.ray_actor:BasicActorPool"
_STORES = ("flwr.supercore.corestate.in_memory_corestate:InMemoryCoreState", _SQL)
_MEMORY = "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState"
_SQL_LINK = "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState"
_NODE_STATE = "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState"
_LAYERS = "flwr.superlink.routers.control.middlewares"

PATCHES = (
    Patch(
        "node-polling",
        "A SuperNode looks for work every 3 s and for its ClientApp's reply every 0.5 s; here soon after work.",
        "up to 3 s of every message",
        (f"{_NODE}:start_client_internal", f"{_NODE}:_push_messages"),
        f"{_HERE}.workers:poll_node_by_pace",
        f"{_HERE}.effects:node_polls_by_pace",
    ),
    Patch(
        "warm-superexec",
        "A SuperNode starts Flower's SuperExec; here one that forks its workers and is told of work.",
        "the gain of `worker-forks`",
        (f"{_NODE}:start_client_internal", f"{_NODE}:_push_messages"),
        f"{_HERE}.workers:start_warm_superexec",
        f"{_HERE}.effects:superexec_is_warm",
        forks=True,
    ),
    Patch(
        "superexec-polling",
        "A SuperExec looks for work every second; here soon after work, or when its SuperNode tells it.",
        "up to 1 s of every message",
        ("flwr.supercore.superexec.run_superexec:run_superexec",),
        f"{_HERE}.workers:poll_superexec_by_pace",
        f"{_HERE}.effects:superexec_polls_by_pace",
    ),
    Patch(
        "worker-forks",
        "A SuperExec starts a new Python process for every message; here each is forked from one that has imported torch.",
        "seconds of CPU for every message",
        (
            "flwr.supercore.superexec.executor.subprocess_executor:SubprocessExecutor.launch",
            "flwr.supercore.superexec.run_superexec:run_superexec",
            "flwr.supercore.protobuf.client:ProtobufClient.from_server_address",
        ),
        f"{_HERE}.workers:fork_workers",
        f"{_HERE}.effects:workers_are_forked",
        forks=True,
    ),
    Patch(
        "connection-options",
        "gRPC lets up to two minutes pass between two attempts to connect, and never gives up a dead connection.",
        "a node whose server was away is back within seconds",
        (
            "flwr.supercore.grpc:create_channel",
            f"{_NODE}:_init_connection",
            "flwr.client.grpc_rere_client.connection:grpc_request_response",
        ),
        f"{_HERE}.workers:connect_quickly",
        f"{_HERE}.effects:channels_have_options",
        ("flwr.supernode.fleet_http_connection", "nodes of this Flower speak HTTP and open no gRPC channel"),
    ),
    Patch(
        "quick-retries",
        "Flower's pauses between two attempts to reach a server grow to 20 s; here to 5 s.",
        "a node whose server was away is back within seconds",
        (
            "flwr.supercore.retry.http_retry:make_simple_http_retry_invoker",
            "flwr.supercore.retry.grpc_retry:make_simple_grpc_retry_invoker",
        ),
        f"{_HERE}.workers:retry_soon",
        f"{_HERE}.effects:retries_are_quick",
    ),
    Patch(
        "pull-soon",
        "Whoever asks for a part of a message that is still uploaded waits 1 s before it asks again; here 0.05 s.",
        "up to 1 s of every message",
        (
            f"{_PULL}:pull_objects",
            f"{_PULL}:pull_and_inflate_object_from_tree",
            f"{_WORKER}:pull_task_input",
            f"{_NODE}:_push_messages",
        ),
        f"{_HERE}.workers:ask_soon",
        f"{_HERE}.effects:asks_soon",
    ),
    Patch(
        "assembly-by-parts",
        "Flower keeps every piece of a message until all of it is put together; here it drops them array by array.",
        "a large message is not held twice while it is put together",
        (
            f"{_PULL}:inflate_object_from_contents",
            f"{_PULL}:pull_and_inflate_object_from_tree",
            "flwr.supercore.inflatable.inflatable_object:get_object_head_values_from_object_content",
            f"{_GRID}:HttpGrid.pull_messages",
        ),
        f"{_HERE}.message_assembly:spare",
        f"{_HERE}.effects:assembles_by_parts",
    ),
    Patch(
        "worker-memory",
        "A worker gives freed memory back while a message comes, and keeps it while it computes on a small one.",
        "memory of a worker with a large message",
        (f"{_WORKER}:run_clientapp", f"{_WORKER}:pull_task_input"),
        f"{_HERE}.message_assembly:give_back",
        f"{_HERE}.effects:gives_memory_back",
    ),
    Patch(
        "preloaded-app",
        "Flower unpacks and imports the app for every message; here once, for runs that bring the code that is installed.",
        "much of what a message of a small model costs",
        (f"{_WORKER}:run_clientapp", "flwr.cli.install:install_from_fab"),
        f"{_HERE}.preloaded_app:worker",
        f"{_HERE}.effects:app_is_preloaded",
        forks=True,
    ),
    Patch(
        "past-layers",
        "Requests of nodes and runs pass four layers that are for users' requests; here they go past them.",
        "time of the SuperLink for every request",
        tuple(
            f"{_LAYERS}:{name}"
            for name in (
                "ControlSensitiveResponseMiddleware",
                "ControlEventLogMiddleware",
                "ControlLicenseMiddleware",
                "ControlAuthenticationMiddleware",
                "_is_control_path",
            )
        ),
        f"{_HERE}.http:go_past",
        f"{_HERE}.effects:requests_go_past",
    ),
    Patch(
        "look-ups",
        "Flower's servers call functions that return what is there already in another thread; here at once.",
        "time of the SuperLink and of nodes for every request",
        (
            "flwr.supercore.protobuf.translation:get_protobuf_request",
            "flwr.supercore.dependencies.runtime:get_runtime_state",
            "flwr.supercore.dependencies.runtime:get_runtime_handlers",
            "flwr.supercore.dependencies.version:VersionDependency|"
            "flwr.supercore.dependencies.runtime_version:RuntimeVersionDependency",
            "flwr.superlink.dependencies.linkstate:get_linkstate?",
        ),
        f"{_HERE}.http:look_up_at_once",
        f"{_HERE}.effects:looks_up_at_once",
    ),
    Patch(
        "lost-tasks",
        "For every piece of every message Flower looks for lost tasks in its database and writes twice; here once a second.",
        "requests of a round wait less for each other's writes",
        tuple(f"{_SQL}.{name}" for name in ("_cleanup_expired_task_tokens", "get_tasks", "acknowledge_task_heartbeat")),
        f"{_HERE}.superlink:look_seldom",
        f"{_HERE}.effects:looks_seldom",
    ),
    Patch(
        "restarted-nodes",
        "Flower does not answer for what a node had pulled before it was killed, if it is soon online again; here at once.",
        "a run does not wait for `round-deadline`, ten minutes, after a node was killed at work",
        tuple(f"{state}.{name}" for state in (_MEMORY, _SQL_LINK) for name in ("activate_node", "get_message_res")),
        f"{_HERE}.states.lost_messages:answer_for_restarted_nodes",
        f"{_HERE}.effects:answers_for_restarted_nodes",
    ),
    Patch(
        "repeated-pushes",
        "Flower refuses a part of a message that it has stored and could not confirm, so that the run ends; here it is stored.",
        "a run goes on, and a reply is not lost, when the SuperLink is killed while parts are uploaded",
        tuple(f"{state}.store_object" for state in _STORES),
        f"{_HERE}.states.repeated_pushes:accept_repeated_pushes",
        f"{_HERE}.effects:accepts_repeated_pushes",
    ),
    Patch(
        "one-writer",
        "Who writes to the SuperLink's database tries again and again, and fails after five seconds; here all wait in line.",
        "a SuperLink with many nodes loses no message, and answers sooner",
        ("flwr.supercore.sql_mixin:SqlMixin.initialize", "flwr.supercore.sql_mixin:SqlMixin.session"),
        f"{_HERE}.states.one_writer:write_in_line",
        f"{_HERE}.effects:writers_wait_in_line",
    ),
    Patch(
        "empty-looks",
        "Every look of a node for messages searches the SuperLink's database and writes to it; here one that can find nothing "
        "costs no search.",
        "a SuperLink with many nodes spends its time on messages",
        tuple(f"{_SQL_LINK}.{name}" for name in ("store_message_ins", "get_message_ins")),
        f"{_HERE}.states.empty_looks:skip_empty_looks",
        f"{_HERE}.effects:empty_looks_are_skipped",
    ),
    Patch(
        "known-keys",
        "For every request of a node the SuperLink searches its database for the node's key; here once in ten seconds.",
        "time of the SuperLink for every request",
        tuple(f"{_SQL_LINK}.{name}" for name in ("get_node_id_by_public_key", "delete_node")),
        f"{_HERE}.states.empty_looks:remember_keys",
        f"{_HERE}.effects:keys_are_remembered",
    ),
    Patch(
        "forgiven-absence",
        "A SuperLink that was away for a minute ends runs and gives up nodes, which it could not hear; here it forgives them.",
        "a run goes on after a SuperLink was away for up to five minutes",
        (
            *(f"{_SQL}.{name}" for name in ("_cleanup_expired_task_tokens", "get_task_by_token", "acknowledge_task_heartbeat")),
            *(
                f"{_SQL_LINK}.{name}"
                for name in ("get_message_ins", "acknowledge_node_heartbeat", "deactivate_node", "get_message_res")
            ),
            "flwr.supercore.sql_mixin:SqlMixin.initialize",
            "flwr.superlink.servicer.runtime.runtime_handlers:acquire_task",
            "flwr.supercore.routers.runtime.router:acquire_task",
        ),
        f"{_HERE}.states.absence:forgive_absence",
        f"{_HERE}.effects:absence_is_forgiven",
    ),
    Patch(
        "killed-workers",
        "A worker that is killed, for lack of memory say, is missed after a minute, and its message is lost; here it is missed "
        "at once, and another one computes its message with fewer tasks at once.",
        "a device with too little memory takes part all the same",
        (
            f"{_NODE}:_push_messages",
            *(f"{_NODE_STATE}.{name}" for name in ("finish_task", "delete_messages", "_store_error_replies")),
            f"{_NODE_STATE}.get_messages|{_NODE_STATE}.get_messages_legacy",
            "flwr.supernode.servicer.runtime.runtime_handlers:confirm_message_received",
            "flwr.supercore.routers.runtime.router:confirm_message_received",
        ),
        f"{_HERE}.states.killed_workers:follow_killed_workers",
        f"{_HERE}.effects:killed_workers_are_followed",
    ),
    Patch(
        "simulation-dispatch",
        "Flower's simulation looks for messages every 0.1 s and through all of them for every node; here it is told of them.",
        "up to 0.1 s of every round, and a core with a thousand nodes",
        (
            f"{_VCE}.vce_api:add_messages_to_queue",
            f"{_VCE}.vce_api:run_api",
            f"{_MEMORY}.store_message_ins",
            f"{_MEMORY}.get_message_ins",
        ),
        f"{_HERE}.simulation:dispatch",
        f"{_HERE}.effects:messages_are_told_of",
    ),
    Patch(
        "simulation-app-once",
        "Flower pickles the ClientApp for every message; here Ray is given it once.",
        "5 ms of every message",
        (f"{_VCE}.backend.raybackend:RayBackend.build", f"{_VCE}.backend.raybackend:RayBackend.process_message"),
        f"{_HERE}.simulation:send_app_once",
        f"{_HERE}.effects:app_is_sent_once",
    ),
    Patch(
        "simulation-same-process",
        "Flower gives a node to any idle process; here to the one that served it before, which holds its data.",
        "with as many nodes as processes each holds the data of one node",
        (
            f"{_POOL}.submit",
            f"{_POOL}.fetch_result_and_return_actor_to_pool",
            f"{_VCE}.backend.raybackend:RayBackend.process_message",
        ),
        f"{_HERE}.simulation:stay",
        f"{_HERE}.effects:nodes_stay",
    ),
    Patch(
        "upload-deadline",
        "Flower's grid waits three minutes for the contents of each reply whose node died; here until the round's deadline.",
        "a round of 15 s that two dead nodes held up for 405 s",
        (f"{_GRID}:HttpGrid.pull_messages", f"{_PULL}:pull_objects"),
        f"{_HERE}.upload_deadline:limit_flowers_grid",
        f"{_HERE}.effects:uploads_are_limited",
    ),
    Patch(
        "told-of-replies",
        "In a simulation the server looks for replies again and again; here it is told of them.",
        "a twentieth of a round of 0.3 s",
        (f"{_MEMORY}.store_message_res", "flwr.superlink.grid.inmemory_grid:InMemoryGrid.pull_messages"),
    ),
    # The last one, since it takes from a process what others replace.
    Patch(
        "no-databases",
        "Flower's SuperNode imports the databases of servers and never opens one; on a lean node it does without.",
        "30 MB of a lean node",
        (
            "flwr.supercore.object_store.object_store_factory:ObjectStoreFactory.store",
            "flwr.server.superlink.linkstate.linkstate_factory:LinkStateFactory.state",
            "flwr.supernode.nodestate.nodestate_factory:NodeStateFactory.state",
            "flwr.supernode.cli.flower_supernode:flower_supernode",
        ),
        f"{_HERE}.lean:leave_databases_out",
        f"{_HERE}.effects:databases_are_left_out",
    ),
)
