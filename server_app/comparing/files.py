"""What a comparison leaves: all figures as JSON, a table of runs as CSV, one for a paper as LaTeX, Markdown, and a card.

The card says what is needed to repeat the comparison and to distrust it. Every file names the data by their hash, and the
versions of the software.
"""

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from quickbloom.common.formatting import counted
from quickbloom.common.spreadsheets import write_csv
from quickbloom.common.system.whole_files import whole
from quickbloom.server_app.comparing.result import label
from quickbloom.server_app.comparing.table import caption, failures, footing, markdown, table
from quickbloom.server_app.runs.directory import RunDirectory

SPLITS = ("validation", "test", "seen")
"""Parts of a summary with scores, as far as it has them."""
_MEANS = ("worst10", "ci95", "sd", "weighted")
_IN_LATEX = {"\\": r"\textbackslash{}", "±": r"$\pm$", "→": r"$\to$", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
_IN_LATEX |= {sign: f"\\{sign}" for sign in "&%$#_{}"}
_NOT_PRINTED = ("rounds to target", "bytes to target", "seconds")


def write(result: Mapping[str, Any], directory: Path) -> None:
    """comparison.json, .md, .csv and .tex, and comparison-card.md, each written whole or not at all."""
    writer = RunDirectory(directory)
    writer.write_json("comparison.json", result)
    writer.write_text("comparison.md", markdown(result))
    writer.write_text("comparison.tex", latex(result))
    writer.write_text("comparison-card.md", card(result))
    rows = list(runs(result, directory))
    columns = list(dict.fromkeys(name for row in rows for name in row))
    with whole(directory / "comparison.csv", newline="") as file:
        write_csv(file, columns, [{name: "" if value is None else value for name, value in row.items()} for row in rows])


def runs(result: Mapping[str, Any], directory: Path) -> Iterator[dict[str, Any]]:
    """Yield a row for every row of the table, seed and split: what was chosen, and every score that the run's summary has.

    Scores are named "accuracy_before" (adaptation), "accuracy_after", "accuracy_worst10" and so on. A run that failed has one
    row, with its failure.
    """
    last = {"data_sha256": result["data_sha256"], "version": result["version"]}
    for row in result["algorithms"]:
        for run in row["runs"]:
            known = {"row": label(row), "algorithm": row["algorithm"], "mode": row["mode"], "seed": run["seed"]}
            chosen = {name: run.get(name) for name in ("inner_lr", "adapt_lr", "adapt_steps")} | run["settings"]
            more = {"seconds": run.get("seconds"), "directory": run["directory"], "failure": run["failure"], **last}
            if run["failure"]:
                yield {**known, "split": "", **chosen, **more}
                continue
            summary = json.loads((directory / run["directory"] / "summary.json").read_text(encoding="utf-8"))
            for split in SPLITS:
                if scores := summary.get(split):
                    number = scores.get("tasks", summary["tasks"].get(split))
                    yield {**known, "split": split, "tasks": number, **chosen, **_scores(scores, run["adapt_steps"]), **more}


def _scores(scores: Mapping[str, Any], step: int) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for measure, of in scores.items():
        if isinstance(of, Mapping) and "mean" in of:
            found |= {f"{measure}_before": of["mean"][0], f"{measure}_after": of["mean"][step]}
            found |= {f"{measure}_{name}": of[name][step] for name in _MEANS if name in of}
    return found


def latex(result: Mapping[str, Any]) -> str:
    """The table for a paper, for the package booktabs: the best of the mean scores is bold, what one has to know below."""
    headings, rows = table(result)
    kept = [place for place, heading in enumerate(headings) if heading not in _NOT_PRINTED]
    best = result["paired"]["best"]
    lines = [f"% {line}" for line in footing(result)]
    lines += [r"\begin{table}", r"  \centering", rf"  \begin{{tabular}}{{l{'r' * (len(kept) - 1)}}}", r"    \toprule"]
    lines.append(_row([headings[place] for place in kept]))
    lines.append(r"    \midrule")
    for place, cells in enumerate(rows):
        if place == len(result["algorithms"]):
            lines.append(r"    \midrule")  # baselines
        bold = cells[0] == best
        lines.append(_row([cells[at] for at in kept], bold=bold))
    lines += [r"    \bottomrule", r"  \end{tabular}"]
    lines += [rf"  \caption{{{_escaped(' '.join([*caption(result), *failures(result)]))}}}", r"\end{table}", ""]
    return "\n".join(lines)


def _row(cells: list[str], *, bold: bool = False) -> str:
    written = [r"\textbf{" + _escaped(cell) + "}" if bold else _escaped(cell) for cell in cells]
    return "    " + " & ".join(written) + r" \\"


def _escaped(text: str) -> str:
    return "".join(_IN_LATEX.get(sign, sign) for sign in text)


def card(result: Mapping[str, Any]) -> str:
    """A page that is enough to repeat the comparison, and to know what to doubt."""
    rows, found = result["algorithms"], result["paired"]
    done = [run for row in rows for run in row["runs"] if not run["failure"]]
    lines = [f"# {', '.join(map(label, rows))} on {result['data']}", "", "## What", ""]
    lines += [f"- Rows: {', '.join(f'`{label(row)}` ({_of(row)})' for row in rows)}"]
    lines += [
        f"- Seeds: {', '.join(map(str, result['seeds']))}; {counted(result['tasks'].get('test', 0), 'test user')} of each"
    ]
    lines += [f"- Runs: {len(done)} in the table, {sum(len(row['tried']) for row in rows)} in all"]
    lines += [f"- Best by the mean: {found['best'] or 'none'}", "", "## Which data", ""]
    lines += [
        f"- {part['name']}: {counted(part['parts'], 'part')}, SHA-256 `{part['sha256']}`" for part in result["data_parts"]
    ]
    lines += [f"- All of it: SHA-256 `{result['data_sha256']}`", "", "## With what", ""]
    lines += [f"- {name} {version}" for name, version in result["versions"].items()]
    lines += ["", "## What to doubt", "", *(f"- {line}" for line in (*caption(result), *failures(result)))]
    lines += ["", "## Commands", "", "The whole comparison:", "", f"    {result['command']}", "", "Each run of the table:", ""]
    return "\n".join([*lines, *(f"    {run['command']}" for row in rows for run in row["runs"]), ""])


def _of(row: Mapping[str, Any]) -> str:
    settings = "".join(f", {text}" for text in row["settings"])
    searched = "".join(f", {key} of {', '.join(values)}" for key, values in row["grid"].items())
    return f"{row['algorithm']}{settings}{searched}, inner rate {row['rate']}"
