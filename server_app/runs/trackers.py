"""The live view of a run: scalars and histograms over clients for TensorBoard, scalars for MLflow and Weights & Biases.

All get the content of history.jsonl and summary.json as it is written. They never make a run fail:
one that cannot be opened is refused before the first round, one that breaks later is left out from
there on, with a warning.
"""

import math
import os
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import ConfigError, in_one_line
from quickbloom.common.system.extras import needs
from quickbloom.server_app.events.channel import Warn, warn_in_log
from quickbloom.server_app.runs.tracked_values import FOLDER, adaptation, scalars

Clients = Mapping[str, np.ndarray[Any, Any]]
"""Maps a name to one number for each client."""

_EXPERIMENT = "quickbloom"
_BRANCH = "quickbloom.lineage"
_MOST_PARAMS, _MOST_METRICS, _LONGEST = 100, 1000, 500
"""MLflow's limits of one request, and of one value."""


class Tracker(Protocol):
    """One place that shows a run."""

    name: str

    def round(self, record: Mapping[str, Any], clients: Clients) -> None:
        """Show a line of history.jsonl."""

    def end(self, summary: Mapping[str, Any], clients: Clients) -> None:
        """Show the result."""

    def close(self, *, ended: bool) -> None:
        """Close the place. `ended`: the run came to its end."""


class TensorBoard:
    """Event files in the run directory. `done`: kept rounds of an interrupted run."""

    name = "TensorBoard"

    def __init__(self, directory: Path, done: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer = SummaryWriter(str(directory / FOLDER), purge_step=done + 1 if done else None, flush_secs=5)

    def round(self, record: Mapping[str, Any], clients: Clients) -> None:
        number = int(record["round"])
        for name, value in scalars(record):
            self._writer.add_scalar(name, value, number)
        self._histograms(clients, number)

    def end(self, summary: Mapping[str, Any], clients: Clients) -> None:
        for name, step, value in adaptation(summary):
            self._writer.add_scalar(name, value, step)
        self._histograms(clients, int(summary["rounds"]))

    def close(self, *, ended: bool) -> None:
        self._writer.close()

    def _histograms(self, clients: Clients, number: int) -> None:
        for name, values in clients.items():
            finite = values[np.isfinite(values)]
            if len(finite):
                self._writer.add_histogram(f"clients/{name}", finite, number)


class MLflow:
    """A run of the experiment `quickbloom` on a tracking server; one of the same `branch` is continued. Raises ConfigError."""

    name = "MLflow"

    def __init__(self, uri: str, run_name: str, branch: str, settings: Mapping[str, Any]) -> None:
        # Before the import: an unreachable server must not delay a round for minutes, and no other server is told of the run.
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "2")
        os.environ.setdefault("MLFLOW_HTTP_REQUEST_TIMEOUT", "20")
        os.environ.setdefault("MLFLOW_DISABLE_TELEMETRY", "true")
        import mlflow
        from mlflow.entities import Metric, Param

        self._metric = Metric
        try:
            self._client = mlflow.MlflowClient(tracking_uri=uri)
            experiment = self._experiment()
            known = self._client.search_runs([experiment], f"tags.`{_BRANCH}` = '{branch}'", max_results=1)
            if known:
                self._id = known[0].info.run_id
                self._client.update_run(self._id, status="RUNNING")
                return
            self._id = self._client.create_run(experiment, run_name=run_name, tags={_BRANCH: branch}).info.run_id
            params = [Param(key, str(value)[:_LONGEST]) for key, value in settings.items() if value != ""]
            for start in range(0, len(params), _MOST_PARAMS):
                self._client.log_batch(self._id, params=params[start : start + _MOST_PARAMS])
        except Exception as error:  # any exception of some store's client
            raise ConfigError(
                f"`mlflow` must be the URI of a tracking server that answers, got '{uri}' ({in_one_line(error)})"
            ) from None

    def _experiment(self) -> str:
        if found := self._client.get_experiment_by_name(_EXPERIMENT):
            return str(found.experiment_id)
        try:
            return str(self._client.create_experiment(_EXPERIMENT))
        except Exception:  # another run was faster
            found = self._client.get_experiment_by_name(_EXPERIMENT)
            if found is None:
                raise
            return str(found.experiment_id)

    def round(self, record: Mapping[str, Any], clients: Clients) -> None:
        self._log([(name, int(record["round"]), value) for name, value in scalars(record)])

    def end(self, summary: Mapping[str, Any], clients: Clients) -> None:
        self._log(list(adaptation(summary)))

    def close(self, *, ended: bool) -> None:
        self._client.set_terminated(self._id, "FINISHED" if ended else "FAILED")

    def _log(self, found: list[tuple[str, int, float]]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(name, value, now, step) for name, step, value in found if math.isfinite(value)]
        for start in range(0, len(metrics), _MOST_METRICS):
            self._client.log_batch(self._id, metrics=metrics[start : start + _MOST_METRICS])


class WeightsAndBiases:
    """A run of a Weights & Biases project, whose files lie in the run directory until `wandb sync` sends them.

    It is offline unless WANDB_MODE says otherwise: no run waits for a network, and nobody is told of it. A run that goes on in
    its directory is the same one there (`branch`). Raises ConfigError.
    """

    name = "Weights & Biases"

    def __init__(self, project: str, directory: Path, branch: str, settings: Mapping[str, Any]) -> None:
        import wandb

        try:
            quiet = wandb.Settings(silent=True, console="off", x_disable_stats=True, x_save_requirements=False)
            self._run = wandb.init(
                project=project,
                dir=str(directory),
                mode=os.environ.get("WANDB_MODE") or "offline",
                id=branch,
                name=directory.name,
                resume="allow",
                reinit="create_new",
                config={key: value for key, value in settings.items() if value != ""},
                settings=quiet,
            )
        except Exception as error:  # any exception of its service
            raise ConfigError(
                f"`wandb` must be a project that Weights & Biases can write to, got '{project}' ({in_one_line(error)})"
            ) from None

    def round(self, record: Mapping[str, Any], clients: Clients) -> None:
        values = {name: value for name, value in scalars(record) if math.isfinite(value)}
        self._run.log(values, step=int(record["round"]))

    def end(self, summary: Mapping[str, Any], clients: Clients) -> None:
        # Its x axis is the round, so a curve over steps of adaptation is a number for each step.
        self._run.summary.update({f"{name}/{step}": value for name, step, value in adaptation(summary)})

    def close(self, *, ended: bool) -> None:
        self._run.finish(exit_code=0 if ended else 1)


class Trackers:
    """All places that show a run; one that breaks is left out from then on."""

    def __init__(self, trackers: list[Tracker], warn: Warn = warn_in_log) -> None:
        self._trackers = trackers
        self._warn = warn

    def round(self, record: Mapping[str, Any], clients: Clients) -> None:
        """Show a round."""
        self._tell(lambda tracker: tracker.round(record, clients))

    def end(self, summary: Mapping[str, Any], clients: Clients) -> None:
        """Show the result."""
        self._tell(lambda tracker: tracker.end(summary, clients))

    def close(self, *, ended: bool) -> None:
        """Close all places. `ended`: the run came to its end."""
        self._tell(lambda tracker: tracker.close(ended=ended))

    def _tell(self, what: Any) -> None:
        for tracker in list(self._trackers):
            try:
                what(tracker)
            except Exception as error:  # of third-party code, over a network; the run is worth more than its picture
                self._warn(f"{tracker.name} is told nothing more of this run: {in_one_line(error)}")
                self._trackers.remove(tracker)


def check(config: RunConfig) -> None:
    """Raise ConfigError for a live view that needs a package that is not installed."""
    needed: tuple[tuple[str, object, str, str], ...] = (
        ("tensorboard", config.tensorboard, "tensorboard", "report"),
        ("mlflow", config.mlflow, "mlflow", "mlflow"),
        ("wandb", config.wandb, "wandb", "wandb"),
    )
    for setting, wanted, package, extra in needed:
        if wanted:
            needs(extra, package, f"`{setting}`", instead=" where the server runs", load=False)


@contextmanager
def tracked(config: RunConfig, directory: Path, done: int, branch: str, warn: Warn = warn_in_log) -> Iterator[Trackers]:
    """Yield the trackers of the settings, for the duration of the run. Raises ConfigError.

    `done`: number of finished rounds. `branch`: names the run, also after an interruption, if it
    continues in its directory.
    """
    opened: list[Tracker] = []
    trackers, ended = Trackers(opened, warn), False
    try:
        if config.tensorboard:
            opened.append(TensorBoard(directory, done))
        if config.mlflow:
            opened.append(MLflow(config.mlflow, directory.name, branch, config.flat()))
        if config.wandb:
            opened.append(WeightsAndBiases(config.wandb, directory, branch, config.flat()))
        yield trackers
        ended = True
    finally:
        trackers.close(ended=ended)
