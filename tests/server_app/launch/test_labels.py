"""The default algorithm behind an encoder: whether labels are each user's own is told by data, and said."""

import subprocess
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import small_encoders

from quickbloom.common.encoders import load_encoder
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.launch.labels import of_means
from quickbloom.server_app.launch.settings import algorithm_for, assigned

MEANINGS = np.random.default_rng(0).normal(size=(5, 8))


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    load_encoder.cache_clear()


def users(number: int, *, shuffled: bool, noise: float, seed: int = 0, first: Iterable[int] = ()) -> list[dict[int, Any]]:
    """Class means of users: class c means c, or, shuffled, what its user likes."""
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(number):
        meant = rng.permutation(5) if shuffled else np.arange(5)
        found.append({label: MEANINGS[meant[label]] + noise * rng.normal(size=8) for label in range(5)})
    return found


@pytest.mark.parametrize("seed", range(5))
def test_shared_meanings_are_told_from_names_that_each_user_gives(seed: int) -> None:
    shared, own = (of_means(users(12, shuffled=shuffled, noise=0.5, seed=seed)) for shuffled in (False, True))
    assert not shared.own
    assert own.own
    assert "by chance 20 %" in shared.why
    assert "12 users compared" in own.why


@pytest.mark.parametrize("seed", range(5))
def test_an_encoder_that_tells_nothing_apart_gives_no_reason_to_share_a_head(seed: int) -> None:
    assert of_means(users(12, shuffled=False, noise=100.0, seed=seed)).own


def test_users_who_hardly_have_the_same_classes_have_their_own() -> None:
    means = [{10 * user + label: MEANINGS[label] for label in range(5)} for user in range(4)]
    found = of_means(means)
    assert found.own
    assert found.why == "two users share 0 % of their classes on average, of 4 users compared"


def test_by_hand() -> None:
    """Of two users, each with classes 0 and 1 on a line: 0 lies nearest to 0 and 1 to 0, in one direction; both to 0 back."""
    one, other = {0: np.array([0.0]), 1: np.array([1.0])}, {0: np.array([0.4]), 1: np.array([9.0])}
    # one -> other: 0 -> 0 right, 1 -> 0 wrong; other -> one: 0 -> 0 right, 1 -> 1 right: 75 %, half way from chance.
    found = of_means([one, other])
    assert not found.own
    assert "in 75 % of cases (by chance 50 %)" in found.why


def commands(folder: Path) -> dict[str, Any]:
    """The example, whose users call five commands of their own c1 to c5, behind an encoder of its words."""
    example = Path(__file__).resolve().parents[3] / "examples" / "commands.py"
    subprocess.run([sys.executable, str(example), str(folder)], check=True)
    (folder / "trigrams_of_labels.py").write_text(
        "from sklearn.feature_extraction.text import HashingVectorizer\n\n\nclass Trigrams:\n    def __init__(self):\n"
        "        self.of = HashingVectorizer(analyzer='char_wb', ngram_range=(3, 3), n_features=512)\n\n"
        "    def encode(self, texts):\n        return self.of.transform(texts).toarray()\n"
    )
    flat = {"dataset": "own", "own.path": str(folder / "commands.csv"), "own.task-column": "user", "own.text": "said"}
    return {**flat, "own.target-column": "command", "own.encoder": "trigrams_of_labels:Trigrams"}


def test_the_commands_of_the_example_are_each_users_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(tmp_path))
    settings, why = assigned(commands(tmp_path), ["rounds=3", "temperature=0.5"])
    assert settings["algorithm"] == "protonet"
    assert settings["protonet.temperature"] == 0.5  # a key of the table of the algorithm that was chosen
    assert settings["rounds"] == 3
    assert why.startswith("Algorithm protonet, because labels seem to be each user's own: ")
    assert why.endswith("`--algorithm` decides otherwise")


def test_labels_that_mean_the_same_keep_the_usual_algorithm(tmp_path: Path) -> None:
    path = small_encoders.sentences(tmp_path / "said.csv", "ABCDEFGH")
    encoder = f"onnx:{small_encoders.text_onnx(tmp_path / 'words.onnx')[0]}"
    flat = {"dataset": "own", "own.path": str(path), "own.task-column": "user", "own.text": "said", "own.encoder": encoder}
    settings, why = assigned({**flat, "own.features": "said"}, [])
    assert settings["algorithm"] == "ridge"
    assert "labels seem to mean the same for all" in why


def test_an_algorithm_that_is_named_is_taken_without_a_look_at_the_data() -> None:
    flat = {"dataset": "own", "own.path": "nowhere.csv", "own.encoder": "onnx:nowhere.onnx", "algorithm": "fomaml"}
    assert assigned(flat, ["inner-lr=0.5"]) == ({**flat, "fomaml.inner-lr": 0.5}, "")
    assert assigned({"dataset": "uji"}, [])[1] == ""
    assert algorithm_for({"dataset": "own", "own.path": "a.csv"}, here=True) == ("ridge", "")


def test_where_the_data_are_on_the_nodes_a_sentence_says_what_was_taken() -> None:
    name, why = algorithm_for({"dataset": "own", "own.encoder": "onnx:a.onnx"}, here=False)
    assert name == "ridge"
    assert "if each user has labels of their own, add `--algorithm protonet`" in why


def test_a_mistake_in_the_settings_is_said_as_ever(tmp_path: Path) -> None:
    flat = {"dataset": "own", "own.path": str(tmp_path / "a.csv"), "own.encoder": "onnx:nowhere.onnx"}
    (tmp_path / "a.csv").write_text("task,x,y\nA,1,2\n")
    with pytest.raises(ConfigError, match=r"`own\.shotz`"):
        assigned(flat, ["own.shotz=3"])
