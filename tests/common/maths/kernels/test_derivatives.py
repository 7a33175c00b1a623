"""Networks on the kernels as functions: against plain modules under torch.func, finite differences, and by hand."""

import copy
import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call, grad, jacrev, vmap

from quickbloom.common.maths.batch import Batch
from quickbloom.common.maths.fast_paths import differentiable_end, gradient_and_product
from quickbloom.common.maths.kernels import derivatives, train
from quickbloom.common.maths.kernels.derivatives import Outputs, applied
from quickbloom.common.maths.kernels.train import known_in_part
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import Params
from quickbloom.common.models.conv4 import Conv4, Conv4Options
from quickbloom.common.models.mlp import perceptron

pytestmark = pytest.mark.usefixtures("each_library")

CLASSES, TASKS, N, LR = 5, 3, 6, 0.05
CONV4 = list(itertools.product(("stride", "max-pool"), ("group", "batch", "none"), ((1, 28, 28), (3, 13, 9))))
Case = tuple[nn.Module, tuple[int, ...]]


def prepared(module: nn.Module) -> nn.Module:
    """In double precision, with numbers of its own for every parameter: zeros of a bias would hide mistakes."""
    source = torch.Generator().manual_seed(3)
    for value in module.parameters():
        if value.ndim == 1:
            value.data = torch.randn(value.shape, generator=source)
    return module.double()


def case_of(key: Any) -> Case:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1)
        if isinstance(key[0], int):
            return prepared(perceptron(key)), (key[0],)
        downsample, norm, shape = key
        options = Conv4Options.model_validate({"downsample": downsample, "norm": norm, "filters": 20})
        return prepared(Conv4.build(options, shape, CLASSES)), shape


KEYS: list[Any] = [(6, CLASSES), (6, 7, CLASSES), (6, 17, 9, CLASSES), *CONV4]


def body_of(module: nn.Module) -> nn.Module:
    """All but the last layer: for a perceptron it ends with ReLU, for conv4 with pooling, a normalisation or ReLU."""
    return nn.Sequential(*list(module.children())[:-1])


def inputs(shape: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    source = torch.Generator().manual_seed(5)
    x = torch.randn(TASKS, N, *shape, generator=source, dtype=torch.float64)
    return x, torch.randint(CLASSES, (TASKS, N), generator=source)


def parameters(module: nn.Module) -> Params:
    return {name: value.detach() for name, value in module.named_parameters()}


def same(found: Params, expected: Params, tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    size = max(float(value.abs().max()) for value in expected.values())
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance * size)


def outputs_of(module: nn.Module, theta: Params, x: Tensor) -> Tensor:
    """By the kernels, also where `applied` leaves a small perceptron to torch."""
    network = known_in_part(module)
    assert network is not None
    found: Tensor = Outputs.apply(network, x[None], *[theta[name][None] for name in network.names])[0]  # type: ignore[no-untyped-call]
    return found


@pytest.mark.parametrize("whole", [True, False], ids=["whole", "body"])
@pytest.mark.parametrize("key", KEYS, ids=str)
def test_outputs_and_their_first_and_second_derivatives_are_those_of_torch(key: Any, whole: bool) -> None:
    module, shape = case_of(key)
    module = module if whole else body_of(module)
    theta, (x, _) = parameters(module), inputs(shape)
    if not theta:
        pytest.skip("a linear layer alone has no body")

    def by_kernels(theta: Params, x: Tensor) -> Tensor:
        return outputs_of(module, theta, x)

    def by_torch(theta: Params, x: Tensor) -> Tensor:
        found: Tensor = functional_call(module, theta, (x,))
        return found

    def gradient(f: Any) -> Any:
        return lambda theta, x: grad(lambda at: f(at, x).sin().square().sum())(theta)

    def second(f: Any) -> Any:
        def of_slopes(theta: Params, x: Tensor) -> Tensor:
            slopes = gradient(f)(theta, x)
            total: Tensor = f(theta, x).cos().sum()
            return sum((value.square().sum() for value in slopes.values()), total)

        return grad(of_slopes)

    dims = (None, 0)
    torch.testing.assert_close(vmap(by_kernels, in_dims=dims)(theta, x), vmap(by_torch, in_dims=dims)(theta, x))
    for of in (gradient, second):
        same(vmap(of(by_kernels), in_dims=dims)(theta, x), vmap(of(by_torch), in_dims=dims)(theta, x))


def test_plain_autograd_differentiates_twice_as_well() -> None:
    module, shape = case_of((6, 7, CLASSES))
    x, y = inputs(shape)

    def twice(f: Any) -> Params:
        theta = {name: value.clone().requires_grad_() for name, value in parameters(module).items()}
        slopes = torch.autograd.grad(F.cross_entropy(f(theta), y[0]), list(theta.values()), create_graph=True)
        total = sum((value.square().sum() for value in slopes), torch.zeros(()))
        return dict(zip(theta, torch.autograd.grad(total, list(theta.values())), strict=True))

    same(twice(lambda theta: applied(module, theta, x[0])), twice(lambda theta: functional_call(module, theta, (x[0],))))


@pytest.mark.parametrize("key", KEYS, ids=str)
def test_the_gradient_through_a_descent_is_that_of_torch(key: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """With respect to start and rates, of all steps; a lambda's own loss at the end shows that any will do."""
    module, shape = case_of(key)
    learner = Learner(module, "classification", CLASSES)
    x, y = inputs(shape)
    theta = parameters(module)
    source = torch.Generator().manual_seed(2)
    rates = {name: 0.05 * torch.rand(value.shape, generator=source, dtype=value.dtype) for name, value in theta.items()}

    def by_kernels(at: tuple[Params, Params], x: Tensor, y: Tensor) -> Tensor:
        end = differentiable_end(learner, at[0], Batch.of(x, y), 0.5, 3, at[1])
        return F.cross_entropy(functional_call(module, end, (x.flip(0),)), y)

    def by_torch(at: tuple[Params, Params], x: Tensor, y: Tensor) -> Tensor:
        phi, rates = at
        for _ in range(3):
            slopes = grad(lambda phi: F.cross_entropy(functional_call(module, phi, (x,)), y))(phi)
            phi = {name: value - 0.5 * rates[name] * slopes[name] for name, value in phi.items()}
        return F.cross_entropy(functional_call(module, phi, (x.flip(0),)), y)

    calls: list[str] = []

    def watching(function: str, *args: Any) -> None:
        calls.append(function)
        train.call(function, *args)

    monkeypatch.setattr(derivatives, "call", watching)
    of_start, of_rates = vmap(grad(by_kernels), in_dims=(None, 0, 0))((theta, rates), x, y)
    assert calls == ["walk", "through"]
    expected = vmap(grad(by_torch), in_dims=(None, 0, 0))((theta, rates), x, y)
    same(of_start, expected[0])
    same(of_rates, expected[1])


@pytest.mark.parametrize("kind", ["classification", "regression"])
@pytest.mark.parametrize("key", [(6, 7, CLASSES), ("max-pool", "batch", (3, 13, 9)), ("stride", "group", (1, 28, 28))], ids=str)
def test_a_hessian_s_product_is_the_difference_of_two_gradients(key: Any, kind: str) -> None:
    module, shape = case_of(key)
    learner = Learner(module, kind, CLASSES)
    x, y = inputs(shape)
    target = y[0] if kind == "classification" else torch.randn(N, CLASSES, dtype=x.dtype)
    batch = Batch(x[0], target, torch.tensor([1.0, 2, 0, 1, 1, 3], dtype=x.dtype))
    theta = parameters(module)
    v = {name: torch.randn(value.shape, dtype=value.dtype) for name, value in theta.items()}
    _, times_hessian = gradient_and_product(learner, theta, batch)
    step = 1e-6

    def slopes(sign: int) -> Params:
        at = {name: value + sign * step * v[name] for name, value in theta.items()}
        found: Params = grad(lambda at: _plain_loss(module, at, batch))(at)
        return found

    ahead, behind = slopes(1), slopes(-1)
    expected = {name: (value - behind[name]) / (2 * step) for name, value in ahead.items()}
    same(times_hessian(v), expected, 1e-5)


def _plain_loss(module: nn.Module, at: Params, batch: Batch) -> Tensor:
    out = functional_call(module, at, (batch.x,))
    each = (
        F.cross_entropy(out, batch.y, reduction="none")
        if batch.y.dtype == torch.int64
        else (out - batch.y).square().mean(dim=1)
    )
    return (each * batch.weight).sum() / batch.weight.sum()


def test_the_hessian_of_one_number_by_hand() -> None:
    """f(x) = w x + b with a squared error: the Hessian by (w, b) is 2 (x^2, x; x, 1), here for x = 3."""
    learner = Learner(prepared(perceptron((1, 1))), "regression", 1)
    batch = Batch.of(torch.tensor([[3.0]], dtype=torch.float64), torch.tensor([[1.0]], dtype=torch.float64))
    theta = parameters(learner.module)
    weight, bias = theta
    _, times_hessian = gradient_and_product(learner, theta, batch)
    found = times_hessian({weight: torch.ones(1, 1, dtype=torch.float64), bias: 10 * torch.ones(1, dtype=torch.float64)})
    assert found[weight].item() == pytest.approx(2 * (9 + 30))
    assert found[bias].item() == pytest.approx(2 * (3 + 10))


def test_where_the_softmax_is_one_the_hessian_is_zero_and_not_rounding() -> None:
    """Inputs of size 1e4 make one class certain. What is left must be small beside the gradient, as in double precision."""
    module, shape = case_of((6, 17, CLASSES))
    x, y = inputs(shape)
    theta = {name: value.float() for name, value in parameters(module).items()}
    batch = Batch.of(1e4 * x[0].float(), y[0])
    _, times_hessian = gradient_and_product(Learner(module.float(), "classification", CLASSES), theta, batch)
    found = times_hessian(theta)
    exact = {name: value.double() for name, value in theta.items()}
    wide = Batch.of(batch.x.double(), y[0])
    _, times_exact = gradient_and_product(Learner(copy.deepcopy(module).double(), "classification", CLASSES), exact, wide)
    expected = times_exact(exact)
    size = max(float(value.abs().max()) for value in grad(lambda at: _plain_loss(module.double(), at, wide))(exact).values())
    for name, value in expected.items():
        assert float((found[name].double() - value).abs().max()) < 1e-3 * size


def test_a_derivative_by_inputs_from_outside_of_vmap_is_left_to_torch_too() -> None:
    module, shape = case_of(("stride", "group", (3, 13, 9)))
    x, _ = inputs(shape)
    learner = Learner(module, "classification", CLASSES)
    found = grad(lambda x: vmap(lambda one: learner.apply(parameters(module), one[None]))(x).sin().sum())(x[0])
    plain = x[0].clone().requires_grad_()
    torch.testing.assert_close(found, torch.autograd.grad(module(plain).sin().sum(), plain)[0])


def test_threads_share_the_tasks() -> None:
    module, shape = case_of((6, 7, CLASSES))
    x, _ = inputs(shape)
    network = known_in_part(module)
    assert network is not None
    theta = [parameters(module)[name].expand(TASKS, *parameters(module)[name].shape) for name in network.names]
    d = torch.randn(TASKS, N, CLASSES, dtype=x.dtype)

    def every() -> list[Tensor]:
        found = derivatives.outputs(network, x, theta), *derivatives.pull(network, x, d, theta)
        return [*found, *derivatives.along(network, x, d, theta, theta)]

    one, before = every(), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert all(torch.equal(a, b) for a, b in zip(every(), one, strict=True))
    finally:
        torch.set_num_threads(before)


def test_inside_torch_func_a_convolution_is_for_the_kernels_and_a_perceptron_for_torch() -> None:
    for key, there in (((6, 7, CLASSES), False), (("stride", "group", (3, 13, 9)), True)):
        module, shape = case_of(key)
        found: list[bool] = []

        def loss(
            theta: Params, module: nn.Module = module, shape: tuple[int, ...] = shape, found: list[bool] = found
        ) -> Tensor:
            x, _ = inputs(shape)
            outputs = applied(module, theta, x[0])
            found.append(outputs is not None)
            return functional_call(module, theta, (x[0],)).sum() if outputs is None else outputs.sum()

        grad(loss)(parameters(module))
        assert found == [there]


@pytest.mark.parametrize("norm", ["group", "batch"])
def test_many_examples_are_computed_a_few_at_a_time_unless_they_are_normalised_together(norm: str) -> None:
    module, shape = case_of(("stride", norm, (1, 28, 28)))
    x = torch.randn(150, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    found = applied(module, parameters(module), x)
    assert found is not None
    torch.testing.assert_close(found, module(x).detach())


def test_there_is_no_third_derivative() -> None:
    module, shape = case_of((6, 7, CLASSES))
    x, _ = inputs(shape)

    def loss(theta: Params) -> Tensor:
        return outputs_of(module, theta, x[0]).sin().sum()

    def squares(f: Any) -> Any:
        return lambda theta: sum((value.square().sum() for value in grad(f)(theta).values()), torch.zeros(()))

    with pytest.raises(NotImplementedError, match="third derivative"):
        grad(squares(squares(loss)))(parameters(module))


def test_a_derivative_by_the_inputs_is_left_to_torch() -> None:
    module, shape = case_of((6, 7, CLASSES))
    x, _ = inputs(shape)
    learner = Learner(module, "classification", CLASSES)
    plain = x[0].clone().requires_grad_()
    expected = torch.autograd.grad(module(plain).sum(), plain)[0]
    one = x[0].clone().requires_grad_()
    torch.testing.assert_close(torch.autograd.grad(learner.apply(parameters(module), one).sum(), one)[0], expected)
    torch.testing.assert_close(grad(lambda x: learner.apply(parameters(module), x).sum())(x[0]), expected)
    of_one = jacrev(lambda x: learner.apply(parameters(module), x))(x[0])
    torch.testing.assert_close(of_one.sum(dim=(0, 1)), expected)


@pytest.mark.parametrize("label", [-1, CLASSES])
def test_a_label_that_is_none_makes_numbers_that_are_not_finite(label: int) -> None:
    module, shape = case_of((6, 7, CLASSES))
    learner = Learner(module, "classification", CLASSES)
    x, y = inputs(shape)
    wrong = Batch.of(x[0], y[0].index_fill(0, torch.tensor([2]), label))
    _, times_hessian = gradient_and_product(learner, parameters(module), wrong)
    assert not all(value.isfinite().all() for value in times_hessian(parameters(module)).values())
    end = differentiable_end(learner, parameters(module), wrong, LR, 2)
    assert not all(value.isfinite().all() for value in end.values())
