"""The table of an examination, and the same for machines.

The JSON object (schema 1) holds: schema; version, of pipeline; words, as they were typed; verdict, go or no-go;
exit_code; seconds; counts, with ok, warning and fault; and findings, a list of section, name, state (ok, warning,
fault), text and way_out ("" where none is needed).
Keys may be added; none changes its meaning within a schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from pipeline import __version__
from pipeline.doctor.findings import FAULT, OK, WARNING, Finding, without_secrets

SCHEMA = 1
GO, ENVIRONMENT, DATA = 0, 2, 3
_STYLE = {OK: "green", WARNING: "yellow", FAULT: "bold red"}


def exit_code(findings: Sequence[Finding]) -> int:
    """0 = go, 2 = a fault in config or environment, 3 = faults in data alone."""
    sections = {finding.section for finding in findings if finding.state == FAULT}
    return GO if not sections else DATA if sections == {"data"} else ENVIRONMENT


def as_json(words: Sequence[str], findings: Sequence[Finding], seconds: float) -> dict[str, Any]:
    code = exit_code(findings)
    return {
        "schema": SCHEMA,
        "version": __version__,
        "words": [without_secrets(word) for word in words],
        "verdict": "no-go" if code else "go",
        "exit_code": code,
        "seconds": round(seconds, 2),
        "counts": _counts(findings),
        "findings": [asdict(finding) for finding in findings],
    }


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


def verdict(findings: Sequence[Finding], seconds: float) -> str:
    """The last line, in which what was wrong is named again: the table may have scrolled away."""
    parts = []
    for state, word in ((FAULT, "fault"), (WARNING, "warning")):
        named = [finding.name for finding in findings if finding.state == state]
        if named:
            parts.append(f"{len(named)} {word}{'s' if named[1:] else ''} ({', '.join(dict.fromkeys(named))})")
    parts.append(f"{len(findings)} findings in {seconds:.1f} s")
    return f"{'NO GO' if exit_code(findings) else 'GO'}: {', '.join(parts)}"


def _counts(findings: Sequence[Finding]) -> dict[str, int]:
    counted = Counter(finding.state for finding in findings)
    return {state: counted[state] for state in (OK, WARNING, FAULT)}
