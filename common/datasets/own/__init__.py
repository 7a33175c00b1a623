"""A user's own data: what is read from a file, and how it becomes tasks, inputs and targets.

tables, csv_file, parquet_file   a file as named columns
text, numbers, dates             what a cell says
columns, vocabulary, target      what a column is, and what of it all nodes agree on
dataset, preparation, remarks    tasks, their inputs, and what a person should look at
"""

from quickbloom.common.datasets.own.columns import MixedColumnError
from quickbloom.common.datasets.own.dataset import Own
from quickbloom.common.datasets.own.options import OwnOptions, task_of_file

__all__ = ["MixedColumnError", "Own", "OwnOptions", "task_of_file"]
