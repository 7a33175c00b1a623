"""`quickbloom-edge score`: errors of a checkpoint on foreign episodes, worked by hand where prototypes decide."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

import quickbloom
from quickbloom.client_app.cli import cli
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.datasets.omniglot import fitted
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal.model import description

NUMBERS = DataSpec("classification", (1,), 5)
IMAGES = DataSpec("classification", (1, 28, 28), 5)


def saved(path: Path, spec: DataSpec = NUMBERS, **settings: Any) -> Path:
    """A checkpoint before training. Its model `residual` is then the identity, so prototypes are means of the inputs."""
    flat = {"algorithm": "protonet", "dataset": "omniglot", "model": "residual", "adapt-steps": 1}
    config = parse_run_config({**flat, **{key.replace("__", "."): value for key, value in settings.items()}}).resolved()
    meta = build_algorithm(config, spec).init()
    facts = {**description(config, spec, ""), "round": 3, "lineage": "l", "run": "r", "adapt": {"lr": 0.1, "steps": 1}}
    checkpoint.write(path, {f"meta/{name}": value for name, value in meta.items()}, facts, wait=False)
    return path


def numbers(support: dict[str, list[float]], query: dict[str, list[float]]) -> dict[str, Any]:
    arrays: dict[str, Any] = {}
    for part, given in (("support", support), ("query", query)):
        arrays[f"{part}_x"] = np.array([[value] for values in given.values() for value in values])
        arrays[f"{part}_y"] = np.array([label for label, values in given.items() for _ in values])
    return arrays


def test_the_nearest_prototype_by_hand(tmp_path: Path) -> None:
    """Prototypes 1 (of 0 and 2) and 5 meet at 3: of the queries 2.9 and 3.1 of a, and 9 of b, one of three is wrong."""
    episode = numbers({"a": [0, 2], "b": [5]}, {"a": [2.9, 3.1], "b": [9]})
    found = quickbloom.score(saved(tmp_path / "c.safetensors"), episode, together=True)
    assert found.alone == found.together == pytest.approx([1 / 3])
    assert (found.queries, found.round, found.steps, found.refined) == (3, 3, 1, None)
    # Any number of episodes, of any number of classes, from files too.
    more = numbers({"x": [0], "y": [10], "z": [20]}, {"z": [16, 14], "y": [11, 9]})
    np.savez(tmp_path / "more.npz", **more)
    found = quickbloom.score(tmp_path / "c.safetensors", [episode, str(tmp_path / "more.npz")])
    assert found.alone == pytest.approx([1 / 3, 1 / 4])
    assert found.error == pytest.approx(7 / 24)


def test_refined_prototypes_by_hand(tmp_path: Path) -> None:
    """A temperature of 0.001 makes shares 0 or 1. Prototypes 0 and 10 meet at 5, so 5.2 is taken for b: one of four is wrong.

    Moved once, a is the mean of 0, 4, 4.9, 4.9 and b that of 10 and 5.2; 3.45 and 7.6 meet at 5.525, so 5.2 is a.
    """
    path = saved(tmp_path / "c.safetensors", protonet__temperature=0.001)
    found = quickbloom.score(path, numbers({"a": [0], "b": [10]}, {"a": [4, 4.9, 4.9, 5.2]}), refine=1)
    assert found.alone == pytest.approx([1 / 4])
    assert found.refined == pytest.approx([0])
    # A run that refines is scored without where each query stands alone.
    refining = saved(tmp_path / "r.safetensors", protonet__temperature=0.001, protonet__refine=True)
    assert quickbloom.score(refining, numbers({"a": [0], "b": [10]}, {"a": [4, 4.9, 4.9, 5.2]}), steps=3).alone == [0.25]


def episodes(seed: int = 0) -> dict[str, Any]:
    """Three episodes of four classes with two queries each; u8 images."""
    rng = np.random.default_rng(seed)
    shapes = rng.integers(0, 256, (3, 4, 1, 28, 28))
    noisy = np.clip(shapes + rng.normal(0, 90, (3, 4, 3, 28, 28)), 0, 255).astype(np.uint8)
    y = np.tile(np.arange(4), (3, 1))
    query = noisy[:, :, 1:].reshape(3, 8, 28, 28)
    return {"support_x": noisy[:, :, 0], "support_y": y, "query_x": query, "query_y": y.repeat(2, axis=1)}


def test_batch_norm_takes_the_support_or_all_queries_together(tmp_path: Path) -> None:
    settings: dict[str, Any] = {"model": "conv4", "conv4__norm": "batch", "conv4__filters": 8, "omniglot__fit": True}
    path, given = saved(tmp_path / "c.safetensors", IMAGES, **settings), episodes()
    found = quickbloom.score(path, given, together=True)
    flat = {"algorithm": "protonet", "dataset": "omniglot", "model": "conv4", "conv4.norm": "batch", "conv4.filters": 8}
    algorithm = build_algorithm(parse_run_config(flat).resolved(), DataSpec("classification", (1, 28, 28), 4))

    def wrong(at: int, *, together: bool) -> float:
        x, y = (torch.from_numpy(fitted(given[f"{part}_x"][at])).unsqueeze(1) / 255 for part in ("support", "query"))
        theta = algorithm.init()
        labels = torch.from_numpy(given["query_y"][at])
        with torch.no_grad():
            stats = {} if together else algorithm.learner.statistics(theta, x)
            prototypes, embedded = algorithm.learner.apply(theta, x), algorithm.learner.apply({**theta, **stats}, y)
        return float((torch.cdist(embedded, prototypes).argmin(dim=1) != labels).double().mean())

    assert found.alone == pytest.approx([wrong(at, together=False) for at in range(3)])
    assert found.together == pytest.approx([wrong(at, together=True) for at in range(3)])


def test_the_command_prints_lines_and_json(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.safetensors")
    np.savez(tmp_path / "e.npz", **numbers({"a": [0, 2], "b": [5]}, {"a": [2.9, 3.1]}))
    line = ["score", "--checkpoint", str(path), "--episodes", str(tmp_path / "e.npz"), "--refine", "1"]
    done = CliRunner().invoke(cli, line)
    assert done.exit_code == 0
    assert done.stdout.splitlines()[0] == "error 50.0 %: each query alone (1 episode, 2 examples)"
    facts = json.loads(CliRunner().invoke(cli, [*line, "--json"]).stdout)
    assert facts["error"]["alone"] == {"mean": 0.5, "ci95": None, "each": [0.5]}
    assert (facts["error"]["together"], facts["episodes"], facts["queries"], facts["refinements"]) == (None, 1, 2, 1)


GOOD = numbers({"a": [0], "b": [10]}, {"a": [4.0], "b": [6.0]})


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"query_y": np.array(["a", "c"])}, "every label of `query_y` must be in `support_y`, 'c' is not"),
        ({"query_x": np.array([[np.nan], [1.0]])}, "`query_x` holds NaN or infinite values"),
        ({"query_x": np.zeros((3, 1))}, r"`query_y` must have the shape \[n\].* got \(2,\) and \(3, 1\)"),
        ({"support_x": np.zeros((2, 7)), "query_x": np.zeros((2, 7))}, r"an input must have the shape \(1,\) .* got \(7,\)"),
        ({"support_y": np.array([0.5, 1.5])}, "`support_y` must hold labels, whole numbers or texts, got float64"),
        ({"support_y": np.array(["a", "a"]), "query_y": np.array(["a", "a"])}, "two labels or more, got 'a' alone"),
        ({"support_x": np.array([["1"], ["2"]])}, "`support_x` must hold numbers, got <U1"),
        ({"query_y": np.zeros(0, dtype=int), "query_x": np.zeros((0, 1))}, "with n above 0"),
    ],
)
def test_arrays_that_do_not_fit_are_one_sentence(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    path = saved(tmp_path / "c.safetensors")
    with pytest.raises(DataError, match=said):
        quickbloom.score(path, {**GOOD, **changed})


def test_files_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    path = saved(tmp_path / "c.safetensors")
    with pytest.raises(DataError, match="the array `query_y` is missing, expected support_x"):
        quickbloom.score(path, {name: values for name, values in GOOD.items() if name != "query_y"})
    (tmp_path / "e.npz").write_text("no archive")
    done = CliRunner().invoke(cli, ["score", "--checkpoint", str(path), "--episodes", str(tmp_path / "e.npz")])
    assert isinstance(done.exception, DataError)
    assert "must be an .npz archive with the arrays support_x" in str(done.exception)
    with pytest.raises(DataError, match="does not exist"):
        quickbloom.score(path, tmp_path / "none.npz")
    with pytest.raises(ConfigError, match="episodes must be the path of an"):
        quickbloom.score(path, 7)


def test_checkpoints_that_do_not_fit_are_one_sentence(tmp_path: Path) -> None:
    numbers_alone = DataSpec("regression", (1,), 1)
    with pytest.raises(DataError, match="was trained on numbers"):
        quickbloom.score(saved(tmp_path / "n.safetensors", numbers_alone, algorithm="fomaml", model="mlp"), GOOD)
    maml = saved(tmp_path / "m.safetensors", algorithm="fomaml", model="mlp")
    assert 0 <= quickbloom.score(maml, GOOD).error <= 1
    with pytest.raises(ConfigError, match="`--refine` moves prototypes, which `fomaml` has not"):
        quickbloom.score(maml, GOOD, refine=2)
    many = numbers({str(i): [i] for i in range(6)}, {"0": [0]})
    with pytest.raises(DataError, match="must have an output for each class, and this one has 5 for 6"):
        quickbloom.score(maml, many)
