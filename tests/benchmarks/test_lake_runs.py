"""The benchmark of Lake's 20 runs, on made-up ones: what it reads, and errors that are known."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import lake_runs
from quickbloom.client_app.offline.scoring import score
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm
from quickbloom.common.errors import DataError
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal.model import description


def made_up(path: Path, **changed: Any) -> Path:
    """Each test image is the training image of its class, a little fainter; in run 4 one test image is said to be another."""
    rng = np.random.default_rng(0)
    train = (rng.random((20, 20, 28, 28)) < 0.2).astype(np.uint8) * 255
    true = np.stack([rng.permutation(20) for _ in range(20)])
    test = np.stack([train[run, true[run]] for run in range(20)]) // 255 * 200
    told = true.copy()
    told[4, 7] = (true[4, 7] + 1) % 20
    np.savez(path, **{"train_images": train, "test_images": test.astype(np.uint8), "true_class": told, **changed})
    return path


def pixels(path: Path) -> Path:
    """A checkpoint whose prototypes are the images themselves."""
    config = parse_run_config({"algorithm": "protonet", "dataset": "omniglot", "model": "residual"}).resolved()
    spec = DataSpec("classification", (1, 28, 28), 5)
    meta = build_algorithm(config, spec).init()
    facts = {**description(config, spec, ""), "round": 1, "lineage": "l", "run": "r", "adapt": {"lr": 0.1, "steps": 1}}
    checkpoint.write(path, {f"meta/{name}": value for name, value in meta.items()}, facts, wait=False)
    return path


def test_errors_of_made_up_runs_are_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    runs, model = made_up(tmp_path / "runs.npz"), pixels(tmp_path / "c.safetensors")
    found = score(model, lake_runs.read_runs(runs))
    assert found.alone == [0.05 if run == 4 else 0 for run in range(20)]
    monkeypatch.setattr("sys.argv", ["lake_runs", "--runs", str(runs), "--checkpoint", str(model), "--refine", "1"])
    lake_runs.main()
    lines = capsys.readouterr().out.splitlines()
    assert lines[2] == f"| {model} | 0.25 | 0.25 | 0.25 |"
    assert "| people (recalled) | 4.5 | | |" in lines


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"true_class": np.full((20, 20), 20)}, "`true_class` in .* must hold values 0..19, got 20"),
        ({"true_class": np.zeros((20, 20))}, r"`true_class` in .* whole numbers of shape \(20, 20\), got float64 \(20, 20\)"),
        ({"test_images": np.zeros((20, 20, 105, 105), np.uint8)}, "`test_images` in .* must have shape"),
        ({"test_images": np.zeros((20, 20, 28, 28))}, "`test_images` in .* must have dtype uint8, got float64"),
        ({"train_images": np.full((20, 20, 28, 28), 255, np.uint8)}, "`train_images` in .* must be ink of 255 on paper of 0"),
    ],
)
def test_a_file_of_another_form_is_one_sentence(tmp_path: Path, changed: dict[str, Any], said: str) -> None:
    with pytest.raises(DataError, match=said):
        lake_runs.read_runs(made_up(tmp_path / "runs.npz", **changed))
