"""The verdict of an examination, and all of it for machines and for terminals without rich.

The JSON object (schema 1) holds: schema; version, of pipeline; words, as they were typed; verdict, go or no-go;
exit_code; seconds; counts, with ok, warning and fault; and findings, a list of section, name, state (ok, warning,
fault), text and way_out ("" where none is needed).
An examination of nodes (`--nodes`) has ranks and network besides: see ranks.py.
Keys may be added; none changes its meaning within a schema.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline import __version__
from pipeline.doctor.findings import FAULT, OK, WARNING, Finding
from pipeline.launch.redaction import without_secrets

SCHEMA = 1
GO, ENVIRONMENT, DATA = 0, 2, 3


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


def lines(findings: Sequence[Finding]) -> list[str]:
    """A line a finding, its way out behind it."""
    return [f"{f.state:8} {f.name}: {f.text}{f' -> {f.way_out}' if f.way_out else ''}" for f in findings]


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
