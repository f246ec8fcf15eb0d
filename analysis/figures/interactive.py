"""Perplexity against bits per weight as a figure to zoom and point at, in Vega-Lite (vega.github.io/vega-lite).

It shows what the upper panels of `pareto` show, with the same colors, markers and order of methods.
"""

import math
from typing import Any

from analysis.figures.pareto import front
from analysis.figures.points import having, quantized, texts_of
from analysis.figures.style import GRAY, Marker, is_hollow, looks
from analysis.series import Row, protocol_of
from runners.results.metrics import BITS_PER_WEIGHT, REFERENCE, bits_text, ppl

HEXAGON = "M0,-1L0.87,-0.5L0.87,0.5L0,1L-0.87,0.5L-0.87,-0.5Z"
SHAPES = {  # of matplotlib's markers, by Vega's names or as paths
    ".": "circle",
    "o": "circle",
    "s": "square",
    "v": "triangle-down",
    "^": "triangle-up",
    "<": "triangle-left",
    ">": "triangle-right",
    "D": "diamond",
    "d": "M0,-1L0.6,0L0,1L-0.6,0Z",
    "P": "cross",
    "X": "M-1,-0.5L-0.5,-1L0,-0.5L0.5,-1L1,-0.5L0.5,0L1,0.5L0.5,1L0,0.5L-0.5,1L-1,0.5L-0.5,0Z",
    "*": "M0,-1L0.24,-0.32L0.95,-0.31L0.38,0.12L0.59,0.81L0,0.4L-0.59,0.81L-0.38,0.12L-0.95,-0.31L-0.24,-0.32Z",
    "h": HEXAGON,
    "H": HEXAGON,
    "8": "M-0.38,-0.92L0.38,-0.92L0.92,-0.38L0.92,0.38L0.38,0.92L-0.38,0.92L-0.92,0.38L-0.92,-0.38Z",
    "p": "M0,-1L0.95,-0.31L0.59,0.81L-0.59,0.81L-0.95,-0.31Z",
}
TOOLTIP = ("method", "bits", "grid", "bits per weight", "perplexity", "seeds", "run folder")
MARGIN = 1.05  # of the axes, beyond the outermost points: a factor of perplexities

LEGEND = "method (click hides it)"

Spec = dict[str, Any]


def interactive_pareto(summary: list[Row], model: str) -> dict[str, Spec]:
    """For each text on which a quantized run of the model has a perplexity: the figure, as a Vega-Lite specification.

    Drag moves it, Ctrl and the wheel zoom it, a double click shows all, and a click in the legend hides a method.
    """
    rows = [row for row in summary if row["model"] == model]
    texts = [text for text in texts_of(rows) if having(quantized(rows), ppl(text))]
    return {text: _figure(rows, text, protocol_of(rows, text)) for text in texts}


def shape(marker: Marker) -> str:
    """A marker of matplotlib's by Vega's name, or as the path of its outline."""
    if isinstance(marker, str):
        return SHAPES[marker]
    corners, is_star, turned = marker
    points = []
    for place in range(corners * (1 + is_star)):
        angle = math.radians(turned) + math.tau * place / (corners * (1 + is_star))  # counterclockwise, from the top
        radius = 0.5 if is_star and place % 2 else 1.0  # of a star, every second point is an inner one
        points.append(
            f"{round(-radius * math.sin(angle), 2):g},{round(-radius * math.cos(angle), 2):g}"
        )  # y points down
    return f"M{'L'.join(points)}Z"


def _figure(rows: list[Row], text: str, protocol: str) -> Spec:
    points = having(quantized(rows), ppl(text))
    values = [_point(row, ppl(text)) for row in points]
    low, high = min(value["low"] for value in values), max(value["high"] for value in values)
    full = [{"y": row[ppl(text)], "label": row["label"]} for row in having(rows, ppl(text)) if row["bits"] is None]
    low = min([low, *(line["y"] for line in full)])
    steps = [{"x": row[BITS_PER_WEIGHT], "y": row[ppl(text)]} for row in front(points, ppl(text))]
    return {
        "title": {"text": f"{rows[0]['model']}: {text}", "subtitle": f"protocol {protocol}"},
        "width": "container",
        "height": 420,
        "background": "white",
        "autosize": {"type": "fit", "contains": "padding"},
        "layer": [
            {
                "data": {"values": full},
                "mark": {"type": "rule", "strokeDash": [6, 4]},
                "encoding": {"y": _y(low, high)},
            },
            _front(steps),
            _bars(values),
            _points(values, points),
        ],
        "config": {"legend": {"orient": "bottom", "columns": 2, "labelLimit": 160}, "font": "system-ui, sans-serif"},
    }


def _point(row: Row, metric: str) -> Spec:
    """A series as the figure and its tooltip show it; a single seed has a bar of no length."""
    mean, deviation = row[metric], row["deviations"].get(metric, math.nan)
    spread = 0.0 if math.isnan(deviation) else deviation
    return {
        "x": row[BITS_PER_WEIGHT],
        "y": mean,
        "low": max(mean - spread, mean / 10),  # a logarithmic axis has no zero
        "high": mean + spread,
        "hollow": is_hollow(row["grid"]),
        "method": row["label"],
        "bits": bits_text(row["bits"]),
        "grid": row["grid"],
        "bits per weight": f"{row[BITS_PER_WEIGHT]:.2f}",
        "perplexity": f"{mean:.2f}" + (f" ± {spread:.2f}" if spread else ""),
        "seeds": row["seeds"],
        "run folder": ", ".join(row["places"]),
    }


def _y(low: float, high: float) -> Spec:
    scale = {"type": "log", "domain": [low / MARGIN, high * MARGIN], "nice": False}
    return {"field": "y", "type": "quantitative", "scale": scale, "title": "perplexity", "axis": {"format": "~s"}}


def _x() -> Spec:
    title = "bits per weight, everything stored"
    return {
        "field": "x",
        "type": "quantitative",
        "scale": {"zero": False, "nice": False, "padding": 15},
        "title": title,
    }


def _front(steps: list[Spec]) -> Spec:
    mark = {"type": "line", "interpolate": "step-after", "color": GRAY, "strokeWidth": 1, "clip": True}
    return {
        "data": {"values": steps},
        "mark": mark,
        "encoding": {"x": _x(), "y": {"field": "y", "type": "quantitative"}},
    }


HIDE = [{"filter": {"not": {"param": "hidden", "empty": False}}}]


def _bars(values: list[Spec]) -> Spec:
    ends = {"y": {"field": "low", "type": "quantitative"}, "y2": {"field": "high"}}
    return {
        "data": {"values": values},
        "transform": HIDE,
        "mark": {"type": "rule", "clip": True},
        "encoding": {"x": _x(), **ends, "stroke": {"field": "method", "type": "nominal", "title": LEGEND}},
    }


def _points(values: list[Spec], rows: list[Row]) -> Spec:
    look = {label: style for label, style in looks(rows).items() if label != REFERENCE}
    labels = list(look)
    colors = {"domain": labels, "range": [color for color, _ in look.values()]}
    shapes = {"domain": labels, "range": [shape(marker) for _, marker in look.values()]}
    method: Spec = {"field": "method", "type": "nominal", "title": LEGEND}
    return {
        "data": {"values": values},
        "transform": HIDE,
        "params": [
            {"name": "zoom", "select": {"type": "interval", "zoom": "wheel![event.ctrlKey]"}, "bind": "scales"},
            {"name": "hidden", "select": {"type": "point", "fields": ["method"], "toggle": "true"}, "bind": "legend"},
        ],
        "mark": {"type": "point", "filled": True, "size": 70, "opacity": 1, "clip": True},
        "encoding": {
            "x": _x(),
            "y": {"field": "y", "type": "quantitative"},
            "fill": method | {"scale": colors},
            "stroke": method | {"scale": colors},
            "shape": method | {"scale": shapes},
            "fillOpacity": {"condition": {"test": "datum.hollow", "value": 0}, "value": 1},
            "tooltip": [{"field": name, "type": "nominal"} for name in TOOLTIP],
        },
    }
