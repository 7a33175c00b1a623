"""What Prometheus reads of a run equals its history.jsonl; the dashboard and the alerts ask for what is served."""

import json
import os
import re
import shutil
import socket
import ssl
import subprocess
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families

from benchmarks.report import write_run
from quickbloom.common.errors import ConfigError
from quickbloom.common.system.locks import locked
from quickbloom.server_app.deployment.certificate_metrics import CertificateMetrics
from quickbloom.server_app.deployment.metrics_server import serving
from quickbloom.server_app.deployment.run_metrics import RunMetrics
from quickbloom.server_app.deployment.secrets import create
from quickbloom.server_app.launch.flower_run import free_port

ROOT = Path(__file__).parents[3]
FILES = ROOT / "docker" / "metrics"
Samples = dict[tuple[str, frozenset[tuple[str, str]]], float]


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "runs").mkdir()
    with serving(tmp_path / "runs", "127.0.0.1", 0, 20) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        yield f"http://127.0.0.1:{server.server_port}"
        server.shutdown()
        thread.join()


def read(address: str) -> Samples:
    with urllib.request.urlopen(f"{address}/metrics", timeout=30) as answer:
        text = answer.read().decode()
    samples = [sample for family in text_string_to_metric_families(text) for sample in family.samples]
    return {(sample.name, frozenset(sample.labels.items())): sample.value for sample in samples}


def value(samples: Samples, name: str, **labels: str) -> float:
    return samples[f"quickbloom_{name}", frozenset(labels.items())]


def lines(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "history.jsonl").read_text().splitlines()]


def test_every_figure_is_that_of_history_after_a_run_with_faults(address: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, tasks=20, rounds=40)
    rounds, found = lines(run), read(address)
    assert sum(len(line["failures"]) for line in rounds) > 0
    sums = {
        ("rounds_total", ()): len(rounds),
        ("training_seconds_total", ()): sum(line["seconds"] for line in rounds),
        ("requests_total", ()): sum(line["nodes"]["asked"] for line in rounds),
        ("replies_total", (("outcome", "answered"),)): sum(line["nodes"]["answered"] for line in rounds),
        ("replies_total", (("outcome", "failed"),)): sum(len(line["failures"]) for line in rounds),
        ("replies_total", (("outcome", "late"),)): sum(sum(line["nodes"]["late"].values()) for line in rounds),
        ("bytes_total", (("direction", "up"),)): sum(line["bytes"]["up"] for line in rounds),
        ("bytes_total", (("direction", "down"),)): sum(line["bytes"]["down"] for line in rounds),
        ("damaged_lines_total", ()): 0,
        ("train_loss", ()): rounds[-1]["train"]["loss"],
        ("round_seconds", ()): rounds[-1]["seconds"],
        ("validation_score", (("metric", "accuracy"), ("when", "before"))): rounds[-1]["validation"]["accuracy"][0],
        ("validation_score", (("metric", "accuracy"), ("when", "after"))): rounds[-1]["validation"]["accuracy"][-1],
        ("nodes", (("state", "answered"),)): rounds[-1]["nodes"]["answered"],
        ("connected_nodes", ()): rounds[-1]["nodes"]["connected"],
        ("server_memory_bytes", (("kind", "resident"),)): rounds[-1]["memory"]["resident"],
        ("server_memory_bytes", (("kind", "peak"),)): rounds[-1]["memory"]["peak"],
        ("rounds_planned", ()): 40,
        ("run_state", (("state", "ended"),)): 1,
    }
    phases = ("asking", "waiting", "aggregating", "scoring", "saving")
    sums |= {("phase_seconds_total", (("phase", name),)): sum(line["phases"][name] for line in rounds) for name in phases}
    for (name, labels), expected in sums.items():
        assert value(found, name, run="one", **dict(labels)) == pytest.approx(expected), name


def test_a_run_that_grows_and_one_that_is_written_anew(address: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, tasks=20, rounds=20)
    (run / "summary.json").unlink()
    assert value(read(address), "run_state", run="one", state="stopped") == 1
    text = (run / "history.jsonl").read_text()
    with locked(run), (run / "history.jsonl").open("a") as file:
        file.write(text.splitlines()[0] + "\n" + "no line\n" + "half")
        file.flush()
        found = read(address)
        assert value(found, "run_state", run="one", state="going-on") == 1
    assert value(found, "rounds_total", run="one") == 21
    assert value(found, "damaged_lines_total", run="one") == 1
    (run / "new").write_text("".join(f"{line}\n" for line in text.splitlines()[:5]))
    (run / "new").replace(run / "history.jsonl")  # as a resumed run does
    assert value(read(address), "rounds_total", run="one") == 5


def test_steps_privacy_and_virtual_time_of_a_line(address: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, tasks=20, rounds=20)
    line = {**lines(run)[-1], "skipped": "too few", "virtual_hours": 1.5, "privacy": {"epsilon": 2.5}}
    line |= {
        "async": {"staleness": {"0": 4, "2": 3}, "dropped": 2, "turn": 1, "at-work": 0},
        "joined": {"nodes": [1, 2], "tasks": []},
    }
    with (run / "history.jsonl").open("a") as file:
        file.write((json.dumps(line) + "\n") * 2)
    found = read(address)
    expected = {"skipped_rounds_total": 2, "virtual_hours": 1.5, "epsilon": 2.5, "dropped_contributions_total": 4}
    for name, number in (expected | {"joined_nodes_total": 4}).items():
        assert value(found, name, run="one") == number
    assert value(found, "contributions_total", run="one", staleness="2") == 6


def test_a_run_of_an_earlier_release_has_no_phases_until_it_goes_on(address: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, tasks=20, rounds=20)
    rounds = lines(run)
    old = [{key: value for key, value in line.items() if key not in ("phases", "memory")} for line in lines(run)]
    for line in old:
        del line["nodes"]["connected"]
    (run / "history.jsonl").write_text("".join(json.dumps(line) + "\n" for line in old))
    found = read(address)
    assert value(found, "rounds_total", run="one") == 20
    new = ("quickbloom_phase_seconds_total", "quickbloom_server_memory_bytes", "quickbloom_connected_nodes")
    assert not [name for name, _ in found if name in new]
    odd = [{**rounds[0], "phases": {"asking": "long"}}, {**rounds[0], "memory": None}]
    with (run / "history.jsonl").open("a") as file:
        file.write("".join(json.dumps(line) + "\n" for line in [*rounds[:2], *odd]))
    found = read(address)
    waited = rounds[0]["phases"]["waiting"] + rounds[1]["phases"]["waiting"]
    assert value(found, "phase_seconds_total", run="one", phase="waiting") == pytest.approx(waited)
    assert value(found, "connected_nodes", run="one") == 60
    assert value(found, "damaged_lines_total", run="one") == 2


def test_an_odd_run_costs_no_other_run_its_figures(address: str, tmp_path: Path) -> None:
    for name in ("good", "null", "word", "short"):
        write_run(tmp_path / "runs" / name, tasks=20, rounds=20)
    for name, rounds in (("null", None), ("word", "x")):
        file = tmp_path / "runs" / name / "config.json"
        file.write_text(json.dumps({**json.loads(file.read_text()), "rounds": rounds}))
    with (tmp_path / "runs" / "short" / "history.jsonl").open("a") as history:
        for record in ({}, {**lines(tmp_path / "runs" / "good")[-1], "train": None}):
            history.write(json.dumps(record) + "\n")
    found = read(address)
    assert value(found, "unreadable_runs") == 2
    assert value(found, "rounds_total", run="good") == value(found, "rounds_total", run="short") == 20
    assert value(found, "damaged_lines_total", run="short") == 2


def test_a_run_that_goes_on_stays_whatever_is_younger(tmp_path: Path) -> None:
    for number, name in enumerate(("old", "locked", "young", "written to")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text("{}")
        os.utime(tmp_path / name / "config.json", (number, number))
    (tmp_path / "old" / "history.jsonl").write_text("")
    with locked(tmp_path / "locked"):
        states = [family for family in RunMetrics(tmp_path, newest=2).collect() if family.name == "quickbloom_run_state"]
    assert {sample.labels["run"] for sample in states[0].samples} == {"locked", "old", "written to"}


def test_a_run_that_never_begins_is_noticed(address: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, tasks=20, rounds=20)
    (run / "history.jsonl").unlink()
    found = read(address)
    assert value(found, "last_round_timestamp_seconds", run="one") == pytest.approx((run / "config.json").stat().st_mtime)
    assert value(found, "round_seconds", run="one") == 0


def test_health_and_what_there_is_not(address: str, tmp_path: Path) -> None:
    for path in ("healthz", "readyz"):
        assert urllib.request.urlopen(f"{address}/{path}", timeout=30).read() == b"ok\n"
    (tmp_path / "runs").rmdir()
    with pytest.raises(urllib.error.HTTPError, match="503"):
        urllib.request.urlopen(f"{address}/readyz", timeout=30)
    with pytest.raises(urllib.error.HTTPError, match="404"):
        urllib.request.urlopen(f"{address}/", timeout=30)


def test_no_directory_and_an_address_that_is_taken(address: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"RUNS must be a directory with runs in it, got '.*nowhere'"):
        serving(tmp_path / "nowhere", "127.0.0.1", 0, 20)
    port = int(address.rpartition(":")[2])
    with pytest.raises(
        ConfigError, match=rf"`--port` must be a free address of this machine, got 127.0.0.1:{port} \(.*in use\)"
    ):
        serving(tmp_path / "runs", "127.0.0.1", port, 20)


def test_dashboard_and_alerts_ask_for_what_is_served(address: str, tmp_path: Path) -> None:
    run = tmp_path / "runs" / "one"
    write_run(run, tasks=20, rounds=20)
    line = {**lines(run)[-1], "virtual_hours": 1.5, "privacy": {"epsilon": 2.5}, "async": {"staleness": {"0": 4}, "dropped": 2}}
    with (run / "history.jsonl").open("a") as file:
        file.write(json.dumps(line) + "\n")
    served = {name for name, _ in read(address)} | {"quickbloom_certificate_seconds"}  # with `--server`
    panels = json.loads((FILES / "dashboard.json").read_text())["panels"]
    asked = [target["expr"] for panel in panels for target in panel["targets"]] + [(FILES / "alerts.yml").read_text()]
    names = set(re.findall(r"\bquickbloom_\w+", " ".join(asked)))
    assert len(names) > 15
    assert names <= served


needs_prometheus = pytest.mark.skipif(not shutil.which("promtool"), reason="needs Prometheus (tests/programs.sh installs it)")
RULES = """
rule_files: [RULES]
tests:
  - interval: 1m
    input_series:
      - {series: 'quickbloom_run_state{run="a", state="stopped"}', values: '1x60'}
      - {series: 'quickbloom_run_state{run="b", state="stopped"}', values: '0x60'}
      - {series: 'quickbloom_run_state{run="b", state="going-on"}', values: '1x60'}
      - {series: 'quickbloom_run_state{run="c", state="going-on"}', values: '1x60'}
      - {series: 'quickbloom_last_round_timestamp_seconds{run="b"}', values: '0+60x60'}
      - {series: 'quickbloom_last_round_timestamp_seconds{run="c"}', values: '0x60'}
      - {series: 'quickbloom_round_seconds{run="b"}', values: '10x60'}
      - {series: 'quickbloom_round_seconds{run="c"}', values: '10x60'}
      - {series: 'quickbloom_requests_total{run="b"}', values: '0+10x60'}
      - {series: 'quickbloom_requests_total{run="c"}', values: '0+10x60'}
      - {series: 'quickbloom_replies_total{run="b", outcome="answered"}', values: '0+9x60'}
      - {series: 'quickbloom_replies_total{run="c", outcome="answered"}', values: '0+4x60'}
      - {series: 'quickbloom_replies_total{run="c", outcome="failed"}', values: '0+6x60'}
      - {series: 'quickbloom_run_state{run="a", state="going-on"}', values: '0x60'}
      - {series: 'quickbloom_connected_nodes{run="a"}', values: '10x20 4x40'}
      - {series: 'quickbloom_connected_nodes{run="b"}', values: '10x20 5x40'}
      - {series: 'quickbloom_connected_nodes{run="c"}', values: '10x20 4x40'}
      - {series: 'quickbloom_rounds_total{run="b"}', values: '0+60x60'}
      - {series: 'quickbloom_phase_seconds_total{run="b", phase="waiting"}', values: '0+180x60'}
      - {series: 'quickbloom_phase_seconds_total{run="b", phase="asking"}', values: '0+30x60'}
      - {series: 'quickbloom_certificate_seconds{server="year"}', values: '31536000x60'}
      - {series: 'quickbloom_certificate_seconds{server="month"}', values: '2500000x60'}
      - {series: 'quickbloom_certificate_seconds{server="days"}', values: '200000x60'}
      - {series: 'quickbloom_certificate_seconds{server="over"}', values: '-100x60'}
    promql_expr_test:
      - expr: PHASES
        eval_time: 50m
        exp_samples:
          - {labels: '{run="b", phase="waiting"}', value: 3}
          - {labels: '{run="b", phase="asking"}', value: 0.5}
      - expr: count by (alertname, server) (ALERTS{alertstate="firing", server!=""})
        eval_time: 50m
        exp_samples:
          - {labels: '{alertname="QuickbloomCertificateEndsThisMonth", server="month"}', value: 1}
          - {labels: '{alertname="QuickbloomCertificateEnds", server="days"}', value: 1}
          - {labels: '{alertname="QuickbloomCertificateEnds", server="over"}', value: 1}
      - expr: count by (alertname, run) (ALERTS{alertstate="firing", run!=""})
        eval_time: 50m
        exp_samples:
          - {labels: '{alertname="QuickbloomRunStopped", run="a"}', value: 1}
          - {labels: '{alertname="QuickbloomRunStalled", run="c"}', value: 1}
          - {labels: '{alertname="QuickbloomFewNodesAnswer", run="c"}', value: 1}
          - {labels: '{alertname="QuickbloomFewNodesConnected", run="c"}', value: 1}
"""


@needs_prometheus
def test_alerts_fire_for_the_runs_that_they_speak_of_alone(tmp_path: Path) -> None:
    panels = {panel["title"]: panel["targets"] for panel in json.loads((FILES / "dashboard.json").read_text())["panels"]}
    phases = panels["Seconds of a round by phase"][0]["expr"].replace("$run", ".*")
    (tmp_path / "test.yml").write_text(RULES.replace("RULES", str(FILES / "alerts.yml")).replace("PHASES", phases))
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "test.yml"], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@needs_prometheus
def test_prometheus_itself_reads_the_figures_and_sees_a_loss_that_is_no_number(address: str, tmp_path: Path) -> None:
    write_run(tmp_path / "runs" / "one", tasks=20, rounds=30)
    shutil.copytree(tmp_path / "runs" / "one", tmp_path / "runs" / "bad")
    last = lines(tmp_path / "runs" / "bad")[-1]
    with (tmp_path / "runs" / "bad" / "history.jsonl").open("a") as file:
        file.write(json.dumps({**last, "train": {**last["train"], "loss": None}}) + "\n")
    text = (FILES / "prometheus.yml").read_text().replace("metrics:9464", address.removeprefix("http://")).replace("10s", "1s")
    (tmp_path / "prometheus.yml").write_text(text)
    shutil.copy(FILES / "alerts.yml", tmp_path)
    (diverged,) = re.findall(r"expr: (quickbloom_train_loss != quickbloom_train_loss)", (FILES / "alerts.yml").read_text())
    port = free_port()
    command = ["prometheus", f"--config.file={tmp_path / 'prometheus.yml'}", f"--storage.tsdb.path={tmp_path / 'tsdb'}"]

    def asked(query: str) -> list[Any]:
        where = f"http://127.0.0.1:{port}/api/v1/query?{urllib.parse.urlencode({'query': query})}"
        try:
            found: list[Any] = json.loads(urllib.request.urlopen(where, timeout=30).read())["data"]["result"]
        except OSError:  # it starts
            return []
        return found

    with subprocess.Popen([*command, f"--web.listen-address=127.0.0.1:{port}"], stderr=subprocess.DEVNULL) as process:
        try:
            deadline = time.monotonic() + 120
            while not (found := asked('quickbloom_bytes_total{run="one"}')) and time.monotonic() < deadline:
                time.sleep(0.5)
            bad = asked(diverged)
        finally:
            process.terminate()
    known = {entry["metric"]["direction"]: float(entry["value"][1]) for entry in found}
    rounds = lines(tmp_path / "runs" / "one")
    assert known == {way: sum(line["bytes"][way] for line in rounds) for way in ("up", "down")}
    assert [entry["metric"]["run"] for entry in bad] == ["bad"]


def test_how_long_a_certificate_lasts_is_what_the_server_shows(tmp_path: Path) -> None:
    create(tmp_path / "secrets", ["node-1"], [], days=20)
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    folder = tmp_path / "secrets" / "superlink"
    context.load_cert_chain(folder / "server.crt", folder / "server.key")
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def shake_hands() -> None:
            connection, _ = listening.accept()
            with connection, suppress(OSError):
                context.wrap_socket(connection, server_side=True).close()

        thread = threading.Thread(target=shake_hands)
        thread.start()
        server = f"127.0.0.1:{listening.getsockname()[1]}"
        collector = CertificateMetrics(server)
        (first,), (again,) = (family.samples for _ in range(2) for family in collector.collect())  # one look at the server
        thread.join()
    assert first.name == "quickbloom_certificate_seconds"
    assert first.labels == {"server": server}
    assert first.value == pytest.approx(20 * 86400, abs=300)
    assert again.value <= first.value
    (nothing,) = (family.samples for family in CertificateMetrics(server).collect())
    assert nothing == []
