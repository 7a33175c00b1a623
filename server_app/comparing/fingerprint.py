"""What data a comparison stands on: a hash of every file, and of what a function is and returns.

It is part of the key under which a finished run is kept, so that a run on other data is another run; places are not, so that
the same data elsewhere are the same. `data.json` in the directory of a comparison has the hashes of the last time, from which
is said what changed.
"""

import hashlib
import inspect
import json
import platform
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

from quickbloom import __version__
from quickbloom.common.config.run import RunConfig
from quickbloom.common.datasets import DATASETS, load_dataset
from quickbloom.common.datasets.base import Dataset, resolve_data_dir
from quickbloom.common.datasets.own.files.tables import read_table
from quickbloom.common.datasets.own.text import Text
from quickbloom.common.formatting import counted
from quickbloom.common.personal.trust import PLACES
from quickbloom.common.registries import is_users
from quickbloom.common.system.user_code import import_own
from quickbloom.server_app.runs.directory import RunDirectory

FILE = "data.json"
RETURNS = "what it returns"
_ENCODERS = ("own.encoder", "intents.encoder")
_NAMED = 3

Parts = dict[str, dict[str, str]]
"""SHA-256 of every part, by what it belongs to: a file, a folder with its files, or a function."""


@dataclass(frozen=True)
class Data:
    """What a run reads. `placeless`: the settings that name files, without their places."""

    parts: Parts
    placeless: Mapping[str, str]

    @property
    def digest(self) -> str:
        """One hash of all parts, whatever the names of single files and folders; "" if there are none."""
        items = (sorted(part.items()) if len(part) > 1 else list(part.values()) for part in self.parts.values())
        told = sorted(map(json.dumps, items))
        return hashlib.sha256(json.dumps(told).encode()).hexdigest() if told else ""


def of_run(config: RunConfig, known: dict[str, Data]) -> Data:
    """Return what a run reads: files, and examples that no file holds. `known`: what runs before it read, by its settings."""
    flat = config.flat()
    named = {key: flat.get(key) for key in ("data-dir", "devices", *PLACES)}
    own = {key: value for key, value in flat.items() if key.startswith(f"{config.dataset}.") and key != "own.leave-out"}
    key = json.dumps([config.dataset, named, own], sort_keys=True)
    if key not in known:
        files = of_files(config)
        known[key] = Data(files.parts | of_content(config), files.placeless)
    return known[key]


def of_files(config: RunConfig) -> Data:
    """Return the hashes of all files that a run reads, and of its function. Raises DataError for one that cannot be called."""
    parts: Parts = {}
    flat, placeless = config.flat(), {}
    for key in ("own.path", "devices", *PLACES, *_ENCODERS):
        value = str(flat.get(key) or "")
        table = key.rpartition(".")[0]
        if not value or (table in DATASETS and table != config.dataset):
            continue
        kind, _, place = value.rpartition(":") if key in _ENCODERS else ("", "", value)
        path = Path(place).expanduser()
        if path.exists():
            parts[path.name if path.name not in parts else f"{path.name} ({key})"] = dict(_files(path))
            placeless[key] = f"{kind}:{path.suffix}"
        elif key == "own.path" and ":" in value:
            parts[value] = _function(value)
    return Data(parts | _builtin_file(config), placeless)


def of_content(config: RunConfig) -> Parts:
    """Return the hash of all examples of a data set that no file holds: of this project, or of the user's own code."""
    kind = DATASETS[config.dataset]
    if config.dataset == "own" or kind.needs_files:
        return {}
    options = json.dumps({key: value for key, value in config.flat().items() if key.startswith(f"{config.dataset}.")})
    if is_users(kind):
        source = Path(inspect.getfile(kind))
        return {config.dataset: {source.name: _digest_of(source), RETURNS: _examples(config)}}
    return {config.dataset: {RETURNS: _generated(config.dataset, options, config)}}


def facts(parts: Parts) -> dict[str, Any]:
    """Return what every output says of the data, and of the software that made it."""
    listed = [{"name": name, "parts": len(items), "sha256": Data({name: items}, {}).digest} for name, items in parts.items()]
    machine = f"{platform.system()} {platform.machine()}"
    packages = {name: version(name) for name in ("torch", "numpy", "flwr")}
    return {
        "data_sha256": Data(parts, {}).digest,
        "data_parts": listed,
        "versions": {"quickbloom": __version__, "python": platform.python_version(), **packages, "system": machine},
    }


def changes(before: Parts, now: Parts) -> list[str]:
    """Return what is other than before, each in a few words: "patients.csv", "2 of 40 files of photos (a.png, b.png)"."""
    said = []
    for name in now.keys() & before.keys():
        old, new = before[name], now[name]
        other = [item for item in sorted(old.keys() | new.keys()) if old.get(item) != new.get(item)]
        if not other:
            continue
        if len(old | new) == 1:
            said.append(f"`{name}`")
        elif RETURNS in old | new:
            said.append(f"{' and '.join(f'the source {item}' if item != RETURNS else item for item in other)}, of `{name}`")
        else:
            some = ", ".join(other[:_NAMED]) + ", ..." * (len(other) > _NAMED)
            said.append(f"{len(other)} of {counted(len(old | new), 'file')} of `{name}` ({some})")
    return sorted(said)


def remember(directory: Path, now: Parts) -> str:
    """Write the hashes down, and return a sentence on what changed since the last time; "" if nothing did."""
    file = directory / FILE
    before: Parts = json.loads(file.read_text(encoding="utf-8")) if file.is_file() else {}
    said = changes(before, now)
    directory.mkdir(parents=True, exist_ok=True)
    RunDirectory(directory).write_json(FILE, before | now)
    if not said:
        return ""
    return f"The data changed since this comparison was begun, {'; '.join(said)}: the runs on them start anew"


def _files(path: Path) -> Iterator[tuple[str, str]]:
    """(name below `path`, hash) of a file, or of every file of a folder; hidden files are no data."""
    if path.is_file():
        yield path.name, _digest_of(path)
        return
    for file in sorted(path.rglob("*")):
        name = file.relative_to(path)
        if file.is_file() and not any(part.startswith(".") for part in name.parts):
            yield name.as_posix(), _digest_of(file)


def _digest_of(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _function(name: str) -> dict[str, str]:
    """Of a function "module:function" its module's source and what it returns. Raises DataError if it cannot be called."""
    table = read_table(name)
    found = hashlib.sha256()
    for column, values in table.items():
        found.update(column.encode())
        _add(found, values)
    file = getattr(import_own(name.partition(":")[0]), "__file__", None)
    source = {Path(file).name: _digest_of(Path(file))} if file else {}
    return source | {RETURNS: found.hexdigest()}


def _builtin_file(config: RunConfig) -> Parts:
    kind = DATASETS[config.dataset]
    file = resolve_data_dir(config.data_dir) / str(getattr(sys.modules[kind.__module__], "FILE", ""))
    return {file.name: {file.name: _digest_of(file)}} if kind.needs_files and file.is_file() else {}


_known: dict[tuple[str, str], str] = {}


def _generated(name: str, options: str, config: RunConfig) -> str:
    """The hash of a built-in data set's examples: within a process they cannot change."""
    if (name, options) not in _known:
        _known[name, options] = _examples(config)
    return _known[name, options]


def _examples(config: RunConfig) -> str:
    """Of every task the draws that are scored, and one of training."""
    dataset: Dataset = load_dataset(config.dataset, config.table(config.dataset), resolve_data_dir(config.data_dir))
    found = hashlib.sha256(dataset.spec.schema.encode())
    for info in dataset.tasks():
        found.update(repr(info).encode())
        for data in (dataset.train_draw(info.task_id, np.random.default_rng(0)), *dataset.test_draws(info.task_id)):
            _add(found, data)
    return found.hexdigest()


def _add(found: Any, value: Any) -> None:
    """Add a value of any kind that data consist of, its form included."""
    if isinstance(value, Text):
        _add(found, value.codes)
        found.update(json.dumps([str(one) for one in value.values]).encode())
    elif hasattr(value, "detach"):
        _add(found, value.detach().cpu().numpy())
    elif isinstance(value, np.ndarray):
        found.update(f"{value.dtype}{value.shape}".encode())
        found.update(repr(value.tolist()).encode() if value.dtype == object else np.ascontiguousarray(value).tobytes())
    elif isinstance(value, Mapping):
        for key, one in value.items():
            found.update(str(key).encode())
            _add(found, one)
    elif hasattr(value, "__dataclass_fields__"):
        _add(found, {name: getattr(value, name) for name in value.__dataclass_fields__})
    elif hasattr(value, "_fields"):
        _add(found, value._asdict())
    else:
        found.update(repr(value).encode())
