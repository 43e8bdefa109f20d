"""The findings of an examination as a table in the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline.doctor.findings import FAULT, OK, WARNING, Finding

_STYLE = {OK: "green", WARNING: "yellow", FAULT: "bold red"}


def table(findings: Sequence[Finding]) -> Table:
    """Sections one under another; a way out stands below what it is for."""
    made = Table(box=box.SIMPLE_HEAD, pad_edge=False, show_edge=False, expand=False)
    for name in ("", "check", "found"):
        made.add_column(name, overflow="fold", no_wrap=name == "")
    section = ""
    for finding in findings:
        if section and finding.section != section:
            made.add_section()
        section = finding.section
        line = Text(finding.text)
        if finding.way_out:
            line.append(f"\n-> {finding.way_out}", _STYLE[finding.state])
        made.add_row(Text(finding.state, _STYLE[finding.state]), Text(finding.name), line)
    return made
