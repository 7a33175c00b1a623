"""FedAvg with Flower's own strategy and grid: one client per node, a small model, fifteen SGD steps per round.

The workload of the data set `gaussian` with its own settings below, so that both sides compute the same.
"""

import json
import time
from itertools import pairwise
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg
from torch import nn

FEATURES, HIDDEN, CLASSES = 32, 64, 10
ROWS, BATCH, STEPS = 64, 32, 15

client = ClientApp()
server = ServerApp()


def model() -> nn.Sequential:
    sizes = (FEATURES, HIDDEN, HIDDEN)
    hidden = [layer for pair in pairwise(sizes) for layer in (nn.Linear(*pair), nn.ReLU())]
    return nn.Sequential(*hidden, nn.Linear(HIDDEN, CLASSES))


@client.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    net = model()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    random = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x, y = torch.randn(ROWS, FEATURES, generator=random), torch.randint(CLASSES, (ROWS,), generator=random)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    rows = torch.cat([torch.randperm(ROWS, generator=random).reshape(-1, BATCH) for _ in range(STEPS)])[:STEPS]
    for batch in rows:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x[batch]), y[batch])
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    metrics = MetricRecord({"loss": float(loss), "num-examples": ROWS})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """Flower's FedAvg that notes when each round's replies are averaged."""

    def __init__(self, nodes: int, available: int) -> None:
        # Flower asks the larger of a fraction and a minimum number of nodes, but nobody if the fraction is 0.
        super().__init__(fraction_train=1e-9, fraction_evaluate=0.0, min_train_nodes=nodes, min_available_nodes=available)
        self.times: list[float] = []

    def configure_train(self, *arguments, **named):  # type: ignore[no-untyped-def]
        self.times.append(time.monotonic())
        return super().configure_train(*arguments, **named)


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Timed(int(context.run_config["nodes-per-round"]), int(context.run_config["nodes"]))
    strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=int(context.run_config["rounds"]))
    times = [*strategy.times, time.monotonic()]
    seconds = [after - before for before, after in pairwise(times)]
    Path(str(context.run_config["seconds-file"])).write_text(json.dumps(seconds), encoding="utf-8")
