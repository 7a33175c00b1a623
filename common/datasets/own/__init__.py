"""A user's own data: reading files, and turning rows into tasks, inputs and targets.

tables, csv_file, parquet_file   a file as named columns
text, numbers, dates             the meaning of a cell
columns, vocabulary, target      the kind of a column, and what all nodes agree on about it
moments                          the column that orders the rows of a task
dataset, preparation, remarks    tasks, their inputs, and possible mistakes in the data
"""

from quickbloom.common.datasets.own.columns import MixedColumnError
from quickbloom.common.datasets.own.dataset import Own
from quickbloom.common.datasets.own.options import OwnOptions, task_of_file

__all__ = ["MixedColumnError", "Own", "OwnOptions", "task_of_file"]
