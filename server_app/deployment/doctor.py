"""Examines this installation for `quickbloom doctor`: its parts, and what is wrong with them."""

import importlib.metadata
import importlib.util
import os
import platform
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass

from quickbloom.common.flower import names, registry, transport

OLDEST, NEWEST = (1, 39), (1, 42)
"""First and last release of Flower that this was tested with."""


@dataclass(frozen=True)
class Finding:
    """One line: what was examined, its state, and how to mend it; `mend` is "" if nothing is wrong."""

    part: str
    name: str
    state: str
    detail: str = ""
    mend: str = ""


def examine() -> list[Finding]:
    """Examine Flower, its patches, the transport, the kernels, torch and the data directory."""
    return [*_flower(), *_patches(), *_names(), *_torch(), _kernels(), _data()]


def as_json(findings: list[Finding]) -> dict[str, object]:
    """Return all findings as JSON values, and whether nothing is wrong."""
    return {"well": all(not finding.mend for finding in findings), "findings": [asdict(finding) for finding in findings]}


def _flower() -> Iterator[Finding]:
    version = registry.version()
    release = tuple(int(part) for part in version.split(".")[:2] if part.isdigit())
    mend = ""
    if not OLDEST <= release <= NEWEST:
        mend = "install a release that this was tested with: pip install 'flwr>=1.39,<1.43'"
    yield Finding("system", "Python", platform.python_version(), platform.platform())
    yield Finding("Flower", "release", version, mend=mend)
    ports = {transport.GRPC: "nodes have a port of their own, 9092 by default", transport.HTTP: "one port for nodes and runs"}
    yield Finding("Flower", "transport", transport.spoken(), ports[transport.spoken()])
    if importlib.util.find_spec("ray") is None:
        yield Finding("Flower", "simulation", "not installed", "pip install 'quickbloom[simulation]' installs it")
    else:
        yield Finding("Flower", "simulation", f"ray {importlib.metadata.version('ray')}")


def _patches() -> Iterator[Finding]:
    for patch in registry.BY_NAME.values():
        reason = registry.why_not(patch.name)
        chosen = registry.turned_off() or registry.needless(patch) or "fork server" in reason
        mend = f"costs {patch.gain}; a release that this was tested with has it" if reason and not chosen else ""
        yield Finding("patch", patch.name, "off" if reason else "on", reason or patch.gain, mend)


def _names() -> Iterator[Finding]:
    for name, entry in names.NAMES.items():
        if names.find(name) is None:
            mend = "run pip install 'flwr>=1.39,<1.43'"
            yield Finding("name", name, "missing", f"`{entry.places[0]}`, needed for {entry.needed_for}", mend)


def _torch() -> Iterator[Finding]:
    import torch

    yield Finding("torch", "release", torch.__version__)
    yield Finding("torch", "threads", str(torch.get_num_threads()), f"{os.cpu_count()} cores; OMP_NUM_THREADS decides")
    yield Finding("torch", "CUDA", torch.cuda.get_device_name() if torch.cuda.is_available() else "none")


def _kernels() -> Finding:
    import torch

    from quickbloom.common.maths.kernels.build import load

    _, state, detail = load(torch.float32)
    return Finding("kernels", "library", state, detail, detail if state == "none" else "")


def _data() -> Finding:
    from quickbloom.common.datasets.base import resolve_data_dir

    directory = resolve_data_dir("")
    try:
        directory.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=directory):
            pass
    except OSError as error:
        mend = "give it to this user, or name another in QUICKBLOOM_DATA_DIR"
        return Finding("data", "directory", "cannot be written", f"{directory} ({error.strerror})", mend)
    return Finding("data", "directory", "writable", str(directory))
