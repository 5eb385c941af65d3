"""Read what README.md and docs/*.md tell a reader to type: commands, Python, YAML, and options named in the text."""

import re
import shlex
import textwrap
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_PROGRAMS = ("onnxmerge", "torchrun", "pip", "pipx", "make", "python", "eval")
_SHELL = frozenset({"", "sh", "bash", "shell", "console"})
_ALTERNATIVE = re.compile(r"[\[\]|]|\.\.\.|\b[A-Z]+\.onnx")


@dataclass(frozen=True)
class Block:
    """Preformatted lines of a page: fenced with a language, or indented (language "")."""

    language: str
    text: str
    line: int


@dataclass(frozen=True)
class Command:
    """A command line of a page, its continuation lines joined, and what the page shows below it."""

    page: str
    line: int
    text: str
    shown: str = ""

    @property
    def words(self) -> list[str]:
        """The words that the program gets: without a comment, and without where its output goes."""
        lexer = shlex.shlex(self.text, posix=True, punctuation_chars="<>")
        lexer.whitespace_split, lexer.commenters = True, "#"
        found: list[str] = []
        ends = False
        for word in lexer:
            if set(word) <= set("<>"):
                if found[-1] in ("1", "2"):
                    found.pop()
                ends = True
            elif not ends:
                found.append(word)
            else:
                ends = False
        return found

    @property
    def is_synopsis(self) -> bool:
        """It stands for many: with `...`, with parts that may be left out, or with names such as MODEL.onnx."""
        return _ALTERNATIVE.search(self.text) is not None

    def __str__(self) -> str:
        return f"{self.page}:{self.line}: {self.text}"


def blocks(page: Path) -> Iterator[Block]:
    """The preformatted blocks of a page, in order."""
    lines = page.read_text(encoding="utf-8").splitlines()
    number = 0
    while number < len(lines):
        fence = re.fullmatch(r" *```(\w*)", lines[number])
        begins = number + 1
        if fence:
            end = next(n for n in range(begins, len(lines)) if lines[n].strip() == "```")
            yield Block(fence[1], "\n".join(lines[begins:end]), begins + 1)
            number = end + 1
        elif lines[number].startswith("    ") and (number == 0 or not lines[number - 1].strip()):
            end = begins
            while end < len(lines) and (not lines[end].strip() or lines[end].startswith("    ")):
                end += 1
            yield Block("", textwrap.dedent("\n".join(lines[number:end])).rstrip(), begins)
            number = end
        else:
            number += 1


def prose(page: Path) -> str:
    """The page without its preformatted blocks."""
    text = page.read_text(encoding="utf-8")
    text = re.sub(r"^ *```\w*\n.*?^ *```$", "", text, flags=re.MULTILINE | re.DOTALL)
    return re.sub(r"(?:(?<=\n\n)|\A)(?:    .*\n|\n(?=    ))+", "", text)


def commands(page: Path) -> list[Command]:
    """The command lines in the blocks of a page, each with the lines that follow it."""
    found: list[Command] = []
    for block in blocks(page):
        if block.language not in _SHELL:
            continue
        lines = iter(enumerate(block.text.splitlines(), block.line))
        shown: list[list[str]] = []
        own: list[Command] = []
        for number, line in lines:
            text = line.removeprefix("$ ")
            if text.split(" ")[0] in _PROGRAMS:
                while text.endswith("\\"):
                    text = text[:-1].rstrip() + " " + next(lines)[1].strip()
                own.append(Command(page.name, number, text))
                shown.append([])
            elif own:
                shown[-1].append(line)
        found += [replace(one, shown="\n".join(below).strip("\n")) for one, below in zip(own, shown, strict=True)]
    return found


def inline(page: Path) -> list[str]:
    """The pieces of code in the text and the tables of a page."""
    return [" ".join(piece.replace("\\|", "|").split()) for piece in re.findall(r"(?<!`)`([^`]+)`(?!`)", prose(page))]


def option_names(words: Sequence[str]) -> list[str]:
    """The options among the words of a command or a synopsis."""
    found = []
    for word in words:
        name = re.fullmatch(r"\[?(--?[a-z][a-z-]*)\]?(=.*)?", word)
        if name:
            found.append(name[1])
    return found
