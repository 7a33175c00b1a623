"""What the help of several commands says alike."""

from typing import Annotated

import typer

from quickbloom.common.datasets import DATASETS as _DATASETS

DATASETS = ", ".join(f"{name} (needs files)" if data.needs_files else name for name, data in _DATASETS.items() if name != "hub")
DATASETS += ", hub:NAME"

Time = Annotated[
    str | None, typer.Option("--time", help="Its column that orders each task's rows: they are cut in time, not shuffled.")
]
"""The column of one's own file by which rows are cut."""

Encoder = Annotated[
    str | None,
    typer.Option(
        help="A frozen pretrained model that turns its texts, images or rows into features: onnx:FILE, sentence:DIRECTORY, "
        "timm:NAME or module:factory."
    ),
]
TextColumns = Annotated[str | None, typer.Option("--text", help="Its columns of text for the encoder, with commas between.")]

Partition = Annotated[
    str | None,
    typer.Option(
        help="Spread one table over simulated users: dirichlet:0.1, pathological:2, shards, size:linear, iid or "
        "natural:COLUMN; see docs/partitions.md."
    ),
]
"""How one table of examples is spread over simulated users."""
Users = Annotated[int | None, typer.Option(help="How many simulated users.", min=1)]
