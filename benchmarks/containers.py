"""Seconds per round of the federation of docker-compose.yml: three nodes in containers, TLS, keys; a small model.

Two sides run one after the other in every repetition, so that other work on the machine affects
both alike. Ratios are taken within a repetition. "Flower": Flower's own FedAvg
(benchmarks/stock_flower), SuperLink, SuperExec and SuperNodes, in the same containers of the same
image with the same keys (benchmarks/stock_flower/compose.yml). "quickbloom": docker-compose.yml as
it is. The first round of a run, which waits for idle nodes to look for work, is reported
separately. Our last round, which scores as well as trains, does not count. Needs root and an engine
on this machine; `make test-docker` says how to get one.
"""

import argparse
import json
import signal
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from benchmarks.compose import NODES, Federation, main_process, missing
from benchmarks.deployment import FLOWER, GOAL_RATIO, GOAL_SECONDS, OURS, RUN, cpu, memory, middle, seconds_of_training, table
from benchmarks.runner import ROOT, commit, finish, goal, machine, say
from quickbloom.server_app.comparing.batch import today

STOCK = ROOT / "benchmarks" / "stock_flower"
OVERLAYS: dict[str, list[Path]] = {FLOWER: [STOCK / "compose.yml"], OURS: []}
SERVICES = ("superlink", "superexec", *NODES)


def main() -> None:
    claim = "a round of three nodes in containers takes at most 1.5 s, and a sixth of the time that Flower's own parts take"
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.containers", description=claim, epilog="Example: python -m benchmarks.containers --rounds 10"
    )
    parser.add_argument("--repetitions", type=int, default=5, metavar="N", help="default: %(default)s")
    parser.add_argument("--rounds", type=int, default=8, metavar="N", help="of every run; default: %(default)s")
    parser.add_argument("--only", choices=list(OVERLAYS), help="measure this side alone, and write no result")
    parser.add_argument("--if-possible", action="store_true", help="do nothing where there is no engine")
    chosen = parser.parse_args()
    if chosen.rounds < 3:
        parser.error(f"--rounds must be at least 3, as neither the first nor the last counts, got {chosen.rounds}")
    if reason := missing():
        say(f"containers are not measured: it {reason}")
        raise SystemExit(0 if chosen.if_possible else 1)
    sides = [side for side in OVERLAYS if chosen.only in (None, side)]
    runs: dict[str, list[dict[str, float]]] = {side: [] for side in sides}
    Federation("quickbloom-bench", Path(tempfile.gettempdir())).build()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        for _ in range(chosen.repetitions):
            done = {side: measure(side, chosen.rounds) for side in sides}
            for side in sides:
                runs[side].append(done[side])
    except KeyboardInterrupt:
        say("stopped: what follows is of the repetitions that were complete")
        if not all(runs.values()):
            raise SystemExit(1) from None
    if chosen.only:
        return
    result = assemble(claim, chosen.rounds, runs)
    finish(result, table(result))


def measure(side: str, rounds: int) -> dict[str, float]:
    """Return seconds of a run's first and median later round, a node's CPU seconds per round, and its idle memory in MB.

    `others`: number of cores that were busy with work outside of these containers.
    """
    with tempfile.TemporaryDirectory() as folder:
        federation = Federation("quickbloom-bench", Path(folder), OVERLAYS[side])
        try:
            federation.up()
            federation.until_healthy(*SERVICES)
            time.sleep(10)  # until a fork server has finished its imports
            processes = [psutil.Process(main_process(federation.container(service))) for service in SERVICES]
            node = processes[-1]
            idle, before, started = memory(node), [cpu(process) for process in processes], time.monotonic()
            busy = _busy()
            seconds = (stock if side == FLOWER else ours)(federation, rounds)
            spent = [cpu(process) - earlier for process, earlier in zip(processes, before, strict=True)]
            others = (_busy() - busy - sum(spent)) / (time.monotonic() - started)
        finally:
            federation.down()
    later = statistics.median(seconds[1:])
    result = {"first": seconds[0], "round": later, "cpu": spent[-1] / rounds, "idle_megabytes": idle, "others": others}
    say(f"{time.strftime('%H:%M:%S')} {side}: {result}")
    return result


def stock(federation: Federation, rounds: int) -> list[float]:
    """Return the seconds of every round of Flower's own app."""
    file = "/app/quickbloom-runs/seconds.json"
    config = f'rounds={rounds} nodes={len(NODES)} nodes-per-round={len(NODES)} seconds-file="{file}"'
    command = ["flwr", "run", "/stock", "superlink", "--stream", "--run-config", config]
    # Flower's exit code does not tell whether the run succeeded; the file does.
    _, said = federation.start(*command, mounts=[f"{STOCK}:/stock:ro"]).communicate(timeout=1800)
    written = federation.runs / Path(file).name
    if not written.exists():
        raise SystemExit(f"Flower's run failed: {said[-3000:]}")
    return [float(second) for second in json.loads(written.read_text(encoding="utf-8"))]


def ours(federation: Federation, rounds: int) -> list[float]:
    """Return the seconds of every round of `quickbloom run` that only trains."""
    settings = ["--rounds", str(rounds), "--set", f"min-nodes={len(NODES)}", "--json"]
    run = federation.start("quickbloom", "run", *RUN, *settings)
    out, said = run.communicate(timeout=1800)
    if run.returncode:
        raise SystemExit(f"the run failed: {said[-3000:]}")
    return seconds_of_training(federation.directory_of(json.loads(out)))


def assemble(claim: str, rounds: int, runs: dict[str, list[dict[str, float]]]) -> dict[str, Any]:
    """Return the result file: all runs, medians, ratios within repetitions, and whether the goals are met."""
    result: dict[str, Any] = {"schema": 1, "benchmark": "deployment-containers", "claim": claim, "goals": [], "rounds": rounds}
    result["sides"] = [{"label": side, "runs": runs[side], "median": middle(runs[side])} for side in runs]
    ratios = [flower["round"] / ours["round"] for flower, ours in zip(runs[FLOWER], runs[OURS], strict=True)]
    result |= {"ratios": ratios, "machine": machine(), "commit": commit(), "date": today()}
    seconds = middle(runs[OURS])["round"]
    goal(result, f"median round at most {GOAL_SECONDS} s", seconds, met=seconds <= GOAL_SECONDS)
    ratio = statistics.median(ratios)
    goal(result, f"at least {GOAL_RATIO:.0f} times faster than Flower's own", ratio, met=ratio >= GOAL_RATIO)
    return result


def _busy() -> float:
    """Return the seconds for which this machine's cores have been busy, in sum."""
    times = psutil.cpu_times()
    return float(sum(times) - times.idle - getattr(times, "iowait", 0.0) - getattr(times, "guest", 0.0))


if __name__ == "__main__":
    main()
