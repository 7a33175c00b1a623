"""Remarks on a user's data: possible mistakes, what is silently ignored, and what a score would not mean; one sentence each.

cells      what was converted or skipped, and cells that may be slips
"""

from quickbloom.common.datasets.own.remarks.cells import of, on_doubtful_numbers

__all__ = ["of", "on_doubtful_numbers"]
