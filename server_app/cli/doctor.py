"""The command `quickbloom doctor`."""

import json
from typing import Annotated

import typer
from rich.table import Table

from quickbloom.common.system.terminal import FAILED, paper, say


def doctor(json_: Annotated[bool, typer.Option("--json", help="Print it as JSON, on stdout.")] = False) -> None:
    """Say what is installed, which patches of Flower are in use, and what is wrong. Exit code: 0 nothing, 1 something.

    Example: quickbloom doctor
    """
    from quickbloom.server_app.deployment import doctor as examining

    findings = examining.examine()
    if json_:
        print(json.dumps(examining.as_json(findings)))
    else:
        table = Table("part", "what", "state", "why, or what it gains")
        for finding in findings:
            table.add_row(finding.part, finding.name, finding.state, finding.detail)
        paper().print(table)
        for finding in findings:
            if finding.mend:
                say(f"Wrong: {finding.part} {finding.name}: {finding.mend}")
    if any(finding.mend for finding in findings):
        raise typer.Exit(FAILED)
