"""Which tokens the calibration sees: the share of an input's energy that its largest tokens carry, by decoder block.

The Hessian of a layer is a sum over tokens, so tokens with large inputs rule it. Where the largest 1 % carry most of the
energy ||x||^2, a layer error tells about these few and little about the others.
"""

import re

import pandas as pd
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from analysis.figures.points import LeftOut
from analysis.figures.style import GRAY, OTHERS, legend, legend_key, panels, styled
from analysis.series import Row
from runners.results.metrics import REFERENCE, bits_words

ENERGY_CAPTION = "Share of the energy of an input that the largest 1 % of the calibration tokens carry"
EVEN = 0.01  # the share where all tokens are alike
LARGE = 0.25  # from here on a point says where in the window the largest tokens are
NUMBERS = ["energy_top_percent", "energy_max_over_median", "energy_position", "energy_position_share"]
STYLES = ("-", "--", ":", "-.")  # of lines beyond the five colors


@styled
def token_energy(summary: list[Row], layers: pd.DataFrame, model: str) -> Figure:
    """The share by decoder block, one line per kind of input: that of the run with the most bits, named in the title.

    Args:
        summary: the series, from `analysis.series.summarize`.
        layers: layers.csv of all runs, from `analysis.collect.read_tables`.
        model: the model whose inputs are shown.
    """
    row, seed, measured = _closest_run(summary, layers, model)
    figure, axes = panels(1, 1, width=5.6, height=3.2)
    axis = axes[0][0]
    look = {}
    for place, (name, line) in enumerate(_by_input(measured).items()):
        color, marker = OTHERS[place % len(OTHERS)]
        look[name] = (color, marker)
        style = STYLES[place // len(OTHERS) % len(STYLES)]
        shares = list(line["energy_top_percent"])
        axis.plot(list(line["block"]), shares, color=color, marker=marker, markersize=3, linestyle=style, linewidth=1)
        _tell_positions(axis, line, color)
    axis.axhline(EVEN, color=GRAY, linewidth=1, linestyle="--", zorder=0)
    axis.set(ylim=(0, 1.05), xlabel="decoder block", ylabel="share of the energy in 1 % of the tokens")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    run = ", ".join([row["label"], bits_words(row["bits"]), row["grid"], f"seed {seed}"])
    axis.set_title(f"{model}: calibration of {run}")
    legend(figure, look, [legend_key("all tokens alike", color=GRAY, linestyle="--")])
    return figure


def _closest_run(summary: list[Row], layers: pd.DataFrame, model: str) -> tuple[Row, int, pd.DataFrame]:
    """The run of the most bits that has token energies, with its seed and layers; of several, the first of the tables.

    Calibration sees what the quantized blocks before produce, so runs differ a little; this one is close to full precision.

    Raises:
        LeftOut: there is none.
    """
    quantized = [row for row in summary if row["model"] == model and row["method"] != REFERENCE]
    known = layers.dropna(subset=NUMBERS[:1]) if set(NUMBERS) <= set(layers) else layers.iloc[:0]
    for row in sorted(quantized, key=lambda row: -row["bits"]):
        if len(known) and len(found := known.loc[known["series"] == row["series"]]):
            seed = int(found["seed"].min())
            return row, seed, found.loc[found["seed"] == seed]
    raise LeftOut(f"no run of {model} has token energies in its layers.csv (older runs have none).")


def _by_input(layers: pd.DataFrame) -> dict[str, pd.DataFrame]:
    """The rows of each input, by block. Layers that share an input have equal numbers in every block and are one of them.

    Of experts, which are many and alike, it is the one with the largest share in its block.
    """
    kinds = layers.assign(kind=[re.sub(r"(?<=\.)\d+(?=\.)", "*", name) for name in layers["layer"]])
    inputs: dict[tuple[object, ...], list[str]] = {}
    lines: dict[str, pd.DataFrame] = {}
    for name, part in kinds.groupby("kind", sort=False):
        line = part.sort_values("energy_top_percent", kind="stable").groupby("block").tail(1).sort_values("block")
        lines[str(name)] = line
        # NaN, where the position is not known, is not equal to itself
        numbers = tuple(line[["block", *NUMBERS]].fillna(-1.0).to_numpy(float).ravel())
        inputs.setdefault(numbers, []).append(str(name))
    return {_name(names): lines[names[0]] for names in inputs.values()}


def _name(names: list[str]) -> str:
    """`self_attn.q_proj, k_proj, v_proj` for layers that share an input."""
    return ", ".join([names[0], *(name.split(".")[-1] for name in names[1:])])


def _tell_positions(axis: Axes, line: pd.DataFrame, color: str) -> None:
    """Beside the largest of the large shares of every position: the position, and in how many sequences it is there."""
    large = line.loc[line["energy_top_percent"] >= LARGE].dropna(subset=NUMBERS)
    for _, part in large.groupby("energy_position"):
        top = part.loc[part["energy_top_percent"].idxmax()]
        words = f"position {top['energy_position']:.0f} ({100 * top['energy_position_share']:.0f} %)"
        point = (top["block"], top["energy_top_percent"])
        axis.annotate(words, point, (4, 4), textcoords="offset points", fontsize=7, color=color)
