"""Personal models: kept on the node at the end of a run, never sent, and worth what the server's table says."""

import csv
import hashlib
import json
import os
import re
import resource
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loopback import LoopbackGrid
from safetensors.torch import load_file
from typer.testing import CliRunner

from quickbloom import adapt, predict
from quickbloom.client_app.cli import cli
from quickbloom.client_app.personal_models import in_words
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.own import Own, OwnOptions
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.personal import checkpoint
from quickbloom.common.personal import model as personal_model
from quickbloom.common.personal.model import Personal
from quickbloom.common.wire.messages import KEEP, KeepRequest, error_reason, payload_bytes
from quickbloom.server_app.app import run_federation

NUMBERS = {"age": (60.0, 10.0), "marker": (3.0, 2.0)}


def patients(path: Path, names: str, *, target: str = "outcome", seed: int = 0) -> Path:
    """60 rows for each of the hospitals `names`; every second one has the marker turned round. Some ages are missing."""
    rng = np.random.default_rng(seed)
    lines = [f"hospital,age,marker,sex,{target}"]
    for name in names:
        for row in range(60):
            age, marker = (rng.normal(*NUMBERS[column]) for column in NUMBERS)
            signal = (marker - 3) * (-1) ** ord(name) + 0.5 * rng.normal()
            value = f"{10 * signal + 200:.3f}" if target == "dose" else ("ill" if signal > 0 else "well")
            lines.append(f"{name},{'' if row % 7 == 0 else f'{age:.1f}'},{marker:.4f},{'mf'[row % 2]},{value}")
    path.write_text("\n".join(lines) + "\n")
    return path


def federation(tmp_path: Path, **more: Any) -> tuple[LoopbackGrid, dict[str, Any]]:
    """Three nodes with files and state directories of their own: A and B, C and D, E and F."""
    settings: dict[str, Any] = {"dataset": "own", "own.task-column": "hospital", "min-nodes": 3, "mlp.hidden": "16"}
    settings |= {"rounds": 3, "evaluate-every": 0, "validation-tasks": 2, "test-tasks": 2, "adapt-steps": 5}
    settings |= {"output-dir": str(tmp_path / "run"), **more}
    config = parse_run_config(settings)
    target = more.get("own.target-column", "outcome")
    nodes = {}
    for node, names in enumerate(("AB", "CD", "EF")):
        file = patients(tmp_path / f"{names}.csv", names, target=target, seed=node)
        nodes[node] = {"data-path": str(file), "state-dir": str(tmp_path / f"state-{node}"), "target-column": target}
    return LoopbackGrid(3, config.flat(), node_configs=nodes), {"config": config}


def per_task(run: Path) -> dict[str, dict[str, str]]:
    """The rows of held-out tasks, by name."""
    with (run / "per_task.csv").open(newline="") as file:
        return {row["task"]: row for row in csv.DictReader(file) if row["split"] != "seen"}


def test_a_file_without_a_task_column_is_one_task_from_training_to_prediction(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    lines = (tmp_path / "EF.csv").read_text().splitlines()
    alone = tmp_path / "EF.csv"
    alone.write_text("\n".join(line.partition(",")[2] for line in lines[:61]))  # E's
    run_federation(grid, more["config"])
    state = tmp_path / "state-2"
    assert sorted(path.name for path in (state / "personal").iterdir()) == ["EF.json", "EF.safetensors"]
    (kept,) = predict(state / "personal", alone).scores
    assert (kept.task, kept.part) == ("EF", "test")
    (adapted,) = adapt(state, alone, tmp_path / "again")
    (again,) = predict(tmp_path / "again", alone).scores
    assert (adapted.task, again.part, again.examples) == ("EF", "cross-validation", 60)
    assert again.value == adapted.card["score"]["after"]


@pytest.mark.parametrize("algorithm", ["fomaml", "metasgd", "protonet", "heads", "pfedme", "ditto", "apfl", "fedala"])
def test_predict_on_the_device_reproduces_the_accuracy_of_per_task_csv_exactly(tmp_path: Path, algorithm: str) -> None:
    grid, more = federation(tmp_path, algorithm=algorithm, rounds=20)
    summary = run_federation(grid, more["config"])
    rows, step = per_task(tmp_path / "run"), summary["chosen"]["adapt_steps"]
    assert len(rows) == 4
    checked = []
    for node, names in enumerate(("AB", "CD", "EF")):
        found = predict(tmp_path / f"state-{node}" / "personal", tmp_path / f"{names}.csv")
        assert [score.task for score in found.scores] == list(names)
        for score in found.scores:
            if score.task in rows:
                card = json.loads((tmp_path / f"state-{node}" / "personal" / f"{score.task}.json").read_text())
                # A held-out task keeps nothing, so it starts from the server's model.
                assert card["score"]["before"] == pytest.approx(float(rows[score.task]["accuracy_step0"]), abs=1e-6)
                assert (score.value, score.examples) == (
                    float(rows[score.task][f"accuracy_step{step}"]),
                    int(rows[score.task]["num_test"]),
                )
                checked.append(score.task)
                # By hand from what a person reads: the predictions of the test rows.
                test = [row for row in found.rows if row["task"] == score.task and row["part"] == "test"]
                hits = sum(row["prediction"] == row["target"] for row in test)
                assert hits / len(test) == pytest.approx(score.value, abs=1e-6)
    assert sorted(checked) == sorted(rows)


@pytest.mark.parametrize("scale", ["shared", "task"])
def test_predict_reproduces_the_mse_of_a_regression_and_speaks_in_the_unit_of_the_target(tmp_path: Path, scale: str) -> None:
    grid, more = federation(tmp_path, **{"own.target-column": "dose", "rounds": 10, "own.scale": scale})
    summary = run_federation(grid, more["config"])
    rows, step = per_task(tmp_path / "run"), summary["chosen"]["adapt_steps"]
    for node, names in enumerate(("AB", "CD", "EF")):
        found = predict(tmp_path / f"state-{node}" / "personal", tmp_path / f"{names}.csv")
        for score in found.scores:
            if score.task in rows:
                assert score.value == pytest.approx(float(rows[score.task][f"mse_step{step}"]), rel=1e-5)
        support = np.array([float(row["target"]) for row in found.rows if row["task"] == names[0] and row["part"] == "support"])
        test = [row for row in found.rows if row["task"] == names[0] and row["part"] == "test"]
        errors = np.array([float(row["prediction"]) - float(row["target"]) for row in test])
        # The mse is in units of the support's spread, or of that of all training tasks; the rows are in those of the file.
        card = json.loads((tmp_path / f"state-{node}" / "personal" / f"{names[0]}.json").read_text())
        spread = json.loads(card["schema"])["target_scale"][1] ** 2 if scale == "shared" else support.var()
        assert (errors**2).mean() / spread == pytest.approx(found.scores[0].value, rel=1e-4)
        if rows.get(names[0], {}).get("split") == "test":
            assert np.sqrt((errors**2).mean()) == pytest.approx(float(rows[names[0]][f"rmse_step{step}"]), rel=1e-4)


@pytest.mark.parametrize("target", ["outcome", "dose"])
def test_a_model_that_diverged_predicts_nothing_and_says_so(tmp_path: Path, target: str) -> None:
    grid, more = federation(tmp_path, **{"own.target-column": target})
    run_federation(grid, more["config"])
    (spoilt, *_) = adapt(tmp_path / "state-0", tmp_path / "AB.csv", tmp_path / "mine")
    spoilt.tensors["1.weight"].fill_(np.nan)
    personal_model.save(spoilt, tmp_path / "spoilt.safetensors")
    others = patients(tmp_path / "others.csv", "AB", target=target, seed=7)
    arguments = ["predict", "--model", str(tmp_path / "spoilt.safetensors"), "--input", str(others)]
    done = CliRunner().invoke(cli, [*arguments, "--output", str(tmp_path / "out.csv")])
    assert done.exit_code == 0, done.output
    assert "No prediction for 60 rows (the first: row 1): what the model computes there is no finite number" in flat(
        done.output
    )
    with (tmp_path / "out.csv").open(newline="") as file:
        assert {(row["prediction"], row.get("probability", "")) for row in csv.DictReader(file)} == {("", "")}
    if target == "outcome":
        assert "accuracy 0.0 %" in done.output


def flat(text: str) -> str:
    return " ".join(text.split())


def test_images_of_a_model_whose_answers_hang_on_the_batch_are_predicted_as_they_were_scored(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    tasks, light = np.repeat(list("ABCDE"), 20), np.tile([0.0, 1.0], 50)
    pixels = np.clip(rng.normal(120 + 25 * light[:, None, None], 60, size=(100, 8, 8)), 0, 255).astype(np.uint8)
    np.savez(tmp_path / "own.npz", task=tasks, image=pixels, target=np.where(light > 0, "day", "night"))
    settings: dict[str, Any] = {"dataset": "own", "min-nodes": 1, "rounds": 2, "conv4.filters": 4, "evaluate-every": 0}
    config = parse_run_config({**settings, "algorithm": "fomaml", "adapt-steps": 3, "output-dir": str(tmp_path / "run")})
    node = {"data-path": str(tmp_path / "own.npz"), "state-dir": str(tmp_path)}
    step = run_federation(LoopbackGrid(1, config.flat(), node_configs={0: node}), config)["chosen"]["adapt_steps"]
    rows = per_task(tmp_path / "run")
    found = predict(tmp_path / "personal", tmp_path / "own.npz")
    assert len(rows) == 2
    for score in found.scores:
        test = [row for row in found.rows if row["task"] == score.task and row["part"] == "test"]
        assert sum(row["prediction"] == row["target"] for row in test) / len(test) == pytest.approx(score.value, abs=1e-6)
        if score.task in rows:
            assert score.value == float(rows[score.task][f"accuracy_step{step}"])


def test_nothing_of_a_personal_model_is_sent(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    keep = [message for message in grid.requests if message.metadata.message_type == KEEP]
    assert len(keep) == 3
    reply = grid.answer(keep[0])
    assert reply is not None
    assert payload_bytes(reply.content) == 0
    assert {key for record in reply.content.values() for key in record} == {"kept"}
    card = json.loads((tmp_path / "state-0" / "personal" / "A.json").read_text())
    assert card["run"]["round"] == 3
    assert card["run"]["directory"] == "run"
    assert card["score"].keys() == {"name", "before", "after", "test"}


def test_without_a_state_dir_or_with_personal_off_nobody_is_asked(tmp_path: Path) -> None:
    grid, more = federation(tmp_path, personal=False)
    run_federation(grid, more["config"])
    assert not (tmp_path / "state-0" / "personal").exists()
    config = parse_run_config({"rounds": 1, "min-nodes": 1, "evaluate-every": 0, "output-dir": str(tmp_path / "digits")})
    bare = LoopbackGrid(1, config.flat())
    run_federation(bare, config)
    assert not [message for message in [*grid.requests, *bare.requests] if message.metadata.message_type == KEEP]


@contextmanager
def no_file_above(size: int) -> Iterator[None]:
    """The kernel refuses to let a file of this process grow beyond `size` bytes, as a full disk does."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_the_old_personal_model_and_costs_one_answer(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    folder = tmp_path / "state-0" / "personal"
    before = {file.name: file.read_bytes() for file in folder.iterdir()}
    first = next(message for message in grid.requests if message.metadata.message_type == KEEP)
    old = KeepRequest.from_records(first.content)
    first.content = KeepRequest({name: value + 1 for name, value in old.meta.items()}, 0.5, 2, 9).to_records()
    with no_file_above(500):
        reply = grid.answer(first)
    assert reply is not None
    reason = error_reason(reply.content)
    assert reason is not None
    assert "the personal model cannot be written to the node setting `state-dir`" in reason
    assert reason.endswith("the old one stays")
    assert {file.name: file.read_bytes() for file in folder.iterdir()} == before
    grid.answer(first)
    assert json.loads((folder / "A.json").read_text())["run"]["round"] == 9


def test_a_full_disk_leaves_what_adapt_wrote_before(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    adapt(tmp_path / "state-0", tmp_path / "AB.csv", tmp_path / "mine")
    before = {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()}
    with no_file_above(500), pytest.raises(ConfigError, match=r"cannot be written to .* an old one stays"):
        adapt(tmp_path / "state-0", tmp_path / "AB.csv", tmp_path / "mine")
    assert {file.name: file.read_bytes() for file in (tmp_path / "mine").iterdir()} == before


def test_a_task_that_trained_starts_from_the_head_that_it_kept(tmp_path: Path) -> None:
    grid, more = federation(tmp_path, algorithm="heads")
    run_federation(grid, more["config"])
    trained = next(path for path in sorted(tmp_path.glob("state-*/*/*.safetensors")) if path.parent.name != "personal")
    state, task = trained.parents[1], trained.stem
    params = {**checkpoint.load(state / "meta.safetensors", print).meta, **load_file(trained)}
    (file,) = (path for path in tmp_path.glob("??.csv") if task in path.stem)
    schema = checkpoint.load(state / "meta.safetensors", print).facts["schema"]
    own = Own(OwnOptions(path=str(file), task_column="hospital", target_column="outcome"), Path(), schema)
    test = own.test_draws(task)[0].test
    # The model by hand: two layers with ReLU between them.
    hidden = torch.relu(test.x @ params["1.weight"].T + params["1.bias"])
    labels = (hidden @ params["3.weight"].T + params["3.bias"]).argmax(dim=1)
    before = json.loads((state / "personal" / f"{task}.json").read_text())["score"]["before"]
    assert before == pytest.approx(float((labels == test.y).float().mean()), abs=1e-6)
    assert trained.parent.name == json.loads((state / "personal" / f"{task}.json").read_text())["run"]["lineage"]


def test_it_outlives_a_restart_and_is_replaced_by_the_next_run_that_ends(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    card = tmp_path / "state-2" / "personal" / "E.json"
    first = card.read_bytes()
    again, more = federation(tmp_path, **{"rounds": 2, "output-dir": str(tmp_path / "again")})
    assert card.read_bytes() == first
    run_federation(again, more["config"])
    now = json.loads(card.read_text())["run"]
    assert (now["round"], now["directory"]) == (2, "again")
    assert now["lineage"] != json.loads(first)["run"]["lineage"]


def test_a_device_adapts_again_from_what_it_kept_and_from_a_run_directory(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    by_hand = adapted_by_hand(tmp_path / "state-1" / "meta.safetensors", tmp_path / "CD.csv", "C")
    for source in (tmp_path / "state-1", tmp_path / "run", sorted((tmp_path / "run" / "checkpoints").iterdir())[-1]):
        models = adapt(source, tmp_path / "CD.csv", tmp_path / "mine")
        assert [model.task for model in models] == ["C", "D"]
        assert models[0].card["adapted"]["support"] == 60
        for name, value in by_hand.items():
            torch.testing.assert_close(models[0].tensors[name], value)
    # A file of somebody who was never part of it, with other names for its columns.
    text = patients(tmp_path / "new.csv", "GH", seed=9).read_text().replace("hospital", "ward", 1).replace("outcome", "end", 1)
    (tmp_path / "new.csv").write_text(text)
    models = adapt(tmp_path / "run", tmp_path / "new.csv", tmp_path / "new", task="ward", target="end")
    assert {file.name for file in (tmp_path / "new").iterdir()} == {f"{n}.{e}" for n in "GH" for e in ("json", "safetensors")}
    scores = predict(tmp_path / "new" / "G.safetensors", tmp_path / "new.csv").scores
    assert [(score.value, score.part) for score in scores] == [(models[0].card["score"]["after"], "cross-validation")]


def adapted_by_hand(checkpoint_path: Path, file: Path, task: str) -> dict[str, torch.Tensor]:
    """Gradient descent on all rows of a task, with the inputs and the two layers written out."""
    found = checkpoint.load(checkpoint_path, print)
    lr, steps = found.facts["adapt"]["lr"], found.facts["adapt"]["steps"]
    assert steps
    with file.open(newline="") as text:
        rows = [row for row in csv.DictReader(text) if row["hospital"] == task]
    columns = [np.array([float(row[name] or "nan") for row in rows]) for name in ("age", "marker")]
    scales = json.loads(found.facts["schema"])["scales"]  # of the training tasks of all nodes
    pairs = zip(("age", "marker"), columns, strict=True)
    numbers = [np.nan_to_num((column - scales[name][0]) / scales[name][1]) for name, column in pairs]
    keys = sorted("mf", key=lambda sex: hashlib.blake2b(f"sex\x1f{sex}".encode(), digest_size=8).hexdigest())
    sexes = [[float(row["sex"] == sex) for row in rows] for sex in keys]
    nothing = [0.0] * len(rows)
    x = torch.tensor(np.array([*numbers, *sexes, nothing, nothing]).T, dtype=torch.float32)
    y = torch.tensor([row["outcome"] == "well" for row in rows]).long()
    params = {name: value.clone().requires_grad_() for name, value in found.meta.items()}
    for _ in range(steps):
        hidden = torch.relu(x @ params["1.weight"].T + params["1.bias"])
        loss = torch.nn.functional.cross_entropy(hidden @ params["3.weight"].T + params["3.bias"], y)
        gradients = torch.autograd.grad(loss, list(params.values()))
        moved = zip(params.items(), gradients, strict=True)
        params = {name: (value - lr * gradient).detach().requires_grad_() for (name, value), gradient in moved}
    return {name: value.detach() for name, value in params.items()}


def few_rows(path: Path, *counts: int, source: Path) -> Path:
    """The first rows of hospital A in each class, as a file without a task column."""
    lines = source.read_text().splitlines()
    rows: list[str] = []
    for label, count in zip(("ill", "well"), counts, strict=True):
        rows += [line.partition(",")[2] for line in lines[1:] if line.startswith("A,") and line.endswith(label)][:count]
    path.write_text("\n".join([lines[0].partition(",")[2], *rows]) + "\n")
    return path


@pytest.mark.parametrize("algorithm", ["fomaml", "protonet"])
def test_one_labelled_row_of_each_class_is_enough_to_adapt(tmp_path: Path, algorithm: str) -> None:
    grid, more = federation(tmp_path, algorithm=algorithm)
    run_federation(grid, more["config"])
    said: list[str] = []
    two = few_rows(tmp_path / "two.csv", 1, 1, source=tmp_path / "AB.csv")
    (model,) = adapt(tmp_path / "run", two, tmp_path / "two", say=said.append)
    assert model.card["adapted"]["support"] == 2
    assert "from 2 rows: adapted in" in in_words(model)
    assert "not scored: that takes four different rows, of classes with at least two" in in_words(model)
    assert predict(tmp_path / "two", two).scores == []
    (score,) = predict(tmp_path / "two", rest_of(tmp_path)).scores
    assert (score.part, score.examples) == ("all", 58)


def rest_of(tmp_path: Path) -> Path:
    """What `few_rows` with one row each leaves of hospital A."""
    everything = few_rows(tmp_path / "all.csv", 60, 60, source=tmp_path / "AB.csv").read_text().splitlines()
    taken = {*(tmp_path / "two.csv").read_text().splitlines()[1:]}
    path = tmp_path / "rest.csv"
    path.write_text("\n".join(line for line in everything if line not in taken) + "\n")
    return path


def test_rows_without_targets_or_a_task_column_are_predicted_as_the_same_rows_with_them(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    lines = [line.split(",") for line in (tmp_path / "AB.csv").read_text().splitlines()]
    (tmp_path / "bare.csv").write_text("\n".join(",".join(line[1:4]) for line in lines[:61]) + "\n")
    model = tmp_path / "state-0" / "personal" / "A.safetensors"
    bare, full = predict(model, tmp_path / "bare.csv"), predict(model, tmp_path / "AB.csv")
    assert bare.scores == []
    assert [row["prediction"] for row in bare.rows] == [row["prediction"] for row in full.rows]
    # With targets, but fewer rows: other data, so all of them are scored.
    (tmp_path / "few.csv").write_text("\n".join(",".join(line) for line in lines[:31]) + "\n")
    (score,) = predict(model, tmp_path / "few.csv").scores
    rows = full.rows[:30]
    assert (score.part, score.examples) == ("all", 30)
    assert score.value == pytest.approx(sum(row["prediction"] == row["target"] for row in rows) / 30)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ("marker", "crp", "have no column `marker`"),
        ("A,", "Z,", "hold no row of the task 'A': leave the column `hospital` out"),
        ("ill", "dead", "holds the class 'dead', the model knows ill, well"),
        (",m,", ",m,", ""),
    ],
)
def test_data_that_do_not_fit_the_model_are_refused_in_one_sentence(tmp_path: Path, old: str, new: str, words: str) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    (tmp_path / "x.csv").write_text((tmp_path / "AB.csv").read_text().replace(old, new))
    model = tmp_path / "state-0" / "personal" / "A.safetensors"
    if not words:
        assert predict(model, tmp_path / "x.csv").scores
        return
    with pytest.raises(DataError, match=words):
        predict(model, tmp_path / "x.csv")


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"spec": [1]}, "`spec` is not what it should be"),
        ({"config": {"algorithm": "maml", "dataset": "own", "maml.inner-lr": 0.1}}, "the tensor `5.bias` is missing"),
        ({"config": {"algorithm": "none"}}, "`algorithm` must be one of"),
        ({"preparation": {"features": 3}}, "`preparation` is not what it should be"),
        ({"columns": {"shots": "many"}}, "cannot be used: ValidationError"),
    ],
)
def test_a_card_that_somebody_changed_is_refused_in_one_sentence(
    kept: Path, tmp_path: Path, change: dict[str, Any], words: str
) -> None:
    model = personal_model.load(kept / "state-0" / "personal" / "A.safetensors")
    checkpoint.write(tmp_path / "x.safetensors", model.tensors, {**model.card, **change}, personal_model.PERSONAL, wait=False)
    with pytest.raises(DataError, match=words) as caught:
        predict(tmp_path / "x.safetensors", kept / "AB.csv")
    assert "\n" not in str(caught.value)


def test_a_model_of_another_data_set_fits_no_file(tmp_path: Path, kept: Path) -> None:
    settings: dict[str, Any] = {"rounds": 1, "min-nodes": 1, "evaluate-every": 0, "output-dir": str(tmp_path / "digits")}
    config = parse_run_config(settings)
    run_federation(LoopbackGrid(1, config.flat(), node_configs={0: {"state-dir": str(tmp_path)}}), config)
    assert len(list((tmp_path / "personal").glob("*.safetensors"))) == 56
    with pytest.raises(DataError, match="is for the data set `digits`, and no file fits it"):
        predict(tmp_path / "personal", kept / "AB.csv")


def test_damaged_models_and_foreign_checkpoints_are_refused_in_one_sentence(tmp_path: Path) -> None:
    grid, more = federation(tmp_path)
    run_federation(grid, more["config"])
    model = tmp_path / "state-0" / "personal" / "A.safetensors"
    whole = model.read_bytes()
    for content, words in ((b"", "cannot be read"), (whole[:-9], "cannot be read"), (whole[:-1] + b"\x7f", "is damaged")):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(DataError, match=words):
            predict(tmp_path / "x.safetensors", tmp_path / "AB.csv")
    with pytest.raises(DataError, match="is no personal model"):
        predict(tmp_path / "state-0" / "meta.safetensors", tmp_path / "AB.csv")
    with pytest.raises(DataError, match="is no checkpoint"):
        adapt(model, tmp_path / "AB.csv", tmp_path / "mine")
    with pytest.raises(ConfigError, match="`--output` must be a folder for the 2 tasks A, B"):
        adapt(tmp_path / "run", tmp_path / "AB.csv", tmp_path / "one.safetensors")
    digits = parse_run_config({"rounds": 1, "min-nodes": 1, "evaluate-every": 0, "output-dir": str(tmp_path / "digits")})
    run_federation(LoopbackGrid(1, digits.flat()), digits)
    with pytest.raises(DataError, match="was trained on the data set `digits`"):
        adapt(tmp_path / "digits", tmp_path / "AB.csv", tmp_path / "mine")


@pytest.fixture(scope="module")
def kept(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A device's state directory after a run, and AB.csv beside it."""
    folder = tmp_path_factory.mktemp("kept")
    grid, more = federation(folder)
    run_federation(grid, more["config"])
    return folder


def test_the_commands_adapt_and_predict(kept: Path, tmp_path: Path) -> None:
    runner, data = CliRunner(), str(kept / "AB.csv")
    mine = ["--checkpoint", str(kept / "run"), "--data", data, "--output", str(tmp_path / "mine")]
    done = runner.invoke(cli, ["adapt", *mine])
    assert done.exit_code == 0, done.output
    assert [line.split(" (")[0] for line in done.stdout.splitlines()] == ["Personal model of A", "Personal model of B"]
    table = tmp_path / "predictions.csv"
    done = runner.invoke(cli, ["predict", "--model", str(tmp_path / "mine"), "--input", data, "--output", str(table)])
    assert done.exit_code == 0, done.output
    assert re.search(r"^A: accuracy \d+\.\d % on ", done.stderr, re.MULTILINE)
    assert "60 rows that it was adapted to, by cross-validation" in " ".join(done.stderr.split())
    assert f"Predictions for 120 rows: {table}" in done.stderr.splitlines()
    with table.open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["row"] for row in rows] == [str(number) for number in range(1, 121)]
    own, added = ["hospital", "age", "marker", "sex", "outcome"], ["task", "part", "target", "prediction", "probability"]
    assert list(rows[0]) == ["row", *own, *added, "probability_ill", "probability_well"]
    printed = runner.invoke(cli, ["predict", "--model", str(tmp_path / "mine"), "--input", data])
    assert printed.stdout == table.read_text()


@pytest.mark.parametrize(
    ("name", "before", "after", "worse"),
    [
        ("accuracy", 0.8, 0.6, True),
        ("accuracy", 0.6, 0.6, False),
        ("mse", 0.5, 0.6, True),
        ("mse", 0.6, 0.5, False),
        ("mse", 0.6, None, True),
    ],
)
def test_a_model_that_adapting_made_worse_is_called_that(name: str, before: float, after: float | None, worse: bool) -> None:
    score = {"name": name, "before": before, "after": after, "test": 1}
    line = in_words(Personal({}, {"task": "A", "run": {"round": 1}, "adapted": {"steps": 1}, "score": score}))
    assert "after 1 step, on 1 test example of its own" in line
    assert ("; adapting made it worse" in line) == worse
    assert f"{name} {f'{100 * before:.1f} %' if name == 'accuracy' else before} before" in line


@settings(max_examples=int(os.environ.get("QUICKBLOOM_FUZZ", "60")))
@given(st.sampled_from(["meta", "personal/A"]), st.floats(0, 1), st.binary(min_size=1, max_size=8), st.booleans())
def test_a_damaged_model_or_checkpoint_is_one_sentence_or_what_it_was(
    kept: Path, name: str, place: float, value: bytes, cut: bool
) -> None:
    whole = (kept / "state-0" / f"{name}.safetensors").read_bytes()
    at = int(place * len(whole))
    content = whole[:at] if cut else whole[:at] + value + whole[at + len(value) :]
    path = kept / "damaged.safetensors"
    path.write_bytes(content)
    form, what = (checkpoint.CHECKPOINT, "checkpoint") if name == "meta" else (personal_model.PERSONAL, "personal model")
    original = checkpoint.read(kept / "state-0" / f"{name}.safetensors", form, what)
    try:
        found = checkpoint.read(path, form, what)
    except DataError as error:
        assert "\n" not in str(error)  # noqa: PT017 - most are refused, and a bit of padding is not
        return
    assert found.facts == original.facts
    assert all(torch.equal(value, found.tensors[key]) for key, value in original.tensors.items())
