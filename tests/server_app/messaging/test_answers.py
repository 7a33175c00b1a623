"""One question to each node: answers, and for every other node the reason in words."""

from flwr.app import Message, RecordDict
from flwr.app.error import Error
from loopback import LoopbackGrid

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.wire.checks import WireError
from quickbloom.common.wire.messages import error_records
from quickbloom.common.wire.roll_call import ROLL_CALL, RollCallReply, roll_call_request
from quickbloom.server_app.messaging.answers import answers


def test_every_node_has_an_answer_or_a_reason() -> None:
    config = parse_run_config({"dataset": "gaussian", "gaussian.clients": 10, "min-nodes": 1}).resolved()
    faults = {
        1: lambda message, answer: None,
        2: lambda message, answer: Message(error_records("its disk is full"), reply_to=message),
        3: lambda message, answer: Message(Error(7, "Traceback\n  gone\n"), reply_to=message),
    }
    grid = LoopbackGrid(5, config.flat(), faults)

    def read(node_id: int, records: RecordDict) -> list[str]:
        if node_id == 104:
            raise WireError("it is of no use")
        return [task.task_id for task in RollCallReply.from_records(records).tasks]

    messages = [Message(roll_call_request(""), node_id, ROLL_CALL) for node_id in grid.get_node_ids()]
    found, reasons = answers(grid, messages, 0.2, read, "the roll call")
    assert found == {100: ["client-000", "client-005"]}
    assert reasons == {
        101: "it did not answer the roll call within 0.2 s",
        102: "its disk is full",
        103: "error 7: gone",
        104: "it is of no use",
    }
    assert answers(grid, [Message(roll_call_request(""), 101, ROLL_CALL)], 0.2, read)[1] == {
        101: "it did not answer within 0.2 s"
    }
