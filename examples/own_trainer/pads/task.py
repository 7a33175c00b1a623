"""The app's own network, data and training: nothing here knows of quickbloom."""

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

Loader = DataLoader[tuple[Tensor, ...]]


class Net(nn.Module):
    """A small convolutional network with batch norm and dropout."""

    def __init__(self) -> None:
        super().__init__()
        self.convolution = nn.Conv2d(1, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.dropout = nn.Dropout(0.2)
        self.head = nn.Linear(16 * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.relu_(self.norm(self.convolution(x)))
        out: Tensor = self.head(self.dropout(nn.functional.max_pool2d(x, 2).flatten(1)))
        return out


def load_data(partition_id: int, num_partitions: int) -> tuple[Loader, Loader]:
    """Return (trainloader, testloader) of one user, whose pad is turned by 0 to 3 quarter turns."""
    digits = load_digits()
    rng = np.random.default_rng(7)
    mine = np.array_split(rng.permutation(len(digits.target)), num_partitions)[partition_id]
    images = np.rot90(digits.images[mine] / 16, partition_id % 4, axes=(1, 2)).copy()
    x, y = torch.tensor(images, dtype=torch.float32).unsqueeze(1), torch.tensor(digits.target[mine])
    cut = len(y) * 3 // 4
    train, test = (TensorDataset(x[part], y[part]) for part in (slice(cut), slice(cut, None)))
    return DataLoader(train, batch_size=8, shuffle=True), DataLoader(test, batch_size=64)


def train(net: nn.Module, trainloader: Loader, epochs: int, lr: float, device: torch.device) -> float:
    """Train in place with momentum and noise on the images; return the mean loss."""
    optimizer = torch.optim.SGD(net.parameters(), lr=lr, momentum=0.5)
    total, count = 0.0, 0
    for _ in range(epochs):
        for x, y in trainloader:
            optimizer.zero_grad()
            noisy = x.to(device) + 0.05 * torch.randn_like(x)
            loss = nn.functional.cross_entropy(net(noisy), y.to(device))
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            total, count = total + loss.item(), count + 1
    return total / count


def test(net: nn.Module, testloader: Loader, device: torch.device) -> tuple[float, float]:
    """Return (loss, accuracy)."""
    loss, right, count = 0.0, 0, 0
    for x, y in testloader:
        out = net(x.to(device))
        loss += nn.functional.cross_entropy(out, y.to(device), reduction="sum").item()
        right += (out.argmax(1) == y.to(device)).sum().item()
        count += len(y)
    return loss / count, right / count
