"""A scene as pixels, for READMEs and slides. Pillow, which decodes the images, draws it: no plotting library is needed.

Everything is drawn three times as large as it is shown and averaged, which is what makes lines smooth.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from pipeline.report.chart import TEXT, WIDTH, Area, Dot, Point, Scene, Stroke, Text

SCALE, OVER = 2, 3  # pixels a unit; drawn larger by
INK, PAPER = (34, 34, 34), (255, 255, 255)
# Okabe & Ito 2008, told apart by all forms of colour vision; black and a grey stand for its yellow, faint on paper.
PALETTE = ((0, 114, 178), (213, 94, 0), (0, 158, 115), (204, 121, 167), (230, 159, 0), (86, 180, 233), (34, 34, 34),
           (140, 140, 140))  # fmt: skip
_LINES = {-1: (226, 226, 226), -2: (120, 120, 120), -3: INK}
Colour = tuple[int, int, int]


def paint(scene: Scene, title: str, legend: Sequence[tuple[str, int]] = ()) -> Image.Image:
    """The scene below its title. legend: names and colours of lines."""
    head = 26 + (16 * len(_rows(legend)) if legend else 0)
    unit = SCALE * OVER
    image = Image.new("RGB", (WIDTH * unit, int((scene.height + head) * unit)), PAPER)
    draw = ImageDraw.Draw(image, "RGBA")
    draw.text((8 * unit, 5 * unit), title, fill=INK, font=_font(13.5 * unit), stroke_width=unit // 5, stroke_fill=INK)
    for number, row in enumerate(_rows(legend)):
        x, y = 8.0, 28 + 16 * number
        for name, colour in row:
            draw.rectangle((x * unit, (y + 5) * unit, (x + 14) * unit, (y + 8) * unit), fill=_colour(colour))
            draw.text(((x + 19) * unit, y * unit), name, fill=INK, font=_font(TEXT * unit))
            x += 19 + _font(TEXT).getlength(name) + 14
    for mark in scene.marks:
        _draw(draw, mark, head, unit)
    return image.resize((image.width // OVER, image.height // OVER), Image.Resampling.BOX)


def together(images: Sequence[Image.Image], columns: int) -> Image.Image:
    """Pictures side by side, as high as the highest of each row."""
    rows = [images[i : i + columns] for i in range(0, len(images), columns)]
    heights = [max(image.height for image in row) for row in rows]
    gap = 8 * SCALE
    width = columns * images[0].width + (columns + 1) * gap
    sheet = Image.new("RGB", (width, sum(heights) + (len(rows) + 1) * gap), PAPER)
    y = gap
    for row, height in zip(rows, heights, strict=True):
        for place, image in enumerate(row):
            sheet.paste(image, (gap + place * (image.width + gap), y))
        y += height + gap
    return sheet


def save(image: Image.Image, path: Path) -> None:
    """As a PNG of 64 colours: lines and text need no more, and it is a third of the bytes."""
    image.quantize(64, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE).save(path)


def _draw(draw: ImageDraw.ImageDraw, mark: Text | Stroke | Area | Dot, head: float, unit: int) -> None:
    def at(point: Point) -> Point:
        return point[0] * unit, (point[1] + head) * unit

    match mark:
        case Text(point, text, anchor, strong):
            kind = {"start": "ls", "middle": "ms", "end": "rs"}[anchor]
            bold = unit // 6 if strong else 0
            draw.text(at(point), text, fill=INK, font=_font(TEXT * unit), anchor=kind, stroke_width=bold,
                      stroke_fill=INK)  # fmt: skip
        case Stroke(points, colour, _, width, dashed):
            placed = [at(point) for point in points]
            for piece in _dashes(placed, 4 * unit) if dashed else [placed]:
                draw.line(piece, fill=_colour(colour), width=max(round(width * unit), 1), joint="curve")
        case Area(points, colour, opacity, _, outlined):
            placed = [at(point) for point in points]
            fill = None if outlined else (*_colour(colour), round(opacity * 255))
            draw.polygon(placed, fill=fill, outline=_colour(colour) if outlined else None, width=unit)
        case Dot(point, colour, radius):
            draw.circle(at(point), radius * unit, fill=_colour(colour))


def _dashes(points: Sequence[Point], length: float) -> list[list[Point]]:
    """A straight horizontal line in pieces."""
    (x, y), (end, _) = points[0], points[-1]
    found = []
    while x < end:
        found.append([(x, y), (min(x + length, end), y)])
        x += 1.75 * length
    return found


def _rows(legend: Sequence[tuple[str, int]]) -> list[list[tuple[str, int]]]:
    """Names in rows that fit."""
    rows: list[list[tuple[str, int]]] = []
    width = float(WIDTH)
    for name, colour in legend:
        needed = 33 + _font(TEXT).getlength(name)
        if width + needed > WIDTH - 8:
            rows.append([])
            width = 0.0
        rows[-1].append((name, colour))
        width += needed
    return rows


def _colour(number: int) -> Colour:
    return _LINES.get(number) or PALETTE[number % len(PALETTE)]


@cache
def _font(size: float) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
