"""What every model must do. It runs over the registry: a new entry is tested without touching this file."""

from collections.abc import Mapping
from math import prod

import pytest
import small_encoders
import torch
from torch import nn
from torch.func import functional_call, grad, vmap

from quickbloom.common.config.run import parse_run_config
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.params import Params
from quickbloom.common.models import MODELS, build_model
from quickbloom.common.models.base import parse_sizes

IMAGE = (2, 9, 8)
LENGTH = 6


@pytest.fixture(params=sorted(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


def build(name: str, settings: Mapping[str, str | int] | None = None, seed: int = 0, outputs: int = 3) -> nn.Module:
    """For images of 2 channels and 9 x 8 pixels, or sequences of 6 tokens; small where it can be."""
    small: dict[str, str | int] = {"mlp.hidden": "7,5", "conv4.filters": 4, "lstm.embedding": 2, "lstm.hidden": 4}
    small |= {"resnet.channels": "4,6", "cnn.filters": 3, "cnn.units": 5, "cnn.padding": 2}
    if MODELS[name].pretrained:
        small["transformer.directory"] = small_encoders.directory()
    table = parse_run_config({**small, **(settings or {})}).table(name)
    return build_model(name, table, (LENGTH,) if MODELS[name].tokens else IMAGE, outputs, seed)


def parameters(module: nn.Module) -> Params:
    return {key: value.detach() for key, value in module.named_parameters()}


def num_parameters(module: nn.Module) -> int:
    return sum(value.numel() for value in module.parameters())


def images(*leading: int) -> torch.Tensor:
    return torch.randn(*leading, *IMAGE, generator=torch.Generator().manual_seed(0))


def inputs(name: str, *leading: int, outputs: int = 3, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    """What the model `name` reads: images, or tokens below `outputs`."""
    if MODELS[name].tokens:
        return torch.randint(outputs, (*leading, LENGTH), generator=torch.Generator().manual_seed(0))
    return images(*leading).to(dtype)


@pytest.mark.parametrize("outputs", [1, 5])
def test_outputs_have_one_row_per_example(name: str, outputs: int) -> None:
    assert build(name, outputs=outputs)(inputs(name, 4, outputs=outputs)).shape == (4, outputs)
    assert MODELS[name].name == name


def test_initial_values_depend_on_the_seed_alone(name: str) -> None:
    one, other = parameters(build(name, seed=3)), parameters(build(name, seed=3))
    assert all(torch.equal(value, other[key]) for key, value in one.items())
    assert not all(torch.equal(value, one[key]) for key, value in parameters(build(name, seed=4)).items())


def test_building_neither_reads_nor_changes_the_global_random_state(name: str) -> None:
    torch.manual_seed(123)
    before = torch.random.get_rng_state()
    one = parameters(build(name))
    assert torch.equal(torch.random.get_rng_state(), before)
    torch.manual_seed(456)
    assert all(torch.equal(value, one[key]) for key, value in parameters(build(name)).items())


def test_no_running_state(name: str) -> None:
    if MODELS[name].pretrained:
        pytest.skip("its buffers are constants")
    assert [key for key, _ in build(name).named_buffers()] == []


def test_mapping_over_tasks_equals_a_loop(name: str) -> None:
    module = build(name)
    x = inputs(name, 3, 4)
    mapped = vmap(lambda part: functional_call(module, parameters(module), (part,)))(x)
    assert torch.allclose(mapped, torch.stack([module(part) for part in x]), rtol=0, atol=1e-5)


def test_mapping_over_tasks_with_parameters_of_their_own_equals_a_loop(name: str) -> None:
    modules = [build(name, seed=seed) for seed in range(3)]
    stacked = {key: torch.stack([parameters(module)[key] for module in modules]) for key in parameters(modules[0])}
    x = inputs(name, 3, 4)

    def slopes(params: Params, part: torch.Tensor) -> Params:
        found: Params = grad(lambda p: functional_call(modules[0], p, (part,)).logsumexp(dim=1).sum())(params)
        return found

    mapped = vmap(slopes)(stacked, x)
    for i, module in enumerate(modules):
        module(x[i]).logsumexp(dim=1).sum().backward()
        for key, value in module.named_parameters():
            assert value.grad is not None
            assert torch.allclose(mapped[key][i], value.grad, rtol=0, atol=1e-5), key


def test_second_order_gradient_matches_a_finite_difference(name: str) -> None:
    # The slope of h(t) = |grad L(theta + t v)|^2 along one direction v, in float64, where ReLU's kinks are out of reach.
    module = build(name).double()
    theta, x = parameters(module), inputs(name, 6, dtype=torch.float64)
    direction = {
        key: torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).double() for key, value in theta.items()
    }

    def h(t: torch.Tensor) -> torch.Tensor:
        def loss(params: Params) -> torch.Tensor:
            return torch.logsumexp(functional_call(module, params, (x,)), dim=1).square().mean()

        slopes = grad(loss)({key: value + t * direction[key] for key, value in theta.items()})
        return torch.stack([slope.square().sum() for slope in slopes.values()]).sum()

    step = torch.tensor(1e-6, dtype=torch.float64)
    expected = (h(step) - h(-step)) / (2 * step)
    found = grad(h)(torch.zeros_like(step))
    assert found.item() == pytest.approx(expected.item(), rel=1e-4)
    assert found.abs() > 0


def test_number_of_parameters_by_hand() -> None:
    # mlp 144-7-5-3: 144*7+7 + 7*5+5 + 5*3+3. linear: 144*3+3. sine: 144*40+40 + 40*40+40 + 40*3+3.
    # conv4 (4 filters, group norm, stride 2): 2*4*9+4 + 8, then 3 times 4*4*9+4 + 8; 9x8 -> 5x4 -> 3x2 -> 2x1 -> 1x1, 4*3+3.
    # lstm (3 tokens, embedding 2, 4 units): 3*2, then 4 gates of 4*(2+4) + 2*4, then 4*3+3.
    # resnet (4 and 6 channels, group norm): 2*4*9 + 8; then 4*6*9 + 12, 6*6*9 + 12 and 4*6 around them; 9x8 -> 5x4, 120*3+3.
    counts = {"mlp": 1073, "linear": 435, "sine": 7563, "conv4": 84 + 3 * 156 + 15, "lstm": 6 + 4 * 32 + 15}
    counts |= {"resnet": 80 + 228 + 336 + 24 + 363}
    for name, expected in counts.items():
        assert num_parameters(build(name)) == expected, name


@pytest.mark.parametrize(
    "settings", [{"conv4.downsample": "max-pool"}, {"conv4.norm": "none"}, {"conv4.norm": "batch"}, {"conv4.filters": 7}]
)
def test_conv4_works_in_all_its_forms(settings: dict[str, str | int]) -> None:
    assert build("conv4", settings)(images(4)).shape == (4, 3)


@pytest.mark.parametrize("filters", [4, 8, 12, 64])
def test_conv4_tells_small_images_apart_at_any_number_of_filters(filters: int) -> None:
    # Resolution ends at 1 x 1: a normalisation over a single number would make all outputs equal to the last bias.
    outputs = build("conv4", {"conv4.filters": filters})(images(4))
    assert (outputs.std(dim=0) > 1e-3).all()


@pytest.mark.parametrize("shape", [(64,), (8, 8), (1, 7, 8), (1, 8, 7)])
def test_conv4_refuses_inputs_that_are_no_images_of_8_by_8(shape: tuple[int, ...]) -> None:
    with pytest.raises(ConfigError, match=r'`model = "conv4"` needs images.*choose `model = "mlp"`'):
        build_model("conv4", parse_run_config({}).table("conv4"), shape, 5, 0)


@pytest.mark.parametrize("norm", ["group", "batch", "none"])
@pytest.mark.parametrize("channels", ["5", "4,4", "4,8,6"])
def test_resnet_works_in_all_its_forms(norm: str, channels: str) -> None:
    assert build("resnet", {"resnet.norm": norm, "resnet.channels": channels})(images(4)).shape == (4, 3)


def test_a_residual_block_adds_what_it_is_given() -> None:
    # Convolutions of zeros leave norm(0) = 0 of the residual part: what is left is ReLU of the pooled first convolution.
    module = build("resnet", {"resnet.channels": "4,4"})
    body = module.get_submodule("0")
    assert isinstance(body, nn.Sequential)
    for layer in body[4].modules():
        if isinstance(layer, nn.Conv2d):
            nn.init.zeros_(layer.weight)
    x = images(5)
    torch.testing.assert_close(body(x), body[:4](x).relu().flatten(1), atol=1e-6, rtol=0)


@pytest.mark.parametrize(("channels", "shape"), [("4,4,4,4", (1, 7, 8)), ("4", (1, 1, 8)), ("4,4", (64,)), ("4,4", (8, 8))])
def test_resnet_refuses_what_is_no_image_or_too_small_a_one(channels: str, shape: tuple[int, ...]) -> None:
    table = parse_run_config({"resnet.channels": channels}).table("resnet")
    with pytest.raises(ConfigError, match=r'`model = "resnet"` with . `channels` needs images.*give fewer `channels`'):
        build_model("resnet", table, shape, 5, 0)


def test_resnet_without_channels_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"`resnet\.channels` must have at least one number"):
        build("resnet", {"resnet.channels": ""})


@pytest.mark.parametrize("text", ["0", "64,-1", "64,", "a", "1.5", "64;64", ","])
def test_hidden_sizes_that_are_no_sizes_are_refused(text: str) -> None:
    with pytest.raises(ConfigError, match=r"`mlp\.hidden` must be positive whole numbers"):
        build("mlp", {"mlp.hidden": text})


def test_sizes_may_have_blanks_and_may_be_none_at_all() -> None:
    assert parse_sizes("x", " 64, 32 ") == (64, 32)
    assert parse_sizes("x", "  ") == ()
    assert num_parameters(build("mlp", {"mlp.hidden": ""})) == prod(IMAGE) * 3 + 3
