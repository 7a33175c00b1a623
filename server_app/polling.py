"""A Grid that waits for replies with short polls.

Flower's own grids sleep 0.1 s (simulation) or 3 s (deployment) between two looks, which is most of a small round. This one
waits about a tenth of the time that has passed, so it costs little both for rounds of 50 ms and for rounds of minutes.
"""

import time
from collections.abc import Callable, Iterable, Mapping

from flwr.app import Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.run import Run

from common.config import Scalar
from common.wire import tell_settings

_SHORTEST, _LONGEST = 0.004, 0.5  # seconds


class PollingGrid(Grid):
    """Delegates everything to another grid but the waiting in `send_and_receive`.

    `settings`: those of the run that its nodes cannot know from Flower; they go along with every message.
    """

    def __init__(self, grid: Grid, settings: Mapping[str, Scalar] | None = None) -> None:
        self._grid = grid
        self._settings = dict(settings or {})

    def set_run(self, run: Run) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Run:
        return self._grid.run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: float | None = None
    ) -> Message:
        return self._grid.create_message(content, message_type, dst_node_id, group_id, ttl)

    def get_node_ids(self) -> Iterable[int]:
        return self._grid.get_node_ids()

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        listed = list(messages)
        for message in listed:
            tell_settings(message.content, self._settings)
        return self._grid.push_messages(listed)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)

    def send_and_receive(
        self,
        messages: Iterable[Message],
        *,
        timeout: float | None = None,
        enough: Callable[[list[Message]], bool] = lambda replies: False,
    ) -> list[Message]:
        """Send, then return the replies that came within `timeout` seconds (None: all of them, however long it takes).

        `enough` is asked after every look; True: the others are not waited for.
        """
        started = time.monotonic()
        # None stands for a message that could not be delivered: there is no reply to wait for.
        waiting = {message_id for message_id in self.push_messages(list(messages)) if message_id}
        replies: list[Message] = []
        while waiting:
            arrived = list(self.pull_messages(waiting))
            replies += arrived
            waiting -= {reply.metadata.reply_to_message_id for reply in arrived}
            passed = time.monotonic() - started
            if not waiting or enough(replies) or (timeout is not None and passed >= timeout):
                break
            time.sleep(min(max(passed / 10, _SHORTEST), _LONGEST))
        return replies
