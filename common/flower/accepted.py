"""Hashes of the Flower source code that the patches of `common.flower.registry` were tested with, and the tested releases."""

ACCEPTED: dict[str, dict[str, str]] = {
    "flwr.cli.install:install_from_fab": {
        "481bd04cde58": "1.39 to 1.42",
    },
    "flwr.client.grpc_rere_client.connection:grpc_request_response": {
        "2ca8b86b327f": "1.39",
    },
    "flwr.server.superlink.fleet.vce.backend.raybackend:RayBackend.build": {
        "6a0c387457a6": "1.39 to 1.42",
    },
    "flwr.server.superlink.fleet.vce.backend.raybackend:RayBackend.process_message": {
        "32a5db141802": "1.39 to 1.42",
    },
    "flwr.server.superlink.fleet.vce.vce_api:add_messages_to_queue": {
        "953f4bd41a93": "1.39 to 1.42",
    },
    "flwr.server.superlink.fleet.vce.vce_api:run_api": {
        "f85c0cd6e902": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.activate_node": {
        "ddd272f4a52b": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.get_message_ins": {
        "6547c8dcbc62": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.get_message_res": {
        "3e91c65629fc": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.store_message_ins": {
        "a2b78afac51d": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.in_memory_linkstate:InMemoryLinkState.store_message_res": {
        "52a4f7ccc70e": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.linkstate_factory:LinkStateFactory.state": {
        "8b1e223d0999": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.acknowledge_node_heartbeat": {
        "922e5841c816": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.activate_node": {
        "a06be1bac7e1": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.deactivate_node": {
        "c3ad2ab2beb4": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.delete_node": {
        "25f36ea18a8c": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.get_message_ins": {
        "4299efc545e6": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.get_message_res": {
        "5c1b460981b4": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.get_node_id_by_public_key": {
        "963255b24bed": "1.39 to 1.42",
    },
    "flwr.server.superlink.linkstate.sql_linkstate:SqlLinkState.store_message_ins": {
        "03ff7e13cf98": "1.39 to 1.42",
    },
    "flwr.simulation.ray_transport.ray_actor:BasicActorPool.fetch_result_and_return_actor_to_pool": {
        "4e9babbe276d": "1.39 to 1.42",
    },
    "flwr.simulation.ray_transport.ray_actor:BasicActorPool.submit": {
        "672402921baa": "1.39 to 1.42",
    },
    "flwr.supercore.corestate.in_memory_corestate:InMemoryCoreState.store_object": {
        "2f952e079f4d": "1.39 to 1.42",
    },
    "flwr.supercore.corestate.sql_corestate:SqlCoreState._cleanup_expired_task_tokens": {
        "34301eae2ee4": "1.39 to 1.42",
    },
    "flwr.supercore.corestate.sql_corestate:SqlCoreState.acknowledge_task_heartbeat": {
        "b4e87c4b327d": "1.39 to 1.42",
    },
    "flwr.supercore.corestate.sql_corestate:SqlCoreState.get_task_by_token": {
        "cf6795c48519": "1.39 to 1.42",
    },
    "flwr.supercore.corestate.sql_corestate:SqlCoreState.get_tasks": {
        "c8b9ce80e002": "1.39 to 1.42",
    },
    "flwr.supercore.corestate.sql_corestate:SqlCoreState.store_object": {
        "903590e22681": "1.39 to 1.42",
    },
    "flwr.supercore.dependencies.runtime:get_runtime_handlers": {
        "e05c10d6e876": "1.39 to 1.42",
    },
    "flwr.supercore.dependencies.runtime:get_runtime_state": {
        "4f4a1ca5e8a5": "1.39 to 1.42",
    },
    "flwr.supercore.dependencies.version:VersionDependency": {
        "3f5b416a9fdd": "1.39",
        "e028ba91776f": "1.40 to 1.42",
    },
    "flwr.supercore.grpc:create_channel": {
        "6d71819bdc98": "1.39 to 1.42",
    },
    "flwr.supercore.inflatable.inflatable_object:get_object_head_values_from_object_content": {
        "d9288c47e775": "1.39 to 1.42",
    },
    "flwr.supercore.inflatable.inflatable_utils:inflate_object_from_contents": {
        "93b98a2ea3f3": "1.39 to 1.42",
    },
    "flwr.supercore.inflatable.inflatable_utils:pull_and_inflate_object_from_tree": {
        "139811483a15": "1.39 to 1.42",
    },
    "flwr.supercore.inflatable.inflatable_utils:pull_objects": {
        "31bb2de46b45": "1.39 to 1.42",
    },
    "flwr.supercore.object_store.object_store_factory:ObjectStoreFactory.store": {
        "5f465613bfb0": "1.39 to 1.42",
    },
    "flwr.supercore.protobuf.client:ProtobufClient.from_server_address": {
        "786f4a7b7492": "1.39 to 1.42",
    },
    "flwr.supercore.protobuf.translation:get_protobuf_request": {
        "18199cad8d14": "1.39 to 1.42",
    },
    "flwr.supercore.retry.grpc_retry:make_simple_grpc_retry_invoker": {
        "261143c8938e": "1.39 to 1.42",
    },
    "flwr.supercore.retry.http_retry:make_simple_http_retry_invoker": {
        "a49d1c32d6c6": "1.39 to 1.40",
        "49e12326a4b1": "1.41 to 1.42",
    },
    "flwr.supercore.routers.runtime.router:acquire_task": {
        "dd75481efa7c": "1.39 to 1.42",
    },
    "flwr.supercore.routers.runtime.router:confirm_message_received": {
        "29d84ee73caa": "1.39 to 1.42",
    },
    "flwr.supercore.sql_mixin:SqlMixin.initialize": {
        "43ce5ae80d15": "1.39",
        "010e6d94a7ba": "1.40 to 1.42",
    },
    "flwr.supercore.sql_mixin:SqlMixin.session": {
        "2aa8a8351f33": "1.39 to 1.42",
    },
    "flwr.supercore.superexec.executor.subprocess_executor:SubprocessExecutor.launch": {
        "83abf3dbe022": "1.39 to 1.42",
    },
    "flwr.supercore.superexec.run_superexec:run_superexec": {
        "0cc169d016ac": "1.39",
        "d11f4e7fbc8f": "1.40 to 1.41",
        "91e7a33c5b89": "1.42",
    },
    "flwr.superlink.dependencies.linkstate:get_linkstate": {
        "a5afb79e372f": "1.39 to 1.42",
    },
    "flwr.superlink.grid.http_grid:HttpGrid.pull_messages": {
        "67a5266a5a2e": "1.39 to 1.42",
    },
    "flwr.superlink.grid.inmemory_grid:InMemoryGrid.pull_messages": {
        "71c93f1988c5": "1.39 to 1.42",
    },
    "flwr.superlink.routers.control.middlewares:ControlAuthenticationMiddleware": {
        "1495e41d9bbb": "1.39 to 1.42",
    },
    "flwr.superlink.routers.control.middlewares:ControlEventLogMiddleware": {
        "56df1f713b7c": "1.39",
        "d8db2d506ca7": "1.40 to 1.42",
    },
    "flwr.superlink.routers.control.middlewares:ControlLicenseMiddleware": {
        "0f57194171e9": "1.39 to 1.42",
    },
    "flwr.superlink.routers.control.middlewares:ControlSensitiveResponseMiddleware": {
        "25cca9386003": "1.39 to 1.42",
    },
    "flwr.superlink.routers.control.middlewares:_is_control_path": {
        "bfb5469e9013": "1.39 to 1.42",
    },
    "flwr.superlink.servicer.runtime.runtime_handlers:acquire_task": {
        "bd7f7507d885": "1.39 to 1.42",
    },
    "flwr.supernode.cli.flower_supernode:flower_supernode": {
        "e6c32050e07c": "1.39",
        "e263e1045207": "1.40 to 1.42",
    },
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState._store_error_replies": {
        "3af03090bfae": "1.39 to 1.42",
    },
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState.delete_messages": {
        "b5305a764184": "1.39 to 1.42",
    },
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState.finish_task": {
        "6800803a9677": "1.39 to 1.42",
    },
    "flwr.supernode.nodestate.in_memory_nodestate:InMemoryNodeState.get_messages": {
        "337c6ecb6ac9": "1.39 to 1.40",
        "1a5a9140a90c": "1.41 to 1.42",
    },
    "flwr.supernode.nodestate.nodestate_factory:NodeStateFactory.state": {
        "b1cb8f79bedd": "1.39 to 1.42",
    },
    "flwr.supernode.runtime.run_clientapp:pull_task_input": {
        "5607a23e1673": "1.39 to 1.42",
    },
    "flwr.supernode.runtime.run_clientapp:run_clientapp": {
        "0df7b3272ecd": "1.39",
        "6ce09559f3a2": "1.40 to 1.42",
    },
    "flwr.supernode.servicer.runtime.runtime_handlers:confirm_message_received": {
        "d922673fae15": "1.39 to 1.42",
    },
    "flwr.supernode.start_client_internal:_init_connection": {
        "1393636f81d0": "1.39",
        "800f9aba7364": "1.40 to 1.42",
    },
    "flwr.supernode.start_client_internal:_push_messages": {
        "5f09f2f7a86c": "1.39 to 1.40",
        "00bb86faffde": "1.41 to 1.42",
    },
    "flwr.supernode.start_client_internal:start_client_internal": {
        "bb3df95a5f63": "1.39",
        "9e89a6eb68fb": "1.40 to 1.42",
    },
}
