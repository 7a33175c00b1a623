"""What the directory of a run says of it, for whoever tells it to a person: read once, with gaps where there is nothing yet."""

import json
import math
import shlex
from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from quickbloom.common.config.key_value import assignment
from quickbloom.common.config.run import RunConfig, Scalar, parse_run_config
from quickbloom.common.errors import ConfigError, DataError, in_one_line
from quickbloom.common.formatting import data_name
from quickbloom.common.metric import ACCURACY, Metric, metric_of
from quickbloom.common.printable import one_line
from quickbloom.common.spreadsheets import read_csv
from quickbloom.server_app.events.file import read_events
from quickbloom.server_app.events.kinds import Warned
from quickbloom.server_app.reporting.page import nan_for_null
from quickbloom.server_app.runs.directory import read_history
from quickbloom.server_app.runs.program import named, program

_NOT_OF_THE_RESULT = ("output-dir", "resume-from", "data-dir", "tensorboard", "mlflow", "wandb")
_FLAGS = {
    **{"algorithm": "--algorithm", "dataset": "--dataset", "rounds": "--rounds", "seed": "--seed", "min-nodes": "--nodes"},
    **{"own.path": "--data", "own.task-column": "--task", "own.target-column": "--target"},
    "own.time-column": "--time",
}
_ALWAYS = ("algorithm", "dataset", "rounds", "seed")


@dataclass(frozen=True)
class Client:
    """A scored task: scores before and after adaptation, numbers of support and test examples."""

    task: str
    before: float
    after: float
    support: int
    test: int


@dataclass
class Node:
    """What the rounds say of a node. `trained`: rounds with a usable answer, None where runs do not say; `away`: rounds."""

    trained: int | None = None
    failures: int = 0
    late: int = 0
    away: int = 0


@dataclass(frozen=True)
class Trouble:
    """The same failure of the same party, in `times` rounds from `first` to `last`."""

    who: str
    reason: str
    times: int
    first: int
    last: int


@dataclass(frozen=True)
class RunFacts:
    """A run as its directory tells it. `rounds`, `summary`: as in docs/run-directory.md, with NaN for null in lists."""

    path: Path
    config: Mapping[str, Scalar]
    rounds: Sequence[Mapping[str, Any]]
    summary: Mapping[str, Any] | None

    @classmethod
    def read(cls, path: Path) -> "RunFacts":
        """Raises DataError where there is no run, or a file of it is damaged."""
        if not (path / "config.json").is_file():
            if (path / "comparison.json").is_file():
                raise DataError(f"'{path}' holds a comparison: open its comparison.html, or name directories of runs in it")
            raise DataError(f"'{path}' is no directory of a run: it holds no config.json")
        try:
            config = json.loads((path / "config.json").read_text(encoding="utf-8"))
            return cls(path, config, nan_for_null(read_history(path)), _read_summary(path / "summary.json"))
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise DataError(f"'{path}' holds a damaged file of a run ({in_one_line(error)})") from None

    @property
    def title(self) -> str:
        mode = ", async" if self.config.get("mode") == "async" else ""
        return f"{self.config['algorithm']} on {data_name(self.config)}, seed {self.config['seed']}{mode}"

    @cached_property
    def metric(self) -> Metric:
        """What the run is scored by; accuracy as long as nothing was scored."""
        ends = ((self.summary or {}).get(part) for part in ("test", "seen"))
        scored = [part for part in (*ends, *(r.get("validation") for r in self.rounds)) if part]
        return metric_of(scored[0]) if scored else ACCURACY

    @property
    def target(self) -> str:
        """The name of the column that is predicted, "" if the settings do not say."""
        return str(self.config.get("own.target-column", "")) if self.config["dataset"] == "own" else ""

    @cached_property
    def evaluations(self) -> list[tuple[int, float, float, int]]:
        """(round, score before, score after the step that was best in that round, tasks) of the validation tasks.

        In mode async scores come in later: the round is then that of the model that was scored.
        """
        found = []
        for record in self.rounds:
            if scores := record.get("validation"):
                steps = scores[self.metric.name]
                known = [value for value in steps[1:] if math.isfinite(value)]
                number = scores.get("round", record["round"])
                found.append((number, steps[0], self.metric.best(known) if known else math.nan, scores.get("tasks", 0)))
        return sorted(found, key=lambda entry: entry[0])

    @cached_property
    def hours(self) -> dict[int, float]:
        """Hours of virtual time by the end of every round; none of a run in the time of real devices."""
        return {record["round"]: record["virtual_hours"] for record in self.rounds if "virtual_hours" in record}

    @cached_property
    def clients(self) -> list[Client]:
        """The test tasks, the worst after adaptation first; none of a run that has not ended."""
        return self._clients_of("test")

    @cached_property
    def seen_clients(self) -> list[Client]:
        """The training tasks that were scored as seen users, in the same form."""
        return self._clients_of("seen")

    def _clients_of(self, split: str) -> list[Client]:
        file = self.path / "per_task.csv"
        if not (self.summary and self.summary.get(split) and file.is_file()):
            return []
        before, after = (f"{self.metric.name}_step{step}" for step in (0, self.summary["chosen"]["adapt_steps"]))
        try:
            with file.open(newline="", encoding="utf-8") as opened:
                clients = [
                    Client(row["task"], float(row[before]), float(row[after]), int(row["num_support"]), int(row["num_test"]))
                    for row in read_csv(opened)
                    if row["split"] == split
                ]
        except (ValueError, KeyError, TypeError) as error:
            raise DataError(f"'{file}' is damaged ({in_one_line(error)})") from None
        return sorted(clients, key=lambda client: -self.metric.cost(client.after))

    @cached_property
    def nodes(self) -> dict[str, Node]:
        """All nodes that the rounds name, by their id."""
        nodes: defaultdict[str, Node] = defaultdict(Node)
        for record in self.rounds:
            said = record.get("nodes") or {}
            for node_id in said.get("trained") or ():
                nodes[str(node_id)].trained = (nodes[str(node_id)].trained or 0) + 1
            for node_id in said.get("away") or ():
                nodes[str(node_id)].away += 1
            for who, number in (said.get("late") or {}).items():
                nodes[who.removeprefix("node ")].late += number
            for failure in record["failures"]:
                if failure["who"].startswith("node "):
                    nodes[failure["who"].removeprefix("node ")].failures += 1
        if any((record.get("nodes") or {}).get("trained") is not None for record in self.rounds):
            for node in nodes.values():
                node.trained = node.trained or 0
        return dict(sorted(nodes.items(), key=lambda item: (len(item[0]), item[0])))

    @cached_property
    def troubles(self) -> list[Trouble]:
        """All failures of the rounds, the most frequent first."""
        rounds: defaultdict[tuple[str, str], list[int]] = defaultdict(list)
        for record in self.rounds:
            for failure in record["failures"]:
                rounds[failure["who"], failure["reason"]].append(record["round"])
        troubles = [Trouble(*key, len(seen), seen[0], seen[-1]) for key, seen in rounds.items()]
        return sorted(troubles, key=lambda trouble: -trouble.times)

    @cached_property
    def warnings(self) -> list[str]:
        """What its user should know, each sentence once."""
        told = (one_line(event.sentence) for event in read_events(self.path) if isinstance(event, Warned))
        return list(dict.fromkeys(told))

    @cached_property
    def traffic(self) -> Counter[str]:
        """Bytes "up" and "down", evaluations and the final test included."""
        return Counter(self.summary["bytes"] if self.summary else sum((Counter(r["bytes"]) for r in self.rounds), Counter()))

    @property
    def seconds(self) -> float:
        return float(self.summary["seconds"]["total"] if self.summary else sum(r["seconds"] for r in self.rounds))

    def changed(self) -> dict[str, tuple[Scalar | None, Scalar | None]]:
        """(value, default) of the settings that are not what they are by default, without places; defaults are resolved."""
        try:
            chosen = {key: self.config[key] for key in ("algorithm", "dataset")}
            defaults: Mapping[str, Scalar] = parse_run_config(chosen).resolved().flat()
        except ConfigError:  # of another release
            defaults = RunConfig().flat()
        return {
            key: (value, defaults.get(key))
            for key, value in self.config.items()
            if key not in _NOT_OF_THE_RESULT and (value != defaults.get(key) or key in _ALWAYS)
        }

    def command(self) -> str:
        """What to type for a run with the same settings."""
        changed = {key: value for key, (value, _) in self.changed().items()}
        words, assignments = [*program(named(changed)), "run"], []
        for key, value in changed.items():
            if flag := _FLAGS.get(key):
                words += [flag, str(value)]
            else:
                assignments.append((key, value))
        return shlex.join([*words, *(word for pair in assignments for word in ("--set", assignment(*pair)))])


def _read_summary(file: Path) -> dict[str, Any] | None:
    """summary.json with NaN for null in lists; what is null elsewhere stays None. None as long as there is no such file."""

    def gaps(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: gaps(item) for key, item in value.items()}
        return nan_for_null(value) if isinstance(value, list) else value

    if not file.is_file():
        return None
    found: dict[str, Any] = gaps(json.loads(file.read_text(encoding="utf-8")))
    return found if found["schema"] == 1 else None


def tenth(clients: Sequence[Client]) -> Iterator[Client]:
    """The worst tenth of sorted clients, at least one."""
    yield from clients[: max(1, len(clients) // 10)] if clients else ()
