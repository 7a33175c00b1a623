"""How a node replies: errors in one sentence, meta-gradients as `update-dtype` codes them."""

from collections.abc import Callable
from functools import wraps
from logging import ERROR
from typing import TypeVar

from flwr.app import Context, Message, RecordDict

from quickbloom.client_app.node import Node, node_of
from quickbloom.client_app.owner import diary
from quickbloom.client_app.owner.hearing import state_of
from quickbloom.client_app.task_state import KeptState
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import QuickbloomError
from quickbloom.common.flower.names import log
from quickbloom.common.maths.params import Params
from quickbloom.common.randomness import generator
from quickbloom.common.wire import packing
from quickbloom.common.wire.compression import FLOAT32, CodingError, encode, with_feedback
from quickbloom.common.wire.messages import TrainReply, TrainRequest, WireError, error_records, told_settings
from quickbloom.common.wire.roll_call import told_agreed

AnyNode = TypeVar("AnyNode", bound=Node)
Handler = Callable[[Message, AnyNode, RecordDict], RecordDict]
FlowerHandler = Callable[[Message, Context], Message]

_LOST = "\0what coding lost of the sum"
"""Name, which no task has, of the error that `update-dtype` left of the last meta-gradients, times their weight."""


def replies(handler: Handler[Node]) -> FlowerHandler:
    """Turn errors that a user can mend into a reply with one sentence. Any other exception is a defect and is raised."""
    return replies_of(_node)(handler)


def replies_of(node_for: Callable[[Message, Context], AnyNode]) -> Callable[[Handler[AnyNode]], FlowerHandler]:
    """Return `replies` for nodes that `node_for` finds."""

    def decorated(handler: Handler[AnyNode]) -> FlowerHandler:
        @wraps(handler)
        def wrapped(message: Message, context: Context) -> Message:
            packed, told = packing.is_packed(message.content), ""
            try:
                message.content = packing.unpack(message.content)
                content = handler(message, node_for(message, context), context.state)
            except (QuickbloomError, WireError) as error:
                log(ERROR, "%s", error)
                told = str(error)
                content = error_records(error.for_others() if isinstance(error, QuickbloomError) else str(error))
            about = message.metadata
            diary.note_message(state_of(context), about.message_type, str(context.run_id), about.group_id, told)
            return Message(packing.pack(content) if packed else content, reply_to=message)

        return wrapped

    return decorated


def _node(message: Message, context: Context) -> Node:
    return node_of(context, told_settings(message.content), *told_agreed(message.content))


def coded(run: RunConfig, store: KeptState, made: TrainReply, request: TrainRequest) -> Params:
    """Return the gradient encoded by `update-dtype`; the encoding error stays on this node for its next gradient."""
    kind, share = run.update_dtype, run.update_share
    rng = generator(request.seed, "coding", request.round, *request.task_ids)
    if kind == FLOAT32:
        return encode(made.gradient, kind, share, rng)
    gradient = {name: value.cpu() for name, value in made.gradient.items()}
    # All rules but the mean give every node the same weight.
    weight = made.weight if run.aggregate == "mean" else min(made.weight, 1.0)
    try:
        coded, lost = with_feedback(gradient, weight, store.load(_LOST, gradient), kind, share, rng)
    except CodingError as error:
        raise WireError(f"this node's meta-gradient cannot be sent as {kind}: {error}") from None
    if lost is not None:
        store.save(_LOST, lost)
    return coded
