"""A line chart as SVG: axes with round numbers, a legend, nothing else."""

import math
from collections.abc import Mapping, Sequence
from html import escape

Points = Sequence[tuple[float, float]]

WIDTH, HEIGHT, LEFT, TOP, LEGEND, BELOW = 860, 460, 70, 40, 210, 50
COLOURS = ("#d62728", "#ff7f0e", "#1f77b4", "#17becf", "#2ca02c", "#9467bd", "#8c564b", "#e377c2", "#333333", "#999999")


def shares(values: Sequence[float]) -> list[tuple[float, float]]:
    """The share of values that are not greater, at each of at most 200 of them.

    >>> shares([3.0, 1.0])
    [(1.0, 0.5), (3.0, 1.0)]
    """
    ordered = sorted(values)
    every = max(1, len(ordered) // 200)
    found = [(value, (n + 1) / len(ordered)) for n, value in enumerate(ordered) if n % every == 0]
    return found if not ordered or found[-1][0] == ordered[-1] else [*found, (ordered[-1], 1.0)]


def chart(
    title: str, series: Mapping[str, Points], axes: tuple[str, str], logarithmic: tuple[bool, bool] = (True, True)
) -> str:
    """One line a series, in the series' order; a series without points is left to the legend, with a dash."""
    scales = [
        _Scale([point[axis] for points in series.values() for point in points], logarithmic[axis], span)
        for axis, span in ((0, (LEFT, WIDTH - LEGEND)), (1, (HEIGHT - BELOW, TOP)))
    ]
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        _text(LEFT, 22, title, "start", 14),
        _text((LEFT + WIDTH - LEGEND) / 2, HEIGHT - 10, axes[0], "middle"),
        _text(LEFT, TOP - 6, axes[1], "end"),
    ]
    x, y = scales
    for at in x.ticks:
        parts.append(_line(x(at), TOP, x(at), HEIGHT - BELOW, "#dddddd"))
        parts.append(_text(x(at), HEIGHT - BELOW + 16, f"{at:,g}", "middle"))
    for at in y.ticks:
        parts.append(_line(LEFT, y(at), WIDTH - LEGEND, y(at), "#dddddd"))
        parts.append(_text(LEFT - 6, y(at) + 4, f"{at:,g}", "end"))
    for n, (name, points) in enumerate(series.items()):
        colour, at = COLOURS[n % len(COLOURS)], TOP + 12 + 20 * n
        path = " ".join(f"{x(px):.1f},{y(py):.1f}" for px, py in points)
        width = 2.5 if name.startswith("tako") else 1.5
        parts.append(f'<polyline points="{path}" fill="none" stroke="{colour}" stroke-width="{width}"/>')
        parts.append(_line(WIDTH - LEGEND + 14, at, WIDTH - LEGEND + 34, at, colour, width))
        parts.append(_text(WIDTH - LEGEND + 40, at + 4, name if points else f"{name}: none", "start"))
    return "\n".join([*parts, "</svg>"]) + "\n"


class _Scale:
    """From values to places on the paper; `ticks` are the round numbers within."""

    def __init__(self, values: Sequence[float], logarithmic: bool, span: tuple[float, float]) -> None:
        self._map = math.log10 if logarithmic else float
        self._span = span
        low, high = (min(values), max(values)) if values else (1.0, 10.0)
        if logarithmic:
            exponents = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
            low, high = 10.0 ** exponents[0], max(10.0 ** exponents[-1], 10.0 ** (exponents[0] + 1))
            self.ticks = [10.0**exponent for exponent in exponents]
        else:
            low, high = 0.0, max(high, 1e-9)
            self.ticks = [high * n / 5 for n in range(6)]
        self._low, self._high = self._map(low), self._map(high)

    def __call__(self, value: float) -> float:
        share = (self._map(value) - self._low) / (self._high - self._low)
        return self._span[0] + share * (self._span[1] - self._span[0])


def _line(x1: float, y1: float, x2: float, y2: float, colour: str, width: float = 1) -> str:
    return f'<line x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}" stroke="{colour}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str, size: int = 12) -> str:
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" font-size="{size}">{escape(text)}</text>'
