"""Intents: what people ask an assistant for, as personal vocabularies; 150 intents of 150 sentences each.

Source: Larson et al., "An Evaluation Dataset for Intent Classification and Out-of-Scope Prediction" (2019), CLINC150. A task is
a user with some intents of their own under labels of their own, a few sentences of each. 100 intents train, 10 validate, and
the users of the other 40 ask for what training never saw; which intent is in which part is fixed by a hash of its name.

Sentences are token ids of the tokenizer in `intents.tokenizer`, a directory with tokenizer.json, or the features of a frozen
encoder, `intents.encoder`; nothing is fetched.
"""

import gzip
import hashlib
import json
import zlib
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from pydantic import Field
from torch import Tensor

from quickbloom.common.datasets.base import SPLITS, Dataset, DataSpec, TaskInfo, generator, require_file
from quickbloom.common.datasets.own.encoded import LENGTH, facts_of, unit_length
from quickbloom.common.encoders import load_encoder
from quickbloom.common.encoders.encoding import Texts, encode_all
from quickbloom.common.encoders.tokens import FILE as TOKENIZER
from quickbloom.common.encoders.tokens import Tokenizer
from quickbloom.common.errors import DataError
from quickbloom.common.maths.batch import Batch, TaskData
from quickbloom.common.options import Options

FILE = "clinc150_intents.json.gz"
INTENTS, SENTENCES = 150, 150
IN_PART = {"train": 100, "validation": 10, "test": 40}
"""Number of intents of each part."""
MAX_BYTES = 20_000_000
"""Largest size of the unpacked file in bytes: more than ten times its own."""

Array = np.ndarray[Any, Any]


class IntentsOptions(Options):
    """Settings of the data set `intents`. The users of the validation have at most 10 intents."""

    tokenizer: str = Field("", description="directory with the tokenizer's tokenizer.json, that of the encoder")
    encoder: str = Field(
        "", description='frozen encoder of the sentences, such as sentence:DIRECTORY; "": the model reads token ids'
    )
    encoder_pooling: Literal["auto", "mean", "class", "last"] = Field("auto", description="as `own.encoder-pooling`")
    centre: bool = Field(True, description="with an encoder: move the features by the mean of the training intents")
    max_length: int = Field(24, ge=4, le=512, description="tokens of a sentence: longer ones are cut, shorter ones are padded")
    ways: int = Field(10, ge=2, le=40, description="intents per episode")
    train_ways: int = Field(0, ge=0, le=100, description="intents per training episode; 0: `ways`")
    shots: int = Field(1, ge=1, le=100, description="support sentences per intent")
    query_shots: int = Field(1, ge=1, le=100, description="query sentences per intent, in testing the sentences to score")
    own_intents: int = Field(
        0, ge=0, le=100, description="intents that a user has, of which an episode draws; 0: all of their part"
    )
    train_clients: int = Field(100, ge=1, le=10_000, description="training tasks")
    validation_clients: int = Field(10, ge=1, le=10_000, description="validation tasks")
    test_clients: int = Field(40, ge=1, le=10_000, description="test tasks")
    test_episodes: int = Field(10, ge=1, le=10_000, description="episodes per held-out task on which it is scored")
    data_seed: int = Field(0, ge=0, description="seed of the users and of the test episodes, apart from the seed of the run")


class Intents(Dataset):
    """Token ids [max-length]; a draw has `ways` x `shots` support and `ways` x `query-shots` query sentences, all different.

    The test part of a draw is its query part: a training task is never scored, and a held-out task learns only from its
    support.
    """

    name = "intents"
    needs_files = True
    Options = IntentsOptions
    model = "auto"
    """The form of the inputs decides: token ids need a transformer."""
    algorithm = "protonet"
    inner_lr = 0.1

    def __init__(self, options: IntentsOptions, data_dir: Path) -> None:
        self._options = options
        self._train_ways = options.train_ways or options.ways
        self._refuse_too_many()
        intents, self._beside = _read(data_dir / FILE)
        self.names = tuple(sorted(intents, key=_rank))
        """The intents: those of the training, then of the validation, then of the test."""
        self._intents = intents
        self._encoder = load_encoder(options.encoder, options.encoder_pooling) if options.encoder else None
        self._tokenizer = None if options.encoder else _tokenizer(options)
        self._ids = np.stack([self.encode(intents[name]) for name in self.names])
        self._is_copy = np.stack([_copies(of_intent) for of_intent in self._ids])
        self._own = {f"{split}-{k:03d}": self._intents_of(split, k) for split in SPLITS for k in range(self._clients(split))}

    @property
    def spec(self) -> DataSpec:
        ways = max(self._options.ways, self._train_ways)
        if self._tokenizer is not None:
            return DataSpec("classification", (self._options.max_length,), ways, tokens=self._tokenizer.vocabulary)
        assert self._encoder is not None
        return DataSpec("classification", (self._encoder.size,), ways, schema=json.dumps({"encoder": facts_of(self._encoder)}))

    def tasks(self) -> list[TaskInfo]:
        """Return all tasks. A training task announces its numbers of examples in training, with `train-ways`."""
        options = self._options

        def info(name: str) -> TaskInfo:
            ways, split = self._ways(name), name.partition("-")[0]
            query, test = ways * options.query_shots, min(options.ways, ways) * options.query_shots
            return TaskInfo(name, ways * options.shots, query, test, split=split)

        return [info(name) for name in self._own]

    def train_draw(self, task_id: str, rng: np.random.Generator) -> TaskData:
        return self._episode(task_id, rng, self._ways(task_id))

    def test_draws(self, task_id: str) -> list[TaskData]:
        rng = generator(self._options.data_seed, "intents", "test", task_id)
        ways = min(self._options.ways, self._ways(task_id))
        return [self._episode(task_id, rng, ways) for _ in range(self._options.test_episodes)]

    def _ways(self, task_id: str) -> int:
        """Return the number of intents in a training episode, or in one of a held-out task: no more than its user has."""
        trains = task_id.startswith("train-")
        return min(self._train_ways if trains else self._options.ways, len(self._own[task_id]))

    def encode(self, sentences: Sequence[str]) -> Array:
        """Return sentences as inputs: token ids int64 [n, max-length], cut or padded on the right, or features [n, size]."""
        if self._encoder is not None:
            return self._centred(unit_length(encode_all(self._encoder, Texts(sentences))))
        assert self._tokenizer is not None
        return self._tokenizer.padded(sentences, self._options.max_length)[0]

    def _centred(self, features: Array) -> Array:
        """Return features of length 4, as those of own data are: moved by the mean of the training intents before."""
        if self._options.centre:
            features = unit_length(features - self._mean)
        return (LENGTH * features).astype(np.float32)

    @cached_property
    def _mean(self) -> Array:
        """The mean of the features of all sentences of the training intents."""
        sentences = [sentence for name in self.names[: IN_PART["train"]] for sentence in self._intents[name]]
        assert self._encoder is not None
        found: Array = unit_length(encode_all(self._encoder, Texts(sentences))).mean(axis=0)
        return found

    @cached_property
    def out_of_scope(self) -> Tensor:
        """The token ids of 1,200 sentences that ask for none of the intents, int64 [n, max-length]."""
        return torch.from_numpy(self.encode(self._beside))

    def intents_of(self, task_id: str) -> list[str]:
        """Return the names of the intents that a user's episodes are drawn from."""
        return [self.names[i] for i in self._own[task_id]]

    def _episode(self, task_id: str, rng: np.random.Generator, ways: int) -> TaskData:
        shots = self._options.shots
        intents = rng.choice(self._own[task_id], size=ways, replace=False)
        order = rng.random((ways, SENTENCES)) + self._is_copy[intents]  # copies last, where none is drawn
        order = order.argsort(axis=1)[:, : shots + self._options.query_shots]
        sentences = self._ids[intents[:, None], order]
        query = _batch(sentences[:, shots:])
        return TaskData(_batch(sentences[:, :shots]), query, query)

    def _intents_of(self, split: str, number: int) -> Array:
        """Return the places in `names` of the intents that a user has."""
        before = sum(IN_PART[other] for other in SPLITS[: SPLITS.index(split)])
        of_part = np.arange(before, before + IN_PART[split])
        if not self._options.own_intents:
            return of_part
        rng = generator(self._options.data_seed, "intents", "own", split, number)
        # A part with fewer intents than a user is to have gives all of them.
        return np.sort(rng.permutation(of_part)[: self._options.own_intents])

    def _clients(self, split: str) -> int:
        return int(getattr(self._options, f"{split}_clients"))

    def _refuse_too_many(self) -> None:
        options, drawn = self._options, self._options.shots + self._options.query_shots
        if drawn >= SENTENCES:  # one intent has a sentence twice
            raise DataError(
                f"`shots` + `query-shots` must be below {SENTENCES}, the sentences of an intent of data set `intents`, got "
                f"{drawn}: lower one of them"
            )
        ways = max(options.ways, self._train_ways)
        if options.own_intents and ways > options.own_intents:
            raise DataError(
                f"`own-intents` must be 0 or at least {ways}, the intents of an episode of data set `intents`, got "
                f"{options.own_intents}: raise it, or lower `ways` or `train-ways`"
            )


def _batch(sentences: Array) -> Batch:
    """Return int64 [ways, count, length] as [ways * count, length] with labels 0..ways-1."""
    ways, count, length = sentences.shape
    x = torch.from_numpy(np.ascontiguousarray(sentences)).reshape(ways * count, length)
    return Batch.of(x, torch.arange(ways).repeat_interleave(count))


def _rank(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()


def _copies(sentences: Array) -> Array:
    """Return bool [sentence]: True for one with the same tokens as an earlier one."""
    copies = np.ones(len(sentences), dtype=bool)
    copies[np.unique(sentences, axis=0, return_index=True)[1]] = False
    return copies


def _tokenizer(options: IntentsOptions) -> Tokenizer:
    """Return the tokenizer in a directory. Raises DataError."""
    if not options.tokenizer:
        raise DataError(
            "`intents.tokenizer` must name a directory with a tokenizer.json, got '': take that of the encoder, "
            "`transformer.directory`; or name a frozen encoder with `intents.encoder`"
        )
    return Tokenizer(Path(options.tokenizer).expanduser() / TOKENIZER, options.max_length)


def _read(path: Path) -> tuple[dict[str, list[str]], list[str]]:
    """Return the sentences of every intent, and those that ask for none. Raises DataError."""
    require_file(path)
    try:
        with gzip.open(path) as file:
            text = file.read(MAX_BYTES + 1)
        content = json.loads(text) if len(text) <= MAX_BYTES else None
    except (OSError, EOFError, zlib.error, ValueError, RecursionError) as error:
        raise DataError(f"the data file '{path}' is not readable JSON packed by gzip ({error}): fetch it again") from error
    match content:
        case {"intents": dict(intents), "out_of_scope": list(beside)}:
            found: dict[str, Any] = {
                name: one.get("sentences") if isinstance(one, dict) else 0 for name, one in intents.items()
            }
        case _:
            found, beside = {}, []
    lists = [*found.values(), beside]
    right = len(found) == INTENTS and all(isinstance(one, list) and len(one) == SENTENCES for one in lists[:-1])
    if not right or not all(isinstance(sentence, str) for one in lists for sentence in one):
        raise DataError(
            f"'{path}' must hold `intents`, {INTENTS} of them with {SENTENCES} `sentences` each, and `out_of_scope`, got "
            "something else: fetch it again"
        )
    return found, beside


__all__ = ["FILE", "Intents", "IntentsOptions"]
