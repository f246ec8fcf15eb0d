"""The content that every tracker receives of a run, and its names, which the pages of `runners.reports` use, too."""

import math
import re
from collections import defaultdict
from hashlib import sha256
from pathlib import Path
from typing import Any

import pandas as pd

from runners.config.settings import Settings
from runners.results.layers import LayerRecord
from runners.results.metrics import (
    CHECKPOINT_SHA256,
    GRID_FORMAT,
    MIXED,
    TOKEN_WEIGHTS,
    Status,
    bits_words,
    grid_words,
    names,
    ppl,
)

# Names of charts. Both trackers sort them by name: errors of layers, then perplexities, then the rest.
LAYER_ERROR = "layer_error/"  # + the layer's name in its block: relative errors, with the decoder block as the step
HELD_OUT = "layer_error_held_out/"  # likewise, on sequences that were not used to calibrate
PERPLEXITY = "perplexity/"  # + the text
REST = "summary/"  # + a key of metrics.json
CONVERGENCE = "sweeps/mean_relative_error"  # over the layers, against SWEEP
SWEEP = "sweep"
TABLES = ("layers", "sweeps", "windows")  # the run's files, as tables/<name>
LAYER_ERROR_FIGURE = "figures/layer_error"
SETTING = "setting"  # in the configuration: the same for runs that differ in their seeds alone, to group by
CHECKPOINT = CHECKPOINT_SHA256  # a key of metrics.json

HASH_DIGITS = 8
ATTEMPT = "-attempt-"
# W&B refuses a run with longer tags, name or id, in characters. An id also needs room for the number of an attempt.
LONGEST_TAG, LONGEST_NAME, LONGEST_ID = 64, 128, 128 - len(ATTEMPT) - 1


class Curves:
    """The points of the curves of one run, layer by layer. Their step is the index of the decoder block."""

    def __init__(self) -> None:
        self._names: dict[str, str] = {}  # of curves: the layer of the block that each shows

    def points(self, record: LayerRecord) -> dict[str, float]:
        """The points to log when a layer is finished, at the step `record.block`."""
        curve = self._curve(record.layer)
        values = {LAYER_ERROR + curve: record.relative_error, HELD_OUT + curve: record.held_out_error}
        return {name: value for name, value in values.items() if value is not None and math.isfinite(value)}

    def _curve(self, layer: str) -> str:
        """The last part of the layer's name; its whole name where another layer has taken that (c_proj of GPT-2)."""
        last = layer.rpartition(".")[2]
        return last if self._names.setdefault(last, layer) == layer else layer.replace(".", "_")


def perplexities(metrics: dict[str, Any]) -> dict[str, float]:
    """The perplexity of every text that was measured, under the name of its chart."""
    return {PERPLEXITY + text: metrics[ppl(text)] for text in names(metrics, "ppl")}


def tables(folder: Path, status: str, records: list[LayerRecord]) -> dict[str, pd.DataFrame]:
    """The tables in the run's folder. A run that failed may find files of an earlier attempt there, which are left out."""
    written = {"layers": bool(records), "sweeps": bool(records), "windows": status == Status.DONE}
    files = {name: folder / f"{name}.csv" for name in TABLES if written[name]}
    return {name: read_table(file) for name, file in files.items() if file.is_file()}


def read_table(file: Path) -> pd.DataFrame:
    """A CSV file, with None for empty fields, and without columns that are empty."""
    frame = pd.read_csv(file, keep_default_na=False, na_values=[""]).dropna(axis="columns", how="all")
    return frame.astype(object).where(frame.notna(), None)


def convergence(sweeps: pd.DataFrame) -> dict[int, float]:
    """The mean relative error over the layers after each sweep."""
    errors = defaultdict(list)
    for sweep, error in zip(sweeps["sweep"], sweeps["relative_error"], strict=True):
        if error is not None:
            errors[int(sweep)].append(float(error))
    return {sweep: sum(values) / len(values) for sweep, values in sorted(errors.items())}


def run_words(settings: Settings) -> str:
    """Method, bits and grid, in the words of all tables: `gptq 3 bits group 64 act-order`."""
    if not settings.run.quantizes:
        return settings.run.method.name
    return f"{settings.run.method.name} {bits_words(settings.run.bits)} {_grid(settings)}"


def _grid(settings: Settings) -> str:
    names = ("group_size", "symmetric", "grid_range", "act_order")
    calibration = settings.run.calibration
    labels = {"method": settings.run.method.name, TOKEN_WEIGHTS: calibration and calibration.token_weights}
    if (kind := settings.run.grid_format) is not None:
        labels[GRID_FORMAT] = kind.name
    if settings.run.is_mixed:
        labels[MIXED] = settings.run.layer_words
    return grid_words(labels | {name: getattr(settings.run, name) for name in names})


def title(settings: Settings) -> str:
    """The name of a run. The digest at its end distinguishes runs that differ in other settings."""
    seed = f" s{settings.run.seed}" if settings.run.quantizes else ""
    return f"{run_words(settings)}{seed} {settings.run.model.name} · {settings.digest}"


def run_id(run_name: str, study: str) -> str:
    """An id that is unique in a project even if two studies share a cell, and readable: W&B's viewer lists runs by it."""
    return cut(f"{run_name}-{identifier(study)}", LONGEST_ID)


def attempt_id(run_id: str, attempt: int) -> str:
    """The id for a run that W&B did not start at first, because it does not give back an id with which it has failed."""
    return f"{run_id}{ATTEMPT}{attempt}" if attempt else run_id


def without_attempt(run_id: str) -> str:
    """The id that `attempt_id` was given."""
    return re.sub(rf"{ATTEMPT}\d$", "", run_id)


def identifier(name: str, allowed: str = "A-Za-z0-9_.-") -> str:
    """A name with underscores for all other characters, and then a hash, so that two names never share an identifier."""
    clean = re.sub(f"[^{allowed}]", "_", name)
    return clean if clean == name else f"{clean}-{_hash(name)}"


def cut(text: str, longest: int) -> str:
    """A text of at most `longest` characters; where some are left out, it ends with a hash of all of them."""
    return text if len(text) <= longest else f"{text[: longest - HASH_DIGITS - 1]}-{_hash(text)}"


def _hash(text: str) -> str:
    return sha256(text.encode()).hexdigest()[:HASH_DIGITS]


def tags(settings: Settings) -> list[str]:
    """Tags to filter the runs of a project by."""
    words = [settings.run.method.name, settings.run.model.name]
    if settings.run.quantizes:
        words += [bits_words(settings.run.bits), _grid(settings), f"seed {settings.run.seed}"]
    return [cut(word, LONGEST_TAG) for word in words]


def config(settings: Settings) -> dict[str, Any]:
    """Every setting: `bits`, `group_size`, `seed` and so on at the top, the method as `method.name`; and `SETTING`."""
    return settings.resolved() | {SETTING: f"{run_words(settings)} {settings.run.model.name} · {settings.series}"}


def job_type(settings: Settings) -> str:
    """`quantize`, or `reference` for the unquantized model."""
    return "quantize" if settings.run.quantizes else "reference"
