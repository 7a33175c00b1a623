"""Write every setting as a page, docs/configuration.md: `make config`."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from quickbloom.common.algorithms import ALGORITHMS
from quickbloom.common.config.parts import PRIVACY, table_types
from quickbloom.common.config.run import NodeConfig, RunConfig
from quickbloom.common.datasets import DATASETS
from quickbloom.common.errors import ConfigError, did_you_mean
from quickbloom.common.models import MODELS
from quickbloom.common.options import Options

PAGE = Path("docs") / "configuration.md"
_INTRODUCTION = """# Configuration reference

Generated from the models in `common` by `make config`; a test compares. A setting of the first table is given as
`--set KEY=VALUE` (`rounds`, `seed`, `algorithm` and `dataset` have options of their own), one of another table as
`--set TABLE.KEY=VALUE`. The table of the algorithm that is trained may be left out: `--set inner-lr=0.1`. With plain Flower
the same keys go into `--run-config`. A wrong value is refused in one sentence before anything runs.

The settings of a node, for `--node-config` or the options and `--set` of `quickbloom-edge join`, are at the end.
"""


@dataclass(frozen=True)
class Setting:
    """One setting.

    `default`: as JSON; `kind`: the allowed values in words; `choices`: the allowed values as JSON,
    if listed.
    """

    key: str
    default: str
    kind: str
    choices: tuple[str, ...]
    meaning: str


def settings(model: type[Options], prefix: str = "") -> list[Setting]:
    """Return the settings of a model, in its order, with `prefix` before their keys."""
    defaults = model().model_dump(by_alias=True)
    schema = model.model_json_schema()["properties"]
    return [
        Setting(
            f"{prefix}{key}",
            json.dumps(value),
            _kind(schema[key]),
            tuple(json.dumps(choice) for choice in schema[key].get("enum", ())),
            str(field.description),
        )
        for (key, value), field in zip(defaults.items(), model.model_fields.values(), strict=True)
    ]


def find(word: str = "") -> list[Setting]:
    """Return the settings of the table `word`, else those with `word` in their keys; without `word`, those outside tables.

    Raises ConfigError if there is none.
    """
    tables = {name: settings(model, f"{name}.") for name, model in table_types().items()}
    run = settings(RunConfig)
    if not word:
        return run
    everything = run + [setting for table in tables.values() for setting in table]
    found = tables.get(word) or [setting for setting in everything if word in setting.key]
    if not found:
        keys = {setting.key.rpartition(".")[2] for setting in everything}
        raise ConfigError(f"there is no setting with `{word}` in its name{did_you_mean(word, {*tables, *keys})}")
    return found


def render() -> str:
    """Return the whole page: one table per settings model, one row per setting."""
    sections = [_INTRODUCTION, _section("The run", RunConfig)]
    parts = {"The table `privacy`": [PRIVACY], "Algorithms": ALGORITHMS, "Data sets": DATASETS, "Models": MODELS}
    for title, names in parts.items():
        models = {name: table_types()[name] for name in names}
        if list(names) == [PRIVACY]:
            sections.append(_section(title, models[PRIVACY], f"{PRIVACY}."))
            continue
        sections.append(f"## {title}\n")
        sections += [_section(f"`{name}`", model, f"{name}.", "###") for name, model in models.items() if model.model_fields]
        if empty := [f"`{name}`" for name, model in models.items() if not model.model_fields]:
            sections.append(f"Without settings: {', '.join(empty)}.\n")
    return "\n".join([*sections, _section("A node", NodeConfig)])


def _section(title: str, model: type[Options], prefix: str = "", level: str = "##") -> str:
    rows = [
        f"| `{setting.key}` | `{setting.default}` | {_expected(setting)} | {_escaped(setting.meaning)} |"
        for setting in settings(model, prefix)
    ]
    return (
        "\n".join([f"{level} {title}\n", "| setting | default | values | meaning |", "| --- | --- | --- | --- |", *rows]) + "\n"
    )


def _expected(setting: Setting) -> str:
    return ", ".join(f"`{choice}`" for choice in setting.choices) or setting.kind


def _kind(schema: dict[str, Any]) -> str:
    """Return the allowed values in words, kind and range; "" if there are choices."""
    if "enum" in schema:
        return ""
    kinds = {"integer": "whole number", "number": "number", "string": "text", "boolean": "true or false"}
    signs = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤", "exclusiveMaximum": "<"}
    limits = [f"{sign} {schema[name]:g}" for name, sign in signs.items() if name in schema]
    return " ".join([kinds[schema["type"]], ", ".join(limits)]).rstrip()


def _escaped(text: str) -> str:
    return text.replace("|", "\\|")


def main() -> None:
    """Write the page in the current directory, which must be the repository."""
    if not PAGE.parent.is_dir():
        raise SystemExit(f"there is no directory {PAGE.parent.resolve()}: run this in the repository")
    PAGE.write_text(render(), encoding="utf-8")
    print(f"wrote {len(render().splitlines())} lines into {PAGE}")


if __name__ == "__main__":
    main()
