"""The code blocks of the documentation, and the commands in those of a shell."""

from __future__ import annotations

import re
import shlex
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from helpers.paths import ROOT

PAGES = (
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / name for name in ("README.md", "CONTRIBUTING.md", "benchmarks/RESULTS.md")),
)
_BLOCK = re.compile(r"^( *)```(\w*)\n(.*?)^ *```$", re.MULTILINE | re.DOTALL)
OURS = ("sdsearch", "python -m sdsearch_lightning")
LAUNCHERS = ("torchrun", "srun")


@dataclass(frozen=True)
class Block:
    """One block between three backticks."""

    page: str
    """From the repository's root."""
    line: int
    language: str
    text: str

    def __str__(self) -> str:
        return f"{self.page}:{self.line}"


@cache
def all_blocks() -> tuple[Block, ...]:
    return tuple(block for path in PAGES for block in blocks_of(path.read_text(), str(path.relative_to(ROOT))))


def blocks_of(text: str, page: str) -> Iterator[Block]:
    for match in _BLOCK.finditer(text):
        yield Block(page, text.count("\n", 0, match.start()) + 1, match[2], textwrap.dedent(match[3]))


def blocks(language: str) -> list[Block]:
    return [block for block in all_blocks() if block.language == language]


@dataclass(frozen=True)
class Command:
    """One command line of a shell block: its words, without variables in front of it and comments behind."""

    block: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.block} {' '.join(self.words[:3])}"

    @property
    def ours(self) -> tuple[str, ...]:
        """What follows `sdsearch` or `python -m sdsearch_lightning`, behind a launcher too; () where it is neither."""
        for opening in OURS:
            head = tuple(opening.split())
            if self.words[: len(head)] == head:
                return self.words[len(head) :]
        if self.words[0] in LAUNCHERS:
            for name in ("sdsearch", "sdsearch_lightning"):
                if name in self.words:
                    return self.words[self.words.index(name) + 1 :]
        return ()


def commands_of(block: Block) -> Iterator[Command]:
    """The commands of a shell block; `$NAME` stands for what the block gives that name."""
    joined = block.text.replace("\\\n", " ")
    named = {}

    def remember(match: re.Match[str]) -> str:
        named[match[1]] = " ".join(match[2].split())
        return ""

    joined = re.sub(r'^([A-Z]+)="([^"$]*)"$', remember, joined, flags=re.MULTILINE)
    for line in joined.splitlines():
        line = re.sub(r"\$([A-Z]+)", lambda match: named.get(match[1], match[0]), line)
        for part in re.split(r"\s(?:&&|\|\||\|)\s", line):
            lexer = shlex.shlex(part, posix=True, punctuation_chars="")
            lexer.whitespace_split, lexer.commenters = True, "#"
            words = [word for word in lexer if word not in ("&", "...")]
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            words = words[: next((i for i, word in enumerate(words) if re.fullmatch(r"[<>]+", word)), len(words))]
            if words:
                words[0] = words[0].removeprefix(".venv/bin/")
                yield Command(str(block), tuple(words))


@cache
def all_commands() -> tuple[Command, ...]:
    return tuple(command for block in blocks("bash") for command in commands_of(block))


def link_targets(path: Path) -> Iterator[str]:
    """Targets of the links of a page, code left out; addresses too."""
    text = re.sub(r"^```.*?^```$|`[^`\n]*`", "", path.read_text(), flags=re.MULTILINE | re.DOTALL)
    yield from re.findall(r"\]\(([^)\s]+)\)", text)
