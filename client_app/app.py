"""The ClientApp: load -> compute -> reply. The mathematics is in `common`, the replies are in `common.wire.messages`."""

import platform
import time
from collections.abc import Callable
from dataclasses import replace
from logging import ERROR, WARNING
from typing import Any

import flwr
import numpy as np
import torch
from flwr.app import Message, RecordDict
from flwr.clientapp import ClientApp

from quickbloom import __version__
from quickbloom.client_app import baselines, round_log, secure
from quickbloom.client_app.asked import Asked
from quickbloom.client_app.measuring import score_seen, score_unseen
from quickbloom.client_app.node import Node
from quickbloom.client_app.owner import diary
from quickbloom.client_app.owner.hearing import hear
from quickbloom.client_app.personal_models import keep_all
from quickbloom.client_app.replying import coded, replies
from quickbloom.client_app.task_state import KeptState
from quickbloom.common.datasets.own import Own
from quickbloom.common.engine.compiling import Auto
from quickbloom.common.engine.momentum import with_momentum
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import in_one_line
from quickbloom.common.flower.names import log
from quickbloom.common.maths.augmentation import read_augmentation
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.kernels import prebuilt
from quickbloom.common.maths.kernels.compiler import find_compiler
from quickbloom.common.maths.kernels.compiler import remark as kernel_remark
from quickbloom.common.maths.params import weighted_mean
from quickbloom.common.metric import named
from quickbloom.common.printable import keep_log_to_lines
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import (
    LARGEST_LOSS,
    LOSS_ROUNDING,
    EvaluateRequest,
    KeepReply,
    KeepRequest,
    TrainReply,
    TrainRequest,
    WireError,
    payload_bytes,
)
from quickbloom.common.wire.roll_call import (
    ConstantsReply,
    MomentsReply,
    MomentsRequest,
    RollCallReply,
    check_roll_call,
)
from quickbloom.common.wire.secure.messages import MaskedRequest
from quickbloom.common.wire.secure.updates import to_row

app = ClientApp()
keep_log_to_lines()

_MOMENTUM = "\0momentum of "
"""Start of the names, which no task has, of what `node-momentum` keeps of a task's contributions; the task's own follows."""

ToReply = Callable[[TrainReply, KeptState], RecordDict]


@app.query("roll_call")
@replies
def roll_call(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the tasks that this node hosts, and the form of their examples."""
    check_roll_call(message.content)
    # A machine with neither was told so when it joined.
    if (find_compiler() or prebuilt.installed()) and (lacking := kernel_remark()):
        log(WARNING, "%s", lacking)
    left_out, keeps = node.dataset.left_out, bool(node.state_dir)
    diary.note_roll_call(node.state_dir, len(node.tasks), left_out)
    return RollCallReply(node.dataset.spec, node.tasks, versions(), left_out=left_out, keeps=keeps, hears=True).to_records()


app.query("refused")(hear)


def versions() -> dict[str, str]:
    """Return the releases of this node's software by package."""
    return {
        "quickbloom": __version__,
        "flwr": flwr.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
    }


@app.query("constants")
@replies
def constants(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the hash of what this node's model has besides what is trained."""
    return ConstantsReply(node.algorithm.learner.digest).to_records()


@app.query("moments")
@replies
def moments(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with what the training rows of this node show together of every column of numbers: no row is told."""
    request = MomentsRequest.from_records(message.content)
    secure.check_open(node)
    task_ids = node.check_hosted(request.task_ids)
    if not isinstance(node.dataset, Own):
        raise WireError("only the data set `own` has columns")
    if node.dataset.options.scale != "shared":
        raise WireError("every task of this run has a scale of its own (`own.scale`), so no means are told")
    return MomentsReply(node.dataset.column_moments(task_ids), node.dataset.class_counts(task_ids)).to_records()


app.query("means")(replies(secure.means))
app.query("masked_means")(replies(secure.masked_means))


@app.train()
@replies
def train(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the mean meta-gradient of the requested tasks."""
    request = TrainRequest.from_records(message.content)
    secure.check_open(node)

    def reply(made: TrainReply, store: KeptState) -> RecordDict:
        return replace(made, gradient=coded(node.run, store, made, request)).to_records()

    return _trained(message, node, state, request, reply)


@app.train("masked")
@replies
def train_masked(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the mean meta-gradient of the requested tasks, masked for a secure sum."""
    request = MaskedRequest.from_records(message.content, TrainRequest)
    stage = secure.ready(request, state)

    def reply(made: TrainReply, store: KeptState) -> RecordDict:
        row = to_row(made.gradient, made.weight, made.losses, made.within)
        return secure.masked(stage, request, row, state)

    return _trained(message, node, state, request.of, reply)


app.query("secure_keys")(replies(secure.keys))
app.query("secure_shares")(replies(secure.shares))
app.query("secure_reveal")(replies(secure.reveal))


def _trained(message: Message, node: Node, state: RecordDict, request: TrainRequest, to_reply: ToReply) -> RecordDict:
    """Train the requested tasks, store their new state, and return the reply that `to_reply` builds."""
    started, received = time.perf_counter(), payload_bytes(message.content)
    message.content.clear()  # to free memory: it has been read
    algorithm, meta = node.algorithm_for(request.meta)
    fresh, store = algorithm.fresh(), KeptState(state, node.state_dir, request.lineage)
    momentum = with_momentum(algorithm, node.run.node_momentum) if node.run.node_momentum else None
    work, augmentation = [], read_augmentation(node.run.augment)
    Asked(node, state, request.lineage).to_train(node.check_hosted(request.task_ids))
    for task_id in request.task_ids:
        kept = store.load(task_id, fresh)
        if momentum:
            kept = momentum.before(kept, store.load(_MOMENTUM + task_id, momentum.memory), request.round)
        for episode in range(node.episodes):
            place = request.round, task_id, episode
            rng = generator(request.seed, "train", *place)
            drawn = _draw(node, task_id, rng, request.clip)
            if augmentation:
                drawn = augmentation.of(drawn, generator(request.seed, "augment", *place))
            work.append(TaskWork(drawn, rng, kept))
    compile = node.compile.round(request.round) if isinstance(node.compile, Auto) else node.compile
    result = run_round(momentum or algorithm, meta, work, node.chunk_size, compile=compile, clip=request.clip)
    for t, task_id in enumerate(request.task_ids if fresh or momentum else ()):
        episodes = result.kept[t * node.episodes : (t + 1) * node.episodes]
        kept = weighted_mean((kept, 1.0) for kept in episodes)
        if momentum:
            kept, _ = momentum.after(kept)
            _, memory = momentum.after(weighted_mean((state, 1.0) for state in momentum.counted(episodes)))
            store.save(_MOMENTUM + task_id, memory)
        store.save(task_id, kept)
    losses = _mean_of_finite(np.reshape(result.losses, (-1, node.episodes)))
    seconds = time.perf_counter() - started
    weight, within = result.weight / node.episodes, result.within / node.episodes
    scores = round_log.own_scores(node, algorithm, meta, request.task_ids)
    del algorithm, meta
    request.meta.clear()  # frees memory for the reply of a large model
    reply = to_reply(TrainReply(result.gradient, weight, losses, within), store)
    sent = payload_bytes(reply)
    round_log.tell(node, f"Round {request.round}, training", request.task_ids, scores, seconds, received, sent)
    return reply


def _draw(node: Node, task_id: str, rng: np.random.Generator, clip: float) -> TaskData:
    """Return one draw from a task. With privacy a task that cannot be drawn is empty, so that the others still count."""
    try:
        return node.dataset.train_draw(task_id, rng)
    except Exception as error:
        if not clip:
            raise
        log(ERROR, "Task %s contributes nothing, it could not be drawn: %s", task_id, in_one_line(error))
        spec = node.dataset.spec
        y = torch.zeros(0, dtype=torch.int64) if spec.kind == "classification" else torch.zeros(0, spec.outputs)
        nothing = Batch.of(torch.zeros(0, *spec.input_shape, dtype=torch.int64 if spec.tokens else torch.float32), y)
        return TaskData(nothing, nothing, nothing)


@app.evaluate()
@replies
def evaluate_tasks(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Reply with the scores of tasks after 0..K adaptation steps: of held-out ones, or of training tasks as seen users."""
    started = time.perf_counter()
    request, received = EvaluateRequest.from_records(message.content), payload_bytes(message.content)
    message.content.clear()  # to free memory: it has been read
    algorithm, meta = node.algorithm_for(request.meta)
    node.check_hosted(request.task_ids)
    asked = Asked(node, state, request.lineage)
    if request.seen:
        asked.to_score_seen(request, algorithm.options.inner_lr)
        reply = score_seen(node, algorithm, meta, request, KeptState(state, node.state_dir, request.lineage))
    else:
        asked.to_score(request, algorithm.options.inner_lr)
        reply = score_unseen(node, algorithm, meta, request)
    metric = named(request.metric) if request.metric else node.dataset.spec.metric
    seconds, metrics = time.perf_counter() - started, reply.metrics
    number, at = message.metadata.group_id, _nearest(request.lrs, algorithm.options.inner_lr)
    scores = round_log.in_words(metric, metrics[:, at, 0].mean(), metrics[:, at, -1].mean()) + f" at rate {request.lrs[at]:g}"
    what = f"Round {number}, evaluation{' of training tasks' * request.seen}"
    round_log.tell(node, what, request.task_ids, scores, seconds, received, 0)
    return reply.to_records()


app.query("sums")(replies(baselines.sums))
app.query("scores")(replies(baselines.scores))


@app.query("keep")
@replies
def keep(message: Message, node: Node, state: RecordDict) -> RecordDict:
    """Adapt the final model to this node's own tasks and keep the results here. Only their number is sent."""
    request = KeepRequest.from_records(message.content)
    kept = keep_all(node, request, KeptState(state, node.state_dir, request.lineage))
    diary.note_kept(node.state_dir, kept, request.run)
    return KeepReply(kept).to_records()


def _nearest(lrs: list[float], wanted: float) -> int:
    """Return the position of the rate that is closest to `wanted`."""
    return min(range(len(lrs)), key=lambda i: abs(lrs[i] - wanted))


def _mean_of_finite(losses: np.ndarray[Any, Any]) -> list[float]:
    """Return the mean over the finite episodes of each task, from [tasks, episodes]; NaN for a task without one.

    Losses are clipped to the range that a reply may hold: one task must not cost the others of its
    node their reply.
    """
    finite = np.isfinite(losses)
    total = np.where(finite, np.clip(losses, -LOSS_ROUNDING, LARGEST_LOSS), 0.0).sum(axis=1)
    means = np.where(finite.any(axis=1), total / finite.sum(axis=1).clip(min=1), np.nan)
    return [float(mean) for mean in means]
