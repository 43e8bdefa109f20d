"""A chart as plain marks on a plane, before anything draws it: svg.py and png.py paint the same scene.

Legend: X points of a line.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.report.record import Values

WIDTH, HEIGHT = 420, 262  # of a chart, in units that come close to pixels on a desk and on a phone
LEFT, RIGHT, TOP, BOTTOM = 50, 12, 10, 34
TEXT = 11.5
COLUMNS = 320  # of points beyond which a line is drawn as a mean and the range around it
Point = tuple[float, float]


def compact(value: float) -> str:
    """1200000 as 1.2M."""
    for size, sign in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{sign}"
    return f"{value:g}"


@dataclass(frozen=True, slots=True)
class Line:
    """A curve. low, high: a range around y. dots: marks at the points."""

    name: str
    x: Values
    y: Values
    colour: int
    low: Values | None = None
    high: Values | None = None
    dots: bool = False


@dataclass(frozen=True, slots=True)
class Chart:
    """key: the name of its file. low, high: bounds of the axis, None for those of the data. rules: (y, label)."""

    key: str
    title: str
    x_label: str
    lines: Sequence[Line]
    number: Callable[[float], str]
    low: float | None = None
    high: float | None = None
    robust: bool = False  # the axis ends where 98 % of the points do
    rules: Sequence[tuple[float, str]] = ()
    note: str = ""
    legend: bool = False  # its lines are not runs, and are told apart by a legend of its own
    x_number: Callable[[float], str] = compact


@dataclass(frozen=True, slots=True)
class Bar:
    """A stretch of a lane: from, to, what it is, what colour; hollow for what is nothing."""

    first: float
    last: float
    label: str
    colour: int
    hollow: bool = False


@dataclass(frozen=True, slots=True)
class Lanes:
    """A lane for each run, bars in it. marks: points of time in a lane."""

    key: str
    title: str
    x_label: str
    names: Sequence[str]
    bars: Sequence[Sequence[Bar]]
    number: Callable[[float], str]
    legend: Sequence[tuple[str, int, bool]] = ()
    marks: Sequence[Sequence[float]] = ()
    note: str = ""


@dataclass(frozen=True, slots=True)
class Strip:
    """A row of cells for each name, of values above 0 and below. cells: of each row (from, to, value).

    full: the value at which a cell is darkest.
    """

    key: str
    title: str
    x_label: str
    names: Sequence[str]
    cells: Sequence[Sequence[tuple[float, float, float]]]
    full: float
    note: str = ""


Figure = Chart | Lanes | Strip


@dataclass(frozen=True, slots=True)
class Text:
    at: Point
    text: str
    anchor: str = "start"  # start, middle, end
    strong: bool = False


@dataclass(frozen=True, slots=True)
class Stroke:
    """A line through points. colour: of the palette, or -1 for the grid's, -2 for that of rules."""

    points: Sequence[Point]
    colour: int
    name: str = ""
    width: float = 1.6
    dashed: bool = False


@dataclass(frozen=True, slots=True)
class Area:
    points: Sequence[Point]
    colour: int
    opacity: float = 0.22
    label: str = ""
    outlined: bool = False


@dataclass(frozen=True, slots=True)
class Dot:
    at: Point
    colour: int
    radius: float = 2.2


@dataclass(frozen=True, slots=True)
class Scene:
    """axes: (left, right, x at left, x at right, bottom, top, y at bottom, y at top), to read values back; or ()."""

    height: float = HEIGHT
    axes: tuple[float, ...] = ()
    marks: list[Text | Stroke | Area | Dot] = field(default_factory=list)


def drawn(chart: Figure) -> Scene:
    if isinstance(chart, Strip):
        return _strip(chart)
    return _lanes(chart) if isinstance(chart, Lanes) else _curves(chart)


def _curves(chart: Chart) -> Scene:
    lines = [reduced(line) for line in chart.lines]
    lines = [line for line in lines if len(line.x)]
    x_low, x_high = _bounds([line.x for line in lines], None, None)
    if 0 < x_low < 0.3 * x_high:
        x_low = 0.0
    y_low, y_high = _y_bounds(chart, lines)
    y_ticks = ticks(y_low, y_high, 5)
    y_low, y_high = min(y_low, y_ticks[0]), max(y_high, y_ticks[-1])
    left, right, top, bottom = LEFT, WIDTH - RIGHT, TOP, HEIGHT - BOTTOM
    scene = Scene(axes=(left, right, x_low, x_high, bottom, top, y_low, y_high))

    def place(x: float, y: float) -> Point:
        y = min(max(y, y_low), y_high)
        return left + (x - x_low) / (x_high - x_low) * (right - left), bottom - (y - y_low) / (y_high - y_low) * (
            bottom - top
        )

    for y in y_ticks:
        at = place(x_low, y)[1]
        scene.marks.append(Stroke([(left, at), (right, at)], -1, width=0.8))
        scene.marks.append(Text((left - 6, at + TEXT * 0.35), chart.number(y), "end"))
    _x_axis(scene, chart.x_label, x_low, x_high, left, right, bottom, chart.x_number)
    for y, label in chart.rules:
        if y_low <= y <= y_high:
            at = place(x_low, y)[1]
            scene.marks.append(Stroke([(left, at), (right, at)], -2, width=1.0, dashed=True))
            scene.marks.append(_beside_rule(label, at, lines, place, (left, right, x_low, x_high)))
    for line in lines:
        if line.low is not None and line.high is not None:
            upper = [place(x, y) for x, y in zip(line.x, line.high, strict=True)]
            lower = [place(x, y) for x, y in zip(line.x, line.low, strict=True)]
            scene.marks.append(Area([*upper, *lower[::-1]], line.colour))
    for line in lines:
        points = [place(x, y) for x, y in zip(line.x, line.y, strict=True)]
        scene.marks.append(Stroke(points, line.colour, line.name))
        if line.dots or len(points) == 1:
            scene.marks.extend(Dot(point, line.colour) for point in points)
    if not lines:
        scene.marks.append(Text(((left + right) / 2, (top + bottom) / 2), "nothing recorded yet", "middle"))
    return scene


def _beside_rule(
    label: str, at: float, lines: Sequence[Line], place: Callable[[float, float], Point], axis: tuple[float, ...]
) -> Text:
    """The label of a rule where the fewest curves run through it: at an end or between, above or below."""
    left, right, x_low, x_high = axis
    width = 6.2 * len(label)

    def crossed(text: Text) -> int:
        first = text.at[0] - width * {"start": 0.0, "middle": 0.5, "end": 1.0}[text.anchor]
        x = x_low + (np.linspace(first, first + width, 16) - left) / (right - left) * (x_high - x_low)
        heights = [
            place(a, b)[1]
            for line in lines
            for a, b in zip(x, np.interp(x, line.x, line.y, left=math.nan, right=math.nan), strict=True)
            if math.isfinite(b)
        ]
        return sum(text.at[1] - TEXT <= height <= text.at[1] + 3 for height in heights)

    places = [(left + 5, "start"), (right, "end"), *((left + (right - left) * f, "middle") for f in (0.35, 0.5, 0.65))]
    return min((Text((x, y), label, anchor) for y in (at - 4, at + 13) for x, anchor in places), key=crossed)


def _lanes(chart: Lanes) -> Scene:
    legend_height = 18 * math.ceil(len(chart.legend) / 3) if chart.legend else 0
    step = 40 if len(chart.names) < 6 else 32
    bottom = TOP + legend_height + step * len(chart.names) + 4
    left, right = 8, WIDTH - RIGHT
    high = max((bar.last for bars in chart.bars for bar in bars), default=0.0) or 1.0
    scene = Scene(height=bottom + BOTTOM)
    for i, (label, colour, hollow) in enumerate(chart.legend):
        x, y = left + (i % 3) * (right - left) / 3, TOP + 18 * (i // 3)
        scene.marks.append(Area(_box(x, y, x + 11, y + 11), colour, 1.0, outlined=hollow))
        scene.marks.append(Text((x + 16, y + 10), label))

    def place(x: float) -> float:
        return left + x / high * (right - left)

    _x_axis(scene, chart.x_label, 0.0, high, left, right, bottom, chart.number)
    for number, (name, bars) in enumerate(zip(chart.names, chart.bars, strict=True)):
        y = TOP + legend_height + step * number
        scene.marks.append(Text((left, y + 12), name, strong=True))
        for bar in bars:
            first, last = place(bar.first), max(place(bar.last), place(bar.first) + 0.6)
            scene.marks.append(
                Area(_box(first, y + 17, last, y + step - 6), bar.colour, 1.0, bar.label, outlined=bar.hollow)
            )
        for x in chart.marks[number] if chart.marks else ():
            scene.marks.append(Stroke([(place(x), y + 14), (place(x), y + step - 3)], -3, width=1.4))
    return scene


_ABOVE, _BELOW, _SHADES = 1, 0, 5  # colours that all tell apart, each in so many steps


def _strip(chart: Strip) -> Scene:
    height = min(18.0, 320 / max(len(chart.names), 1))
    left, right = LEFT + 18, WIDTH - RIGHT
    bottom = TOP + height * len(chart.names) + 2
    known = [cell for row in chart.cells for cell in row]
    low, high = min((cell[0] for cell in known), default=0.0), max((cell[1] for cell in known), default=1.0)
    scene = Scene(height=bottom + BOTTOM)
    every = math.ceil(TEXT * 1.15 / height)  # a name for each row that has room for it

    def place(x: float) -> float:
        return left + (x - low) / max(high - low, 1e-9) * (right - left)

    for number, (name, row) in enumerate(zip(chart.names, chart.cells, strict=True)):
        y = TOP + height * number
        if number % every == 0:
            scene.marks.append(Text((left - 6, y + height / 2 + TEXT * 0.35), name, "end"))
        scene.marks.append(Area(_box(left, y + 0.5, right, y + height - 0.5), 7, 0.08))
        for first, last, value in row:
            shade = min(round(abs(value) / chart.full * _SHADES), _SHADES)
            if shade:
                scene.marks.append(
                    Area(_box(place(first), y + 0.5, place(last), y + height - 0.5), _ABOVE if value > 0 else _BELOW,
                         0.95 * shade / _SHADES, f"{name}: {value:+.0%}")
                )  # fmt: skip
    _x_axis(scene, chart.x_label, low, high, left, right, bottom, compact)
    return scene


def _box(x1: float, y1: float, x2: float, y2: float) -> list[Point]:
    return [(x1, y1), (x2, y1), (x2, y2), (x1, y2)]


def _x_axis(
    scene: Scene, label: str, low: float, high: float, left: float, right: float, bottom: float,
    number: Callable[[float], str],
) -> None:  # fmt: skip
    scene.marks.append(Stroke([(left, bottom), (right, bottom)], -2, width=1.0))
    for x in ticks(low, high, 5, outside=False):
        at = left + (x - low) / (high - low) * (right - left)
        scene.marks.append(Stroke([(at, bottom), (at, bottom + 4)], -2, width=1.0))
        anchor = "end" if at > right - 12 else "start" if at < left + 6 and left < 20 else "middle"
        scene.marks.append(Text((at, bottom + 16), number(x), anchor))
    scene.marks.append(Text(((left + right) / 2, bottom + 30), label, "middle"))


def reduced(line: Line, columns: int = COLUMNS) -> Line:
    """The line with at most so many points: means of neighbours, and the range of all that they stand for."""
    keep = np.isfinite(line.x) & np.isfinite(line.y)
    x_X, y_X = line.x[keep], line.y[keep]
    low_X = y_X if line.low is None else line.low[keep]
    high_X = y_X if line.high is None else line.high[keep]
    if len(x_X) <= 2 * columns:
        given = line.low is not None and line.high is not None
        return Line(line.name, x_X, y_X, line.colour, low_X if given else None, high_X if given else None, line.dots)
    column_X = np.minimum(((x_X - x_X[0]) / (x_X[-1] - x_X[0]) * columns).astype(int), columns - 1)
    first = np.flatnonzero(np.diff(column_X, prepend=-1))
    count = np.diff(first, append=len(x_X))
    return Line(
        line.name, np.add.reduceat(x_X, first) / count, np.add.reduceat(y_X, first) / count, line.colour,
        np.minimum.reduceat(low_X, first), np.maximum.reduceat(high_X, first),
    )  # fmt: skip


def ticks(low: float, high: float, count: int, *, outside: bool = True) -> list[float]:
    """About so many round numbers, from below low to above high; within them if not outside."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 2.5, 5, 10) if power * factor >= raw * 0.999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    if not outside:
        first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(i * step, 12) for i in range(first, last + 1)]


def _bounds(values: Sequence[Values], low: float | None, high: float | None) -> tuple[float, float]:
    """From the least to the most, never the same."""
    known = np.concatenate([*values, [math.nan]])
    known = known[np.isfinite(known)]
    low = low if low is not None else float(known.min(initial=math.inf)) if len(known) else 0.0
    high = high if high is not None else float(known.max(initial=-math.inf)) if len(known) else low + 1.0
    return (low, high) if high > low else (low - abs(low) * 0.05, low + (abs(low) * 0.05 or 1.0))


def _y_bounds(chart: Chart, lines: Sequence[Line]) -> tuple[float, float]:
    values = [part for line in lines for part in (line.y, line.low, line.high) if part is not None]
    if chart.robust and lines:
        values = [np.quantile(part[np.isfinite(part)], [0.0, 0.98]) for part in values if np.isfinite(part).any()]
    return _bounds(values, chart.low, chart.high)


def power_of_ten(exponent: float) -> str:
    """-2 as 0.01, -8 as 1e-8, 2.5 as 10^2.5: for an axis of logarithms."""
    if exponent != int(exponent):
        return f"10^{exponent:g}"
    return f"{10**exponent:g}" if abs(exponent) < 3 else f"1e{exponent:g}"


def power_of_two(exponent: float) -> str:
    """3 as 8; between whole powers nothing."""
    return f"{2**exponent:g}" if exponent == int(exponent) else ""


def percent(value: float) -> str:
    return f"{value * 100:g} %"


def time_unit(seconds: float) -> tuple[str, float]:
    """In which such a time is well said, and how many seconds that is."""
    for name, size in (("days", 86400.0), ("hours", 3600.0), ("minutes", 60.0)):
        if seconds >= 2 * size:
            return name, size
    return "seconds", 1.0
