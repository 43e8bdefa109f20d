"""A scene as inline SVG. Colours are the page's, by class, so that dark, light and print are one drawing."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

from pipeline.report.chart import WIDTH, Area, Dot, Point, Scene, Stroke, Text

_CLASS = {-1: "g", -2: "r", -3: "m"}


def svg(scene: Scene, title: str) -> str:
    """title: said to those who do not see it."""
    axes = f' data-axes="{" ".join(f"{value:g}" for value in scene.axes)}"' if scene.axes else ""
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {scene.height:g}" role="img" aria-label="{escape(title)}"{axes}>',
        *map(_mark, scene.marks),
        "</svg>",
    ]
    return "".join(parts)


def _mark(mark: Text | Stroke | Area | Dot) -> str:
    match mark:
        case Text(at, text, anchor, strong):
            kind = " class=b" if strong else ""
            where = "" if anchor == "start" else f" text-anchor={anchor}"
            return f'<text x="{at[0]:.1f}" y="{at[1]:.1f}"{where}{kind}>{escape(text)}</text>'
        case Stroke(points, colour, name, width, dashed):
            dash = " stroke-dasharray=4,3" if dashed else ""
            label = f' data-name="{escape(name)}"' if name else ""
            return f'<path class="{_class(colour)}" stroke-width="{width:g}"{dash}{label} d="{_path(points)}"/>'
        case Area(points, colour, opacity, label, outlined):
            kind = f"o{colour}" if outlined else f"f{colour}"
            inside = f"<title>{escape(label)}</title>" if label else ""
            return f'<path class="{kind}" fill-opacity="{opacity:g}" d="{_path(points)}Z">{inside}</path>'
        case Dot(at, colour, radius):
            return f'<circle class="f{colour}" cx="{at[0]:.1f}" cy="{at[1]:.1f}" r="{radius:g}"/>'


def _class(colour: int) -> str:
    return _CLASS.get(colour, f"s{colour}")


def _path(points: Sequence[Point]) -> str:
    return "M" + "L".join(f"{x:.1f},{y:.1f}" for x, y in points)
