"""What the server asks of a node and of its tasks before they take part.

The same at the beginning of a run and of a node that joins while it goes on.
"""

from collections.abc import Collection

from quickbloom.common.datasets.base import DataSpec, TaskInfo
from quickbloom.common.errors import as_told
from quickbloom.common.wire.refusal import Misfit


def difference(odd: DataSpec, spec: DataSpec) -> Misfit:
    """Return why a node with data of the form `odd` cannot take part in a run with `spec`."""
    one, other = _form(odd), _form(spec)
    if one == other:
        return Misfit("columns", "its columns or classes are others than those of the run")
    return Misfit("form", f"its data have the form {one}, the other nodes' {other}")


def _form(spec: DataSpec) -> str:
    inputs = f"{spec.tokens} tokens" if spec.tokens else "inputs"
    return as_told(f"{spec.kind} of {inputs} {spec.input_shape} into {spec.outputs}")


def other_constants(digest: str, expected: str) -> str:
    """Return why a node whose model's constants have this hash is refused; "" if they are the `expected` ones."""
    if digest == expected:
        return ""
    return Misfit(
        "constants",
        f"the constants of its model have the SHA-256 {digest or '(it has none)'}, the server's {expected}: give it the same "
        "file of weights and the same release of what builds the model",
    )


def hosted_twice(task_id: str, dataset: str) -> Misfit:
    """Return the sentence on two nodes with a task of one name, and how to mend it. `dataset`: its name."""
    more = (
        ", or, where nodes have files of their own, let their tasks have different names (of a file without a task column: "
        "`quickbloom-edge join --task-name`)"
    )
    return Misfit(
        "task",
        f"two nodes host the task '{task_id}': give every node its own `partition-id` and the same "
        f"`num-partitions` in its --node-config{more if dataset == 'own' else ''}",
    )


def lacks(task: TaskInfo, split: str) -> str:
    """Return which examples a task of this split lacks: training needs support and query, scoring support and test; else ""."""
    other, name = (task.num_query, "query") if split == "train" else (task.num_test, "test")
    return "" if task.num_support and other else f"it has {task.num_support} support and {other} {name} examples"


def group_of(task: TaskInfo) -> str:
    """Return the group that a task shares its split with: by default it is alone."""
    return task.group or task.task_id


def why_not_trained(task: TaskInfo, held_out: Collection[str]) -> str:
    """Return why a task that comes during a run cannot train; "" if it can. `held_out`: groups of held-out tasks."""
    if task.split not in ("", "train"):
        return f"its data set holds it out for {task.split}"
    if group_of(task) in held_out:
        return "other tasks of its group are held out"
    return lacks(task, "train")
