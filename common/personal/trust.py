"""What a file from elsewhere may make this program do: compute, and nothing else. The one place that decides it.

A checkpoint or a personal model says how it is to be used, and may have been made by anybody. Two kinds of its settings would
do more: those that name code (`model = "module:factory"`, and data that a `module:function` makes), which is imported and
called, and those that name places (a path to read, a server to tell of the run). None of them is used unless the person at the
keyboard gave the same by hand; the sentence that refuses says what to type. Where a run is written is never a file's to say.
"""

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.errors import ConfigError, as_told
from quickbloom.common.models import is_own_model

Settings = Mapping[str, Any]

NEVER = ("output-dir", "resume-from")
"""Settings that a file has no say in at all."""


@dataclass(frozen=True)
class Guarded:
    """A setting that has to be given by hand. `flag`: what is typed before its value; `counts`: whether it does a thing."""

    key: str
    flag: str
    counts: Callable[[Settings], bool]

    def typed(self, settings: Settings) -> str:
        """The words that give it, for a shell."""
        return self.flag + shlex.quote(str(settings[self.key]))


def _names_a_model(settings: Settings) -> bool:
    return is_own_model(str(settings.get("model", "")))


def _names_data(settings: Settings) -> bool:
    return settings.get("dataset") == "own" and bool(settings.get("own.path"))


def _names_a_folder(settings: Settings) -> bool:
    dataset, named = DATASETS.get(str(settings.get("dataset"))), str(settings.get("data-dir") or "")
    # The folder that would be used anyway is not the file's idea.
    return bool(dataset and dataset.needs_files and named and resolve_data_dir(named) != resolve_data_dir("").absolute())


def _names_a_server(settings: Settings) -> bool:
    return bool(settings.get("mlflow"))


GUARDED = (
    Guarded("model", "--trust-model ", _names_a_model),
    Guarded("own.path", "--data ", _names_data),
    Guarded("data-dir", "--set data-dir=", _names_a_folder),
    Guarded("mlflow", "--set mlflow=", _names_a_server),
)


def flags(settings: Settings, given: Collection[str] = ()) -> str:
    """What is to be typed to go on with a run of these settings, if those in `given` are given: "--data a.csv", or ""."""
    return " ".join(one.typed(settings) for one in GUARDED if one.key not in given and one.counts(settings))


def of_a_run(settings: Settings, given: Collection[str]) -> dict[str, Any]:
    """The settings of a checkpoint that a run which goes on from it may take over. Raises ConfigError for those that are left.

    `given`: the names of what was given by hand, which wins anyway.
    """
    if missing := flags(settings, given):
        raise ConfigError(
            "`resume-from` names a checkpoint whose settings name code or places, in which a file has no say: if you know "
            f"them, add {as_told(missing, 1000)}"
        )
    return {key: value for key, value in settings.items() if key not in NEVER}


def of_a_model(settings: Settings, trusted: Collection[str], what: str) -> dict[str, Any]:
    """The settings of a file whose model is used offline: without any place. `what`: "the personal model 'a.safetensors'".

    `trusted`: models of somebody's own, as "module:factory", that may be imported. Raises ConfigError for another one.
    """
    model = str(settings.get("model", ""))
    if _names_a_model(settings) and model not in trusted:
        raise ConfigError(
            f"{what} needs code that is called '{as_told(model, 200)}', and a file has no say in what is run here: if you know "
            f"that code, add {as_told(GUARDED[0].typed(settings), 200)}"
        )
    dropped = {*NEVER, *(one.key for one in GUARDED if one.key != "model")}
    return {key: value for key, value in settings.items() if key not in dropped}
