"""`own_trainer` makes the ClientApp of a Flower app that trains with code of its own."""

import json
from collections.abc import Callable
from functools import lru_cache
from typing import Any, Literal

import numpy as np
from flwr.app import Context, Message, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn

from quickbloom.client_app.app import versions
from quickbloom.client_app.asked import Asked
from quickbloom.client_app.own_app.node import AppNode
from quickbloom.client_app.own_app.trainer import Trainer
from quickbloom.client_app.owner.hearing import hear
from quickbloom.client_app.replying import coded, replies_of
from quickbloom.client_app.task_state import KeptState
from quickbloom.common.config.own_app import settings_of
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import dot
from quickbloom.common.metric import named
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import (
    EvaluateReply,
    EvaluateRequest,
    TrainReply,
    TrainRequest,
    WireError,
    told_settings,
)
from quickbloom.common.wire.roll_call import ConstantsReply, RollCallReply, check_roll_call

_NODES = 128
"""Most nodes whose loaders a process of a simulation keeps."""


def own_trainer(
    model: Callable[[], nn.Module],
    load_data: Callable[..., Any],
    train: Callable[..., Any],
    test: Callable[..., Any],
    *,
    kind: Literal["classification", "regression"] = "classification",
    inputs: Callable[[Any], Tensor] | None = None,
) -> ClientApp:
    """Return a ClientApp for `quickbloom.server.own_server`, whose nodes train with your functions.

    `model()` makes your network. `load_data(partition_id, num_partitions)` returns (trainloader, testloader) of one user;
    `train(net, trainloader, epochs, lr, device)` trains in place and may return its mean loss; `test(net, testloader, device)`
    returns (loss, accuracy in 0..1), or for `kind = "regression"` (loss, mean squared error). `inputs(batch)` returns the
    tensor that your network reads, where it is not the first one with two axes or more.

    What needs nothing but training works: the algorithms fedavg, reptile, fedprox and ditto. The pull of the last two is
    added to the gradients, so it acts with any loss and any optimizer. Random numbers of torch, numpy and Python follow
    (seed, round, user) while your functions run. Buffers, such as batch norm's statistics, stay on the node.

    Example: `app = own_trainer(Net, load_data, train, test)`
    """
    app, trainer = ClientApp(), Trainer(load_data, train, test, kind, inputs)

    def node_for(message: Message, context: Context) -> AppNode:
        told = {**context.run_config, **told_settings(message.content)}
        return _node(model, trainer, json.dumps(told, sort_keys=True), json.dumps(dict(context.node_config), sort_keys=True))

    replies = replies_of(node_for)
    app.query("roll_call")(replies(_roll_call))
    app.query("refused")(hear)
    app.query("constants")(replies(_constants))
    app.train()(replies(_train))
    app.evaluate()(replies(_evaluate))
    return app


@lru_cache(maxsize=_NODES)  # of this module and not of one app, which Flower's simulation hands from process to process
def _node(model: Callable[[], nn.Module], trainer: Trainer, run_config: str, node_config: str) -> AppNode:
    settings: dict[str, Any] = json.loads(run_config)
    epochs = settings.get("local-epochs", 1)
    if not isinstance(epochs, int) or isinstance(epochs, bool) or epochs < 1:
        raise ConfigError(f"`local-epochs` must be a whole number from 1 on, got {epochs!r}")
    return AppNode(settings_of(settings, model), json.loads(node_config), trainer, epochs)


def _roll_call(message: Message, node: AppNode, state: RecordDict) -> RecordDict:
    check_roll_call(message.content)
    return RollCallReply(node.dataset.spec, node.tasks, versions(), hears=True).to_records()


def _constants(message: Message, node: AppNode, state: RecordDict) -> RecordDict:
    return ConstantsReply(node.constants).to_records()


def _train(message: Message, node: AppNode, state: RecordDict) -> RecordDict:
    request = TrainRequest.from_records(message.content)
    message.content.clear()  # to free memory: it has been read
    algorithm, meta = node.algorithm_for(request.meta)
    Asked(node, state, request.lineage).to_train(node.check_hosted(request.task_ids))
    fresh, store = node.fresh(), KeptState(state, node.state_dir, request.lineage)
    (task_id,) = _one(request.task_ids)
    kept = store.load(task_id, fresh) or fresh
    rng = generator(request.seed, "train", request.round, task_id)
    gradient, loss, after = node.contribute(meta, kept, rng)
    weight = 1.0 if request.clip else algorithm.weight(node.num_examples)
    length = float(dot(gradient, gradient).sqrt())
    if not (np.isfinite(length) and np.isfinite(loss)):  # as in a round: such a task contributes nothing and keeps its state
        gradient, weight, loss, within = {name: value.zero_() for name, value in gradient.items()}, 0.0, float("nan"), 0.0
    else:
        within = float(length <= request.clip) if request.clip else 0.0
        scale = min(1.0, request.clip / length) if request.clip and length else 1.0
        gradient = {name: value * scale for name, value in gradient.items()}
        store.save(task_id, after)
    made = TrainReply(gradient, weight, [loss], within)
    return TrainReply(coded(node.run, store, made, request), weight, [loss], within).to_records()


def _evaluate(message: Message, node: AppNode, state: RecordDict) -> RecordDict:
    request = EvaluateRequest.from_records(message.content)
    message.content.clear()  # to free memory: it has been read
    algorithm, meta = node.algorithm_for(request.meta)
    (task_id,) = _one(node.check_hosted(request.task_ids))
    asked, kept = Asked(node, state, request.lineage), None
    if request.seen:
        asked.to_score_seen(request, algorithm.options.inner_lr)
        kept = KeptState(state, node.state_dir, request.lineage).load(task_id, node.fresh())
    else:
        asked.to_score(request, algorithm.options.inner_lr)
    if request.metric and named(request.metric) != node.dataset.spec.metric:
        raise WireError(
            f"`metric` is {request.metric}, and a Flower app with a trainer of its own is scored by what it returns"
        )
    rng = generator(node.run.seed, "evaluate", task_id)
    losses, metrics = node.scores(meta, kept, request.lrs, request.steps, rng)
    return EvaluateReply(losses, metrics, None).to_records()


def _one(task_ids: list[str]) -> list[str]:
    if len(task_ids) != 1:
        raise WireError(f"this node hosts one task, and {len(task_ids)} were asked for")
    return task_ids
