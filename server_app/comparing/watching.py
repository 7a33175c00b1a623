"""What is told of the runs of a comparison while they go on, and what of them ends it."""

import math

from rich.console import Console
from rich.progress import Progress, TaskID

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.errors import ConfigError, RunError
from quickbloom.common.metric import LOSS, metric_of
from quickbloom.common.printable import one_line
from quickbloom.server_app.comparing.batch import Result, Run, Setup
from quickbloom.server_app.comparing.modes import ASYNC

_WRONG_INPUT = 2


class CompareError(RunError):
    """A run of the comparison failed. The text says how."""


def describe(run: Run) -> str:
    """A run in a few words: "maml, async, inner lr 0.3, seed 0", and "without A" if it leaves a task out."""
    setup = run.setup
    settings = setup.effective()
    rate, left, mode = inner_lr(setup), settings.get("own.leave-out"), f", {ASYNC}" * (settings["mode"] == ASYNC)
    searched = "".join(f"{text}, " for text in setup.searched)
    said = (
        f"{setup.name or setup.algorithm}{mode}, {f'inner lr {rate:g}, ' if rate is not None else ''}{searched}seed {run.seed}"
    )
    return f"{said}, without {left}" if left else said


def inner_lr(setup: Setup) -> float | None:
    """The inner rate of training; None where it is of no use."""
    if not ALGORITHMS[setup.algorithm].tunes_inner_lr:
        return None
    return float(setup.effective()[f"{setup.algorithm}.inner-lr"])


def validation_score(result: Result) -> tuple[float, float] | None:
    """(accuracy or mse, loss) on the validation tasks, adapted as the run chose; None if it failed or is not finite."""
    if result.code or not result.summary["validation"]:
        return None
    summary = result.summary
    step, scores = summary["chosen"]["adapt_steps"], summary["validation"]
    score, loss = (scores[metric.name]["mean"][step] for metric in (metric_of(scores), LOSS))
    return None if score is None else (score, math.inf if loss is None else loss)


class Watch:
    """Tells which runs go on and what came of each; ends everything for what is neither a result nor a divergence."""

    def __init__(self, console: Console, progress: Progress, total: int) -> None:
        self._console, self._progress, self._total = console, progress, total
        self._task: TaskID = progress.add_task("", total=total)
        self._number = 0
        self._running: list[str] = []
        self._warned: set[str] = set()

    def on_start(self, run: Run) -> None:
        self._running.append(describe(run))
        self._show()

    def on_end(self, result: Result, kept: bool) -> None:
        name = describe(result.run)
        if not kept:
            self._running.remove(name)
        self._number += 1
        if result.code == _WRONG_INPUT:
            raise ConfigError(result.failure)
        if result.broken:
            command = " ".join(result.run.setup.command(result.run.seed))
            raise CompareError(f"`{command}` ended with code {result.code}: {result.failure[-600:]}")
        self._tell_warnings(result, name)
        took = "kept" if kept else f"{result.facts['wall']:.0f} s"
        self._console.print(f"[{self._number}/{self._total}] {name}: {_outcome(result)}, {took}", markup=False, soft_wrap=True)
        self._show()

    def _tell_warnings(self, result: Result, name: str) -> None:
        """Those that no run before had: most are of the data, which all runs share."""
        for sentence in result.warnings:
            if sentence not in self._warned:
                self._warned.add(sentence)
                self._console.print(one_line(f"{name}: {sentence}"), markup=False, style="yellow", soft_wrap=True)

    def _show(self) -> None:
        self._progress.update(self._task, completed=self._number, description="; ".join(self._running))


def _outcome(result: Result) -> str:
    scores = validation_score(result)
    if scores is None and not result.code and not result.summary["validation"]:
        return "done, without validation tasks"
    if scores is None:
        return f"failed: {result.failure}" if result.code else "diverged"
    metric = metric_of(result.summary["validation"])
    return f"validation {metric.title} {metric.score(scores[0])}"
