"""The patches of Flower: on each release their guards know what they replace, and applying them has effect."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest
from flower_releases import installed

from quickbloom.common.flower import accepted, patches, registry, simulation, transport, workers

ROOT = Path(__file__).resolve().parents[3]
RELEASES = ("1.40.0", "1.41.0", "1.42.0")

PROBE = """
import importlib.metadata, json
from quickbloom.common.flower import registry, transport, workers
workers.longest_pause = lambda: 1.0
seen = {"version": importlib.metadata.version("flwr"), "transport": transport.spoken(), "patches": {}}
for patch in registry.BY_NAME.values():
    before = registry.function(patch.effect)() if patch.effect else None
    done = registry.apply(patch.name) if patch.apply else registry.allowed(patch.name)
    after = registry.function(patch.effect)() if patch.effect else None
    seen["patches"][patch.name] = [registry.why_not(patch.name), bool(done), before, after]
print(json.dumps(seen))
"""


def probe(release: Path | None = None, variables: dict[str, str] | None = None) -> dict[str, object]:
    """What PROBE finds in a process of its own, with the Flower in the folder `release`."""
    path = os.pathsep.join(str(folder) for folder in (ROOT, release) if folder)
    env = {**os.environ, "PYTHONPATH": path, **(variables or {})}
    command = [sys.executable, "-P", "-c", PROBE]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.fixture(scope="module", params=RELEASES)
def release(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with that release of Flower and nothing else; skips where the package index cannot be reached."""
    return installed(request.param, tmp_path_factory.mktemp(f"flower-{request.param}"))


def _assert_in_effect(seen: object, *needless: str) -> None:
    assert isinstance(seen, dict)
    assert set(seen) == set(registry.BY_NAME)
    for name, (reason, done, before, after) in seen.items():
        if name in needless:
            assert (bool(reason), done, after) == (True, False, False), name
        else:
            assert (reason, done) == ("", True), name
            assert (before, after) == ((False, True) if registry.BY_NAME[name].effect else (None, None)), name


def test_every_patch_is_in_effect_on_the_release_that_is_installed() -> None:
    seen = probe()
    needless = ("connection-options",) if seen["transport"] == transport.HTTP else ()
    _assert_in_effect(seen["patches"], *needless)


@pytest.mark.slow
def test_every_patch_is_in_effect_on_later_releases_but_that_of_a_channel_they_do_not_open(release: Path) -> None:
    seen = probe(release)
    assert str(seen["version"]) in release.name
    assert seen["transport"] == transport.HTTP
    _assert_in_effect(seen["patches"], "connection-options")


@pytest.mark.slow
def test_a_run_in_one_process_is_the_same_on_later_releases(release: Path, tmp_path: Path) -> None:
    def run(name: str, *before: Path) -> object:
        env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (ROOT, *before)))}
        command = [sys.executable, "-P", "-m", "quickbloom.server_app.cli.main", "run", "--in-process", "--json", "--no-report"]
        command += ["--algorithm", "fomaml", "--dataset", "gaussian", "--rounds", "2", "--output", str(tmp_path / name)]
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=300, check=False)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout)["test"]

    assert run("later", release) == run("installed")


def test_one_switch_turns_all_of_them_off() -> None:
    seen = probe(variables={registry.SWITCH: "0"})["patches"]
    assert isinstance(seen, dict)
    assert {(done, after) for _, done, _, after in seen.values()} <= {(False, False), (False, None)}
    assert all(registry.SWITCH in reason for reason, *_ in seen.values())


def test_a_caller_that_changed_keeps_one_patch_off_and_says_so(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setitem(accepted.ACCEPTED, "flwr.supernode.runtime.run_clientapp:pull_task_input", {"0": "another"})
    monkeypatch.setattr(logging.getLogger("flwr"), "propagate", True)
    assert registry.allowed("pull-soon", "quick-retries") == ["quick-retries"]
    (line,) = [record.getMessage() for record in caplog.records]
    assert "`pull-soon`" in line
    assert "`flwr.supernode.runtime.run_clientapp.pull_task_input` of Flower" in line
    assert "without: up to 1 s of every message" in line


def test_a_part_that_is_gone_keeps_its_patch_off(monkeypatch: pytest.MonkeyPatch) -> None:
    patch = patches.Patch("p", "why", "gain", ("flwr.nowhere:function",))
    assert "has no `flwr.nowhere.function`" in registry.mismatch(patch)


def test_the_hash_is_of_the_source_as_inspect_has_it() -> None:
    import hashlib
    import inspect

    from flwr.supercore.inflatable import inflatable_utils

    whole = hashlib.sha256(inspect.getsource(inflatable_utils.pull_objects).encode()).hexdigest()
    assert registry.fingerprint("flwr.supercore.inflatable.inflatable_utils:pull_objects") == whole[:12]


def test_each_process_applies_patches_that_are_registered() -> None:
    assert {*workers.NODE, *workers.SUPEREXEC, *workers.WORKER, *simulation.PATCHES} <= set(registry.BY_NAME)
    assert all(patch.sources for patch in registry.BY_NAME.values())
