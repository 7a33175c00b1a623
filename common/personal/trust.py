"""Decides which settings of a foreign file are used. Such a file may cause computation and nothing else.

Anybody may have made a checkpoint or a personal model. Two kinds of its settings would do more than
compute. Some name code to import and call (`model = "module:factory"`, or data from a
`module:function`). Others name places (a path to read, a server to report to). They are used only
if the user typed the same; the error message shows what to type. A file never decides where a run
is written.
"""

import shlex
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from quickbloom.common.config.key_value import split_assignment
from quickbloom.common.datasets import DATASETS
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.encoders import is_code
from quickbloom.common.errors import ConfigError, as_told
from quickbloom.common.models import is_own_model

Settings = Mapping[str, Any]

PLACES = ("weights", "transformer.directory", "intents.tokenizer", "own.tokenizer", "root-path")
"""Settings that say where files of a model, or of the server's root set, are on this machine."""
_OF_A_ROOT_SET = ("aggregate", "root-tasks", "root-path")
NEVER = ("output-dir", "resume-from")
"""Settings that are never taken from a file."""


@dataclass(frozen=True)
class Guarded:
    """A setting that the user has to type.

    `flag`: the option that sets it; `counts`: whether the setting has an effect.
    """

    key: str
    flag: str
    counts: Callable[[Settings], bool]

    def typed(self, settings: Settings) -> str:
        """Return the option and the value, quoted for a shell."""
        return self.flag + shlex.quote(str(settings[self.key]))


def _names_a_model(settings: Settings) -> bool:
    return is_own_model(str(settings.get("model", "")))


def _names_data(settings: Settings) -> bool:
    return settings.get("dataset") == "own" and bool(settings.get("own.path"))


def _names_a_data_set_of_the_hub(settings: Settings) -> bool:
    return settings.get("dataset") == "hub" and bool(settings.get("hub.name"))


def _names_an_encoder(settings: Settings) -> bool:
    return settings.get("dataset") == "own" and bool(settings.get("own.encoder"))


def _names_an_encoder_of_intents(settings: Settings) -> bool:
    return settings.get("dataset") == "intents" and bool(settings.get("intents.encoder"))


def _names_a_folder(settings: Settings) -> bool:
    dataset, named = DATASETS.get(str(settings.get("dataset"))), str(settings.get("data-dir") or "")
    # The folder that would be used anyway needs no trust.
    return bool(dataset and dataset.needs_files and named and resolve_data_dir(named) != resolve_data_dir("").absolute())


def _names_devices(settings: Settings) -> bool:
    return settings.get("devices", "") not in ("", "even", "lognormal")


def _names_a_server(settings: Settings) -> bool:
    return bool(settings.get("mlflow"))


def _is_used(place: str, settings: Settings) -> bool:
    table = place.rpartition(".")[0]
    model = settings.get("model")
    if model == "auto" and settings.get(f"{settings.get('dataset')}.tokenizer"):
        model = "transformer"  # what reads token ids
    return bool(settings.get(place)) and table in ("", model, settings.get("dataset"))


GUARDED = (
    Guarded("model", "--trust-model ", _names_a_model),
    Guarded("own.path", "--data ", _names_data),
    Guarded("hub.name", "--set hub.name=", _names_a_data_set_of_the_hub),
    Guarded("own.encoder", "--encoder ", _names_an_encoder),
    Guarded("intents.encoder", "--set intents.encoder=", _names_an_encoder_of_intents),
    Guarded("data-dir", "--set data-dir=", _names_a_folder),
    Guarded("devices", "--set devices=", _names_devices),
    Guarded("mlflow", "--set mlflow=", _names_a_server),
    *(Guarded(place, f"--set {place}=", partial(_is_used, place)) for place in PLACES),
)


def flags(settings: Settings, given: Collection[str] = ()) -> str:
    """Return the options to type to continue a run with these settings: "--data a.csv", or "".

    `given`: names of settings that are typed already.
    """
    return " ".join(one.typed(settings) for one in GUARDED if one.key not in given and one.counts(settings))


def of_a_run(settings: Settings, given: Collection[str]) -> dict[str, Any]:
    """Return the settings of a checkpoint that a resumed run may use. Raises ConfigError if a guarded one is not `given`.

    `given`: names of the settings that the user typed; those take precedence anyway.
    """
    if missing := flags(settings, given):
        raise ConfigError(
            "`resume-from` names a checkpoint whose settings name code or places, which are never taken from a file: if you "
            f"trust them, add {as_told(missing, 1000)}"
        )
    return {key: value for key, value in settings.items() if key not in NEVER}


def check_encoder(encoder: str, trusted: Collection[str], what: str) -> None:
    """Raise ConfigError if a file names an encoder that is code, and which is not trusted.

    Files of weights may be named: they are only computed with, and their SHA-256 has to be that of the training.
    """
    if encoder and is_code(encoder) and encoder not in trusted:
        raise ConfigError(
            f"{what} needs the code '{as_told(encoder, 200)}' as its encoder, which is never run only because a file names it: "
            f"if you trust that code, add --trust-model {as_told(shlex.quote(encoder), 200)}"
        )


def of_a_model(settings: Settings, trusted: Collection[str], what: str) -> dict[str, Any]:
    """Return the settings of a file whose model is used offline, without any place but those that the user names.

    `trusted`: user models, as "module:factory", that may be imported, and `PLACES`, as "weights=FILE". `what`: "the
    personal model 'a.safetensors'". Raises ConfigError for a user model that is not trusted.
    """
    named = dict(split_assignment(one) for one in trusted if "=" in one)
    if unknown := sorted(named.keys() - set(PLACES)):
        raise ConfigError(f"`--set` must be one of {', '.join(PLACES)} here, got '{unknown[0]}': {what} says everything else")
    model = str(settings.get("model", ""))
    if _names_a_model(settings) and model not in trusted:
        raise ConfigError(
            f"{what} needs the code '{as_told(model, 200)}', which is never run only because a file names it: if you trust "
            f"that code, add {as_told(GUARDED[0].typed(settings), 200)}"
        )
    dropped = {*NEVER, *(one.key for one in GUARDED if one.key not in ("model", "own.encoder"))}
    kept = {**{key: value for key, value in settings.items() if key not in dropped}, **named}
    # The rule that needs a root set needs its file, which is on the server alone, and nothing is aggregated offline.
    return {key: value for key, value in kept.items() if kept.get("aggregate") != "fltrust" or key not in _OF_A_ROOT_SET}
