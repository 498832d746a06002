"""Plots of the report as inline SVG: colours come from the page's CSS variables, no scripts."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape

SERIES = 8  # colours --s0 .. --s7 of the page
LAYER = re.compile(r"(?:^|\.)(?:layers|h|blocks)\.(\d+)\.(.+)$")


@dataclass(frozen=True)
class Point:
    """One marker: x is the decoder layer's number, tip the text shown on hover."""

    x: float
    y: float
    tip: str


def series_of_layers(layers: Sequence[Mapping[str, object]], value: str) -> dict[str, list[Point]]:
    """Kind of projection (q_proj, down_proj, ...) → points over the decoder layers.

    layers: entries of quantization_report.json; value: the key to plot. Entries without a finite
    value or a layer number in their name are left out.
    """
    series: dict[str, list[Point]] = {}
    for layer in layers:
        found, y = LAYER.search(str(layer.get("name", ""))), layer.get(value)
        if found is None or not isinstance(y, (int, float)) or not math.isfinite(y):
            continue
        tip = f"{layer['name']}: {y:.4g}"
        series.setdefault(found[2].rsplit(".", 1)[-1], []).append(
            Point(int(found[1]), float(y), tip)
        )
    return {kind: sorted(points, key=lambda p: p.x) for kind, points in series.items()}


def line_plot(series: Mapping[str, Sequence[Point]], *, x_label: str, y_label: str) -> str:
    """Lines with markers, one colour per series; a logarithmic y axis if values span 20-fold.

    Returns one <svg> element that scales with its container, or "" without points.
    """
    points = [point for line in series.values() for point in line]
    if not points:
        return ""
    width, height = 920, 330
    left, right, top, bottom = 62, 14, 14, 44
    low, high = min(p.y for p in points), max(p.y for p in points)
    logarithmic = low > 0 and high / low > 20
    ticks = _log_ticks(low, high) if logarithmic else _linear_ticks(high)
    y_low, y_high = (ticks[0], ticks[-1]) if logarithmic else (0.0, ticks[-1])
    x_low, x_high = min(p.x for p in points), max(p.x for p in points)

    def place_x(x: float) -> float:
        share = (x - x_low) / (x_high - x_low) if x_high > x_low else 0.5
        return left + 10 + share * (width - left - right - 20)

    def place_y(y: float) -> float:
        if logarithmic:
            share = math.log(y / y_low) / math.log(y_high / y_low)
        else:
            share = (y - y_low) / ((y_high - y_low) or 1.0)
        return height - bottom - share * (height - top - bottom)

    parts = [
        f'<svg class="plot" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(y_label)} by {escape(x_label)}">'
    ]
    for tick in ticks:
        y = place_y(tick)
        parts.append(
            f'<line class="grid" x1="{left}" x2="{width - right}" y1="{y:.1f}" y2="{y:.1f}"/>'
        )
        parts.append(
            f'<text x="{left - 8}" y="{y + 4:.1f}" text-anchor="end">{_number(tick)}</text>'
        )
    for x in _whole_ticks(int(x_low), int(x_high)):
        parts.append(
            f'<text x="{place_x(x):.1f}" y="{height - bottom + 20}" text-anchor="middle">{x}</text>'
        )
    middle = (top + height - bottom) / 2
    parts.append(
        f'<text class="label" x="{(left + width - right) / 2:.0f}" y="{height - 6}" '
        f'text-anchor="middle">{escape(x_label)}</text>'
        f'<text class="label" transform="translate(13 {middle:.0f}) rotate(-90)" '
        f'text-anchor="middle">{escape(y_label)}{" (log scale)" if logarithmic else ""}</text>'
    )
    for index, line in enumerate(series.values()):
        color = f"var(--s{index % SERIES})"
        path = " ".join(f"{place_x(p.x):.1f},{place_y(p.y):.1f}" for p in line)
        parts.append(f'<polyline points="{path}" stroke="{color}"/>')
        parts += [
            f'<circle cx="{place_x(p.x):.1f}" cy="{place_y(p.y):.1f}" r="3.4" fill="{color}">'
            f"<title>{escape(p.tip)}</title></circle>"
            for p in line
        ]
    return "".join(parts) + "</svg>"


def legend(names: Sequence[str]) -> str:
    """A row of coloured names in the order of the series."""
    items = "".join(
        f'<span><i style="background:var(--s{i % SERIES})"></i>{escape(name)}</span>'
        for i, name in enumerate(names)
    )
    return f'<div class="legend">{items}</div>'


def _linear_ticks(high: float) -> list[float]:
    step = _nice(high / 4 or 1.0)
    return [i * step for i in range(math.ceil(high / step - 1e-9) + 1)]


def _log_ticks(low: float, high: float) -> list[float]:
    ticks = [
        factor * 10.0**power
        for power in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
        for factor in (1, 2, 5)
    ]
    begin = max(i for i, t in enumerate(ticks) if t <= low * (1 + 1e-9))
    end = min(i for i, t in enumerate(ticks) if t >= high * (1 - 1e-9))
    ticks = ticks[begin : end + 1]
    return ticks if len(ticks) <= 9 else [ticks[0], *ticks[1:-1][1::3], ticks[-1]]


def _nice(step: float) -> float:
    base = 10.0 ** math.floor(math.log10(step))
    return next(f * base for f in (1, 2, 2.5, 5, 10) if f * base >= step * (1 - 1e-9))


def _whole_ticks(low: int, high: int) -> list[int]:
    step = max(1, round(_nice(max(1.0, (high - low) / 10))))
    return list(range(low, high + 1, step))


def _number(value: float) -> str:
    return f"{value:.3g}"
