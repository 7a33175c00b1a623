"""The participants of a run: nodes, and the tasks that they host."""

from dataclasses import dataclass, field

from quickbloom.common.datasets.base import DataSpec, TaskInfo


@dataclass
class Population:
    """The participants. `homes`: the node of every task. `splits`: sorted task ids of "train", "validation" and "test".

    `nodes`: all that answered the roll call, also those without tasks. `keepers`: those with a
    place for personal models. `agreed`: the schema that every message gives the nodes, if they did
    not find the same one themselves; else "". `scales`: those that all tasks share, see `tell_agreed`.
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
