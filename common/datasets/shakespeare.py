"""Shakespeare by role: predict the next character of a role's text, as in LEAF (Caldas et al. 2018); one task per role.

Source: 37 plays in the public domain, parsed into speeches. It is not LEAF's own file, and the
context is 20 characters instead of LEAF's 80 (`shakespeare.context=80`), which takes a quarter of
the time on a CPU. Scores therefore compare with LEAF's only roughly. Always predicting a space is
right for one character in six. About 290 roles train, so `tasks-per-round=50` suits a CPU. MAML
needs some 45 MB per role to differentiate through five steps, which suits `chunk-size=32`.

Nothing leaks between support, query and test. A role's text in order of time is cut at 80 %, as in
LEAF: test examples come from the last fifth alone, everything else from the part before. That first
part is cut again for every draw, at a random place in its middle third, and a coin decides which
side is support and which is query. The window of an example, context and target, lies within one
stretch, so no character of a support example is in a query or test example.
"""

import gzip
import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from pydantic import Field, model_validator

from quickbloom.common.datasets.base import Dataset, DataSpec, TaskInfo, generator, require_file
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options

FILE = "shakespeare_by_role.json.gz"
CHARACTERS = "\n !$&',-.0123456789:;?ABCDEFGHIJKLMNOPQRSTUVWXYZ[]abcdefghijklmnopqrstuvwxyz"
"""Characters of the file, fixed so that all nodes agree on their ids; every other character shares the last id."""
TOKENS = len(CHARACTERS) + 1
MAX_BYTES = 50_000_000
"""Largest size of the unpacked file in bytes: ten times the packed size."""

Array = np.ndarray[Any, Any]


class ShakespeareOptions(Options):
    """Settings of the data set `shakespeare`."""

    context: int = Field(20, ge=1, le=1000, description="characters that are seen before the one to predict; LEAF: 80")
    min_characters: int = Field(2000, ge=1, description="roles that say less than this are left out")
    support_examples: int = Field(20, ge=1, le=10_000, description="support examples per draw")
    query_examples: int = Field(20, ge=1, le=10_000, description="query examples per draw")
    test_examples: int = Field(50, ge=1, le=10_000, description="examples on which a held-out task is scored")
    data_seed: int = Field(0, ge=0, description="seed of the test draws, apart from the seed of the run")

    @model_validator(mode="after")
    def _leave_enough_text(self) -> "ShakespeareOptions":
        # The shortest stretches: a third of the first 80 %, and the last 20 %.
        draws = self.context + max(self.support_examples, self.query_examples)
        least = max(4 * draws, 5 * (self.context + self.test_examples))
        if self.min_characters < least:
            raise ValueError(
                f"`shakespeare.min-characters` must be at least {least} for these numbers of examples, got "
                f"{self.min_characters}: raise it, or lower `shakespeare.context`, `shakespeare.support-examples`, "
                "`shakespeare.query-examples` or `shakespeare.test-examples`"
            )
        return self


class Shakespeare(Dataset):
    """448 roles of at least 2,000 characters; inputs are `context` token ids, the class is the id of the next character."""

    name = "shakespeare"
    needs_files = True
    Options = ShakespeareOptions
    model = "lstm"
    inner_lr = 1.0

    def __init__(self, options: ShakespeareOptions, data_dir: Path) -> None:
        self._options = options
        texts = {role: _encode(text) for role, text in _read(data_dir / FILE).items()}
        self._texts = {role: text for role, text in texts.items() if len(text) >= options.min_characters}
        if not self._texts:
            raise DataError(
                f"`min-characters` must be at most {max(map(len, texts.values()), default=0)}, what the longest role of data "
                f"set `shakespeare` says, got {options.min_characters}: lower it"
            )

    @classmethod
    def tests_seen(cls, options: Any) -> bool:
        return True  # the last fifth of a role's text is in no draw of its training

    @property
    def spec(self) -> DataSpec:
        return DataSpec("classification", (self._options.context,), TOKENS, tokens=TOKENS)

    def tasks(self) -> list[TaskInfo]:
        options = self._options
        return [TaskInfo(name, options.support_examples, options.query_examples, options.test_examples) for name in self._texts]

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        options = self._options
        first, last = _cut(self._texts[task_id], 0.8)
        sides = _cut(first, rng.uniform(1 / 3, 2 / 3))
        support, query = sides if rng.random() < 0.5 else sides[::-1]
        return TaskData(
            self._windows(support, options.support_examples, rng),
            self._windows(query, options.query_examples, rng),
            self._windows(last, options.test_examples, rng),
        )

    def test_draws(self, task_id: str) -> list[TaskData]:
        return [self.train_draw(task_id, generator(self._options.data_seed, "shakespeare", "test", task_id))]

    def _windows(self, stretch: Array, count: int, rng: np.random.Generator) -> Batch:
        """Return `count` different windows at random places of a stretch: `context` ids and the id that follows."""
        windows = np.lib.stride_tricks.sliding_window_view(stretch, self._options.context + 1)
        chosen = torch.from_numpy(windows[rng.choice(len(windows), size=count, replace=False)].astype(np.int64))
        return Batch.of(chosen[:, :-1].contiguous(), chosen[:, -1].contiguous())


def _cut(text: Array, share: float) -> tuple[Array, Array]:
    place = round(share * len(text))
    return text[:place], text[place:]


def _encode(text: str) -> Array:
    """Return the token id of every character: its position in `CHARACTERS`, or the last id."""
    ids = np.full(128, TOKENS - 1, dtype=np.uint8)
    ids[list(CHARACTERS.encode())] = np.arange(len(CHARACTERS))
    code_points = np.frombuffer(text.encode("utf-32-le", errors="surrogatepass"), dtype=np.uint32)
    return ids[np.minimum(code_points, 127)]  # `CHARACTERS` does not contain number 127


def _read(path: Path) -> dict[str, str]:
    """Return the text of every role, in order, with a line break after each speech. Nurse and NURSE are one role."""
    speeches: dict[str, list[str]] = {}
    for play, role, text in _speeches(path, _load(path)):
        speeches.setdefault(f"{_slug(play)}-{_slug(role)}", []).append(text + "\n")
    return {role: "".join(texts) for role, texts in speeches.items()}


def _load(path: Path) -> Any:
    require_file(path)
    try:
        with gzip.open(path) as file:
            text = file.read(MAX_BYTES + 1)
        if len(text) <= MAX_BYTES:
            return json.loads(text)
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"the data file '{path}' is not readable JSON packed by gzip ({error}): fetch it again") from error
    raise DataError(f"the data file '{path}' must unpack to at most {MAX_BYTES} bytes, got more: fetch it again")


def _speeches(path: Path, plays: Any) -> Iterator[tuple[str, str, str]]:
    """Yield (play, role, text) of every speech, in order. Raises DataError if the file has another form."""
    if not isinstance(plays, dict):
        raise DataError(f"'{path}' must hold an object with a key for every play, got a {type(plays).__name__}: fetch it again")
    for play, content in plays.items():
        speeches = content.get("speeches") if isinstance(content, dict) else None
        for speech in speeches if isinstance(speeches, list) else [None]:
            match speech:
                case [str(role), str(text)]:
                    yield play, role, text
                case _:
                    raise DataError(
                        f"'{path}' must hold `speeches` as a list of [role, text] for every play, got something else in the "
                        f"play '{play}': fetch it again"
                    )


def _slug(name: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")


__all__ = ["CHARACTERS", "FILE", "MAX_BYTES", "TOKENS", "Shakespeare", "ShakespeareOptions"]
