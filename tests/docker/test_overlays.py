"""docker/scale.yml with five nodes, docker/monitor.yml and docker/metrics.yml beside it, in a real Docker engine."""

import json
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from containers import federation
from prometheus_client.parser import text_string_to_metric_families
from real_processes import curve, numbers, quickbloom

from benchmarks.compose import Federation, docker, kill, until
from quickbloom.server_app.launch.flower_run import free_port

pytestmark = pytest.mark.docker

BOARD, FIGURES = free_port(), free_port()
SETTINGS = ["--algorithm", "fomaml", "--seed", "3", "--rounds", "2"]


@pytest.fixture(scope="module")
def five_nodes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Federation]:
    home = tmp_path_factory.mktemp("overlays")
    env = {"QUICKBLOOM_NODES": "5", "QUICKBLOOM_MONITOR": f"127.0.0.1:{BOARD}", "QUICKBLOOM_METRICS": f"127.0.0.1:{FIGURES}"}
    with federation("quickbloom-test-scale", home, ("scale", "monitor", "metrics"), **env) as it:
        it.until_healthy("superlink", "superexec", "supernode", "monitor", "metrics")
        yield it


def keys(of: Federation) -> list[str]:
    """Whose key every replica says that it took last, in order."""
    said = [docker("logs", container).stdout for container in of.containers("supernode")]
    return sorted(text.rpartition("this replica is ")[2].split(" of ")[0] for text in said)


def test_a_run_on_five_nodes_has_the_curve_of_one_process_and_tensorboard_shows_it(
    five_nodes: Federation, tmp_path: Path
) -> None:
    run = five_nodes.start("quickbloom", "run", *SETTINGS, "--set", "min-nodes=5", "--set", "node-deadline=300", "--json")
    out, said = run.communicate(timeout=900)
    assert run.returncode == 0, said
    directory = five_nodes.directory_of(json.loads(out))
    here = quickbloom("run", *SETTINGS, "--in-process", "--json", "--output", str(tmp_path / "here"), cwd=tmp_path)
    assert here.returncode == 0, here.stderr
    assert numbers(curve(directory)) == pytest.approx(numbers(curve(tmp_path / "here")), abs=1e-5)
    losses = [json.loads(line)["train"]["loss"] for line in (directory / "history.jsonl").read_text().splitlines()]
    until(lambda: len(shown(directory.name)) == 2, 120)
    assert shown(directory.name) == pytest.approx(losses)
    rounds = [json.loads(line) for line in (directory / "history.jsonl").read_text().splitlines()]
    served = figures(directory.name)
    assert served["quickbloom_rounds_total", ""] == 2
    for way in ("up", "down"):
        assert served["quickbloom_bytes_total", way] == sum(line["bytes"][way] for line in rounds) > 0


def test_five_replicas_take_five_keys_and_one_that_is_killed_takes_a_free_one_again(five_nodes: Federation) -> None:
    assert keys(five_nodes) == ["node-1", "node-2", "node-3", "node-4", "node-5"]
    killed = five_nodes.containers("supernode")[0]
    kill(killed)
    until(lambda: docker("logs", killed).stdout.count("this replica is") == 2, 120)
    assert keys(five_nodes) == ["node-1", "node-2", "node-3", "node-4", "node-5"]


def figures(run: str) -> dict[tuple[str, str], float]:
    """What `quickbloom metrics` serves of this run, by name and direction."""
    with urllib.request.urlopen(f"http://127.0.0.1:{FIGURES}/metrics", timeout=30) as answer:
        families = list(text_string_to_metric_families(answer.read().decode()))
    samples = [sample for family in families for sample in family.samples if sample.labels.get("run") == run]
    return {(sample.name, sample.labels.get("direction", "")): sample.value for sample in samples}


def shown(run: str) -> list[float]:
    """The training losses that TensorBoard serves for this run."""
    try:
        url = f"http://127.0.0.1:{BOARD}/data/plugin/scalars/scalars?tag=train%2Floss&run={run}"
        with urllib.request.urlopen(url, timeout=10) as answer:
            return [value for _, _, value in json.load(answer)]
    except OSError:
        return []
