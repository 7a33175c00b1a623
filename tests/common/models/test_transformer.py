"""A pretrained encoder: its numbers are the library's, padding changes nothing, and an adapter is all that is trained."""

import json
import shutil
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

import pytest
import small_encoders
import torch
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.engine.round import TaskWork, evaluate, run_round
from quickbloom.common.errors import ConfigError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.models import build_model
from quickbloom.common.models.transformer import TransformerOptions
from quickbloom.common.randomness import generator

pytest.importorskip("transformers")
pytest.importorskip("peft")

LENGTH, SPEC = 7, DataSpec("classification", (7,), 3, tokens=small_encoders.VOCABULARY)


def build(outputs: int = 3, kind: str = "bert", seed: int = 0, **options: Any) -> nn.Module:
    table = TransformerOptions.model_validate({"directory": small_encoders.directory(kind), **options})
    return build_model("transformer", table, (LENGTH,), outputs, seed, small_encoders.VOCABULARY).eval()


def sentences(*leading: int, seed: int = 0, padded: int = 2) -> Tensor:
    """Ids without padding, then `padded` of it."""
    ids = torch.randint(1, small_encoders.VOCABULARY, (*leading, LENGTH), generator=torch.Generator().manual_seed(seed))
    if padded:
        ids[..., LENGTH - padded :] = 0
    return ids


def states(kind: str, x: Tensor) -> Tensor:
    """Those of the library, from its own mask of ones and zeros."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from transformers import AutoModel

        encoder = AutoModel.from_pretrained(small_encoders.directory(kind)).eval()
        found: Tensor = encoder(input_ids=x, attention_mask=(x != 0).long()).last_hidden_state
    return found.detach()


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "class", "last"])
def test_the_embedding_is_that_of_the_library(kind: str, pooling: str) -> None:
    x = sentences(4)
    found = build(0, kind, pooling=pooling)(x)
    wanted = states(kind, x)[:, : LENGTH - 2]
    expected = {"mean": wanted.mean(dim=1), "class": wanted[:, 0], "last": wanted[:, -1]}[pooling]
    torch.testing.assert_close(found, expected, atol=1e-6, rtol=1e-5)
    unit = build(0, kind, pooling=pooling, unit=True)(x)
    torch.testing.assert_close(unit, expected / expected.norm(dim=1, keepdim=True), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("kind", ["bert", "llama"])
@pytest.mark.parametrize("pooling", ["mean", "class", "last"])
def test_padding_changes_nothing_and_a_sentence_of_padding_alone_is_finite(kind: str, pooling: str) -> None:
    module, x = build(kind=kind, pooling=pooling), sentences(3)
    torch.testing.assert_close(module(x), module(x[:, : LENGTH - 2]), atol=1e-6, rtol=1e-5)
    assert module(torch.zeros(2, LENGTH, dtype=torch.int64)).isfinite().all()


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_an_adapter_starts_at_nothing_and_alone_is_trained(kind: str) -> None:
    plain, adapted = build(0, kind), build(0, kind, lora_rank=2)
    x = sentences(3)
    torch.testing.assert_close(adapted(x), plain(x))
    trained = {name: value for name, value in adapted.named_parameters() if value.requires_grad}
    assert all("lora_" in name for name in trained)
    # 2 layers, query and value of 8 x 8 (llama: 8 x 8 and 8 x 4), rank 2
    assert sum(value.numel() for value in trained.values()) == {"bert": 2 * 2 * 2 * 16, "llama": 2 * 2 * (16 + 12)}[kind]
    # W x + alpha / rank * B A x, by hand.
    down, up = torch.randn(2, 8), torch.randn(8, 2)
    layer = "encoder.encoder.layer.0.attention.self.query" if kind == "bert" else "encoder.layers.0.self_attn.q_proj"
    change = {f"{layer}.lora_A.default.weight": down, f"{layer}.lora_B.default.weight": up}
    moved = functional_call(adapted, change, (x,))
    with torch.no_grad():
        plain.get_submodule(layer).weight += 16.0 / 2 * up @ down  # type: ignore[operator]
    torch.testing.assert_close(moved, plain(x), atol=1e-5, rtol=1e-5)


def test_the_seed_alone_decides_what_is_drawn() -> None:
    one, same, other = (dict(build(seed=seed, lora_rank=2).named_parameters()) for seed in (3, 3, 4))
    drawn = [name for name in one if name.endswith("lora_A.default.weight") or name == "head.weight"]
    assert all(torch.equal(one[name], same[name]) for name in one)
    assert len(drawn) == 5
    assert not any(torch.equal(one[name], other[name]) for name in drawn)


@pytest.mark.parametrize("kind", ["bert", "llama"])
def test_it_is_mapped_over_tasks_to_the_second_order(kind: str) -> None:
    module = build(kind=kind, lora_rank=2).double()
    theta = {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}
    for name, value in theta.items():
        theta[name] = value + 0.1 * torch.randn(value.shape, generator=torch.Generator().manual_seed(1)).double()

    def length_of_slope(params: dict[str, Tensor], x: Tensor) -> Tensor:
        slopes = grad(lambda p: functional_call(module, p, (x,)).logsumexp(dim=1).square().mean())(params)
        return torch.stack([slope.square().sum() for slope in slopes.values()]).sum()

    x = sentences(3, 4)
    mapped = vmap(grad(length_of_slope), in_dims=(None, 0))(theta, x)
    for task in range(3):
        alone = grad(length_of_slope)(theta, x[task])
        for name, value in alone.items():
            torch.testing.assert_close(mapped[name][task], value, atol=1e-10, rtol=1e-8)
    if kind == "llama":
        return  # it normalises in float32, where differences are too coarse
    name, step = next(iter(theta)), 1e-6
    nudge = torch.zeros_like(theta[name])
    nudge[0, 0] = step
    difference = [length_of_slope({**theta, name: theta[name] + sign * nudge}, x[0]) for sign in (1, -1)]
    expected = (difference[0] - difference[1]) / (2 * step)
    assert mapped[name][0][0, 0].item() == pytest.approx(expected.item(), rel=1e-4, abs=1e-9)


def algorithm_of(name: str, **settings: Any) -> Any:
    fields = ALGORITHMS[name].Options.model_fields
    flat = {"algorithm": name, "model": "transformer", f"{name}.inner-lr": 0.1, "transformer.lora-rank": 2}
    flat |= {"transformer.directory": small_encoders.directory(), **settings}
    # Few and small steps, since each multiplies what was rounded before it.
    steps = {"inner_steps": 1, "local_steps": 1, "local_lr": 0.1}
    flat |= {f"{name}.{key.replace('_', '-')}": value for key, value in steps.items() if key in fields}
    return build_algorithm(parse_run_config(flat).resolved(), SPEC)


def work(seed: int) -> TaskWork:
    draws = (Batch.of(sentences(6, seed=seed + part), torch.arange(6) % 3) for part in (0, 100, 200))
    return TaskWork(TaskData(*draws), generator(0, str(seed)))


@pytest.mark.parametrize("name", sorted(k for k, one in ALGORITHMS.items() if "classification" in one.kinds and k != "fedbn"))
def test_every_algorithm_trains_the_adapter_and_the_head_alone(name: str) -> None:
    algorithm = algorithm_of(name)
    assert algorithm.learner.maps
    before = algorithm.learner.digest
    meta = algorithm.init()
    result = run_round(algorithm, meta, [work(1), work(2)], 128)
    loop = [run_round(algorithm, meta, [work(seed)], 128).gradient for seed in (1, 2)]
    for key, value in result.gradient.items():
        torch.testing.assert_close(value, (loop[0][key] + loop[1][key]) / 2, atol=1e-5, rtol=1e-4)
    losses, _ = evaluate(algorithm, meta, [[work(3).data]], [0.1], 2, 128)
    assert torch.from_numpy(losses).isfinite().all()
    algorithm.learner._digest = None
    assert algorithm.learner.digest == before


def test_prototypes_are_those_of_the_encoder_itself_without_a_layer_after_it() -> None:
    algorithm = algorithm_of("protonet")
    assert algorithm.options.embedding == 8
    assert all("lora_" in name for name in algorithm.init())
    data = work(1).data
    personal = [*algorithm.adaptation_path(algorithm.init(), data.support, 0.1, 1)][-1]
    embedded = build(0)(data.support.x)
    expected = torch.stack([embedded[data.support.y == label].mean(dim=0) for label in range(3)])
    torch.testing.assert_close(personal["prototypes"], expected, atol=1e-5, rtol=1e-5)


def refusal(**options: Any) -> str:
    shape, tokens = options.pop("shape", (LENGTH,)), options.pop("tokens", small_encoders.VOCABULARY)
    with pytest.raises(ConfigError) as caught:
        build_model("transformer", TransformerOptions.model_validate(options), shape, 3, 0, tokens)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_what_does_not_fit_is_one_sentence(tmp_path: Path) -> None:
    good = small_encoders.directory()
    assert "must name a directory with config.json and model.safetensors, got ''" in refusal(directory="")
    assert f"got '{tmp_path}'" in refusal(directory=str(tmp_path))
    # No name of a hub is looked up.
    assert "must name a directory" in refusal(directory="bert-base-uncased")
    wanted = f"knows {small_encoders.VOCABULARY} tokens, and the data have {small_encoders.VOCABULARY + 1}"
    assert wanted in refusal(directory=good, tokens=small_encoders.VOCABULARY + 1)
    assert "texts of up to 40 tokens, and the data have 41" in refusal(directory=good, shape=(41,))
    assert "needs sequences of tokens" in refusal(directory=good, shape=(2, 3))
    assert "`transformer.lora-targets` must name linear layers" in refusal(directory=good, lora_rank=2, lora_targets="nothing")


def copied(tmp_path: Path) -> Path:
    return Path(shutil.copytree(small_encoders.directory(), tmp_path / "copy"))


def test_weights_come_from_safetensors_alone(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "model.safetensors").unlink()
    torch.save({}, folder / "pytorch_model.bin")
    assert "must hold the weights as model.safetensors" in refusal(directory=str(folder))
    (folder / "model.safetensors").write_bytes(b"\0" * 64)
    assert "must hold an encoder that can be read" in refusal(directory=str(folder))


def test_an_encoder_without_some_of_its_weights_is_refused_instead_of_being_drawn(tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    folder = copied(tmp_path)
    held = load_file(folder / "model.safetensors")
    del held["encoder.layer.1.output.dense.weight"]
    save_file(held, folder / "model.safetensors", metadata={"format": "pt"})
    assert "lacks `encoder.layer.1.output.dense.weight`" in refusal(directory=str(folder))


def test_code_in_the_directory_is_not_run(tmp_path: Path) -> None:
    folder = copied(tmp_path)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")
    config = json.loads((folder / "config.json").read_text())
    config |= {"auto_map": {"AutoConfig": "evil.Config", "AutoModel": "evil.Model"}, "model_type": "evil"}
    (folder / "config.json").write_text(json.dumps(config))
    assert "config.json cannot be read" in refusal(directory=str(folder))
    assert not (tmp_path / "executed").exists()


def test_missing_packages_are_named_with_their_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "peft", None)
    assert "run pip install 'quickbloom[pretrained]'" in refusal(directory=small_encoders.directory(), lora_rank=2)
    monkeypatch.setitem(sys.modules, "transformers", None)
    said = refusal(directory=small_encoders.directory())
    assert (
        said == "`model = \"transformer\"` needs transformers, which is not installed: run pip install 'quickbloom[pretrained]'"
    )


def test_the_libraries_are_imported_only_where_they_are_needed() -> None:
    code = (
        "import sys, quickbloom.server_app.app, quickbloom.client_app.app, quickbloom.common.models.transformer;"
        "print([name for name in ('transformers', 'peft', 'tokenizers') if name in sys.modules])"
    )
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"


def test_a_learned_centre_starts_at_nothing_and_moves_what_a_text_is() -> None:
    plain, centred = (build(outputs=0, unit=True, centre=centre) for centre in (False, True))
    x = sentences(4)
    torch.testing.assert_close(plain(x), centred(x))
    centre = torch.linspace(-0.2, 0.3, 8)
    with torch.no_grad():
        centred.centre.at.copy_(centre)  # type: ignore[operator, union-attr]
        moved = plain(x) - centre
    torch.testing.assert_close(centred(x), moved / moved.norm(dim=1, keepdim=True))


def test_the_head_is_the_layer_behind_a_learned_centre() -> None:
    settings = {"transformer.unit": True, "transformer.centre": True, "fomaml.zero-head": True}
    algorithm = algorithm_of("fomaml", **settings)
    assert algorithm.learner.head("heads.head", "auto") == ["head.weight", "head.bias"]
    start = algorithm.init()
    zeros = {name for name, value in start.items() if not value.any() and "lora_B" not in name}
    assert zeros == {"centre.at", "head.weight", "head.bias"}


def test_an_encoder_that_does_not_say_what_padding_is_is_refused(tmp_path: Path) -> None:
    folder = shutil.copytree(small_encoders.directory("llama"), tmp_path / "llama")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "pad_token_id": None}))
    with pytest.raises(ConfigError, match="without `pad_token_id`"):
        build_model("transformer", TransformerOptions(directory=str(folder)), (LENGTH,), 3, 0, small_encoders.VOCABULARY)
