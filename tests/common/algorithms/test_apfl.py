"""APFL against plain torch, whose autograd finds the gradients of v and alpha through the mixture."""

import pytest
import torch
from plain_torch import LOSSES, Weights, close, leaves, moved, random_episode, tanh_learner
from rounds import ROUNDS, batches, tasks, trained
from torch import Tensor

from quickbloom.common.algorithms.apfl import MIXING, Apfl
from quickbloom.common.maths.batch import Batch


def apfl(kind: str, **more: object) -> Apfl:
    options = {"inner-lr": 0.2, "inner-steps": 4, "batch-size": 3, "mixing": 0.4, **more}
    return Apfl(Apfl.Options.model_validate(options), tanh_learner(kind))


def plain_step(kind: str, w: Weights, v: Weights, share: Tensor, batch: Batch, lr: float) -> tuple[Weights, Weights, Tensor]:
    w, v = ([value.detach().requires_grad_() for value in some] for some in (w, v))
    share = share.detach().requires_grad_()
    loss = LOSSES[kind]([share * b + (1 - share) * a.detach() for a, b in zip(w, v, strict=True)], batch)
    *of_v, of_share = torch.autograd.grad(loss, [*v, share])
    of_w = torch.autograd.grad(LOSSES[kind](w, batch), w)
    return moved(w, of_w, lr), moved(v, of_v, lr), (share - lr * of_share).detach().clamp(0, 1)


@pytest.mark.parametrize("kind", LOSSES)
def test_rounds_with_state_equal_plain_torch(kind: str) -> None:
    algorithm, data = apfl(kind), tasks(kind)
    theta = leaves(algorithm.init())
    personal: dict[int, tuple[Weights, Tensor]] = {t: (theta, torch.tensor(0.4, dtype=torch.float64)) for t in range(3)}
    for number, chosen in enumerate(ROUNDS, 1):
        ends = []
        for t in chosen:
            w, (v, share) = theta, personal[t]
            for batch in batches(algorithm, data, number, t):
                w, v, share = plain_step(kind, w, v, share, batch, 0.2)
            ends.append(w)
            personal[t] = v, share
        theta = [torch.stack(parts).mean(dim=0).detach() for parts in zip(*ends, strict=True)]
    meta, kept = trained(algorithm, data)
    assert close(meta, theta, atol=1e-10)
    for t, (v, share) in personal.items():
        assert close(kept[t], [*v, share], atol=1e-10)
    assert len({round(float(kept[t][MIXING]), 6) for t in kept} | {0.4}) == 4  # every task learned its own


@pytest.mark.parametrize("kind", LOSSES)
def test_a_known_task_goes_on_from_its_mixture_and_a_new_one_from_the_servers_model(kind: str) -> None:
    algorithm, support = apfl(kind), random_episode(kind).support
    w = leaves(algorithm.init())
    v, share = [value + 0.3 for value in w], torch.tensor(0.7, dtype=torch.float64)
    meta = algorithm.init()
    kept = {name: value + 0.3 for name, value in meta.items()} | {MIXING: share}
    path = list(algorithm.personal_path(meta, kept, support, 0.1, 2))
    for found in path:
        assert close(found, [share * b + (1 - share) * a for a, b in zip(w, v, strict=True)], atol=1e-12)
        w, v, share = plain_step(kind, w, v, share, support, 0.1)
    assert close(next(algorithm.adaptation_path(meta, support, 0.1, 0)), list(meta.values()), atol=1e-12)


def test_the_share_stays_between_0_and_1_and_fixed_if_it_does_not_adapt() -> None:
    data = tasks("classification")
    _, kept = trained(apfl("classification", **{"inner-lr": 30.0, "inner-steps": 2}), data)
    assert all(0 <= float(state[MIXING]) <= 1 for state in kept.values())
    _, kept = trained(apfl("classification", adaptive=False), data)
    assert all(float(state[MIXING]) == 0.4 for state in kept.values())
