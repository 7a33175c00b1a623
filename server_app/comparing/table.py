"""A comparison as people read it: the table, the sentences below it, Markdown and the terminal."""

from collections.abc import Mapping, Sequence
from typing import Any

from rich.table import Table

from quickbloom.common.formatting import size
from quickbloom.common.metric import Metric, named
from quickbloom.server_app.comparing import modes, paired
from quickbloom.server_app.comparing.result import SEEN, STEPS, Figures, label
from quickbloom.server_app.reporting.against_baselines import in_words, title_of


def table(result: Mapping[str, Any]) -> tuple[list[str], list[list[str]]]:
    """(headings, rows of cells), the same for the terminal, Markdown and HTML."""
    columns = _columns(result["algorithms"])
    searched = list(dict.fromkeys(key for row in result["algorithms"] for key in row["grid"] if not key.endswith(".inner-lr")))
    headings = ["algorithm", "inner lr", *searched, "adapt lr x steps", *columns.values()]
    headings += ["mean rank", "rounds to target", "bytes to target", "seconds"]
    scored = list(columns)
    rows = []
    for row in result["algorithms"]:
        cells = [_name(row), _span(row["runs"], "inner_lr"), *(_chosen(row["runs"], key) for key in searched)]
        cells.append(_adaptation(row["runs"]))
        cells += [_score(row, name, named(result["metric"])) for name in scored]
        cells.append("-" if row["mean_rank"] is None else f"{row['mean_rank']:.2f}")
        reached = f" ({row['reached']} of {len(row['runs'])})" if row["reached"] and len(result["seeds"]) > 1 else ""
        cells.append(_plain(row, "rounds_to_target") + reached)
        sent = row["mean"]["bytes_to_target"]
        rows.append([*cells, "-" if sent is None else size(sent), _plain(row, "seconds")])
    metric = named(result["metric"])
    for row in result.get("baselines", []):
        scores = {"after": _score(row, "after", metric), "worst10": _score(row, "worst10", metric)}
        cells = [*("-" for _ in searched), "-", *(scores.get(name, "-") for name in scored)]
        rows.append([title_of(row["baseline"], metric), "-", *cells, "-", "-", "-", "-"])
    return headings, rows


def _columns(rows: Sequence[Mapping[str, Any]]) -> dict[str, str]:
    """The scores that the table shows, with their headings: of unseen users, of seen ones, or of both."""

    def is_known(name: str) -> bool:
        return any(row["mean"].get(name) is not None for row in rows)

    after = {f"after_{k}": f"{k} step{'s' * (k > 1)}" for k in STEPS if is_known(f"after_{k}")}
    unseen = {"before": "before", **after, "after": "chosen step", "worst10": "worst 10 %"}
    seen = SEEN if is_known("seen_after") else {}
    return {**(unseen if is_known("after") or not seen else {}), **seen}


def caption(result: Mapping[str, Any]) -> list[str]:
    """What one has to know to read the table, in sentences."""
    metric, seeds, target = named(result["metric"]), result["seeds"], result["target"]["validation"]
    what = metric.heading if metric.higher_is_better else f"{metric.heading} (lower is better)"
    over = f"mean ± standard deviation over the seeds {', '.join(map(str, seeds))}" if len(seeds) > 1 else f"seed {seeds[0]}"
    tasks, columns = result["tasks"], _columns(result["algorithms"])
    on = f"{tasks.get('test', 0)} held-out test tasks" if "after" in columns else f"{tasks.get('train', 0)} training tasks"
    sentences = [f"{result['data']}: {what} on {on}, {over}."]
    if "seen_after" in columns:
        sentences.append("Seen: training tasks, on test examples of their own, from what they keep on their nodes.")
    sentences += [*_ranked(result, metric), *paired.caption(result), *_choices(result)]
    if target is not None:
        nodes = result["nodes"]
        sentences.append(
            f"Target: validation {metric.name} {target:.4g} ({result['target']['origin']}), looked at when a run evaluates, "
            f"every {result['evaluate_every']} rounds and after the last; bytes: tensors up and down until then, evaluations "
            f"included, with {nodes} node{'s' * (nodes > 1)}"
            + ("; in brackets: seeds that reached it, over which the mean is." if len(seeds) > 1 else ".")
        )
    return [*sentences, *modes.caption(result)]


def _ranked(result: Mapping[str, Any], metric: Metric) -> list[str]:
    """All of them with the baselines, the best first."""
    ends = {label(row): row["mean"]["after"] for row in result["algorithms"]}
    beside = {in_words(row["baseline"], metric): row["mean"]["after"] for row in result.get("baselines", [])}
    known = {name: end for name, end in (ends | beside).items() if end is not None}
    if not known.keys() & beside.keys():
        return []
    ordered = sorted(known, key=lambda name: metric.cost(known[name]))
    return ["The best first, with baselines: " + "; ".join(f"{name} {metric.score(known[name])}" for name in ordered) + "."]


def _choices(result: Mapping[str, Any]) -> list[str]:
    """What was chosen, out of what, and for which rows it was not."""
    rows, own = result["algorithms"], ", by each seed on its own" if len(result["seeds"]) > 1 else ""
    grid = ", ".join(f"{lr:g}" for lr in result["adapt_lrs"])
    sentences = [
        f"Chosen on the validation tasks{own}, for every algorithm alike: "
        f"the rate (of {grid}) and the number of steps of adaptation."
    ]
    if result["tasks"].get("validation") == 0:
        sentences = ["There are no validation tasks to choose on: all adapt with their inner rate, in `adapt-steps` steps."]
    by_origin = {origin: [row for row in rows if row["rate"] == origin] for origin in ("chosen", "given", "unused")}
    plain = [row for row in by_origin["chosen"] if not any(key.endswith(".inner-lr") for key in row["grid"])]
    if plain:
        rates = ", ".join(f"{lr:g}" for lr in dict.fromkeys(tried["inner_lr"] for tried in plain[0]["tried"]))
        sentences.append(f"Chosen there as well, the inner rate of training (of {rates}): {_names(plain)}.")
    if by_origin["given"]:
        sentences.append(f"Inner rate given, not searched: {_names(by_origin['given'])}.")
    if by_origin["unused"]:
        sentences.append(f"Without an inner rate of training: {_names(by_origin['unused'])}.")
    return [*sentences, *_searched(rows), *_variants(rows), *_edges(plain, rows)]


def _searched(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What of a grid was tried, and how."""
    gridded = [row for row in rows if row["grid"]]
    said = []
    for row in gridded:
        values = "; ".join(f"`{key}` of {_listed(values)}" for key, values in row["grid"].items())
        rounds = _listed(sorted({tried["rounds"] for tried in row["tried"]}))
        said.append(f"{label(row)}: {values}, {_combinations(row)} combinations, in runs of {rounds} rounds")
    beside = [label(row) for row in rows if not row["grid"]]
    if not said:
        return []
    found = [
        "Searched by validation score, short runs first, of which the best third went on with three times the rounds: "
        f"{'. '.join(said)}."
    ]
    return found + ([f"Not searched beyond the inner rate, so at a disadvantage: {_listed(beside)}."] if beside else [])


def _combinations(row: Mapping[str, Any]) -> int:
    first = row["tried"][0]
    alike = [one for one in row["tried"] if (one["seed"], one["rounds"]) == (first["seed"], first["rounds"])]
    return len(alike)


def _variants(rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """What the named rows stand for."""
    told = [f"{modes.title(row)} is {row['algorithm']}" + _with(row["settings"]) for row in rows if _is_named(row)]
    return [f"Rows: {'; '.join(dict.fromkeys(told))}."] if told else []


def _is_named(row: Mapping[str, Any]) -> bool:
    return bool(row["settings"]) or modes.title(row) != row["algorithm"]


def _with(settings: Sequence[str]) -> str:
    return f" with {' and '.join(f'`{text}`' for text in settings)}" if settings else ""


def _edges(plain: Sequence[Mapping[str, Any]], rows: Sequence[Mapping[str, Any]]) -> list[str]:
    """Which rows may do better with a wider search."""
    sentences = []
    if edges := [row for row in plain if row["edge"]]:
        sentences.append(
            "At the lowest or highest of the inner rates that were tried, so that a wider range (`--inner-lrs`) may do better: "
            + "; ".join(f"{label(row)}, {_seeds(row['edge'])}" for row in edges)
            + "."
        )
    found = [(row, key, seeds) for row in rows for key, seeds in row["edges"].items() if seeds]
    if found:
        sentences.append(
            "At the edge of the grid, so that a wider one (`--grid`) may do better: "
            + "; ".join(f"{label(row)}, `{key}`, {_seeds(seeds)}" for row, key, seeds in found)
            + "."
        )
    return sentences


def _seeds(seeds: Sequence[int]) -> str:
    return f"seed{'s' * (len(seeds) > 1)} {_listed(seeds)}"


def _names(rows: Sequence[Mapping[str, Any]]) -> str:
    return _listed(list(dict.fromkeys(map(modes.title, rows))))


def _listed(values: Sequence[Any]) -> str:
    return ", ".join(map(str, values))


def failures(result: Mapping[str, Any]) -> list[str]:
    """A sentence for every run without scores."""
    lines = []
    for row in result["algorithms"]:
        seen = [(run["inner_lr"], run["seed"], run["failure"]) for run in (*row["tried"], *row["runs"])]
        for rate, seed, reason in dict.fromkeys(item for item in seen if item[2]):
            with_rate = "" if rate is None else f"inner lr {rate:g}, "
            lines.append(f"{label(row)}, {with_rate}seed {seed}: {reason}")
    return lines


def rich_table(result: Mapping[str, Any]) -> Table:
    """The table for a terminal; the caption goes below it."""
    return _for_terminal(*table(result))


def further_tables(result: Mapping[str, Any]) -> list[tuple[list[str], list[list[str]]]]:
    """(headings, rows of cells) of what stands below the table: the tests, and the modes."""
    found = [paired.table(result), *([modes.table(result)] if result["modes"] else [])]
    return [one for one in found if one[1]]


def rich_tables_below(result: Mapping[str, Any]) -> list[Table]:
    """The same for a terminal."""
    return [_for_terminal(*one) for one in further_tables(result)]


def _for_terminal(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> Table:
    built = Table()
    for place, heading in enumerate(headings):
        built.add_column(heading, justify="left" if not place or heading == "mode" else "right")
    for cells in rows:
        built.add_row(*cells)
    return built


def markdown(result: Mapping[str, Any]) -> str:
    """comparison.md: the table, how to read it, and how to repeat it."""
    lines = _in_markdown(*table(result))
    for beside in further_tables(result):
        lines += ["", *_in_markdown(*beside)]
    lines += ["", *caption(result)]
    lines += ["", *(f"- {line}" for line in failures(result))] if failures(result) else []
    return "\n".join([*lines, "", "To repeat it:", "", f"    {result['command']}", "", *footing(result), ""])


def footing(result: Mapping[str, Any]) -> list[str]:
    """Which data and which software a result stands on, in sentences."""
    parts = ", ".join(str(part["name"]) for part in result["data_parts"])
    software = ", ".join(f"{name} {version}" for name, version in result["versions"].items())
    return [f"Data: {parts or result['data']}, SHA-256 {result['data_sha256']}.", f"Made with {software}."]


def _in_markdown(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [f"| {' | '.join(headings)} |", "|---|" + "---:|" * (len(headings) - 1)]
    return lines + [f"| {' | '.join(cells)} |" for cells in rows]


def _name(row: Mapping[str, Any]) -> str:
    if not row["failed"]:
        return label(row)
    return f"{label(row)} ({row['failed']} of {len(row['runs'])} failed)"


def _adaptation(runs: Sequence[Figures]) -> str:
    """Rates and numbers of steps of all seeds: "0.1-0.3 x 4-10"."""
    done = any(not run["failure"] for run in runs)
    return f"{_span(runs, 'adapt_lr')} x {_span(runs, 'adapt_steps')}" if done else "-"


def _span(runs: Sequence[Figures], name: str) -> str:
    """The lowest and the highest over the runs that did not fail: "0.1-0.3", or "0.3" if they are equal."""
    values = [run[name] for run in runs if not run["failure"] and run[name] is not None]
    if not values:
        return "-"
    low, high = min(values), max(values)
    return f"{low:g}" if low == high else f"{low:g}-{high:g}"


def _chosen(runs: Sequence[Figures], key: str) -> str:
    """The values that the seeds chose of a setting: "0" or "0, 5"; "-" where it was not searched."""
    values = dict.fromkeys(str(run["settings"][key]) for run in runs if not run["failure"] and key in run["settings"])
    return ", ".join(values) or "-"


def _score(row: Mapping[str, Any], name: str, metric: Metric) -> str:
    mean = row["mean"][name]
    return "-" if mean is None else metric.number(mean, row["sd"][name])


def _plain(row: Mapping[str, Any], name: str) -> str:
    mean, sd = row["mean"][name], row["sd"][name]
    return "-" if mean is None else f"{round(mean, 1):g}" + (f" ± {round(sd, 1):g}" if sd is not None else "")
