"""The server's word that this node does not take part, told to the owner of the device in its log and in `status`.

It needs nothing of the node's data: these may be what does not fit.
"""

from logging import WARNING

from flwr.app import ConfigRecord, Context, Message, RecordDict

from quickbloom.client_app.owner import diary
from quickbloom.client_app.owner.words import refusal_in_words
from quickbloom.common.flower.names import log
from quickbloom.common.wire import packing
from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.messages import error_records
from quickbloom.common.wire.refusal import Refusal


def hear(message: Message, context: Context) -> Message:
    """Tell the owner why the server does not let this node take part, and reply that this is done."""
    try:
        told = Refusal.from_records(packing.unpack(message.content))
    except WireError as error:
        return Message(error_records(str(error)), reply_to=message)
    log(WARNING, "This device does not take part: %s", " ".join(refusal_in_words(diary.SERVER, told.kind, told.reason)))
    diary.note_refusal(state_of(context), told.kind, told.reason)
    return Message(RecordDict({"heard": ConfigRecord({"kind": told.kind})}), reply_to=message)


def state_of(context: Context) -> str:
    """Return the folder that this node keeps for itself; "" if it has none."""
    folder = context.node_config.get("state-dir", "")
    return folder if isinstance(folder, str) else ""
