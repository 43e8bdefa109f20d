"""A self-contained document of HTML: its head, its charts, its foot. No request leaves it, whatever it shows."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from importlib.resources import files

from pipeline.report.chart import Chart, Figure, drawn, percent
from pipeline.report.markup import Html, key, text
from pipeline.report.svg import svg

# It may draw itself, and do nothing else: a browser refuses every request.
_POLICY = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"


def document(title: str, body: Sequence[Html], command: str) -> str:
    """command: that makes it again."""
    parts = [*body, Html(f"<footer>Made by <code>{escape(command)}</code></footer>")]
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{escape(title)}</title><style>{_resource('page.css')}</style></head>\n<body><main>\n"
        + "\n".join(text(part) for part in parts)
        + f"\n</main><script>{_resource('page.js')}</script></body></html>\n"
    )


def charts(figures: Sequence[Figure]) -> Html:
    """Side by side, as many as there is room for."""
    return Html(f'<div class="charts">{"".join(_figure(chart) for chart in figures)}</div>')


def _figure(chart: Figure) -> str:
    note = f"<small>{escape(chart.note)}</small>" if chart.note else ""
    is_percent = isinstance(chart, Chart) and chart.number is percent
    return (
        f'<figure data-x="{escape(chart.x_label)}"{" data-percent=1" if is_percent else ""}>'
        f"<figcaption>{escape(chart.title)}</figcaption>{_own_legend(chart)}"
        f"{svg(drawn(chart), chart.title)}{note}</figure>"
    )


def _own_legend(chart: Figure) -> str:
    if not isinstance(chart, Chart) or not chart.legend:
        return ""
    items = "".join(f"<span>{key(line.colour).text}{escape(line.name)}</span>" for line in chart.lines)
    return f'<div class="legend">{items}</div>'


def _resource(name: str) -> str:
    return (files("pipeline.report") / name).read_text()
