"""The pods of the chart as processes of this machine: their user, a root file system that is read-only, the mounts and secrets
that they are given and no others, their probes, and a run from its start to its figures.

Not a cluster: nothing schedules them, and the network is one loopback of its own. Needs root on Linux.
"""

import os
import shlex
import shutil
import signal
import subprocess
import sys
import time
import urllib.parse
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from chart import ROOT, Object, Pod, pods, render

from quickbloom.server_app.deployment.secrets import create

pytestmark = [pytest.mark.slow, pytest.mark.grpc]

VALUES: Object = {
    "nodes": {"list": [{"name": "node-1"}]},
    "runs": [{"name": "first", "algorithm": "fomaml", "settings": {"rounds": 2, "min-nodes": 1, "node-deadline": 120}}],
    "metrics": {"enabled": True},
}
USER = 49999
VENV, PYTHON = Path(sys.prefix), Path(sys.base_prefix).resolve()
LOOPBACK = """
import fcntl, socket, struct
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as one:
    fcntl.ioctl(one, 0x8914, struct.pack("16sh", b"lo", 1))
"""
"""Switches the loopback of a new network on."""
ENTER = r"""
set -e
root=$(mktemp -d); mount -t tmpfs -o mode=755 root "$root"
for part in /usr /lib /lib64 /bin /sbin /etc $SHOWN; do
    [ -e "$part" ] || continue
    mkdir -p "$root$part"; mount --rbind "$part" "$root$part"; mount -o remount,bind,ro "$root$part"
done
mkdir -p "$root/proc" "$root/dev" "$root/app" "$root/opt/quickbloom" "$root/tmp"
mount -t proc proc "$root/proc"; mount --rbind /dev "$root/dev"
mount --bind "$PROGRAMS" "$root/opt/quickbloom"; mount -o remount,bind,ro "$root/opt/quickbloom"
mount --bind "$HOSTS" "$root/etc/hosts"
echo "$MOUNTS" | while read -r source target mode; do
    if [ -f "$source" ]; then touch "$root$target"; else mkdir -p "$root$target"; fi
    mount --bind "$source" "$root$target"
    [ "$mode" = rw ] || mount -o remount,bind,ro "$root$target"
done
mount -o remount,ro "$root"
exec chroot "$root" setpriv --reuid 49999 --regid 49999 --groups 49999 --inh-caps=-all --bounding-set=-all --no-new-privs \
    env -i $VARIABLES sh -c 'cd /app && exec "$@"' pod "$@"
"""


class Machine:
    """Pods of `objects` in `home`, with their volumes, secrets and a network of their own."""

    def __init__(self, objects: list[Object], home: Path, secrets: Mapping[str, Path]) -> None:
        self._home, self._secrets = home, secrets
        self._started: dict[str, subprocess.Popen[bytes]] = {}
        self._pods = {pod.component: pod for pod in pods(objects)}
        self._maps = {found["metadata"]["name"]: found["data"] for found in objects if found["kind"] == "ConfigMap"}
        services = " ".join(found["metadata"]["name"] for found in objects if found["kind"] == "Service")
        (home / "hosts").write_text(f"127.0.0.1 localhost {services}\n")

    @contextmanager
    def network(self) -> Iterator[None]:
        with ExitStack() as stack:
            holder = stack.enter_context(subprocess.Popen(["unshare", "--net", "sleep", "900"]))
            stack.callback(holder.kill)
            self._network = ["nsenter", f"--net=/proc/{holder.pid}/ns/net"]
            until(lambda: Path(f"/proc/{holder.pid}/comm").read_text().strip() == "sleep", 20)
            subprocess.run([*self._network, sys.executable, "-c", LOOPBACK], check=True)
            yield

    def start(self, component: str) -> subprocess.Popen[bytes]:
        """Start a pod; the process that is returned ends with it."""
        pod, place = self._pods[component], self.place(component)
        place.mkdir()
        paths = {volume["name"]: self._volume(volume, place) for volume in pod.spec["volumes"]}
        mounts = [
            f"{paths[one['name']] / one.get('subPath', '')} {one['mountPath']} {'ro' if one.get('readOnly') else 'rw'}"
            for one in pod.container["volumeMounts"]
        ]
        env = {"MOUNTS": "\n".join(mounts), "HOSTS": str(self._home / "hosts"), "PROGRAMS": str(ROOT / "docker")}
        env |= {
            "SHOWN": f"{PYTHON} {VENV} {ROOT}",
            "VARIABLES": variables(pod),
            "PLACE": str(place),
            "PATH": os.environ["PATH"],
        }
        apart = ["unshare", "--mount", "--pid", "--fork", "--propagation", "private"]
        command = [*self._network, *apart, "bash", "-c", ENTER, "bash", *pod.container["args"]]
        with (place / "log").open("wb") as log:
            self._started[component] = subprocess.Popen(command, env=env, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        return self._started[component]

    def place(self, component: str) -> Path:
        return self._home / component

    def log(self, component: str) -> str:
        return (self.place(component) / "log").read_text(errors="replace")

    def probe(self, component: str, name: str) -> bool:
        """Whether a probe of a pod succeeds, asked in its namespaces."""
        probe = self._pods[component].container[name]
        if "httpGet" in probe:
            url = urllib.parse.urljoin("http://127.0.0.1:9464", probe["httpGet"]["path"])
            code = f"import urllib.request as u; u.urlopen({url!r}, timeout=5)"
            return (
                subprocess.run([*self._network, sys.executable, "-c", code], stderr=subprocess.DEVNULL, check=False).returncode
                == 0
            )
        if not (first := self._first(component)):
            return False
        inside = ["nsenter", "--target", str(first), "--mount", "--pid", "--net", "--root", "--wd"]
        inside += ["setpriv", "--reuid", str(USER), "--regid", str(USER), "--groups", str(USER)]
        inside += ["env", "-i", f"PATH={VENV}/bin", *probe["exec"]["command"]]
        return subprocess.run(inside, capture_output=True, stdin=subprocess.DEVNULL, check=False).returncode == 0

    def stop(self, component: str) -> None:
        """Kill a pod: with its first process all others end."""
        if first := self._first(component):
            os.kill(first, signal.SIGKILL)

    def _first(self, component: str) -> int:
        """The first process of a pod, as this machine counts; 0 if there is none."""
        parent = self._started[component].pid
        children = Path(f"/proc/{parent}/task/{parent}/children")
        return int((children.read_text().split() or ["0"])[0]) if children.exists() else 0

    def _volume(self, volume: Object, place: Path) -> Path:
        """A volume as the kubelet makes it for `fsGroup`: root's, and the group's to write to where it is no secret."""
        claim = volume.get("persistentVolumeClaim")
        path: Path = self._home / claim["claimName"] if claim else place / volume["name"]
        path.mkdir(exist_ok=True)
        if "emptyDir" in volume or claim is not None:
            given(path, 0o2777 if "emptyDir" in volume else 0o2775)
            return path
        if "configMap" in volume:
            for name, text in self._maps[volume["configMap"]["name"]].items():
                (path / name).write_text(text)
                given(path / name, 0o644)
        for source in volume.get("projected", {}).get("sources", []):
            for item in source["secret"]["items"]:
                copy = path / item["path"]
                copy.parent.mkdir(parents=True, exist_ok=True)
                copy.write_bytes((self._secrets[source["secret"]["name"]] / item["key"]).read_bytes())
                given(copy, volume["projected"]["defaultMode"])
        return path


def given(path: Path, mode: int) -> None:
    os.chown(path, 0, USER)
    path.chmod(mode)


def variables(pod: Pod) -> str:
    """The image's environment, with this checkout's programs, and the pod's."""
    image = " ".join(
        line
        for line in (ROOT / "docker" / "Dockerfile").read_text().replace("\\\n", " ").splitlines()
        if line.startswith("ENV PATH=/opt/venv/bin")
    )
    found = dict(word.split("=", 1) for word in shlex.split(image)[1:])
    found |= {"PATH": f"{VENV}/bin:/usr/bin:/bin", "PYTHONPATH": str(ROOT)}
    found |= {variable["name"]: variable["value"] for variable in pod.container.get("env", [])}
    return " ".join(f"{name}={value}" for name, value in found.items())


def until(true: Callable[[], Any], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < deadline, "it took too long"
        time.sleep(0.3)


@pytest.fixture
def machine(tmp_path: Path) -> Iterator[Machine]:
    if sys.platform != "linux" or os.geteuid() != 0 or not all(map(shutil.which, ("unshare", "nsenter", "setpriv"))):
        pytest.skip("needs root on Linux, with unshare, nsenter and setpriv")
    if subprocess.run(["unshare", "--mount", "--pid", "--net", "--fork", "true"], check=False).returncode != 0:
        pytest.skip("needs a system that gives processes namespaces of their own")
    if any(part.is_relative_to(hidden) for part in (ROOT, VENV, PYTHON) for hidden in ("/tmp", "/app", "/opt/quickbloom")):
        pytest.skip("needs a checkout that the pods' own folders do not hide")
    objects = render(VALUES)
    services = [found["metadata"]["name"] for found in objects if found["kind"] == "Service"]
    create(tmp_path / "secrets", ["node-1"], services, 1)
    secrets = {f"quickbloom-{name}": tmp_path / "secrets" / name for name in ("superlink", "superexec", "cli")}
    machine = Machine(objects, tmp_path, secrets | {"quickbloom-node-1": tmp_path / "secrets" / "nodes" / "node-1"})
    with machine.network():
        yield machine


def test_a_run_from_its_start_to_its_figures(machine: Machine, tmp_path: Path) -> None:
    with ExitStack() as stack:

        def started(component: str) -> subprocess.Popen[bytes]:
            process = stack.enter_context(machine.start(component))
            stack.callback(machine.stop, component)
            return process

        started("superlink")
        until(lambda: machine.probe("superlink", "readinessProbe"), 120)
        assert started("register").wait(120) == 0, machine.log("register")
        assert "node-1: registered as node" in machine.log("register")
        for component in ("superexec", "supernode", "metrics"):
            started(component)
        run = started("run")
        assert run.wait(300) == 0, machine.log("run") + machine.log("superexec") + machine.log("supernode")
        for component in ("superlink", "superexec", "supernode", "metrics"):
            for probe in ("readinessProbe", "livenessProbe"):
                until(partial(machine.probe, component, probe), 60)
            assert "Traceback" not in machine.log(component), machine.log(component)
        (directory,) = (tmp_path / "quickbloom-runs").iterdir()
        assert len((directory / "history.jsonl").read_text().splitlines()) == 2
        assert (directory / "summary.json").stat().st_uid == USER
