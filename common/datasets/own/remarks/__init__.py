"""Remarks on a user's data: possible mistakes, what is silently ignored, and what a score would not mean; one sentence each.

cells              what was converted or skipped, and cells that may be slips
order, variance    rows in order of time, and where the target's variance lies
leaks              columns that say the target in other words, and ids
units              columns that differ from task to task as they should not
copies             rows that are there twice
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from quickbloom.common.datasets.own.remarks import cells, copies, leaks, order, units
from quickbloom.common.datasets.own.remarks.cells import on_doubtful_numbers
from quickbloom.common.datasets.own.remarks.grouped import Grouped
from quickbloom.common.datasets.own.remarks.order import in_words as variance_in_words

if TYPE_CHECKING:
    from quickbloom.common.datasets.own.dataset import Own


def of(data: Own) -> list[str]:
    """Return all remarks on a file: first on its cells, in the order in which it is read, then on what they say together."""
    grouped = Grouped.of(data)
    given_away, told = order.remarks(data, grouped)
    others = (leaks.remarks(data, grouped, given_away), units.remarks(data, grouped), copies.remarks(data, grouped))
    return [*cells.of(data), *told, *(remark for part in others for remark in part)]


__all__ = ["of", "on_doubtful_numbers", "variance_in_words"]
