"""FedPer and FedRep against plain torch: one contribution, and two rounds of a federation."""

from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from flwr.app import Message, RecordDict
from loopback import LoopbackGrid
from plain_torch import LOSSES, Weights, close, leaves, line_learner, moved, random_episode, tanh_learner, together
from torch import Tensor

from quickbloom.client_app.task_state import KeptState
from quickbloom.common.algorithms.heads import Heads
from quickbloom.common.config.run import RunConfig, parse_run_config
from quickbloom.common.datasets import load_dataset
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import TaskWork, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, Minibatches, TaskData
from quickbloom.common.maths.params import Params
from quickbloom.common.models import build_model
from quickbloom.common.randomness import generator
from quickbloom.common.wire.messages import from_arrays, to_arrays
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.federation.outer import OuterOptimizer
from quickbloom.server_app.federation.roll_call import call_roll
from quickbloom.server_app.federation.strategy import MetaStrategy

BODY, HEAD = ["0.weight", "0.bias"], ["2.weight", "2.bias"]
ROWS = [[0, 7, 3], [10, 1, 8], [2, 9, 4], [5, 6, 0], [3, 10, 2]]
"""Minibatches over 6 support and 5 query examples."""


def heads(kind: str, head_steps: int = 0, head: str = "auto") -> Heads:
    settings = {"inner-lr": 0.2, "inner-steps": 5 - head_steps, "head-steps": head_steps, "head": head}
    return Heads(Heads.Options.model_validate(settings), tanh_learner(kind))


def walk() -> Minibatches:
    return Minibatches(torch.tensor(ROWS), torch.ones(5, 3, dtype=torch.float64))


def kept_head() -> Params:
    """Unlike the fresh one."""
    source = torch.Generator().manual_seed(4)
    shapes = {"2.weight": (3, 4), "2.bias": (3,)}
    return {name: torch.randn(shape, generator=source, dtype=torch.float64) for name, shape in shapes.items()}


def plain_local(kind: str, start: Weights, batches: list[Batch], lr: float, head_steps: int) -> Weights:
    """All four tensors in every step, or the last two for `head_steps` steps and then the first two."""
    phi = start
    for step, batch in enumerate(batches):
        part = slice(0, 4) if not head_steps else slice(2, 4) if step < head_steps else slice(0, 2)
        phi = [value.detach().requires_grad_() for value in phi]
        phi[part] = moved(phi[part], torch.autograd.grad(LOSSES[kind](phi, batch), phi[part]), lr)
    return phi


@pytest.mark.parametrize("head_steps", [0, 2])
@pytest.mark.parametrize("kind", LOSSES)
def test_contribution_from_a_kept_head_equals_plain_torch(kind: str, head_steps: int) -> None:
    algorithm, episode = heads(kind, head_steps), random_episode(kind)
    batches = [Batch(*(part[rows] for part in together(episode))) for rows in ROWS]
    start = leaves({**algorithm.init(), **kept_head()})
    phi = plain_local(kind, start, batches, 0.2, head_steps)
    gradient, loss, kept = algorithm.contribute(algorithm.init(), kept_head(), episode, walk())
    assert list(gradient) == BODY
    assert close(gradient, [a - b for a, b in zip(start[:2], phi[:2], strict=True)], atol=1e-10)
    assert list(kept) == HEAD
    assert close(kept, phi[2:], atol=1e-10)
    assert loss.item() == pytest.approx(LOSSES[kind](phi, episode.query).item(), abs=1e-12)


def test_body_and_head_share_out_the_parameters_and_only_the_body_travels() -> None:
    algorithm = heads("classification")
    assert (list(algorithm.init()), list(algorithm.fresh())) == (BODY, HEAD)
    named = heads("classification", head="0.")
    assert (list(named.init()), list(named.fresh())) == (HEAD, BODY)


def test_a_new_task_starts_from_the_same_fresh_head_as_every_other() -> None:
    algorithm, data = heads("classification"), task()
    given, new = (
        run_round(algorithm, algorithm.init(), [TaskWork(data, np.random.default_rng(0), kept)], 8)
        for kept in (algorithm.fresh(), None)
    )
    assert close(new.kept[0], list(given.kept[0].values()), atol=0)
    assert close(new.gradient, list(given.gradient.values()), atol=0)
    algorithm.fresh()["2.bias"].fill_(7.0)
    assert close(algorithm.fresh(), list(tanh_learner("classification").initial().values())[2:], atol=0)


def task(poison: float = 0.0) -> TaskData:
    support, query = random_episode("classification")
    support = Batch(support.x + poison, support.y, support.weight)
    return TaskData(support, Batch(query.x + poison, query.y, query.weight), query)


def test_a_task_of_broken_numbers_keeps_the_head_it_had() -> None:
    algorithm, broken = heads("classification"), task(float("nan"))
    work = [TaskWork(data, np.random.default_rng(0), kept) for data in (task(), broken) for kept in (kept_head(), None)]
    result = run_round(algorithm, algorithm.init(), work, chunk_size=8)
    assert [np.isnan(loss) for loss in result.losses] == [False, False, True, True]
    assert close(result.kept[2], list(kept_head().values()), atol=0)
    assert close(result.kept[3], list(algorithm.fresh().values()), atol=0)
    assert not close(result.kept[0], list(kept_head().values()), atol=1e-3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_cuda_a_head_kept_on_the_cpu_goes_together_with_a_fresh_one() -> None:
    options = Heads.Options.model_validate({"inner-lr": 0.2, "inner-steps": 5})
    algorithm, data = Heads(options, tanh_learner("classification")), task()
    work = [[TaskWork(data, np.random.default_rng(0), kept) for kept in (kept_head(), None)] for _ in range(2)]
    expected = run_round(algorithm, algorithm.init(), work[0], chunk_size=8)
    algorithm.learner.module.cuda()
    found = run_round(algorithm, algorithm.init(), work[1], chunk_size=8)
    for one, other in zip(found.kept, expected.kept, strict=True):
        assert close({name: value.cpu() for name, value in one.items()}, list(other.values()), atol=1e-10)


@pytest.mark.parametrize("head_steps", [0, 2])
def test_evaluation_starts_from_a_fresh_head_and_fedrep_moves_the_head_alone(head_steps: int) -> None:
    algorithm, support = heads("regression", head_steps), random_episode("regression").support
    path = list(algorithm.adaptation_path(algorithm.init(), support, 0.2, 3))
    assert close(path[0], list(tanh_learner("regression").initial().values()), atol=0)
    expected = plain_local("regression", leaves(path[0]), [support] * 3, 0.2, 3 if head_steps else 0)
    assert close(path[-1], expected, atol=1e-10)


@pytest.mark.parametrize("head", ["9.", "0.,2."])
def test_a_head_of_no_or_of_all_parameters_is_refused(head: str) -> None:
    with pytest.raises(ConfigError, match=r"`heads\.head` must name some but not all parameters"):
        heads("classification", head=head)


def test_a_model_of_one_layer_has_no_body() -> None:
    with pytest.raises(ConfigError, match=r"`heads\.head`"):
        Heads(Heads.Options.model_validate({"inner-lr": 0.1}), line_learner())


# ---- in a federation


def federation(head_steps: int = 0, /, **more: object) -> RunConfig:
    """Digits on a network of 8 hidden units: the tensors 1.weight, 1.bias (body), 3.weight, 3.bias (head)."""
    flat = {"algorithm": "heads", "rounds": 2, "mlp.hidden": "8", "seed": 3, "heads.inner-lr": 0.1, "heads.batch-size": 4}
    return parse_run_config({**flat, "heads.inner-steps": 6, "heads.head-steps": head_steps, **more}).resolved()


def plain_round(config: RunConfig, number: int, body: Weights, heads: dict[str, Weights], task_ids: list[str]) -> Weights:
    """FedPer's or FedRep's next body in plain torch; `heads` are replaced in place."""
    dataset, options = load_dataset("digits", config.table("digits"), Path()), config.table("heads")
    algorithm, bodies = build_algorithm(config, dataset.spec), []
    for task_id in task_ids:
        rng = generator(3, "train", number, task_id, 0)
        data = dataset.train_draw(task_id, rng)
        x, y = torch.cat([data.support.x, data.query.x]), torch.cat([data.support.y, data.query.y])
        rows = algorithm.minibatch_indices(len(x), rng)
        assert rows is not None
        weights = [value.clone().requires_grad_() for value in (*body, *heads[task_id])]
        for step, batch in enumerate(rows):
            steps = options.head_steps  # type: ignore[attr-defined]
            part = slice(0, 4) if not steps else slice(2, 4) if step < steps else slice(0, 2)
            loss = F.cross_entropy(mlp(weights, x[batch]), y[batch])
            weights[part] = moved(weights[part], torch.autograd.grad(loss, weights[part]), 0.1)
            weights = [value.detach().requires_grad_() for value in weights]
        bodies.append(weights[:2])
        heads[task_id] = [value.detach() for value in weights[2:]]
    return [torch.stack(parts).mean(0).detach() for parts in zip(*bodies, strict=True)]


def mlp(weights: Weights, x: Tensor) -> Tensor:
    w1, b1, w2, b2 = weights
    return torch.relu(x.flatten(1) @ w1.T + b1) @ w2.T + b2


@pytest.mark.parametrize("head_steps", [0, 2])
def test_two_rounds_equal_plain_torch_whose_second_round_starts_from_the_heads_of_the_first(head_steps: int) -> None:
    config = federation(head_steps)
    grid = LoopbackGrid(3, config.flat())
    population = call_roll(grid, config)
    algorithm = build_algorithm(config, population.spec)
    strategy = MetaStrategy(config, population, algorithm, OuterOptimizer(algorithm.options, algorithm.init(), 2))
    module = build_model("mlp", config.table("mlp"), (1, 8, 8), 5, seed=3)
    initial = [value.detach() for value in module.parameters()]
    body, fresh = initial[:2], initial[2:]
    kept = {task_id: list(fresh) for task_id in population.splits["train"]}
    for number in (1, 2):
        messages = strategy.configure_train(number, to_arrays(strategy.outer.meta), None, grid)  # type: ignore[arg-type]
        strategy.aggregate_train(number, grid.send_and_receive(messages))
        body = plain_round(config, number, body, kept, population.splits["train"])
    assert close(strategy.outer.meta, body, atol=1e-6)
    for task_id, head in kept.items():
        state = grid._contexts[population.homes[task_id]].state
        found = KeptState(state, "", "").load(task_id, algorithm.fresh())
        assert found is not None
        assert close(found, head, atol=1e-6)
    assert not torch.allclose(kept[population.splits["train"][0]][0], kept[population.splits["train"][1]][0], atol=1e-3)


def test_no_message_up_or_down_carries_a_head(tmp_path: Path) -> None:
    config = federation(**{"output-dir": str(tmp_path), "min-nodes": 2, "evaluate-every": 1, "adapt-steps": 2})
    carried: list[list[str]] = []

    def overhear(content: RecordDict) -> None:
        carried.extend(list(from_arrays(arrays)) for arrays in content.array_records.values())

    def overheard(message: Message, answer: object) -> Message:
        overhear(message.content)  # at once: whoever has read a message lets go of what it holds
        reply: Message = answer(message)  # type: ignore[operator]
        overhear(reply.content)
        return reply

    run_federation(LoopbackGrid(2, config.flat(), faults={0: overheard, 1: overheard}), config)
    # Of the baselines sums go up, and the linear model from them down, for unseen and seen users; neither knows of the head.
    linear = [["gram", "cross", "squares"]] * 2 + [["weights", "intercept", "shares"]] * 4
    assert [names for names in carried if names in linear] == linear
    # 2 rounds of training with arrays both ways and of validation with arrays down, test, seen users, and baselines for both:
    # on 2 nodes each.
    models = [names for names in carried if names not in linear]
    assert models == [["1.weight", "1.bias"]] * (2 * (2 * 2 + 2 + 1 + 1 + 2))
