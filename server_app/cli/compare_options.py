"""The options of `quickbloom compare`, with their help."""

from pathlib import Path
from typing import Annotated

import typer

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.server_app.cli.options import DATASETS

# ---- what is compared

Algorithms = Annotated[str, typer.Option(help=f"With commas between them: {', '.join(ALGORITHMS)}.")]
Variants = Annotated[
    list[str] | None,
    typer.Option(
        "--variant",
        metavar="NAME:ALGORITHM,KEY=VALUE",
        help="A row of its own: an algorithm with settings, such as fedrep:heads,heads.head-steps=5; repeat.",
    ),
]
Grids = Annotated[
    list[str] | None,
    typer.Option(
        "--grid",
        metavar="KEY=VALUE,VALUE",
        help="Values to choose from by validation score, short runs first; repeat for all combinations.",
    ),
]
Modes = Annotated[
    str | None,
    typer.Option(help="sync,async: every algorithm in both, the time to sync's score and bytes; a node for each task."),
]
AsyncRounds = Annotated[
    int | None, typer.Option(help="Steps of the async runs, which are short; by default as many as --rounds.", min=1)
]
LeaveOneOut = Annotated[
    bool, typer.Option("--leave-one-out", help="Few tasks: hold each out once, in a run for each algorithm, seed and rate.")
]

# ---- on what, and how

Dataset = Annotated[str, typer.Option(help=f"Whose tasks: {DATASETS}.")]
Data = Annotated[str | None, typer.Option(help="Your own file; see docs/own-data.md.")]
Task = Annotated[str | None, typer.Option(help="Its column that says whose row it is.")]
Target = Annotated[str | None, typer.Option(help="Its column to predict.")]
Seeds = Annotated[str, typer.Option(help="How many (3: seeds 0, 1, 2), or which (0,1,5).")]
Rounds = Annotated[int, typer.Option(help="Training rounds.")]
InnerLrs = Annotated[
    str | None, typer.Option(help="Inner rates of training to choose from; by default the data set's, / 3 and x 3.")
]
TargetScore = Annotated[
    float | None,
    typer.Option(help="Validation accuracy (0..1) or mse to count rounds to; by default fedavg's last, else the weakest's."),
]
Devices = Annotated[
    str | None,
    typer.Option(help="Simulated devices in virtual time: even, lognormal, or a CSV file (docs/configuration.md)."),
]
Settings = Annotated[
    list[str] | None,
    typer.Option("--set", metavar="KEY=VALUE", help="A setting of all runs, see `quickbloom settings`; repeat."),
]
Simulation = Annotated[bool, typer.Option("--simulation", help="Run in Flower's simulation: same result, later.")]

# ---- over several machines

PlanFile = Annotated[
    Path | None,
    typer.Option("--plan", metavar="FILE", help="Write the list of runs, for other machines; with --run: the list to read."),
]
OneRun = Annotated[int | None, typer.Option("--run", metavar="K", help="Do the run in line K of the list alone, from 1 on.")]
Ray = Annotated[
    str | None,
    typer.Option("--ray", metavar="ADDRESS", help="Spread the runs over a Ray cluster that is running: HOST:PORT, or auto."),
]
Merge = Annotated[
    list[Path] | None,
    typer.Option("--merge", metavar="DIR", help="First gather what is finished in this directory; repeat."),
]

# ---- where, and what comes out

Jobs = Annotated[int | None, typer.Option(help="Runs at once; by default one per core, 1 with --simulation.", min=1)]
Output = Annotated[Path | None, typer.Option(help="Directory; by default runs/compare-DATASET.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result alone, as JSON, on stdout.")]
