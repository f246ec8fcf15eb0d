"""The look of the figures: one color and one marker per method in all of them, and the same bytes on every drawing.

The colors are those of Okabe and Ito ("Color universal design", 2008), which color-blind readers tell apart, and some
more; markers repeat the distinction for prints without color. Filled markers and solid lines are per-channel grids, hollow
markers and dashed lines are all others; half-filled ones had act-order or other token weights.
"""

import io
from itertools import count
from typing import Any

from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter
from PIL import Image

from analysis.series import METHOD_ORDER, Row
from runners.results.metrics import LENGTH_ONE_WORDS, PER_CHANNEL, REFERENCE, REFERENCE_WORDS

ACT_ORDER = "act-order"  # as `grid_words` has it
FILLS = {(True, False): "left", (False, True): "bottom", (True, True): "right"}  # by `_kind`
HALF_WORDS = {
    (True, False): ACT_ORDER,
    (False, True): LENGTH_ONE_WORDS,
    (True, True): f"{ACT_ORDER}, {LENGTH_ONE_WORDS}",
}
DPI = 160  # sharp on a screen of double density at the width that the page shows, and in a column of print
HOLLOW = "white"
GRAY = "#999999"  # of lines that help to read and are no method's
# A letter of matplotlib's, or (corners, 0 for a polygon or 1 for a star, degrees that it is turned by).
Marker = str | tuple[int, int, int]
METHODS: dict[str, tuple[str, Marker]] = {  # color, marker
    REFERENCE: ("#000000", "."),
    "rtn": ("#7f7f7f", "s"),
    "awq": ("#e69f00", "v"),
    "gptq": ("#d55e00", "^"),
    "quantease": ("#0072b2", "o"),
    "gptq_quantease": ("#56b4e9", "D"),
    "quantease_refit": ("#009e73", "P"),
    "quantease_structured": ("#cc79a7", "h"),
    "quantease_outlier": ("#5b2a86", "*"),
    "spqr_1pct": ("#a3a500", "<"),
    "spqr": ("#8c510a", "X"),
    "foem": ("#fb9a99", ">"),
    "k_babai": ("#b15928", "p"),
    "ldlqrg": ("#e377c2", "d"),
    "cdquant": ("#17becf", "8"),
    "admm_q": ("#08306b", "H"),
    "gptaq": ("#f4a582", (3, 1, 0)),
    "qep_gptq": ("#b2182b", (4, 1, 0)),
    "qep_quantease": ("#2166ac", (4, 1, 45)),
    "qronos": ("#762a83", (6, 1, 0)),
    "quantease_best": ("#000080", (4, 0, 45)),
    "gptq_refit": ("#fdb863", (5, 1, 0)),
    "awq_refit": ("#8073ac", (5, 1, 36)),
    "quantease_paired": ("#00b7c3", (5, 0, 180)),
}
# For methods that are added, and for series of one method that differ in their settings; reused in turn after five.
OTHERS: list[tuple[str, Marker]] = [
    ("#1b9e77", "p"),
    ("#e7298a", "d"),
    ("#66a61e", ">"),
    ("#7570b3", "8"),
    ("#a6761d", "H"),
]
RC: Any = {
    "font.size": 9,
    "axes.titlesize": 9,
    "axes.grid": True,
    "grid.alpha": 0.25,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "lines.markersize": 5,
    "text.parse_math": False,  # a name with two dollar signs is a name
}
styled = rc_context(RC)  # decorates the functions that draw; the user's own matplotlib settings stay as they are

Look = dict[str, tuple[str, Marker]]


def looks(rows: list[Row]) -> Look:
    """The color and marker of every label (a method's name, perhaps with its settings), in the order of tables."""
    free = count()
    labels = dict.fromkeys(row["label"] for row in sorted(rows, key=lambda row: row["rank"]))
    # Known methods first whatever the rank of their first row, so that the legends of all figures have one order.
    known = {label: REFERENCE if label in REFERENCE_WORDS else label for label in labels}
    order = {name: place for place, name in enumerate(METHOD_ORDER)}
    ordered = sorted(labels, key=lambda label: order.get(known[label], len(order)))
    return {label: METHODS.get(known[label]) or OTHERS[next(free) % len(OTHERS)] for label in ordered}


def is_hollow(grid: str) -> bool:
    """Whether the markers of a grid, in words, are hollow."""
    return grid not in ("", PER_CHANNEL)


def fill(grid: str) -> dict[str, Any]:
    """How the markers of a grid, in words, are filled: whole, hollow, or half where it is none of the plain ones."""
    if half := FILLS.get(_kind(grid)):
        return {"fillstyle": half, "markerfacecoloralt": HOLLOW}
    return {"markerfacecolor": HOLLOW} if is_hollow(grid) else {}


def fill_words(grid: str) -> str:
    """What the fill of a marker says, for the legend."""
    return PER_CHANNEL if not is_hollow(grid) else HALF_WORDS.get(_kind(grid), "groups, or its own grid")


def _kind(grid: str) -> tuple[bool, bool]:
    """Whether a grid, in words, has act-order, and other token weights."""
    return ACT_ORDER in grid, LENGTH_ONE_WORDS in grid


def panels(
    rows: int, columns: int, width: float = 3.6, height: float = 2.9, share: bool = False
) -> tuple[Figure, list[list[Axes]]]:
    """A figure of rows x columns panels, each `width` x `height` inches, with room for a legend; axes may be shared."""
    figure = Figure(figsize=(width * columns + 1.9, height * rows + 0.3), layout="constrained")
    FigureCanvasAgg(figure)  # no pyplot: it would keep every figure alive, and open a window where there is a display
    axes = figure.subplots(rows, columns, squeeze=False, sharex=share, sharey=share)
    return figure, [list(row) for row in axes]


def legend(figure: Figure, look: Look, extra: list[Line2D], line: str = "-") -> None:
    """One legend for all panels, to their right, where it covers no data; `line` is that of the methods."""
    handles = [
        legend_key(label, color=color, marker=marker, linestyle="--" if label in REFERENCE_WORDS else line)
        for label, (color, marker) in look.items()
    ]
    figure.legend(handles=[*handles, *extra], loc="outside right upper", fontsize=8)


def legend_key(label: str, **style: Any) -> Line2D:
    """An entry of the legend; by default a gray line, for what a line or marker means whatever its method."""
    return Line2D([], [], label=label, **({"color": "#444444", "linewidth": 1.2} | style))


def log_axis(axes: Axes, which: str) -> None:
    """Make the axis `which` ("x" or "y") logarithmic, with ticks written as plain numbers. To be called after plotting."""
    axes.set(**{f"{which}scale": "log"})
    axis = axes.yaxis if which == "y" else axes.xaxis
    low, high = axes.get_ylim() if which == "y" else axes.get_xlim()
    # 1, 2 and 5 times the powers of ten give three ticks or more once the axis spans a factor of 8. A shorter one may
    # hold none of them: it gets more.
    subs = (1.0, 2.0, 5.0) if high > 8 * low else (1.0, 1.5, 2.0, 3.0, 4.0, 5.0, 6.0, 8.0)
    axis.set_major_locator(LogLocator(base=10, subs=subs, numticks=15))
    axis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
    axis.set_minor_formatter(NullFormatter())


def short(value: float) -> str:
    """A number as axes show it: 1.3B, 350M, 20k, 0.05."""
    for size, unit in ((1e9, "B"), (1e6, "M"), (1e4, "k")):  # from 10,000 on: 2000 and 5000 read well as they are
        if abs(value) >= size:
            return f"{value / (1e3 if unit == 'k' else size):g}{unit}"
    return f"{value:g}"


def png(figure: Figure) -> bytes:
    """The figure as a PNG file with the same bytes on every call, so that a report that did not change shows no diff."""
    buffer = io.BytesIO()
    with rc_context(RC):
        figure.savefig(buffer, format="png", dpi=DPI, metadata={"Software": None})  # which would name a version
    small = io.BytesIO()
    # A palette takes a third of the bytes, and lines and text need no more colors. Dithering would make noise of
    # the anti-aliased edges, which does not compress.
    Image.open(buffer).convert("RGB").quantize(256, dither=Image.Dither.NONE).save(small, format="png", optimize=True)
    return small.getvalue()
