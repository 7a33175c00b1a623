"""The participants of a run: nodes, and the tasks that they host."""

from dataclasses import dataclass, field

from quickbloom.common.datasets.base import DataSpec, TaskInfo
from quickbloom.common.wire.roll_call import RollCallReply


@dataclass
class Population:
    """The participants. `homes`: the node of every task. `splits`: sorted task ids of "train", "validation" and "test".

    `nodes`: all that answered the roll call, also those without tasks. `keepers`: those with a
    place for personal models. `agreed`: the schema that every message gives the nodes, if they did
    not find the same one themselves; else "". `scales`: those that all tasks share, see `tell_agreed`.
    `constants`: SHA-256 of what the model has besides what is trained, "" for nothing.

    Of nodes that come later: `arrived`: answers to the roll call of nodes that are to join before the first round; `told`:
    nodes that came or came back, which are given the run's schema whatever their files show; `joined`: tasks that joined,
    all of which train.
    """

    spec: DataSpec
    homes: dict[str, int]
    splits: dict[str, list[str]]
    tasks: dict[str, TaskInfo]
    refused: dict[int, str] = field(default_factory=dict)
    nodes: set[int] = field(default_factory=set)
    keepers: set[int] = field(default_factory=set)
    agreed: str = ""
    scales: str = ""
    constants: str = ""
    arrived: dict[int, RollCallReply] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    joined: set[str] = field(default_factory=set)

    @property
    def unused(self) -> list[str]:
        """Return the tasks that are in no split, such as those without enough examples."""
        return sorted(self.tasks.keys() - {task_id for ids in self.splits.values() for task_id in ids})

    @property
    def schema(self) -> str:
        """Return the schema of the run, for a node that comes later; "" if its data need none."""
        return self.agreed or self.spec.schema

    def schema_for(self, node_id: int) -> str:
        """Return the schema that messages to this node have."""
        return self.schema if node_id in self.told else self.agreed
