"""The settings `weights` and `trainable`: what a file must hold, and which parameters are trained."""

import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from quickbloom.common.errors import ConfigError
from quickbloom.common.models.pretrained import chosen, load_weights


class Net(nn.Module):
    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(4, 6), nn.LayerNorm(6), nn.ReLU(), nn.Linear(6, 6), nn.BatchNorm1d(6))
        self.head = nn.Linear(6, outputs)

    def forward(self, x: Tensor) -> Any:
        return self.head(self.body(x))


def tensors(module: nn.Module) -> dict[str, Tensor]:
    return {name: value.clone() for name, value in module.state_dict().items()}


def written(path: Path, content: Any) -> str:
    if path.suffix == ".safetensors":
        save_file(content, path)
    else:
        torch.save(content, path)
    return str(path)


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
def test_a_file_gives_the_module_all_its_tensors(tmp_path: Path, name: str) -> None:
    source, module = Net(), Net()
    source.get_buffer("body.4.running_mean").fill_(2.5)
    assert load_weights(module, written(tmp_path / name, tensors(source)), "head") == ""
    assert all(torch.equal(value, module.state_dict()[key]) for key, value in source.state_dict().items())
    assert load_weights(Net(), written(tmp_path / "wrapped.pt", {"state_dict": tensors(source)}), "head") == ""


@pytest.mark.parametrize("case", ["other classes", "none"])
def test_a_head_for_other_classes_or_none_stays_as_it_was_made_and_is_said(tmp_path: Path, case: str) -> None:
    held = tensors(Net(1000))
    if case == "none":
        held = {name: value for name, value in held.items() if not name.startswith("head")}
    module = Net()
    before = tensors(module)
    said = load_weights(module, written(tmp_path / "w.safetensors", held), "head")
    assert said == "The layer `head` starts afresh: the file of `weights` has it for other outputs, or not at all"
    assert torch.equal(module.head.weight, before["head.weight"])
    assert torch.equal(module.get_parameter("body.0.weight"), held["body.0.weight"])


def changed(change: Callable[[dict[str, Tensor]], Any]) -> dict[str, Tensor]:
    held = tensors(Net())
    change(held)
    return held


BAD: dict[str, tuple[dict[str, Tensor], str]] = {
    "missing": (changed(lambda held: held.pop("body.1.weight")), r"lacks `body\.1\.weight`: use the file of the same model"),
    "unexpected": (changed(lambda held: held.update(other=torch.ones(1))), "also has `other`: use the file of the same model"),
    "shape": (
        changed(lambda held: held.update({"body.0.weight": torch.ones(6, 5)})),
        r"has `body\.0\.weight` in the shape \(6, 5\), expected \(6, 4\)",
    ),
    "NaN": (changed(lambda held: held["body.0.bias"].fill_(torch.nan)), r"has numbers in `body\.0\.bias` that are not finite"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_file_of_another_model_is_refused_in_one_sentence_and_changes_nothing(tmp_path: Path, name: str) -> None:
    held, words = BAD[name]
    module = Net()
    before = tensors(module)
    with pytest.raises(
        ConfigError, match=f"`weights` must be a file with the tensors of the model, and '.*' {words}"
    ) as caught:
        load_weights(module, written(tmp_path / "w.safetensors", held), "head")
    assert "\n" not in str(caught.value)
    assert all(torch.equal(value, before[key]) for key, value in module.state_dict().items())


class Evil:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("name", ["w.pt", "w.pkl", "w.safetensors"])
def test_nothing_is_unpickled(tmp_path: Path, name: str) -> None:
    trap, path = tmp_path / "executed", tmp_path / name
    if name == "w.pt":
        torch.save({"body.0.weight": Evil(trap)}, path)
    else:
        path.write_bytes(pickle.dumps(Evil(trap)))
    with pytest.raises(ConfigError, match=r"nothing is unpickled|is not"):
        load_weights(Net(), str(path), "head")
    assert not trap.exists()


def test_no_file_and_no_tensors_are_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"`weights` must be a file, and there is none at '.*none\.safetensors'"):
        load_weights(Net(), str(tmp_path / "none.safetensors"), "head")
    (tmp_path / "torn.safetensors").write_bytes(b"\0" * 100)
    with pytest.raises(ConfigError, match="`weights` must be a file that can be read"):
        load_weights(Net(), str(tmp_path / "torn.safetensors"), "head")
    with pytest.raises(ConfigError, match="`weights` must be a file of tensors by name"):
        load_weights(Net(), written(tmp_path / "list.pt", [torch.ones(2)]), "head")


@pytest.mark.parametrize(
    ("trainable", "expected"),
    [
        ("head", {"head.weight", "head.bias"}),
        ("norm", {"body.1.weight", "body.1.bias", "body.4.weight", "body.4.bias"}),
        ("bias", {"body.0.bias", "body.1.bias", "body.3.bias", "body.4.bias", "head.bias"}),
        ("bias, head", {"body.0.bias", "body.1.bias", "body.3.bias", "body.4.bias", "head.bias", "head.weight"}),
        ("body.[03].weight", {"body.0.weight", "body.3.weight"}),
        ("all", {name for name, _ in Net().named_parameters()} - {"body.0.weight"}),
    ],
)
def test_words_and_patterns_name_parameters(trainable: str, expected: set[str]) -> None:
    module = Net()
    module.body[0].weight.requires_grad_(False)
    assert chosen(module, trainable, "head") == expected


def test_a_pattern_that_fits_nothing_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"fit parameters of the model \(body\.0\.weight, .*and 'encoder\.\*' fits none"):
        chosen(Net(), "head,encoder.*", "head")
