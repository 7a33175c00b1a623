"""What the pages say exists: links, anchors, flags, settings, variables, messages, figures; and the site is built of them."""

import ast
import json
import os
import re
import subprocess
import sys
from importlib import import_module
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import typer
from documents import PAGES, ROOT, anchors, links, prose

from quickbloom.client_app.cli import cli as edge_cli
from quickbloom.common.config import write_reference
from quickbloom.common.config.parts import table_types
from quickbloom.common.config.run import NodeConfig, RunConfig
from quickbloom.server_app.cli.main import cli

NO_SETTINGS = {
    # in place of a name
    "key", "KEY", "TABLE.KEY",
    # of the examples: an algorithm, a data set, a model
    "prox.mu", "mu", "moons.clients", "moons.noise", "small.units",
    # of the Helm chart
    "image.repository",
    # of Flower's connections
    "address", "insecure", "root-certificates",
    # Python's, and a file's
    "tokens", "privacy.jsonl", "trust",
    # what stands in a file of somebody's own
    "sep", "sex",
}  # fmt: skip


def settings() -> set[str]:
    """All keys of runs and nodes, those of tables with and without the table's name."""
    own = {str(field.alias) for model in (RunConfig, NodeConfig) for field in model.model_fields.values()}
    tables = {name: [str(field.alias) for field in model.model_fields.values()] for name, model in table_types().items()}
    return (
        own
        | {f"{name}.{key}" for name, keys in tables.items() for key in keys}
        | {key for keys in tables.values() for key in keys}
    )


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in links(page):
        file, _, anchor = target.partition("#")
        other = page if not file else (page.parent / file).resolve()
        assert other.exists(), f"{page.name}: {target}"
        if anchor and not anchor.startswith("quickbloom."):  # those of the reference are made with the site
            assert anchor in anchors(other), f"{page.name}: {target}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_settings_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    named = re.findall(r"--set[ =]`?([\w-]+(?:\.[\w-]+)?)=", text)
    named += re.findall(r"`([a-z]+(?:-[a-z]+)*\.[a-z]+(?:-[a-z]+)*) = ", text)
    tables = "|".join(table_types())
    named += re.findall(rf"(?<![\w./:'-])((?:{tables})\.[a-z]+(?:-[a-z]+)*)(?=[=`) ])", text)
    named += re.findall(r"`([a-z]+(?:-[a-z]+)*)(?: = [^`]*|=[^`]*)`", text)
    missing = {name for name in named if name not in settings()} - NO_SETTINGS
    assert missing == set()


def flags(app: typer.Typer) -> dict[str, set[str]]:
    """The options of every command of one of the two programs."""
    group: Any = typer.main.get_command(app)
    return {
        name: {
            option
            for one in (command, *getattr(command, "commands", {}).values())
            for part in one.params
            for option in [*part.opts, *part.secondary_opts]
        }
        for name, command in group.commands.items()
    }


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_flags_in_the_text_belong_to_some_command(page: Path) -> None:
    """Those inside blocks are looked at command by command, where the blocks are run."""
    known = {flag for app in (cli, edge_cli) for options in flags(app).values() for flag in options}
    named = set(re.findall(r"(?<![\w-])`(--[a-z][a-z-]*)", prose(page)))
    assert named - known - FOREIGN_FLAGS == set()


FOREIGN_FLAGS = {
    # Flower's
    "--insecure", "--node-config", "--run-config", "--database", "--enable-supernode-auth", "--stream",
    # docker compose
    "--volumes",
    # scripts of benchmarks/
    "--cell", "--help",
}  # fmt: skip


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_environment_variables_exist(page: Path) -> None:
    sources = [*ROOT.glob("docker*"), *ROOT.glob("docker/*"), *(ROOT / "tests").rglob("*.py")]
    sources += [
        path for package in ("quickbloom", "common", "server_app", "client_app") for path in (ROOT / package).rglob("*.py")
    ]
    text = "\n".join(path.read_text(errors="ignore") for path in sources if path.is_file() and path.suffix != ".whl")
    for name in set(re.findall(r"QUICKBLOOM_[A-Z_]+", page.read_text())):
        assert name in text, name


def test_the_settings_page_is_what_the_models_say() -> None:
    assert (ROOT / write_reference.PAGE).read_text() == write_reference.render()


def templates() -> list[str]:
    """Every text in the source, with a NUL in place of what is put in."""
    found = []
    for package in ("quickbloom", "common", "server_app", "client_app"):
        for path in (ROOT / package).rglob("*.py"):
            for node in ast.walk(ast.parse(path.read_text())):
                if isinstance(node, ast.JoinedStr):
                    found.append("".join(str(part.value) if isinstance(part, ast.Constant) else "\0" for part in node.values))
                elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                    found.append(node.value)
    return found


def test_messages_in_the_questions_stand_in_the_source() -> None:
    headings = re.findall(r"^#### (.*)$", (ROOT / "docs" / "faq.md").read_text(), re.MULTILINE)
    messages = [heading for heading in headings if not heading.endswith("?")]
    assert len(messages) > 30
    texts = templates()
    for message in messages:
        # What stands for names may be anything, the words between must follow each other in one text.
        parts = message.split("..")
        form = re.compile(".*?".join(map(re.escape, parts)), re.DOTALL)
        assert any(form.search(text) for text in texts if all(part in text for part in parts)), message


@pytest.mark.parametrize("algorithm", ["protonet", "metasgd", "maml", "heads", "fedavg", "local"])
def test_the_figures_of_the_readme_are_those_of_the_benchmark(algorithm: str) -> None:
    results = json.loads((ROOT / "benchmarks" / "results" / "digits.json").read_text())
    (variant,) = (one for one in results["variants"] if one["label"] == algorithm)
    mean, sd = (100 * variant[name]["after"] for name in ("mean", "sd"))
    assert results["seeds"] == [0, 1, 2]
    assert f"{mean:.1f} ± {sd:.1f}" in (ROOT / "README.md").read_text()


def test_the_readme_is_as_long_as_a_readme_should_be() -> None:
    assert 70 <= len((ROOT / "README.md").read_text().splitlines()) <= 170


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site, built with every warning an error."""
    folder = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)]
    subprocess.run(["make", ".package"], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    env = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


def test_the_site_loads_nothing_from_elsewhere(site: Path) -> None:
    for page in site.glob("*.html"):
        loaded = re.findall(r"<(?:script|link|img)[^>]*(?:src|href)=\"(https?:[^\"]*)", page.read_text())
        assert loaded == [], page.name


def test_the_code_of_every_algorithm_stands_on_its_page(site: Path) -> None:
    words = re.sub(r"<[^>]*>", "", (site / "algorithms.html").read_text())
    assert "return self.learner.loss(phi, episode.query)" in words
    assert "[code:" not in words
    formulas = (site / "algorithms.html").read_text()
    fences = (ROOT / "docs" / "algorithms.md").read_text().count("```math")
    assert formulas.count("<math ") == formulas.count("</math>") == fences >= 13
    assert not re.findall(r"\\[a-zA-Z]+", re.sub(r"<(pre|script).*?</\1>", "", formulas, flags=re.DOTALL))


def test_every_page_is_reachable_from_the_menu() -> None:
    menu = (ROOT / "mkdocs.yml").read_text()
    missing = [page.name for page in PAGES if page.parent.name == "docs" and f": {page.name}" not in menu]
    assert missing == []


def test_code_that_is_not_there_stops_the_build() -> None:
    sys.path.insert(0, str(ROOT / "docs"))
    try:
        hooks = import_module("hooks")
    finally:
        sys.path.remove(str(ROOT / "docs"))
    assert hooks.source("common/maths/inner_loop.py", "last").startswith("def last(")
    with pytest.raises(LookupError, match="nothing_of_that_name"):
        hooks.on_page_markdown("[code: nothing_of_that_name](../common/maths/inner_loop.py)")


def test_blocks_are_cut_out_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import documents

    monkeypatch.setattr(documents, "ROOT", tmp_path)
    page = tmp_path / "p.md"
    page.write_text("x\n\n    a\n\n    b\n\ny\n\n- item\n\n      c\n\n```sh\nd\n  e\n```\n- item\n    no block\n")
    found = documents.blocks(page)
    assert [(block.line, block.language, block.text) for block in found] == [
        (3, "", "a\n\nb"), (11, "", "c"), (13, "sh", "d\n  e"),
    ]  # fmt: skip
    assert all(first.line < second.line for first, second in pairwise(found))
