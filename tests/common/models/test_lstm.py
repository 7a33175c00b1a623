"""The written-out LSTM against torch's own: the same numbers from the same parameters."""

import pytest
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params
from quickbloom.common.models import build_model
from quickbloom.common.models.lstm import LstmOptions, NextToken

TOKENS, LENGTH = 11, 9


class Reference(nn.Module):
    """The same network from torch's own layers; the names are those of `NextToken`."""

    def __init__(self, layers: int) -> None:
        super().__init__()
        self.embedding = nn.Embedding(TOKENS, 3)
        self.lstm = nn.LSTM(3, 5, layers, batch_first=True)
        self.head = nn.Linear(5, TOKENS)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        states, _ = self.lstm(self.embedding(x))
        return self.head(states[:, -1])  # type: ignore[no-any-return]


def pair(layers: int) -> tuple[NextToken, Reference]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(7)
        reference = Reference(layers)
    module = NextToken(TOKENS, TOKENS, 3, 5, layers)
    module.load_state_dict(reference.state_dict())  # strict: it fails unless all names and shapes agree
    return module, reference


def tokens(*leading: int) -> torch.Tensor:
    return torch.randint(TOKENS, (*leading, LENGTH), generator=torch.Generator().manual_seed(3))


@pytest.mark.parametrize("layers", [1, 2])
def test_outputs_and_gradients_equal_those_of_torchs_own_layers(layers: int) -> None:
    modules, x = pair(layers), tokens(8)
    target = torch.arange(8)
    outputs = [module(x) for module in modules]
    for output in outputs:
        nn.functional.cross_entropy(output, target).backward()  # type: ignore[no-untyped-call]
    assert torch.allclose(outputs[0], outputs[1], rtol=0, atol=1e-6)
    wanted = {name: value.grad for name, value in modules[1].named_parameters()}
    for name, value in modules[0].named_parameters():
        assert value.grad is not None
        assert torch.allclose(value.grad, wanted[name], rtol=0, atol=1e-6), name  # type: ignore[arg-type]
        assert value.grad.abs().max() > 1e-5, name


@pytest.mark.parametrize("layers", [1, 2])
def test_a_step_of_second_order_mapped_over_tasks_equals_finite_differences(layers: int) -> None:
    # Two tasks, one inner step each: the slope of the query loss along a direction of the initial parameters.
    module = pair(layers)[0].double()
    theta = {name: value.detach() for name, value in module.named_parameters()}
    support, query = tokens(2, 4), tokens(2, 5).flip(-1)

    def loss(params: Params, x: torch.Tensor) -> torch.Tensor:
        return functional_call(module, params, (x,)).logsumexp(dim=-1).square().mean()  # type: ignore[no-any-return]

    def adapted_loss(params: Params, support: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
        slopes = grad(loss)(params, support)
        return loss({name: value - 0.5 * slopes[name] for name, value in params.items()}, query)

    def total(params: Params) -> float:
        return sum(float(adapted_loss(params, support[i], query[i])) for i in range(2))

    mapped = vmap(grad(adapted_loss), in_dims=(None, 0, 0))(theta, support, query)
    source = torch.Generator().manual_seed(1)
    along = {name: torch.randn(value.shape, generator=source, dtype=torch.float64) for name, value in theta.items()}
    step = 1e-5
    ahead, behind = ({name: value + sign * step * along[name] for name, value in theta.items()} for sign in (1, -1))
    found = sum(float((mapped[name] * along[name]).sum()) for name in theta)
    assert found == pytest.approx((total(ahead) - total(behind)) / (2 * step), rel=1e-6)


def test_initial_values_have_the_distribution_of_torchs_own_layers() -> None:
    options = LstmOptions(embedding=40, hidden=100, layers=2)
    module = build_model("lstm", options, (LENGTH,), 200, seed=1)
    for name, value in module.named_parameters():
        if name == "embedding.weight":  # standard normal
            assert value.std().item() == pytest.approx(1, abs=0.05)
        else:  # uniform between plus and minus 1 / sqrt(hidden)
            assert 0.095 < value.abs().max().item() <= 0.1, name
            assert value.std().item() == pytest.approx(0.1 / 3**0.5, rel=0.15), name


def test_the_order_of_the_tokens_matters_back_to_the_first() -> None:
    module, x = pair(1)[0], tokens(1)
    other = x.clone()
    other[0, 0] = (x[0, 0] + 1) % TOKENS
    assert (module(x) - module(other)).abs().max() > 1e-6
    assert not torch.allclose(module(x), module(x.flip(-1)))


@pytest.mark.parametrize("shape", [(), (1, 8), (1, 8, 8)], ids=str)
def test_inputs_that_are_no_sequences_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r'`model = "lstm"` needs sequences of tokens.*choose `model = "auto"`'):
        build_model("lstm", LstmOptions(), shape, 5, 0)
