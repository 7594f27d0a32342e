"""Charts as SVG text, for a page that loads nothing: points with intervals, lines, and bars."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT = 760, 380
LEFT, RIGHT, TOP, BOTTOM = 70, 20, 16, 46
COLORS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3fbf", "#8c564b", "#444444", "#b8b000",
          "#17becf", "#e377c2")  # fmt: skip


PARTS = ("#c3c9d0", "#1c5d99", "#56b4e9", "#e69f00", "#8c564b", "#7f3fbf")
"""Of the parts of bars, which are not those of methods."""


def color(number: int) -> str:
    """One for each method, told apart by people who see few colours as far as that goes."""
    return COLORS[number % len(COLORS)]


@dataclass(frozen=True)
class Axis:
    """From values to a place on the page."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    @classmethod
    def over(cls, values: Sequence[float], start: float, end: float, log: bool = False, margin: float = 0.06) -> Axis:
        """Around all values."""
        found = [math.log10(value) for value in values] if log else list(values)
        low, high = min(found), max(found)
        room = (high - low) * margin or abs(high) * 0.1 or 1.0
        return cls(low - room, high + room, start, end, log)

    def __call__(self, value: float) -> float:
        number = math.log10(value) if self.log else value
        return self.start + (number - self.low) / (self.high - self.low) * (self.end - self.start)

    def ticks(self) -> list[float]:
        """Round values along it."""
        if self.log:
            every = [10.0**power * digit for power in range(math.floor(self.low), math.ceil(self.high) + 1)
                     for digit in ((1,) if self.high - self.low > 1.5 else (1, 2, 5))]  # fmt: skip
            return [value for value in every if self.low <= math.log10(value) <= self.high]
        step = 10.0 ** math.floor(math.log10((self.high - self.low) / 4))
        step *= next(factor for factor in (1, 2, 5, 10) if (self.high - self.low) / (step * factor) <= 6)
        first = math.ceil(self.low / step)
        return [number * step for number in range(first, math.floor(self.high / step) + 1)]


def short(value: float) -> str:
    """1.2M, 34k, 0.012."""
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.3g}"


@dataclass(frozen=True)
class Point:
    """One method: its name, cost, quality and half the quality's interval."""

    name: str
    x: float
    y: float
    half: float
    number: int


def scatter(points: Sequence[Point], across: str, up: str, higher: bool) -> str:
    """Quality over cost, with the line of those that no other beats in both."""
    x = Axis.over([point.x for point in points], LEFT, WIDTH - 130, log=True)
    sides = [point.y + sign * point.half for point in points for sign in (-1, 1) if math.isfinite(point.half)]
    y = Axis.over([*sides, *(point.y for point in points)], HEIGHT - BOTTOM, TOP)
    parts = _frame(x, y, across, up)
    best = frontier(points, higher)
    line = " ".join(f"{x(point.x):.1f},{y(point.y):.1f}" for point in best)
    parts.append(f'<polyline class="frontier" points="{line}"/>')
    heights = _spread([(y(point.y), point.name) for point in points])
    for point in points:
        place, height, tint = x(point.x), y(point.y), color(point.number)
        if math.isfinite(point.half):
            low, high = y(point.y - point.half), y(point.y + point.half)
            parts.append(f'<line x1="{place:.1f}" x2="{place:.1f}" y1="{low:.1f}" y2="{high:.1f}" stroke="{tint}"/>')
        said = f"{point.name}: {point.y:.4g} ± {point.half:.2g}, {short(point.x)}"
        parts.append(f'<circle cx="{place:.1f}" cy="{height:.1f}" r="5" fill="{tint}"><title>{escape(said)}</title>'
                     "</circle>")  # fmt: skip
        beside = WIDTH - 118
        parts.append(f'<text x="{beside}" y="{heights[point.name] + 4:.1f}" fill="{tint}">{escape(point.name)}</text>')
        parts.append(f'<path class="leader" stroke="{tint}" d="M{place + 6:.1f} {height:.1f}L{beside - 4} '
                     f'{heights[point.name]:.1f}"/>')  # fmt: skip
    return _svg(parts, HEIGHT)


def frontier(points: Sequence[Point], higher: bool) -> list[Point]:
    """The points that no other point beats in quality at the same cost or less, by rising cost."""
    found: list[Point] = []
    for point in sorted(points, key=lambda each: (each.x, -each.y if higher else each.y)):
        if not found or (point.y > found[-1].y if higher else point.y < found[-1].y):
            found.append(point)
    return found


def _spread(wanted: Sequence[tuple[float, str]], gap: float = 15.0) -> dict[str, float]:
    """Heights of labels near the wanted ones and not over each other."""
    ordered = sorted(wanted)
    heights = [height for height, _ in ordered]
    for place in range(1, len(heights)):
        heights[place] = max(heights[place], heights[place - 1] + gap)
    limit = float(HEIGHT - BOTTOM)
    for place in range(len(heights) - 1, -1, -1):
        heights[place] = min(heights[place], limit)
        limit = heights[place] - gap
    return {name: height for height, (_, name) in zip(heights, ordered, strict=True)}


@dataclass(frozen=True)
class Line:
    """(step, value) of one seed of a method."""

    name: str
    points: Sequence[tuple[float, float]]
    number: int


def lines(found: Sequence[Line], across: str, up: str) -> str:
    """Curves, one colour a method, a line for each seed, the methods named beside."""
    x = Axis.over([place for line in found for place, _ in line.points], LEFT, WIDTH - 130, margin=0.01)
    y = Axis.over([value for line in found for _, value in line.points], HEIGHT - BOTTOM, TOP)
    parts = _frame(x, y, across, up)
    ends: dict[str, tuple[float, int]] = {}
    for line in found:
        path = " ".join(f"{x(place):.1f},{y(value):.1f}" for place, value in line.points)
        parts.append(f'<polyline class="curve" stroke="{color(line.number)}" points="{path}">'
                     f"<title>{escape(line.name)}</title></polyline>")  # fmt: skip
        ends.setdefault(line.name, (y(line.points[-1][1]), line.number))
    heights = _spread([(height, name) for name, (height, _) in ends.items()])
    for name, (_, number) in ends.items():
        parts.append(
            f'<text x="{WIDTH - 118}" y="{heights[name] + 4:.1f}" fill="{color(number)}">{escape(name)}</text>'
        )
    return _svg(parts, HEIGHT)


def bars(rows: Sequence[tuple[str, Sequence[tuple[str, float]]]], kinds: Sequence[str], unit: str) -> str:
    """For each name one bar beneath the other, of parts (kind, value) side by side, of at most five kinds."""
    thick, gap = 13, 10
    names = list(dict.fromkeys(name for name, _ in rows))
    most = max(sum(value for _, value in parts) for _, parts in rows)
    x = Axis(0.0, most * 1.08, 130, WIDTH - RIGHT)
    bottom = float(TOP + len(rows) * (thick + 2) + len(names) * gap)
    found = [f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{bottom}"/>'
             f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{bottom + 16}">{tick:,.4g}</text>'
             for tick in x.ticks()]  # fmt: skip
    height, before = float(TOP), ""
    for name, parts in rows:
        if name != before:
            height += gap / 2 if not before else gap
            found.append(f'<text text-anchor="end" x="122" y="{height + thick - 2:.1f}">{escape(name)}</text>')
            before = name
        place = 0.0
        for kind, value in parts:
            said = escape(f"{name}, {kind}: {value:,.4g} {unit}")
            found.append(
                f'<rect x="{x(place):.1f}" y="{height:.1f}" width="{x(place + value) - x(place):.1f}" height="{thick}" '
                f'fill="{PARTS[kinds.index(kind)]}"><title>{said}</title></rect>'
            )
            place += value
        height += thick + 2
    legend = []
    for n, kind in enumerate(kinds):
        left, top = 130 + 290 * (n % 2), bottom + 42 + 18 * (n // 2)
        legend.append(f'<rect x="{left}" y="{top}" width="11" height="11" fill="{PARTS[n]}"/>'
                      f'<text x="{left + 16}" y="{top + 10}">{escape(kind)}</text>')  # fmt: skip
    label = f'<text class="tick" x="{WIDTH - RIGHT}" y="{bottom + 30}" text-anchor="end">{escape(unit)}</text>'
    return _svg([*found, *legend, label], bottom + 46 + 18 * -(-len(kinds) // 2))


def _frame(x: Axis, y: Axis, across: str, up: str) -> list[str]:
    parts = []
    for tick in x.ticks():
        parts.append(f'<line class="grid" x1="{x(tick):.1f}" x2="{x(tick):.1f}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>'
                     f'<text class="tick" text-anchor="middle" x="{x(tick):.1f}" y="{HEIGHT - BOTTOM + 16}">'
                     f"{short(tick)}</text>")  # fmt: skip
    for tick in y.ticks():
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{x.end}" y1="{y(tick):.1f}" y2="{y(tick):.1f}"/>'
                     f'<text class="tick" text-anchor="end" x="{LEFT - 6}" y="{y(tick) + 4:.1f}">'
                     f"{tick:.4g}</text>")  # fmt: skip
    middle = (TOP + HEIGHT - BOTTOM) / 2
    parts.append(f'<text class="label" text-anchor="middle" x="{(LEFT + x.end) / 2:.0f}" y="{HEIGHT - 8}">'
                 f"{escape(across)}</text>")  # fmt: skip
    parts.append(f'<text class="label" text-anchor="middle" transform="translate(16 {middle:.0f}) rotate(-90)">'
                 f"{escape(up)}</text>")  # fmt: skip
    return parts


def _svg(parts: Sequence[str], height: float) -> str:
    return f'<svg viewBox="0 0 {WIDTH} {height:.0f}" role="img">{"".join(parts)}</svg>'
