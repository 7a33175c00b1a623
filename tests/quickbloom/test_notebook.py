"""`quickbloom.run` as a cell of a real notebook: a Jupyter kernel runs it, and what it shows is read from the notebook."""

from pathlib import Path
from typing import Any

import nbformat
import pytest
from nbclient import NotebookClient

from quickbloom.common.algorithms.fomaml import FoMaml

DATA = """
import numpy, pandas, quickbloom
x = numpy.random.default_rng(0).normal(size=160)
frame = pandas.DataFrame({"x": x, "y": numpy.where(x > 0, "up", "down"), "user": [f"u{i % 8}" for i in range(160)]})
"""
RUN = 'run = quickbloom.run("fomaml", data=frame, task="user", target="y", rounds=3, evaluate_every=1, output="{name}")'


def executed(folder: Path, *cells: str) -> list[Any]:
    """The outputs of each cell; CellExecutionError if one raises."""
    code: list[dict[str, Any]] = [
        {"cell_type": "code", "source": cell, "metadata": {}, "outputs": [], "execution_count": None} for cell in cells
    ]
    notebook = nbformat.from_dict({"nbformat": 4, "nbformat_minor": 4, "metadata": {}, "cells": code})  # type: ignore[no-untyped-call]
    NotebookClient(notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}).execute()
    return [cell.outputs for cell in notebook.cells]


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    folder = tmp_path_factory.mktemp("notebook")
    again = RUN.format(name="b") + '\nimport json; print(json.dumps(run.summary["test"]) == first)'
    first = RUN.format(name="a") + '\nimport json; first = json.dumps(run.summary["test"])'
    tables = "print(type(run.history).__name__, list(run.history.index + 1), sorted(run.per_task['split'].unique()))"
    return executed(folder, DATA, first, again, "run", tables)


def said(cell: list[Any], stream: str) -> str:
    return "".join(output.text for output in cell if output.output_type == "stream" and output.name == stream)


def test_a_data_frame_is_trained_on_and_nothing_goes_wrong(outputs: list[Any]) -> None:
    shown = " ".join(str(output) for cell in outputs for output in cell)
    assert "Traceback" not in shown
    assert "Warning" not in shown


def test_a_bar_below_the_cell_says_how_the_last_round_went(outputs: list[Any]) -> None:
    (shown,) = (output for output in outputs[1] if output.output_type != "stream")  # beside what the run warns of
    assert '<progress max="3" value="3">' in shown.data["text/html"]
    assert "round 3/3   query loss" in shown.data["text/html"]


def test_a_second_run_in_the_same_kernel_has_the_same_result(outputs: list[Any]) -> None:
    assert said(outputs[2], "stdout").strip().endswith("True")


def test_a_run_is_displayed_as_a_table(outputs: list[Any]) -> None:
    (result,) = outputs[3]
    assert "<pre" in result.data["text/html"]
    assert FoMaml.name in result.data["text/html"]
    assert "balanced accuracy" in result.data["text/html"]


def test_tables_are_data_frames(outputs: list[Any]) -> None:
    assert said(outputs[4], "stdout").strip() == "DataFrame [1, 2, 3] ['seen', 'test', 'validation']"
