"""Many nodes in one process, to load a SuperLink: Flower's node protocol over gRPC, this project's messages, made-up replies.

Every node has a key and an id of its own, signs its calls, sends heartbeats, looks for messages at the pace of a
`quickbloom-edge join` node, fetches run, app and message, and pushes its reply, as a SuperNode of Flower 1.39 does. It computes
nothing: meta-gradients are the model times a small number of its own, so that no two replies are alike, and scores are
constant. All nodes share this process's connections.

    python -m benchmarks.many_nodes --superlink 127.0.0.1:9092 --nodes 1000
"""

import argparse
import asyncio
import json
import random
import time
from collections import Counter
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import grpc
import numpy as np
from flwr.app import Message, RecordDict
from flwr.app.message.message import remove_content_from_message
from flwr.client.grpc_rere_client.node_auth_client_interceptor import NodeAuthClientInterceptor
from flwr.common.constant import HEARTBEAT_DEFAULT_INTERVAL
from flwr.common.serde import message_from_proto, message_to_proto
from flwr.proto.fab_pb2 import GetFabRequest
from flwr.proto.fleet_pb2 import (
    ActivateNodeRequest,
    DeactivateNodeRequest,
    PullMessagesRequest,
    PushMessagesRequest,
    RegisterNodeFleetRequest,
    UnregisterNodeFleetRequest,
)
from flwr.proto.fleet_pb2_grpc import FleetStub
from flwr.proto.heartbeat_pb2 import SendNodeHeartbeatRequest
from flwr.proto.message_pb2 import ConfirmMessageReceivedRequest, PullObjectRequest, PushObjectRequest
from flwr.proto.node_pb2 import Node
from flwr.proto.run_pb2 import GetRunRequest
from flwr.supercore.inflatable.inflatable_object import get_all_nested_objects, get_object_tree, iterate_object_tree
from flwr.supercore.inflatable.inflatable_utils import inflate_object_from_contents
from flwr.supercore.interceptors import RuntimeVersionClientInterceptor
from flwr.supercore.primitives.asymmetric import generate_key_pairs, public_key_to_bytes

from quickbloom.client_app.app import versions
from quickbloom.common.datasets.base import TaskInfo
from quickbloom.common.datasets.gaussian import Gaussian
from quickbloom.common.flower import workers
from quickbloom.common.wire import packing
from quickbloom.common.wire.messages import TRAIN, EvaluateReply, EvaluateRequest, TrainReply, TrainRequest
from quickbloom.common.wire.roll_call import ROLL_CALL, RollCallReply

CONNECTIONS = 8
RETRY = 1.0
"""Seconds after which a call that failed is made again."""
LONGEST_BACKOFF = 10.0
"""Most seconds until a part of a message that was not there is asked for again, as Flower has it."""
EXAMPLES = 40


class _Details(NamedTuple):
    """What an interceptor of Flower's reads and replaces of a call."""

    metadata: Any = None


@dataclass
class Told:
    """What all nodes did.

    `calls`, `failed`: by name; `replies`: by type; `last`: the time of the last reply of a type and round; `looked`: seconds of
    all looks for messages; `active`: nodes that have joined.
    """

    calls: Counter[str] = field(default_factory=Counter)
    failed: Counter[str] = field(default_factory=Counter)
    replies: Counter[str] = field(default_factory=Counter)
    last: dict[str, float] = field(default_factory=dict)
    looked: float = 0.0
    active: int = 0


class EmulatedNode:
    """One node: an identity, a task of its own, and the loop of a SuperNode."""

    def __init__(self, number: int, stub: Any, told: Told, poll: float) -> None:
        self._stub, self._told = stub, told
        self._task = f"task-{number:06d}"
        self._scale = 1e-4 * (1 + number % 997) / 997
        keys = generate_key_pairs()
        self._public = public_key_to_bytes(keys[1])
        self._interceptors = (RuntimeVersionClientInterceptor("SuperNode"), NodeAuthClientInterceptor(*keys))
        self._pace = workers.Pace(poll, spares=True)
        self._runs: set[int] = set()
        self.node = Node()

    async def join(self) -> None:
        """Register with the SuperLink, and become active."""
        await self._call("RegisterNode", RegisterNodeFleetRequest(public_key=self._public))
        request = ActivateNodeRequest(public_key=self._public, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        self.node = Node(node_id=(await self._call("ActivateNode", request)).node_id)
        self._told.active += 1

    async def leave(self) -> None:
        """Leave in order."""
        await self._call("DeactivateNode", DeactivateNodeRequest(node_id=self.node.node_id))
        await self._call("UnregisterNode", UnregisterNodeFleetRequest(node_id=self.node.node_id))

    async def beat(self) -> None:
        """Send heartbeats for ever."""
        request = SendNodeHeartbeatRequest(node=self.node, heartbeat_interval=HEARTBEAT_DEFAULT_INTERVAL)
        while True:
            await asyncio.sleep(HEARTBEAT_DEFAULT_INTERVAL * random.uniform(0.7, 0.9))
            await self._call("SendNodeHeartbeat", request)

    async def work(self) -> None:
        """Look for messages and answer them, for ever."""
        while True:
            started = time.monotonic()
            response = await self._call("PullMessages", PullMessagesRequest(node=self.node))
            took = time.monotonic() - started
            self._told.looked += took
            if response.messages_list:
                with suppress(grpc.RpcError):  # counted; the run may have ended
                    await self._answer(message_from_proto(response.messages_list[0]), response.message_object_trees[0])
                self._pace.work()
            else:
                await asyncio.sleep(self._pace.pause(took))

    async def _answer(self, message: Message, tree: Any) -> None:
        run_id = message.metadata.run_id
        if run_id not in self._runs:
            run = (await self._call("GetRun", GetRunRequest(node=self.node, run_id=run_id))).run
            await self._call("GetFab", GetFabRequest(node=self.node, hash_str=run.fab_hash, run_id=run_id))
            self._runs.add(run_id)
        contents = {}
        for part in iterate_object_tree(tree):
            contents[part.object_id] = await self._pull(run_id, part.object_id)
        received = ConfirmMessageReceivedRequest(node=self.node, run_id=run_id, message_object_id=tree.object_id)
        await self._call("ConfirmMessageReceived", received)
        whole: Any = inflate_object_from_contents(tree.object_id, contents)
        whole.metadata.__dict__["_message_id"] = tree.object_id
        kind = message.metadata.message_type
        packed = packing.is_packed(whole.content)
        made = self._made(kind, packing.unpack(whole.content) if packed else whole.content)
        await self._push(Message(packing.pack(made) if packed else made, reply_to=whole))
        self._told.replies[kind] += 1
        self._told.last[f"{kind} {message.metadata.group_id}".strip()] = time.time()

    async def _pull(self, run_id: int, object_id: str) -> bytes:
        pause = workers.FIRST_BACKOFF
        while True:
            part = await self._call("PullObject", PullObjectRequest(node=self.node, run_id=run_id, object_id=object_id))
            if part.object_available:
                return bytes(part.object_content)
            await asyncio.sleep(pause * random.uniform(0.8, 1.2))  # the server still pushes it
            pause = min(2 * pause, LONGEST_BACKOFF)

    async def _push(self, reply: Message) -> None:
        run_id = reply.metadata.run_id
        reply.metadata.__dict__["_message_id"] = reply.object_id
        tree, objects = get_object_tree(reply), get_all_nested_objects(reply)
        request = PushMessagesRequest(
            node=self.node,
            messages_list=[message_to_proto(remove_content_from_message(reply))],
            message_object_trees=[tree],
            clientapp_runtime_list=[0.0],
        )
        wanted = await self._call("PushMessages", request)
        for object_id in wanted.objects_to_push:
            part = PushObjectRequest(
                node=self.node,
                run_id=run_id,
                object_id=object_id,
                object_content=objects[object_id].deflate(),
                session_id=wanted.session_id,
            )
            await self._call("PushObject", part)

    def _made(self, kind: str, records: RecordDict) -> RecordDict:
        """Return the reply to a request."""
        if kind == ROLL_CALL:
            spec = Gaussian(Gaussian.Options(clients=1), Path()).spec
            return RollCallReply(spec, [TaskInfo(self._task, EXAMPLES, EXAMPLES, EXAMPLES)], versions()).to_records()
        if kind == TRAIN:
            asked = TrainRequest.from_records(records)
            gradient = {name: value * self._scale for name, value in asked.meta.items()}
            return TrainReply(gradient, 1.0, [1.0] * len(asked.task_ids)).to_records()
        scored = EvaluateRequest.from_records(records)
        shape = (len(scored.task_ids), len(scored.lrs), scored.steps + 1)
        return EvaluateReply(np.ones(shape), np.full(shape, 0.5)).to_records()

    async def _call(self, name: str, request: Any) -> Any:
        """Call the SuperLink, again and again while it is away."""
        method = getattr(self._stub, name)
        while True:
            details = _Details()
            for interceptor in self._interceptors:
                details, _ = interceptor.intercept_unary_unary(_as_they_are, details, request)
            self._told.calls[name] += 1
            try:
                return await method(request, metadata=tuple(details.metadata), timeout=60)
            except grpc.RpcError as error:
                self._told.failed[f"{name}: {error.code().name}"] += 1
                if error.code() not in (grpc.StatusCode.UNAVAILABLE, grpc.StatusCode.DEADLINE_EXCEEDED):
                    raise
                await asyncio.sleep(RETRY)


def _as_they_are(details: Any, request: Any) -> Any:
    return details, request


async def drive(superlink: str, count: int, told: Told, poll: float, status: Path | None) -> None:
    """Be so many nodes until cancelled; `status`: a file to which is written every second what they did."""
    options = [
        ("grpc.max_receive_message_length", -1),
        ("grpc.max_send_message_length", -1),
        ("grpc.use_local_subchannel_pool", 1),
    ]
    channels = [grpc.aio.insecure_channel(superlink, options=options) for _ in range(CONNECTIONS)]
    stubs = [FleetStub(channel) for channel in channels]
    nodes = [EmulatedNode(number, stubs[number % CONNECTIONS], told, poll) for number in range(count)]

    async def live(node: EmulatedNode) -> None:
        await node.join()
        await asyncio.gather(node.beat(), node.work())

    async def tell() -> None:
        while True:
            if status is not None:
                whole = status.with_suffix(".part")
                facts = {"calls": told.calls, "failed": told.failed, "replies": told.replies, "last": told.last}
                whole.write_text(json.dumps({**facts, "looked": told.looked, "active": told.active}), encoding="utf-8")
                whole.replace(status)
            await asyncio.sleep(1)

    await asyncio.gather(tell(), *map(live, nodes))


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.many_nodes",
        description="many nodes in one process, with made-up replies to a run on `gaussian`",
        epilog="Example: python -m benchmarks.many_nodes --superlink 127.0.0.1:9092 --nodes 1000",
    )
    parser.add_argument("--superlink", required=True, metavar="HOST:PORT", help="where its nodes connect, without TLS")
    parser.add_argument("--nodes", type=int, default=1000, metavar="N", help="default: %(default)s")
    parser.add_argument("--poll", type=float, default=workers.LONGEST, metavar="S", help="as of join; default: %(default)s")
    parser.add_argument("--status", type=Path, metavar="FILE", help="write there every second what the nodes did, as JSON")
    chosen = parser.parse_args()
    asyncio.run(drive(chosen.superlink, chosen.nodes, Told(), chosen.poll, chosen.status))


if __name__ == "__main__":
    main()
