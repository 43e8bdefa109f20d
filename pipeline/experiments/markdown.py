"""Results as Markdown for a repository: claims, verdicts, tables, a picture each."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from pipeline.data.shards import write_atomically
from pipeline.experiments.experiment import Table
from pipeline.experiments.page import TITLE, VERDICTS, how, save_picture, summary
from pipeline.experiments.result import Result


def write_markdown(results: Sequence[Result], path: Path) -> None:
    """The file, and its pictures in a directory beside it that is called after it."""
    pictures = path.with_suffix("")
    pictures.mkdir(parents=True, exist_ok=True)
    for result in results:
        for figure in result.finding.figures:
            save_picture(figure, pictures / f"{figure.key}.png")
    write_atomically(path, markdown(results, pictures.name).encode())


def markdown(results: Sequence[Result], pictures: str) -> str:
    """pictures: their directory, from where the file lies."""
    lines = [f"# {TITLE}", "", summary(results), "", *_overview(results)]
    for result in results:
        experiment, finding = result.experiment, result.finding
        lines += [f"## {experiment.title}", "", f"> {experiment.claim}", f"> ({experiment.source})", ""]
        lines += [f"**{VERDICTS[finding.holds].capitalize()}.** {finding.said}", ""]
        if finding.figures:
            shown = (f'<img src="{pictures}/{f.key}.png" alt="{_plain(f.title)}" width="420">' for f in finding.figures)
            lines += ["\n".join(shown), ""]
        for table in finding.tables:
            lines += _table(table)
        for remark in finding.remarks:
            lines += [f"- {remark}"]
        lines += [*([""] if finding.remarks else []), f"`{result.command}`: {how(result)}.", ""]
    return "\n".join(lines).rstrip() + "\n"


def _overview(results: Sequence[Result]) -> list[str]:
    rows = [[f"[{r.experiment.name}](#{_anchor(r.experiment.title)})", VERDICTS[r.finding.holds], r.finding.said]
            for r in results]  # fmt: skip
    return _rows(["experiment", "claim", "what came out"], rows)


def _table(table: Table) -> list[str]:
    return [f"**{table.title}**", "", *_rows(table.head, table.rows), *([table.note, ""] if table.note else [])]


def _rows(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return [*("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines), ""]


def _anchor(title: str) -> str:
    """Of a heading, as GitHub makes it."""
    return "".join(c for c in title.lower().replace(" ", "-") if c.isalnum() or c in "-_")


def _plain(words: str) -> str:
    return words.replace('"', "'")
