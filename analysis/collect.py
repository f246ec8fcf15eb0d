"""All runs of a study as one tidy data frame, a row a run; and the tables that a run keeps in files of its own."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from analysis.rows import read

METRICS = "metrics.json"
REFERENCE = "fp16"  # the method that leaves the weights as they are
CHOSEN = "calibration_inputs"  # what the layers before a layer were while its inputs were recorded


def collect(study: Path, conditions: Mapping[str, str] | None = None) -> pd.DataFrame:
    """Read every run of a study folder: its metrics, the device it ran on, and under `folder` where that stands.

    Args:
        study: the folder that holds `<model>/<run>/metrics.json`.
        conditions: columns and their values, as written on the command line; other runs are left out (see `keep`).

    Raises:
        FileNotFoundError: the folder holds no runs.
        ValueError: a file is damaged, a condition fits no run, or the runs are of unlike kinds that no table may mix:
            different texts of one name, different protocols, calibration inputs from different models.
    """
    rows = [_run(file) for file in sorted(study.glob(f"*/*/{METRICS}"))]
    if not rows:
        raise FileNotFoundError(f"{study} holds no runs: there is no <model>/<run>/metrics.json in it")
    frame = _tidy(rows)
    for column, value in (conditions or {}).items():
        frame = keep(frame, column, value)
    _refuse_mixtures(frame)
    return frame


def collect_run(folder: Path) -> pd.DataFrame:
    """One run as a frame of one row.

    Raises:
        FileNotFoundError: the folder is no run's, or the run has not ended.
        ValueError: a file is damaged.
    """
    if not (folder / METRICS).exists():
        raise FileNotFoundError(f"{folder} holds no {METRICS}: it is no run's folder, or the run has not ended")
    return _tidy([_run(folder / METRICS)])


def keep(frame: pd.DataFrame, column: str, value: str) -> pd.DataFrame:
    """The runs in which `column` has the value that is written `value`, and the unquantized ones.

    Raises:
        ValueError: there is no such column, or no run has that value.
    """
    if column not in frame:
        raise ValueError(f"the runs have no {column}: they have {', '.join(map(str, frame.columns))}")
    written = [_written(entry) for entry in frame[column]]
    if value not in written:
        raise ValueError(f"no run has {column}={value}: there are {', '.join(sorted(set(written)))}")
    wanted = [entry == value or method == REFERENCE for entry, method in zip(written, frame["method"], strict=True)]
    return frame.loc[wanted]


def environment(folder: str) -> dict[str, Any]:
    """What `environment.json` of a run says; nothing where there is none."""
    return _json(Path(folder) / "environment.json") if (Path(folder) / "environment.json").exists() else {}


def rows_of(runs: pd.DataFrame, name: str) -> pd.DataFrame:
    """The rows of a file that every run may have (layers.csv, windows.csv, sweeps.csv), under the runs' series and seed.

    Raises:
        ValueError: a file is damaged.
    """
    tables = []
    for run in runs.to_dict("records"):
        file = Path(run["folder"]) / name
        if file.exists():
            try:
                table = pd.read_csv(file)
            except ValueError as error:
                raise ValueError(f"{file} is damaged ({error}): run it again with force=true") from error
            seed = run.get("seed")
            tables.append(table.assign(series=run["series"], seed=0 if seed is None or seed != seed else int(seed)))
    return pd.concat(tables, ignore_index=True) if tables else pd.DataFrame()


def _tidy(rows: list[dict[str, Any]]) -> pd.DataFrame:
    frame = pd.DataFrame(rows)
    frame["series"] = frame["series"].fillna(frame["folder"])
    return frame


def _run(file: Path) -> dict[str, Any]:
    metrics = {"series": None, "group_size": None, CHOSEN: None} | read(file)
    if metrics.get("method") != REFERENCE:
        metrics[CHOSEN] = metrics[CHOSEN] or "quantized"  # what runs did before they said so
    return metrics | {"device": environment(str(file.parent)).get("device"), "folder": str(file.parent)}


def _json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is damaged ({error}): run it again with force=true") from error
    if not isinstance(content, dict):
        raise ValueError(f"{file} is damaged (no table of names and values): run it again with force=true")
    return content


def _written(entry: Any) -> str:
    """An entry as it is written on the command line."""
    if entry is None or entry != entry:  # a gap is None or not a number
        return "null"
    return f"{entry:g}" if isinstance(entry, int | float) and not isinstance(entry, bool) else str(entry)


def _refuse_mixtures(frame: pd.DataFrame) -> None:
    """Numbers of one column must be of one protocol and, for each model (tokenizers differ), of one text."""
    inputs = sorted(set(frame[CHOSEN].dropna()))
    if len(inputs) > 1:
        choices = " or ".join(f"{CHOSEN}={value}" for value in inputs)
        raise ValueError(f"the runs mix {CHOSEN}: {', '.join(inputs)}. Choose by {choices}")
    for column in frame.columns:
        kind, _, text = column.partition("/")
        if kind == "protocol":
            _refuse(list(frame[column].dropna()), column, f"the runs on {text} mix protocols")
        elif kind == "sha256":
            for model, runs in frame.groupby("model"):
                _refuse(
                    list(runs[column].dropna()),
                    column,
                    f"the runs of {model} on {text} mix texts (another Python, or other data)",
                )


def _refuse(values: list[str], column: str, what: str) -> None:
    different = sorted(set(values))
    if len(different) > 1:
        raise ValueError(f"{what}: {', '.join(different)}. Choose by {column}=...")
