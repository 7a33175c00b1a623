"""From settings and data to an algorithm: what does not go together is refused before anything is trained."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_encoders
import torch
from torch import Tensor, nn

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm, try_out, try_out_with
from quickbloom.common.engine.round import TaskWork, contributions, evaluate, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.learner import Learner
from quickbloom.common.maths.params import mismatch
from quickbloom.common.models import MODELS
from quickbloom.common.randomness import generator

IMAGES = DataSpec("classification", (1, 12, 12), 5)
NUMBERS = DataSpec("regression", (6,), 2)
TOKENS = DataSpec("classification", (6,), 7, tokens=9)


def refusal(module: nn.Module, spec: DataSpec = NUMBERS, outputs: int = 0) -> str:
    """What the trials say of a module that does not fit: one sentence."""
    with pytest.raises(ConfigError) as caught:
        try_both(module, spec, "maml", outputs)
    assert str(caught.value).startswith('`model = "mine:net"` must ')
    assert "\n" not in str(caught.value)
    return str(caught.value)


def try_both(module: nn.Module, spec: DataSpec, algorithm: str, outputs: int = 0) -> Learner:
    learner = Learner(module, spec.kind, spec.outputs)
    try_out(learner, "mine:net", spec, outputs or spec.outputs)
    options = ALGORITHMS[algorithm].Options.model_validate({"inner-lr": 0.1})
    try_out_with(ALGORITHMS[algorithm](options, learner), "mine:net", spec)
    return learner


class Through(nn.Module):
    """One linear layer and then whatever the test is about."""

    def __init__(self, after: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.linear, self.after = nn.Linear(6, 2), after

    def forward(self, x: Tensor) -> Any:
        return self.after(self.linear(x))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding, self.lstm = nn.Embedding(9, 4), nn.LSTM(4, 7, batch_first=True)

    def forward(self, x: Tensor) -> Any:
        return self.lstm(self.embedding(x))[0][:, -1]


@pytest.mark.parametrize("spec", [IMAGES, NUMBERS, TOKENS], ids=["images", "numbers", "tokens"])
@pytest.mark.parametrize("name", sorted(MODELS))
def test_every_model_is_built_for_data_that_fit_it_and_refused_in_one_sentence_for_others(name: str, spec: DataSpec) -> None:
    fits = MODELS[name].tokens == bool(spec.tokens) and (name not in ("cnn", "conv4", "resnet") or spec is IMAGES)
    more = {"transformer.directory": small_encoders.directory()} if MODELS[name].pretrained else {}
    config = parse_run_config({"model": name, "conv4.filters": 4, "cnn.padding": 2, "lstm.hidden": 4, **more}).resolved()
    if fits:
        algorithm = build_algorithm(config, spec)
        x = torch.zeros(3, *spec.input_shape, dtype=torch.int64 if spec.tokens else torch.float32)
        assert algorithm.learner.apply(algorithm.init(), x).shape == (3, spec.outputs)
    else:
        with pytest.raises(ConfigError, match=rf'`model = "{name}"` .*choose `model = "(auto|mlp)"`'):
            build_algorithm(config, spec)


@pytest.mark.parametrize("model", sorted(MODELS))
@pytest.mark.parametrize("name", sorted(ALGORITHMS))
def test_a_model_that_is_only_a_structure_trains_and_scores_as_the_one_with_numbers(name: str, model: str) -> None:
    spec = TOKENS if MODELS[model].tokens else IMAGES
    if spec.kind not in ALGORITHMS[name].kinds:
        if spec.tokens:
            pytest.skip("tokens are classes")
        spec = DataSpec("regression", spec.input_shape, 2)
    small: dict[str, Any] = {"conv4.filters": 4, "lstm.hidden": 4, "mlp.hidden": "6", "resnet.channels": "4,6"}
    small |= {"cnn.filters": 3, "cnn.units": 5, "cnn.padding": 2}
    if MODELS[model].pretrained:
        small |= {"transformer.directory": small_encoders.directory(), "transformer.lora-rank": 2}
    if name == "fedbn":
        small |= {"mlp.norm": "layer"}
        if model not in ("conv4", "mlp", "resnet"):
            pytest.skip("the model trains no normalisation")
    if name in ("heads", "anil", "fedbabu", "lgfedavg", "fedala", "fedproto", "fedpac") and model == "linear":
        pytest.skip("the model is nothing but a head")
    config = parse_run_config({"model": model, "algorithm": name, **small, f"{name}.inner-lr": 0.01}).resolved()
    whole, bare = build_algorithm(config, spec), build_algorithm(config, spec, tried=True)
    assert mismatch(bare.init(), whole.init()) is None
    assert (bare.learner.device, bare.learner.dtype) == (whole.learner.device, whole.learner.dtype)
    meta, data = whole.init(), TaskData(*[_made_up_batch(spec)] * 3)
    results = [run_round(a, meta, [TaskWork(data, generator(0, "x"))], 1) for a in (whole, bare)]
    assert results[0].losses == results[1].losses
    assert all(torch.equal(value, results[1].gradient[name]) for name, value in results[0].gradient.items())
    scores = [evaluate(a, meta, [[data]], [0.1], 2, 1) for a in (whole, bare)]
    assert np.array_equal(scores[0][0], scores[1][0])


def _made_up_batch(spec: DataSpec, seed: int = 1) -> Batch:
    shape, source = (6, *spec.input_shape), torch.Generator().manual_seed(seed)
    x = torch.randint(spec.tokens, shape, generator=source) if spec.tokens else torch.randn(shape, generator=source)
    y = torch.arange(6) % spec.outputs if spec.kind == "classification" else torch.randn(6, spec.outputs, generator=source)
    return Batch.of(x, y)


def test_a_server_needs_no_more_than_the_structure() -> None:
    config = parse_run_config({"model": "mlp", "algorithm": "fedavg"}).resolved()
    algorithm = build_algorithm(config, NUMBERS)
    meta, shapes = algorithm.init(), {name: value.shape for name, value in algorithm.init().items()}
    algorithm.learner.drop_numbers()
    assert all(value.is_meta for value in algorithm.learner.module.parameters())
    assert algorithm.learner.device.type == "cpu"
    assert {name: value.shape for name, value in algorithm.init().items()} == shapes
    assert algorithm.learner.apply(meta, torch.zeros(2, *NUMBERS.input_shape)).shape == (2, NUMBERS.outputs)


@pytest.mark.parametrize(
    ("shape", "model"), [((1, 28, 28), "conv4"), ((3, 8, 9), "conv4"), ((1, 7, 28), "mlp"), ((5,), "mlp")], ids=str
)
def test_the_form_of_the_inputs_chooses_where_a_data_set_leaves_it_to_them(shape: tuple[int, ...], model: str) -> None:
    spec = DataSpec("classification", shape, 3)
    settings = {"dataset": "own", "own.path": "unused", "conv4.filters": 4}
    chosen = build_algorithm(parse_run_config(settings).resolved(), spec).init()
    asked = build_algorithm(parse_run_config({**settings, "model": model}).resolved(), spec).init()
    assert {name: value.shape for name, value in chosen.items()} == {name: value.shape for name, value in asked.items()}


@pytest.mark.parametrize("name", sorted(set(DATASETS) - {"own"}))
def test_the_model_that_a_data_set_recommends_reads_its_kind_of_inputs(name: str) -> None:
    model = DATASETS[name].model
    # The inputs of `intents` are token ids or features, as the settings say; those of the hub images or numbers.
    assert name in ("intents", "hub") if model == "auto" else MODELS[model].tokens == (name == "shakespeare")


def test_outputs_of_another_shape_are_refused() -> None:
    said = refusal(nn.Linear(6, 3))
    assert "must map float32 inputs of shape (2, 6) to outputs of shape (2, 2), got torch.float32 of shape (2, 3)" in said
    assert "got torch.float32 of shape (2,)" in refusal(Through(lambda x: x.sum(dim=1)))
    assert "got torch.int64 of shape (2, 2)" in refusal(Through(lambda x: x.long()))
    assert "got a tuple" in refusal(Through(lambda x: (x, x)))


def test_a_model_for_other_inputs_is_refused_with_what_it_raised() -> None:
    assert "but it raised RuntimeError: mat1 and mat2 shapes cannot be multiplied" in refusal(nn.Linear(5, 2))
    assert "must map int64 token ids of shape (2, 6)" in refusal(nn.Linear(6, 7), TOKENS)
    assert "but it raised RuntimeError" in refusal(nn.Linear(6, 2).double())


def test_an_embedding_without_the_last_token_is_refused() -> None:
    too_small = nn.Sequential(nn.Embedding(8, 2), nn.Flatten(), nn.Linear(12, 7))
    assert "but it raised IndexError: index out of range" in refusal(too_small, TOKENS)
    enough = nn.Sequential(nn.Embedding(9, 2), nn.Flatten(), nn.Linear(12, 7))
    try_both(enough, TOKENS, "maml", 7)


@pytest.mark.parametrize(
    ("module", "spec"),
    [
        (Through(lambda x: x if x.sum() > 0 else -x), NUMBERS),
        (Through(lambda x: x * (1.0 if x.sum().item() > 0 else 2.0)), NUMBERS),
        (Through(lambda x: torch.zeros(len(x), 2).copy_(x)), NUMBERS),
        (Recurrent(), TOKENS),
    ],
    ids=["branch on values", "item", "in place", "torch.nn.LSTM"],
)
@pytest.mark.parametrize("name", ["maml", "reptile"])
def test_what_cannot_be_mapped_goes_task_by_task_and_says_so(name: str, module: nn.Module, spec: DataSpec) -> None:
    learner = try_both(module, spec, name)
    assert not learner.maps
    assert [remark for remark in learner.remarks if "computes its tasks one after the other" in remark] == learner.remarks
    data = [TaskData(*[_made_up_batch(spec)] * 3), TaskData(*[_made_up_batch(spec)] * 3)]
    algorithm = ALGORITHMS[name](ALGORITHMS[name].Options.model_validate({"inner-lr": 0.1}), learner)
    meta = algorithm.init()
    both = run_round(algorithm, meta, [TaskWork(one, generator(0, str(i))) for i, one in enumerate(data)], 2)
    alone = [run_round(algorithm, meta, [TaskWork(one, generator(0, str(i)))], 1) for i, one in enumerate(data)]
    assert both.losses == pytest.approx([one.losses[0] for one in alone], abs=1e-6)
    for key, value in both.gradient.items():
        torch.testing.assert_close(value, (alone[0].gradient[key] + alone[1].gradient[key]) / 2, atol=1e-6, rtol=1e-5)
        assert value.abs().sum() > 0, key


@pytest.mark.parametrize("name", ["maml", "fomaml", "reptile", "protonet", "anil", "imaml"])
def test_task_by_task_is_what_is_computed_at_once(name: str) -> None:
    spec = DataSpec("classification", (6,), 3)
    config = parse_run_config({"algorithm": name, "model": "mlp", "mlp.hidden": "5", f"{name}.inner-lr": 0.1}).resolved()
    algorithm = build_algorithm(config, spec)
    meta, data = algorithm.init(), [TaskData(*[_made_up_batch(spec, seed)] * 3) for seed in (1, 2, 3)]
    found = []
    for maps in (True, False):
        algorithm.learner.maps = maps
        work = [TaskWork(one, generator(0, str(i))) for i, one in enumerate(data)]
        # One part after the other too, without the sums of the kernels.
        parts = [part.gradients for part in contributions(algorithm, meta, work, 3)]
        scores = evaluate(algorithm, meta, [[one] for one in data], [0.1, 0.5], 2, 128)
        found.append((parts[0], scores))
    for key, value in found[0][0].items():
        torch.testing.assert_close(value, found[1][0][key], atol=1e-6, rtol=1e-6)
    for mapped, looped in zip(found[0][1], found[1][1], strict=True):
        np.testing.assert_allclose(mapped, looped, atol=1e-6)


def test_an_lstm_of_torch_has_the_second_order_gradient_that_plain_autograd_gives() -> None:
    module = Recurrent().double()
    learner = Learner(module, "classification", 7)
    learner.maps = False
    algorithm = ALGORITHMS["maml"](ALGORITHMS["maml"].Options.model_validate({"inner-lr": 0.5, "inner-steps": 1}), learner)
    batch = _made_up_batch(TOKENS)
    batch = batch._replace(weight=batch.weight.double())
    found = run_round(algorithm, algorithm.init(), [TaskWork(TaskData(batch, batch, batch), generator(0, "x"))], 1)
    theta = dict(module.named_parameters())
    loss = nn.functional.cross_entropy(module(batch.x), batch.y)
    slopes = torch.autograd.grad(loss, list(theta.values()), create_graph=True)
    phi = {name: value - 0.5 * slope for (name, value), slope in zip(theta.items(), slopes, strict=True)}
    after = nn.functional.cross_entropy(torch.func.functional_call(module, phi, (batch.x,)), batch.y)
    expected = torch.autograd.grad(after, list(theta.values()))
    for name, value in zip(theta, expected, strict=True):
        torch.testing.assert_close(found.gradient[name], value)


def test_a_random_operation_in_evaluation_mode_is_refused() -> None:
    said = refusal(Through(lambda x: nn.functional.dropout(x, 0.5)))
    assert 'must be differentiable by torch.func as often as `algorithm = "maml"` needs it' in said
    assert "random operation" in said
    learner = try_both(nn.Sequential(nn.Linear(6, 2), nn.Dropout(0.5)), NUMBERS, "maml")
    assert "dropout is off" in learner.remarks[0]


def test_a_model_that_cannot_be_differentiated_is_refused_in_one_sentence() -> None:
    class Once(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, slope: Tensor) -> Any:
            raise RuntimeError("no derivative")

    assert "must be differentiable by torch.func" in refusal(Through(lambda x: Once.apply(x)))  # type: ignore[no-untyped-call]


def test_a_buffer_that_changes_while_the_model_computes_is_refused() -> None:
    class Counting(nn.Module):
        seen: Tensor

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)
            self.register_buffer("seen", torch.zeros(()))

        def forward(self, x: Tensor) -> Any:
            self.seen += 1
            return self.linear(x)

    assert "and it changes `seen`" in refusal(Counting())


def test_fused_attention_is_computed_without_its_kernels_where_those_lack_a_derivative() -> None:
    class Attention(nn.Module):
        """Torch has no second derivative of the fused kernel that this takes on a CPU."""

        def __init__(self) -> None:
            super().__init__()
            self.linear = nn.Linear(6, 2)

        def forward(self, x: Tensor) -> Tensor:
            rows = self.linear(x)[:, None, None]
            return nn.functional.scaled_dot_product_attention(rows, rows, rows)[:, 0, 0]

    for name in ("fomaml", "maml"):
        learner = try_both(Attention(), NUMBERS, name)
        assert learner.maps
        assert learner.plain_attention


class HeadFirst(nn.Module):
    """Its head is made before its body."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.body = nn.Linear(3, 2), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x).tanh())


def test_the_head_is_the_layer_that_runs_last_not_the_one_that_was_made_last() -> None:
    learner = try_both(HeadFirst(), NUMBERS, "anil")
    assert learner.head("anil.head", "auto") == ["head.weight", "head.bias"]


@pytest.mark.parametrize("name", sorted(name for name, one in ALGORITHMS.items() if "classification" in one.kinds))
def test_every_algorithm_that_is_for_classification_works_on_tokens(name: str) -> None:
    config = parse_run_config({"algorithm": name, "model": "lstm", "lstm.hidden": 4, "dataset": "shakespeare"}).resolved()
    if name == "fedbn":
        pytest.skip("the model has no normalisation")
    algorithm = build_algorithm(config, TOKENS)
    assert algorithm.learner.outputs == 7


def test_a_model_without_parameters_is_refused() -> None:
    assert "must have parameters to train, got a module without any" in refusal(nn.Identity(), DataSpec("regression", (2,), 2))
    assert "must have parameters to train, got lazy ones" in refusal(nn.LazyLinear(2))


def test_the_trial_leaves_the_global_random_state_and_the_module_alone() -> None:
    module = Through(lambda x: x + 0 * torch.randn(2))
    before, state = torch.random.get_rng_state(), {name: value.clone() for name, value in module.state_dict().items()}
    assert "random operation" in refusal(module)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(torch.equal(value, state[name]) for name, value in module.state_dict().items())
    assert all(value.grad is None for value in module.parameters())


def test_a_users_own_model_becomes_an_algorithm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = "from torch import nn\ndef net(shape, outputs):\n    return nn.{layer}\n"
    (tmp_path / "own_for_assembling.py").write_text(source.format(layer="Linear(6, outputs)"))
    frozen = "Linear(6, outputs).requires_grad_(False)"
    (tmp_path / "own_frozen.py").write_text(source.format(layer=frozen))
    monkeypatch.syspath_prepend(str(tmp_path))
    algorithm = build_algorithm(parse_run_config({"model": "own_for_assembling:net"}).resolved(), NUMBERS)
    assert {name: tuple(value.shape) for name, value in algorithm.init().items()} == {"weight": (2, 6), "bias": (2,)}
    with pytest.raises(ConfigError, match="must have parameters to train, got a module that is frozen as a whole"):
        build_algorithm(parse_run_config({"model": "own_frozen:net"}).resolved(), NUMBERS)
