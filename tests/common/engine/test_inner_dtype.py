"""`inner-dtype = bfloat16`: products are rounded as bfloat16 rounds them, and what is trained stays float32."""

from pathlib import Path
from typing import Any

import pytest
import small_encoders
import torch

from quickbloom.common.algorithms import Algorithm
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.maths.fast_paths import has_kernels, is_written_out
from quickbloom.common.personal.model import description
from quickbloom.common.randomness import generator

SPEC = DataSpec("classification", (7,), 3, tokens=small_encoders.VOCABULARY)
NUMBERS = DataSpec("classification", (6,), 3)


def lora(algorithm: str, dtype: str) -> Algorithm:
    flat = {"model": "transformer", "transformer.directory": small_encoders.directory("bert"), "transformer.lora-rank": 2}
    flat |= {f"{algorithm}.inner-lr": 0.01}  # larger steps amplify any difference
    return build_algorithm(parse_run_config({**flat, "algorithm": algorithm, "inner-dtype": dtype}).resolved(), SPEC)


def own(folder: Path, monkeypatch: pytest.MonkeyPatch, name: str, code: str, algorithm: str = "fomaml") -> Algorithm:
    (folder / f"{name}.py").write_text(f"import torch\nfrom torch import nn\n{code}")
    monkeypatch.syspath_prepend(str(folder))
    flat = {"model": f"{name}:make", "algorithm": algorithm, "inner-dtype": "bfloat16"}
    return build_algorithm(parse_run_config(flat).resolved(), NUMBERS)


def sentences(seed: int) -> TaskData:
    draw = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, small_encoders.VOCABULARY, (18, 7), generator=draw)
    batch = Batch.of(ids, torch.arange(18) % 3)
    return TaskData(batch.first(2), batch, batch)


def gradient(algorithm: Algorithm) -> dict[str, torch.Tensor]:
    meta = {name: value + 0.1 for name, value in algorithm.init().items()}  # B of an adapter starts at 0
    return run_round(
        algorithm, meta, [TaskWork(sentences(seed), generator(0, str(seed))) for seed in (1, 2)], chunk_size=2
    ).gradient


def flat(params: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([params[name].flatten() for name in sorted(params)])


@pytest.mark.parametrize("algorithm", ["maml", "fomaml", "reptile", "protonet", "anil"])
def test_gradients_of_an_adapter_are_float32_and_close_to_those_of_float32(algorithm: str) -> None:
    found, exact = gradient(lora(algorithm, "bfloat16")), gradient(lora(algorithm, "float32"))
    assert {value.dtype for value in found.values()} == {torch.float32}
    ours, right = flat(found), flat(exact)
    assert not torch.equal(ours, right)
    assert (ours - right).norm() <= 0.1 * right.norm()  # 8 bits, over a dozen products one after the other


def test_a_product_is_that_of_rounded_numbers_and_comes_back_in_float32(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    algorithm = own(tmp_path, monkeypatch, "one_layer", "def make(shape, outputs):\n    return nn.Linear(6, outputs)\n")
    learner, x = algorithm.learner, torch.randn(5, 6, generator=torch.Generator().manual_seed(0))
    params = learner.initial()
    weight, bias = (value.bfloat16() for value in params.values())
    by_hand = torch.nn.functional.linear(x.bfloat16(), weight, bias)
    found = learner.apply(params, x)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, by_hand.float(), rtol=0, atol=0)
    assert not has_kernels(learner)
    assert not is_written_out(learner)


def test_scoring_works_in_bfloat16() -> None:
    algorithm = lora("fomaml", "bfloat16")
    losses, metrics = evaluate(algorithm, algorithm.init(), [[sentences(1)]], [0.1], 2, 1)
    exact = lora("fomaml", "float32")
    right, _ = evaluate(exact, exact.init(), [[sentences(1)]], [0.1], 2, 1)
    torch.testing.assert_close(torch.as_tensor(losses), torch.as_tensor(right), rtol=0.1, atol=0.05)
    assert ((metrics >= 0) & (metrics <= 1)).all()


@pytest.mark.parametrize("model", ["mlp", "linear"])
def test_small_models_trained_as_a_whole_refuse_it(model: str) -> None:
    config = parse_run_config({"model": model, "algorithm": "fomaml", "inner-dtype": "bfloat16"}).resolved()
    with pytest.raises(ConfigError, match=f'`inner-dtype` must be "float32" with `model = "{model}"`, which is small'):
        build_algorithm(config, NUMBERS)


def test_a_partly_trained_model_takes_it() -> None:
    flat = {"model": "mlp", "algorithm": "fomaml", "trainable": "head", "inner-dtype": "bfloat16"}
    algorithm = build_algorithm(parse_run_config(flat).resolved(), NUMBERS)
    assert algorithm.learner.reduced == torch.bfloat16


def test_a_model_that_cannot_be_computed_in_it_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    code = """
class Fussy(nn.Module):
    def __init__(self, outputs):
        super().__init__()
        self.layer = nn.Linear(6, outputs)

    def forward(self, x):
        made = self.layer(x)
        if made.dtype != torch.float32:
            raise TypeError("float32 is all that I know")
        return made


def make(shape, outputs):
    return Fussy(outputs)
"""
    with pytest.raises(ConfigError, match=r'`inner-dtype` must be "float32" .* in bfloat16 \(.*float32 is all that I know'):
        own(tmp_path, monkeypatch, "fussy", code)


def test_a_device_that_adapts_decides_for_itself() -> None:
    flat: dict[str, Any] = {"model": "mlp", "trainable": "head", "inner-dtype": "bfloat16"}
    assert "inner-dtype" not in description(parse_run_config(flat).resolved(), NUMBERS, "")["config"]
