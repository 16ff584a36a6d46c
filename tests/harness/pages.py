"""The documentation's pages, parsed: headings, links, tables and code blocks.

Owns the list of pages and what is taken out of one. Parsing is markdown-it's;
anchors are made as GitHub makes them. Promises relative paths and texts as they stand.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from markdown_it import MarkdownIt
from markdown_it.token import Token
from mdit_py_plugins.anchors import anchors_plugin

ROOT = Path(__file__).parents[2]
_DEEPEST = 6


@dataclass(frozen=True)
class Block:
    """A fenced block of code, and the nearest heading above it."""

    language: str
    text: str
    section: str
    line: int


@dataclass(frozen=True)
class Page:
    """One page."""

    path: Path
    anchors: frozenset[str]
    links: tuple[str, ...]
    """Targets of links and images."""
    blocks: tuple[Block, ...]
    code: tuple[str, ...]
    """What stands as code, in a line or in a block."""
    rows: tuple[tuple[str, ...], ...]
    """Of all tables, heads included: the cells' source texts."""

    @property
    def name(self) -> str:
        """Its path in the repository."""
        return str(self.path.relative_to(ROOT))

    def named(self) -> frozenset[str]:
        """What stands as code in the first column of a table."""
        return frozenset(
            token.content for row in self.rows for token in _inside(row[0]) if _is_code(token)
        )


def pages() -> list[Page]:
    """The pages of the top folder, docs/ and what else is written for readers."""
    others = ("tests", "images", "configs")
    found = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
    for folder in others:
        found += sorted((ROOT / folder).rglob("README.md"))
    return [page(path) for path in found]


@cache
def page(path: Path | str) -> Page:
    """One page, by its path (relative to the repository)."""
    full = ROOT / path
    tokens = _parser().parse(full.read_text())
    return Page(
        path=full,
        anchors=frozenset(
            str(token.attrs["id"]) for token in tokens if token.type == "heading_open"
        ),
        links=tuple(_links(tokens)),
        blocks=tuple(_blocks(tokens)),
        code=tuple(_code(tokens)),
        rows=tuple(_rows(tokens)),
    )


@cache
def _parser() -> MarkdownIt:
    parser = MarkdownIt("commonmark").enable("table")
    return parser.use(anchors_plugin, max_level=_DEEPEST)


def _inside(text: str) -> list[Token]:
    return _parser().parseInline(text)[0].children or []


def _is_code(token: Token) -> bool:
    return token.type == "code_inline"


def _links(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        for child in token.children or []:
            target = child.attrs.get("href") or child.attrs.get("src")
            if target is not None:
                yield str(target)


def _code(tokens: list[Token]) -> Iterator[str]:
    for token in tokens:
        if token.type == "fence":
            yield token.content
        yield from (child.content for child in token.children or [] if _is_code(child))


def _blocks(tokens: list[Token]) -> Iterator[Block]:
    section = ""
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "heading_open" and following is not None:
            section = following.content
        elif token.type == "fence":
            line = token.map[0] + 1 if token.map else 0
            yield Block(token.info.strip(), token.content, section, line)


def _rows(tokens: list[Token]) -> Iterator[tuple[str, ...]]:
    row: list[str] = []
    for token, following in zip(tokens, [*tokens[1:], None], strict=True):
        if token.type == "tr_open":
            row = []
        elif token.type in ("td_open", "th_open") and following is not None:
            row.append(following.content)
        elif token.type == "tr_close":
            yield tuple(row)
