"""Memory of the requests in one training, so that scores do not reveal what secure sums hide.

A score is an exact loss at weights chosen by the server; from differences of many scores it could
derive the gradient of a task. A task that trains in a run is therefore never scored in it, and vice
versa, with one exception: where `evaluate-users` asks for seen users, and gradients are neither in
sums nor private, training tasks are scored by one model, the final one, at one rate. If the
node's meta-gradients travel only in secure sums, it scores one model in each round in which the
run's own settings ask for scores, at their rates, steps and shots. If the run keeps its best model
(`keep`), the initial one is scored as well, as that of round 0, and after training one of the
models that were scored before may be scored with more steps. This memory lasts as long as the run.
With a `state-dir`, the lists of trained and scored tasks last as long as the training.
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
from quickbloom.common.config.keep import wants_best
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params
from quickbloom.common.system.whole_files import write_private
from quickbloom.common.wire.messages import EvaluateRequest, WireError

_KEPT = "asked"
_TRAINED, _SCORED, _HIDDEN = "trained", "scored", "hidden"
"""Lists of tasks. `hidden`: those that trained while meta-gradients travelled in sums alone, or were to be private."""
_WHY = {
    _TRAINED: "this node trains on the task '{}' in this run, so it gives no scores of it, which would tell its gradient",
    _SCORED: "this node was asked for scores of the task '{}' in this run, so it does not train on it",
}


class Asked:
    """The memory of one node, in Flower's state of the run and in a file.

    The file is `asked.json` in the training's folder in `state-dir`, if there is one. Each method
    raises WireError for a refused request, and ConfigError if the file cannot be read or written.
    """

    def __init__(self, node: Node, state: RecordDict, lineage: str) -> None:
        self._node, self._state = node, state
        folder = Path(node.state_dir).expanduser() / as_name(lineage)
        self._file = folder / "asked.json" if node.state_dir and lineage else None
        kept = state.get(_KEPT)
        self._fields: dict[str, Any] = dict(kept) if isinstance(kept, ConfigRecord) else {}
        on_disk = self._read()
        kinds = (_TRAINED, _SCORED, _HIDDEN)
        self._tasks = {kind: {*self._fields.get(kind, []), *on_disk.get(kind, [])} for kind in kinds}

    def to_train(self, task_ids: Sequence[str]) -> None:
        """Record a request to train these tasks, or refuse it."""
        self._check_data()
        self._refuse(_SCORED, task_ids)
        if self._hides:
            self._add(_HIDDEN, task_ids)
        self._add(_TRAINED, task_ids)

    def to_score(self, request: EvaluateRequest, inner_lr: float) -> None:
        """Record a request for scores, or refuse it.

        `inner_lr`: the algorithm's rate, which is tried beside those of the run.
        """
        self._check_data()
        self._refuse(_TRAINED, request.task_ids)
        if self._node.run.secure_aggregation or self._node.least_in_sum:
            self._by_schedule(request, inner_lr)
        self._add(_SCORED, request.task_ids)

    def to_score_seen(self, request: EvaluateRequest, inner_lr: float, *, again: bool = False) -> None:
        """Record a request for scores of training tasks, or refuse it. `again`: of the same model, by more scores."""
        self._check_data()
        run = self._node.run
        if self._hides or not run.scores_seen:
            raise WireError("this node gives no scores of tasks that train in this run, which would tell their gradients")
        self._refuse(_HIDDEN, request.task_ids)
        if len(request.lrs) > 1 or not set(request.lrs) <= {*run.lrs, inner_lr} or request.shots:
            raise WireError("scores of training tasks are asked for at other rates or shots than one of `adapt-lrs` and all")
        if request.steps not in (run.first_steps, *run.more_steps):
            raise WireError("scores of training tasks are asked for at other steps than `adapt-steps` of this run")
        name, steps = f"{_digest(request.meta)} {request.lrs[0]!r} ", request.steps
        told = str(self._fields.get("seen", ""))
        if again and told.startswith(name):
            steps = max(steps, int(told.removeprefix(name)))  # fewer steps were told along with more
        model = f"{name}{steps}"
        if self._fields.setdefault("seen", model) != model:
            raise WireError("this node has scored tasks that it trains on by another model, and does so by one in a run")
        # One that never trained here could train from now on.
        self._add(_SCORED, sorted(set(request.task_ids) - self._tasks[_TRAINED]))
        self._remember()

    @property
    def _hides(self) -> bool:
        """Whether the server must not learn of a task what its scores tell."""
        run = self._node.run
        return bool(run.secure_aggregation or run.privacy.on or self._node.least_in_sum)

    def _check_data(self) -> None:
        """Refuse changed data settings: with another task column or partition, a task could hold rows of one that trains."""
        run = self._node.run
        # The partition is no field of the table, so its dump lacks it.
        data = json.dumps([run.dataset, run.table(run.dataset).model_dump(), repr(run.spread)], sort_keys=True)
        if self._fields.setdefault("data", data) != data:
            raise WireError("the settings of this run that say what its tasks are have changed since it began")

    def _refuse(self, kind: str, task_ids: Sequence[str]) -> None:
        if both := sorted(set(task_ids) & self._tasks[kind]):
            raise WireError(_WHY[_TRAINED if kind == _HIDDEN else kind].format(both[0]))

    def _add(self, kind: str, task_ids: Sequence[str]) -> None:
        if not set(task_ids) <= self._tasks[kind]:
            self._tasks[kind] |= set(task_ids)
            self._write()

    def _by_schedule(self, request: EvaluateRequest, inner_lr: float) -> None:
        run, number = self._node.run, request.round
        lrs = sorted({*run.lrs, inner_lr})
        plan = json.dumps([run.evaluate_every, run.rounds, run.adapt_steps, lrs, run.shots, run.keep])
        if self._fields.setdefault("plan", plan) != plan:
            raise WireError("the settings of this run that say when scores are asked for have changed since the first ones")
        longer = request.steps in run.more_steps
        if not set(request.lrs) <= {*run.lrs, inner_lr} or not (longer or request.steps == run.first_steps):
            raise WireError("scores are asked for at other rates or steps than `adapt-lrs` and `adapt-steps` of this run")
        if request.shots not in (0, *run.shots):
            raise WireError(f"scores are asked for with {request.shots} shots, which are not in `test-shots` of this run")
        # A privacy budget may end training early, which only the server knows: accepted once, with no scores after it.
        final = self._fields.get("final", run.rounds)
        due = run.evaluate_every > 0 and number % run.evaluate_every == 0 and not longer  # more steps end the training, too
        models = dict(text.split(":") for text in self._fields.get("models", []))
        keeps_best = wants_best(run, self._node.dataset.spec)
        again = keeps_best and longer and "final" in self._fields and number != final and str(number) in models
        again = again and self._fields.get("kept", number) == number
        first = 0 if keeps_best else 1
        if not first <= number <= final or not (due or number == final or again or "final" not in self._fields):
            raise WireError(f"scores are asked for in round {number}, and this run has none then")
        if models.setdefault(str(number), digest := _digest(request.meta)) != digest:
            raise WireError(f"this node has scored another model in round {number}")
        self._fields |= {"models": [":".join(item) for item in models.items()]}
        if again:
            self._fields["kept"] = number
        elif not due or number == run.rounds:
            self._fields["final"] = number
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
            write_private(self._file, json.dumps({kind: sorted(names) for kind, names in self._tasks.items()}))
        except OSError as error:
            raise ConfigError(
                f"node setting `state-dir` must be a directory that can be written, got '{self._file.parent.parent}' ({error})"
            ) from None

    def _read(self) -> dict[str, list[str]]:
        if not self._file or not self._file.exists():
            return {}
        try:
            found = json.loads(self._file.read_text())
            lists = {kind: found[kind] for kind in (_TRAINED, _SCORED)} | {_HIDDEN: found.get(_HIDDEN, [])}
            return {kind: [str(name) for name in names] for kind, names in lists.items()}
        except (OSError, ValueError, KeyError, TypeError) as error:
            # Without this list, a trained task could be scored.
            raise ConfigError(
                f"the file '{self._file}' in `state-dir` cannot be read ({error}), which says what tasks this node trains on: "
                "put it back, or remove it to begin anew"
            ) from None


def _digest(meta: Params) -> str:
    """Return a digest that identifies a model."""
    digest = hashlib.blake2b(digest_size=16)
    for name in sorted(meta):
        value = meta[name].detach().cpu().contiguous()
        digest.update(f"\n{name} {value.dtype} {list(value.shape)}\n".encode())
        digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()
