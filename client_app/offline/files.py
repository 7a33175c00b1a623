"""Personal models as files, and what a file that does not fit ends in."""

from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path

from quickbloom.common.errors import DataError, in_one_line
from quickbloom.common.personal import model as personal_model
from quickbloom.common.personal.carried import place_of
from quickbloom.common.personal.model import SUFFIX, Personal


@contextmanager
def fits_together(what: str) -> Iterator[None]:
    """Turn errors from contradictory facts of a file into DataError. `what`: "the checkpoint 'a'"."""
    try:
        yield
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise DataError(f"{what} cannot be used: its facts contradict each other ({in_one_line(error)})") from error


def one_model(path: str | Path, trust: Collection[str] = ()) -> Personal:
    """Return the personal model at `path`, a file or a folder that holds one. Raises DataError or ConfigError."""
    models = models_of(Path(path), trust)
    if len(models) > 1:
        raise DataError(f"the folder '{path}' holds {len(models)} personal models: name the file of one")
    return models[0]


def models_of(path: Path, trust: Collection[str]) -> list[Personal]:
    """Return the personal model in a file, or those in a folder. Raises DataError or ConfigError."""
    if not path.is_dir():
        return [personal_model.load(path, trust)]
    files = sorted(path.glob(f"*{SUFFIX}"))
    if not files:
        raise DataError(
            f"the folder '{path}' holds no personal model: name the output of `adapt`, or `personal` of a state-dir"
        )
    return [personal_model.load(file, trust) for file in files]


def for_files(path: Path, trust: Collection[str], encoder: str = "") -> list[Personal]:
    """Return the personal models at `path`, which predict rows of files. Raises DataError or ConfigError.

    `encoder`: where their encoder is now; "": in themselves, or where they say.
    """
    models = models_of(path, trust)
    models = [placed(one, trust, encoder) for one in models]
    for one in models:
        if (name := one.card["config"].get("dataset")) != "own":
            raise DataError(f"the personal model of '{one.task}' is for the data set `{name}`, and no file fits it")
    return models


def placed(model: Personal, trust: Collection[str], encoder: str = "") -> Personal:
    """Return a model with the place of its encoder: `encoder`, else in the model itself, else where it says.

    Raises ConfigError if that is nowhere, or code that is not in `trust`, and DataError if it has none.
    """
    if encoder:
        return model.with_encoder(encoder)
    if not model.own_options.encoder:
        return model
    named = place_of(model.encoder, model.own_options.encoder, trust, f"the personal model of '{model.task}'")
    return model.with_encoder(named) if model.encoder else model
