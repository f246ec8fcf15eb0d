"""What is tracked of a run, and under which names: the same for every tracker, and for the dashboards made of it."""

import math
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pandas as pd

from runners.config.settings import Settings
from runners.results.layers import LayerRecord

LAYER_INDEX, BLOCK, SWEEP = "layer_index", "block", "sweep"  # what the curves are drawn against
LAYER = "layer/"  # + one of LAYER_VALUES, against LAYER_INDEX
LAYER_VALUES = ("relative_error", "held_out_error", "bits_per_weight", "seconds")  # those that a record has
ERROR = "error/"  # + the layer's name in its block, against BLOCK: a few readable curves a run
CONVERGENCE = "convergence/mean_relative_error"  # over the layers, against SWEEP
TABLES = ("layers", "sweeps", "windows")  # the run's files, as tables/<name>
LAYER_ERROR_FIGURE = "figures/layer_error"
SETTING = "setting"  # in the configuration: the same for runs that differ in their seeds alone, to group by
CHECKPOINT = "checkpoint/sha256"  # of the quantized checkpoint, a key of metrics.json


class Curves:
    """The points of the curves of one run, a layer after the other."""

    def __init__(self) -> None:
        self._layers = 0
        self._names: dict[str, str] = {}  # of curves: the layer of the block that each shows

    def points(self, record: LayerRecord) -> dict[str, float]:
        """What is logged when a layer is finished: its values, and what they are drawn against."""
        values = {LAYER + name: getattr(record, name, None) for name in LAYER_VALUES}
        values[ERROR + self._curve(record.layer)] = record.relative_error
        points = {name: value for name, value in values.items() if value is not None and math.isfinite(value)}
        self._layers += 1
        return {LAYER_INDEX: float(self._layers - 1), BLOCK: float(record.block)} | points

    def _curve(self, layer: str) -> str:
        """The layer's last name, or all its names where a block has two of that one (c_proj of GPT-2)."""
        last = layer.rpartition(".")[2]
        return last if self._names.setdefault(last, layer) == layer else layer.replace(".", "_")


def tables(folder: Path, status: str, records: list[LayerRecord]) -> dict[str, pd.DataFrame]:
    """The tables that the run has left in its folder; of one that failed, only what belongs to this attempt."""
    written = {"layers": bool(records), "sweeps": bool(records), "windows": status == "done"}
    files = {name: folder / f"{name}.csv" for name in TABLES if written[name]}
    return {name: read_table(file) for name, file in files.items() if file.is_file()}


def read_table(file: Path) -> pd.DataFrame:
    """A CSV file with None for what is empty or not a number, without the columns that are empty altogether."""
    frame = pd.read_csv(file, keep_default_na=False, na_values=[""]).dropna(axis="columns", how="all")
    return frame.astype(object).where(frame.notna(), None)


def convergence(sweeps: pd.DataFrame) -> dict[int, float]:
    """The mean relative error over the layers after each sweep."""
    errors = defaultdict(list)
    for sweep, error in zip(sweeps["sweep"], sweeps["relative_error"], strict=True):
        if error is not None:
            errors[int(sweep)].append(float(error))
    return {sweep: sum(values) / len(values) for sweep, values in sorted(errors.items())}


def describe(settings: Settings) -> str:
    """The method and its grid, in the words by which a person tells the runs of a study apart."""
    words = [settings.run.method.name]
    if settings.run.quantizes:
        words += [f"{settings.run.bits}b", f"g{settings.run.group_size}" if settings.run.group_size else "per-channel"]
        words += ["symmetric"] * settings.run.symmetric + ["mse"] * (settings.run.grid_range == "mse")
        words += ["act-order"] * settings.run.act_order
    return " ".join(words)


def title(settings: Settings) -> str:
    """The name of a run; the digest tells apart those that differ elsewhere."""
    seed = f" s{settings.run.seed}" if settings.run.quantizes else ""
    return f"{describe(settings)}{seed} {settings.run.model.name} · {settings.digest}"


def run_id(run_name: str, study: str) -> str:
    """Unique in a project where studies share cells, and readable: W&B's viewer lists offline runs by their id."""
    return f"{run_name}-{re.sub(r'[^A-Za-z0-9_.-]', '_', study)}"


def tags(settings: Settings) -> list[str]:
    """By which a project's runs can be filtered."""
    if not settings.run.quantizes:
        return [settings.run.method.name, settings.run.model.name]
    groups = f"group {settings.run.group_size}" if settings.run.group_size else "per-channel"
    words = [
        settings.run.method.name,
        settings.run.model.name,
        f"{settings.run.bits} bits",
        groups,
        f"seed {settings.run.seed}",
    ]
    return words + ["act-order"] * settings.run.act_order + ["symmetric"] * settings.run.symmetric


def config(settings: Settings) -> dict[str, Any]:
    """Every setting: `bits`, `group_size`, `seed` and so on at the top, the method as `method.name`; and `SETTING`."""
    return settings.resolved() | {SETTING: f"{describe(settings)} {settings.run.model.name} · {settings.series}"}


def job_type(settings: Settings) -> str:
    """Whether a run quantizes or is what others are compared with."""
    return "quantize" if settings.run.quantizes else "reference"
