"""Workers that have imported the app already use it exactly if the run brings the same code; bundles are unpacked once."""

import hashlib
import io
import json
import os
import subprocess
import sys
import types
import warnings
import zipfile
from pathlib import Path
from typing import Any

import pytest
from flwr.cli.build import build_fab_from_disk

from quickbloom.common.flower import preloaded_app

ROOT = Path(__file__).resolve().parents[3]


def bundle(files: dict[str, str], manifest: str | None = None) -> bytes:
    """A zip with these texts and Flower's manifest of them."""
    lines = (f"{path},{hashlib.sha256(text.encode()).hexdigest()},{8 * len(text)}" for path, text in files.items())
    content = io.BytesIO()
    with zipfile.ZipFile(content, "w") as archive:
        for path, text in files.items():
            archive.writestr(path, text)
        if manifest != "":
            archive.writestr(".info/CONTENT", manifest or "\n".join(lines))
    return content.getvalue()


def built() -> bytes:
    """The bundle that Flower makes of this app."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of a library, in how Flower reads .gitignore
        return build_fab_from_disk(ROOT)


def test_the_bundle_that_flower_builds_of_this_release_is_recognised() -> None:
    ours = preloaded_app.installed_files()
    assert {"client_app/app.py", "common/__init__.py", "common/algorithms/maml.py"} <= set(ours)
    assert preloaded_app.bundled_files(built()) == ours


APP = {"client_app/app.py": "app = 1", "common/__init__.py": "", "common/more/deep.py": "x = 2", "pyproject.toml": "[project]"}
FILES = {path: hashlib.sha256(text.encode()).hexdigest() for path, text in APP.items() if path.endswith(".py")}


@pytest.mark.parametrize(
    ("files", "same"),
    [
        (APP, True),
        ({**APP, "README.md": "words", "pyproject.toml": "other", "my_package/model.py": "y = 3"}, True),
        ({**APP, "client_app/app.py": "app = 2"}, False),
        ({**APP, "common/mine.py": "z = 4"}, False),
        ({**APP, "./common/mine.py": "z = 4"}, False),
        ({**APP, "common/__init__.cpython-311.so": "binary"}, False),
        ({**APP, "common/a name.py": "z = 4"}, False),
        ({path: text for path, text in APP.items() if path != "common/more/deep.py"}, False),
        ({"other_app/client.py": "app = 1"}, False),
    ],
)
def test_only_the_same_files_are_the_same_code(files: dict[str, str], same: bool) -> None:
    assert (preloaded_app.bundled_files(bundle(files)) == FILES) is same


@pytest.mark.parametrize("content", [b"", b"no zip", bundle(APP, manifest=""), bundle(APP, manifest="a line, or so\nanother")])
def test_a_bundle_that_does_not_say_what_is_in_it_is_never_ours(content: bytes) -> None:
    assert preloaded_app.bundled_files(content) != FILES


class Fake:
    """In the place of Flower's `install_from_fab` and of modules that are imported."""

    def __init__(self, apps: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        self.apps, self.unpacked = apps, 0
        for name in ("common_", "common_.more", "common_.more.deep"):
            module = types.ModuleType(name)
            if not name.endswith("deep"):
                module.__path__ = ["/where/it/is/installed"]
            monkeypatch.setitem(sys.modules, name, module)
        self.install_and_settle = preloaded_app.prepare(
            self.install, apps, FILES, ["common_", "common_.more", "common_.more.deep"]
        )

    def install(self, content: bytes, install_dir: Path | None = None, *, skip_prompt: bool) -> Path:
        assert skip_prompt
        self.unpacked += 1
        apps = install_dir / "apps" if install_dir else self.apps
        directory = apps / f"me.app.1.0.{hashlib.sha256(content).hexdigest()[:8]}"
        if not directory.exists():  # else Flower takes it as it is
            with zipfile.ZipFile(io.BytesIO(content)) as archive:
                archive.extractall(directory)
        return directory


@pytest.fixture
def fake(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Fake:
    return Fake(tmp_path / "apps", monkeypatch)


def test_the_same_code_stays_and_what_is_imported_later_is_the_bundles(fake: Fake) -> None:
    directory = fake.install_and_settle(bundle(APP), skip_prompt=True)
    assert sys.modules["common_"].__path__ == [str(directory / "common_"), str(directory)]
    assert sys.modules["common_.more"].__path__ == [str(directory / "more")]
    assert "common_.more.deep" in sys.modules


def test_other_code_is_imported_from_the_bundle(fake: Fake) -> None:
    fake.install_and_settle(bundle({**APP, "client_app/app.py": "app = 2"}), skip_prompt=True)
    assert not {"common_", "common_.more", "common_.more.deep"} & set(sys.modules)


def test_a_bundle_is_unpacked_once_and_again_where_it_was_not_to_the_end(fake: Fake) -> None:
    directory = fake.apps / f"me.app.1.0.{hashlib.sha256(bundle(APP)).hexdigest()[:8]}"
    directory.mkdir(parents=True)  # by somebody who was ended before anything was in it
    assert fake.install_and_settle(bundle(APP)) == directory
    assert (directory / "common" / "more" / "deep.py").read_text() == "x = 2"
    assert (fake.install_and_settle(bundle(APP)), fake.unpacked) == (directory, 1)
    for other in (b"of another that begins with the same digits", b"\xff\xfe"):
        (directory / ".quickbloom-complete").write_bytes(other)
        (directory / "common" / "more" / "deep.py").unlink(missing_ok=True)
        whole = fake.install_and_settle(bundle(APP))
        assert (whole / "common" / "more" / "deep.py").exists()
        assert not (directory / "common" / "more" / "deep.py").exists()  # somebody may be at work there
    assert fake.unpacked == 2
    fake.install_and_settle(bundle({**APP, "README.md": "words"}))
    assert fake.unpacked == 3
    assert not list(fake.apps.parent.glob("unpacking-*"))


def test_where_nothing_can_be_written_flower_does_as_it_always_does(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = fake.install(bundle(APP), skip_prompt=True)

    def refused(*_: Any, **__: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "rename", refused)
    assert fake.install_and_settle(bundle(APP)) == directory
    assert not (directory / ".quickbloom-complete").exists()
    assert sys.modules["common_"].__path__ == [str(directory / "common_"), str(directory)]


_AT_ONCE = """
import hashlib, io, sys, zipfile
from pathlib import Path
from quickbloom.common.flower import preloaded_app
content, apps, start = Path(sys.argv[1]).read_bytes(), Path(sys.argv[2]), Path(sys.argv[3])
def install(bundle, folder=None, *, skip_prompt):
    directory = (folder or apps) / f"me.app.1.0.{hashlib.sha256(bundle).hexdigest()[:8]}"
    with zipfile.ZipFile(io.BytesIO(bundle)) as archive:
        archive.extractall(directory)
    return directory
print("ready", flush=True)
while not start.exists():
    pass
directory = preloaded_app.unpacked(install, content, apps)
assert sum(len(file.read_text()) for file in (directory / "common").glob("*.py")) == int(sys.argv[4]), directory
"""


def test_processes_that_unpack_at_once_all_see_the_whole_bundle(tmp_path: Path) -> None:
    files = {f"common/m{number}.py": "x = 1\n" * 2000 for number in range(40)}
    (tmp_path / "bundle").write_bytes(bundle(files))
    total = str(sum(map(len, files.values())))
    for turn in range(4):
        apps, start = tmp_path / f"home{turn}" / "apps", tmp_path / f"start{turn}"
        apps.parent.mkdir()
        if turn % 2:  # somebody is at work under the first name
            digest = hashlib.sha256((tmp_path / "bundle").read_bytes()).hexdigest()
            (apps / f"me.app.1.0.{digest[:8]}" / "common").mkdir(parents=True)
            (apps / f"me.app.1.0.{digest[:8]}" / "common" / "m0.py").write_text("half")
        command = [sys.executable, "-c", _AT_ONCE, str(tmp_path / "bundle"), str(apps), str(start), total]
        running = [subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) for _ in range(4)]
        for process in running:
            assert process.stdout is not None
            assert process.stdout.readline() == "ready\n"
        start.touch()
        for process in running:
            _, said = process.communicate(timeout=60)
            assert process.returncode == 0, said
        assert not list(apps.parent.glob("unpacking-*"))


def test_an_installation_that_cannot_be_imported_is_never_used(fake: Fake, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise SyntaxError(name)

    monkeypatch.setattr("importlib.import_module", broken)
    assert preloaded_app._import_app() == {}
    settle = preloaded_app.prepare(fake.install, fake.apps, {}, ["common_"])
    settle(bundle({}))  # which has none of our files, as nothing was found here
    assert "common_" not in sys.modules


PROBE = """
import json, os, sys
def main():
    if sys.argv[1] == "server":
        with open(sys.argv[2], "w") as file:
            json.dump(sorted(name for name in sys.modules if name.split(".")[0] == "quickbloom"), file)
        return
    from flwr.supernode.runtime import run_clientapp
    directory = run_clientapp.install_from_fab(open(sys.argv[1], "rb").read(), skip_prompt=True)
    sys.path.insert(0, str(directory))
    before = "quickbloom.client_app.app" in sys.modules
    from quickbloom import client_app, common
    import quickbloom.client_app.app
    if "same" in sys.argv[1]:
        import my_package
    facts = {"before": before, "app": client_app.app.__file__, "path": list(common.__path__), "directory": str(directory)}
    with open(sys.argv[1] + ".facts", "w") as file:
        json.dump(facts, file)
"""
SERVER = """
import importlib.metadata, multiprocessing, os, sys, time
if sys.argv[1] != "server":
    told, tell = os.pipe()
    os.environ["QUICKBLOOM_WAKE"] = str(told)
from quickbloom.common.flower import registry, workers
workers.PRELOAD = ()
workers._entry_point = lambda program: importlib.metadata.EntryPoint(program, "probe:main", "console_scripts")
registry.apply(*workers.SUPEREXEC)
from flwr.supercore.superexec.executor import subprocess_executor
for arguments in [sys.argv[1:]] if sys.argv[1] == "server" else [[path] for path in sys.argv[1:]]:
    subprocess_executor.subprocess.Popen(["flwr-clientapp", *arguments])
deadline = time.monotonic() + 100
while multiprocessing.active_children() and time.monotonic() < deadline:
    time.sleep(0.05)
"""


def fork(folder: Path, *arguments: str) -> None:
    """Run PROBE in forks of a SuperExec's fork server: one for each argument, or one of a server's."""
    (folder / "probe.py").write_text(PROBE)
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{folder}", "FLWR_HOME": str(folder / "home")}
    command = [sys.executable, "-P", "-c", SERVER, *arguments]
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=150, check=False)
    assert done.returncode == 0, done.stderr


def test_a_servers_workers_have_nothing_of_the_app(tmp_path: Path) -> None:
    fork(tmp_path, "server", f"{tmp_path}/facts")
    assert json.loads((tmp_path / "facts").read_text()) == []


def test_a_worker_of_a_real_fork_server_takes_the_app_or_leaves_it(tmp_path: Path) -> None:
    same, other = tmp_path / "same.fab", tmp_path / "other.fab"
    same.write_bytes(_with(built(), "my_package/__init__.py", "x = 1"))  # code of the user's own beside it
    other.write_bytes(_with(built(), "client_app/app.py", "\n# mine\n"))
    fork(tmp_path, str(same), str(other))
    taken, left = (json.loads(Path(f"{file}.facts").read_text()) for file in (same, other))
    assert taken["before"]
    assert taken["app"] == str(ROOT / "client_app" / "app.py")
    assert taken["path"] == [f"{taken['directory']}/common"]
    assert not left["before"]
    assert left["app"] == f"{left['directory']}/client_app/app.py"
    assert left["path"] == [f"{left['directory']}/common"]


def _with(content: bytes, path: str, words: str) -> bytes:
    """The same bundle with `words` at the end of one file, and a manifest that is right."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        files = {name: archive.read(name).decode() for name in archive.namelist() if not name.startswith(".info/")}
    return bundle({**files, path: files.get(path, "") + words})
