"""The pages of the documentation taken apart: fenced blocks, the file that each belongs to, shell commands."""

from __future__ import annotations

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", flags=re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"`([\w./-]+\.(?:py|jsonl|yaml))`")


@dataclass(frozen=True)
class Block:
    """One fenced block. `file`: the path named in the sentence before it, when that sentence ends with a colon."""

    page: str
    language: str
    text: str
    file: str | None


def blocks(page: Path) -> list[Block]:
    """The fenced blocks of a page in order. A block right after another of its language belongs to the same file."""
    text = page.read_text(encoding="utf-8")
    found: list[Block] = []
    end = 0
    for match in _FENCE.finditer(text):
        before = text[end : match.start()].strip().split("\n\n")[-1]
        named = _FILE.findall(before) if before.endswith(":") else []
        if not before and found and found[-1].language == match[1]:
            named = [found[-1].file]
        found.append(Block(page.name, match[1], match[2], named[-1] if named else None))
        end = match.end()
    return found


def commands(page: Path) -> list[str]:
    """Every command line of the page's `sh` blocks."""
    lines = [line for block in blocks(page) if block.language == "sh" for line in block.text.splitlines()]
    return [line.strip() for line in lines if line.strip() and not line.startswith("#")]


def arguments(command: str) -> list[str] | None:
    """What follows `unclipped` in a command, also behind torchrun; None for another program."""
    words = shlex.split(command)
    if "-m" in words and words[words.index("-m") + 1] == "unclipped":
        return words[words.index("-m") + 2 :]
    return words[1:] if words[0] == "unclipped" else None


def apply_diff(path: Path, diff: str) -> None:
    """Replace in `path` what the diff removes by what it adds; the text to replace must occur exactly once."""
    lines = diff.splitlines()
    old = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("+"))
    new = "".join(f"{line[1:]}\n" for line in lines if not line.startswith("-"))
    text = path.read_text(encoding="utf-8")
    assert text.count(old) == 1, f"{path.name} has changed; the page still says:\n{old}"
    path.write_text(text.replace(old, new), encoding="utf-8")
