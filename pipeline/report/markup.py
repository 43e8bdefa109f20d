"""Pieces of HTML. Whatever comes from a run is escaped here and nowhere else."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape


@dataclass(frozen=True, slots=True)
class Html:
    """Text that is markup already."""

    text: str


Cell = str | Html


def text(cell: Cell) -> str:
    return cell.text if isinstance(cell, Html) else escape(cell)


def tag(name: str, *content: Cell, kind: str = "") -> Html:
    """An element; kind: its class."""
    attribute = f' class="{escape(kind)}"' if kind else ""
    return Html(f"<{name}{attribute}>{''.join(map(text, content))}</{name}>")


def table(head: Sequence[Cell], rows: Sequence[Sequence[Cell]], numbers: Sequence[int] = ()) -> Html:
    """numbers: columns set to the right. On a narrow screen it scrolls by itself."""

    def cells(name: str, row: Sequence[Cell]) -> str:
        return "".join(
            tag(name, cell, kind="n" if column in numbers else "v" if column and name == "td" else "").text
            for column, cell in enumerate(row)
        )

    body = "".join(f"<tr>{cells('td', row)}</tr>" for row in rows)
    return Html(
        f'<div class="scroll"><table><thead><tr>{cells("th", head)}</tr></thead><tbody>{body}</tbody></table></div>'
    )


def key(colour: int) -> Html:
    """A swatch of the palette."""
    return Html(f'<i class="key" style="background:var(--c{colour})"></i>')


def cards(facts: Sequence[tuple[str, str]]) -> Html:
    return Html('<div class="cards">' + "".join(
        f'<div class="card"><b>{escape(value)}</b><span>{escape(name)}</span></div>' for name, value in facts
    ) + "</div>")  # fmt: skip
