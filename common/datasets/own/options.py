"""Settings of a user's own data, and the reading of lists in them."""

import csv
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from quickbloom.common.datasets.own.files.csv_file import PACKED
from quickbloom.common.datasets.own.text import as_name
from quickbloom.common.datasets.partitioned import PartitionedOptions
from quickbloom.common.options import Text


class OwnOptions(PartitionedOptions):
    """Settings of the data set `own`."""

    path: str = Field("", description="the user's .npz, .csv, .csv.gz, .parquet, .jsonl, folder of images, or module:function")
    task_column: str = Field("task", description="column that says which task a row belongs to")
    task_name: str = Field("", description='name of the only task of a file without a task column; "": such a file is refused')
    target_column: str = Field("", description='column to predict; "": `target`, `label`, `class` or `y`, whichever is there')
    time_column: str = Field(
        "", description='column by which rows of a task are cut, support first and test last; "": drawn by their content'
    )
    split_column: str = Field("", description='column with train, validation or test, of rows or of whole tasks; "": none')
    features: str = Field("", description='columns to predict from, with commas between them; "": all others')
    kind: Literal["auto", "classification", "regression"] = Field("auto", description="auto: by the values of the target")
    classes: Text = Field("", description='class labels in order, with commas between them; "": those of the file, sorted')
    encoder: str = Field(
        "",
        description="frozen pretrained model that turns texts, images or rows into features: onnx:FILE, sentence:DIRECTORY, "
        'timm:NAME or module:factory; "": none',
    )
    encoder_pooling: Literal["auto", "mean", "class", "last"] = Field(
        "auto", description="how an encoder's states of a sequence become one example's features; auto: as its files say"
    )
    encoder_views: int = Field(
        1,
        ge=1,
        le=64,
        description="views of each picture that are encoded for training, which draws among them: the picture itself, and "
        "cuts of it; tests see the picture itself",
    )
    encoder_flips: bool = Field(True, description="mirror half of the cuts: not for writing, or where left and right differ")
    carry_encoder: Literal["auto", True, False] = Field(
        "auto",
        description="write the encoder's ONNX file into the last checkpoint and personal models, so that a device needs no "
        "other file; auto: up to 8 MB",
    )
    text: str = Field("", description='columns of text for the encoder, or the tokenizer, with commas between them; "": none')
    tokenizer: str = Field(
        "",
        description='directory whose tokenizer.json makes token ids of a column, for a model that reads text itself; "": none',
    )
    tokens: int = Field(32, ge=1, le=512, description="most tokens of a text, for a model that reads text itself")
    shots: int = Field(0, ge=0, description="support examples per class (regression: in all) of a task; 0: 40 % of its rows")
    missing: str = Field("", description="more words that mean a missing value, such as none, with commas between them")
    categorical: str = Field(
        "", description="columns to read as categories even if they look like numbers, with commas between them"
    )
    vocabulary_limit: int = Field(
        256, ge=1, le=4096, description="most categories of a text column that become inputs; rarer ones are `other`"
    )
    vocabulary_min_count: int = Field(
        1, ge=1, description="rows of a node that must hold a category before its hash leaves the node; others are `other`"
    )
    date_order: Literal["auto", "day-first", "month-first"] = Field(
        "auto", description="how to read 3/4/2024; auto: by other dates of the column, such as 31/3/2024"
    )
    cyclic: str = Field(
        "", description="columns of dates or times that also give their place in the day, week and year, with commas"
    )
    target_deviation: float = Field(
        1.0, gt=0, description="regression: divisor of a task's target if all targets of its support are equal"
    )
    scale: Literal["auto", "shared", "features", "task"] = Field(
        "auto",
        description="standardise by what all training tasks show (shared), or each task by its own support (task), where an "
        "encoder's features alone are moved by their mean (features); auto: shared, but with secure sums, or with "
        "`privacy.centre-noise`, features if there is an encoder, and else task with privacy or a rule against liars",
    )
    image_side: int = Field(28, ge=8, le=256, description="pixels that images are scaled to, each way")
    leave_out: str = Field("", description='test on this task alone, and train on all others; "": split by seed')

    def cleaned(self) -> "OwnOptions":
        """Return the settings with names as they are compared: without surrounding spaces, and composed (NFC)."""
        names = ("task_column", "task_name", "target_column", "time_column", "split_column", "leave_out")
        return self.model_copy(update={name: as_name(getattr(self, name)) for name in names})


def listed(setting: str, known: Collection[str] = ()) -> list[str]:
    """Return the names in a comma-separated setting. A name with a comma is quoted, or recognised as one of `known`.

    `listed('"Weight, kg",age')` and `listed("Weight, kg,age", ["Weight, kg", "age"])` are both
    ["Weight, kg", "age"].
    """
    if not setting.strip():
        return []
    if '"' in setting:
        return [as_name(name) for name in next(csv.reader([setting], skipinitialspace=True))]
    parts = setting.split(",")
    names, at = [], 0
    while at < len(parts):
        ends = (end for end in range(len(parts), at, -1) if as_name(",".join(parts[at:end])) in known)
        end = next(ends, at + 1)
        names.append(as_name(",".join(parts[at:end])))
        at = end
    return names


def quoted(names: Iterable[str]) -> str:
    """Return the setting that `listed` reads as these names."""
    return ",".join(f'"{name}"' if "," in name else name for name in names)


def task_of_file(path: str) -> str:
    """Return the default task name of a file without a task column: "/data/ward-7.csv" and "ward-7.csv.gz" give "ward-7"."""
    file = Path(path).expanduser().absolute()
    if ":" in path and not file.exists():  # "my_module:function" stays whole
        return path
    return file.name[: -len(PACKED)] if file.name.lower().endswith(PACKED) else file.stem
