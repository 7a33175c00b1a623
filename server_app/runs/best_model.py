"""The best model of a run so far, in a file beside the checkpoints: written when it is found, read at the end."""

from pathlib import Path
from typing import Any

from flwr.serverapp import Grid

from quickbloom.common.errors import DataError
from quickbloom.common.maths.params import Params, mismatch
from quickbloom.common.personal import facts
from quickbloom.server_app.events.channel import Warn
from quickbloom.server_app.federation.best import BestSoFar
from quickbloom.server_app.federation.strategy import MetaStrategy
from quickbloom.server_app.runs import resume
from quickbloom.server_app.runs.checkpoints import Checkpoint, CheckpointWriter, best_file, load


class BestModel:
    """The best model of one run by its validation tasks. Its scores are in memory, its numbers on the disk alone."""

    def __init__(self, strategy: MetaStrategy, writer: CheckpointWriter, warn: Warn) -> None:
        self._strategy, self._writer, self._warn = strategy, writer, warn
        self._best = BestSoFar(strategy.evaluation.metric)

    @property
    def round(self) -> int | None:
        """The round of the best model so far, 0 before the first one; None as long as nothing was scored."""
        return self._best.round

    def score_initial(self, grid: Grid) -> None:
        """Score the model before the first round."""
        self._strategy.score_initial(grid)
        self.take(0, self._strategy.outer.leaves)

    def take(self, server_round: int, meta: Params) -> None:
        """Write `meta`, the model after this round, if the last scores of the validation tasks are its and the best so far."""
        strategy = self._strategy
        if not self._best.take(server_round, strategy.evaluation.last):
            return
        tensors, said = resume.score_tensors(self._best.scores)
        lr, steps = strategy.chosen_rate()
        model = {f"meta/{name}": value for name, value in meta.items()}
        self._writer.write_best(server_round, model | tensors, {**said, "adapt": {"lr": lr, "steps": steps}})

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on with the best model by the time of `checkpoint`, from the file beside it."""
        number = checkpoint.facts["so-far"].get("best-model")
        if number is None:
            return
        folder = checkpoint.path.parent
        if (found := self._read(checkpoint, number)) is None:
            return
        self._best.round, self._best.scores = number, resume.scores_in(found)
        if folder.resolve() == self._writer.directory.resolve():
            self._remember(folder)
        else:
            said: dict[str, Any] = {key: found.facts[key] for key in ("validation", "adapt") if key in found.facts}
            self._writer.write_best(number, found.tensors, said)

    def decide(self, grid: Grid) -> bool:
        """End with the best model, after the last round; return whether that was to be decided."""
        strategy, best = self._strategy, self._best
        if strategy.decided or best.round is None or best.scores is None:
            return False
        try:
            found = load(best_file(self._writer.directory, best.round), self._warn)
        except DataError as error:
            self._warn(f"The model of the last round is kept: {error}")
            return False
        strategy.keep_if_better(grid, best.round, found.meta, best.scores)
        return True

    def _remember(self, folder: Path) -> None:
        """Let each checkpoint of the process before keep its best model."""
        for path in folder.glob("round-*.safetensors"):
            try:
                best = load(path, self._warn).facts["so-far"].get("best-model")
            except (DataError, KeyError, TypeError, AttributeError):
                continue  # a damaged one is of no use anyway
            if isinstance(best, int):
                self._writer.remember(path, best)

    def _read(self, checkpoint: Checkpoint, number: int) -> Checkpoint | None:
        path = best_file(checkpoint.path.parent, number)
        try:
            found = load(path, self._warn)
            facts.check(found.facts, facts.BestFacts, f"the file '{path}'")
            reason = mismatch(found.meta, self._strategy.outer.leaves)
            same = (found.facts["lineage"], found.facts["round"]) == (checkpoint.facts["lineage"], number)
            if reason or not same or resume.scores_in(found) is None:
                raise DataError(f"the file '{path}' is of another run")
        except DataError as error:
            self._warn(f"The best model so far is lost, and the best of the following rounds is kept: {error}")
            return None
        return found
