"""SCAFFOLD against plain torch: rounds with control variates on both sides."""

import pytest
import torch
from plain_torch import LOSSES, Weights, close, leaves, moved, random_episode, sgd, tanh_learner
from rounds import ROUNDS, batches, tasks, trained

from quickbloom.common.algorithms.scaffold import CONTROL, Scaffold


def scaffold(kind: str, **more: object) -> Scaffold:
    options = {"inner-lr": 0.2, "inner-steps": 4, "batch-size": 3, **more}
    return Scaffold(Scaffold.Options.model_validate(options), tanh_learner(kind))


@pytest.mark.parametrize("outer_lr", [1.0, 0.5])
@pytest.mark.parametrize("kind", LOSSES)
def test_rounds_with_state_equal_plain_torch(kind: str, outer_lr: float) -> None:
    algorithm, data = scaffold(kind, **{"outer-lr": outer_lr}), tasks(kind)
    x = leaves(tanh_learner(kind).initial())
    c = [torch.zeros_like(value) for value in x]
    own: dict[int, Weights] = dict.fromkeys(range(3), c)
    for number, chosen in enumerate(ROUNDS, 1):
        ways, changes = [], []
        for t in chosen:
            y = x
            for batch in batches(algorithm, data, number, t):
                y = [value.detach().requires_grad_() for value in y]
                slopes = torch.autograd.grad(LOSSES[kind](y, batch), y)
                y = moved(y, [s - i + g for s, i, g in zip(slopes, own[t], c, strict=True)], 0.2)
            plus = [i - g + (a - b).detach() / (4 * 0.2) for i, g, a, b in zip(own[t], c, x, y, strict=True)]
            ways.append([(b - a).detach() for a, b in zip(x, y, strict=True)])
            changes.append([new - old for new, old in zip(plus, own[t], strict=True)])
            own[t] = plus
        x = [a + outer_lr * torch.stack(parts).mean(0) for a, parts in zip(x, zip(*ways, strict=True), strict=True)]
        c = [a + torch.stack(parts).sum(0) / 3 for a, parts in zip(c, zip(*changes, strict=True), strict=True)]
    meta, kept = trained(algorithm, data)
    assert close({name: value for name, value in meta.items() if not name.startswith(CONTROL)}, x, atol=1e-10)
    assert close({name: value for name, value in meta.items() if name.startswith(CONTROL)}, c, atol=1e-10)
    for t, control in own.items():
        assert close(kept[t], control, atol=1e-10)
    # What the analysis rests on: c is the mean of all c_i.
    assert close(
        {str(i): value for i, value in enumerate(c)},
        [torch.stack([own[t][i] for t in own]).mean(0) for i in range(4)],
        atol=1e-12,
    )


def test_fine_tuning_is_plain_descent_without_control() -> None:
    algorithm, support = scaffold("regression"), random_episode("regression").support
    meta = {name: value + name.startswith(CONTROL) for name, value in algorithm.init().items()}
    *_, end = algorithm.adaptation_path(meta, support, 0.1, 3)
    assert close(end, sgd(LOSSES["regression"], leaves(tanh_learner("regression").initial()), [support] * 3, 0.1), atol=1e-12)
