"""A user's own data: reading files, and turning rows into tasks, inputs and targets.

files                              a file as named columns
text, numbers, dates               the meaning of a cell
encoded                            columns that a frozen encoder turns into features
columns, vocabulary, target        the kind of a column
agreement, scales                  what all nodes agree on about the columns
dataset, parts, simulated          tasks, and the parts into which their rows are cut
preparation, remarks               their inputs, and possible mistakes in the data
"""

from quickbloom.common.datasets.own.columns import MixedColumnError, is_encoded
from quickbloom.common.datasets.own.dataset import Own
from quickbloom.common.datasets.own.options import OwnOptions, task_of_file

__all__ = ["MixedColumnError", "Own", "OwnOptions", "is_encoded", "task_of_file"]
