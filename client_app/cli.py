"""The `quickbloom-edge` command, for a person with a device and their own file."""

import json
import sys
from collections.abc import Collection
from pathlib import Path
from typing import Annotated

import typer

from quickbloom.common.config.key_value import scalar, split_assignment
from quickbloom.common.errors import ConfigError, JoinError
from quickbloom.common.formatting import counted
from quickbloom.common.metric import RMSE, named
from quickbloom.common.printable import one_line
from quickbloom.common.system import logs
from quickbloom.common.system.command import perform
from quickbloom.common.system.terminal import FAILED, OK, say, say_error
from quickbloom.common.system.whole_files import whole

cli = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)

Trusted = Annotated[
    list[str] | None,
    typer.Option("--trust-model", metavar="MODULE:FACTORY", help="Your own code that the file may import and run; repeat."),
]

Places = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="Where files of a pretrained model are, such as weights=FILE; repeat.",
        show_default=False,
    ),
]


def _named(trust: list[str] | None, places: list[str] | None) -> list[str]:
    """Return what the user lets a file use: code, and the places of a model's files."""
    return [*(trust or []), *("=".join(split_assignment(one)) for one in places or [])]


_WHICH = {
    "test": ("test row", "of the data that it was adapted to"),
    "all": ("row", "with a target"),
    "cross-validation": ("row", "that it was adapted to, by cross-validation"),
}
"""Rows that a personal model is scored on, by `Score.part`."""


@cli.callback()
def _commands() -> None:
    """A device's side of a federation.

    Example: quickbloom-edge check-data hospitals.csv --task hospital --target outcome
    """


@cli.command()
def check_data(
    path: Annotated[
        str,
        typer.Argument(
            help="A .csv, .csv.gz, .parquet, .jsonl or .npz file, a folder of images, or module:function; to see a partition "
            "also digits, fashion-mnist or hub:NAME."
        ),
    ],
    task: Annotated[
        str, typer.Option(help="Column that says whose row it is; by default `task`, without one all rows are one task.")
    ] = "",
    target: Annotated[str, typer.Option(help="Column to predict.")] = "",
    time: Annotated[
        str, typer.Option(help="Column of dates, times or numbers by which each task's rows are cut: support first, test last.")
    ] = "",
    encoder: Annotated[str, typer.Option(help="The run's frozen encoder, such as onnx:FILE or sentence:DIRECTORY.")] = "",
    text: Annotated[str, typer.Option(help="Columns of text for the encoder, with commas between them.")] = "",
    partition: Annotated[
        str, typer.Option(help="The run's partition over simulated users, such as dirichlet:0.1: shows who holds what.")
    ] = "",
    users: Annotated[int | None, typer.Option(help="How many simulated users.", min=1)] = None,
    set_: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="KEY=VALUE", help="A setting of the run, such as own.categorical=ward; repeat."),
    ] = None,
    show: Annotated[int, typer.Option(help="Number of rows to show as the model sees them.", min=0)] = 0,
) -> None:
    """Say what a file holds and what is wrong with it; nothing connects. Exit code: 0 usable, 2 not.

    Example: quickbloom-edge check-data hospitals.csv --task hospital --target outcome --set own.shots=5 --show 5

    Example: quickbloom-edge check-data fashion-mnist --partition dirichlet:0.1 --users 20
    """
    from quickbloom.client_app.check_data import describe  # imports torch, which takes seconds

    settings = {key: scalar(value) for key, value in map(split_assignment, set_ or [])}
    named = {"own.encoder": encoder, "own.text": text, "partition": partition, "users": users}
    settings |= {key: value for key, value in named.items() if value}
    for line in describe(path, task, target, settings=settings, show=show, time=time):
        print(one_line(line))


@cli.command()
def adapt(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, a run directory, or the state-dir of a node.")],
    data: Annotated[str, typer.Option(help="Your own file; see docs/own-data.md.")],
    output: Annotated[Path, typer.Option(help="Folder of the personal models, one for each task; or one .safetensors file.")],
    task: Annotated[str, typer.Option(help="Its column that says whose row it is; by default as in the run.")] = "",
    target: Annotated[str, typer.Option(help="Its column to predict; by default as in the run.")] = "",
    time: Annotated[
        str, typer.Option(help="Its column that orders its rows, for the score alone; by default as in the run.")
    ] = "",
    folds: Annotated[
        int, typer.Option(help="Folds, at most, of the cross-validation that scores the model; 0: no score.", min=0)
    ] = 5,
    encoder: Annotated[str, typer.Option(help="Where the encoder is here, if the run has one and it is elsewhere.")] = "",
    own_rows: Annotated[
        bool, typer.Option(help="Let ridge or a constant on these rows alone be the model, where that is clearly better.")
    ] = True,
    trust: Trusted = None,
    set_: Places = None,
) -> None:
    """Make a trained model your own, offline: adapt it to all rows of your file. Exit code: 0 done, 2 wrong input.

    Example: quickbloom-edge adapt --checkpoint runs/r --data ward.csv --output mine
    """
    from quickbloom.client_app.offline.adapting import adapt as make_personal  # imports torch, which takes seconds
    from quickbloom.client_app.personal_models import in_words

    for model in make_personal(
        checkpoint, data, output, task, target, say, _named(trust, set_), folds, time, own_rows, encoder
    ):
        print(one_line(in_words(model)))


@cli.command()
def predict(
    model: Annotated[Path, typer.Option(help="A personal model, or a folder of them, such as STATE/personal.")],
    input_: Annotated[str, typer.Option("--input", help="A file with the columns of the training data.")],
    output: Annotated[
        Path | None, typer.Option(help="CSV file of the predictions, packed if it ends in .gz; by default they are printed.")
    ] = None,
    explain: Annotated[
        bool,
        typer.Option("--explain", help="Say what the model goes by: how much its score falls when a column is shuffled."),
    ] = False,
    checkpoint: Annotated[
        Path | None,
        typer.Option(help="With --explain: what the model was adapted from, to say which columns moved it away from that."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="With --explain: as JSON.")] = False,
    encoder: Annotated[str, typer.Option(help="Where the model's encoder is, if it is elsewhere than when it was made.")] = "",
    trust: Trusted = None,
    set_: Places = None,
) -> None:
    """Predict with a personal model, offline; score it if the file holds targets. Exit code: 0 done, 2 wrong input.

    Example: quickbloom-edge predict --model mine --input new-patients.csv --output predictions.csv
    """
    from quickbloom.client_app.offline.predicting import predict as use

    if (checkpoint or json_) and not explain:
        raise ConfigError(f"`--{'checkpoint' if checkpoint else 'json'}` is for `--explain`: add that, or leave it out")
    if explain:
        _explain(model, input_, checkpoint, json_, _named(trust, set_), encoder)
        if output is None:
            return
    found = use(model, input_, _named(trust, set_), encoder)
    if output is None:
        found.write_csv(sys.stdout)
    else:
        try:
            with whole(output, newline="", packed=output.name.lower().endswith(".gz")) as file:
                found.write_csv(file)
            say(f"Predictions for {counted(len(found.rows), 'row')}: {output}")
        except OSError as error:
            raise ConfigError(f"`--output` must be a file that can be written, got '{output}' ({error.strerror})") from None
    for remark in found.remarks:
        say(f"Remark: {remark}")
    if missing := found.without():
        say(
            f"No prediction for {counted(len(missing), 'row')} (the first: row {missing[0]}): what the model computes there is "
            "no finite number, so it has diverged, or their values are far from those that it was trained on"
        )
    for scored in found.scores:
        thing, which = _WHICH[scored.part]
        on = f"{counted(scored.examples, thing)} {which}"
        unit = "" if scored.rmse is None else f" (rmse {RMSE.score(scored.rmse)} in the unit of the target)"
        say(f"{scored.task}: {scored.name} {named(scored.name).score(scored.value)}{unit} on {on}")


def _explain(model: Path, data: str, checkpoint: Path | None, as_json: bool, trust: Collection[str], encoder: str) -> None:
    from quickbloom.client_app.offline.explaining import explain

    found = explain(model, data, checkpoint, trust, encoder=encoder)
    if as_json:
        print(json.dumps([one.to_json() for one in found], indent=2))
        return
    for line in (line for one in found for line in one.lines()):
        print(one_line(line))
    if checkpoint is None:
        say("Which columns moved the model away from the shared one is said with `--checkpoint`, what it was adapted from")


@cli.command()
def score(
    checkpoint: Annotated[Path, typer.Option(help="A checkpoint, a run directory, or the state-dir of a node.")],
    episodes: Annotated[
        list[Path],
        typer.Option(help="An .npz file of one or many episodes: support_x, support_y, query_x, query_y; repeat."),
    ],
    together: Annotated[
        bool, typer.Option("--together", help="Also with all queries of an episode together, where the model compares them.")
    ] = False,
    refine: Annotated[
        int, typer.Option(help="Also with prototypes that the queries move so many times; for protonet.", min=0)
    ] = 0,
    steps: Annotated[
        int | None, typer.Option(help="Steps of adaptation; by default those of the checkpoint.", min=0, show_default=False)
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON, with the error of each episode.")] = False,
    trust: Trusted = None,
    set_: Places = None,
) -> None:
    """Score a checkpoint on foreign episodes: adapt to each support set, count wrong queries. Exit code: 0 done, 2 wrong input.

    Example: quickbloom-edge score --checkpoint runs/r --episodes episodes.npz --together --refine 5
    """
    from quickbloom.client_app.offline.scoring import score as count_errors  # imports torch, which takes seconds

    found = count_errors(checkpoint, episodes, together, refine, steps, _named(trust, set_), say)
    if json_:
        print(json.dumps(found.to_json(), indent=2))
        return
    for line in found.lines():
        print(one_line(line))


@cli.command()
def export(
    model: Annotated[Path, typer.Option(help="A personal model.")],
    output: Annotated[Path, typer.Option(help="The file to write, such as mine.onnx or mine.pt2.")],
    format_: Annotated[str, typer.Option("--format", help="onnx, or torch (torch.export).")] = "onnx",
    with_encoder: Annotated[
        bool, typer.Option("--with-encoder", help="Write the model's frozen encoder into the same file; for ONNX.")
    ] = False,
    encoder: Annotated[str, typer.Option(help="Where the model's encoder is, if it is elsewhere than when it was made.")] = "",
    trust: Trusted = None,
    set_: Places = None,
) -> None:
    """Write a personal model for other programs, and check the copy's outputs. Exit code: 0 done, 2 wrong input.

    Example: quickbloom-edge export --model mine --format onnx --output mine.onnx
    """
    from quickbloom.client_app.export import export as write

    print(write(model, output, format_, _named(trust, set_), with_encoder=with_encoder, encoder=encoder))


@cli.command()
def join(
    server: Annotated[str, typer.Option(metavar="HOST:PORT", help="Where the SuperLink takes nodes.")],
    secrets: Annotated[Path, typer.Option(help="Folder with ca.crt and node.key, from `quickbloom secrets`.", readable=False)],
    data: Annotated[str, typer.Option(help="Your own file; it is checked before anything connects.")] = "",
    task: Annotated[str, typer.Option(help="Its column that says whose row it is; by default as the run says.")] = "",
    task_name: Annotated[
        str, typer.Option(help="The task that all its rows are, if it has no such column; by default the file's name.")
    ] = "",
    target: Annotated[str, typer.Option(help="Its column to predict.")] = "",
    time: Annotated[str, typer.Option(help="Its column that orders each task's rows; by default as the run says.")] = "",
    encoder: Annotated[str, typer.Option(help="Where the run's encoder is here, such as onnx:FILE.")] = "",
    state: Annotated[
        Path | None, typer.Option(help="Folder for what never leaves this device; by default one in ~/.local/state/quickbloom.")
    ] = None,
    threads: Annotated[int | None, typer.Option(help="CPU threads.", min=1)] = None,
    chunk_size: Annotated[
        int | None, typer.Option(help="Tasks computed at once: lower it where memory is short.", min=1)
    ] = None,
    quiet_hours: Annotated[
        str, typer.Option(metavar="HH:MM-HH:MM", help="Take no part in these hours of the day, in local time.")
    ] = "",
    set_: Annotated[list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="A node setting; repeat.")] = None,
    lean: Annotated[
        bool | None,
        typer.Option(
            "--lean/--warm",
            help="Keep little in memory between two messages, or be quick; by default lean below 2 GB.",
            show_default=False,
        ),
    ] = None,
    port: Annotated[int, typer.Option(help="Port on loopback for the node's own processes.", min=1, max=65535)] = 9094,
    poll: Annotated[
        float,
        typer.Option(help="Seconds, at most, between two looks for work; up to 10 while the server is busy.", min=0.05, max=60),
    ] = 3.0,
    log_format: logs.FormatOption = logs.Format.TEXT,
    log_file: logs.FileOption = None,
    log_size: logs.SizeOption = 10.0,
) -> None:
    """Take part in a federation until stopped; finds the server again by itself. Exit code: 0 stopped, 1 failed, 2 wrong input.

    Example: quickbloom-edge join --server fl.example.org:9092 --secrets node-1 --data ward.csv --task ward --target outcome

    Example: quickbloom-edge join --server fl.example.org:9092 --secrets node-1 --log-format json --log-file node.log
    """
    from quickbloom.client_app.join import join as take_part
    from quickbloom.client_app.join import name_of
    from quickbloom.client_app.quiet_hours import QuietHours

    logs.begin(logs.Settings(log_format, log_file, log_size), node=name_of(secrets))
    # Absolute, because Flower's processes run in other directories.
    file = str(Path(data).expanduser().absolute()) if data and Path(data).expanduser().exists() else data
    folder = str(state.expanduser().absolute()) if state else ""
    named = {"data-path": file, "task-column": task, "task-name": task_name, "target-column": target}
    named |= {"time-column": time, "encoder": encoder}
    others = {"state-dir": folder, "threads": threads, "chunk-size": chunk_size}
    settings = {key: str(value) for key, value in {**named, **others}.items() if value}
    settings |= dict(map(split_assignment, set_ or []))
    try:
        code = take_part(server, secrets, settings, port, say, poll, QuietHours.parse(quiet_hours), lean=lean)
        raise typer.Exit(code)
    except JoinError as error:
        say_error(str(error))
        raise typer.Exit(FAILED) from None
    except KeyboardInterrupt:  # while waiting for the server
        raise typer.Exit(0) from None


@cli.command()
def status(
    state: Annotated[
        Path | None,
        typer.Option(help="The device's folder, as `join` has it; by default those in ~/.local/state/quickbloom."),
    ] = None,
    json_: Annotated[bool, typer.Option("--json", help="Print JSON: a list with an object for each device.")] = False,
) -> None:
    """Say how this device fares: does it take part, what does not fit and what to do. Exit code: 0 well, 1 not, 2 wrong input.

    Example: quickbloom-edge status --state /var/lib/quickbloom/state
    """
    from quickbloom.client_app.join import states
    from quickbloom.client_app.owner.words import Status, folders

    places = [state.expanduser()] if state else folders(states())
    if not places:
        raise ConfigError(
            f"`--state` must be named, since no device of this user has joined a federation with a folder in '{states()}': "
            "give the one that `quickbloom-edge join` has"
        )
    found = [Status.of(place) for place in places]
    if json_:
        print(json.dumps([one.to_json() for one in found], indent=2))
    else:
        for line in (line for one in found for line in one.lines()):
            print(one_line(line))
    raise typer.Exit(OK if all(one.well for one in found) else FAILED)


def main() -> None:
    """Entry point of `quickbloom-edge`."""
    perform(cli)


if __name__ == "__main__":
    main()
