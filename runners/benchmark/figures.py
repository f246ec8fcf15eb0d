"""The figures of the benchmark, drawn from its tables."""

from pathlib import Path
from typing import Any

import matplotlib
import pandas as pd

matplotlib.use("Agg")  # before pyplot: files only, whatever display there is
from matplotlib import pyplot as plt

LINES = {
    "column_by_column": ("column by column", "o--", "tab:red"),
    "sweep": ("QuantEase, one sweep", "o-", "tab:blue"),
    "floor": ("floor: matrix product or memory traffic alone", "-", "0.5"),
}
PHASES = {"load": "0.7", "calibrate": "tab:green", "solve": "tab:blue", "propagate": "tab:orange"}


def draw(folder: Path, title: str) -> None:
    """Draw `layers.png` and `models.png` from the tables of the same name, where these exist."""
    if (folder / "layers.csv").exists():
        _layers(pd.read_csv(folder / "layers.csv"), folder / "layers.png", title)
    if (folder / "models.csv").exists():
        _models(pd.read_csv(folder / "models.csv"), folder / "models.png", title)


def _layers(table: pd.DataFrame, file: Path, title: str) -> None:
    """The time of a sweep by layer, in the order of the work, on a logarithmic axis."""
    table = table.assign(flop=2 * table["out_features"] * table["in_features"] ** 2).sort_values("flop", kind="stable")
    sizes = zip(table["out_features"], table["in_features"], strict=True)
    names = [f"{out_features:,} x {in_features:,}" for out_features, in_features in sizes]
    figure, axes = plt.subplots(figsize=(9, 4.5), layout="constrained")
    for column, (label, style, color) in LINES.items():
        axes.plot(names, table[column] * 1e3, style, label=label, color=color)
    axes.set(yscale="log", ylabel="milliseconds per sweep", xlabel="layer (out x in)", title=title)
    axes.tick_params(axis="x", labelrotation=60)
    axes.grid(axis="y", alpha=0.3)
    axes.legend()
    _save(figure, file)


def _models(table: pd.DataFrame, file: Path, title: str) -> None:
    """One bar per model and method, stacked by phase."""
    names = [f"{model}\n{method}" for model, method in zip(table["model"], table["method"], strict=True)]
    figure, axes = plt.subplots(figsize=(1.5 + 1.3 * len(names), 4), layout="constrained")
    bottom = pd.Series(0.0, table.index)
    for phase, color in PHASES.items():
        values = table[f"{phase}_seconds"]
        axes.bar(names, values, bottom=bottom, label=phase, color=color, width=0.6)
        bottom = bottom + values
    tokens = f"{table['sequences'].iloc[0]} x {table['length'].iloc[0]:,} tokens"
    axes.set(ylabel="seconds", title=f"{title}\n{tokens}, random weights")
    axes.legend()
    _save(figure, file)


def _save(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=130)
    plt.close(figure)
