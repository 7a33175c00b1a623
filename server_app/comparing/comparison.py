"""A comparison from its options to its files, the same for the command and from Python."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console

from quickbloom.common.config.key_value import assignment, split_assignment
from quickbloom.common.config.run import RunConfig
from quickbloom.common.errors import ConfigError
from quickbloom.server_app.comparing.batch import Workers
from quickbloom.server_app.comparing.each_left_out import folds
from quickbloom.server_app.comparing.files import write
from quickbloom.server_app.comparing.fingerprint import remember
from quickbloom.server_app.comparing.modes import ASYNC
from quickbloom.server_app.comparing.plan import Plan, parse_modes, parse_rates, parse_seeds, recommended_rates
from quickbloom.server_app.comparing.result import assemble
from quickbloom.server_app.comparing.searching import compare
from quickbloom.server_app.comparing.spread_out import write_list
from quickbloom.server_app.comparing.variants import Variant, parse_grid, parse_variant
from quickbloom.server_app.launch.prepare import own_data


def planned(
    algorithms: Sequence[str],
    *,
    dataset: str | None = None,
    data: str | None = None,
    task: str | None = None,
    target: str | None = None,
    time: str | None = None,
    seeds: str = "3",
    rounds: int | None = None,
    inner_lrs: str | None = None,
    settings: Sequence[str] = (),
    simulation: bool = False,
    target_score: float | None = None,
    leave_one_out: bool = False,
    modes: str | None = None,
    devices: str | None = None,
    async_rounds: int | None = None,
    variants: Sequence[str | Variant] = (),
    grids: Sequence[str] = (),
) -> Plan:
    """What these options ask for, checked with the data: see `quickbloom compare --help`. Raises ConfigError or DataError.

    `settings`: texts "key=value" that all runs share. `leave_one_out`: each task is left out once, so the plan
    is checked as the first of these folds. `modes`: "sync,async"; `devices`: the setting;
    `async_rounds`: as in `Plan`. `variants`, `grids`: texts as after `--variant` and `--grid`.
    """
    own = own_data(data, task, target, dataset, time)
    name = str(own.pop("dataset", dataset or RunConfig().dataset))
    plan = Plan(
        tuple(algorithms),
        parse_seeds(seeds),
        name,
        RunConfig().rounds if rounds is None else rounds,
        recommended_rates(name) if inner_lrs is None else parse_rates(inner_lrs),
        (*(assignment(key, value) for key, value in own.items()), *settings, *_devices(devices, settings)),
        simulation,
        () if modes is None else parse_modes(modes),
        async_rounds,
        tuple(one if isinstance(one, Variant) else parse_variant(one) for one in variants),
        tuple(map(parse_grid, grids)),
    )
    if async_rounds is not None and ASYNC not in plan.modes:
        raise ConfigError("`--async-rounds` needs `--modes` with async in it: without, all runs have `--rounds`")
    if leave_one_out and (simulation or target_score is not None):
        raise ConfigError(
            "`--leave-one-out` excludes `--simulation` and `--target-score`: it has no validation target of its own"
        )
    if leave_one_out and plan.modes:
        raise ConfigError("`--leave-one-out` excludes `--modes`: compare the modes on held-out tasks, without it")
    checked = next(iter(folds(plan).values())) if leave_one_out else plan
    checked.check(target_score)
    return plan


def _devices(devices: str | None, settings: Sequence[str]) -> list[str]:
    if devices is None:
        return []
    if any(split_assignment(text)[0] == "devices" for text in settings):
        raise ConfigError("`devices` is given twice, as `--devices` and with `--set`: leave one of them out")
    return [assignment("devices", devices)]


def listed(plan: Plan, directory: Path, file: Path, *, leave_one_out: bool = False) -> int:
    """Write the list of the runs that are to be done now, and return their number."""
    return write_list(list(folds(plan).values()) if leave_one_out else [plan], directory, file)


def place(plan: Plan, output: str | Path | None, *, leave_one_out: bool = False) -> Path:
    """The directory of a comparison: `output`, by default runs/compare-DATASET, or runs/leave-one-out-DATASET."""
    return place_of(plan.dataset, output, leave_one_out=leave_one_out)


def place_of(dataset: str, output: str | Path | None, *, leave_one_out: bool = False) -> Path:
    """The same by the name of the data set."""
    kind = "leave-one-out" if leave_one_out else "compare"
    return Path(output).expanduser() if output is not None else Path("runs") / f"{kind}-{dataset}"


def carry_out(
    plan: Plan, directory: Path, jobs: int | Workers, console: Console, target_score: float | None = None
) -> dict[str, Any]:
    """Do what is not finished of `plan` in `directory`, write its result there and return it. Raises CompareError."""
    if changed := remember(directory, plan.parts()):
        console.print(f"Remark: {changed}.", markup=False, soft_wrap=True)
    entries = compare(plan, directory, jobs, console)
    result = assemble(plan, entries, target_score)
    write(result, directory)
    return result
