"""The progress bar in a notebook: one output of the cell that changes as the run goes on, in plain HTML.

Rich draws its own bar there only with ipywidgets, which few have; every notebook can replace an output.
"""

import html
import time
from importlib import import_module
from typing import Any

from rich.console import Console
from rich.progress import Progress, Task, TaskID

_PAUSE = 0.2
"""Seconds between two changes of what is shown."""


class NotebookProgress(Progress):
    """A bar for `console`, which is a notebook's. What it said last stays there when it stops."""

    def __init__(self, console: Console) -> None:
        super().__init__(console=console)
        self._display = import_module("IPython.display")
        self._output: Any = None
        self._changed = 0.0

    def start(self) -> None:
        """Show the bar below the cell."""
        self._output = self._display.display(self._display.HTML(self._page()), display_id=True)

    def stop(self) -> None:
        """Show how it ended."""
        self.refresh()

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task as `Progress.update`; what is shown follows, a few times a second."""
        super().update(task_id, **changes)
        if time.monotonic() - self._changed > _PAUSE:
            self.refresh()

    def refresh(self) -> None:
        """Show how it stands now."""
        self._changed = time.monotonic()
        if self._output is not None:
            self._output.update(self._display.HTML(self._page()))

    def _page(self) -> str:
        return "".join(f"<div>{_bar(task)} {html.escape(_words(task))}</div>" for task in self.tasks)


def _bar(task: Task) -> str:
    if task.total is None:
        return "<progress></progress>"
    return f'<progress max="{task.total:g}" value="{task.completed:g}"></progress>'


def _words(task: Task) -> str:
    left = task.time_remaining if not task.finished else None
    parts = [task.description, f"{task.elapsed or 0.0:.0f} s", *([f"{left:.0f} s left"] if left else [])]
    return ", ".join(parts)
