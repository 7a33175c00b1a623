"""FedAvg with Flower's own strategy and grid: a small model, fifteen SGD steps per node and round."""

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

FEATURES, HIDDEN, CLASSES, ROWS, STEPS = 64, 64, 10, 32, 15

client = ClientApp()
server = ServerApp()


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, CLASSES))


@client.train()
def train(message: Message, context: Context) -> Message:
    torch.set_num_threads(1)
    net = model()
    net.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    random = torch.Generator().manual_seed(int(context.node_config["partition-id"]))
    x, y = torch.randn(ROWS, FEATURES, generator=random), torch.randint(CLASSES, (ROWS,), generator=random)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.05)
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(net(x), y)
        loss.backward()  # type: ignore[no-untyped-call]
        optimizer.step()
    metrics = MetricRecord({"loss": float(loss), "num-examples": ROWS})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


class Timed(FedAvg):
    """Flower's FedAvg that notes when each round's replies are averaged."""

    def __init__(self) -> None:
        super().__init__(fraction_evaluate=0.0, min_train_nodes=2, min_available_nodes=2)
        self.times: list[float] = []

    def configure_train(self, *arguments, **named):  # type: ignore[no-untyped-def]
        self.times.append(time.monotonic())
        return super().configure_train(*arguments, **named)


@server.main()
def main(grid: Grid, context: Context) -> None:
    strategy = Timed()
    strategy.start(grid, ArrayRecord(model().state_dict()), num_rounds=int(context.run_config["rounds"]))
    times = [*strategy.times, time.monotonic()]
    seconds = [after - before for before, after in pairwise(times)]
    Path(str(context.run_config["seconds-file"])).write_text(json.dumps(seconds))
