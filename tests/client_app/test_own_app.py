"""A Flower app that trains with code of its own, against the same training written by hand."""

import random
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from flwr.app import Message
from flwr.clientapp import ClientApp
from loopback import LoopbackGrid
from torch import Tensor, nn
from torch.utils.data import DataLoader, SubsetRandomSampler, TensorDataset

from quickbloom.client_app.own_app.app import own_trainer
from quickbloom.client_app.own_app.trainer import Pull, Trainer, seeded
from quickbloom.common.config.own_app import APP, remarks_on, settings_of
from quickbloom.common.datasets import DATASETS
from quickbloom.common.errors import ConfigError
from quickbloom.common.models import MODELS, build_model
from quickbloom.common.options import Options
from quickbloom.common.randomness import generator
from quickbloom.common.wire.compression import FLOAT32, decode
from quickbloom.common.wire.messages import TRAIN, TrainReply, TrainRequest, error_reason
from quickbloom.server_app.app import run_federation
from quickbloom.server_app.runs.directory import read_history

RATE, EPOCHS, STRENGTH, USERS = 0.1, 2, 0.4, 5
FLAT: dict[str, Any] = {"learning-rate": RATE, "local-epochs": EPOCHS, "seed": 3, "batch-size": 99, "algorithm": "fedavg"}


@pytest.fixture(autouse=True)
def _forgotten() -> Iterator[None]:
    """What an app registers is forgotten after its test."""
    yield
    DATASETS.pop(APP, None)
    MODELS.pop(APP, None)


class Net(nn.Module):
    """With a change in place, dropout and batch norm: what this project's own engine takes only in part."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.last = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.last(self.drop(torch.relu_(self.norm(self.first(x)))))
        return out


def data(partition_id: int) -> TensorDataset:
    source = torch.Generator().manual_seed(partition_id)
    x = torch.randn(16 + 4 * partition_id, 4, generator=source)
    return TensorDataset(x, x[:, :3].argmax(1))


def load_data(partition_id: int, num_partitions: int) -> tuple[Any, Any]:
    assert num_partitions == USERS
    return DataLoader(data(partition_id), batch_size=4, shuffle=True), DataLoader(data(partition_id), batch_size=50)


def train(net: nn.Module, trainloader: Any, epochs: int, lr: float, device: torch.device) -> float:
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.9)
    for _ in range(epochs):
        for x, y in trainloader:
            optimizer.zero_grad()
            loss = nn.functional.cross_entropy(net(x), y)
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return loss.item()


def score(net: nn.Module, testloader: Any, device: torch.device) -> tuple[float, float]:
    x, y = (torch.cat(parts) for parts in zip(*testloader, strict=True))
    out = net(x)
    return nn.functional.cross_entropy(out, y).item(), (out.argmax(1) == y).double().mean().item()


def the_app(**other: Any) -> ClientApp:
    parts: dict[str, Any] = {"model": Net, "load_data": load_data, "train": train, "test": score, **other}
    return own_trainer(parts.pop("model"), parts.pop("load_data"), parts.pop("train"), parts.pop("test"), **parts)


def grid_of(app: ClientApp, flat: dict[str, Any] = FLAT) -> LoopbackGrid:
    grid = LoopbackGrid(USERS, flat)
    grid._app = app
    return grid


def fresh(seed: int = 3) -> nn.Module:
    settings_of(FLAT, Net)  # which registers the network
    return build_model(APP, Options(), (4,), 0, seed)


def numbers(net: nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in net.named_parameters()}


def asked(number: int = 1, user: int = 2) -> TrainRequest:
    return TrainRequest(numbers(fresh()), number, 3, [f"user {user}"], "lineage")


def trained(grid: LoopbackGrid, request: TrainRequest) -> TrainReply:
    user = int(request.task_ids[0].split()[1])
    (reply,) = grid.send_and_receive([Message(request.to_records(), 100 + user, TRAIN)])
    assert error_reason(reply.content) is None
    made = TrainReply.from_records(reply.content, 1)
    # A tensor that is nothing but zeros travels as none: a bias in front of batch norm, on some machines.
    return replace(made, gradient=decode(made.gradient, FLOAT32, request.meta))


def by_hand(net: nn.Module, number: int, user: int = 2, pull: Callable[[nn.Module], Tensor] | None = None) -> nn.Module:
    """The app's training, with a pull added to the loss where there is one, as its authors would write it."""
    rng = generator(3, "train", number, f"user {user}")
    torch.manual_seed(int(rng.integers(2**32)))
    net.train()
    optimizer = torch.optim.SGD(net.parameters(), lr=RATE, momentum=0.9)
    loader, _ = load_data(user, USERS)
    for _ in range(EPOCHS):
        for x, y in loader:
            optimizer.zero_grad()
            (nn.functional.cross_entropy(net(x), y) + (pull(net) if pull else 0.0)).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
    return net


def pulled_to(anchor: dict[str, Tensor]) -> Callable[[nn.Module], Tensor]:
    def pull(net: nn.Module) -> Tensor:
        squares = [((value - anchor[name]) ** 2).sum() for name, value in net.named_parameters()]
        return STRENGTH / 2 * torch.stack(squares).sum()

    return pull


def test_fedavg_sends_what_the_apps_own_training_moved() -> None:
    made = trained(grid_of(the_app()), asked())
    start, end = numbers(fresh()), numbers(by_hand(fresh(), 1))
    for name, value in made.gradient.items():
        torch.testing.assert_close(value, start[name] - end[name], rtol=0, atol=1e-7)
    assert made.weight == 16 + 4 * 2


def test_fedprox_is_the_pull_in_the_loss() -> None:
    flat = {**FLAT, "algorithm": "fedprox", "fedprox.strength": STRENGTH}
    made = trained(grid_of(the_app(), flat), asked())
    start = numbers(fresh())
    end = numbers(by_hand(fresh(), 1, pull=pulled_to(start)))
    assert not all(torch.allclose(end[name], value) for name, value in numbers(by_hand(fresh(), 1)).items())
    for name, value in made.gradient.items():
        torch.testing.assert_close(value, start[name] - end[name], rtol=0, atol=1e-6)


def test_statistics_of_batch_norm_stay_on_the_node_from_round_to_round() -> None:
    grid, net = grid_of(the_app()), fresh()
    start = numbers(net)
    for number in (1, 2):
        made = trained(grid, asked(number))
        net.load_state_dict(start, strict=False)  # the server's model of every round; the statistics go on
        end = numbers(by_hand(net, number))
        for name, value in made.gradient.items():
            torch.testing.assert_close(value, start[name] - end[name], rtol=0, atol=1e-7)


def test_nothing_global_changes_and_the_same_request_gives_the_same_reply() -> None:
    states = torch.random.get_rng_state(), np.random.get_state(), random.getstate()
    one, other = (trained(grid_of(the_app()), asked()) for _ in range(2))
    assert all(torch.equal(value, other.gradient[name]) for name, value in one.gradient.items())
    another = trained(grid_of(the_app()), asked(number=2))
    assert not all(torch.equal(value, another.gradient[name]) for name, value in one.gradient.items())
    assert torch.equal(states[0], torch.random.get_rng_state())
    assert all(np.array_equal(a, b) for a, b in zip(states[1], np.random.get_state(), strict=True))
    assert states[2] == random.getstate()
    with seeded(generator(1)):
        torch.randn(3)
    assert torch.equal(states[0], torch.random.get_rng_state())


@pytest.mark.parametrize("algorithm", ["fedavg", "reptile", "fedprox", "ditto"])
def test_a_run_trains_and_personalises_with_the_apps_functions(algorithm: str, tmp_path: Path) -> None:
    flat = {**FLAT, "algorithm": algorithm, "num-server-rounds": 6, "evaluate-every": 1, "test-tasks": 1, "validation-tasks": 1}
    config = settings_of(flat, Net).model_copy(update={"output_dir": str(tmp_path)})
    assert config.rounds == 6
    silent = the_app(train=lambda *given: train(*given) and None)  # so that its loss is that of `test` on its own examples
    summary = run_federation(grid_of(silent, flat), config)
    assert summary["failures"] == 0
    assert summary["tasks"] == {"train": 3, "validation": 1, "test": 1}
    assert len(summary["test"]["accuracy"]["mean"]) == 4
    assert summary["test"]["loss"]["mean"][-1] < summary["test"]["loss"]["mean"][0]
    assert summary["seen"]["tasks"] == 3
    losses = [line["train"]["loss"] for line in read_history(tmp_path)]
    assert losses[-1] < losses[0]


def test_clipping_bounds_the_contribution_and_all_weigh_the_same() -> None:
    request = asked()
    free = trained(grid_of(the_app()), request)
    clipped = trained(grid_of(the_app()), TrainRequest(request.meta, 1, 3, request.task_ids, "lineage", clip=0.01))
    length = sum(float(value.double().square().sum()) for value in clipped.gradient.values()) ** 0.5
    assert length == pytest.approx(0.01, rel=1e-5)
    ratio = {name: (value / free.gradient[name]).nanmedian().item() for name, value in clipped.gradient.items()}
    assert max(ratio.values()) == pytest.approx(min(ratio.values()), rel=1e-3)
    assert (clipped.weight, clipped.within) == (1.0, 0.0)


def told(app: ClientApp, flat: dict[str, Any] = FLAT) -> str:
    (reply,) = grid_of(app, flat).send_and_receive([Message(asked().to_records(), 102, TRAIN)])
    return error_reason(reply.content) or ""


def broken(*_: Any) -> Any:
    raise ValueError("no such file")


def empty(*_: Any) -> Any:
    return [], []


def no_share(*_: Any) -> tuple[float, float]:
    return 0.1, 93.0


@pytest.mark.parametrize(
    ("other", "said"),
    [
        ({"train": broken}, r"`train` of your Flower app raised .*mend it there"),
        ({"load_data": broken}, r"`load_data` of your Flower app raised"),
        ({"load_data": empty}, "at least one batch"),
        ({"load_data": lambda *_: 5}, r"must return \(trainloader, testloader\), got a int"),
        ({"train": lambda *_: None, "test": no_share}, "share from 0 to 1, got 93"),
        ({"train": lambda *_: None, "test": lambda *_: (0.1, ["no such file"])}, r"two numbers, got \(not told\)"),
        ({"train": lambda *_: -2.5}, "the loss that your `train` returns must be 0 or more, got -2.5"),
        ({"train": lambda *_: None, "test": lambda *_: (-2.5, 0.5)}, "the loss that your `test` returns must be 0 or more"),
        ({"inputs": lambda batch: batch[1]}, r"give `inputs=lambda batch"),
        ({"inputs": lambda batch: batch[0][:, :2]}, "your network must turn inputs of shape"),
    ],
)
def test_a_mistake_in_the_apps_code_costs_one_reply_with_one_sentence(other: dict[str, Any], said: str) -> None:
    import re

    sentence = told(the_app(**other))
    assert re.search(said, sentence), sentence
    assert "no such file" not in sentence  # it may quote the user's data
    assert "\n" not in sentence


@pytest.mark.parametrize("epochs", [0, "two", True, 1.5])
def test_epochs_are_whole_numbers(epochs: Any) -> None:
    assert "`local-epochs` must be a whole number" in told(the_app(), {**FLAT, "local-epochs": epochs})


def test_a_task_that_diverges_contributes_nothing_and_keeps_its_state() -> None:
    def diverges(net: nn.Module, *_: Any) -> float:
        with torch.no_grad():
            next(iter(net.parameters())).fill_(float("nan"))
        return 1.0

    made = trained(grid_of(the_app(train=diverges)), asked())
    assert made.weight == 0
    assert np.isnan(made.losses).all()
    assert all(not value.any() for value in made.gradient.values())


@pytest.mark.parametrize(
    ("flat", "said"),
    [
        ({"algorithm": "maml"}, "needs gradients of the model"),
        ({"algorithm": "fedavgg"}, "is none that is known"),
        ({"secure-aggregation": True}, "`secure-aggregation` must be False"),
        ({"baselines": True}, "`baselines` must be False"),
        ({"personal": True}, "`personal` must be False"),
        ({"rounds": 0}, "rounds"),
    ],
)
def test_settings_that_cannot_work_are_refused_in_one_sentence(flat: dict[str, Any], said: str) -> None:
    with pytest.raises(ConfigError, match=said):
        settings_of({**FLAT, **flat}, Net)


def test_settings_of_the_app_are_its_own_and_slips_are_named() -> None:
    config = settings_of({**FLAT, "my-cuts": "flip", "reptile.inner-lr": 0.7, "algorithm": "reptile"}, Net)
    options: Any = config.table("reptile")
    assert options.inner_lr == 0.7  # given by its own name, before `learning-rate`
    assert config.adapt_lrs == "0.7"
    assert remarks_on({"my-cuts": "flip", "seed": 1}) == []
    (remark,) = remarks_on({"evaluate-evry": 5})
    assert "did you mean `evaluate-every`" in remark
    (remark,) = remarks_on({"reptile.inner-steps": 5, "reptile.inner-lr": 0.1, "local-epochs": 2, "batch-size": 8})
    assert "`reptile.inner-steps` does nothing here" in remark


def test_examples_that_a_sampler_leaves_out_do_not_weigh() -> None:
    def part(partition_id: int, num_partitions: int) -> tuple[Any, Any]:
        sampler = SubsetRandomSampler(range(8))
        return DataLoader(data(partition_id), batch_size=4, sampler=sampler), DataLoader(data(partition_id), batch_size=50)

    assert trained(grid_of(the_app(load_data=part)), asked()).weight == 8


def test_a_loss_beyond_what_a_reply_can_hold_is_the_largest() -> None:
    def large(*given: Any) -> float:
        train(*given)
        return 1e39

    (loss,) = trained(grid_of(the_app(train=large)), asked()).losses
    assert loss == pytest.approx(np.finfo(np.float32).max)


def test_a_pull_that_is_none_changes_nothing() -> None:
    trainer, net = Trainer(load_data, train, score), fresh()
    loader, _ = load_data(0, USERS)
    ends = []
    for pull in (None, Pull(numbers(net), 0.0)):
        net.load_state_dict(fresh().state_dict())
        with seeded(generator(1)):
            trainer.trained(net.train(), loader, 1, RATE, torch.device("cpu"), pull)
        ends.append(numbers(net))
    assert all(torch.equal(value, ends[1][name]) for name, value in ends[0].items())
