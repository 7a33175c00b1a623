"""What this node was asked in one training, so that its scores do not give away what its secure sums hide.

A score is an exact loss at weights that the server chooses: enough of them, and differences tell the gradient of a task. So a
task that trains in a run is never scored in it, nor the other way round. Where the node's meta-gradients travel in sums alone,
it scores one model in each round in which the run's own settings want scores, at their rates, steps and shots. It lasts as long
as the run, and what trains and what is scored as long as the training where there is a `state-dir`.
"""

import hashlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from flwr.app import ConfigRecord, RecordDict

from quickbloom.client_app.node import Node
from quickbloom.client_app.task_state import as_name
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params
from quickbloom.common.system.private import write_text
from quickbloom.common.wire.messages import EvaluateRequest, WireError

_KEPT = "asked"
_TRAINED, _SCORED = "trained", "scored"
_WHY = {
    _TRAINED: "this node trains on the task '{}' in this run, so it gives no scores of it, which would tell its gradient",
    _SCORED: "this node was asked for scores of the task '{}' in this run, so it does not train on it",
}


class Asked:
    """The memory of one node, in Flower's state of the run and in a file `asked.json` of the training's folder in `state-dir`.

    Each method raises WireError for what is refused, ConfigError if the file cannot be read or written.
    """

    def __init__(self, node: Node, state: RecordDict, lineage: str) -> None:
        self._node, self._state = node, state
        folder = Path(node.state_dir).expanduser() / as_name(lineage)
        self._file = folder / "asked.json" if node.state_dir and lineage else None
        kept = state.get(_KEPT)
        self._fields: dict[str, Any] = dict(kept) if isinstance(kept, ConfigRecord) else {}
        on_disk = self._read()
        self._tasks = {kind: {*self._fields.get(kind, []), *on_disk.get(kind, [])} for kind in (_TRAINED, _SCORED)}

    def to_train(self, task_ids: Sequence[str]) -> None:
        """These tasks are asked to train."""
        self._check_data()
        self._refuse(_SCORED, task_ids)
        self._add(_TRAINED, task_ids)

    def to_score(self, request: EvaluateRequest, inner_lr: float) -> None:
        """These scores are asked for. `inner_lr`: the rate of the algorithm, which is tried beside those of the run."""
        self._check_data()
        self._refuse(_TRAINED, request.task_ids)
        if self._node.run.secure_aggregation or self._node.least_in_sum:
            self._by_schedule(request, inner_lr)
        self._add(_SCORED, request.task_ids)

    def _check_data(self) -> None:
        """By another task column, say, the rows of a task that trains would be those of another task."""
        run = self._node.run
        data = json.dumps([run.dataset, run.table(run.dataset).model_dump()], sort_keys=True)
        if self._fields.setdefault("data", data) != data:
            raise WireError("the settings of this run that say what its tasks are have changed since it began")

    def _refuse(self, kind: str, task_ids: Sequence[str]) -> None:
        if both := sorted(set(task_ids) & self._tasks[kind]):
            raise WireError(_WHY[kind].format(both[0]))

    def _add(self, kind: str, task_ids: Sequence[str]) -> None:
        if not set(task_ids) <= self._tasks[kind]:
            self._tasks[kind] |= set(task_ids)
            self._write()

    def _by_schedule(self, request: EvaluateRequest, inner_lr: float) -> None:
        run, number = self._node.run, request.round
        plan = json.dumps([run.evaluate_every, run.rounds, run.adapt_steps, sorted({*run.lrs, inner_lr}), run.shots])
        if self._fields.setdefault("plan", plan) != plan:
            raise WireError("the settings of this run that say when scores are asked for have changed since the first ones")
        if not set(request.lrs) <= {*run.lrs, inner_lr} or request.steps != run.adapt_steps:
            raise WireError("scores are asked for at other rates or steps than `adapt-lrs` and `adapt-steps` of this run")
        if request.shots not in (0, *run.shots):
            raise WireError(f"scores are asked for with {request.shots} shots, which are not in `test-shots` of this run")
        # A budget of privacy may end the training early, which only the server knows: once, and nothing comes after it.
        final = self._fields.get("final", run.rounds)
        due = run.evaluate_every > 0 and number % run.evaluate_every == 0
        if not 1 <= number <= final or not (due or number == final or "final" not in self._fields):
            raise WireError(f"scores are asked for in round {number}, and this run has none then")
        models = dict(text.split(":") for text in self._fields.get("models", []))
        if models.setdefault(str(number), digest := _digest(request.meta)) != digest:
            raise WireError(f"this node has scored another model in round {number}")
        self._fields |= {"models": [":".join(item) for item in models.items()]}
        self._fields |= {} if due and number != run.rounds else {"final": number}
        self._remember()

    def _remember(self) -> None:
        lists = {kind: sorted(names) for kind, names in self._tasks.items()}
        self._state[_KEPT] = ConfigRecord({**self._fields, **lists})

    def _write(self) -> None:
        self._remember()
        if not self._file:
            return
        try:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            write_text(self._file, json.dumps({kind: sorted(names) for kind, names in self._tasks.items()}))
        except OSError as error:
            raise ConfigError(
                f"node setting `state-dir` must be a directory that can be written, got '{self._file.parent.parent}' ({error})"
            ) from None

    def _read(self) -> dict[str, list[str]]:
        if not self._file or not self._file.exists():
            return {}
        try:
            found = json.loads(self._file.read_text())
            return {kind: [str(name) for name in found[kind]] for kind in (_TRAINED, _SCORED)}
        except (OSError, ValueError, KeyError, TypeError) as error:
            # To forget what was trained would be to score it.
            raise ConfigError(
                f"the file '{self._file}' in `state-dir` cannot be read ({error}), which says what tasks this node trains on: "
                "put it back, or remove it to begin anew"
            ) from None


def _digest(meta: Params) -> str:
    """What tells one model from another."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(meta):
        value = meta[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
