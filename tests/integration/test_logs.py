"""The log of a real SuperLink as JSON: every line on its output, and in its file, parses."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quickbloom.common.flower import transport
from quickbloom.common.system.processes import end_group
from quickbloom.common.system.tls import served
from quickbloom.server_app.deployment.secrets import create
from quickbloom.server_app.launch.flower_run import environment, free_port

PATH = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(Path(__file__).resolve().parents[2])]))
pytestmark = pytest.mark.grpc


@pytest.mark.parametrize("form", ["json", "text"])
def test_the_whole_log_of_a_superlink_is_of_the_form_that_was_asked_for(form: str, tmp_path: Path) -> None:
    create(tmp_path / "secrets", ["node-1"], [], days=1)
    port, fleet = free_port(), free_port()
    command: list[str | Path] = [sys.executable, "-m", "quickbloom.server_app.cli.main", "superlink", "--port", str(port)]
    command += ["--secrets", tmp_path / "secrets" / "superlink", "--state", tmp_path / "state"]
    command += ["--log-format", form, "--log-file", tmp_path / "log", "--log-size", "1"]
    if transport.spoken() == transport.GRPC:
        command += ["--fleet-host", "127.0.0.1", "--fleet-port", str(fleet)]
    env = {**environment(tmp_path), "PYTHONPATH": PATH}
    started = subprocess.Popen(
        [str(word) for word in command],
        env=env,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        deadline = time.monotonic() + 120
        while not _answers(port):
            assert time.monotonic() < deadline
            assert started.poll() is None, started.communicate()
            time.sleep(0.2)
        started.terminate()
        out, err = started.communicate(timeout=60)
    finally:
        end_group(started)
    written = (tmp_path / "log").read_text().splitlines()
    if form == "text":
        assert all(line[:10].count("-") == 2 for line in written)
        assert any("certificate ends at" in line for line in written)
        assert "INFO" in out + err
        return
    assert out == ""
    shown = [json.loads(line) for line in err.splitlines()]
    assert [json.loads(line) for line in written] == shown
    assert {line["logger"] for line in shown} >= {"flwr", "uvicorn.error"}
    (ending,) = (line for line in shown if "certificate ends at" in line["message"])
    assert ending["level"] == "WARNING"


def _answers(port: int) -> bool:
    try:
        return bool(served("127.0.0.1", port))
    except OSError:
        return False
