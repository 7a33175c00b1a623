"""All of Flower's private names that this package uses: where they are, and what needs them.

Each is looked up when it is used. If one is missing, its user says so in one sentence. Runs in one
process, `quickbloom-edge adapt` and `predict` need none of them. Replaced parts of Flower are in
`common.flower.registry`.
"""

import importlib.metadata
from collections.abc import Callable
from dataclasses import dataclass
from importlib import import_module
from logging import getLogger
from typing import Any

from quickbloom.common.errors import ConfigError

log: Callable[..., None] = getLogger("flwr").log
"""Flower's log, by the name of its logger: `log(level, text, *arguments)`."""
NODE_UNAVAILABLE, MESSAGE_UNAVAILABLE = 5, 3
"""Codes of Flower's error replies. Messages carry them, so they do not change."""
NUMPY = "numpy.ndarray"
"""Type name of all arrays in Flower's records."""


@dataclass(frozen=True)
class Name:
    """One private name. `places`: "module:name", of which the first that exists counts; later ones are of other releases.

    `needed_for`: what fails without it.
    """

    places: tuple[str, ...]
    needed_for: str


_SERVER = "`quickbloom secrets --register`, and for saying why a SuperLink does not answer"
_CLOCK = "checking this device's clock against the server's"
_PACKING = "sending messages between processes"
_APP = "`preloaded-app` of workers"

NAMES: dict[str, Name] = {
    "TaskIdentity": Name(
        ("flwr.supercore.task_identity:TaskIdentity", "flwr.app.message.message:TaskIdentity"),
        "making messages outside of a run",
    ),
    "recorddict_to_proto": Name(
        ("flwr.common.serde:recorddict_to_proto", "flwr.supercore.serde:recorddict_to_proto"), _PACKING
    ),
    "recorddict_from_proto": Name(
        ("flwr.common.serde:recorddict_from_proto", "flwr.supercore.serde:recorddict_from_proto"), _PACKING
    ),
    "ProtoRecordDict": Name(("flwr.proto.recorddict_pb2:RecordDict",), _PACKING),
    "read_superlink_connection": Name(("flwr.cli.flower_config:read_superlink_connection",), _SERVER),
    "init_http_client_from_connection": Name(("flwr.cli.utils:init_http_client_from_connection",), _SERVER),
    "ListNodesRequest": Name(("flwr.proto.control_pb2:ListNodesRequest",), _SERVER),
    "RegisterNodeRequest": Name(("flwr.proto.control_pb2:RegisterNodeRequest",), _SERVER),
    "FlowerError": Name(("flwr.supercore.error:FlowerError",), _SERVER),
    "ApiErrorCode": Name(("flwr.supercore.error:ApiErrorCode",), _SERVER),
    "PUBLIC_KEY_HEADER": Name(("flwr.common.constant:PUBLIC_KEY_HEADER",), _CLOCK),
    "TIMESTAMP_HEADER": Name(("flwr.common.constant:TIMESTAMP_HEADER",), _CLOCK),
    "SIGNATURE_HEADER": Name(("flwr.common.constant:SIGNATURE_HEADER",), _CLOCK),
    "FleetStub": Name(("flwr.proto.fleet_pb2_grpc:FleetStub",), _CLOCK),
    "GetRunRequest": Name(("flwr.proto.run_pb2:GetRunRequest",), _CLOCK),
    "public_key_to_bytes": Name(("flwr.supercore.primitives.asymmetric:public_key_to_bytes",), _CLOCK),
    "sign_message": Name(("flwr.supercore.primitives.asymmetric:sign_message",), _CLOCK),
    "ObjectPushError": Name(
        ("flwr.supercore.inflatable.inflatable_utils:ObjectPushError",), "repeating an upload that was refused"
    ),
    "ALEMBIC_DIR": Name(
        ("flwr.supercore.state.alembic.utils:ALEMBIC_DIR",), "recognising the database of a later release of Flower"
    ),
    "get_flwr_home": Name(("flwr.supercore.utils:get_flwr_home",), _APP),
    "APP_DIR": Name(("flwr.common.constant:APP_DIR", "flwr.supercore.constant:APP_DIR"), _APP),
    "VersionDependency": Name(
        (
            "flwr.supercore.dependencies.version:VersionDependency",
            "flwr.supercore.dependencies.runtime_version:RuntimeVersionDependency",
        ),
        "`look-ups` of servers",
    ),
}


class MissingNameError(ConfigError):
    """This Flower lacks a name. The text says which, and what does not work without it."""


def get(name: str) -> Any:
    """Return the object of Flower for one of NAMES. Raises MissingNameError."""
    found = find(name)
    if found is None:
        entry = NAMES[name]
        raise MissingNameError(
            f"Flower {importlib.metadata.version('flwr')} lacks `{entry.places[0].replace(':', '.')}`, which is needed for "
            f"{entry.needed_for}: install a release that quickbloom was tested with, by pip install 'flwr>=1.39,<1.43'"
        )
    return found


def find(name: str) -> Any:
    """Return the object of Flower for one of NAMES; None if there is none."""
    for place in NAMES[name].places:
        module, _, attribute = place.partition(":")
        try:
            return getattr(import_module(module), attribute)
        except (ImportError, AttributeError):
            continue
    return None
