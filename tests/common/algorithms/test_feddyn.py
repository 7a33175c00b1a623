"""FedDyn against plain torch: rounds with a linear term on the tasks and the server's own state."""

import pytest
import torch
from plain_torch import LOSSES, Weights, close, leaves, moved, tanh_learner
from rounds import ROUNDS, batches, tasks, trained

from quickbloom.common.algorithms.feddyn import FedDyn
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError

ALPHA = 0.3


def feddyn(kind: str) -> FedDyn:
    options = {"inner-lr": 0.2, "inner-steps": 4, "batch-size": 3, "strength": ALPHA}
    return FedDyn(FedDyn.Options.model_validate(options), tanh_learner(kind))


@pytest.mark.parametrize("kind", LOSSES)
def test_rounds_with_state_on_both_sides_equal_plain_torch(kind: str) -> None:
    algorithm, data = feddyn(kind), tasks(kind)
    theta = [value.detach() for value in leaves(algorithm.init())]
    h = [torch.zeros_like(value) for value in theta]
    own: dict[int, Weights] = dict.fromkeys(range(3), h)
    for number, chosen in enumerate(ROUNDS, 1):
        ends = []
        for t in chosen:
            phi = theta
            for batch in batches(algorithm, data, number, t):
                phi = [value.detach().requires_grad_() for value in phi]
                loss = LOSSES[kind](phi, batch)
                for p, a, slope in zip(phi, theta, own[t], strict=True):
                    loss = loss - (slope * p).sum() + ALPHA / 2 * ((p - a) ** 2).sum()
                phi = moved(phi, torch.autograd.grad(loss, phi), 0.2)
            phi = [value.detach() for value in phi]
            own[t] = [slope - ALPHA * (p - a) for slope, p, a in zip(own[t], phi, theta, strict=True)]
            ends.append(phi)
        h = [
            state - ALPHA / 3 * sum((p - a) for p in parts)
            for state, a, parts in zip(h, theta, zip(*ends, strict=True), strict=True)
        ]
        theta = [torch.stack(parts).mean(0) - state / ALPHA for parts, state in zip(zip(*ends, strict=True), h, strict=True)]
    meta, kept = trained(algorithm, data)
    assert close(meta, theta, atol=1e-10)
    for t, slopes in own.items():
        assert close(kept[t], slopes, atol=1e-10)


@pytest.mark.parametrize("name", ["feddyn", "scaffold", "fedproto", "fedpac"])
def test_what_changes_the_mean_is_refused_in_one_sentence(name: str) -> None:
    with pytest.raises(ConfigError, match=rf'`aggregate` must be \'mean\' with `algorithm = "{name}"`, because '):
        parse_run_config({"algorithm": name, "aggregate": "median"})
    with pytest.raises(ConfigError, match=rf'`privacy.noise-multiplier` must be 0.0 with `algorithm = "{name}"`, because '):
        parse_run_config({"algorithm": name, "privacy.noise-multiplier": 1.0, "privacy.clip": 1.0})
