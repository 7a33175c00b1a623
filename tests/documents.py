"""The pages that people read, cut into what tests look at: fences, indented blocks, headings, links."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGES = (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md")))


@dataclass(frozen=True)
class Block:
    """A piece of code on a page. `language` and `title`: what stands behind the fence; "" for an indented block."""

    page: str
    line: int
    language: str
    text: str
    title: str = ""

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """All fenced and indented blocks of a page, in order. An indented block begins after an empty line, as in Markdown."""
    name, lines = str(page.relative_to(ROOT)), page.read_text().splitlines()
    found: list[Block] = []
    i = 0
    while i < len(lines):
        start = i
        if fence := re.match(r'^( *)```(\w*)(?: title="([^"]+)")?', lines[i]):
            i += 1
            while not lines[i].lstrip().startswith("```"):
                i += 1
            found.append(Block(name, start + 1, fence[2], _dedented(lines[start + 1 : i], len(fence[1])), fence[3] or ""))
        elif _indented(lines[i]) and (i == 0 or not lines[i - 1].strip()):
            while i < len(lines) and (_indented(lines[i]) or not lines[i].strip()):
                i += 1
            body = "\n".join(line[4:] for line in lines[start:i]).rstrip()
            i = start + len(body.splitlines()) - 1
            if not _in_list(lines, start):
                found.append(Block(name, start + 1, "", body))
            elif lines[start].startswith("      "):
                found.append(Block(name, start + 1, "", "\n".join(line.strip() for line in body.splitlines())))
        i += 1
    return found


def prose(page: Path) -> str:
    """A page without its blocks."""
    text = page.read_text()
    for block in blocks(page):
        for line in block.text.splitlines():
            text = text.replace(line, "", 1) if line.strip() else text
    return text


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub and MkDocs make them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[\s]+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


def links(page: Path) -> list[str]:
    """Where the links and pictures of a page lead, without those to other sites."""
    found = re.findall(r"\]\(([^)\s]+)\)", page.read_text())
    return [target for target in found if not re.match(r"^[a-z]+:", target)]


def _indented(line: str) -> bool:
    return line.startswith("    ") and bool(line.strip())


def _dedented(lines: list[str], width: int) -> str:
    return "\n".join(line[width:] for line in lines)


def _in_list(lines: list[str], at: int) -> bool:
    """Whether what is indented here belongs to a list's item."""
    before = [line for line in lines[:at] if line.strip()]
    while before and before[-1].startswith("  "):
        before.pop()
    return bool(before) and bool(re.match(r"^([-*]|\d+\.) ", before[-1]))
