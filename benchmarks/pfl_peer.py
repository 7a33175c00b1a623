"""PFLlib's own code beside this project's: the same users, images, network, settings and number of rounds.

Both sides train on the partition that this project draws, which is written in PFLlib's format; PFLlib runs as its authors
wrote it, in a process of its own. Its table of published figures is of 2,000 rounds; here both sides train a few rounds, which
shows whether an algorithm is the same one. Seconds are those of a round without tests, the median: PFLlib uses two cores by
torch's threads, this project by two nodes.

    git clone https://github.com/TsingZ0/PFLlib
    python -m venv peer && peer/bin/pip install torch numpy scikit-learn h5py calmsize cvxpy matplotlib
    python -m benchmarks.pfl_peer --peer PFLlib --peer-python peer/bin/python --rounds 5

`--only` does some rows and adds them to the result file, if that is of the same users, rounds and seeds.
"""

import os
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.pfl import BATCH, POINTS, RATE, ROWS, Row, earlier, figures, measured
from benchmarks.runner import BenchmarkError, commit, finish, goal, machine, parser, percent, say, store
from quickbloom.common.datasets.base import resolve_data_dir
from quickbloom.common.datasets.fashion_mnist import FashionMnist, FashionMnistOptions
from quickbloom.common.partition import Partition
from quickbloom.server_app.comparing.batch import today

NAME = "FashionMNIST"
PEER = {
    "Local": ("Local", ""),
    "FedAvg": ("FedAvg", ""),
    "FedProx": ("FedProx", "-mu 0.001"),
    "SCAFFOLD": ("SCAFFOLD", ""),
    "FedDyn": ("FedDyn", "-al 0.1"),
    "Per-FedAvg": ("PerAvg", ""),
    "pFedMe": ("pFedMe", "-lam 15 -K 5 -lrp 0.005"),
    "Ditto": ("Ditto", "-mu 0.1"),
    "APFL": ("APFL", ""),
    "FedPer": ("FedPer", ""),
    "FedRep": ("FedRep", "-pls 1"),
    "FedBABU": ("FedBABU", "-fte 1"),
    "LG-FedAvg": ("LG-FedAvg", ""),
    "FedRoD": ("FedRoD", ""),
    "FedALA": ("FedALA", ""),
    "FedProto": ("FedProto", "-lam 1"),
}
"""PFLlib's name of each row, and its arguments beside rate, batch, users and rounds."""
NODES = 2
"""Processes of this side; PFLlib takes torch's threads, as many as there are cores."""
SECONDS = 3600
TIMES = 5
"""How many times as many users a second this project promises."""


def main() -> None:
    commands = parser("PFLlib's own code on the same users and images", "pfl_peer", seeds=(0,))
    commands.add_argument(
        "--only", nargs="+", default=[], metavar="LABEL", help="do these rows and keep the others of the result file"
    )
    commands.add_argument("--peer", type=Path, required=True, metavar="DIRECTORY", help="a checkout of PFLlib")
    commands.add_argument("--peer-python", default=sys.executable, metavar="PATH", help="Python with what PFLlib imports")
    commands.add_argument(
        "--peer-threads",
        type=int,
        default=0,
        metavar="N",
        help="of PFLlib's torch; default: one per core, as its authors have it",
    )
    commands.add_argument("--rounds", type=int, default=5, metavar="N", help="default: %(default)s")
    commands.add_argument("--users", type=int, default=20, metavar="N", help="default: %(default)s")
    chosen = commands.parse_args()
    if unknown := sorted(set(chosen.only) - set(PEER)):
        raise SystemExit(f"`--only` must name rows of both sides ({', '.join(PEER)}), got {unknown[0]}")
    rows = [row for row in ROWS if row.label in PEER and (not chosen.only or row.label in chosen.only)]
    result: dict[str, Any] = {"schema": 1, "benchmark": "pfl-peer", "claim": "the same algorithms as PFLlib's, sooner"}
    result |= {"users": chosen.users, "rounds": chosen.rounds, "seeds": chosen.seeds, "goals": []}
    result |= {"machine": machine(), "commit": commit(), "date": today()}
    with tempfile.TemporaryDirectory() as folder:
        place = prepared(Path(folder), chosen.peer)
        write(place, chosen.users)
        for row in rows:
            written(result, line(row, chosen, place))
    finish(result, table(result))


def written(result: dict[str, Any], found: dict[str, Any]) -> None:
    """Write the result file with a row more, which stands in the place of an earlier one."""
    lines = earlier(result) | {found["label"]: found}
    result |= {"rows": [lines[row.label] for row in ROWS if row.label in lines], "goals": []}
    for one in result["rows"]:
        off = 100 * (one["here"] - one["there"])
        goal(result, f"{one['label']}: within two points of PFLlib's own code", off, met=abs(off) <= 100 * POINTS)
    times = [one["there_seconds"] / one["here_seconds"] for one in result["rows"] if not one["peer_threads"]]
    if times:  # seconds of a PFLlib that was given fewer threads are not its own
        median, text = statistics.median(times), "users a second over PFLlib's, median over the algorithms: at least"
        goal(result, f"{text} {TIMES}", median, met=median >= TIMES)
    store(result)


def line(row: Row, chosen: Any, place: Path) -> dict[str, Any]:
    """Return accuracy and seconds of a round on both sides; on this one as means over the seeds."""
    there, there_seconds = peer(row, chosen, place)
    say(f"{row.label}, PFLlib: {percent(there)} %, {there_seconds:.1f} s a round")
    done = measured([row], chosen.users, chosen.rounds, chosen.seeds, 1, NODES)[row]
    return {
        "label": row.label,
        "published": row.published,
        "there": there,
        "here": statistics.mean(figures(row, one)["weighted"] for one in done),
        "there_seconds": there_seconds,
        "here_seconds": statistics.mean(statistics.median(record["seconds"] for record in one.rounds) for one in done),
        "arguments": PEER[row.label][1],
        "peer_threads": chosen.peer_threads,
        "commit": commit(),
    }


def prepared(place: Path, peer_at: Path) -> Path:
    """Copy PFLlib's code into a folder, with a stand-in for torchvision, whose networks are not used here."""
    if not (peer_at / "system" / "main.py").is_file():
        raise BenchmarkError(f"`--peer` must name a checkout of PFLlib, got '{peer_at}', which has no system/main.py")
    shutil.copytree(peer_at / "system", place / "system")
    (place / "stand-in" / "torchvision").mkdir(parents=True)
    (place / "stand-in" / "torchvision" / "__init__.py").write_text("")
    return place


def write(place: Path, users: int) -> None:
    """Write the users that this project draws as PFLlib reads them: an .npz file with x and y for each user and part."""
    options = FashionMnistOptions().spread_by(Partition("dirichlet:0.1", users))
    assert isinstance(options, FashionMnistOptions)
    data = FashionMnist(options, resolve_data_dir(""))
    names = [task.task_id for task in data.tasks()]
    if len(names) != users:
        raise BenchmarkError(f"{users - len(names)} of {users} users have too few images for both sides: choose fewer users")
    for number, name in enumerate(names):
        seen = data.seen_draw(name)
        for part, batch in (("train", seen.support), ("test", seen.test)):
            path = place / "dataset" / NAME / part / f"{number}.npz"
            path.parent.mkdir(parents=True, exist_ok=True)
            np.savez(path, data=np.array({"x": batch.x.numpy(), "y": batch.y.numpy()}, dtype=object))


def peer(row: Row, chosen: Any, place: Path) -> tuple[float, float]:
    """Return PFLlib's accuracy after the rounds, weighted by test images, and its seconds of a round without tests."""
    algorithm, more = PEER[row.label]
    command = [chosen.peer_python, "main.py", "-data", NAME, "-m", "CNN", "-algo", algorithm, "-dev", "cpu"]
    command += ["-gr", str(chosen.rounds), "-eg", str(chosen.rounds), "-nc", str(chosen.users)]
    command += ["-lbs", str(BATCH), "-lr", str(RATE), *more.split()]
    env = {name: value for name, value in os.environ.items() if not name.endswith("_NUM_THREADS")}
    env["PYTHONPATH"] = str(place / "stand-in")
    if chosen.peer_threads:  # on a busy machine its threads would wait for each other
        env["OMP_NUM_THREADS"] = str(chosen.peer_threads)
    try:
        done = subprocess.run(
            command, cwd=place / "system", env=env, capture_output=True, text=True, timeout=SECONDS, check=False
        )
    except subprocess.TimeoutExpired:
        raise BenchmarkError(f"PFLlib's {algorithm} took more than {SECONDS} s: give fewer `--rounds`") from None
    accuracy = re.findall(r"Averaged Test Accuracy: ([\d.]+)", done.stdout)
    seconds = [float(found) for found in re.findall(r"-{25,} (?:time cost -+ )?([\d.]+)$", done.stdout, re.MULTILINE)]
    if not accuracy or len(seconds) != chosen.rounds + 1:
        raise BenchmarkError(f"PFLlib's {algorithm} ended with code {done.returncode}: {(done.stdout + done.stderr)[-800:]}")
    # The first and the last of its rounds hold the tests.
    return float(accuracy[-1]), statistics.median(seconds[1:-1])


def table(result: dict[str, Any]) -> str:
    """Return both sides as a Markdown table."""
    lines = ["| method | PFLlib, % | here, % | PFLlib, s a round | here, s a round | times |", "|---|---:|---:|---:|---:|---:|"]
    for row in result["rows"]:
        cells = [row["label"], percent(row["there"]), percent(row["here"])]
        cells += [
            f"{row['there_seconds']:.1f}",
            f"{row['here_seconds']:.1f}",
            f"{row['there_seconds'] / row['here_seconds']:.2f}",
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
