"""Whole runs of partly trained models: constants are on no wire, and a node with others is refused before anything starts."""

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pretrained_like
import pytest
import small_encoders
import torch
from flwr.app import ArrayRecord, Message
from loopback import LoopbackGrid
from safetensors.torch import save_file
from typer.testing import CliRunner

from quickbloom.client_app.cli import cli
from quickbloom.common.config.run import parse_run_config
from quickbloom.common.datasets.base import DataSpec
from quickbloom.common.engine.build import build_algorithm, constants_of
from quickbloom.common.errors import ConfigError, DataError
from quickbloom.common.personal import checkpoint
from quickbloom.server_app.app import run_federation

SMALL: dict[str, Any] = {
    "dataset": "digits",
    "algorithm": "fomaml",
    "rounds": 2,
    "evaluate-every": 1,
    "adapt-steps": 2,
    "min-nodes": 1,
    "baselines": False,
    "seed": 3,
}
HEAD = {"2.weight", "2.bias", "4.weight", "4.bias"}


class Watched(LoopbackGrid):
    """Keeps what every message holds, both ways: the bytes of its arrays, one entry for a message that has some."""

    def __init__(self, *args: Any, **more: Any) -> None:
        super().__init__(*args, **more)
        self.arrays: list[bytes] = []

    def answer(self, message: Message) -> Message | None:
        self._keep(message)
        found = super().answer(message)
        if found is not None:
            self._keep(found)
        return found

    def _keep(self, message: Message) -> None:
        records = [record for record in message.content.values() if isinstance(record, ArrayRecord)]
        found = [array.numpy().tobytes() for record in records for array in record.values()]
        self.arrays += [b"".join(found)] if found else []


def run(folder: Path, nodes: int = 2, node_configs: dict[int, dict[str, Any]] | None = None, **changes: Any) -> Watched:
    flat = {**SMALL, "output-dir": str(folder), **{key.replace("__", ".").replace("_", "-"): v for key, v in changes.items()}}
    config = parse_run_config(flat)
    grid = Watched(nodes, config.flat(), node_configs=node_configs)
    run_federation(grid, config)
    return grid


def last(folder: Path) -> checkpoint.Checkpoint:
    return checkpoint.load(folder, lambda sentence: None)


@pytest.mark.parametrize("algorithm", ["fedavg", "reptile", "fomaml", "protonet", "anil"])
def test_only_what_is_trained_is_on_the_wire(tmp_path: Path, algorithm: str) -> None:
    grid = run(tmp_path / "run", model="pretrained_like:resnet", algorithm=algorithm)
    outputs = 64 if algorithm == "protonet" else 5
    numbers = 8 * 8 + 8 + 8 * outputs + outputs
    frozen = (
        pretrained_like.resnet((1, 8, 8), outputs).get_buffer("0.1.running_mean").numpy().tobytes()
    )  # the same in every process
    assert len(grid.arrays) > 8
    for sent in grid.arrays:
        assert frozen not in sent
        assert len(sent) == 4 * numbers
    assert set(last(tmp_path / "run").meta) == HEAD


def test_one_node_and_three_learn_the_same(tmp_path: Path) -> None:
    metas = []
    for nodes in (1, 3):
        run(tmp_path / str(nodes), nodes, model="pretrained_like:resnet", algorithm="reptile")
        metas.append(last(tmp_path / str(nodes)).meta)
    for name, value in metas[0].items():
        torch.testing.assert_close(value, metas[1][name], atol=1e-6, rtol=1e-6)


def weights(folder: Path, seed: int, shape: tuple[int, ...] = (1, 8, 8), outputs: int = 5) -> str:
    """A file of weights for mlp with hidden layers of 7 and 5."""
    config = parse_run_config({**SMALL, "model": "mlp", "mlp.hidden": "7,5", "seed": seed}).resolved()
    module = build_algorithm(config, DataSpec("classification", shape, outputs)).learner.module
    path = folder / f"weights-{seed}.safetensors"
    save_file(module.state_dict(), path)
    return str(path)


def test_a_node_with_other_weights_is_refused_with_both_hashes_and_the_others_train(tmp_path: Path) -> None:
    mine, other = weights(tmp_path, 1), weights(tmp_path, 2)
    said: list[str] = []
    flat: dict[str, Any] = {**SMALL, "model": "mlp", "mlp.hidden": "7,5", "trainable": "head", "weights": mine}
    config = parse_run_config({**flat, "output-dir": str(tmp_path / "run")})
    grid = Watched(3, config.flat(), node_configs={1: {"weights": other}, 2: {"weights": str(tmp_path / "none.pt")}})
    from quickbloom.server_app.events.channel import Events
    from quickbloom.server_app.events.kinds import Warned

    summary = run_federation(
        grid, config, Events(lambda event: said.append(event.sentence) if isinstance(event, Warned) else None)
    )
    spec = DataSpec("classification", (1, 8, 8), 5)
    ours, theirs = (constants_of(parse_run_config({**flat, "weights": path}).resolved(), spec) for path in (mine, other))
    assert ours != theirs
    refused = [sentence for sentence in said if "does not take part" in sentence]
    assert len(refused) == 2
    assert (
        f"Node 101 does not take part: the constants of its model have the SHA-256 {theirs}, the server's {ours}" in refused[0]
    )
    assert "`weights` must be a file, and there is none at" in refused[1]
    assert summary["tasks"]["train"] > 0
    assert {m.metadata.dst_node_id for m in grid.requests if m.metadata.message_type.startswith(("train", "evaluate"))} == {100}
    assert last(tmp_path / "run").facts["constants"] == ours


def test_nodes_that_all_differ_end_the_run_in_one_sentence(tmp_path: Path) -> None:
    mine, other = weights(tmp_path, 1), weights(tmp_path, 2)
    with pytest.raises(ConfigError, match=r"`min-nodes` is 1, but 0 usable nodes answered.*SHA-256 [0-9a-f]{64}"):
        run(
            tmp_path / "run",
            1,
            {0: {"weights": other}},
            model="mlp",
            mlp__hidden="7,5",
            trainable="head",
            weights=mine,
            node_deadline=1.0,
        )


def test_a_run_goes_on_only_with_the_constants_that_it_began_with(tmp_path: Path) -> None:
    mine, other = weights(tmp_path, 1), weights(tmp_path, 2)
    settings: dict[str, Any] = {"model": "mlp", "mlp__hidden": "7,5", "trainable": "head"}
    run(tmp_path / "whole", **settings, weights=mine, rounds=3)
    run(tmp_path / "run", **settings, weights=mine, rounds=3)
    first = str(tmp_path / "run" / "checkpoints" / "round-000001.safetensors")
    with pytest.raises(DataError, match="the run to go on from was trained with constants"):
        run(tmp_path / "other", **settings, weights=other, rounds=3, resume_from=first)
    run(tmp_path / "again", **settings, weights=mine, rounds=3, resume_from=first)
    for name, value in last(tmp_path / "whole").meta.items():
        assert torch.equal(value, last(tmp_path / "again").meta[name])


def own_file(folder: Path) -> Path:
    rng = np.random.default_rng(0)
    rows = [
        f"w{ward},{a:.3f},{b:.3f},{'yes' if a * (-1) ** ward > b else 'no'}"
        for ward in range(6)
        for a, b in rng.normal(size=(20, 2))
    ]
    path = folder / "wards.csv"
    path.write_text("task,a,b,target\n" + "\n".join(rows) + "\n")
    return path


@pytest.fixture(scope="module")
def personal(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str, str]:
    """The state of a node after a run that trained the head alone, and two files of weights: its own, and another."""
    folder = tmp_path_factory.mktemp("personal")
    data, state = own_file(folder), folder / "state"
    mine, other = weights(folder, 1, (2,), 2), weights(folder, 2, (2,), 2)
    flat: dict[str, Any] = {
        **SMALL,
        "dataset": "own",
        "model": "mlp",
        "mlp.hidden": "7,5",
        "trainable": "head",
        "weights": mine,
    }
    config = parse_run_config({**flat, "output-dir": str(folder / "run")})
    node = {"data-path": str(data), "task-column": "task", "state-dir": str(state)}
    run_federation(Watched(1, config.flat(), node_configs={0: node}), config)
    return state, mine, other


def edge(*arguments: Any) -> str:
    done = CliRunner().invoke(cli, [str(part) for part in arguments], catch_exceptions=True)
    assert "Traceback" not in done.output
    said = re.sub(r"\s+", " ", done.output)
    return f"{done.exit_code} {said} {done.exception or ''}"


def test_a_personal_model_holds_no_constants_and_works_with_the_file_that_the_user_names(
    personal: tuple[Path, str, str], tmp_path: Path
) -> None:
    state, mine, other = personal
    model = next((state / "personal").glob("*.safetensors"))
    found = checkpoint.read(model, "quickbloom-personal-1", "personal model")
    assert set(found.tensors) == {"5.weight", "5.bias"}
    assert len(found.facts["constants"]) == 64
    assert "weights" not in found.facts["config"]
    data = state.parent / "wards.csv"
    assert "trained with constants (frozen weights) of SHA-256" in edge("predict", "--model", model, "--input", data)
    said = edge("predict", "--model", model, "--input", data, "--set", f"weights={other}")
    assert "trained with constants" in said
    assert "one of weights" in edge("predict", "--model", model, "--input", data, "--set", "rounds=3")
    with_it = ("--set", f"weights={mine}")
    assert edge("predict", "--model", model, "--input", data, "--output", tmp_path / "p.csv", *with_it).startswith("0 ")
    assert edge("export", "--model", model, "--output", tmp_path / "m.pt2", "--format", "torch", *with_it).startswith("0 ")
    assert (tmp_path / "m.pt2").exists()
    assert edge(
        "adapt", "--checkpoint", state, "--data", data, "--task", "task", "--output", tmp_path / "made", *with_it
    ).startswith("0 ")
    assert len(list((tmp_path / "made").glob("*.safetensors"))) == 6
    assert "trained with constants" in edge("adapt", "--checkpoint", state, "--data", data, "--output", tmp_path / "no")


@pytest.mark.parametrize("algorithm", ["protonet", "fomaml"])
def test_a_personal_adapter_names_its_encoder_and_is_exported_with_it(tmp_path: Path, data_dir: Path, algorithm: str) -> None:
    pytest.importorskip("transformers")
    pytest.importorskip("peft")
    place = small_encoders.directory()
    flat = {"dataset": "intents", "intents.tokenizer": place, "transformer.directory": place, "transformer.lora-rank": 2}
    flat |= {"intents.train-clients": 3, "intents.validation-clients": 1, "intents.test-clients": 1, "data-dir": str(data_dir)}
    flat |= {"intents.test-episodes": 1, "algorithm": algorithm, "rounds": 1, "output-dir": str(tmp_path / "run")}
    config = parse_run_config({**SMALL, **flat})
    grid = Watched(1, config.flat(), node_configs={0: {"state-dir": str(tmp_path / "state")}})
    run_federation(grid, config)
    # 2 layers, query and value of 8 x 8, rank 2: 128 numbers; fomaml also has a head of 8 x 10 + 10.
    assert max(len(sent) for sent in grid.arrays) == 4 * (128 + (90 if algorithm == "fomaml" else 0))
    model = tmp_path / "state" / "personal" / "test-000.safetensors"
    settings = checkpoint.read(model, "quickbloom-personal-1", "personal model").facts["config"]
    assert not {"transformer.directory", "intents.tokenizer"} & settings.keys()
    export = ("export", "--model", model, "--output", tmp_path / "m.pt2", "--format", "torch")
    assert "name it by `--set transformer.directory=DIRECTORY`" in edge(*export)
    other = small_encoders.directory("bert", 1)
    assert "trained with constants" in edge(*export, "--set", f"transformer.directory={other}")
    assert edge(*export, "--set", f"transformer.directory={place}").startswith("0 ")


def test_a_node_may_have_the_directory_elsewhere(tmp_path: Path, data_dir: Path) -> None:
    pytest.importorskip("transformers")
    place = Path(small_encoders.directory())
    moved = shutil.copytree(place, tmp_path / "moved")
    flat = {"dataset": "intents", "intents.tokenizer": str(place), "transformer.directory": str(place), "rounds": 1}
    flat |= {"intents.train-clients": 3, "intents.validation-clients": 1, "intents.test-clients": 1, "data-dir": str(data_dir)}
    flat |= {"intents.test-episodes": 1, "algorithm": "protonet", "trainable": "norm", "output-dir": str(tmp_path / "run")}
    config = parse_run_config({**SMALL, **flat})
    (moved / "tokenizer_config.json").unlink()
    from quickbloom.client_app import node

    asked: list[str] = []

    def noted(run: Any, *args: Any, **more: Any) -> Any:
        asked.append(run.table("transformer").directory)
        return build_algorithm(run, *args, **more)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(node, "build_algorithm", noted)
        run_federation(Watched(2, config.flat(), node_configs={1: {"model-directory": str(moved)}}), config)
    assert set(asked) == {str(place), str(moved)}


def test_a_model_that_starts_from_a_file_and_trains_all_of_it_needs_the_file_only_where_it_starts(tmp_path: Path) -> None:
    mine = weights(tmp_path, 1)
    run(tmp_path / "run", 2, {1: {"weights": str(tmp_path / "none.pt")}}, model="mlp", mlp__hidden="7,5", weights=mine)
    found = checkpoint.load(tmp_path / "run" / "checkpoints" / "round-000000.safetensors", lambda sentence: None)
    from safetensors.torch import load_file

    assert all(torch.equal(value, load_file(mine)[name]) for name, value in found.meta.items())
    assert found.facts["constants"] == ""
