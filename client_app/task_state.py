"""State of tasks on their node between rounds, such as personal heads. It is never sent.

It is stored in Flower's state of the node, which lasts as long as the run and the node's process.
If the node setting `state-dir` names a folder, a file per task stores it as well, which survives
restarts of the node.
"""

from logging import WARNING
from pathlib import Path
from urllib.parse import quote

from flwr.app import RecordDict
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from quickbloom.common.errors import ConfigError
from quickbloom.common.flower.names import log
from quickbloom.common.maths.params import Params, all_finite, mismatch
from quickbloom.common.system.whole_files import replacing
from quickbloom.common.wire.messages import WireError, kept_from_records, kept_to_records


class KeptState:
    """State of one node's tasks in one training. `lineage`: the training's name, shared by resumed runs."""

    def __init__(self, records: RecordDict, state_dir: str, lineage: str) -> None:
        self._records = records
        self._lineage = as_name(lineage)
        self._directory = Path(state_dir).expanduser() / self._lineage if state_dir else None

    def load(self, task_id: str, fresh: Params) -> Params | None:
        """Return the task's state; None if the task is new here, or if its state does not fit `fresh`."""
        if not fresh:
            return None
        try:
            kept = kept_from_records(self._records, f"{self._lineage}/{task_id}")
            if kept is None:
                kept = self._read(task_id)
            reason = _flaw(kept, fresh) if kept is not None else None
        except (WireError, OSError, SafetensorError) as error:
            reason = str(error)
        if reason:
            log(WARNING, "The state of task %s on this node cannot be used, it starts afresh: %s", task_id, reason)
            return None
        return kept

    def save(self, task_id: str, kept: Params) -> None:
        """Store the task's state. Raises ConfigError if `state-dir` cannot be written."""
        if not kept:
            return
        kept_to_records(self._records, f"{self._lineage}/{task_id}", kept)
        if self._directory:
            try:
                self._write(self._directory, task_id, kept)
            except (OSError, SafetensorError) as error:
                where = self._directory.parent
                raise ConfigError(
                    f"node setting `state-dir` must be a directory that can be written, got '{where}' ({error})"
                ) from None

    def _write(self, directory: Path, task_id: str, kept: Params) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        file = self._file(task_id)
        with replacing(file, mode=0o600) as partial:
            save_file({name: value.detach().cpu().contiguous() for name, value in kept.items()}, partial)

    def _read(self, task_id: str) -> Params | None:
        file = self._file(task_id)
        return load_file(file) if self._directory and file.is_file() else None

    def _file(self, task_id: str) -> Path:
        return (self._directory or Path()) / f"{as_name(task_id)}.safetensors"


def as_name(text: str) -> str:
    """Return `text` as a file or folder name; quote() alone would let "." and ".." through."""
    return quote(text, safe="").replace(".", "%2E")


def _flaw(kept: Params, fresh: Params) -> str | None:
    """Return in words why `kept` cannot replace `fresh`; None if it can."""
    if reason := mismatch(kept, fresh):
        return reason
    # From such a start no round of the task would ever be finite again.
    return None if all_finite(kept) else "it holds NaN or infinity"
