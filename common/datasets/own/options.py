"""The settings of a user's own data, and how lists in them are read."""

import csv
from collections.abc import Collection, Iterable
from pathlib import Path
from typing import Literal

from pydantic import Field

from quickbloom.common.datasets.own.text import as_name
from quickbloom.common.options import Options, Text


class OwnOptions(Options):
    """Settings of the data set `own`."""

    path: str = Field("", description="the user's .npz, .csv, .parquet, .jsonl, folder of images, or module:function")
    task_column: str = Field("task", description="column that says which task a row belongs to")
    task_name: str = Field(
        "", description='where the file has no task column, all its rows are one task of this name; "": it is refused'
    )
    target_column: str = Field("", description='column to predict; "": `target`, `label`, `class` or `y`, whichever is there')
    split_column: str = Field("", description='column with train, validation or test, of rows or of whole tasks; "": none')
    features: str = Field("", description='columns to predict from, with commas between them; "": all others')
    kind: Literal["auto", "classification", "regression"] = Field("auto", description="auto: by the values of the target")
    classes: Text = Field("", description='class labels in order, with commas between them; "": those of the file, sorted')
    shots: int = Field(0, ge=0, description="support examples per class (regression: in all) of a task; 0: 40 % of its rows")
    missing: str = Field("", description="more words that mean a missing value, such as none, with commas between them")
    categorical: str = Field(
        "", description="columns of categories even where these look like numbers, with commas between them"
    )
    vocabulary_limit: int = Field(
        256, ge=1, le=4096, description="categories of a text column that are inputs, the most frequent; others are `other`"
    )
    vocabulary_min_count: int = Field(
        1, ge=1, description="rows of a node that must hold a category before its hash leaves the node; rarer ones are `other`"
    )
    date_order: Literal["auto", "day-first", "month-first"] = Field(
        "auto", description="how 3/4/2024 is meant; auto: by other dates of the column, such as 31/3/2024"
    )
    cyclic: str = Field(
        "", description="columns of dates or times that also become their place in the day, week and year, with commas"
    )
    target_deviation: float = Field(
        1.0, gt=0, description="regression: what a task's target is divided by where all targets of its support are the same"
    )
    image_side: int = Field(28, ge=8, le=256, description="pixels that images are scaled to, each way")
    leave_out: str = Field("", description='this task alone is tested, all others train; "": split by seed')

    def cleaned(self) -> "OwnOptions":
        """With names as they are compared: without blanks round them, and composed (NFC)."""
        names = ("task_column", "task_name", "target_column", "split_column", "leave_out")
        return self.model_copy(update={name: as_name(getattr(self, name)) for name in names})


def listed(setting: str, known: Collection[str] = ()) -> list[str]:
    """The names in a setting, with commas between them. A name with a comma is quoted, or recognised as one of `known`.

    `listed('"Weight, kg",age')` and `listed("Weight, kg,age", ["Weight, kg", "age"])` are both ["Weight, kg", "age"].
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
    """The setting that `listed` reads as these names."""
    return ",".join(f'"{name}"' if "," in name else name for name in names)


def task_of_file(path: str) -> str:
    """What all rows of a file without a task column are called, if nobody has said: "/data/ward-7.csv" is "ward-7"."""
    file = Path(path).expanduser().absolute()
    return path if ":" in path and not file.exists() else file.stem  # "my_module:function" may not be "my_module"
